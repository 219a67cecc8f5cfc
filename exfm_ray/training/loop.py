"""The streaming loop: evaluate a window, learn it, go on to the next. Every model sees every window so, once, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from exfm_ray.config import Arm
from exfm_ray.das.lag import version_for
from exfm_ray.data.feed import FeedClient, FragmentReader, Pass
from exfm_ray.data.regroup import Regroup
from exfm_ray.metrics.state import MetricState
from exfm_ray.schema import ALL_DOMAINS
from exfm_ray.training.lane import Evaluated, Group

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
    """Seconds of one window, or of one pass over a static set; both kinds of waiting for data are part of the seconds before them."""

    window: int
    examples: int
    evaluate_s: float
    learn_s: float
    evaluate_wait_s: float
    learn_wait_s: float


@dataclass
class Loop:
    """Runs groups of lanes over windows. Rank 0 holds the metric states, summed over the windows after the warm-up."""

    role: str
    seed: int
    groups: Sequence[Group]
    reader: FragmentReader
    client: FeedClient
    report: Report | None
    fm_lag: int
    warmup_windows: int
    states: dict[Key, MetricState] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)

    def run(self, window: int) -> None:
        """Evaluate window `window` with models that have not seen it, then learn it."""
        self.run_passes([Pass(window, "evaluate"), Pass(window, "learn")], window)

    def run_passes(self, works: Sequence[Pass], number: int) -> list[dict[str, Any]]:
        """Evaluate and learn what `works` says, in that order; the rows for metrics.jsonl, reported too (rank 0).

        `number` names the passes in the timings.
        """
        evaluated: list[tuple[Pass, list[Evaluated | None]]] = []
        learnt = [0] * len(self.groups)
        seconds, waited = {"evaluate": 0.0, "learn": 0.0}, {"evaluate": 0.0, "learn": 0.0}
        spans: list[dict[str, Any]] = []
        for lane in (lane for group in self.groups for lane in group.lanes):
            lane.seconds = 0.0
        for work in works:
            started, begun, waited_before, examples_before = time.time(), time.perf_counter(), self.client.waited, sum(learnt)
            if work.purpose == "evaluate":
                evaluated.append((work, self._evaluate(work)))
            else:
                learnt = [before + more for before, more in zip(learnt, self._learn(work), strict=True)]
            took, waited_now = time.perf_counter() - begun, self.client.waited - waited_before
            seconds[work.purpose] += took
            waited[work.purpose] += waited_now
            span = {"window": work.window, "phase": work.purpose, "started_s": started, "ended_s": started + took, "waited_s": waited_now}
            spans.append(({"pass": work.number} if work.number else {}) | span | {"examples": sum(learnt) - examples_before})
        self.timings.append(Timing(number, sum(learnt), seconds["evaluate"], seconds["learn"], waited["evaluate"], waited["learn"]))
        rows: list[dict[str, Any]] = []
        if self.report:
            for work, results in evaluated:
                for group, result, examples in zip(self.groups, results, learnt, strict=True):
                    rows += self._rows(work, group, result, examples) if result else []
            self.report.metrics(rows)
            self.report.timeline(spans)
        return rows

    def _batches(self, work: Pass, size: Callable[[Group], int]) -> Iterator[tuple[int, pa.Table]]:
        """Global batches of one pass, each with the number of the group whose rows they are."""
        regroups = [Regroup(size(group)) for group in self.groups]
        for fragment in self.client.fragments(len(self.reader.fragments(work))):
            for i, (group, regroup) in enumerate(zip(self.groups, regroups, strict=True)):
                selected = group.select(fragment)
                if work.purpose == "learn":
                    group.mark(selected)
                for rows in regroup.add(selected):
                    yield i, rows
        for i, regroup in enumerate(regroups):
            for rows in regroup.rest():
                yield i, rows

    def _evaluate(self, work: Pass) -> list[Evaluated | None]:
        parts: list[list[Evaluated]] = [[] for _ in self.groups]
        with ExitStack() as stack:
            for lane in (lane for group in self.groups for lane in group.lanes):
                stack.enter_context(lane.engine.evaluated())
            for i, rows in self._batches(work, evaluation_batch):
                parts[i].append(self.groups[i].evaluate(rows))
        return [group.gather(mine) for group, mine in zip(self.groups, parts, strict=True)]

    def _learn(self, work: Pass) -> list[int]:
        learnt = [0] * len(self.groups)
        for i, rows in self._batches(work, lambda group: group.batch_size):
            self.groups[i].learn(rows)
            learnt[i] += rows.num_rows
            if self.report:
                self.report.progress(work.window, rows.num_rows)
        for group in self.groups:
            group.end_window()
        return learnt

    def _rows(self, work: Pass, group: Group, result: Evaluated, learnt: int) -> list[dict[str, Any]]:
        """One row for each lane, domain and task; for lanes over all domains also one for the domains together."""
        rows, window = [], work.window
        place = {"pass": work.number, "window": window} if work.number else {"window": window}
        for lane in group.lanes:
            for learner, (domain, chosen_N) in product(lane.learners, _domains(group, result)):
                for column, task in enumerate(lane.tasks):
                    state = MetricState.of(
                        result.logits[learner.name][chosen_N, column],
                        result.labels_NT[chosen_N, task],
                        result.group_N[chosen_N] if group.schema.group_by else None,
                    )
                    key = (learner.model, str(lane.arm or FM_ARM), domain, group.schema.tasks[task])
                    if window >= self.warmup_windows:
                        self.states[key] = self.states.get(key, MetricState()) + state
                    speed = learnt / lane.seconds if lane.seconds else None
                    identity = {"role": self.role, **describe(key), "seed": self.seed, "snapshot": supervisor(key, window, self.fm_lag)}
                    rows.append({**place, **identity, **state.figures(), "examples_per_s": speed})
        return rows


def evaluation_batch(group: Group) -> int:
    """Rows in a batch: as many logits for all models of a lane together, lest their temporaries outgrow the cache."""
    return EVALUATION_BATCH // max(1, *(len(lane.learners) for lane in group.lanes))


def describe(key: Key) -> dict[str, str]:
    """A key as the columns of a row."""
    return dict(zip(("model", "arm", "domain", "task"), key, strict=True))


def supervisor(key: Key, window: int, fm_lag: int) -> int | None:
    """Version of the snapshot that supervised the last window learnt before `window`; None without a teacher."""
    return None if key[1] in (FM_ARM, Arm.LABELS) else version_for(window - 1, fm_lag)


def _domains(group: Group, result: Evaluated) -> Iterator[tuple[str, np.ndarray | slice]]:
    """Names of the domains in a window and which of its rows are theirs."""
    if group.domain is not None:
        yield group.schema.domains[group.domain], slice(None)
        return
    yield ALL_DOMAINS, slice(None)
    if len(group.schema.domains) > 1:
        for index in np.unique(result.domain_N):
            yield group.schema.domains[index], result.domain_N == index
