"""Models that learn together: each learns what it would alone, none disturbs another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tuning_runs import SWEEP, taught
from workers import Workers

from exfm_ray.config.checks import with_settings
from exfm_ray.config.root import Config
from exfm_ray.config.tune import Settings
from exfm_ray.errors import UserError
from exfm_ray.training.job import Job
from exfm_ray.training.stacked_trainer import check_alike
from tuning.rows import StudentRows
from tuning.trial import Figures, Outcome, learn, trial_job

WINDOWS = range(4)
MEMBERS: list[Settings] = [
    {
        "vm.optimizer.table_lr": 0.02 * 3**i,
        "vm.optimizer.dense_lr": 0.001 * 2**i,
        "vm.optimizer.dense_weight_decay": 0.1 * i,
        "distillation.kd.w": 0.3 + i,
        "distillation.ah.w": 0.5 + i,
        "distillation.ah.alpha": 0.8 + 0.3 * i,
        "distillation.ah.beta": 1.0 + 3 * i,
        "distillation.sa.w": 2.0 - 0.5 * i,
        "distillation.sa.lr": 0.01 / 4**i,
    }
    for i in range(3)
]
CLOSE = 2e-6
"""NE of two trainings that differ in the rounding of float32 sums only: after 12 steps a few units
of the last place of a logit."""


def together(
    config: Config,
    student: str,
    arm: str,
    members: Sequence[Settings],
    moves: Sequence[Any] = (),
) -> list[list[Outcome]]:
    """Outcomes of each window of the members, with seeds 0, 1, ...

    Args:
        moves: (window, source, target, settings).
    """
    student_config = next(s for s in config.vm.models if s.name == student)
    jobs = [
        trial_job(config, student_config, arm, settings, 1, seed)
        for seed, settings in enumerate(members)
    ]
    learning = learn(jobs, StudentRows.read_from(config, student_config, WINDOWS), WINDOWS)
    outcomes = [next(learning)]
    for window in WINDOWS[:-1]:
        exploits = [
            (source, target, trial_job(config, student_config, arm, settings, 1, 0))
            for at, source, target, settings in moves
            if at == window
        ]
        outcomes.append(learning.send(exploits))
    return outcomes


def alone(
    config: Config,
    student: str,
    arm: str,
    members: Sequence[Settings],
) -> list[list[Outcome]]:
    """The outcomes of the same trainings, one after the other."""
    student_config = next(s for s in config.vm.models if s.name == student)
    jobs = [
        trial_job(config, student_config, arm, settings, 1, seed)
        for seed, settings in enumerate(members)
    ]
    each = [
        list(learn([job], StudentRows.read_from(config, student_config, WINDOWS), WINDOWS))
        for job in jobs
    ]
    return [[outcome for (outcome,) in window] for window in zip(*each, strict=True)]


def assert_same(found: Sequence[Sequence[Outcome]], expected: Sequence[Sequence[Outcome]]) -> None:
    for outcomes, others in zip(found, expected, strict=True):
        for one, other in zip(outcomes, others, strict=True):
            if isinstance(one, Figures) and isinstance(other, Figures):
                np.testing.assert_allclose(one, other, rtol=CLOSE)
            else:
                assert one is other is None


@pytest.fixture(scope="module")
def base(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Config:
    tune = {
        **SWEEP,
        "arms": ["labels", "labels+share", "kd+share+history"],
    }  # or the DAS would give no rows, and represent nothing
    return taught(groups, tmp_path_factory.mktemp("stack"), tune=tune)


@pytest.mark.parametrize(
    "arm", ["labels", "kd", "ah", "ah_sa", "labels+share", "ah_sa+share+history"]
)
def test_together_as_alone(
    base: Config,
    groups: dict[int, Workers],
    arm: str,
) -> None:
    """Wrong: a setting does not reach its model, one model's step touches another, or the
    stacked optimizers differ from the engines'."""
    (expected,) = groups[1].run(alone, base, "feed", arm, MEMBERS)
    (found,) = groups[1].run(together, base, "feed", arm, MEMBERS)
    assert_same(found, expected)
    last = [figures.ne for figures in expected[-1]]
    assert (
        min(abs(last[0] - last[1]), abs(last[1] - last[2])) > 100 * CLOSE
    )  # or the comparison says nothing


