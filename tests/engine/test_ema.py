"""The moving average of weights equals its formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from exfm_ray.engine.ema import EMA, EVERY
from exfm_ray.engine.tensor_store import ShardedTensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_follows_its_formula(dtype: torch.dtype) -> None:
    """Wrong: the average forgets at another speed, or has the weights' coarse dtype."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(5, dtype=dtype)
    decay = 0.98
    average = EMA({"w@0": weight}, decay)
    expected = np.zeros(5)
    for step in range(1, 20 * EVERY + 1):
        weight.copy_(torch.randn(5, generator=generator))
        average.step()
        if step % EVERY == 0:
            old_part = min(decay**EVERY, 1 - EVERY / step)
            expected = old_part * expected + (1 - old_part) * weight.double().numpy()
    np.testing.assert_allclose(average.averages[0].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert average.averages[0].dtype == torch.float32


def test_replaces_the_weights_inside_the_block_only() -> None:
    """Wrong: evaluating with the average changes what is trained, or does so after an error."""
    weight = torch.ones(3)
    average = EMA({"w@0": weight}, 0.5)
    weight.fill_(2.0)
    with pytest.raises(RuntimeError, match="midway"), average.applied():
        assert weight.tolist() == [1.0] * 3
        raise RuntimeError("midway")
    assert weight.tolist() == [2.0] * 3 and average.averages[0].tolist() == [1.0] * 3


def test_is_restored_from_a_checkpoint(tmp_path: Path) -> None:
    """Wrong: after a resume the average starts again."""
    weight = torch.ones(3)
    one = EMA({"w@0": weight}, 0.9)
    other = EMA({"w@0": weight}, 0.9)
    for _ in range(2 * EVERY + 3):
        weight.add_(1.0)
        one.step()
    save_file(one.state(), tmp_path / "average.safetensors")
    other.restore(ShardedTensors.open([tmp_path / "average.safetensors"]))
    for average in (one, other):
        for _ in range(EVERY):
            average.step()
    assert torch.equal(one.averages[0], other.averages[0]) and one.steps == other.steps
