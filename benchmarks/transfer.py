"""python -m benchmarks.transfer [--data DIR] [--quick]: what distillation brings, over three seeds.

Runs `run.py pipeline` with configs/demo.yaml (synthetic stream) and configs/kuairand.yaml
(DIR/kuairand_pure) for the seeds 0, 1 and 2: one stream, everything else drawn anew. Figures are
NE, NE gain over the labels arm, transfer ratio and calibration, mean and standard deviation over
seeds. KuaiRand's settings were chosen on windows 3 to 6; its figures are given for all windows
after the warm-up and for windows 7 to 11, which no choice has seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments, bar, report
from exfm_ray.metrics.gain import ne_gain, transfer_ratio
from exfm_ray.metrics.state import entropy
from exfm_ray.storage.atomic import read_json
from exfm_ray.tracking.recorder import read_metrics

SAYS = "Runs the pipeline on the synthetic stream and on KuaiRand for three seeds: about 12 minutes on two cores (--quick: one seed, 4)."
ROOT = Path(__file__).parents[1]
UNSEEN_FROM = 7
Rows = list[dict[str, Any]]


def pooled(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """NE and calibration of several windows' examples together, from the windows' own sums."""
    rows = list(rows)
    examples = sum(r["examples"] for r in rows)
    labels = sum(r["examples"] * r["label_rate"] for r in rows)
    log_loss = sum(r["examples"] * r["log_loss"] for r in rows) / examples
    predictions = sum(r["examples"] * r["label_rate"] * (r["calibration"] or 0.0) for r in rows)
    return {"ne": log_loss / entropy(labels / examples), "calibration": predictions / labels}


def run(
    config: str,
    seed: int,
    folder: str,
    data: Path,
) -> Path:
    """One pipeline in a process of its own; its folder."""
    name = f"{config}-{seed}"
    overrides = [f"seed={seed}", f"run.dir={folder}"] + (
        [f"data.root={data / 'kuairand_pure'}"] if config == "kuairand" else []
    )
    command = [
        sys.executable,
        "run.py",
        "pipeline",
        "--config",
        f"configs/{config}.yaml",
        "--name",
        name,
    ]
    subprocess.run(
        command + [part for o in overrides for part in ("--set", o)],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    return Path(folder) / name


def figures(runs: list[Path], first_window: int) -> dict[str, Any]:
    """model -> arm -> mean and standard deviation over the runs of NE, calibration, NE gain,
    transfer ratio."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for folder in runs:
        grouped: dict[tuple[str, str, str, str], Rows] = defaultdict(list)
        for row in read_metrics(folder / "metrics.jsonl"):
            if row["window"] >= first_window:
                grouped[row["model"], row["arm"], row["domain"], row["task"]].append(row)
        for (model, arm, domain, task), rows in grouped.items():
            if arm == "fm":
                continue
            own = pooled(rows)
            labels = pooled(grouped[model, "labels", domain, task])["ne"]
            fm = pooled(grouped["fm", "fm", domain, task])["ne"]
            gain = ne_gain(own["ne"], labels)
            fm_gain = ne_gain(fm, labels)
            told = {
                "ne": own["ne"],
                "calibration": own["calibration"],
                "ne_gain": gain,
                "transfer_ratio": transfer_ratio(gain, fm_gain),
            }
            if arm == "labels":
                told = {
                    "ne": labels,
                    "calibration": own["calibration"],
                    "fm_ne": fm,
                    "fm_ne_gain": fm_gain,
                }
            for key, value in told.items():
                if value is not None:
                    values[model, arm, key].append(value)
    result: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    for (model, arm, key), seeds in values.items():
        result[model][arm][key] = {
            "mean": float(np.mean(seeds)),
            "sd": float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None,
        }
    for arms in result.values():
        gain = arms["labels"]["fm_ne_gain"]
        if gain["mean"] <= (
            gain["sd"] or 0.0
        ):  # where the FM's own gain is within its spread, the ratio says nothing
            for told in arms.values():
                told.pop("transfer_ratio", None)
    return json.loads(json.dumps(result))  # type: ignore[no-any-return]


