"""Rows written into sharded tables: bit by bit on the worker that holds them, with their momentum
and moving average, and no other rows."""

from __future__ import annotations

from typing import Any

import engine_steps as steps
import numpy as np
import pytest
import torch
from engine_steps import Case
from example import SCHEMA
from workers import Workers

from exfm_ray.config.models import MLPConfig

MODEL = MLPConfig(dim=4, mlp=(8,), embeddings={"ad": 2})
IDS = {
    "user": [1, 7, 49, 50, 51, 52, 99, 100],
    "ad": [0, 3, 25, 26, 27],
    "keywords": list(range(18)),
    "hour": [],
}
WIDTHS = {"user": 4, "ad": 8, "keywords": 4, "hour": 4}


def new_rows() -> dict[str, np.ndarray]:
    """Return float32 rows for IDS."""
    rng = np.random.default_rng(5)
    return {
        name: rng.normal(size=(len(ids), WIDTHS[name])).astype(np.float32)
        for name, ids in IDS.items()
    }


def write_rows(
    case: Case,
    weight: float,
    momentum: bool,
) -> list[dict[str, np.ndarray]]:
    """Return the state before and after rows are written, and the state evaluated afterwards."""
    from exfm_ray.engine.tensor_store import RowUpdate

    group = steps.make_group(case)
    for rows in steps.global_batches(case):
        group.learn(rows)
    engine = group.trainers[0].engine
    before = steps.state(group)
    state = {
        name: torch.arange(len(ids), dtype=torch.float32) if momentum else None
        for name, ids in IDS.items()
    }
    engine.write_rows(
        {
            n: RowUpdate(np.array(IDS[n], np.int64), torch.from_numpy(r), state[n])
            for n, r in new_rows().items()
        },
        weight,
    )
    after = steps.state(group)
    with engine.ema_weights():
        return [before, after, steps.state(group)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("sharding", "ema", "weight", "momentum"),
    [
        ("row_wise", 0.0, 1.0, False),
        ("row_wise", 0.9, 0.25, True),
        ("table_wise", 0.9, 1.0, True),
        ("table_wise", 0.0, 0.25, False),
    ],
)
def test_writes_the_given_rows_and_no_others(
    groups: dict[int, Workers],
    world: int,
    sharding: str,
    ema: float,
    weight: float,
    momentum: bool,
) -> None:
    """Wrong: a shard writes rows of another one, or counts them from its own first row; momentum is
    lost or not written; or the rows' old average is evaluated."""
    trainer: dict[str, Any] = {"sharding": sharding, "optimizer": {"ema": ema}}
    case = Case(trainer=trainer, arm=None, model=MODEL, batches=(64,) * 9)
    for before, after, evaluated in groups[world].run(write_rows, case, weight, momentum):
        for name, array in before.items():
            kind, _, table = name.partition("/")
            expected = array.copy()
            if kind == "momentum" and table in IDS and momentum:
                expected[IDS[table]] = np.arange(len(IDS[table]))
            if kind == "tables" and table in IDS:
                old = array[IDS[table]].astype(np.float64)
                new = new_rows()[table]
                expected[IDS[table]] = new if weight == 1 else old + weight * (new - old)
                np.testing.assert_array_equal(
                    evaluated[name][IDS[table]], after[name][IDS[table]], err_msg=name
                )
            if weight == 1 or kind != "tables":
                np.testing.assert_array_equal(after[name], expected, err_msg=name)
            else:
                np.testing.assert_allclose(
                    after[name], expected, rtol=1e-6, atol=1e-7, err_msg=name
                )  # one rounding of float32
    assert set(IDS) < set(SCHEMA.tables)


def write_stacked(weight: float, momentum: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return weights and momentum of three models' stacked tables before and after writing rows."""
    from exfm_ray.engine.stacked import StackedTables
    from exfm_ray.engine.tensor_store import RowUpdate

    tables = StackedTables(SCHEMA, MODEL, [1, 2, 3], [0.1] * 3)
    tables.momentum_K += 0.5
    before = (tables.weight_XKE.numpy().copy(), tables.momentum_K.numpy().copy())
    state = {
        name: torch.arange(len(ids), dtype=torch.float32) if momentum else None
        for name, ids in IDS.items()
    }
    tables.write_rows(
        {
            n: RowUpdate(np.array(IDS[n], np.int64), torch.from_numpy(r), state[n])
            for n, r in new_rows().items()
        },
        weight,
    )
    return [before, (tables.weight_XKE.numpy(), tables.momentum_K.numpy())]


@pytest.mark.parametrize(("weight", "momentum"), [(1.0, False), (0.25, True)])
def test_rows_are_written_into_all_stacked_models(
    groups: dict[int, Workers],
    weight: float,
    momentum: bool,
) -> None:
    """Wrong: a model of a stack is left out, or rows of tables with several embeddings per id are
    misplaced."""
    (before, state), (after, state_after) = groups[1].run(write_stacked, weight, momentum)[0]
    expected = before.astype(np.float64)
    expected_state = state.copy()
    first = 0
    first_id = 0
    for name, rows in SCHEMA.tables.items():
        several = MODEL.embeddings.get(name, 1)
        for position, number in enumerate(IDS.get(name, [])):
            for embedding in range(several):
                place = first + number * several + embedding
                new = new_rows()[name][position, embedding * 4 :][:4]
                expected[place] += weight * (new - expected[place])
            if momentum:
                expected_state[first_id + number] = position
        first = first + rows * several
        first_id = first_id + rows
    np.testing.assert_allclose(after, expected, rtol=1e-6, atol=1e-7)  # one rounding of float32
    np.testing.assert_array_equal(state_after, expected_state)
    assert (after != before).any(axis=(0, 2)).all()
