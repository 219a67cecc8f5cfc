"""A teacher whose tables lie in several processes predicts the same as one process, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from example import SCHEMA, make_rows
from publish_snapshots import MODEL, publish
from ray.exceptions import GetTimeoutError
from specs import make_place, make_spec, undisturbed, written

from exfm_ray.config.models import DINConfig, ModelConfig, WukongConfig
from exfm_ray.das import sharded_teacher as shards_module
from exfm_ray.das.client import label
from exfm_ray.das.sharded_teacher import ShardedModel, TableShard, row_range
from exfm_ray.data.batch import to_batch
from exfm_ray.models.serialization import load_model
from exfm_ray.stores.snapshots import SnapshotError

MODELS: list[ModelConfig] = [
    MODEL,
    DINConfig(dim=4, sequence_length=3, attention_mlp=(4,), mlp=(8,)),
    WukongConfig(
        dim=4, l=1, n_F=2, n_L=2, k=2, fmb_mlp=(8,), mlp=(8,), embeddings={"user": 2, "ad": 3}
    ),
]


class LocalShard:
    """A table shard in this process that answers like an actor."""

    def __init__(self, holder: TableShard) -> None:
        self.rows = self
        self._holder = holder

    def remote(self, version: int, row_X: np.ndarray) -> np.ndarray:
        return self._holder.rows(version, row_X)


@pytest.mark.parametrize("shards", [1, 2, 3, 200])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.type)
def test_the_same_predictions(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: ModelConfig,
    shards: int,
) -> None:
    """Wrong: a row comes from the wrong shard or position; more shards than rows fail; bags are
    summed in another order."""
    monkeypatch.setattr(ray, "get", lambda answers, timeout: answers)
    store = publish(tmp_path, 1, model=model)
    whole, _ = load_model(store.folder(1))
    network, manifest = store.load_dense(1, SCHEMA.digest)
    sharded = ShardedModel(
        network,
        manifest,
        1,
        [LocalShard(TableShard(store, shard, shards)) for shard in range(shards)],
    )
    batch = to_batch(make_rows(300, seed=5), SCHEMA)
    part = sharded.with_rows_of(batch)
    for piece in batch.split(70):
        assert torch.equal(part.score(piece), whole.score(piece))


@pytest.mark.parametrize(("rows", "shards"), [(10, 1), (10, 3), (2, 5), (7, 7)])
def test_row_ranges_cover_a_table_once(rows: int, shards: int) -> None:
    """Wrong: a row is in no shard, or in two."""
    assert [row for shard in range(shards) for row in row_range(rows, shard, shards)] == list(
        range(rows)
    )


def test_a_shard_loads_the_next_version(tmp_path: Path) -> None:
    """Wrong: after the next snapshot is loaded, the rows are still the last one's."""
    for version in (1, 2, 3):
        store = publish(tmp_path, version)
    holder = TableShard(store, 0, 1)
    for version in (1, 2, 3, 1):
        expected = load_model(store.folder(version))[0].tables.weight.detach().numpy()
        np.testing.assert_array_equal(holder.rows(version, np.array([0, 5])), expected[[0, 5]])


def test_a_restarted_shard_checks_what_it_loads(tmp_path: Path) -> None:
    """Wrong: Ray restarts a shard long after the hashes were checked, and it scores with tables
    that were damaged since."""
    store = publish(tmp_path, 1)
    (path,) = store.folder(1).glob("tables.*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    holder = TableShard(store, 0, 1)
    holder._restarted = True
    with pytest.raises(SnapshotError, match="missing or not the file"):
        holder.rows(1, np.array([0]))


def test_a_shard_that_does_not_answer_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a scorer waits forever for a shard that hangs, or restarts the one that answers."""
    store = publish(tmp_path, 1)
    network, manifest = store.load_dense(1, SCHEMA.digest)
    holders = [LocalShard(TableShard(store, shard, 2)) for shard in range(2)]
    killed = []

    def late(refs: list[object], timeout: float) -> None:
        assert timeout == shards_module.RPC_TIMEOUT_S
        raise GetTimeoutError

    monkeypatch.setattr(ray, "get", late)
    monkeypatch.setattr(
        LocalShard, "remote", lambda self, version, row_X: f"rows of {holders.index(self)}"
    )
    monkeypatch.setattr(ray, "wait", lambda refs, num_returns, timeout: (refs[:1], refs[1:]))
    monkeypatch.setattr(ray, "kill", lambda holder, no_restart: killed.append((holder, no_restart)))
    with pytest.raises(
        TimeoutError,
        match="1 of 2 table shards have not answered for 1800 s and were restarted",
    ):
        ShardedModel(network, manifest, 1, holders).with_rows_of(
            to_batch(make_rows(30, seed=5), SCHEMA)
        )
    assert killed == [(holders[1], False)]


def test_a_service_with_two_shards_writes_the_same(cluster: None, tmp_path: Path) -> None:
    """Wrong: a replica of several processes writes other supervision than one process that holds
    everything."""
    spec = make_spec(make_place(tmp_path), shards=2)
    label(spec, [1, 2], lambda window, rows: None, lambda: None)
    assert written(spec) == undisturbed(make_spec(tmp_path))
