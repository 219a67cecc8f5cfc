"""Read the results of a run as pandas tables.

    python examples/read_results.py runs/demo

The run may be complete or in progress: the tables hold what has been done so far.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from exfm_ray import RunFiles

PLACE = ["model", "domain", "task"]
COLUMNS = ["ne", "auc", "calibration", "ne_gain", "fm_ne_gain", "transfer_ratio", "examples"]


def figures_by_arm(run: RunFiles) -> pd.DataFrame:
    """Figures over all windows after the warm-up: one row per model, domain, task and arm."""
    rows = pd.DataFrame(run.figures)
    if rows.empty:
        return rows
    return rows.set_index([*PLACE, "arm"]).reindex(columns=COLUMNS)


def ne_by_window(run: RunFiles) -> pd.DataFrame:
    """Normalized entropy of each window before it was learned: one column per model and arm."""
    rows = pd.DataFrame(run.rows)
    if rows.empty:
        return rows
    unit = "pass" if run.static else "window"
    return rows.pivot_table(index=unit, columns=[*PLACE, "arm"], values="ne")


def main() -> None:
    """Print both tables of the run in the given folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/demo")
    run = RunFiles.open(parser.parse_args().run)

    done = ", ".join(f"{model} {windows}" for model, windows in run.done.items())
    unit = "passes" if run.static else f"of {run.windows} windows"
    print(f"{run.name} is {run.state}; done: {done} {unit}\n")
    with pd.option_context("display.width", 160, "display.max_columns", None):
        print("Figures by arm")
        print(figures_by_arm(run).round(4).to_string())
        print("\nNE by window")
        print(ne_by_window(run).T.round(4).to_string())


if __name__ == "__main__":
    main()
