"""Students with and without the teacher's table rows: trained over a grid of settings, chosen on
earlier windows, judged on later ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.transfer import pooled
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.config.tune import Settings
from exfm_ray.data.stream import EventStream
from exfm_ray.metrics.gain import ne_gain, transfer_ratio
from exfm_ray.training.local import init_single_process, local_loop
from exfm_ray.training.stacked_trainer import stacked
from tuning.rows import StudentRows
from tuning.trial import Figures, score, trial_job

SCORED = range(5, 7)
JUDGED = range(7, 12)
"""Windows that choose, as configs/tune_kuairand.yaml has them, and windows that no choice has
seen."""
BOUNDS = (0.95, 1.05)
TABLE_LR = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
DENSE_LR = (0.001, 0.003)
GRID: tuple[Settings, ...] = tuple(
    {"vm.optimizer.table_lr": t, "distillation.share.table_lr": t, "vm.optimizer.dense_lr": d}
    for t in TABLE_LR
    for d in DENSE_LR
)
DRIFTS = ("pinned", "refreshed", "aligned")
MIXED = "mixed"
Rows = list[dict[str, Any]]
KEPT = ("window", "examples", "label_rate", "log_loss", "calibration")


class Variant(NamedTuple):
    """One way to train a student. `rows`: the folder, beside the run's, whose table rows or history
    it is given; empty: the run's own."""

    name: str
    arm: str
    settings: Settings
    rows: str = ""
    as_chosen_for: str = ""
    """The variant whose settings it takes, so that they differ in one thing; empty: its own are
    chosen."""

    @property
    def training(self) -> str:
        """What is trained, the same for variants that differ only in what is chosen of it; names
        its file."""
        return ",".join(
            [
                self.arm,
                *(f"{name}={value}" for name, value in self.settings.items()),
                *([self.rows] if self.rows else []),
            ]
        )


def variants() -> list[Variant]:
    """Labels first; then every objective alone and with shared rows; what happens to optimizer
    state; histories; controls."""
    found = [
        Variant(arm, arm, {})
        for arm in (
            "labels",
            "kd",
            "ah",
            "ah_sa",
            "labels+share",
            "kd+share",
            "ah+share",
            "ah_sa+share",
        )
    ]
    for arm in ("labels+share", "kd+share"):
        for state in ("reset", "teacher"):
            found.append(
                Variant(f"{arm}, optimizer {state}", arm, {"distillation.share.optimizer": state})
            )
        found.append(Variant(f"{arm}, average", arm, {"distillation.share.mode": "average"}))
        found.append(Variant(f"{arm}, unseen", arm, {"distillation.share.mode": "unseen"}))
        found.append(Variant(f"{arm}, rows of an FM of shuffled labels", arm, {}, "shuffled"))
        found.append(Variant(f"{arm}, rows of other ids", arm, {}, "permuted"))
    for arm in ("labels+history", "ah_sa+history", "kd+share+history"):
        found += [Variant(f"{arm}, {drift}", arm, {}, drift) for drift in DRIFTS]
        found.append(Variant(f"{arm}, {DRIFTS[0]}, pasts of other users", arm, {}, MIXED))
    return [
        *found,
        *(
            Variant(f"labels, settings of {arm}", "labels", {}, "", arm)
            for arm in ("labels+share", "kd+share")
        ),
    ]


def trimmed(row: dict[str, Any]) -> dict[str, Any]:
    """What figures of several windows are made of."""
    return {key: row[key] for key in KEPT}


def train(
    config: Config,
    student: StudentConfig,
    variant: Variant,
    rows: StudentRows,
) -> list[Rows]:
    """For each setting of GRID, the student's rows of metrics over all windows; the trainings learn
    as one stack."""
    torch.set_num_threads(1)
    init_single_process()
    jobs = [
        trial_job(config, student, variant.arm, {**settings, **variant.settings}, 0)
        for settings in GRID
    ]
    stack, group = stacked(jobs, EventStream.open(jobs[0].stream_root).schema, [0] * len(jobs))
    loop, report = local_loop(jobs[0], range(JUDGED.stop), rows, [group])
    for window in range(JUDGED.stop):
        loop.run(window)
    by_model: dict[str, Rows] = defaultdict(list)
    for row in report.rows:
        by_model[row["model"]].append(trimmed(row))
    return [by_model[learner.model] for learner in stack.everyone]


def over(rows: Rows, windows: range) -> Figures | None:
    """Figures of some windows together; None where a model has failed in one of them."""
    chosen = [row for row in rows if row["window"] in windows and row["examples"]]
    if len({row["window"] for row in chosen}) < len(windows):
        return None
    labels = sum(row["examples"] * row["label_rate"] for row in chosen)
    return Figures(windows[-1], **pooled(chosen), labels=labels)


def choose(trained: Mapping[int, Sequence[Rows]]) -> tuple[float, int]:
    """The best mean score over the seeds on the windows that choose, and the number of its setting
    in GRID.

    Args:
        trained: seed -> rows of each setting.
    """

    def mean_score(number: int) -> float:
        told = [over(each[number], SCORED) for each in trained.values()]
        return float(
            np.mean([score(one, BOUNDS) if one and np.isfinite(one.ne) else np.inf for one in told])
        )

    return min((mean_score(number), number) for number in range(len(GRID)))


def judge(
    wanted: Sequence[Variant],
    trained: Mapping[str, Mapping[int, Sequence[Rows]]],
    fm: Mapping[int, Rows],
) -> dict[str, dict[str, Any]]:
    """variant -> what was chosen for it, and NE, gain over the chosen labels arm, transfer ratio
    and calibration of each seed.

    Args:
        trained: training of a variant -> seed -> rows of each setting; what has failed is not
            there, and its variants are left out.
        fm: seed -> the FM's rows on the student's examples.
    """
    chosen = {
        variant.name: choose(trained[variant.training])
        for variant in wanted
        if trained.get(variant.training)
    }
    told: dict[str, dict[str, Any]] = {}
    for variant in wanted:
        if not {variant.name, variant.as_chosen_for or variant.name} <= chosen.keys():
            continue
        best_score, setting = chosen[variant.as_chosen_for or variant.name]
        seeds = []
        for seed, each in trained[variant.training].items():
            own, labels, teacher = (
                over(rows, JUDGED)
                for rows in (each[setting], trained["labels"][seed][chosen["labels"][1]], fm[seed])
            )
            assert labels and teacher
            gain = ne_gain(own.ne if own else None, labels.ne)
            ratio = transfer_ratio(gain, ne_gain(teacher.ne, labels.ne))
            calibration = own.calibration if own else None
            seeds.append(
                {
                    "seed": seed,
                    "ne": own.ne if own else None,
                    "ne_gain": gain,
                    "transfer_ratio": ratio,
                    "calibration": calibration,
                }
            )
        told[variant.name] = {
            "settings": {**GRID[setting], **variant.settings},
            "score": best_score,
            "seeds": seeds,
        }
    return told