def table(title: str, told: dict[str, Any]) -> None:
    """The figures as a Markdown table, as the README shows them."""

    def cell(
        value: dict[str, Any] | None,
        scale: float = 1.0,
        digits: int = 4,
    ) -> str:
        if value is None:
            return ""
        return f"{value['mean'] * scale:.{digits}f}" + (
            f" ± {value['sd'] * scale:.{digits}f}" if value["sd"] is not None else ""
        )

    print(
        f"\n{title}\n\n| VM | arm | NE | NE gain % | transfer ratio | calibration |\n|---|---|---|---|---|---|"
    )
    for model, arms in told.items():
        labels = arms["labels"]
        print(
            f"| {model} | FM on the same examples | {cell(labels['fm_ne'])} | {cell(labels['fm_ne_gain'], 100, 2)} | | |"
        )
        for arm, f in arms.items():
            gain = cell(f.get("ne_gain"), 100, 2)
            ratio = cell(f.get("transfer_ratio"), 1, 2)
            print(
                f"| {model} | {arm} | {cell(f['ne'])} | {gain} | {ratio} | {cell(f['calibration'], 1, 3)} |"
            )


def closed(runs: list[Path]) -> dict[str, Any]:
    """On the synthetic stream: best possible NE, FM's and VMs' NE on the same examples, mean over
    seeds."""
    told: dict[str, list[float]] = defaultdict(list)
    for folder in runs:
        rows = read_json(folder / "summary.json")["figures"]
        for vm in (r for r in rows if r["role"] == "vm"):
            fm = next(
                r
                for r in rows
                if r["role"] == "fm" and (r["domain"], r["task"]) == (vm["domain"], vm["task"])
            )
            told[f"{vm['model']}/{vm['arm']}"].append(vm["ne"])
            if vm["arm"] == "labels":
                told[f"{vm['model']}/fm"].append(fm["ne"])
                told[f"{vm['model']}/best"].append(vm["best_ne"])
    return {key: float(np.mean(values)) for key, values in told.items()}


def main() -> None:
    options = arguments("transfer", SAYS)
    seeds = [0] if options.quick else [0, 1, 2]
    with tempfile.TemporaryDirectory() as folder:
        embedded = [run("demo", seed, folder, options.data) for seed in seeds]
        told = {"synthetic": figures(embedded, 2)}
        table("Synthetic stream, windows 2 to 11", told["synthetic"])
        best = closed(embedded)
        bars = {
            f"synthetic_{m}_fm_closer_to_best_than_labels": bar(
                best[f"{m}/labels"] - best[f"{m}/fm"], 0.0
            )
            for m in told["synthetic"]
        }
        bars |= {
            f"synthetic_{m}_ah_sa_ne_gain": bar(
                told["synthetic"][m]["ah_sa"]["ne_gain"]["mean"], 0.0
            )
            for m in told["synthetic"]
        }
        if (options.data / "kuairand_pure").is_dir():
            runs = [run("kuairand", seed, folder, options.data.absolute()) for seed in seeds]
            told |= {"kuairand": figures(runs, 3), "kuairand_unseen": figures(runs, UNSEEN_FROM)}
            table("KuaiRand-Pure, is_click, windows 3 to 11", told["kuairand"])
            table(
                f"KuaiRand-Pure, is_click, windows {UNSEEN_FROM} to 11 only",
                told["kuairand_unseen"],
            )
            for model in ("tab2", "tab4", "tab6"):
                arms = told["kuairand"][model]
                winner = max(("ah", "ah_sa"), key=lambda arm: arms[arm]["ne_gain"]["mean"])
                bars[f"kuairand_{model}_fm_ne_gain"] = bar(
                    arms["labels"]["fm_ne_gain"]["mean"], 0.01
                )
                bars[f"kuairand_{model}_{winner}_ne_gain"] = bar(
                    arms[winner]["ne_gain"]["mean"], 0.0
                )
                bars[f"kuairand_{model}_{winner}_calibration_error"] = bar(
                    abs(arms[winner]["calibration"]["mean"] - 1), 0.1, at_least=False
                )
        report("transfer", told | {"synthetic_ne": best}, bars)


if __name__ == "__main__":
    main()
