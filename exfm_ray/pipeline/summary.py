"""summary.json: figures over all evaluated windows after the warm-up, and what each role did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from exfm_ray.config.arms import LABELS
from exfm_ray.config.root import Config
from exfm_ray.das.labeler import Labeler
from exfm_ray.das.spec import failed_items, fallback_windows
from exfm_ray.data.labels.releases import is_released, with_released_labels
from exfm_ray.data.stream import EventStream, list_values, window_name
from exfm_ray.errors import UserError
from exfm_ray.metrics.gain import gains_over_labels
from exfm_ray.metrics.state import MetricState
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.schema import ALL_DOMAINS
from exfm_ray.storage.atomic import parquet_source, read_json, write_json
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.tracking.recorder import TIMELINE, read_metrics, read_timeline
from exfm_ray.training.checkpoint import BEGINNING, JobResult
from exfm_ray.training.job import Job
from exfm_ray.training.metric_rows import FM_ARM, Key, describe, supervising_version

ORACLE = "truth"
TRUTH_LOGIT_LIMIT = 1e-12


def write_summary(
    config: Config,
    stream: EventStream,
    windows: Sequence[int],
    labelers: Sequence[Labeler],
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """Write summary.json from the jobs' checkpoints and the stores.

    Args:
        windows: windows whose labels are released for all tasks of the FM.
        peak_memory_bytes: of this command; an earlier command may have had more.

    Returns:
        What was written.
    """
    path = config.folder / "summary.json"
    results = _job_results(config)
    static = Job("fm", config).static(windows)
    evaluated: Sequence[int]
    if static:
        evaluated = static.held_out
        figures = _best_pass(config)
    else:
        warmup = config.metrics.warmup_windows
        evaluated = [window for window in windows if window >= warmup]
        figures = summary_rows(config, stream, results.values())

    summary = {
        "name": config.name,
        "seed": config.seed,
        "windows": evaluated,
        "figures": figures,
        "roles": _work_by_role(config, results, labelers),
        "failed_items": [row for labeler in labelers for row in failed_items(labeler.spec)],
        "fallback_windows": [row for labeler in labelers for row in fallback_windows(labeler.spec)],
        "peak_memory_bytes": max(peak_memory_bytes, _earlier_peak(path)),
    }
    write_json(path, summary)
    return summary


def _job_results(config: Config) -> dict[str, JobResult]:
    """Job name -> its result at the latest checkpoint; jobs without one are left out."""
    results = {}
    for job in [Job("fm", config), *vm_jobs(config)]:
        latest = job.checkpoints.latest()
        if latest != BEGINNING:
            results[job.name] = job.checkpoints.result(latest)
    return results


def _work_by_role(
    config: Config,
    results: Mapping[str, JobResult],
    labelers: Sequence[Labeler],
) -> dict[str, dict[str, float]]:
    """Job or role -> seconds of work and number of examples."""
    roles: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        roles[name] = {"seconds": result.seconds, "examples": result.examples}
    spans = read_timeline(config.folder / TIMELINE)
    for labeler in labelers:
        seconds, examples = labeler.done(spans)
        roles[labeler.spec.role] = {"seconds": seconds, "examples": examples}
    return roles


def _best_pass(config: Config) -> list[dict[str, Any]]:
    """The rows of a static set's best pass: its validation window and its tests."""
    stopping = Job("fm", config).checkpoints.stopping()
    if not stopping:
        return []
    rows = read_metrics(config.folder / "metrics.jsonl")
    return [row for row in rows if row["pass"] == stopping["best"]]


def _earlier_peak(path: Path) -> int:
    """The peak memory in bytes of earlier commands of this run, from their summary."""
    if not path.exists():
        return 0
    summary = read_json(path)
    peak = summary.get("peak_memory_bytes") if isinstance(summary, dict) else None
    if not isinstance(peak, int):
        raise UserError(
            f"{path}: has no peak_memory_bytes, so it is damaged; remove it and rerun the same "
            "command, which writes it again"
        )
    return peak


