"""TorchRec's sharded tables equal the local tables of one device."""

from __future__ import annotations

import engine_steps as steps
import numpy as np
import pytest
from example import SCHEMA, make_rows
from workers import Workers

from exfm_ray.config.models import DINConfig, MLPConfig, ModelConfig
from exfm_ray.config.trainer import OptimizerConfig
from exfm_ray.data.batch import to_batch
from exfm_ray.engine.tables import ADAGRAD_EPS
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.layout import Layout

MODELS: dict[str, ModelConfig] = {
    "plain": MLPConfig(dim=4),
    "embeddings": MLPConfig(dim=4, embeddings={"user": 2, "ad": 3, "keywords": 2}),
    "unpooled": DINConfig(dim=4, sequence_length=3),
    "both": DINConfig(dim=4, sequence_length=3, embeddings={"ad": 2}),
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_sharded_tables_equal_plain_tables(
    groups: dict[int, Workers],
    world: int,
    sharding: str,
    model: ModelConfig,
) -> None:
    """Wrong: the training and an exported model or a scorer with the same weights see different
    embeddings, or a gradient changes another row."""
    sizes = (1, 5, 64)
    plain = LocalTables(SCHEMA, model, seed=steps.SEED)
    singles = sum(slot.width for slot in Layout.from_config(model, SCHEMA).single)
    results = groups[world].run(steps.embed, sharding, model, sizes)
    for rank, (batches, learned) in enumerate(results):
        for size, embedded in zip(sizes, batches, strict=True):
            expected = plain(to_batch(make_rows(size, seed=size + rank), SCHEMA)).detach().numpy()
            np.testing.assert_array_equal(
                embedded[:, :singles],
                expected[:, :singles],
                err_msg="a row differs from the stored one",
            )
            # sums of at most 5 float32 values of size 0.05, in another order
            np.testing.assert_allclose(embedded, expected, rtol=1e-5, atol=1e-7)
        for name, (weight, momentum) in after_a_step(model, world, sizes[-1]).items():
            # one step of float32, whose sums over a batch are in another order
            np.testing.assert_allclose(
                learned[f"tables/{name}"], weight, rtol=1e-4, atol=1e-6, err_msg=name
            )
            np.testing.assert_allclose(
                learned[f"momentum/{name}"], momentum, rtol=1e-4, atol=1e-9, err_msg=name
            )


def after_a_step(
    model: ModelConfig,
    world: int,
    size: int,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return local tables and momentum after a step of row-wise Adagrad on the workers' mean
    loss."""
    plain = LocalTables(SCHEMA, model, seed=None)
    fresh = LocalTables(SCHEMA, model, seed=steps.SEED)
    for rank in range(world):
        (
            steps.some_loss(fresh(to_batch(make_rows(size, seed=size + rank), SCHEMA))) / world
        ).backward()
    assert fresh.weight.grad is not None
    plain.weight.data.copy_(fresh.weight.grad)
    tables = {}
    for name, gradient in plain.tables().items():
        momentum = gradient.square().mean(dim=1)  # of all embeddings of an id together
        step = OptimizerConfig().table_lr * gradient / (momentum.sqrt() + ADAGRAD_EPS)[:, None]
        tables[name] = ((fresh.tables()[name] - step).numpy(), momentum.numpy())
    return tables
