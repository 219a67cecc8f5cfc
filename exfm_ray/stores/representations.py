"""Representations of examples: what a module of a teacher's network puts out, projected to int8."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from exfm_ray.config.models import ModelConfig
from exfm_ray.data.batch import Batch
from exfm_ray.errors import UserError, nearest
from exfm_ray.models.layout import Layout
from exfm_ray.models.network import Network
from exfm_ray.models.serialization import LocalModel
from exfm_ray.schema import Schema
from exfm_ray.stores.feature_store import Array

LEVELS = 127
"""The largest code of a quantized number."""
BATCH_SIZE = 512
"""Examples whose representations are computed at once."""


def represent(
    model: LocalModel,
    rows: Batch,
    layer: str,
    dim: int,
    seed: int,
) -> Array:
    """Return the representations of some examples, float32 (N, dim).

    Args:
        model: the teacher.
        rows: the examples.
        layer: the module of the teacher's network whose output represents an example.
        dim: numbers that the output is projected to.
        seed: seed of the projection.
    """
    parts = [extract_features(model, batch, layer) for batch in rows.split(BATCH_SIZE)]
    x_NH = torch.cat(parts)
    matrix_HD = projection(x_NH.shape[1], dim, seed)
    value_ND: Array = (x_NH @ matrix_HD).numpy()
    return value_ND


def quantize(value_ND: Array) -> tuple[Array, Array]:
    """Return int8 codes (N, D) and a float32 scale for each row: value = scale * code.

    The error is at most half a scale.
    """
    tiny = np.float32(1e-12)  # a row of zeros needs a scale, too
    largest_N = np.abs(value_ND).max(axis=1)
    scale_N = np.maximum(largest_N, tiny) / np.float32(LEVELS)
    code_ND = np.rint(value_ND / scale_N[:, None])
    return code_ND.astype(np.int8), scale_N.astype(np.float32)


@lru_cache(maxsize=4)
def projection(
    width: int,
    dim: int,
    seed: int,
) -> Tensor:
    """Return a random matrix (H, D) whose entries have variance 1 / H.

    It keeps distances to within about 1 / sqrt(D) (Johnson and Lindenstrauss).
    """
    generator = torch.Generator()
    generator.manual_seed(1_000_033 * (seed + 1))
    normal_HD = torch.randn(width, dim, generator=generator)
    matrix_HD: Tensor = normal_HD / width**0.5
    return matrix_HD


@torch.inference_mode()
def extract_features(
    model: LocalModel,
    batch: Batch,
    layer: str,
) -> Tensor:
    """Return what a module of the model's network puts out, flattened: float32 (B, H)."""
    outputs: list[Tensor] = []
    module = model.network.get_submodule(layer)
    hook = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        model.score(batch)
    finally:
        hook.remove()
    return outputs[-1].float().flatten(1)


def check_layer(
    model: ModelConfig,
    schema: Schema,
    layer: str,
) -> None:
    """Check that a module of a network exists and puts out numbers for each example.

    The network is built and run without memory for its weights.

    Args:
        model: config of the network.
        schema: schema of the examples.
        layer: name of the module, the setting `distillation.history.layer`.

    Raises:
        UserError: there is no such module, or its output has no row per example.
    """
    with torch.device("meta"):
        network = Network(model, schema, tasks=1)
        names = [name for name, _ in network.named_modules() if name]
        if layer not in names:
            alternatives = nearest(layer, names) or f" There are {', '.join(names)}."
            raise UserError(
                "setting 'distillation.history.layer': the FM's network has no module "
                f"'{layer}'.{alternatives}"
            )
        module = network.get_submodule(layer)
        layout = Layout.from_config(model, schema)
        examples = 3
        embeddings = torch.zeros(examples, layout.rows, model.dim)
        dense = torch.zeros(examples, len(schema.dense))
        output = _run_to(module, network, embeddings, dense)

    is_per_example = isinstance(output, Tensor) and output.ndim > 1 and len(output) == examples
    if not is_per_example:
        raise UserError(
            f"setting 'distillation.history.layer' is {layer}: this module of the FM's network "
            "puts out no numbers for each example; name one that does, such as backbone"
        )


def _run_to(module: nn.Module, network: Network, *inputs: Tensor) -> object:
    """Run a network and return what one of its modules put out last; None if it did not run."""
    outputs: list[object] = []
    hook = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    network(*inputs)
    hook.remove()
    return outputs[-1] if outputs else None
