"""The DAS of a run: which windows it has to label, has labeled, and labeling them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exfm_ray.config.das import TeacherConfig
from exfm_ray.config.root import Config
from exfm_ray.das.client import label
from exfm_ray.das.scorer import Scorer
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.storage.paths import store_root_of_run
from exfm_ray.storage.remote import AnyPath


@dataclass
class Labeler:
    """Supervision for the windows of one stream by one teacher.

    Attributes:
        config: the run.
        stream: the run's stream.
        teacher: the teacher, None for the run's FM.
        readers: see `LabelingSpec`.
        spec: what is labeled.
        snapshots: the teacher's snapshots.
        store: the supervision.
    """

    config: Config
    stream: EventStream
    teacher: TeacherConfig | None = None
    readers: Sequence[Path] = ()

    def __post_init__(self) -> None:
        self.spec = LabelingSpec.from_config(self.config, teacher=self.teacher)
        self.snapshots = self.spec.snapshots
        self.store = self.spec.store

    def missing(self, windows: Sequence[int]) -> list[int]:
        """Return the windows with a teacher whose supervision or student data is not committed."""
        has_teacher = [w for w in windows if self.spec.policy.version(w) is not None]
        return [window for window in has_teacher if not self.spec.has(window)]

    def done(self, spans: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
        """Return the seconds, without waiting, and the examples of the windows scored so far.

        Args:
            spans: lines of the run's timeline.
        """
        scored = [span for span in spans if span["role"] == self.spec.role]
        seconds = [span["ended_s"] - span["started_s"] - span["waited_s"] for span in scored]
        examples = [span["examples"] for span in scored]
        return sum(seconds), sum(examples)

    def label_locally(self, windows: Sequence[int]) -> int:
        """Label what is missing in this process, without Ray, and return the number of rows.

        Raises:
            UserError: a snapshot is not published yet, or a window cannot be labeled.
        """
        spec = self.spec
        scorer = Scorer(spec)
        missing = self.missing(windows)
        self._check_windows(missing)
        rows = 0
        for window in missing:
            version = spec.policy.version(window)
            assert version is not None
            manifest = self.stream.window(window)
            for fragment in manifest.fragments:
                rows += scorer.score(window, fragment, version).rows
            if spec.student_data:
                spec.student_data.publish(self.stream, self.snapshots, manifest, version)
            tasks = self.snapshots.tasks(version)
            self.store.commit(manifest, version, tasks, spec.policy)
        return rows

    def run(
        self,
        windows: Sequence[int],
        progress: Callable[[int, int], None],
        watch: Callable[[], None],
    ) -> None:
        """Have what is missing labeled, by the store's running service or a new one.

        For the arguments see `client.label`.
        """
        missing = self.missing(windows)
        self._check_windows(missing)
        if missing:
            spec = LabelingSpec.from_config(self.config, self.readers, self.teacher)
            label(spec, missing, progress, watch)

    def _check_windows(self, windows: Sequence[int]) -> None:
        """Refuse another run's teacher if its windows have other bounds than this stream's.

        It might know what it is to supervise (rule 2). Without that run's stream nothing can be
        checked.

        Args:
            windows: windows that the teacher is to supervise.
        """
        other = self._teachers_stream()
        if other is None:
            return
        versions = [self.spec.policy.version(window) for window in windows]
        learned = {version - 1 for version in versions if version is not None}
        for window in sorted(learned):
            if other.has(window) and self.stream.has(window):
                self._check_bounds(window, other)

    def _teachers_stream(self) -> EventStream | None:
        """Return the stream of the run that trained the teacher, if it is another run."""
        if not self.teacher or not self.teacher.run:
            return None
        root: AnyPath = store_root_of_run(self.teacher.run) / "stream"
        return EventStream.open(root) if (root / "schema.json").exists() else None

    def _check_bounds(self, window: int, other: EventStream) -> None:
        here = self.stream.window(window)
        there = other.window(window)
        if (here.start_ms, here.end_ms) == (there.start_ms, there.end_ms):
            return
        raise UserError(
            f"window {window} is from {here.start_ms} to {here.end_ms} ms in {self.stream.root}, "
            f"but from {there.start_ms} to {there.end_ms} in {other.root}, whose teacher "
            f"'{self.store.teacher}' is to supervise; prepare both with the same data and "
            "data.window"
        )
