"""TorchRec's sharded tables against the plain tables of one device."""

from __future__ import annotations

import numpy as np
import pytest
import steps
from example import SCHEMA, make_rows
from workers import Workers

from exfm_ray.data.batch import to_batch
from exfm_ray.model_config import MLPConfig
from exfm_ray.models.embeddings import PlainTables


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_sharded_tables_equal_plain_tables(groups: dict[int, Workers], world: int, sharding: str) -> None:
    """Wrong: what is trained and what is exported or scores with the same weights see different embeddings."""
    sizes = (1, 5, 64)
    plain = PlainTables(SCHEMA, MLPConfig(dim=4), seed=steps.SEED)
    for rank, found in enumerate(groups[world].run(steps.embed, sharding, sizes)):
        for size, embedded in zip(sizes, found, strict=True):
            expected = plain(to_batch(make_rows(size, seed=size + rank), SCHEMA)).detach().numpy()
            # sums of at most 5 float32 values of size 0.05, in another order
            np.testing.assert_allclose(embedded, expected, rtol=1e-5, atol=1e-7)
