"""The served graph as files, and how each is run.

The files are a torch.export program, an ONNX model and a library compiled by AOTInductor. The ONNX
model's tables are in tables.safetensors beside it (ONNX external data is a file, an offset and a
length): new rows in that file are new rows in the model, and the 2 GB limit of an ONNX file does
not apply to them.
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
"""Runs a written model: inputs by name -> probabilities_BT."""


def check_tools(aot: bool) -> None:
    """Check that the packages of the extra `serving` are installed.

    Args:
        aot: check for the C++ compiler that AOTInductor needs, too.

    Raises:
        UserError: something is missing.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if not find_spec(package):
            raise UserError(
                f"package '{package}' is not installed; "
                "install the extra `serving`: pip install -e '.[serving]'"
            )
    compiler = os.environ.get("CXX", "g++")
    if aot and not shutil.which(compiler):
        raise UserError(
            f"--aot needs a C++ compiler, and there is no '{compiler}' on this machine; "
            "install one, set CXX or leave --aot out"
        )


def trace(graph: ServedGraph, example: Mapping[str, Tensor]) -> ExportedProgram:
    """Trace the graph as a program for any number of rows and of bag values.

    Args:
        graph: the graph.
        example: inputs by name, of at least two rows and two bag values: torch.export takes sizes
            0 and 1 for constants.
    """
    sizes = {"B": Dim("B"), "V": Dim("V")}
    dynamic_shapes = {}
    for name in example:
        axes = AXES[name].items()
        dynamic_shapes[name] = {axis: sizes[size] for axis, size in axes}
    return torch.export.export(graph, (), kwargs=dict(example), dynamic_shapes=dynamic_shapes)


def write_program(program: ExportedProgram, folder: Path) -> Predict:
    """Write the torch.export program, and return how to run the file."""
    path = folder / PROGRAM
    torch.export.save(program, path)
    module: Any = torch.export.load(path).module()
    return lambda inputs: module(**inputs)


def write_onnx(
    program: ExportedProgram,
    example: Mapping[str, Tensor],
    folder: Path,
) -> Predict:
    """Write the ONNX model to a folder that holds the tables already.

    Returns:
        How to run the file with ONNX Runtime.
    """
    import onnx_ir as ir

    onnx = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=list(example),
        output_names=[OUTPUT],
        dynamic_shapes={name: AXES[name] for name in example},
    )
    assert onnx is not None
    _remove_stack_traces(onnx)

    tables = folder / TABLES
    offset = _values_offset(tables)
    size = tables.stat().st_size - offset
    weight = onnx.model.graph.initializers["tables.weight"]
    assert weight.const_value.nbytes == size, "the stacked tables are the values of the file"
    weight.const_value = ir.ExternalTensor(
        TABLES,
        offset,
        size,
        weight.dtype,
        shape=weight.shape,
        name="tables.weight",
        base_dir=folder,
    )
    onnx.save(folder / ONNX)
    return _open_onnx(folder / ONNX)


def _remove_stack_traces(onnx: Any) -> None:
    """Remove metadata that names files of the machine that wrote the model."""
    for node in onnx.model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _values_offset(safetensors: Path) -> int:
    """Where the values begin in a safetensors file: length of the header, header, values."""
    with safetensors.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
    return 8 + int(header_bytes)


def onnx_session(path: Path) -> Any:
    """Open a model with ONNX Runtime, on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _open_onnx(path: Path) -> Predict:
    session = onnx_session(path)

    def predict(inputs: Mapping[str, Tensor]) -> Tensor:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        (probabilities_BT,) = session.run([OUTPUT], arrays)
        return torch.from_numpy(probabilities_BT)

    return predict


def write_compiled(program: ExportedProgram, folder: Path) -> Predict:
    """Write the program compiled by AOTInductor with its weights, and return how to run it."""
    path = str(folder / COMPILED)
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    compiled: Any = torch._inductor.aoti_load_package(path)
    return lambda inputs: compiled(**inputs)


@contextmanager
def silence_output() -> Iterator[None]:
    """Hide warnings of torch's exporters about other packages and about their own future."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
