"""python -m studies.transfer [--data DIR] [--quick]: what distillation brings, over three seeds.

Runs `run.py pipeline` with configs/demo.yaml (synthetic stream) and configs/kuairand.yaml
(DIR/kuairand_pure) for the seeds 0, 1 and 2: one stream, everything else drawn again. Figures are
NE, NE gain over the labels arm, transfer ratio and calibration, mean and standard deviation over
seeds. KuaiRand's settings were chosen on windows 3 to 6. Its figures are for all windows after the
warm-up, and for windows 7 to 11, which no choice has seen.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments, bar, report
from exfm_ray.metrics.gain import gains_over_labels, pool
from exfm_ray.storage.atomic import read_json
from exfm_ray.tracking.recorder import read_metrics

DESCRIPTION = (
    "Runs the pipeline on the synthetic stream and on KuaiRand for three seeds: "
    "about 12 minutes on two cores (--quick: one seed, 4)."
)
ROOT = Path(__file__).parents[1]
UNSEEN_FROM = 7
KUAIRAND_MODELS = ("tab2", "tab4", "tab6")
Rows = list[dict[str, Any]]
RowKey = tuple[str, str, str, str]
"""Model, arm, domain and task of a row of metrics."""


def run(
    config: str,
    seed: int,
    folder: str,
    data: Path,
) -> Path:
    """Run one pipeline in a process of its own and return its folder."""
    name = f"{config}-{seed}"
    overrides = [f"seed={seed}", f"run.dir={folder}"]
    if config == "kuairand":
        overrides.append(f"data.root={data / 'kuairand_pure'}")
    command = [sys.executable, "run.py", "pipeline"]
    command += ["--config", f"configs/{config}.yaml", "--name", name]
    for override in overrides:
        command += ["--set", override]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return Path(folder) / name


def run_figures(folder: Path, first_window: int) -> dict[tuple[str, str], dict[str, float | None]]:
    """Compute the figures of one run.

    Returns:
        (model, arm) -> figures of the windows from `first_window` on together. The labels arm has
        the FM's figures in place of gains.
    """
    grouped: dict[RowKey, Rows] = defaultdict(list)
    for row in read_metrics(folder / "metrics.jsonl"):
        if row["window"] >= first_window:
            grouped[row["model"], row["arm"], row["domain"], row["task"]].append(row)

    figures: dict[tuple[str, str], dict[str, float | None]] = {}
    for (model, arm, domain, task), rows in grouped.items():
        if arm == "fm":
            continue
        pooled = pool(rows)
        labels_ne = pool(grouped[model, "labels", domain, task]).ne
        fm_ne = pool(grouped["fm", "fm", domain, task]).ne
        gains = gains_over_labels(pooled.ne, labels_ne, fm_ne)
        figures[model, arm] = {"ne": pooled.ne, "calibration": pooled.calibration}
        if arm == "labels":
            figures[model, arm] |= {"fm_ne": fm_ne, "fm_ne_gain": gains.fm_ne_gain}
        else:
            figures[model, arm] |= {
                "ne_gain": gains.ne_gain,
                "transfer_ratio": gains.transfer_ratio,
            }
    return figures


def over_runs(folders: Sequence[Path], first_window: int) -> dict[str, Any]:
    """Return model -> arm -> figure -> mean and standard deviation over the runs.

    Where the FM's own gain is within its spread, transfer ratios say nothing and are left out.
    """
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for folder in folders:
        for (model, arm), figures in run_figures(folder, first_window).items():
            for key, value in figures.items():
                if value is not None:
                    values[model, arm, key].append(value)

    models: dict[str, dict[str, dict[str, Any]]] = {}
    for (model, arm, key), of_runs in values.items():
        sd = float(np.std(of_runs, ddof=1)) if len(of_runs) > 1 else None
        arms = models.setdefault(model, {})
        arms.setdefault(arm, {})[key] = {"mean": float(np.mean(of_runs)), "sd": sd}
    for arms in models.values():
        fm_gain = arms["labels"]["fm_ne_gain"]
        if fm_gain["mean"] <= (fm_gain["sd"] or 0.0):
            for figures in arms.values():
                figures.pop("transfer_ratio", None)
    return models


def print_table(title: str, models: Mapping[str, Any]) -> None:
    """Print the figures as a Markdown table, as the README shows them."""
    print(f"\n{title}\n")
    print("| VM | arm | NE | NE gain % | transfer ratio | calibration |")
    print("|---|---|---|---|---|---|")
    for model, arms in models.items():
        labels = arms["labels"]
        fm_ne = cell(labels["fm_ne"])
        fm_gain = cell(labels["fm_ne_gain"], 100, 2)
        print(f"| {model} | FM on the same examples | {fm_ne} | {fm_gain} | | |")
        for arm, figures in arms.items():
            ne = cell(figures["ne"])
            gain = cell(figures.get("ne_gain"), 100, 2)
            ratio = cell(figures.get("transfer_ratio"), 1, 2)
            calibration = cell(figures["calibration"], 1, 3)
            print(f"| {model} | {arm} | {ne} | {gain} | {ratio} | {calibration} |")


def cell(
    value: Mapping[str, Any] | None,
    scale: float = 1.0,
    digits: int = 4,
) -> str:
    """Format a mean and its standard deviation."""
    if value is None:
        return ""
    mean = f"{value['mean'] * scale:.{digits}f}"
    if value["sd"] is None:
        return mean
    return f"{mean} ± {value['sd'] * scale:.{digits}f}"


def synthetic_nes(folders: Sequence[Path]) -> dict[str, float]:
    """Return the NE of oracle, FM and vertical models on the same examples, mean over seeds.

    The oracle, `best`, knows the click probabilities of the synthetic stream.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for folder in folders:
        rows = read_json(folder / "summary.json")["figures"]
        fm_nes = {(row["domain"], row["task"]): row["ne"] for row in rows if row["role"] == "fm"}
        for row in rows:
            if row["role"] != "vm":
                continue
            model = row["model"]
            values[f"{model}/{row['arm']}"].append(row["ne"])
            if row["arm"] == "labels":
                values[f"{model}/fm"].append(fm_nes[row["domain"], row["task"]])
                values[f"{model}/best"].append(row["best_ne"])
    return {key: float(np.mean(of_seeds)) for key, of_seeds in values.items()}


