"""python -m benchmarks.share_serving [--quick]: what arms with options cost, beside what they bring
on the same stream.

The demo's student `feed`, trained here without Ray by each arm alone, in turns: training examples a
second with reading and evaluation, bytes that are moved for it in a window, bytes of its export and
of its feature store, and milliseconds of ONNX Runtime (one thread) for 1, 100 and 1,000 candidates,
with the look-up of the user where there is a store.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from benchmarks.transfer import pooled
from exfm_ray.config.checks import with_settings
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import window_name
from exfm_ray.metrics.gain import ne_gain
from exfm_ray.models.user_features import HISTORY
from exfm_ray.serving.export import export_student
from exfm_ray.tracking.plot_styles import at_serving
from exfm_ray.training.job import Job
from exfm_ray.training.local import init_single_process, local_loop

SAYS = "Trains, exports and times the demo's student in arms with options: about 8 minutes on one core (--quick: 2)."
ARMS = (LABELS, "kd", "ah_sa", "kd+share", "ah_sa+share", "kd+history", "kd+share+history")
TURNS = 3
WARM = 2
"""Windows from which on gains count."""


def costs(quick: bool) -> dict[str, dict[str, Any]]:
    """arm -> figures."""
    torch.set_num_threads(1)
    init_single_process()
    with tempfile.TemporaryDirectory() as folder:
        settings = with_settings(config(folder, quick), {"vm.arms": list(ARMS)})
        stream = prepare(settings)
        job = Job("vm", settings, settings.vm.models)
        windows = stream.windows()
        train(Job("fm", settings), windows)
        supervise(settings, stream)
        speed = speeds(settings, windows, 1 if quick else TURNS)
        rows = [row for row in train(job, windows) if row["window"] >= WARM]
        ne = {arm: pooled([row for row in rows if row["arm"] == arm])["ne"] for arm in ARMS}
        (student,) = settings.vm.models
        served = {arm: export_student(settings.folder, student.name, arm) for arm in ARMS}
        folders = with_control(served, settings.folder)
        asked = {
            count: latency(folders, candidates(stream, count), calls(quick)) for count in CANDIDATES
        }
        return {
            arm: {
                "ne_gain": ne_gain(ne[arm], ne[LABELS]),
                "examples_per_s": speed[arm],
                "speed_over_labels": speed[arm] / speed[LABELS],
                "moved_bytes_a_window": moved(settings, arm, windows[-1], student.domain),
                "export_bytes": size(folder),
                "store_bytes": (folder / HISTORY).stat().st_size
                if (folder / HISTORY).exists()
                else 0,
                "at_serving": at_serving(arm),
                "latency": {count: told[arm] for count, told in asked.items()},
                "control": {count: told[CONTROL] for count, told in asked.items()},
            }
            for arm, folder in served.items()
        }


def speeds(
    settings: Config,
    windows: Sequence[int],
    turns: int,
) -> dict[str, float]:
    """Examples a second of each arm alone: the median of several turns of all."""
    told: dict[str, list[float]] = defaultdict(list)
    for turn in range(turns):
        for arm in ARMS[turn % len(ARMS) :] + ARMS[: turn % len(ARMS)]:
            own = with_settings(settings, {"vm.arms": [arm]})
            loop, _ = local_loop(Job("vm", own, own.vm.models), windows)
            for window in windows:
                loop.run(window)
            told[arm].append(
                sum(t.examples for t in loop.timings)
                / sum(t.evaluate_s + t.learn_s for t in loop.timings)
            )
            print(f"{arm}: {told[arm][-1]:,.0f} examples/s", flush=True)
    return {arm: float(np.median(each)) for arm, each in told.items()}


def moved(
    settings: Config,
    arm: str,
    window: int,
    domain: str,
) -> dict[str, int]:
    """Bytes that the DAS writes in a window for an arm: supervision and representations of all
    domains' examples, rows of its own."""
    told = {}
    kinds = {
        "supervision": not arm.startswith(LABELS),
        "rows": "share" in arm,
        "history": "history" in arm,
    }
    for kind, root in (("supervision", "supervision"), ("rows", "shared"), ("history", "history")):
        folder = settings.folder / root / settings.fm.name / window_name(window)
        files = (
            [folder / f"{domain}.safetensors"]
            if kind == "rows"
            else [path for path in folder.iterdir() if path.suffix != ".json"]
        )
        told[kind] = sum(path.stat().st_size for path in files) if kinds[kind] else 0
    return told


def markdown(told: Mapping[str, Mapping[str, Any]]) -> str:
    """The costs as a table."""
    heads = " | ".join(f"{count:,}: ms, over labels" for count in CANDIDATES)
    lines = [
        f"| arm | NE gain % | examples/s, over labels | moved a window, kB | export, MB | feature store, kB | {heads} | serving |",
        "|---" * (7 + len(CANDIDATES)) + "|",
    ]
    for arm, one in told.items():
        gain = f"{100 * one['ne_gain']:+.2f}"
        speed = f"{one['examples_per_s']:,.0f}, {one['speed_over_labels']:.2f}"
        ms = " | ".join(
            f"{own['p50_ms']:.3f}, {own['ratio']:.2f}" for own in one["latency"].values()
        )
        kb = sum(one["moved_bytes_a_window"].values()) / 1e3
        store = f"{one['store_bytes'] / 1e3:,.0f}" if one["store_bytes"] else "none"
        more = "nothing more" if one["at_serving"] == "nothing" else one["at_serving"]
        lines.append(
            f"| {arm} | {gain} | {speed} | {kb:,.0f} | {one['export_bytes'] / 1e6:.2f} | {store} | {ms} | {more} |"
        )
    return "\n".join(lines)


def main() -> None:
    told = costs(arguments("share_serving", SAYS).quick)
    print(markdown(told))
    report("share_serving", told, {})


if __name__ == "__main__":
    main()
