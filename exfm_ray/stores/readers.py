"""A window's rows joined with its supervision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from exfm_ray.data.labels.corrections import learnt_fragments, with_corrections
from exfm_ray.data.labels.releases import is_released, with_released_labels
from exfm_ray.data.readers import WindowPass
from exfm_ray.data.stream import EventStream, Fragment, window_name
from exfm_ray.errors import UserError
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.shared_rows import SharedStore
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.supervision import SupervisionStore
from exfm_ray.stores.user_history import HistoryStore


@dataclass(frozen=True)
class AugmentedReader:
    """Reads the rows of some domains; to learn from, joined with their supervision where the window
    has any.

    With `shared`, a window is ready to be evaluated once the teacher's table rows are there that
    its models are given first. With `history`, its rows are joined with the feature store as it was
    before the window, to learn and to evaluate.
    """

    stream_root: AnyPath
    store: SupervisionStore | None
    policy: SnapshotPolicy
    domains: tuple[int, ...]
    tasks: tuple[str, ...]
    shared: SharedStore | None = None
    history: HistoryStore | None = None

    def supervised(self, work: WindowPass) -> bool:
        """True when a teacher exists for this pass and the job wants one."""
        return (
            work.purpose == "learn"
            and self.store is not None
            and self.policy.version(work.window) is not None
        )

    def ready(self, work: WindowPass) -> bool:
        if self._shared(work) and not (self.shared and self.shared.has(work.window)):
            return False
        if self.history and not self.history.ready(work.window):
            return False
        labels = is_released(self._stream, work.window, self.tasks)
        return labels and (
            self.store is None or not self.supervised(work) or self.store.has(work.window)
        )

    def _shared(self, work: WindowPass) -> bool:
        """True when models are given table rows before this pass."""
        return (
            work.purpose == "evaluate"
            and self.shared is not None
            and self.policy.version(work.window) is not None
        )

    def missing_input(self, work: WindowPass) -> str:
        if self._shared(work):
            return f"the shared table rows of window {work.window} (teacher '{self.shared.teacher if self.shared else None}')"
        if self.history and not self.history.ready(work.window):
            return f"the representations of window {work.window - 1} (teacher '{self.history.teacher}')"
        if not is_released(self._stream, work.window, self.tasks):
            return f"the labels of window {work.window} for {', '.join(self.tasks)}"
        return f"the supervision of window {work.window} (teacher '{self.store.teacher if self.store else None}')"

    @cached_property
    def _stream(self) -> EventStream:
        return EventStream.open(self.stream_root)

    def fragments(self, work: WindowPass) -> Sequence[Fragment]:
        """Fragments that hold a row of one of the domains; to learn, see `learnt_fragments`."""
        if work.purpose == "learn":
            return learnt_fragments(self._stream, work.window, self.tasks, self.domains)
        return [
            f
            for f in self._stream.window(work.window).fragments
            if any(f.domain_rows[d] for d in self.domains)
        ]

    def read(self, work: WindowPass, fragment: Fragment) -> pa.Table:
        def own() -> pa.Table:
            return self._augment(
                work,
                fragment,
                with_released_labels(self._stream, work.window, fragment, self.tasks),
            )

        def origin(window: int, fragment: Fragment) -> pa.Table | None:
            return self._origin(work, window, fragment)

        learns = work.purpose == "learn"
        events = (
            with_corrections(self._stream, work.window, fragment, self.tasks, own, origin)
            if learns
            else own()
        )
        return events.filter(pc.is_in(events["domain"], pa.array(self.domains, pa.int32())))

    def _origin(
        self,
        work: WindowPass,
        window: int,
        fragment: Fragment,
    ) -> pa.Table | None:
        """A fragment that corrections point to, with its own supervision; None where it had no
        teacher but `work`'s rows have one."""
        origin = WindowPass(window, "learn")
        if self.supervised(work) and not self.supervised(origin):
            return None
        return self._augment(origin, fragment, self._stream.read(window, fragment))

    def _augment(
        self,
        work: WindowPass,
        fragment: Fragment,
        events: pa.Table,
    ) -> pa.Table:
        """With the window's supervision, and with what was remembered before it."""
        if self.supervised(work):
            assert self.store is not None
            self._check_teacher(work.window)
            events = self.store.join(work.window, fragment, events, self.tasks)
        return (
            self.history.join(work.window, events, self._stream.schema) if self.history else events
        )

    def _check_teacher(self, window: int) -> None:
        """Rule 2 once more, where it counts: at the reader."""
        assert self.store is not None
        manifest = self.store.manifest(window)
        wanted = self.policy.version(window)
        asked = manifest.snapshot if manifest.asked is None else manifest.asked
        if asked != wanted or not self.policy.may_supervise(manifest.snapshot, window):
            raise UserError(
                f"window {window}: supervised by snapshot {manifest.snapshot} of '{self.store.teacher}', but das.fm_lag = {self.policy.fm_lag} "
                f"asks for {wanted}; remove {self.store.root / self.store.teacher / window_name(window)} and run the DAS again"
            )
        if manifest.schema_digest != self._stream.schema.digest:
            raise UserError(
                f"window {window}: its supervision is of a stream with another schema; run the DAS on this stream"
            )
