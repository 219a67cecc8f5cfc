"""Reads a window's rows, joined with the supervision and the user histories of the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from exfm_ray.data.labels.corrections import learned_fragments, with_corrections
from exfm_ray.data.labels.releases import is_released, with_released_labels
from exfm_ray.data.readers import WindowPass
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.errors import UserError
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.shared_rows import SharedStore
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.supervision import SupervisionStore
from exfm_ray.stores.user_history import HistoryStore


@dataclass(frozen=True)
class AugmentedReader:
    """Reads the rows of some domains with everything that a teacher adds to them.

    Attributes:
        stream_root: folder of the stream.
        store: supervision, joined to the rows of passes that learn; None if no arm uses it.
        policy: decides which windows have a teacher.
        domains: indices of the domains whose rows are read.
        tasks: tasks of the job.
        shared: rows of the teacher's tables. A window is ready to be evaluated once its rows are
            committed, because models take them over before they evaluate the window.
        history: user histories, joined to the rows of every pass as they were before the window.
    """

    stream_root: AnyPath
    store: SupervisionStore | None
    policy: SnapshotPolicy
    domains: tuple[int, ...]
    tasks: tuple[str, ...]
    shared: SharedStore | None = None
    history: HistoryStore | None = None

    def supervised(self, window_pass: WindowPass) -> bool:
        """Return True if the pass learns from supervision."""
        return (
            window_pass.purpose == "learn"
            and self.store is not None
            and self.policy.version(window_pass.window) is not None
        )

    def ready(self, window_pass: WindowPass) -> bool:
        """Return True when everything that the pass needs is committed."""
        window = window_pass.window
        shared = self._shared_before(window_pass)
        if shared and not shared.has(window):
            return False
        if self.history and not self.history.ready(window):
            return False
        if not is_released(self._stream, window, self.tasks):
            return False
        store = self._supervision_of(window_pass)
        return store is None or store.has(window)

    def missing_input(self, window_pass: WindowPass) -> str:
        """Name what the pass waits for, for an error message."""
        window = window_pass.window
        shared = self._shared_before(window_pass)
        if shared:
            return f"the shared table rows of window {window} (teacher '{shared.teacher}')"
        if self.history and not self.history.ready(window):
            teacher = self.history.teacher
            return f"the representations of window {window - 1} (teacher '{teacher}')"
        if not is_released(self._stream, window, self.tasks):
            return f"the labels of window {window} for {', '.join(self.tasks)}"
        teacher = self.store.teacher if self.store else "none"
        return f"the supervision of window {window} (teacher '{teacher}')"

    def _supervision_of(self, window_pass: WindowPass) -> SupervisionStore | None:
        return self.store if self.supervised(window_pass) else None

    def _shared_before(self, window_pass: WindowPass) -> SharedStore | None:
        """Return the store of the table rows that models take over before this pass, if any."""
        has_teacher = self.policy.version(window_pass.window) is not None
        return self.shared if window_pass.purpose == "evaluate" and has_teacher else None

    @cached_property
    def _stream(self) -> EventStream:
        return EventStream.open(self.stream_root)

    def fragments(self, window_pass: WindowPass) -> Sequence[Fragment]:
        """Return the fragments that hold a row of the domains; to learn: `learned_fragments`."""
        window = window_pass.window
        if window_pass.purpose == "learn":
            return learned_fragments(self._stream, window, self.tasks, self.domains)
        return [
            fragment
            for fragment in self._stream.window(window).fragments
            if any(fragment.domain_rows[domain] for domain in self.domains)
        ]

    def read(self, window_pass: WindowPass, fragment: Fragment) -> pa.Table:
        """Read the rows of one fragment, with the columns that the stores add."""
        window = window_pass.window

        def read_events() -> pa.Table:
            events = with_released_labels(self._stream, window, fragment, self.tasks)
            return self._augment(window_pass, fragment, events)

        def read_earlier(window: int, fragment: Fragment) -> pa.Table | None:
            return self._read_corrected(window_pass, window, fragment)

        if window_pass.purpose == "learn":
            events = with_corrections(
                self._stream, window, fragment, self.tasks, read_events, read_earlier
            )
        else:
            events = read_events()
        in_domains = pc.is_in(events["domain"], pa.array(self.domains, pa.int32()))
        return events.filter(in_domains)

    def _read_corrected(
        self,
        window_pass: WindowPass,
        window: int,
        fragment: Fragment,
    ) -> pa.Table | None:
        """Read an earlier fragment that the pass's corrections point to, with its own supervision.

        Returns None if the earlier window had no teacher but the pass has one.
        """
        earlier_pass = WindowPass(window, "learn")
        if self.supervised(window_pass) and not self.supervised(earlier_pass):
            return None
        return self._augment(earlier_pass, fragment, self._stream.read(window, fragment))

    def _augment(
        self,
        window_pass: WindowPass,
        fragment: Fragment,
        events: pa.Table,
    ) -> pa.Table:
        """Add the window's supervision, and the user histories from before the window."""
        window = window_pass.window
        store = self._supervision_of(window_pass)
        if store:
            self._check_teacher(store, window)
            events = store.join(window, fragment, events, self.tasks)
        if self.history:
            events = self.history.join(window, events, self._stream.schema)
        return events

    def _check_teacher(self, store: SupervisionStore, window: int) -> None:
        """Check rule 2 once more where it matters: where supervision is read."""
        manifest = store.manifest(window)
        if not self.policy.accepts(manifest.snapshot, manifest.asked, window):
            raise UserError(
                f"window {window}: supervised by snapshot {manifest.snapshot} of "
                f"'{store.teacher}', but das.fm_lag = {self.policy.fm_lag} asks for "
                f"{self.policy.version(window)}; {store.rebuild_hint(window)}"
            )
        if manifest.schema_digest != self._stream.schema.digest:
            raise UserError(
                f"window {window}: its supervision is of a stream with another schema; "
                "run the DAS on this stream"
            )
