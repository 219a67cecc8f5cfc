"""The streaming loop: evaluate a window, learn it, go on to the next.

So every model sees every window once, in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow as pa

from exfm_ray.data.feed import FeedClient
from exfm_ray.data.readers import FragmentReader, WindowPass
from exfm_ray.data.rebatch import Rebatcher
from exfm_ray.metrics.state import MetricState
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.training.metric_rows import Key, describe, metric_states, supervising_version

if TYPE_CHECKING:  # importing them loads the engine, which takes seconds
    from exfm_ray.training.group import BatchGroup, Predictions
    from exfm_ray.training.model_trainer import ModelTrainer

EVALUATION_BATCH = 2048

Row = dict[str, Any]
"""Columns of a line of metrics.jsonl or timeline.jsonl."""


class Report(Protocol):
    """Where figures and progress go; only rank 0 has one."""

    def metrics(self, rows: Sequence[Row]) -> None:
        """Append rows to metrics.jsonl."""
        ...

    def progress(self, window: int, examples: int) -> None:
        """Note that `examples` more of `window` were learned."""
        ...

    def timeline(self, rows: Sequence[Row]) -> None:
        """Append rows to timeline.jsonl; they have all columns but the role."""
        ...


class Timing(NamedTuple):
    """Seconds of one window, or of one pass over a static set.

    Attributes:
        evaluate_s, learn_s: including the waits.
        evaluate_wait_s, learn_wait_s: spent waiting for data.
    """

    window: int
    examples: int
    evaluate_s: float
    learn_s: float
    evaluate_wait_s: float
    learn_wait_s: float


@dataclass
class LoopProgress:
    """Progress within unfinished passes, which a checkpoint between two batches stores as JSON.

    The names of the attributes are those in the file.

    Attributes:
        number: of the window or pass in the timings.
        learnt: examples learned, for each group.
        lane_seconds: spent learning, for each trainer.
        work: how many of the passes are done.
        batches: learned in the current pass.
        seconds, waited: by purpose, see `Timing`.
        rows: for metrics.jsonl, without their speed; each with the position of its group and of
            the trainer in it (rank 0).
        spans: for timeline.jsonl.
    """

    number: int
    learnt: list[int]
    lane_seconds: list[float]
    work: int = 0
    batches: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"evaluate": 0.0, "learn": 0.0})
    waited: dict[str, float] = field(default_factory=lambda: {"evaluate": 0.0, "learn": 0.0})
    rows: list[tuple[int, int, Row]] = field(default_factory=list)
    spans: list[Row] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        number: int,
        groups: int,
        trainers: int,
    ) -> LoopProgress:
        """Progress before the first pass."""
        return cls(number, [0] * groups, [0.0] * trainers)

    @property
    def examples(self) -> int:
        """Examples learned by all groups."""
        return sum(self.learnt)

    def timing(self) -> Timing:
        """The timing of the finished passes."""
        return Timing(
            self.number,
            self.examples,
            self.seconds["evaluate"],
            self.seconds["learn"],
            self.waited["evaluate"],
            self.waited["learn"],
        )


@dataclass
class Loop:
    """Runs groups of trainers over windows.

    Attributes:
        states: metric states summed over the windows after the warm-up (rank 0).
        timings: of the finished windows or passes.
        on_batch_end: called after each batch is learned, with the position of its group.
        report_guard: entered while figures are reported.
        underway: progress within passes that are not finished.
    """

    role: str
    seed: int
    groups: Sequence[BatchGroup]
    reader: FragmentReader
    client: FeedClient
    report: Report | None
    policy: SnapshotPolicy
    warmup_windows: int
    states: dict[Key, MetricState] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    on_batch_end: Callable[[WindowPass, LoopProgress, int], None] | None = None
    report_guard: Callable[[], AbstractContextManager[None]] = nullcontext
    underway: LoopProgress | None = None
    _clock: tuple[float, float] = (0.0, 0.0)

    @property
    def trainers(self) -> list[ModelTrainer]:
        """Trainers of all groups."""
        return [trainer for group in self.groups for trainer in group.trainers]

    def run(self, window: int) -> None:
        """Evaluate window `window` with models that have not seen it, then learn it."""
        self.run_passes([WindowPass(window, "evaluate"), WindowPass(window, "learn")], window)

    def run_passes(self, passes: Sequence[WindowPass], number: int) -> list[Row]:
        """Run `passes` in order and report their figures.

        If `underway` was restored from a checkpoint, the passes go on from there.

        Args:
            number: of the window or pass in the timings.

        Returns:
            The rows for metrics.jsonl (rank 0).
        """
        if self.underway is None:
            self.underway = LoopProgress.begin(number, len(self.groups), len(self.trainers))
        progress = self.underway
        for trainer, seconds in zip(self.trainers, progress.lane_seconds, strict=True):
            trainer.seconds = seconds

        try:
            while progress.work < len(passes):
                self._run_pass(passes[progress.work], progress)
        finally:
            self.underway = None

        self.timings.append(progress.timing())
        rows = [
            row | {"examples_per_s": self._speed(progress, group, trainer)}
            for group, trainer, row in progress.rows
        ]
        if self.report:
            with self.report_guard():
                self.report.metrics(rows)
                self.report.timeline(progress.spans)
        return rows

    def _run_pass(self, window_pass: WindowPass, progress: LoopProgress) -> None:
        """Run one pass from its beginning, or from where a checkpoint was taken."""
        started_s = time.time()
        started = time.perf_counter()
        waited = self.client.waited
        examples = progress.examples

        self.start_clock()
        if window_pass.purpose == "evaluate":
            predictions = self._evaluate(window_pass)
            if self.report:
                progress.rows += self._metric_rows(window_pass, predictions)
        else:
            self._learn(window_pass, progress)
        self.stop_clock(window_pass, progress)

        span: Row = {"pass": window_pass.number} if window_pass.number else {}
        span |= {
            "window": window_pass.window,
            "phase": window_pass.purpose,
            "started_s": started_s,
            "ended_s": started_s + time.perf_counter() - started,
            "waited_s": self.client.waited - waited,
            "examples": progress.examples - examples,
        }
        progress.spans.append(span)
        progress.work += 1
        progress.batches = 0

    def start_clock(self) -> None:
        """From now on, time counts towards the current pass."""
        self._clock = (time.perf_counter(), self.client.waited)

    def stop_clock(self, window_pass: WindowPass, progress: LoopProgress) -> None:
        """Add the time since `start_clock` to the pass."""
        started, waited = self._clock
        purpose = window_pass.purpose
        progress.seconds[purpose] += time.perf_counter() - started
        progress.waited[purpose] += self.client.waited - waited
        progress.lane_seconds = [trainer.seconds for trainer in self.trainers]

    def _speed(
        self,
        progress: LoopProgress,
        group: int,
        trainer: int,
    ) -> float | None:
        """Examples per second that a trainer has learned."""
        seconds = self.groups[group].trainers[trainer].seconds
        return progress.learnt[group] / seconds if seconds else None

    def _batches(
        self, window_pass: WindowPass, size: Callable[[BatchGroup], int]
    ) -> Iterator[tuple[int, pa.Table]]:
        """Global batches of one pass, each with the position of the group whose rows they are."""
        rebatchers = [Rebatcher(size(group)) for group in self.groups]
        fragment_count = len(self.reader.fragments(window_pass))
        for fragment in self.client.fragments(fragment_count):
            for position, group in enumerate(self.groups):
                selected = group.select(fragment)
                if window_pass.purpose == "learn":
                    group.mark(selected)
                for rows in rebatchers[position].add(selected):
                    yield position, rows

        for position, rebatcher in enumerate(rebatchers):
            for rows in rebatcher.flush():
                yield position, rows

    def _evaluate(self, window_pass: WindowPass) -> list[Predictions | None]:
        """Predictions of each group on a window; None if it has no row, and on other ranks."""
        parts: list[list[Predictions]] = [[] for _ in self.groups]
        batches = self._batches(window_pass, evaluation_batch)
        first = next(batches, None)  # the feed yields it once all inputs of the window exist
        if first:
            batches = chain([first], batches)
            for group in self.groups:
                group.begin_window(window_pass.window)

        with ExitStack() as stack:
            for trainer in self.trainers:
                stack.enter_context(trainer.engine.ema_weights())
            for position, rows in batches:
                parts[position].append(self.groups[position].evaluate(rows))
        return [
            group.gather(local_parts) for group, local_parts in zip(self.groups, parts, strict=True)
        ]

    def _learn(self, window_pass: WindowPass, progress: LoopProgress) -> None:
        batches = self._batches(window_pass, lambda group: group.batch_size)
        for number, (position, rows) in enumerate(batches):
            if number < progress.batches:  # learned before the checkpoint was taken
                continue
            self.groups[position].learn(rows)
            progress.batches = number + 1
            progress.learnt[position] += rows.num_rows
            if self.report:
                self.report.progress(window_pass.window, rows.num_rows)
            if self.on_batch_end:
                self.on_batch_end(window_pass, progress, position)

        for group in self.groups:
            group.end_window()

    def _metric_rows(
        self,
        window_pass: WindowPass,
        predictions: Sequence[Predictions | None],
    ) -> Iterator[tuple[int, int, Row]]:
        """Rows of all groups for metrics.jsonl, without their speed; see `LoopProgress.rows`.

        Adds their states to `states`.
        """
        window = window_pass.window
        for number, group in enumerate(self.groups):
            group_predictions = predictions[number]
            if group_predictions is None:
                continue
            for position, key, state in metric_states(group, window, group_predictions):
                if window >= self.warmup_windows:
                    self.states[key] = self.states.get(key, MetricState()) + state
                row: Row = {"pass": window_pass.number} if window_pass.number else {}
                row |= {
                    "window": window,
                    "role": self.role,
                    **describe(key),
                    "seed": self.seed,
                    "snapshot": supervising_version(key, window, self.policy),
                    **state.figures(),
                }
                yield number, position, row


def evaluation_batch(group: BatchGroup) -> int:
    """Rows in a batch of an evaluation.

    All models of a trainer together have `EVALUATION_BATCH` logits for a task, so that temporary
    tensors do not outgrow the cache.
    """
    models = [len(trainer.model_names) for trainer in group.trainers]
    return EVALUATION_BATCH // max(1, *models)