def test_a_trial_shares_the_tables_that_it_names(
    base: Config,
    groups: dict[int, Workers],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Wrong: a trial receives rows of tables that it does not share, because the DAS has
    published them for others."""
    only = taught(
        groups,
        tmp_path_factory.mktemp("only"),
        tune=base.tune,
        distillation={"share": {"tables": ["user"]}},
    )
    (((expected,), *_), ((found,), *_), ((others,), *_)) = (
        reversed(groups[1].run(alone, config, "feed", "labels+share", [settings])[0])
        for config, settings in (
            (only, {}),
            (base, {"distillation.share.tables": ("user",)}),
            (base, {}),
        )
    )
    assert found == expected != others


@pytest.mark.parametrize(
    "model",
    [
        {
            "type": "wukong",
            "dim": 8,
            "embeddings": {"ad": 3},
            "l": 2,
            "n_F": 4,
            "n_L": 4,
            "k": 4,
            "fmb_mlp": [8],
            "mlp": [8],
        },
        {"type": "din", "dim": 8},
        {"type": "dcnv2", "dim": 8},
    ],
)
def test_models_together_as_alone(
    base: Config,
    groups: dict[int, Workers],
    model: dict[str, Any],
) -> None:
    """Wrong: several embeddings of an id, sequences, attention or norms go wrong in a stack, or
    the momentum is not the id's."""
    config = with_settings(base, {"vm.model": model})
    (expected,) = groups[1].run(alone, config, "feed", "ah", MEMBERS[:2])
    (found,) = groups[1].run(together, config, "feed", "ah", MEMBERS[:2])
    assert_same(found, expected)


def test_a_diverged_model_stays_alone_with_it(base: Config, groups: dict[int, Workers]) -> None:
    """Wrong: one model's NaN reaches the others, ends them, or gets a score."""
    (found,) = groups[1].run(
        together, base, "feed", "labels", [MEMBERS[0], {"vm.optimizer.dense_lr": 1e30}, MEMBERS[2]]
    )
    (expected,) = groups[1].run(
        together, base, "feed", "labels", [MEMBERS[0], MEMBERS[1], MEMBERS[2]]
    )
    assert "diverged" in found[-1][1]
    assert_same(
        [[one, three] for one, _, three in found], [[one, three] for one, _, three in expected]
    )


def test_all_may_diverge(base: Config, groups: dict[int, Workers]) -> None:
    """Wrong: a stack without a good model ends in an error of its own, which hides the cause."""
    (found,) = groups[1].run(
        together, base, "feed", "labels", [{"vm.optimizer.dense_lr": 1e30}] * 2
    )
    assert all("diverged" in str(outcome) for outcome in found[-1])


def test_a_moved_model_goes_on_as_its_source(base: Config, groups: dict[int, Workers]) -> None:
    """Wrong: a replaced model keeps something of its own: weights, optimizer state, momentum,
    rates, figures, adapter, its failure."""
    diverging: Settings = {**MEMBERS[1], "vm.optimizer.dense_lr": 1e30}
    (found,) = groups[1].run(
        together,
        base,
        "feed",
        "ah_sa",
        [MEMBERS[0], diverging, MEMBERS[2]],
        [(2, 2, 0, MEMBERS[2]), (2, 2, 1, MEMBERS[0])],
    )
    assert isinstance(found[2][1], str)
    source, twin, other = (found[3][number] for number in (2, 0, 1))
    assert_same([[twin]], [[source]])
    assert abs(other.ne - source.ne) > 10 * CLOSE  # the same model under other settings


def test_what_cannot_learn_together(base: Config) -> None:
    """Wrong: settings that apply to all are taken from one model, and those of the others are
    ignored silently."""
    student = base.vm.models[0]

    def jobs(*settings: dict[str, Any]) -> list[Job]:
        return [trial_job(base, student, "ah", one, 1) for one in settings]

    check_alike(jobs(MEMBERS[0], MEMBERS[1]))
    with pytest.raises(UserError, match=r"differ in their seeds and in .*ah\.beta"):
        check_alike(jobs({}, {"distillation.ah.mlp": (4,)}))
    with pytest.raises(UserError, match=r"'vm\.optimizer\.ema'.*tune\.trials_per_process=1"):
        check_alike(jobs({"vm.optimizer.ema": 0.9}))
    config = with_settings(
        base, {"vm.model": {"type": "mlp", "dropout": 0.1}}
    )  # one draw for all models
    with pytest.raises(UserError, match=r"dropout"):
        check_alike([trial_job(config, config.vm.models[0], "labels", {}, 1)])


def stacks_left(config: Config) -> int:
    """How many stacks' tables are alive after a training has ended."""
    import gc

    from exfm_ray.engine.stacked import StackedTables

    together(config, "feed", "labels", MEMBERS[:2])
    gc.collect()
    return sum(isinstance(found, StackedTables) for found in gc.get_objects())


def test_a_stack_ends_with_its_training(base: Config, groups: dict[int, Workers]) -> None:
    """Wrong: each trial group of a sweep leaves its tables in the process, until the machine has
    no memory left."""
    assert groups[1].run(stacks_left, base) == [0]
