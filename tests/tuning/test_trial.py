"""Trials: the score, and figures that are those of a plain job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_runs import train
from tuning_runs import taught, trials
from workers import Workers

from exfm_ray.config.checks import with_settings
from exfm_ray.config.root import Config
from exfm_ray.config.tune import Settings
from exfm_ray.metrics.state import MetricState
from exfm_ray.tracking.recorder import read_metrics
from exfm_ray.training.job import Job
from tuning.trial import OUTSIDE, Figures, figures_of, score, trial_job

BOUNDS = (0.95, 1.05)
SETTINGS: Settings = {
    "distillation.ah.w": 0.3,
    "distillation.ah.beta": 2.5,
    "distillation.ah.mlp": (4,),
    "distillation.sa.separate_head": False,
    "vm.optimizer.table_lr": 0.2,
    "vm.batch_size": 50,
}


@pytest.fixture(scope="module")
def base(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Config:
    return taught(groups, tmp_path_factory.mktemp("trial"))


@given(ne=st.floats(0.1, 1.5), one=st.floats(0, 5), other=st.floats(0, 5))
def test_score(
    ne: float,
    one: float,
    other: float,
) -> None:
    """Wrong: a trial farther out of the bounds ranks before a nearer one, or one outside before
    one within."""
    distance = [max(BOUNDS[0] - c, c - BOUNDS[1], 0) for c in (one, other)]
    scores = [
        score(Figures(0, ne, c, 1e18), BOUNDS) for c in (one, other)
    ]  # so many labels that chance is nothing
    if distance[0] < distance[1]:
        assert scores[0] <= scores[1] and (
            scores[0] < scores[1] or distance[1] - distance[0] < 1e-7
        )
    if distance[0] == 0:
        assert scores[0] == ne and score(Figures(0, ne - OUTSIDE / 2, 0.9, 1e18), BOUNDS) > ne


def test_score_with_few_labels() -> None:
    """Wrong: calibration that is off by chance costs a trial its rank, or true bias is excused.
    By hand: 1.1 * 1.96 / sqrt(600) = 0.0880."""
    assert (
        score(Figures(0, 0.9, 1.1, 600.0), BOUNDS)
        == 0.9
        == score(Figures(0, 0.9, 0.9, 600.0), BOUNDS)
    )
    assert score(Figures(0, 0.9, 1.1, 60_000.0), BOUNDS) == pytest.approx(
        0.9 + OUTSIDE + 0.05 - 1.1 * 1.96 / 60_000**0.5, abs=1e-12
    )
    assert score(Figures(0, 0.9, 1.2, 600.0), BOUNDS) == pytest.approx(
        0.9 + OUTSIDE + 0.15 - 0.096020, abs=1e-6
    )


def test_chance_excuses_an_unbiased_model() -> None:
    """Wrong: of unbiased models, on domains of few clicks, more than 1 in 20 is called
    uncalibrated even with bounds of no width."""
    rng, rate, examples = np.random.default_rng(0), 0.03, 20_000  # 600 labels
    labels = rng.binomial(examples, rate, 4000)
    outside = [
        score(Figures(0, 0.9, examples * rate / n, float(n)), (1 - 1e-9, 1 + 1e-9)) > 0.9 + OUTSIDE
        for n in labels
    ]
    assert 0.035 < np.mean(outside) < 0.065  # 5 %, four standard errors of 0.34 % about it
    tight = [
        abs(examples * rate / n - 1) > 0.05 for n in labels
    ]  # without the allowance a fifth leaves bounds of 5 %
    assert np.mean(tight) > 0.15


@pytest.mark.parametrize(
    ("student", "arm"), [("feed", "ah_sa"), ("search", "kd"), ("feed", "labels")]
)
def test_figures_are_those_of_a_plain_job(
    base: Config,
    groups: dict[int, Workers],
    tmp_path: Path,
    student: str,
    arm: str,
) -> None:
    """Wrong: the choice of a sweep performs differently in a pipeline than in its trial."""
    (outcomes,) = groups[1].run(trials, base, student, arm, [SETTINGS], 1, 3)
    figures = [told for (told,) in outcomes]
    (found,) = (s for s in base.vm.models if s.name == student)
    plain = with_settings(
        base, {**SETTINGS, "vm.arms": [arm], "run.dir": str(tmp_path), "metrics.warmup_windows": 1}
    )
    (tmp_path / base.name).mkdir()
    for part in ("stream", "supervision"):
        (tmp_path / base.name / part).symlink_to(base.folder / part)
    groups[1].run(train, Job("vm", plain, (found,)), range(4), None)
    written = read_metrics(plain.folder / "metrics.jsonl")
    assert len(written) == 4
    # Over the counted windows together: log loss and predictions add up.
    for told in figures:
        counted = [row for row in written if 1 <= row["window"] <= told.window]
        n = np.array([row["examples"] for row in counted])
        rate = np.array([row["label_rate"] for row in counted])
        loss = (n * [row["log_loss"] for row in counted]).sum() / n.sum()
        mean = (n * rate).sum() / n.sum()
        np.testing.assert_allclose(
            told.ne, loss / -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)), rtol=1e-12
        )
        np.testing.assert_allclose(
            told.calibration,
            (n * rate * [row["calibration"] for row in counted]).sum() / (n * rate).sum(),
            rtol=1e-12,
        )
        np.testing.assert_allclose(told.labels, (n * rate).sum(), rtol=1e-12)
    assert [told.window for told in figures] == [1, 2, 3]


def test_settings_reach_the_job(base: Config) -> None:
    """Wrong: a trial learns under other settings than those that are recorded for it."""
    job = trial_job(base, base.vm.models[1], "ah", SETTINGS, 2, seed=9)
    assert (
        job.config.distillation.ah.w,
        job.config.distillation.ah.mlp,
        job.config.vm.batch_size,
    ) == (0.3, (4,), 50)
    assert (
        job.config.vm.arms == ("ah",)
        and job.config.vm.models == (base.vm.models[1],) == job.students
    )
    assert (job.config.seed, job.config.metrics.warmup_windows, job.config.folder) == (
        9,
        2,
        base.folder,
    )


def test_undefined_figures_are_refused() -> None:
    """Wrong: a trial without examples, or one that has diverged, gets a score and may win."""
    good = MetricState.from_logits(np.array([0.5, -1.0]), np.array([1.0, 0.0]))
    assert figures_of(3, [good]).window == 3
    with pytest.raises(ValueError, match="up to window 3: NE is undefined"):
        figures_of(3, [])
    with pytest.raises(ValueError, match="NE is undefined"):
        figures_of(3, [good, MetricState.from_logits(np.zeros(2), np.ones(2))])
    with pytest.raises(ValueError, match="the model has diverged"):
        figures_of(3, [replace(good, log_loss=np.inf)])


def test_several_tasks_count_alike() -> None:
    """Wrong: a task hides behind another one's calibration, or NE is of one task only."""
    one, other = (
        MetricState.from_logits(np.full(4, z), np.array([1.0, 0.0, 0.0, 0.0])) for z in (-1.0, 0.0)
    )
    told = figures_of(0, [one, other])
    alone = [figures_of(0, [state]) for state in (one, other)]
    assert told.ne == pytest.approx((alone[0].ne + alone[1].ne) / 2, rel=1e-12)
    assert told.calibration == alone[1].calibration == pytest.approx(2.0)
    assert (
        figures_of(0, [one, MetricState.from_logits(np.zeros(3), np.array([1.0, 1.0, 0.0]))]).labels
        == 1.0
    )