def summary_rows(
    config: Config,
    stream: EventStream,
    results: Iterable[JobResult],
) -> list[dict[str, Any]]:
    """One row for each model, arm, domain and task.

    Rows of a VM also have ne_gain, fm_ne_gain and transfer_ratio.
    """
    states: dict[Key, MetricState] = {}
    for result in results:
        states |= result.states
    windows = stream.windows()
    warmup = config.metrics.warmup_windows
    best = oracle_ne(stream, [window for window in windows if window >= warmup])
    figures = {key: state.figures() for key, state in states.items()}
    ne = {key: row["ne"] for key, row in figures.items()}

    rows = []
    for key in _sorted_keys(config, states):
        model, arm, domain, task = key
        is_student = arm != FM_ARM
        row: dict[str, Any] = {
            "role": "vm" if is_student else "fm",
            **describe(key),
            "seed": config.seed,
            **figures[key],
            "best_ne": best.get((domain, task)),
            "snapshot": _newest_known_snapshot(config, windows, key),
        }
        if is_student:
            gains = gains_over_labels(
                ne[key],
                labels_ne=ne.get((model, LABELS, domain, task)),
                fm_ne=ne.get((config.fm.name, FM_ARM, domain, task)),
                is_labels_arm=arm == LABELS,
            )
            row |= gains._asdict()
        rows.append(row)
    return rows


def _sorted_keys(config: Config, states: Mapping[Key, MetricState]) -> list[Key]:
    """Models in the order of their jobs, each with its arms in the order of the config."""
    models = list(dict.fromkeys(key[0] for key in states))
    arms = [FM_ARM, *config.vm.arms]

    def position(key: Key) -> tuple[int, int]:
        model, arm, _, _ = key
        return models.index(model), arms.index(arm)

    return sorted(states, key=position)


def _newest_known_snapshot(
    config: Config,
    windows: Sequence[int],
    key: Key,
) -> int | None:
    """The newest version that a model knows after the last window; None without a teacher."""
    if not windows:
        return None
    policy = SnapshotPolicy.from_config(config.das)
    next_window = windows[-1] + 1
    return supervising_version(key, next_window, policy)


def oracle_ne(stream: EventStream, windows: Sequence[int]) -> dict[tuple[str, str], float]:
    """(domain, task) -> NE of the true probabilities; empty where the stream does not have them."""
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
    """(domain, task) -> metrics of the true probabilities of a window."""
    schema = stream.schema
    truth = pq.read_table(parquet_source(path), partitioning=None)
    tasks = [task for task in schema.tasks if is_released(stream, window, (task,))]
    domain_N, labels_NT = _domains_and_labels(stream, window, tasks)
    has_domains = len(schema.domains) > 1
    domains: list[int] = np.unique(domain_N).tolist() if has_domains else []

    states = {}
    for task in tasks:
        labels_N = labels_NT[:, schema.task_index(task)]
        p_N = truth[task].to_numpy().astype(np.float64)
        p_N = np.clip(p_N, TRUTH_LOGIT_LIMIT, 1 - TRUTH_LOGIT_LIMIT)
        logits_N = np.log(p_N) - np.log1p(-p_N)
        states[ALL_DOMAINS, task] = MetricState.from_logits(logits_N, labels_N)
        for index in domains:
            in_domain_N = domain_N == index
            states[schema.domains[index], task] = MetricState.from_logits(
                logits_N[in_domain_N], labels_N[in_domain_N]
            )
    return states


def _domains_and_labels(
    stream: EventStream,
    window: int,
    tasks: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Domain indices (N,) and labels (N, all tasks of the schema) of a window."""
    tables = [
        with_released_labels(stream, window, fragment, tasks, ["domain", "labels"])
        for fragment in stream.window(window).fragments
    ]
    width = len(stream.schema.tasks)
    domain_N = np.concatenate([table["domain"].to_numpy() for table in tables])
    labels_NT = np.concatenate([list_values(table["labels"], width) for table in tables])
    return domain_N, labels_NT
