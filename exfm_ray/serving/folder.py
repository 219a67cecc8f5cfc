"""A served folder: whole or absent, hashed, described by the manifest.

<folder>/model.pt2            torch.export program, weights inside
<folder>/model.onnx           ONNX model; its tables are those of the next file
<folder>/tables.safetensors   every table by name, float32 (rows, embeddings times E)
<folder>/schema.json          how raw values become inputs
<folder>/history.safetensors  of an arm with +history: what it reads of each user (`models.past`)
<folder>/manifest.json        student, inputs, hashes of the files, what was checked
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
    """An input or the output: sizes are numbers, or the letter of an axis whose size a call
    chooses."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class ExportManifest(FrozenModel):
    """The manifest. `student`: VM, arm, windows learnt and seed; `checked`: rows compared, and file
    to largest difference."""

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
    """Yield an empty folder beside `folder`; it takes that name when the block ends without an
    error and is removed otherwise.

    Raises:
        UserError: something is there already, or nothing can be made there.
    """
    if folder.exists():
        raise UserError(f"{folder}: is in the way; remove it or choose another folder")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made there ({error.strerror}); choose another folder"
        ) from None
    try:
        yield temporary
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tables(folder: Path, tables: Mapping[str, Tensor]) -> None:
    """Write tables.safetensors: equal tables, equal bytes."""
    save_file({name: table.contiguous() for name, table in tables.items()}, folder / TABLES)


def read_tables(folder: Path, manifest: ExportManifest) -> dict[str, Tensor]:
    """The tables of a served folder; UserError where the file is not the manifest's."""
    check_file(folder, TABLES, manifest.files)
    tables: dict[str, Tensor] = load_file(folder / TABLES)
    return tables


def read_past(folder: Path, manifest: ExportManifest) -> UserFeatures | None:
    """The feature store of a served folder, where its arm has one; UserError where the file is not
    the manifest's."""
    if HISTORY not in manifest.files:
        return None
    check_file(folder, HISTORY, manifest.files)
    return UserFeatures.read(folder)


def check_file(
    folder: Path,
    name: str,
    files: Mapping[str, str],
) -> None:
    """UserError where a file is missing or has another hash than the manifest says."""
    if not (folder / name).is_file() or sha256(folder / name) != files.get(name):
        raise UserError(
            f"{folder / name}: missing or not the file that {MANIFEST} describes; this folder is damaged"
        )


def hashes(folder: Path) -> dict[str, str]:
    """Name to hash of what lies in a folder."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def write_manifest(folder: Path, manifest: FrozenModel) -> None:
    """Write the manifest."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def read_served(folder: Path) -> ExportManifest:
    """The manifest of a served folder; UserError where there is none or it is no such manifest."""
    return read_manifest(folder / MANIFEST, ExportManifest, "the manifest of a served student")
