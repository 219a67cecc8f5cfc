"""The served graph as files: a torch.export program, an ONNX model, a library compiled by
AOTInductor; and how each is run.

The ONNX model's tables lie in tables.safetensors beside it (ONNX external data is a file, an offset
and a length): new rows in that file are new rows in the model, and the 2 GB that an ONNX file may
have do not bound them.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from exfm_ray.errors import UserError
from exfm_ray.serving.graph import ServedGraph

PROGRAM = "model.pt2"
ONNX = "model.onnx"
COMPILED = "model.aot.pt2"
TABLES = "tables.safetensors"
OUTPUT = "probabilities_BT"
AXES = {
    "sparse_BS": {0: "B"},
    "dense_BD": {0: "B"},
    "bag_values_V": {0: "V"},
    "bag_lengths_MB": {1: "B"},
}
"""The axes of each input whose size a call chooses."""

Predict = Callable[[Mapping[str, Tensor]], Tensor]


def check_tools(aot: bool) -> None:
    """UserError where a package of the extra `serving` is not installed, or with `aot` no C++
    compiler, which AOTInductor needs."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if not find_spec(package):
            raise UserError(
                f"package '{package}' is not installed; install the extra `serving`: pip install -e '.[serving]'"
            )
    compiler = os.environ.get("CXX", "g++")
    if aot and not shutil.which(compiler):
        raise UserError(
            f"--aot needs a C++ compiler, and there is no '{compiler}' on this machine; install one, set CXX or leave --aot out"
        )


def trace(graph: ServedGraph, example: Mapping[str, Tensor]) -> ExportedProgram:
    """The graph as a program for any number of rows and of bag values.

    Args:
        example: inputs by name, of two rows and two bag values or more: torch.export takes sizes 0
            and 1 for constants.
    """
    dims = {"B": Dim("B"), "V": Dim("V")}
    axes = {name: {axis: dims[size] for axis, size in AXES[name].items()} for name in example}
    return torch.export.export(graph, (), kwargs=dict(example), dynamic_shapes=axes)


def write_program(program: ExportedProgram, folder: Path) -> Predict:
    """Write the torch.export program; what the file predicts."""
    torch.export.save(program, folder / PROGRAM)
    module: Any = torch.export.load(folder / PROGRAM).module()
    return lambda inputs: module(**inputs)


def write_onnx(
    program: ExportedProgram,
    example: Mapping[str, Tensor],
    folder: Path,
) -> Predict:
    """Write the ONNX model to a folder that holds the tables already; what ONNX Runtime predicts
    with it."""
    import onnx_ir as ir

    onnx = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=list(example),
        output_names=[OUTPUT],
        dynamic_shapes={n: AXES[n] for n in example},
    )
    assert onnx is not None
    for part in (
        *onnx.model.graph.all_nodes(),
        *(value for node in onnx.model.graph.all_nodes() for value in node.outputs),
    ):
        # Stack traces: they name files of the machine that wrote the model
        part.metadata_props.clear()
    weight = onnx.model.graph.initializers["tables.weight"]
    tables = folder / TABLES
    with tables.open("rb") as handle:
        begin = 8 + int(
            struct.unpack("<Q", handle.read(8))[0]
        )  # safetensors: length of the header, header, values
    size = tables.stat().st_size - begin
    assert weight.const_value.nbytes == size, "the stacked tables are the values of the file"
    weight.const_value = ir.ExternalTensor(
        TABLES, begin, size, weight.dtype, shape=weight.shape, name="tables.weight", base_dir=folder
    )
    onnx.save(folder / ONNX)
    return _open_onnx(folder / ONNX)


def onnx_session(path: Path) -> Any:
    """ONNX Runtime with a model, on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _open_onnx(path: Path) -> Predict:
    session = onnx_session(path)

    def predict(inputs: Mapping[str, Tensor]) -> Tensor:
        (found,) = session.run([OUTPUT], {name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(found)

    return predict


def write_compiled(program: ExportedProgram, folder: Path) -> Predict:
    """Write the program compiled by AOTInductor, weights inside; what the compiled library
    predicts."""
    path = str(folder / COMPILED)
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    compiled: Any = torch._inductor.aoti_load_package(path)
    return lambda inputs: compiled(**inputs)


@contextmanager
def silence_output() -> Iterator[None]:
    """Keep what torch's exporters say of other packages and of their own future off the screen."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
