"""A teacher whose tables lie in several processes: the predictions of one, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from example import SCHEMA, make_rows
from orders import make_order, make_place, undisturbed, written
from publish import MODEL, publish

from exfm_ray.das.client import label
from exfm_ray.das.shards import Holder, ShardedModel, share
from exfm_ray.data.batch import to_batch
from exfm_ray.model_config import DINConfig, ModelConfig, WukongConfig
from exfm_ray.models.stored import load_model

MODELS: list[ModelConfig] = [MODEL, DINConfig(dim=4, sequence_length=3, attention_mlp=(4,), mlp=(8,)),
    WukongConfig(dim=4, l=1, n_F=2, n_L=2, k=2, fmb_mlp=(8,), mlp=(8,), embeddings={"user": 2, "ad": 3})]  # fmt: skip


class Here:
    """A holder in this process, which answers like an actor."""

    def __init__(self, holder: Holder) -> None:
        self.rows = self
        self._holder = holder

    def remote(self, version: int, row_X: np.ndarray) -> np.ndarray:
        return self._holder.rows(version, row_X)


@pytest.mark.parametrize("shards", [1, 2, 3, 200])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.type)
def test_the_same_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: ModelConfig, shards: int) -> None:
    """Wrong: a row comes from the wrong holder or place; more holders than rows; bags are summed in another order."""
    monkeypatch.setattr(ray, "get", lambda answers: answers)
    store = publish(tmp_path, 1, model=model)
    whole, _ = load_model(store.folder(1))
    network, manifest = store.load_dense(1, SCHEMA.digest)
    sharded = ShardedModel(network, manifest, 1, [Here(Holder(store, shard, shards)) for shard in range(shards)])
    batch = to_batch(make_rows(300, seed=5), SCHEMA)
    part = sharded.with_rows_of(batch)
    for piece in batch.split(70):
        assert torch.equal(part.score(piece), whole.score(piece))


@pytest.mark.parametrize(("rows", "shards"), [(10, 1), (10, 3), (2, 5), (7, 7)])
def test_shares_cover_a_table_once(rows: int, shards: int) -> None:
    """Wrong: a row has no holder, or two."""
    assert [row for shard in range(shards) for row in share(rows, shard, shards)] == list(range(rows))


def test_a_holder_takes_up_the_next_version(tmp_path: Path) -> None:
    """Wrong: after a rollover the rows are still the last snapshot's."""
    for version in (1, 2, 3):
        store = publish(tmp_path, version)
    holder = Holder(store, 0, 1)
    for version in (1, 2, 3, 1):
        expected = load_model(store.folder(version))[0].tables.weight.detach().numpy()
        np.testing.assert_array_equal(holder.rows(version, np.array([0, 5])), expected[[0, 5]])


def test_a_service_with_two_holders_writes_the_same(cluster: None, tmp_path: Path) -> None:
    """Wrong: a replica of several processes writes other supervision than one process that holds everything."""
    order = make_order(make_place(tmp_path), shards=2)
    label(order, [1, 2], lambda window, rows: None, lambda: None)
    assert written(order) == undisturbed(make_order(tmp_path))
