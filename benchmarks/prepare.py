"""Speed and memory of preparing raw data: Criteo rows on one core, and the synthetic stream.

    python -m benchmarks.prepare [--data DIR] [--quick]

DIR holds `criteo_sample/train.txt`; larger files are its rows repeated. Each measurement runs in a
process of its own, bound to one core, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import bar, report
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare

ROWS_PER_S = 100_000
GROWTH = 1.1
SYNTHETIC_PER_S = 300_000


def child(
    source: str,
    root: str,
    run: str,
    windows: int,
) -> None:
    """Prepare once on one core; print rows, seconds and memory (MiB) as JSON."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    data: dict[str, Any] = {
        "source": source,
        "root": root,
        "synthetic": {"windows": windows, "events_per_window": 100_000},
    }
    if source == "criteo":
        data["window"] = {"by": "rows", "rows": 100_000}
    config = Config.model_validate({"name": source, "run": {"dir": run}, "data": data})
    resident_mb: list[float] = []

    def note_memory(window: int, rows: int) -> None:
        resident_mb.append(psutil.Process().memory_info().rss / 2**20)

    started = time.perf_counter()
    started_cpu = time.process_time()
    stream = prepare(config, note_memory)
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - started_cpu
    figures = {
        "rows": sum(stream.window(window).rows for window in stream.windows()),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "last_window_mb": resident_mb[-1],
    }
    print(json.dumps(figures))


def measure(
    source: str,
    root: Path,
    windows: int = 1,
) -> dict[str, float]:
    """Run `child` in a new process and return its figures with rows per second."""
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, "-m", "benchmarks.prepare"]
        command += ["--child", source, str(root), run, str(windows)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    figures["rows_per_s"] = figures["rows"] / figures["seconds"]
    print(
        f"  {source}: {figures['rows']:,.0f} rows, {figures['rows_per_s']:,.0f} rows/s, "
        f"peak {figures['peak_mb']:.0f} MB, {figures['last_window_mb']:.0f} MB at the last window",
        flush=True,
    )
    return figures


def repeat(
    sample: Path,
    target: Path,
    rows: int,
) -> None:
    """Write `rows` lines to `target` by repeating those of `sample`."""
    target.parent.mkdir(parents=True)
    lines = sample.read_bytes().splitlines(keepends=True)
    with target.open("wb") as handle:
        for start in range(0, rows, len(lines)):
            handle.writelines(lines[: rows - start])


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, with the hidden option that starts `child`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_data = Path(os.environ.get("EXFM_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=default_data)
    parser.add_argument("--quick", action="store_true", help="half of the rows")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.child:
        source, root, run, windows = options.child
        child(source, root, run, int(windows))
        return
    sample = options.data / "criteo_sample" / "train.txt"
    if not sample.is_file():
        sys.exit(f"{sample}: no such file; --data names the folder that holds criteo_sample/")

    few, minutes = (200_000, 0.5) if options.quick else (400_000, 1)
    print(
        f"Prepares {few:,} and {10 * few:,} Criteo rows and a synthetic stream, one core each: "
        f"about {minutes} minutes.",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        results = []
        for rows in (few, 10 * few):
            root = Path(scratch) / str(rows)
            repeat(sample, root / "train.txt", rows)
            results.append(measure("criteo", root))
    small, large = results
    synthetic = measure("synthetic", options.data, windows=3 if options.quick else 12)
    growth = large["peak_mb"] / small["peak_mb"]
    bars = {
        "criteo_rows_per_s": bar(large["rows_per_s"], ROWS_PER_S),
        "peak_memory_growth_10x": bar(growth, GROWTH, at_least=False),
        "synthetic_events_per_s": bar(synthetic["rows_per_s"], SYNTHETIC_PER_S),
    }
    report("prepare", {"criteo": small, "criteo_10x": large, "synthetic": synthetic}, bars)


if __name__ == "__main__":
    main()
