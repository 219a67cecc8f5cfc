"""A search space for Optuna: a define-by-run function and the distributions behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
"""Setting -> value in Optuna's form: choices as text, because it takes no lists."""


@dataclass(frozen=True)
class Space:
    """The settings that one arm searches, in the order in which they are drawn."""

    distributions: Mapping[str, Distribution]

    def suggest(self, trial: optuna.Trial) -> Settings:
        """Draw every setting whose condition holds."""
        settings: Settings = {}
        for name, distribution in self.distributions.items():
            if _condition_holds(distribution, settings):
                settings[name] = _draw(trial, name, distribution)
        return settings

    def params(self, settings: Settings) -> Params:
        """Convert settings to Optuna's form."""
        return {name: encoded(self.distributions[name], value) for name, value in settings.items()}

    def known(self, settings: Settings) -> dict[str, BaseDistribution]:
        """Return Optuna's distributions of these settings."""
        return {name: _optuna_distribution(self.distributions[name]) for name in settings}

    def current_params(self, config: Config) -> Params | None:
        """Return the config's own values of the settings whose conditions hold.

        None where a value lies outside the space.
        """
        values = _searchable_values(config)
        settings: Settings = {}
        for name, distribution in self.distributions.items():
            if not _condition_holds(distribution, settings):
                continue
            match = distribution.match(values[name])
            if match is None:
                return None
            settings[name] = match
        return self.params(settings)


def as_settings(values: Mapping[str, Any]) -> Settings:
    """Convert settings that went through Tune or JSON back: lists become tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def encoded(distribution: Distribution, value: Value) -> bool | int | float | str:
    """Convert a setting's value to the form of Optuna and of the results file."""
    if distribution.choice:
        return as_text(value)
    assert isinstance(value, int | float)
    return value


def decoded(distribution: Distribution, value: bool | int | float | str) -> Value:
    """Convert an encoded value back to the setting's value."""
    if not distribution.choice:
        return value
    choices = {as_text(choice): choice for choice in distribution.choice}
    return choices[str(value)]


def _searchable_values(config: Config) -> dict[str, Value]:
    """Every setting that a space may name, with the config's value."""
    values: dict[str, Value] = {}
    for part, section in config.distillation:
        values |= {f"distillation.{part}.{key}": value for key, value in section}
    values |= {f"vm.optimizer.{key}": value for key, value in config.vm.optimizer}
    values["vm.batch_size"] = config.vm.batch_size
    return values


def _condition_holds(distribution: Distribution, settings: Settings) -> bool:
    """Whether the settings drawn before meet the distribution's condition."""
    return all(
        other in settings and settings[other] == value for other, value in distribution.when.items()
    )


def _draw(
    trial: optuna.Trial,
    name: str,
    distribution: Distribution,
) -> Value:
    if distribution.choice:
        texts = [as_text(value) for value in distribution.choice]
        return decoded(distribution, trial.suggest_categorical(name, texts))
    low, high = _range(distribution)
    if distribution.integer:
        return trial.suggest_int(name, int(low), int(high), log=distribution.log)
    return trial.suggest_float(name, low, high, log=distribution.log)


def _optuna_distribution(distribution: Distribution) -> BaseDistribution:
    if distribution.choice:
        return CategoricalDistribution([as_text(value) for value in distribution.choice])
    low, high = _range(distribution)
    if distribution.integer:
        return IntDistribution(int(low), int(high), log=distribution.log)
    return FloatDistribution(low, high, log=distribution.log)


def _range(distribution: Distribution) -> tuple[float, float]:
    low, high = distribution.ends()
    assert isinstance(low, int | float) and isinstance(high, int | float)
    return low, high
