"""Do two runs hold the same figures and files?

    python -m benchmarks.same_run RUN_BEFORE RUN_AFTER

A change that is meant to change nothing learned (a refactoring, another number of processes) is
checked with this command: run one config before and after it. Compared are the rows of
metrics.jsonl, all but their speed, and the bytes of what the roles wrote: stream, snapshots,
supervision, what students read beside it, exported models, and a sweep's trials.

Exit code 0: everything is equal. Exit code 1: the first differences are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from exfm_ray.storage.atomic import sha256

FOLDERS = ("stream", "snapshots", "supervision", "shared", "history", "exported")
PATTERNS = ("*.parquet", "*.safetensors")
SPEED = "examples_per_s"
SHOWN = 10
"""Most differences printed."""


def rows(run: Path) -> list[str]:
    """Rows of metrics.jsonl without their speed, as JSON text, in one order."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    for row in parsed:
        row.pop(SPEED, None)
    return sorted(json.dumps(row, sort_keys=True) for row in parsed)


def hashes(run: Path) -> dict[str, str]:
    """Path below the run's folder -> SHA-256 of every data and weight file."""
    result: dict[str, str] = {}
    for folder in FOLDERS:
        for pattern in PATTERNS:
            for path in sorted((run / folder).rglob(pattern)):
                result[str(path.relative_to(run))] = sha256(path)
    return result


def differences(before: Path, after: Path) -> list[str]:
    """What is not equal, in words."""
    lines: list[str] = []
    if (before / "metrics.jsonl").exists() or (after / "metrics.jsonl").exists():
        old_rows = set(rows(before))
        new_rows = set(rows(after))
        lines += [f"metrics.jsonl, only before: {row}" for row in sorted(old_rows - new_rows)]
        lines += [f"metrics.jsonl, only after: {row}" for row in sorted(new_rows - old_rows)]
    old_files = hashes(before)
    new_files = hashes(after)
    for name in sorted(old_files.keys() | new_files.keys()):
        if name not in new_files:
            lines.append(f"{name}: only before")
        elif name not in old_files:
            lines.append(f"{name}: only after")
        elif old_files[name] != new_files[name]:
            lines.append(f"{name}: other bytes")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_run", description=__doc__)
    parser.add_argument("before", type=Path, help="folder of a run")
    parser.add_argument("after", type=Path, help="folder of the other run")
    options = parser.parse_args()
    lines = differences(options.before, options.after)
    for line in lines[:SHOWN]:
        print(line)
    if lines:
        print(f"{len(lines)} difference(s)")
        return 1
    metric_rows = len(rows(options.after)) if (options.after / "metrics.jsonl").exists() else 0
    print(f"equal: {metric_rows} rows of metrics.jsonl, {len(hashes(options.after))} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
