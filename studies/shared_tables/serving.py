"""python -m studies.shared_tables.serving [--quick]: what arms with options cost.

The demo's student `feed`, trained without Ray by each arm alone, in turns. For each arm: training
examples per second with reading and evaluation, bytes that the DAS writes for it in a window, bytes
of its export and of its feature store, and milliseconds of ONNX Runtime (one thread) for 1, 100 and
1,000 candidates, with the lookup of the user where there is a store. NE gains are on the same
stream.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from benchmarks.common import arguments, report
from benchmarks.serving import (
    CANDIDATES,
    CONTROL,
    LABELS,
    calls,
    candidates,
    config,
    latency,
    size,
    supervise,
    train,
    with_control,
)
from exfm_ray.config.checks import with_settings
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import window_name
from exfm_ray.metrics.gain import ne_gain, pool
from exfm_ray.models.user_features import HISTORY
from exfm_ray.serving.export import export_student
from exfm_ray.tracking.plot_styles import at_serving
from exfm_ray.training.job import Job
from exfm_ray.training.local import init_single_process, local_loop

DESCRIPTION = (
    "Trains, exports and times the demo's student in arms with options: "
    "about 8 minutes on one core (--quick: 2)."
)
ARMS = (LABELS, "kd", "ah_sa", "kd+share", "ah_sa+share", "kd+history", "kd+share+history")
TURNS = 3
FIRST_COUNTED = 2
"""Windows from which on gains count."""


def costs(quick: bool) -> dict[str, dict[str, Any]]:
    """Return the figures of each arm."""
    torch.set_num_threads(1)
    init_single_process()
    with tempfile.TemporaryDirectory() as folder:
        settings = with_settings(config(folder, quick), {"vm.arms": list(ARMS)})
        stream = prepare(settings)
        windows = stream.windows()
        (student,) = settings.vm.models
        train(Job("fm", settings), windows)
        supervise(settings, stream)
        speed = speeds(settings, windows, 1 if quick else TURNS)
        rows = train(Job("vm", settings, settings.vm.models), windows)
        nes = arm_nes(rows)

        exports = {arm: export_student(settings.folder, student.name, arm) for arm in ARMS}
        served = with_control(exports, settings.folder)
        latencies = {
            count: latency(served, candidates(stream, count), calls(quick)) for count in CANDIDATES
        }
        by_arm = {}
        for arm, export in exports.items():
            store = export / HISTORY
            by_arm[arm] = {
                "ne_gain": ne_gain(nes[arm], nes[LABELS]),
                "examples_per_s": speed[arm],
                "speed_over_labels": speed[arm] / speed[LABELS],
                "moved_bytes_a_window": moved(settings, arm, windows[-1], student.domain),
                "export_bytes": size(export),
                "store_bytes": store.stat().st_size if store.exists() else 0,
                "at_serving": at_serving(arm),
                "latency": {count: by_name[arm] for count, by_name in latencies.items()},
                "control": {count: by_name[CONTROL] for count, by_name in latencies.items()},
            }
        return by_arm


def arm_nes(rows: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return each arm's NE over the windows that count."""
    by_arm: dict[str, list[Mapping[str, Any]]] = {arm: [] for arm in ARMS}
    for row in rows:
        if row["window"] >= FIRST_COUNTED:
            by_arm[row["arm"]].append(row)
    return {arm: pool(of_arm).ne for arm, of_arm in by_arm.items()}


def speeds(
    settings: Config,
    windows: Sequence[int],
    turns: int,
) -> dict[str, float]:
    """Return the examples per second of each arm alone: the median of several turns of all arms."""
    by_arm: dict[str, list[float]] = defaultdict(list)
    for turn in range(turns):
        start = turn % len(ARMS)
        for arm in ARMS[start:] + ARMS[:start]:
            one_arm = with_settings(settings, {"vm.arms": [arm]})
            loop, _ = local_loop(Job("vm", one_arm, one_arm.vm.models), windows)
            for window in windows:
                loop.run(window)
            examples = sum(timing.examples for timing in loop.timings)
            seconds = sum(timing.evaluate_s + timing.learn_s for timing in loop.timings)
            by_arm[arm].append(examples / seconds)
            print(f"{arm}: {by_arm[arm][-1]:,.0f} examples/s", flush=True)
    return {arm: float(np.median(of_turns)) for arm, of_turns in by_arm.items()}


def moved(
    settings: Config,
    arm: str,
    window: int,
    domain: str,
) -> dict[str, int]:
    """Return the bytes that the DAS writes in a window for an arm.

    Supervision and representations are of all domains' examples, rows of the student's domain only.
    """
    bytes_of = {"supervision": 0, "rows": 0, "history": 0}
    if not arm.startswith(LABELS):
        bytes_of["supervision"] = _data_bytes(settings, "supervision", window)
    if "share" in arm:
        folder = _window_folder(settings, "shared", window)
        bytes_of["rows"] = (folder / f"{domain}.safetensors").stat().st_size
    if "history" in arm:
        bytes_of["history"] = _data_bytes(settings, "history", window)
    return bytes_of


def _window_folder(
    settings: Config,
    store: str,
    window: int,
) -> Path:
    return settings.folder / store / settings.fm.name / window_name(window)


def _data_bytes(
    settings: Config,
    store: str,
    window: int,
) -> int:
    """Bytes of a window's files, without manifests."""
    files = _window_folder(settings, store, window).iterdir()
    return sum(path.stat().st_size for path in files if path.suffix != ".json")


def markdown(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the costs as a table."""
    headings = [
        "arm",
        "NE gain %",
        "examples/s, over labels",
        "moved a window, kB",
        "export, MB",
        "feature store, kB",
        *(f"{count:,}: ms, over labels" for count in CANDIDATES),
        "serving",
    ]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for arm, of_arm in figures.items():
        moved_kb = sum(of_arm["moved_bytes_a_window"].values()) / 1e3
        store_kb = of_arm["store_bytes"] / 1e3
        cells = [
            arm,
            f"{100 * of_arm['ne_gain']:+.2f}",
            f"{of_arm['examples_per_s']:,.0f}, {of_arm['speed_over_labels']:.2f}",
            f"{moved_kb:,.0f}",
            f"{of_arm['export_bytes'] / 1e6:.2f}",
            f"{store_kb:,.0f}" if store_kb else "none",
        ]
        for of_count in of_arm["latency"].values():
            cells.append(f"{of_count['p50_ms']:.3f}, {of_count['ratio']:.2f}")
        cells.append(needed_at_serving(arm))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def needed_at_serving(arm: str) -> str:
    """Say what an arm needs at serving beyond the labels arm."""
    needed = at_serving(arm)
    return "nothing more" if needed == "nothing" else needed


def main() -> None:
    options = arguments("studies.shared_tables.serving", DESCRIPTION)
    figures = costs(options.quick)
    print(markdown(figures))
    report("share_serving", figures, {})


if __name__ == "__main__":
    main()