def synthetic_bars(models: Mapping[str, Any], nes: Mapping[str, float]) -> dict[str, Any]:
    """Return the bars of the synthetic stream."""
    bars = {}
    for model in models:
        closer = nes[f"{model}/labels"] - nes[f"{model}/fm"]
        bars[f"synthetic_{model}_fm_closer_to_best_than_labels"] = bar(closer, 0.0)
    for model, arms in models.items():
        gain = arms["ah_sa"]["ne_gain"]["mean"]
        bars[f"synthetic_{model}_ah_sa_ne_gain"] = bar(gain, 0.0)
    return bars


def kuairand_bars(models: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bars of KuaiRand: of the FM, and of each student's better arm of ah and ah_sa."""
    bars = {}
    for model in KUAIRAND_MODELS:
        arms = models[model]
        gains = {arm: arms[arm]["ne_gain"]["mean"] for arm in ("ah", "ah_sa")}
        winner = max(gains, key=lambda arm: gains[arm])
        error = abs(arms[winner]["calibration"]["mean"] - 1)
        prefix = f"kuairand_{model}"
        bars[f"{prefix}_fm_ne_gain"] = bar(arms["labels"]["fm_ne_gain"]["mean"], 0.01)
        bars[f"{prefix}_{winner}_ne_gain"] = bar(gains[winner], 0.0)
        bars[f"{prefix}_{winner}_calibration_error"] = bar(error, 0.1, at_least=False)
    return bars


def main() -> None:
    options = arguments("studies.transfer", DESCRIPTION)
    seeds = [0] if options.quick else [0, 1, 2]
    data = options.data.absolute()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run("demo", seed, folder, data) for seed in seeds]
        figures = {"synthetic": over_runs(runs, 2)}
        print_table("Synthetic stream, windows 2 to 11", figures["synthetic"])
        nes = synthetic_nes(runs)
        bars = synthetic_bars(figures["synthetic"], nes)

        if (data / "kuairand_pure").is_dir():
            runs = [run("kuairand", seed, folder, data) for seed in seeds]
            title = "KuaiRand-Pure, is_click, windows"
            figures["kuairand"] = over_runs(runs, 3)
            figures["kuairand_unseen"] = over_runs(runs, UNSEEN_FROM)
            print_table(f"{title} 3 to 11", figures["kuairand"])
            print_table(f"{title} {UNSEEN_FROM} to 11 only", figures["kuairand_unseen"])
            bars |= kuairand_bars(figures["kuairand"])
    report("transfer", {**figures, "synthetic_ne": nes}, bars)


if __name__ == "__main__":
    main()
