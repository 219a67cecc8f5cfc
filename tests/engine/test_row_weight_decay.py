"""L2 on the rows that a step uses equals a direct count."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import engine_steps as steps
import numpy as np
import pytest
import torch
from example import SCHEMA, make_rows
from workers import Workers

from exfm_ray.config.models import MLPConfig
from exfm_ray.data.stream import list_values
from exfm_ray.engine.row_weight_decay import RowCounts, RowDecay
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.layout import Layout


def test_repeats_count_rows_of_tables() -> None:
    """Wrong: equal ids of different tables count as one row, or an id of features that share a
    table counts as two."""
    sparse_NS = list_values(make_rows(50, seed=3)["sparse"], len(SCHEMA.single))
    tables = [f.table or f.name for f in SCHEMA.single]
    count = Counter(
        (table, int(i)) for row in sparse_NS for table, i in zip(tables, row, strict=True)
    )
    expected = [
        [count[table, int(i)] for table, i in zip(tables, row, strict=True)] for row in sparse_NS
    ]
    assert RowCounts(SCHEMA).count(sparse_NS).tolist() == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_adds_the_decay_once_for_each_row(workers: int) -> None:
    """Wrong: a row that many examples read decays more, or a bag's row or padding decays."""
    layout = Layout.from_config(MLPConfig(dim=4, embeddings={SCHEMA.single[0].name: 2}), SCHEMA)
    singles = sum(slot.width for slot in layout.single)
    rows_RE = torch.randn(layout.rows, 4, generator=torch.Generator().manual_seed(0))
    # Five examples that read the same rows, and one as padding.
    embedded_BRE = rows_RE.expand(6, -1, -1).clone().requires_grad_()
    repeats_BS = torch.full((6, len(SCHEMA.single)), 5)
    repeats_BS[5] = 0
    decayed_BRE = RowDecay(layout, 0.3, workers)(embedded_BRE, repeats_BS)
    assert torch.equal(decayed_BRE, embedded_BRE)
    decayed_BRE.sum().backward()
    added_RE = (embedded_BRE.grad - 1).sum(0)
    torch.testing.assert_close(
        added_RE[:singles], 0.3 * workers * rows_RE[:singles], rtol=1e-5, atol=1e-5
    )
    assert not added_RE[singles:].any() and torch.equal(
        embedded_BRE.grad[5], torch.ones(layout.rows, 4)
    )


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_with_decay_is_adagrad_on_the_decayed_gradient(
    groups: dict[int, Workers], world: int
) -> None:
    """Wrong: fbgemm's optimizer gets another gradient than g + weight_decay * row, or each worker
    adds the whole decay."""
    weight_decay = 0.5
    lr = 0.05
    case = steps.Case(trainer={"optimizer": {"table_lr": lr}}, arm=None, batches=(63,))
    plain = groups[1].run(steps.train, case)[0]
    trainer = {"optimizer": {"table_lr": lr, "table_weight_decay": weight_decay}}
    decayed = groups[world].run(steps.train, replace(case, trainer=trainer))[0]
    fresh = {
        name: table.numpy()
        for name, table in LocalTables(SCHEMA, case.model, steps.SEED).tables().items()
    }
    checked = 0
    for table in {f.table or f.name for f in SCHEMA.single} - {
        f.table or f.name for f in SCHEMA.bags
    }:
        before = fresh[table]
        step = plain[f"tables/{table}"] - fresh[table]
        momentum = plain[f"momentum/{table}"]
        touched = momentum > 0
        gradient = -step[touched] / lr * np.sqrt(momentum[touched])[:, None]
        full = gradient + weight_decay * before[touched]
        expected = before[touched] - lr * full / np.sqrt((full**2).mean(1, keepdims=True))
        np.testing.assert_allclose(
            decayed[f"tables/{table}"][touched], expected, rtol=2e-3, atol=2e-4
        )  # g comes back from float32 steps
        np.testing.assert_array_equal(decayed[f"tables/{table}"][~touched], before[~touched])
        checked += int(touched.sum())
    assert checked > 20
