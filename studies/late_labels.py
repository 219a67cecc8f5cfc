"""What late conversions cost, and what corrections recover, on the synthetic stream.

    python -m studies.late_labels [--quick]

For each seed the FM learns one stream three times: with all labels at once (which is impossible in
practice), with late labels counted, and with late labels corrected. Its figures are against the
true labels. A window lasts an hour. The FM waits six hours for conversions, which take 12 on
average.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from benchmarks.common import arguments, report
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.readers import FragmentReader, StreamReader, WindowPass
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.storage.atomic import read_json
from exfm_ray.training.job import Job
from exfm_ray.training.local import local_loop

EVENTS = 10_000
ATTRIBUTION = {"conversion": 6 * 3600}
KINDS: dict[str, dict[str, Any]] = {
    "at_once": {},
    "counted": {"attribution_s": ATTRIBUTION, "late_labels": "count"},
    "corrected": {"attribution_s": ATTRIBUTION, "late_labels": "correct"},
}
FIGURES = ("ne", "calibration", "late")


class Plan(NamedTuple):
    """How much is trained: seeds, windows, and how many of the last windows count."""

    seeds: int
    windows: int
    counted: int


FULL = Plan(3, 48, 12)
QUICK = Plan(1, 12, 4)
DESCRIPTION = (
    f"Trains a small FM 3 times on {FULL.windows} windows of {EVENTS:,} events "
    f"for {FULL.seeds} seeds: about 5 minutes on a core."
)


@dataclass(frozen=True)
class TrueLabelReader:
    """Reads the rows to learn from one stream, and those to evaluate from another one.

    Attributes:
        released: the stream with the labels that are released in time.
        true: the stream of the same events with all labels.
    """

    released: FragmentReader
    true: FragmentReader

    def _reader(self, window_pass: WindowPass) -> FragmentReader:
        return self.true if window_pass.purpose == "evaluate" else self.released

    def ready(self, window_pass: WindowPass) -> bool:
        return self._reader(window_pass).ready(window_pass)

    def missing_input(self, window_pass: WindowPass) -> str:
        return self._reader(window_pass).missing_input(window_pass)

    def fragments(self, window_pass: WindowPass) -> Sequence[Fragment]:
        return self._reader(window_pass).fragments(window_pass)

    def read(self, window_pass: WindowPass, fragment: Fragment) -> pa.Table:
        return self._reader(window_pass).read(window_pass, fragment)


def config(
    folder: Path,
    kind: str,
    seed: int,
    windows: int,
) -> Config:
    """Return the config of a small FM that learns conversions only."""
    synthetic = {
        "seed": seed,
        "windows": windows,
        "events_per_window": EVENTS,
        "users": 5_000,
        "ads": 1_000,
    }
    fm = {
        "model": {"type": "mlp", "dim": 16, "mlp": [64, 32]},
        "tasks": ["conversion"],
        "batch_size": 512,
        "threads": 1,
    }
    tree = {
        "name": f"{kind}-{seed}",
        "seed": seed,
        "run": {"dir": folder},
        "data": {"synthetic": synthetic, **KINDS[kind]},
        "fm": fm,
    }
    return Config.model_validate(tree)


def measure(
    folder: Path,
    seed: int,
    plan: Plan,
) -> dict[str, dict[str, float]]:
    """Train each kind with one seed.

    Returns:
        Kind -> NE and calibration of conversions over the windows that count, and the fraction of
        labels that were late.
    """
    true_stream = prepare(config(folder, "at_once", seed, plan.windows))
    true_reader = StreamReader(true_stream.root)
    by_kind: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        job = Job("fm", config(folder, kind, seed, plan.windows))
        stream = prepare(job.config)
        reader = TrueLabelReader(job.reader(stream.schema), true_reader)
        loop, report = local_loop(job, stream.windows(), reader)
        for window in stream.windows():
            loop.run(window)

        first = plan.windows - plan.counted
        rows = [row for row in report.rows if row["domain"] == "all" and row["window"] >= first]
        figures = {
            "ne": float(np.mean([row["ne"] for row in rows])),
            "calibration": float(np.mean([row["calibration"] for row in rows])),
            "late": late_fraction(stream),
        }
        by_kind[kind] = figures
        print(
            f"  seed {seed}, {kind}: NE {figures['ne']:.4f}, "
            f"calibration {figures['calibration']:.3f}, late {figures['late']:.0%}",
            flush=True,
        )
    return by_kind


def late_fraction(stream: EventStream) -> float:
    """Return the fraction of the conversions that came too late for their window."""
    manifest = read_json(stream.root / "manifest.json")
    labels = manifest.get("labels", {}).get("conversion")
    if not labels:
        return 0.0
    late: int = sum(labels["late"].values())
    in_time: int = labels["positives"]
    return late / (late + in_time)


def over_seeds(by_seed: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Return kind -> figure -> mean and standard deviation over the seeds."""
    figures: dict[str, Any] = {}
    for kind in KINDS:
        figures[kind] = {}
        for name in FIGURES:
            values = [of_seed[kind][name] for of_seed in by_seed]
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            figures[kind][name] = {"mean": float(np.mean(values)), "std": std}
    return figures


def main() -> None:
    options = arguments("studies.late_labels", DESCRIPTION)
    plan = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        by_seed = [measure(Path(folder), seed, plan) for seed in range(plan.seeds)]
    report("late_labels", over_seeds(by_seed), {})


if __name__ == "__main__":
    main()
