"""Search spaces: draws lie within, conditions hold, values survive the conversion for Optuna."""

from __future__ import annotations

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exfm_ray.config.root import Config
from exfm_ray.config.tune import Distribution, default_space
from tuning.space import Space

CONDITIONAL = Space(
    {
        "distillation.sa.separate_head": Distribution(choice=(False, True)),
        "distillation.sa.mlp": Distribution(
            choice=((), (16,), (8, 4)), when={"distillation.sa.separate_head": True}
        ),
        "distillation.sa.lr": Distribution(
            low=1e-4, high=1e-2, log=True, when={"distillation.sa.mlp": (8, 4)}
        ),
        "vm.batch_size": Distribution(low=16, high=64, integer=True, log=True),
    }
)


def drawn(
    space: Space,
    seed: int,
    tpe: bool,
    trials: int = 12,
) -> list[dict[str, object]]:
    """Settings of some trials, scored by a number that depends on them, so that TPE has
    something to follow."""
    sampler = (
        optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
        if tpe
        else optuna.samplers.RandomSampler(seed=seed)
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler)
    drawn_settings = []
    for _ in range(trials):
        optuna_trial = study.ask()
        settings = space.suggest(optuna_trial)
        assert (
            space.params(settings) == optuna_trial.params
            and space.known(settings) == optuna_trial.distributions
        )
        drawn_settings.append(settings)
        study.tell(optuna_trial, float(len(str(settings))))
    return drawn_settings


@given(
    low=st.floats(1e-6, 1e3),
    factor=st.floats(1.01, 1e4),
    log=st.booleans(),
    seed=st.integers(0, 2**31),
    tpe=st.booleans(),
)
def test_ranges(
    low: float,
    factor: float,
    log: bool,
    seed: int,
    tpe: bool,
) -> None:
    """Wrong: a trial gets a value outside its range, or a fraction where a whole number is
    required."""
    space = Space(
        {
            "a": Distribution(low=low, high=low * factor, log=log),
            "b": Distribution(low=int(low) + 1, high=int(low * factor) + 2, integer=True, log=log),
        }
    )
    for settings in drawn(space, seed, tpe, 6):
        a = settings["a"]
        b = settings["b"]
        assert isinstance(a, float) and low <= a <= low * factor
        assert isinstance(b, int) and int(low) + 1 <= b <= int(low * factor) + 2


@pytest.mark.parametrize("tpe", [False, True], ids=["random", "tpe"])
@pytest.mark.parametrize("seed", range(3))
def test_conditions(tpe: bool, seed: int) -> None:
    """Wrong: a setting is drawn where its condition does not hold (the search learns from
    noise), or left out where it does."""
    drawn_settings = drawn(CONDITIONAL, seed, tpe, 40)
    for settings in drawn_settings:
        assert ("distillation.sa.mlp" in settings) == (
            settings["distillation.sa.separate_head"] is True
        )
        assert ("distillation.sa.lr" in settings) == (settings.get("distillation.sa.mlp") == (8, 4))
    assert {len(settings) for settings in drawn_settings} == {2, 3, 4}


@pytest.mark.parametrize(
    ("arm", "sections"),
    [("labels", set()), ("kd", {"kd"}), ("ah", {"ah"}), ("ah_sa", {"ah", "sa"})],
)
def test_default_space(arm: str, sections: set[str]) -> None:
    """Wrong: an arm searches settings that it does not read, or not the optimizer, or its trial
    0 is not the config."""
    config = Config.model_validate(
        {
            "tune": {"validation_windows": [1, 2], "holdout_windows": [3, 4]},
            "distillation": {"ah": {"mlp": [32], "beta": 3}, "sa": {"separate_head": False}},
        }
    )
    assert config.tune is not None
    space = Space(config.tune.space_of(arm))
    names = list(space.distributions)
    assert {name.split(".")[1] for name in names if name.startswith("distillation.")} == sections
    assert {"vm.optimizer.table_lr", "vm.optimizer.dense_lr"} < set(
        default_space()
    ) and "vm.optimizer.table_lr" in names
    current_params = space.current_params(config)
    assert (
        current_params is not None
        and list(current_params) == names
        and current_params["vm.optimizer.table_lr"] == 0.05
    )
    if sections == {"ah", "sa"}:
        assert (
            current_params["distillation.ah.mlp"],
            current_params["distillation.ah.beta"],
            current_params["distillation.sa.separate_head"],
        ) == ("[32]", 3, "false")


def test_a_config_outside_the_space_stands_for_nothing() -> None:
    """Wrong: trial 0 is called the config, but Optuna drew something else."""
    space = Space({"vm.optimizer.table_lr": Distribution(low=0.2, high=0.3)})
    assert space.current_params(Config()) is None
    assert Space({"distillation.kd.w": Distribution(choice=(1, 2))}).current_params(Config()) == {
        "distillation.kd.w": "1"
    }  # 1.0 in the config
