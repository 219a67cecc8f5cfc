"""The streaming loop: evaluate a window, learn it, go on to the next. Every model sees every window
so, once, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import chain, product
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from exfm_ray.config.arms import LABELS, Arm
from exfm_ray.data.feed import FeedClient
from exfm_ray.data.readers import FragmentReader, WindowPass
from exfm_ray.data.rebatch import Rebatcher
from exfm_ray.errors import UserError
from exfm_ray.metrics.state import MetricState
from exfm_ray.schema import ALL_DOMAINS
from exfm_ray.stores.snapshot_policy import SnapshotPolicy

if TYPE_CHECKING:  # it imports seconds of engine
    from exfm_ray.training.group import BatchGroup, Predictions
    from exfm_ray.training.model_trainer import ModelTrainer

Key = tuple[str, str, str, str]
"""Model, arm (`fm` for the FM), domain, task."""

FM_ARM = "fm"
EVALUATION_BATCH = 2048


class Report(Protocol):
    """Where figures and progress go; only rank 0 has one."""

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows for metrics.jsonl."""
        ...

    def progress(self, window: int, examples: int) -> None:
        """`examples` more of `window` were learnt."""
        ...

    def timeline(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows for timeline.jsonl, all but their role."""
        ...


class Timing(NamedTuple):
    """Seconds of one window, or of one pass over a static set; both kinds of waiting for data are
    part of the seconds before them."""

    window: int
    examples: int
    evaluate_s: float
    learn_s: float
    evaluate_wait_s: float
    learn_wait_s: float


@dataclass
class LoopProgress:
    """Passes that are not finished, as a checkpoint between two batches keeps them; JSON-able.

    Attributes:
        number: names them in the timings.
        work: how many of them are done.
        batches: learnt in the next one.
        learnt: examples, for each group.
        seconds, waited: by purpose, see `Timing`.
        lane_seconds: spent learning, for each lane.
        rows: for metrics.jsonl, without their speed; each with the numbers of its group and of its
            lane in it (rank 0).
        spans: for timeline.jsonl.
    """

    number: int
    learnt: list[int]
    lane_seconds: list[float]
    work: int = 0
    batches: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"evaluate": 0.0, "learn": 0.0})
    waited: dict[str, float] = field(default_factory=lambda: {"evaluate": 0.0, "learn": 0.0})
    rows: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        number: int,
        groups: int,
        lanes: int,
    ) -> LoopProgress:
        """Nothing done yet."""
        return cls(number, [0] * groups, [0.0] * lanes)


@dataclass
class Loop:
    """Runs groups of lanes over windows. Rank 0 holds the metric states, summed over the windows
    after the warm-up.

    Attributes:
        between: called after each batch is learnt, with the number of its group.
        telling: entered while figures are reported.
        underway: passes that are not finished.
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

    def run(self, window: int) -> None:
        """Evaluate window `window` with models that have not seen it, then learn it."""
        self.run_passes([WindowPass(window, "evaluate"), WindowPass(window, "learn")], window)

    def run_passes(self, passes: Sequence[WindowPass], number: int) -> list[dict[str, Any]]:
        """Evaluate and learn what `passes` says, in that order; the rows for metrics.jsonl,
        reported too (rank 0).

        `number` names the passes in the timings. Where `underway` was restored from a checkpoint,
        the passes go on from there.
        """
        under = self.underway = self.underway or LoopProgress.begin(
            number, len(self.groups), len(self.lanes)
        )
        for lane, seconds in zip(self.lanes, under.lane_seconds, strict=True):
            lane.seconds = seconds
        try:
            while under.work < len(passes):
                self._pass(passes[under.work], under)
        finally:
            self.underway = None
        took = under.seconds
        waited = under.waited
        timing = Timing(
            number,
            sum(under.learnt),
            took["evaluate"],
            took["learn"],
            waited["evaluate"],
            waited["learn"],
        )
        self.timings.append(timing)
        rows = [
            row | {"examples_per_s": self._speed(under, group, lane)}
            for group, lane, row in under.rows
        ]
        if self.report:
            with self.report_guard():
                self.report.metrics(rows)
                self.report.timeline(under.spans)
        return rows

    def _pass(self, work: WindowPass, under: LoopProgress) -> None:
        """One pass, from its beginning or from where a checkpoint was taken."""
        started = time.time()
        begun = time.perf_counter()
        examples = sum(under.learnt)
        waited = self.client.waited
        self.start_clock()
        if work.purpose == "evaluate":
            for number, result in enumerate(self._evaluate(work)):
                under.rows += self._rows(work, number, result) if result and self.report else []
        else:
            self._learn(work, under)
        self.stop_clock(work, under)
        span: dict[str, Any] = {
            "window": work.window,
            "phase": work.purpose,
            "started_s": started,
            "ended_s": started + time.perf_counter() - begun,
        }
        span |= {"waited_s": self.client.waited - waited, "examples": sum(under.learnt) - examples}
        under.spans.append(({"pass": work.number} if work.number else {}) | span)
        under.work = under.work + 1
        under.batches = 0

    def start_clock(self) -> None:
        """From now on time counts as the pass's."""
        self._clock = (time.perf_counter(), self.client.waited)

    def stop_clock(self, work: WindowPass, under: LoopProgress) -> None:
        """Add the time since the clock was started to the pass's."""
        under.seconds[work.purpose] += time.perf_counter() - self._clock[0]
        under.waited[work.purpose] += self.client.waited - self._clock[1]
        under.lane_seconds = [lane.seconds for lane in self.lanes]

    @property
    def lanes(self) -> list[ModelTrainer]:
        """Of all groups."""
        return [lane for group in self.groups for lane in group.lanes]

    def _speed(
        self,
        under: LoopProgress,
        group: int,
        lane: int,
    ) -> float | None:
        seconds = self.groups[group].lanes[lane].seconds
        return under.learnt[group] / seconds if seconds else None

    def _batches(
        self, work: WindowPass, size: Callable[[BatchGroup], int]
    ) -> Iterator[tuple[int, pa.Table]]:
        """Global batches of one pass, each with the number of the group whose rows they are."""
        regroups = [Rebatcher(size(group)) for group in self.groups]
        for fragment in self.client.fragments(len(self.reader.fragments(work))):
            for i, (group, regroup) in enumerate(zip(self.groups, regroups, strict=True)):
                selected = group.select(fragment)
                if work.purpose == "learn":
                    group.mark(selected)
                for rows in regroup.add(selected):
                    yield i, rows
        for i, regroup in enumerate(regroups):
            for rows in regroup.flush():
                yield i, rows

    def _evaluate(self, work: WindowPass) -> list[Predictions | None]:
        parts: list[list[Predictions]] = [[] for _ in self.groups]
        batches = self._batches(work, evaluation_batch)
        first = next(batches, None)  # the feed hands it out when all that the window needs is there
        for group in self.groups if first else ():
            group.begin_window(work.window)
        with ExitStack() as stack:
            for lane in self.lanes:
                stack.enter_context(lane.engine.ema_weights())
            for i, rows in chain([first] if first else [], batches):
                parts[i].append(self.groups[i].evaluate(rows))
        return [group.gather(mine) for group, mine in zip(self.groups, parts, strict=True)]

    def _learn(self, work: WindowPass, under: LoopProgress) -> None:
        for position, (i, rows) in enumerate(self._batches(work, lambda group: group.batch_size)):
            if position < under.batches:  # learnt before the checkpoint that the job goes on from
                continue
            self.groups[i].learn(rows)
            under.batches = position + 1
            under.learnt[i] = under.learnt[i] + rows.num_rows
            if self.report:
                self.report.progress(work.window, rows.num_rows)
            if self.on_batch_end:
                self.on_batch_end(work, under, i)
        for group in self.groups:
            group.end_window()

    def _rows(
        self,
        work: WindowPass,
        number: int,
        result: Predictions,
    ) -> list[tuple[int, int, dict[str, Any]]]:
        """One row, without its speed, for each lane, domain and task of group `number`; for lanes
        over all domains also one for the domains together. Each with the numbers of the group and
        of the lane in it."""
        rows = []
        window = work.window
        group = self.groups[number]
        place = {"pass": work.number, "window": window} if work.number else {"window": window}
        for position, lane in enumerate(group.lanes):
            for learner, (domain, chosen_N) in product(lane.learners, _domains(group, result)):
                for column, task in enumerate(lane.tasks):
                    key = (learner.model, str(lane.arm or FM_ARM), domain, group.schema.tasks[task])
                    group_N = result.group_N[chosen_N] if group.schema.group_by else None
                    try:
                        state = MetricState.from_logits(
                            result.logits[learner.name][chosen_N, column],
                            result.labels_NT[chosen_N, task],
                            group_N,
                        )
                    except ValueError as error:
                        raise UserError(
                            f"window {window}, evaluation of '{learner.name}' on {domain}, {key[3]}: {error}"
                        ) from None
                    if window >= self.warmup_windows:
                        self.states[key] = self.states.get(key, MetricState()) + state
                    identity = {
                        "role": self.role,
                        **describe(key),
                        "seed": self.seed,
                        "snapshot": supervising_version(key, window, self.policy),
                    }
                    rows.append((number, position, {**place, **identity, **state.figures()}))
        return rows


def evaluation_batch(group: BatchGroup) -> int:
    """Rows in a batch: as many logits for all models of a lane together, lest their temporaries
    outgrow the cache."""
    return EVALUATION_BATCH // max(1, *(len(lane.learners) for lane in group.lanes))


def describe(key: Key) -> dict[str, str]:
    """A key as the columns of a row."""
    return dict(zip(("model", "arm", "domain", "task"), key, strict=True))


def supervising_version(
    key: Key,
    window: int,
    policy: SnapshotPolicy,
) -> int | None:
    """Version of the newest snapshot that a model knows when `window` is evaluated: the one that
    supervised the window before, or, in an arm with +share, whose rows it is given for this one;
    None without a teacher."""
    if key[1] in (FM_ARM, LABELS):
        return None
    return policy.version(window if Arm(key[1]).shares_tables else window - 1)


def _domains(group: BatchGroup, result: Predictions) -> Iterator[tuple[str, np.ndarray | slice]]:
    """Names of the domains in a window and which of its rows are theirs."""
    if group.domain is not None:
        yield group.schema.domains[group.domain], slice(None)
        return
    yield ALL_DOMAINS, slice(None)
    if len(group.schema.domains) > 1:
        for index in np.unique(result.domain_N):
            yield group.schema.domains[index], result.domain_N == index
