"""A search space as Optuna takes it: a define-by-run function, and the distributions behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from exfm_ray.config.root import Config
from exfm_ray.config.tune import Distribution, Settings, Value, as_text

Params = dict[str, bool | int | float | str]
"""Setting -> value as Optuna knows it: choices as text, for it takes no lists."""


@dataclass(frozen=True)
class Space:
    """The settings that one arm searches, in the order in which they are asked."""

    distributions: Mapping[str, Distribution]

    def suggest(self, trial: optuna.Trial) -> Settings:
        """Ask `trial` for every setting whose condition holds."""
        settings: Settings = {}
        for name, distribution in self.distributions.items():
            if _asked(distribution, settings):
                settings[name] = _ask(trial, name, distribution)
        return settings

    def params(self, settings: Settings) -> Params:
        """Settings as Optuna knows them."""
        return {name: encoded(self.distributions[name], value) for name, value in settings.items()}

    def known(self, settings: Settings) -> dict[str, BaseDistribution]:
        """Optuna's distributions of these settings."""
        return {name: _distribution(self.distributions[name]) for name in settings}

    def current_params(self, config: Config) -> Params | None:
        """The config's own values of the settings, as far as their conditions hold; None where one
        lies outside the space."""
        values = _values(config)
        settings: Settings = {}
        for name, distribution in self.distributions.items():
            if _asked(distribution, settings):
                found = distribution.match(values[name])
                if found is None:
                    return None
                settings[name] = found
        return self.params(settings)


def _values(config: Config) -> dict[str, Value]:
    """Every setting that a space may name, with the config's value."""
    values = {
        f"distillation.{part}.{key}": value
        for part, section in config.distillation
        for key, value in section
    }
    values |= {f"vm.optimizer.{key}": value for key, value in config.vm.optimizer}
    return values | {"vm.batch_size": config.vm.batch_size}


def _asked(distribution: Distribution, settings: Settings) -> bool:
    """True when the conditions hold for the settings before it."""
    return all(
        other in settings and settings[other] == value for other, value in distribution.when.items()
    )


def _ask(
    trial: optuna.Trial,
    name: str,
    distribution: Distribution,
) -> Value:
    if distribution.choice:
        text = trial.suggest_categorical(name, [as_text(value) for value in distribution.choice])
        return decoded(distribution, text)
    low, high = distribution.ends()
    assert isinstance(low, int | float) and isinstance(high, int | float)
    if distribution.integer:
        return trial.suggest_int(name, int(low), int(high), log=distribution.log)
    return trial.suggest_float(name, low, high, log=distribution.log)


def encoded(distribution: Distribution, value: Value) -> bool | int | float | str:
    """A setting's value as Optuna and the results file hold it."""
    if distribution.choice:
        return as_text(value)
    assert isinstance(value, int | float)
    return value


def decoded(distribution: Distribution, value: bool | int | float | str) -> Value:
    """The setting's value behind an encoded one."""
    return (
        {as_text(choice): choice for choice in distribution.choice}[str(value)]
        if distribution.choice
        else value
    )


def _distribution(distribution: Distribution) -> BaseDistribution:
    if distribution.choice:
        return CategoricalDistribution([as_text(value) for value in distribution.choice])
    low, high = distribution.ends()
    assert isinstance(low, int | float) and isinstance(high, int | float)
    if distribution.integer:
        return IntDistribution(int(low), int(high), log=distribution.log)
    return FloatDistribution(low, high, log=distribution.log)
