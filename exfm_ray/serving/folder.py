"""A served folder: complete or absent, hashed, described by the manifest.

<folder>/model.pt2            torch.export program with its weights
<folder>/model.onnx           ONNX model; its tables are those of the next file
<folder>/tables.safetensors   every table by name, float32 (rows, embeddings times E)
<folder>/schema.json          how raw values become inputs
<folder>/history.safetensors  arms with +history: features of each user (`models.user_features`)
<folder>/manifest.json        student, inputs, hashes of the files, results of the check
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from exfm_ray.base import FrozenModel
from exfm_ray.config.models import ModelConfig
from exfm_ray.errors import UserError
from exfm_ray.models.user_features import HISTORY, UserFeatures
from exfm_ray.serving.program import TABLES
from exfm_ray.storage.atomic import sha256, write_json
from exfm_ray.storage.manifest import read_manifest

MANIFEST = "manifest.json"
SCHEMA = "schema.json"


class TensorSpec(FrozenModel):
    """An input or the output of the graph.

    Attributes:
        name: name of the tensor.
        dtype: `int64` or `float32`.
        shape: sizes as numbers, or the letter of an axis whose size a call chooses.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class ExportManifest(FrozenModel):
    """The manifest.

    Attributes:
        run: name of the run.
        student: VM, arm, windows learned and seed.
        network: settings of the interaction model.
        schema_digest: digest of the schema of the model's inputs.
        tasks: the tasks, in the order of the outputs.
        inputs: the inputs of the graph.
        output: the output of the graph.
        checked: number of rows compared, and file -> largest difference of a probability.
        versions: package -> version that wrote the files.
        files: name of a file -> its SHA-256.
    """

    run: str
    student: dict[str, Any]
    network: ModelConfig
    schema_digest: str
    tasks: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    checked: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` at the end of the block.

    If the block raises an error, the folder is removed.

    Raises:
        UserError: `folder` exists already, or it cannot be created.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; remove it or choose another folder")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be created ({error.strerror}); choose another folder"
        ) from None
    try:
        yield temporary
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tables(folder: Path, tables: Mapping[str, Tensor]) -> None:
    """Write tables.safetensors; equal tables give equal bytes."""
    contiguous = {name: table.contiguous() for name, table in tables.items()}
    save_file(contiguous, folder / TABLES)


def read_tables(folder: Path, manifest: ExportManifest) -> dict[str, Tensor]:
    """Read the tables of a served folder.

    Raises:
        UserError: the file is not the one that the manifest describes.
    """
    check_file(folder, TABLES, manifest.files)
    tables: dict[str, Tensor] = load_file(folder / TABLES)
    return tables


def read_user_features(folder: Path, manifest: ExportManifest) -> UserFeatures | None:
    """Read the feature store of a served folder; None if its arm has none.

    Raises:
        UserError: the file is not the one that the manifest describes.
    """
    if HISTORY not in manifest.files:
        return None
    check_file(folder, HISTORY, manifest.files)
    return UserFeatures.read(folder)


def check_file(
    folder: Path,
    name: str,
    files: Mapping[str, str],
) -> None:
    """Check a file against the hash in the manifest.

    Args:
        folder: the served folder.
        name: name of the file.
        files: name of a file -> hash, from the manifest.

    Raises:
        UserError: the file is missing or has another hash.
    """
    path = folder / name
    if not path.is_file() or sha256(path) != files.get(name):
        raise UserError(
            f"{path}: missing or not the file that {MANIFEST} describes; this folder is damaged"
        )


def hashes(folder: Path) -> dict[str, str]:
    """Hash the files of a folder: name -> SHA-256."""
    paths = sorted(folder.iterdir())
    return {path.name: sha256(path) for path in paths}


def write_manifest(folder: Path, manifest: FrozenModel) -> None:
    """Write the manifest of a served folder or of a delta."""
    content = manifest.model_dump(mode="json")
    write_json(folder / MANIFEST, content)


def read_served(folder: Path) -> ExportManifest:
    """Read the manifest of a served folder.

    Raises:
        UserError: there is no manifest, or it is the manifest of something else.
    """
    return read_manifest(folder / MANIFEST, ExportManifest, "the manifest of a served student")
