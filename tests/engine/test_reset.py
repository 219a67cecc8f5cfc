"""Reset table rows equal new ones bit by bit, with momentum and average; other rows are kept."""

from __future__ import annotations

from typing import Any

import engine_steps as steps
import numpy as np
import pytest
from engine_steps import Case
from example import SCHEMA
from workers import Workers

from exfm_ray.config.models import MLPConfig
from exfm_ray.models.embeddings import initial_table

MODEL = MLPConfig(dim=4, mlp=(8,), embeddings={"ad": 2})
ROWS = {
    # On both workers: with two of them the shards of 101 rows begin at 0 and 51.
    "user": np.array([1, 7, 49, 50, 51, 52, 99, 100]),
    "ad": np.array([0, 3, 25, 26, 27]),
    "keywords": np.arange(18),
}


def reset(case: Case) -> list[dict[str, np.ndarray]]:
    """Return the state before and after the reset of ROWS, and the state evaluated afterwards."""
    group = steps.make_group(case)
    for rows in steps.global_batches(case):
        group.learn(rows)
    engine = group.trainers[0].engine
    before = steps.state(group)
    engine.reset_rows(ROWS)
    after = steps.state(group)
    with engine.ema_weights():
        return [before, after, steps.state(group)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resets_the_given_rows_and_no_others(
    groups: dict[int, Workers],
    world: int,
    sharding: str,
    ema: float,
) -> None:
    """Wrong: a shard resets rows of another one, or counts them from its own first row; a row keeps
    its old momentum, so it hardly learns for its new id; or its old average is evaluated and
    published."""
    trainer: dict[str, Any] = {"sharding": sharding, "optimizer": {"ema": ema}}
    for before, after, evaluated in groups[world].run(
        reset, Case(trainer=trainer, arm=None, model=MODEL, batches=(64,) * 17)
    ):
        assert before.keys() == after.keys()
        for name, array in before.items():
            kind, _, table = name.partition("/")
            expected = array.copy()
            if kind == "momentum" and table in ROWS:
                assert array[ROWS[table]].any(), "the test has no power"
                expected[ROWS[table]] = 0
            if kind == "tables" and table in ROWS:
                fresh = initial_table(table, *array.shape, steps.SEED).numpy()
                assert not np.array_equal(array[ROWS[table]], fresh[ROWS[table]])
                expected[ROWS[table]] = fresh[ROWS[table]]
                np.testing.assert_array_equal(
                    evaluated[name][ROWS[table]], fresh[ROWS[table]], err_msg=name
                )
                assert (evaluated[name] == after[name]).all() == (ema == 0), name
            np.testing.assert_array_equal(after[name], expected, err_msg=name)
    assert set(ROWS) < set(SCHEMA.tables)


def learn_again(case: Case) -> dict[str, np.ndarray]:
    """Return the state after learning, a reset, and learning again."""
    group = steps.make_group(case)
    for rows in steps.global_batches(case):
        group.learn(rows)
    group.trainers[0].engine.reset_rows(ROWS)
    for rows in steps.global_batches(case):
        group.learn(rows)
    return steps.state(group)


def test_learning_continues_after_a_reset(groups: dict[int, Workers]) -> None:
    """Wrong: the kernels have a copy of the rows or of their momentum that a reset does not reach,
    or workers reset differently."""
    case = Case(arm=None, model=MODEL, batches=(64, 33))
    one = groups[1].run(learn_again, case)[0]
    two = groups[2].run(learn_again, case)
    for name, expected in one.items():
        np.testing.assert_array_equal(two[0][name], two[1][name], err_msg=name)
        # float32 sums in another order, enlarged by Adam as in test_engine
        np.testing.assert_allclose(two[0][name], expected, rtol=1e-3, atol=2e-5, err_msg=name)
