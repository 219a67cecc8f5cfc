"""What late conversions cost, and what corrections give back, on the synthetic stream: the FM,
figures against the labels as they all were.

    python -m benchmarks.late_labels [--quick]

For each seed the FM learns one stream three times: with all labels at once (which nobody has), with
late labels counted, and with late labels corrected. A window lasts an hour, its conversions are
awaited for six, and take 12 on average.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.common import arguments, report
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.readers import FragmentReader, StreamReader, WindowPass
from exfm_ray.data.stream import Fragment
from exfm_ray.storage.atomic import read_json
from exfm_ray.training.job import Job
from exfm_ray.training.local import local_loop

WINDOWS = 48
EVENTS = 10_000
SEEDS = 3
JUDGED = 12
ATTRIBUTION = {"conversion": 6 * 3600}
KINDS: dict[str, dict[str, Any]] = {
    "at_once": {},
    "counted": {"attribution_s": ATTRIBUTION, "late_labels": "count"},
    "corrected": {"attribution_s": ATTRIBUTION, "late_labels": "correct"},
}


@dataclass(frozen=True)
class JudgedByTruth:
    """Learns what one stream releases, is evaluated by the labels of another, of the same
    events."""

    learnt: FragmentReader
    judged: FragmentReader

    def _of(self, work: WindowPass) -> FragmentReader:
        return self.judged if work.purpose == "evaluate" else self.learnt

    def ready(self, work: WindowPass) -> bool:
        return self._of(work).ready(work)

    def missing_input(self, work: WindowPass) -> str:
        return self._of(work).missing_input(work)

    def fragments(self, work: WindowPass) -> Sequence[Fragment]:
        return self._of(work).fragments(work)

    def read(self, work: WindowPass, fragment: Fragment) -> pa.Table:
        return self._of(work).read(work, fragment)


def config(
    folder: Path,
    kind: str,
    seed: int,
    windows: int,
) -> Config:
    """A small FM that learns conversions alone."""
    embedded = {
        "seed": seed,
        "windows": windows,
        "events_per_window": EVENTS,
        "users": 5_000,
        "ads": 1_000,
    }
    model = {"type": "mlp", "dim": 16, "mlp": [64, 32]}
    return Config.model_validate(
        {
            "name": f"{kind}-{seed}",
            "seed": seed,
            "run": {"dir": folder},
            "data": {"synthetic": embedded, **KINDS[kind]},
            "fm": {"model": model, "tasks": ["conversion"], "batch_size": 512, "threads": 1},
        }
    )


def measure(
    folder: Path,
    seed: int,
    windows: int,
    judged: int,
) -> dict[str, dict[str, float]]:
    """kind -> NE and calibration of conversions over the last `judged` windows, and the share of
    labels that were late."""
    found: dict[str, dict[str, float]] = {}
    truth = StreamReader(prepare(config(folder, "at_once", seed, windows)).root)
    for kind in KINDS:
        job = Job("fm", config(folder, kind, seed, windows))
        stream = prepare(job.config)
        loop, kept = local_loop(
            job, stream.windows(), JudgedByTruth(job.reader(stream.schema), truth)
        )
        for window in stream.windows():
            loop.run(window)
        rows = [
            row for row in kept.rows if row["domain"] == "all" and row["window"] >= windows - judged
        ]
        labels = read_json(stream.root / "manifest.json").get("labels", {}).get("conversion")
        late = (
            sum(labels["late"].values()) / (sum(labels["late"].values()) + labels["positives"])
            if labels
            else 0.0
        )
        found[kind] = {
            "ne": float(np.mean([r["ne"] for r in rows])),
            "calibration": float(np.mean([r["calibration"] for r in rows])),
            "late": late,
        }
        print(
            f"  seed {seed}, {kind}: NE {found[kind]['ne']:.4f}, calibration {found[kind]['calibration']:.3f}, late {late:.0%}",
            flush=True,
        )
    return found


def main() -> None:
    """Measure and report; there is no bar."""
    says = f"Trains a small FM 3 times on {WINDOWS} windows of {EVENTS:,} events for {SEEDS} seeds: about 5 minutes on a core."
    quick = arguments("late_labels", says).quick
    seeds, windows, judged = (1, 12, 4) if quick else (SEEDS, WINDOWS, JUDGED)
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(Path(folder), seed, windows, judged) for seed in range(seeds)]
    figures = {
        kind: {
            name: {
                "mean": float(np.mean(values)),
                "std": float(np.std(values, ddof=1)) if seeds > 1 else None,
            }
            for name in ("ne", "calibration", "late")
            if (values := [one[kind][name] for one in found])
        }
        for kind in KINDS
    }
    report("late_labels", figures, {})


if __name__ == "__main__":
    main()
