"""summary.json: a run's figures over all evaluated windows after the warm-up, the arms against each
other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from exfm_ray.config.arms import LABELS
from exfm_ray.config.root import Config
from exfm_ray.data.labels.releases import is_released, with_released_labels
from exfm_ray.data.stream import EventStream, list_values, window_name
from exfm_ray.metrics.gain import gains_over_labels
from exfm_ray.metrics.state import MetricState
from exfm_ray.schema import ALL_DOMAINS
from exfm_ray.storage.atomic import parquet_source
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.training.checkpoint import JobResult
from exfm_ray.training.loop import FM_ARM, Key, describe, supervising_version

ORACLE = "truth"
TRUTH_LOGIT_LIMIT = 1e-12


def summary_rows(
    config: Config,
    stream: EventStream,
    results: Iterable[JobResult],
) -> list[dict[str, Any]]:
    """One row for each model, arm, domain and task, with ne_gain and transfer_ratio for the arms of
    a VM."""
    states: dict[Key, MetricState] = {}
    for result in results:
        states |= result.states
    windows = stream.windows()
    best = oracle_ne(stream, [w for w in windows if w >= config.metrics.warmup_windows])
    ne = {key: state.figures()["ne"] for key, state in states.items()}
    models = list(dict.fromkeys(key[0] for key in states))
    arms = [FM_ARM, *config.vm.arms]
    rows = []
    for key in sorted(states, key=lambda key: (models.index(key[0]), arms.index(key[1]))):
        (model, arm, domain, task), state = key, states[key]
        role = "fm" if arm == FM_ARM else "vm"
        row: dict[str, Any] = {
            "role": role,
            **describe(key),
            "seed": config.seed,
            **state.figures(),
            "best_ne": best.get((domain, task)),
        }
        row["snapshot"] = (
            supervising_version(key, windows[-1] + 1, SnapshotPolicy.from_config(config.das))
            if windows
            else None
        )
        if role == "vm":
            labels_ne = ne.get((model, LABELS, domain, task))
            fm_ne = ne.get((config.fm.name, FM_ARM, domain, task))
            gains = gains_over_labels(ne[key], labels_ne, fm_ne, is_labels_arm=arm == LABELS)
            row |= gains._asdict()
        rows.append(row)
    return rows


def oracle_ne(stream: EventStream, windows: Sequence[int]) -> dict[tuple[str, str], float]:
    """(domain, task) -> NE of the true probabilities, where the stream's maker wrote them down;
    empty otherwise."""
    totals: dict[tuple[str, str], MetricState] = {}
    for window in windows:
        truth = stream.root / ORACLE / f"{window_name(window)}.parquet"
        if truth.exists():
            for key, state in _truth_states(stream, window, truth).items():
                totals[key] = totals.get(key, MetricState()) + state
    figures = {key: state.figures()["ne"] for key, state in totals.items()}
    return {key: ne for key, ne in figures.items() if ne is not None}


def _truth_states(
    stream: EventStream,
    window: int,
    path: AnyPath,
) -> Mapping[tuple[str, str], MetricState]:
    schema = stream.schema
    truth = pq.read_table(parquet_source(path), partitioning=None)
    tasks = [task for task in schema.tasks if is_released(stream, window, (task,))]
    tables = [
        with_released_labels(stream, window, fragment, tasks, ["domain", "labels"])
        for fragment in stream.window(window).fragments
    ]
    domain_N = np.concatenate([table["domain"].to_numpy() for table in tables])
    labels_NT = np.concatenate(
        [list_values(table["labels"], len(schema.tasks)) for table in tables]
    )
    states = {}
    for i, task in ((schema.task_index(task), task) for task in tasks):
        p_N = np.clip(
            truth[task].to_numpy().astype(np.float64), TRUTH_LOGIT_LIMIT, 1 - TRUTH_LOGIT_LIMIT
        )
        logits_N = np.log(p_N) - np.log1p(-p_N)
        states[ALL_DOMAINS, task] = MetricState.from_logits(logits_N, labels_NT[:, i])
        for index in np.unique(domain_N) if len(schema.domains) > 1 else ():
            chosen = domain_N == index
            states[schema.domains[index], task] = MetricState.from_logits(
                logits_N[chosen], labels_NT[chosen, i]
            )
    return states
