"""The changes of a served student, and their application to the folder that was served before.

    python -m exfm_ray.serving.delta BASE DELTA TO

<folder>/delta.safetensors     per table with changes: `rows/<table>` int32 (X,),
                               `values/<table>` float32 (X, embeddings times E)
<folder>/history.safetensors   arms with +history: the users whose inputs changed, in the form of
                               the whole store
<folder>/model.onnx            the new graph and dense part; a few kB, because its tables are
                               beside it
<folder>/schema.json           the new normalization
<folder>/manifest.json         hash of the tables it starts from, manifest of the resulting folder

The resulting folder has no model.pt2, which would hold the tables once more. A full export has it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exfm_ray.base import FrozenModel
from exfm_ray.errors import UserError
from exfm_ray.models.user_features import HISTORY, UserFeatures
from exfm_ray.serving.folder import (
    MANIFEST,
    SCHEMA,
    ExportManifest,
    check_file,
    hashes,
    new_folder,
    read_served,
    read_tables,
    read_user_features,
    write_manifest,
    write_tables,
)
from exfm_ray.serving.program import ONNX, TABLES
from exfm_ray.storage.atomic import sha256
from exfm_ray.storage.manifest import read_manifest

DELTA = "delta.safetensors"


class Delta(FrozenModel):
    """The manifest of a delta.

    Attributes:
        since: hash of the tables to which the delta applies.
        since_history: hash of the feature store to which it applies.
        changed: table -> number of changed rows.
        changed_users: number of users whose features changed.
        target: manifest of the resulting folder.
        files: name of a file -> its SHA-256.
    """

    since: str
    since_history: str | None = None
    changed: dict[str, int]
    changed_users: int = 0
    target: ExportManifest
    files: dict[str, str]


def difference(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the rows of `new` whose bits differ from those of `old`.

    Args:
        old: table -> float32 (rows, width).
        new: table -> float32 (rows, width).

    Returns:
        `rows/<table>` -> row numbers in ascending order, `values/<table>` -> the rows.

    Raises:
        ValueError: the tables have different names or shapes.
    """
    old_shapes = {name: table.shape for name, table in old.items()}
    new_shapes = {name: table.shape for name, table in new.items()}
    if old_shapes != new_shapes:
        raise ValueError("the tables have other names or shapes")

    delta: dict[str, Tensor] = {}
    for name, table in new.items():
        # As integers: by value, -0 would equal 0, and NaN would equal nothing.
        differs = old[name].view(torch.int32) != table.view(torch.int32)
        changed_X = differs.any(dim=1).nonzero().squeeze(1)
        if len(changed_X):
            delta[f"rows/{name}"] = changed_X.to(torch.int32)
            delta[f"values/{name}"] = table[changed_X]
    return delta


