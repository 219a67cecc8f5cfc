"""python -m exfm_ray.serving.delta BASE DELTA TO: what one more window changed in a served student,
put into the folder served before.

<folder>/delta.safetensors   per table with changes: `rows/<table>` int32 (X,), `values/<table>`
float32 (X, embeddings times E) <folder>/history.safetensors of an arm with +history: the users
whose inputs changed, in the form of the whole store
<folder>/model.onnx          the new graph and dense part whole; a few kB, for its tables lie beside it
<folder>/schema.json         the new normalisation
<folder>/manifest.json       hash of the tables it starts from, manifest of the folder that results

That folder has no model.pt2, which would hold the tables once more: a full export has it.
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
    read_past,
    read_served,
    read_tables,
    write_manifest,
    write_tables,
)
from exfm_ray.serving.program import ONNX, TABLES
from exfm_ray.storage.atomic import sha256
from exfm_ray.storage.manifest import read_manifest

DELTA = "delta.safetensors"


class Delta(FrozenModel):
    """The manifest. `since`: hash of the tables that the rows are put into; `since_history`: that
    of the feature store; `changed`: table to number of rows; `changed_users`: of the feature store;
    `target`: the result's."""

    since: str
    since_history: str | None = None
    changed: dict[str, int]
    changed_users: int = 0
    target: ExportManifest
    files: dict[str, str]


def difference(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of `new` whose bits are not those of `old`, with their numbers in ascending order.

    Args:
        old, new: table name to float32 (rows, width), of equal names and shapes; ValueError for
            others.
    """
    if {name: table.shape for name, table in old.items()} != {
        name: table.shape for name, table in new.items()
    }:
        raise ValueError("the tables have other names or shapes")
    found: dict[str, Tensor] = {}
    for name, table in new.items():
        # As integers: by value -0 would equal 0, and NaN nothing.
        changed_X = (
            (old[name].view(torch.int32) != table.view(torch.int32)).any(dim=1).nonzero().squeeze(1)
        )
        if len(changed_X):
            found |= {f"rows/{name}": changed_X.to(torch.int32), f"values/{name}": table[changed_X]}
    return found


def apply(tables: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tables with the rows of `difference` put in, bit for bit the new ones; what was given is left
    as it was."""
    result = {name: table.clone() for name, table in tables.items()}
    for key, rows_X in delta.items():
        kind, _, name = key.partition("/")
        if kind == "rows":
            result[name][rows_X.long()] = delta[f"values/{name}"]
    return result


def check_same_student(
    base: Path,
    old: ExportManifest,
    new: ExportManifest,
) -> None:
    """UserError where two served folders are not of one student over one schema."""
    for key in ("vm", "arm"):
        if not {key} <= old.student.keys() & new.student.keys():
            raise UserError(
                f"{base / MANIFEST}, or the manifest to go with it: its `student` has no '{key}'; export the student whole"
            )
    for said, before, now in (
        ("vertical model", old.student["vm"], new.student["vm"]),
        ("arm", old.student["arm"], new.student["arm"]),
        ("network", old.network, new.network),
        ("schema", old.schema_digest, new.schema_digest),
        ("tasks", old.tasks, new.tasks),
    ):
        if before != now:
            raise UserError(
                f"{base}: another {said} ({before}, now {now}); a delta needs two exports of one student: export it whole"
            )


def write_delta(
    folder: Path,
    base: Path,
    full: Path,
    target: ExportManifest,
) -> None:
    """Fill `folder` with what changed between the served folders `base` and `full`, whose manifest
    is `target`."""
    old = read_served(base)
    check_same_student(base, old, target)
    before = read_tables(base, old)
    after = load_file(full / TABLES)
    delta = difference(before, after)
    now = apply(before, delta)
    assert all(
        torch.equal(now[name].view(torch.int32), table.view(torch.int32))
        for name, table in after.items()
    )
    save_file({key: tensor.contiguous() for key, tensor in delta.items()}, folder / DELTA)
    for name in (ONNX, SCHEMA):
        shutil.copyfile(full / name, folder / name)
    changed = {
        key.partition("/")[2]: len(rows) for key, rows in delta.items() if key.startswith("rows/")
    }
    users = _write_users(folder, read_past(base, old), read_past(full, target))
    files = {
        name: target.files[name] for name in (ONNX, SCHEMA, TABLES, HISTORY) if name in target.files
    }
    result = target.model_copy(
        update={
            "files": files,
            "checked": {**target.checked, "largest_difference": _of(target, files)},
        }
    )
    since = {"since": old.files[TABLES], "since_history": old.files.get(HISTORY)}
    write_manifest(
        folder,
        Delta(**since, changed=changed, changed_users=users, target=result, files=hashes(folder)),
    )


def _write_users(
    folder: Path,
    before: UserFeatures | None,
    after: UserFeatures | None,
) -> int:
    """Write the users whose history has changed; how many they are."""
    if not (before and after):
        return 0
    changed = after.changed_since(before)
    changed.write(folder)
    return len(changed.users_U)


def _of(target: ExportManifest, files: Mapping[str, str]) -> dict[str, float]:
    return {
        name: largest
        for name, largest in target.checked["largest_difference"].items()
        if name in files
    }


def apply_folder(
    base: Path,
    delta: Path,
    folder: Path,
) -> None:
    """Make the served folder that `delta` leads to from `base`.

    Raises:
        UserError: one of the two is damaged or they do not belong together, or `folder` is in the
            way.
    """
    manifest = read_manifest(delta / MANIFEST, Delta, "the manifest of a delta")
    old = read_served(base)
    check_same_student(base, old, manifest.target)
    if (old.files.get(TABLES), old.files.get(HISTORY)) != (manifest.since, manifest.since_history):
        raise UserError(
            f"{delta}: starts from other tables than those of {base}; apply the deltas in between first, or take a full export"
        )
    past = read_past(base, old)
    for name in (DELTA, ONNX, SCHEMA, *([HISTORY] if past else [])):
        check_file(delta, name, manifest.files)
    with new_folder(folder) as new:
        write_tables(new, apply(read_tables(base, old), load_file(delta / DELTA)))
        if past:
            past.updated(UserFeatures.read(delta)).write(new)
        for name in (ONNX, SCHEMA):
            shutil.copyfile(delta / name, new / name)
        for name in (TABLES, *([HISTORY] if past else [])):
            if sha256(new / name) != manifest.target.files.get(name):
                raise UserError(
                    f"{delta}: the rows put into {base} do not give the {name} that its manifest promises; take a full export"
                )
        write_manifest(new, manifest.target)


def main(arguments: Sequence[str]) -> int:
    """The command line; 2 for a mistake, told in one line."""
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
