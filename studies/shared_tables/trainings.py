"""Students with and without the teacher's table rows, trained over a grid of learning rates.

Earlier windows choose the learning rates; figures are of later windows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.config.tune import Settings
from exfm_ray.data.stream import EventStream
from exfm_ray.metrics.gain import gains_over_labels, pool
from exfm_ray.training.local import init_single_process, local_loop
from exfm_ray.training.stacked_trainer import stacked
from tuning.rows import StudentRows
from tuning.trial import Figures, score, trial_job

VALIDATION = range(5, 7)
"""Windows that choose, as in configs/tune_kuairand.yaml."""
HOLDOUT = range(7, 12)
"""Windows of the figures, which no choice has seen."""
BOUNDS = (0.95, 1.05)
TABLE_LR = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
DENSE_LR = (0.001, 0.003)
GRID: tuple[Settings, ...] = tuple(
    {
        "vm.optimizer.table_lr": table_lr,
        "distillation.share.table_lr": table_lr,
        "vm.optimizer.dense_lr": dense_lr,
    }
    for table_lr in TABLE_LR
    for dense_lr in DENSE_LR
)
SPACES = ("pinned", "refreshed", "aligned")
"""Embedding spaces of a history."""
MIXED = "mixed"
"""A history whose users have other users' pasts."""
PLAIN_ARMS = ("labels", "kd", "ah", "ah_sa")

Rows = list[dict[str, Any]]
COLUMNS = ("window", "examples", "label_rate", "log_loss", "calibration")
"""What the figures of several windows are made of."""


class Variant(NamedTuple):
    """One way to train a student.

    Attributes:
        rows: folder beside the run's with the table rows or the history; empty: the run's own.
        settings_of: the variant whose chosen settings it takes, so that they differ in one thing;
            empty: its own are chosen.
    """

    name: str
    arm: str
    settings: Settings
    rows: str = ""
    settings_of: str = ""

    @property
    def training(self) -> str:
        """Name of the training, and of its file. Variants that choose differently may share it."""
        parts = [self.arm, *(f"{name}={value}" for name, value in self.settings.items())]
        if self.rows:
            parts.append(self.rows)
        return ",".join(parts)


def variants() -> list[Variant]:
    """Return all variants: arms, optimizer state and modes, histories, controls. Labels are first.

    A control is rows of an FM of shuffled labels, rows of other ids, pasts of other users, or the
    labels arm under the settings that were chosen for an arm with shared rows.
    """
    return [
        *(Variant(arm, arm, {}) for arm in PLAIN_ARMS),
        *(Variant(f"{arm}+share", f"{arm}+share", {}) for arm in PLAIN_ARMS),
        *_shared_rows(),
        *_histories(),
        *_labels_with_settings_of_others(),
    ]


def _shared_rows() -> Iterator[Variant]:
    for arm in ("labels+share", "kd+share"):
        for state in ("reset", "teacher"):
            settings: Settings = {"distillation.share.optimizer": state}
            yield Variant(f"{arm}, optimizer {state}", arm, settings)
        yield Variant(f"{arm}, average", arm, {"distillation.share.mode": "average"})
        yield Variant(f"{arm}, unseen", arm, {"distillation.share.mode": "unseen"})
        yield Variant(f"{arm}, rows of an FM of shuffled labels", arm, {}, "shuffled")
        yield Variant(f"{arm}, rows of other ids", arm, {}, "permuted")


def _histories() -> Iterator[Variant]:
    for arm in ("labels+history", "ah_sa+history", "kd+share+history"):
        for space in SPACES:
            yield Variant(f"{arm}, {space}", arm, {}, space)
        yield Variant(f"{arm}, {SPACES[0]}, pasts of other users", arm, {}, MIXED)


def _labels_with_settings_of_others() -> Iterator[Variant]:
    for arm in ("labels+share", "kd+share"):
        yield Variant(f"labels, settings of {arm}", "labels", {}, "", arm)


