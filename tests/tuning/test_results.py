"""The results file: every trial comes back with its settings and curve."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from exfm_ray.config.tune import Distribution
from exfm_ray.errors import UserError
from tuning.results import Search, Trial, read_trials, write_trials
from tuning.trial import Figures

SPACE = {
    "distillation.ah.w": Distribution(low=0.1, high=3, log=True),
    "vm.batch_size": Distribution(low=16, high=64, integer=True),
    "distillation.ah.mlp": Distribution(choice=((), (16, 8))),
    "distillation.sa.separate_head": Distribution(choice=(False, True)),
    "distillation.sa.input": Distribution(choice=("probability", "logit")),
}
B = Search("b", "ah")
A = Search("a", "ah_sa")
CURVE = (Figures(3, 0.9, 1.1, 7.0), Figures(4, 0.8, 1.0, 15.0))
TRIALS = [
    Trial(
        B,
        1,
        {"distillation.ah.w": 0.1 + 0.2, "distillation.ah.mlp": ()},
        "complete",
        0.8,
        CURVE,
        2.5,
    ),
    Trial(
        B, 0, {"vm.batch_size": 32, "distillation.ah.mlp": (16, 8)}, "stopped", 1.9, CURVE[:1], 1.0
    ),
    Trial(
        A,
        0,
        {"distillation.sa.separate_head": False, "distillation.sa.input": "logit"},
        "failed",
        None,
        (),
        0.0,
        "diverged",
    ),
]


def test_round_trip(tmp_path: Path) -> None:
    """Wrong: a resumed sweep gives its search other settings or scores than those that were
    tried."""
    path = tmp_path / "tune" / "trials.parquet"
    assert read_trials(path, SPACE) == []
    write_trials(path, TRIALS, SPACE)
    assert read_trials(path, SPACE) == [TRIALS[2], TRIALS[1], TRIALS[0]]


def test_columns(tmp_path: Path) -> None:
    """Wrong: other programs cannot read the file as its documentation says."""
    write_trials(tmp_path / "trials.parquet", TRIALS, SPACE)
    frame = (
        pq.read_table(tmp_path / "trials.parquet")
        .to_pandas()
        .set_index(["student", "arm", "trial"])
    )
    best = frame.loc[("b", "ah", 1)]
    assert (best["ne"], best["calibration"], best["score"], best["state"]) == (
        0.8,
        1.0,
        0.8,
        "complete",
    )
    assert (
        list(best["ne_curve"]) == [0.9, 0.8]
        and list(best["windows"]) == [3, 4]
        and list(best["labels_curve"]) == [7, 15]
    )
    assert best["distillation.ah.w"] == 0.1 + 0.2 and best["distillation.ah.mlp"] == "[]"
    assert frame["distillation.sa.input"].isna().tolist() == [False, True, True]
    assert frame.loc[("a", "ah_sa", 0)]["error"] == "diverged"


def test_damaged(tmp_path: Path) -> None:
    """Wrong: a damaged file, or one of another space, ends in a traceback or is overwritten
    silently."""
    path = tmp_path / "trials.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"trials.parquet: not the trials of this sweep"):
        read_trials(path, SPACE)
    write_trials(path, TRIALS, SPACE)
    with pytest.raises(UserError, match=r"not the trials of this sweep"):
        read_trials(path, {**SPACE, "distillation.kd.w": Distribution(low=0, high=1)})
