"""The DAS of a run: what it has to do, has done, and doing it."""

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


@dataclass
class Labeler:
    """Supervision for the windows of one stream by one teacher, the FM where none is named.
    `readers`: see `LabelingSpec`."""

    config: Config
    stream: EventStream
    teacher: TeacherConfig | None = None
    readers: Sequence[Path] = ()

    def __post_init__(self) -> None:
        self.order = LabelingSpec.from_config(self.config, teacher=self.teacher)
        self.snapshots = self.order.snapshots
        self.store = self.order.store

    def missing(self, windows: Sequence[int]) -> list[int]:
        """Windows that have a teacher but lack committed supervision, or what their students are
        given beside it."""
        return [
            w for w in windows if self.order.policy.version(w) is not None and not self.order.has(w)
        ]

    def done(self, spans: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
        """Seconds, without waiting, and examples of the windows scored so far, by the run's
        timeline."""
        lines = [line for line in spans if line["role"] == self.order.role]
        return sum(line["ended_s"] - line["started_s"] - line["waited_s"] for line in lines), sum(
            line["examples"] for line in lines
        )

    def label_locally(self, windows: Sequence[int]) -> int:
        """Score what is missing in this process, without Ray and without waiting for snapshots; the
        rows."""
        scorer = Scorer(self.order)
        rows = 0
        missing = self.missing(windows)
        self._check_windows(missing)
        for window in missing:
            version = self.order.policy.version(window)
            assert version is not None
            manifest = self.stream.window(window)
            rows += sum(
                scorer.score(window, fragment, version).rows for fragment in manifest.fragments
            )
            if self.order.gifts:
                self.order.gifts.publish(self.stream, self.snapshots, manifest, version)
            self.store.commit(manifest, version, self.snapshots.tasks(version), self.order.policy)
        return rows

    def run(
        self,
        windows: Sequence[int],
        progress: Callable[[int, int], None],
        watch: Callable[[], None],
    ) -> None:
        """Have what is missing labelled, by the service that is at work on this store or one of our
        own; see `client.label`."""
        missing = self.missing(windows)
        self._check_windows(missing)
        if missing:
            label(
                LabelingSpec.from_config(self.config, self.readers, self.teacher),
                missing,
                progress,
                watch,
            )

    def _check_windows(self, windows: Sequence[int]) -> None:
        """UserError where another run's teacher has learnt windows of other bounds than this
        stream's: it might know what it is to supervise (rule 2). Nothing is known where that run's
        stream is gone."""
        root = (
            store_root_of_run(self.teacher.run) / "stream"
            if self.teacher and self.teacher.run
            else None
        )
        if root is None or not (root / "schema.json").exists():
            return
        other = EventStream.open(root)
        for learnt in sorted(
            {
                version - 1
                for window in windows
                if (version := self.order.policy.version(window)) is not None
            }
        ):
            if other.has(learnt) and self.stream.has(learnt):
                here, there = (stream.window(learnt) for stream in (self.stream, other))
                if (here.start_ms, here.end_ms) != (there.start_ms, there.end_ms):
                    raise UserError(
                        f"window {learnt} is from {here.start_ms} to {here.end_ms} ms in {self.stream.root}, but from {there.start_ms} to "
                        f"{there.end_ms} in {root}, whose teacher '{self.order.store.teacher}' is to supervise; prepare both with the same data "
                        "and data.window"
                    )
