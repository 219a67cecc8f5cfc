"""Figures of an evaluated window: one row for each model, arm, domain and task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from exfm_ray.config.arms import LABELS, Arm
from exfm_ray.errors import UserError
from exfm_ray.metrics.state import MetricState
from exfm_ray.schema import ALL_DOMAINS
from exfm_ray.stores.snapshot_policy import SnapshotPolicy

if TYPE_CHECKING:  # importing them loads the engine, which takes seconds
    from exfm_ray.training.group import BatchGroup, Predictions
    from exfm_ray.training.model_trainer import ModelName, ModelTrainer

Key = tuple[str, str, str, str]
"""Model, arm (`fm` for the FM), domain, task."""

FM_ARM = "fm"


def describe(key: Key) -> dict[str, str]:
    """A key as the columns of a row."""
    return dict(zip(("model", "arm", "domain", "task"), key, strict=True))


def supervising_version(
    key: Key,
    window: int,
    policy: SnapshotPolicy,
) -> int | None:
    """Version of the newest snapshot that a model knows when `window` is evaluated.

    It is the one that supervised the window before. An arm with +share already has the rows of the
    snapshot that supervises `window` itself.

    Returns:
        None for a model without a teacher.
    """
    arm = key[1]
    if arm in (FM_ARM, LABELS):
        return None
    return policy.version(window if Arm(arm).shares_tables else window - 1)


def metric_states(
    group: BatchGroup,
    window: int,
    predictions: Predictions,
) -> Iterator[tuple[int, Key, MetricState]]:
    """The figures of a group on a window.

    A group over all domains also has figures for the domains together.

    Yields:
        The position of the trainer in the group, the key of the row, its metric state.
    """
    for position, trainer in enumerate(group.trainers):
        for model_name in trainer.model_names:
            for domain, selected_N in _domains(group, predictions):
                for key, state in _task_states(
                    group, trainer, model_name, window, predictions, domain, selected_N
                ):
                    yield position, key, state


def _task_states(
    group: BatchGroup,
    trainer: ModelTrainer,
    model_name: ModelName,
    window: int,
    predictions: Predictions,
    domain: str,
    selected_N: np.ndarray | slice,
) -> Iterator[tuple[Key, MetricState]]:
    """The figures of one model on the selected rows, task by task."""
    logits_NT = predictions.logits[model_name.name][selected_N]
    labels_NT = predictions.labels_NT[selected_N]
    group_N = predictions.group_N[selected_N] if group.schema.group_by else None
    arm = str(trainer.arm or FM_ARM)

    for column, task in enumerate(trainer.tasks):
        task_name = group.schema.tasks[task]
        try:
            state = MetricState.from_logits(logits_NT[:, column], labels_NT[:, task], group_N)
        except ValueError as error:
            raise UserError(
                f"window {window}, evaluation of '{model_name.name}' on {domain}, "
                f"{task_name}: {error}"
            ) from None
        yield (model_name.model, arm, domain, task_name), state


def _domains(
    group: BatchGroup,
    predictions: Predictions,
) -> Iterator[tuple[str, np.ndarray | slice]]:
    """Names of the domains in a window, each with a selection of its rows."""
    if group.domain is not None:
        yield group.schema.domains[group.domain], slice(None)
        return
    yield ALL_DOMAINS, slice(None)
    if len(group.schema.domains) > 1:
        for index in np.unique(predictions.domain_N):
            yield group.schema.domains[index], predictions.domain_N == index