def trimmed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a row of metrics that figures are made of."""
    return {key: row[key] for key in COLUMNS}


def train(
    config: Config,
    student: StudentConfig,
    variant: Variant,
    rows: StudentRows,
) -> list[Rows]:
    """Train a variant with each setting of GRID; all of them learn as one stack.

    Returns:
        For each setting, the student's rows of metrics over all windows.
    """
    torch.set_num_threads(1)
    init_single_process()
    jobs = [
        trial_job(config, student, variant.arm, {**settings, **variant.settings}, 0)
        for settings in GRID
    ]
    schema = EventStream.open(jobs[0].stream_root).schema
    stack, group = stacked(jobs, schema, [0] * len(jobs))
    windows = range(HOLDOUT.stop)
    loop, report = local_loop(jobs[0], windows, rows, [group])
    for window in windows:
        loop.run(window)

    by_model: dict[str, Rows] = defaultdict(list)
    for row in report.rows:
        by_model[row["model"]].append(trimmed(row))
    return [by_model[name.model] for name in stack.all_model_names]


def figures_over(rows: Rows, windows: range) -> Figures | None:
    """Return the figures of some windows together, or None where a window has no figures."""
    in_windows = [row for row in rows if row["window"] in windows and row["examples"]]
    if len({row["window"] for row in in_windows}) < len(windows):
        return None
    pooled = pool(in_windows)
    assert pooled.ne is not None and pooled.calibration is not None
    return Figures(windows[-1], pooled.ne, pooled.calibration, pooled.labels)


class Choice(NamedTuple):
    """The setting that was chosen for a variant.

    Attributes:
        score: mean over the seeds on the validation windows.
        setting: its position in GRID.
    """

    score: float
    setting: int


def choose(trained: Mapping[int, Sequence[Rows]]) -> Choice:
    """Choose the setting with the best mean score over the seeds on the validation windows.

    Args:
        trained: seed -> rows of each setting.
    """
    choices = []
    for setting in range(len(GRID)):
        scores = []
        for rows_of_settings in trained.values():
            figures = figures_over(rows_of_settings[setting], VALIDATION)
            is_finite = figures is not None and np.isfinite(figures.ne)
            scores.append(score(figures, BOUNDS) if figures and is_finite else np.inf)
        choices.append(Choice(float(np.mean(scores)), setting))
    return min(choices)


def holdout_figures(
    all_variants: Sequence[Variant],
    trained: Mapping[str, Mapping[int, Sequence[Rows]]],
    fm: Mapping[int, Rows],
) -> dict[str, dict[str, Any]]:
    """Compute each variant's figures on the holdout windows.

    Args:
        trained: training of a variant -> seed -> rows of each setting. Variants whose training has
            failed are left out.
        fm: seed -> the FM's rows on the student's examples.

    Returns:
        Variant -> the chosen settings and their score, and for each seed NE, gain over the labels
        arm under its own chosen settings, transfer ratio and calibration.
    """
    chosen = {
        variant.name: choose(trained[variant.training])
        for variant in all_variants
        if trained.get(variant.training)
    }
    by_variant: dict[str, dict[str, Any]] = {}
    for variant in all_variants:
        chooser = variant.settings_of or variant.name
        if variant.name not in chosen or chooser not in chosen:
            continue
        choice = chosen[chooser]
        labels_setting = chosen["labels"].setting
        seeds = []
        for seed, rows_of_settings in trained[variant.training].items():
            labels_rows = trained["labels"][seed][labels_setting]
            figures = _seed_figures(rows_of_settings[choice.setting], labels_rows, fm[seed])
            seeds.append({"seed": seed, **figures})
        by_variant[variant.name] = {
            "settings": {**GRID[choice.setting], **variant.settings},
            "score": choice.score,
            "seeds": seeds,
        }
    return by_variant


def _seed_figures(
    rows: Rows,
    labels_rows: Rows,
    fm_rows: Rows,
) -> dict[str, float | None]:
    """Figures of one seed on the holdout windows; None where the training has failed."""
    figures = figures_over(rows, HOLDOUT)
    labels = figures_over(labels_rows, HOLDOUT)
    teacher = figures_over(fm_rows, HOLDOUT)
    assert labels and teacher
    ne = figures.ne if figures else None
    gains = gains_over_labels(ne, labels.ne, teacher.ne)
    return {
        "ne": ne,
        "ne_gain": gains.ne_gain,
        "transfer_ratio": gains.transfer_ratio,
        "calibration": figures.calibration if figures else None,
    }