def apply(tables: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply the rows of `difference`; the result equals the new tables bit for bit.

    Returns:
        New tables; `tables` stays unchanged.
    """
    result = {name: table.clone() for name, table in tables.items()}
    for key, rows_X in delta.items():
        kind, _, name = key.partition("/")
        if kind == "rows":
            values_XW = delta[f"values/{name}"]
            result[name][rows_X.long()] = values_XW
    return result


def check_same_student(
    base: Path,
    old: ExportManifest,
    new: ExportManifest,
) -> None:
    """Check that two served folders are exports of one student over one schema.

    Args:
        base: the folder of `old`.
        old: manifest of the folder served before.
        new: manifest of the folder to be served.

    Raises:
        UserError: they are not.
    """
    for key in ("vm", "arm"):
        if key not in old.student or key not in new.student:
            raise UserError(
                f"{base / MANIFEST}, or the manifest to go with it: its `student` has no '{key}'; "
                "make a full export of the student"
            )

    for what, before, now in (
        ("vertical model", old.student["vm"], new.student["vm"]),
        ("arm", old.student["arm"], new.student["arm"]),
        ("network", old.network, new.network),
        ("schema", old.schema_digest, new.schema_digest),
        ("tasks", old.tasks, new.tasks),
    ):
        if before != now:
            raise UserError(
                f"{base}: another {what} ({before}, now {now}); "
                "a delta needs two exports of one student: make a full export"
            )


def write_delta(
    folder: Path,
    base: Path,
    full: Path,
    target: ExportManifest,
) -> None:
    """Fill `folder` with the changes between the served folders `base` and `full`.

    Args:
        folder: where to write the delta.
        base: the folder served before.
        full: the full export.
        target: manifest of `full`.
    """
    old = read_served(base)
    check_same_student(base, old, target)

    old_tables = read_tables(base, old)
    new_tables = load_file(full / TABLES)
    delta = difference(old_tables, new_tables)
    _assert_equal_bits(apply(old_tables, delta), new_tables)
    save_file({key: tensor.contiguous() for key, tensor in delta.items()}, folder / DELTA)
    for name in (ONNX, SCHEMA):
        shutil.copyfile(full / name, folder / name)

    old_features = read_user_features(base, old)
    new_features = read_user_features(full, target)
    changed_users = _write_changed_users(folder, old_features, new_features)
    manifest = Delta(
        since=old.files[TABLES],
        since_history=old.files.get(HISTORY),
        changed=_changed_rows(delta),
        changed_users=changed_users,
        target=_without_program(target),
        files=hashes(folder),
    )
    write_manifest(folder, manifest)


def _assert_equal_bits(tables: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, table in expected.items():
        bits = table.view(torch.int32)
        assert torch.equal(tables[name].view(torch.int32), bits), name


def _changed_rows(delta: Mapping[str, Tensor]) -> dict[str, int]:
    """Table -> number of changed rows."""
    changed = {}
    for key, tensor in delta.items():
        kind, _, table = key.partition("/")
        if kind == "rows":
            changed[table] = len(tensor)
    return changed


def _write_changed_users(
    folder: Path,
    before: UserFeatures | None,
    after: UserFeatures | None,
) -> int:
    """Write the users whose features changed and return their number."""
    if not (before and after):
        return 0
    changed = after.changed_since(before)
    changed.write(folder)
    return len(changed.users_U)


def _without_program(target: ExportManifest) -> ExportManifest:
    """The manifest of a folder that results from a delta: a full export's without model.pt2."""
    names = [name for name in (ONNX, SCHEMA, TABLES, HISTORY) if name in target.files]
    files = {name: target.files[name] for name in names}
    differences = {}
    for name, largest in target.checked["largest_difference"].items():
        if name in files:
            differences[name] = largest
    checked = {**target.checked, "largest_difference": differences}
    return target.model_copy(update={"files": files, "checked": checked})


def apply_folder(
    base: Path,
    delta: Path,
    folder: Path,
) -> None:
    """Make the served folder that results from applying `delta` to `base`.

    Raises:
        UserError: one of the two is damaged, they do not belong together, or `folder` exists.
    """
    manifest = read_manifest(delta / MANIFEST, Delta, "the manifest of a delta")
    old = read_served(base)
    check_same_student(base, old, manifest.target)
    _check_starts_from(base, old, delta, manifest)

    old_features = read_user_features(base, old)
    history = [HISTORY] if old_features else []
    for name in (DELTA, ONNX, SCHEMA, *history):
        check_file(delta, name, manifest.files)

    with new_folder(folder) as new:
        tables = apply(read_tables(base, old), load_file(delta / DELTA))
        write_tables(new, tables)
        if old_features:
            changed_features = UserFeatures.read(delta)
            old_features.updated(changed_features).write(new)
        for name in (ONNX, SCHEMA):
            shutil.copyfile(delta / name, new / name)

        for name in (TABLES, *history):
            if sha256(new / name) != manifest.target.files.get(name):
                raise UserError(
                    f"{delta}: its rows applied to {base} do not give the {name} that its "
                    "manifest promises; make a full export"
                )
        write_manifest(new, manifest.target)


def _check_starts_from(
    base: Path,
    old: ExportManifest,
    delta: Path,
    manifest: Delta,
) -> None:
    """Check that a delta starts from the tables and the feature store of `base`."""
    tables_fit = old.files.get(TABLES) == manifest.since
    features_fit = old.files.get(HISTORY) == manifest.since_history
    if not (tables_fit and features_fit):
        raise UserError(
            f"{delta}: starts from other tables than those of {base}; "
            "apply the deltas in between first, or make a full export"
        )


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns 2 after a one-line message for a user's mistake."""
    try:
        if len(arguments) != 3:
            raise UserError("give three folders: BASE DELTA TO")
        base, delta, to = map(Path, arguments)
        apply_folder(base, delta, to)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    print(to)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
