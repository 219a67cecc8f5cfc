"""From a run's exported student to its served folder, or to a delta since an earlier one; checked
before anything appears."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from exfm_ray.config.arms import Arm
from exfm_ray.data.batch import Batch, to_batch
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError, nearest
from exfm_ray.models.serialization import MANIFEST as MODEL_MANIFEST
from exfm_ray.models.serialization import LocalModel, StoredModel, load_model
from exfm_ray.models.user_features import UserFeatures
from exfm_ray.serving.delta import check_same_student, write_delta
from exfm_ray.serving.folder import (
    SCHEMA,
    ExportManifest,
    TensorSpec,
    hashes,
    new_folder,
    read_served,
    write_manifest,
    write_tables,
)
from exfm_ray.serving.graph import ServedGraph, input_names, inputs_of
from exfm_ray.serving.input_schema import served_schema
from exfm_ray.serving.program import (
    AXES,
    COMPILED,
    ONNX,
    OUTPUT,
    PROGRAM,
    Predict,
    check_tools,
    silence_output,
    trace,
    write_compiled,
    write_onnx,
    write_program,
)
from exfm_ray.storage.atomic import write_json
from exfm_ray.storage.paths import store_root_of_run

CHECKED_ROWS = 300
TOLERANCE = 1e-5
"""Largest difference of a probability from the trained model's: float32 sums in another order stay
a hundred times below."""


def export_student(
    run: Path,
    vm: str,
    arm: str,
    to: Path | None = None,
    since: Path | None = None,
    aot: bool = False,
) -> Path:
    """Write the student `vm` of `arm`; the folder written.

    Args:
        run: the run's folder.
        to: where to; <run>/serving/<vm>-<arm>, with `-delta` where it is one, if None.
        since: a served folder of the same student: write only what changed.
        aot: compile with AOTInductor, too.

    Raises:
        UserError: no such student, a damaged one, a folder in the way, a written model that
            predicts otherwise than the trained one.
    """
    source = find_student(run, vm, arm)
    folder = to or run / "serving" / (f"{vm}-{arm}" + ("-delta" if since else ""))
    if since and aot:
        raise UserError(
            "--aot and --since do not go together: a delta holds no compiled program; leave one of them out"
        )
    check_tools(aot)
    model, stored = load_model(source)
    stream = EventStream.open(store_root_of_run(run) / "stream")
    if Arm(arm).uses_history and not stored.remembered:
        raise UserError(
            f"{source}: arm '{arm}' was stored without its feature store, by an earlier version; train it again under another --name"
        )
    if stream.schema.digest != stored.stream.digest:
        raise UserError(
            f"{source}: trained on another schema than {stream.root} has; export from the run that trained it"
        )
    past = UserFeatures.read(source) if stored.remembered else None
    rows = check_rows(stream, stored, past)
    if not since:
        with new_folder(folder) as new:
            write_served(new, run.name, model, stored, stream, past, rows, aot, program=True)
        return folder
    check_same_student(since, read_served(since), _described(run.name, stored, {}, {}))
    with (
        new_folder(folder) as new,
        tempfile.TemporaryDirectory(dir=new.parent, prefix=".full.") as full,
    ):
        target = write_served(
            Path(full), run.name, model, stored, stream, past, rows, aot=False, program=False
        )
        write_delta(new, since, Path(full), target)
    return folder


def find_student(
    run: Path,
    vm: str,
    arm: str,
) -> Path:
    """The folder of an exported student; UserError that names those there are."""
    found = [
        path.parent.name.rpartition("-")
        for path in sorted((run / "exported").glob(f"*/{MODEL_MANIFEST}"))
    ]
    if not found:
        raise UserError(
            f"{run}: no exported vertical model there; give the folder of a run whose VMs were trained (run.py train-vm or pipeline)"
        )
    arms: dict[str, list[str]] = {}
    for name, _, its in found:
        arms.setdefault(name, []).append(its)
    if vm not in arms:
        raise UserError(
            f"{run}: no vertical model '{vm}': there are {', '.join(arms)}.{nearest(vm, arms)}"
        )
    if arm not in arms[vm]:
        raise UserError(
            f"{run}: '{vm}' has no arm '{arm}': there are {', '.join(arms[vm])}.{nearest(arm, arms[vm])}"
        )
    return run / "exported" / f"{vm}-{arm}"


def check_rows(
    stream: EventStream,
    stored: StoredModel,
    past: UserFeatures | None,
) -> Batch:
    """The first rows of the last window that has some, with their history; UserError for a stream
    without events."""
    for window in reversed(stream.windows()):
        for fragment in stream.window(window).fragments:
            if fragment.rows > 1:
                rows = to_batch(stream.read(window, fragment).slice(0, CHECKED_ROWS), stream.schema)
                return remembered(rows, stored, past) if past else rows
    raise UserError(f"{stream.root}: no events to check the written model with")


def remembered(
    rows: Batch,
    stored: StoredModel,
    past: UserFeatures,
) -> Batch:
    """Rows with what their users' history holds behind their dense features."""
    column = [feature.name for feature in stored.example.single].index(
        stored.facts["history"]["key"]
    )
    return replace(
        rows, dense_BD=torch.cat([rows.dense_BD, past.of(rows.sparse_BS[:, column])], dim=1)
    )


def write_served(
    folder: Path,
    run: str,
    model: LocalModel,
    stored: StoredModel,
    stream: EventStream,
    past: UserFeatures | None,
    rows: Batch,
    aot: bool,
    program: bool,
) -> ExportManifest:
    """Fill `folder` with the student and its manifest.

    Args:
        past: the feature store of an arm with +history.
        rows: what the written models are checked with.
        program: with the torch.export program; `aot`: with the compiled one.
    """
    write_tables(folder, model.tables.tables())
    write_json(folder / SCHEMA, served_schema(stored.stream, stream, stored.facts.get("history")))
    if past:
        past.write(folder)
    # Traced with values in every bag: torch.export takes a size of 0 or 1 for a constant.
    example = inputs_of(stored.example, _full_bags(rows))
    with silence_output():
        traced = trace(ServedGraph.from_model(model, stored), example)
        written: dict[str, Predict] = {PROGRAM: write_program(traced, folder)} if program else {}
        written[ONNX] = write_onnx(traced, example, folder)
        if aot:
            written[COMPILED] = write_compiled(traced, folder)
    checked = {
        "rows": len(rows),
        "largest_difference": compare(model, stored, written, check_batches(rows)),
    }
    manifest = _described(run, stored, checked, hashes(folder))
    write_manifest(folder, manifest)
    return manifest


def _full_bags(rows: Batch) -> Batch:
    """Two rows with two values, all of them the missing one, in each bag."""
    two = replace(rows, sparse_BS=rows.sparse_BS[:2], dense_BD=rows.dense_BD[:2])
    M = len(rows.bag_lengths_MB)
    return replace(
        two,
        bag_lengths_MB=torch.full((M, 2), 2),
        bag_values_V=torch.zeros(4 * M, dtype=torch.int64),
    )


def check_batches(rows: Batch) -> list[Batch]:
    """The rows together, one alone, three, and three whose bags are all empty."""
    three = next(rows.split(3))
    emptied = replace(
        three,
        bag_values_V=three.bag_values_V[:0],
        bag_lengths_MB=torch.zeros_like(three.bag_lengths_MB),
    )
    return [rows, next(rows.split(1)), three, emptied]


def compare(
    model: LocalModel,
    stored: StoredModel,
    written: Mapping[str, Predict],
    batches: Sequence[Batch],
) -> dict[str, float]:
    """File to the largest difference of its probabilities from the trained model's; UserError for
    more than TOLERANCE."""
    found = {}
    for name, predict in written.items():
        found[name] = 0.0
        for batch in batches:
            largest = float(
                (predict(inputs_of(stored.example, batch)) - model.score(batch)).abs().max()
            )
            if not largest <= TOLERANCE:  # NaN, too
                raise UserError(
                    f"{name}: its probabilities differ from the trained model's by up to {largest:.1e} in a batch of {len(batch)}, where "
                    f"{TOLERANCE:.0e} is allowed; nothing was written. Are the versions of torch, onnx and onnxruntime those of pyproject.toml?"
                )
            found[name] = max(found[name], largest)
    return found


def _described(
    run: str,
    stored: StoredModel,
    checked: Mapping[str, object],
    files: dict[str, str],
) -> ExportManifest:
    """The manifest of a student."""
    schema = stored.example
    sizes = {
        "sparse_BS": len(schema.single),
        "dense_BD": len(schema.dense),
        "bag_values_V": 0,
        "bag_lengths_MB": len(schema.bags),
    }
    ports = []
    for name in input_names(schema):
        shape = tuple(
            AXES[name].get(axis, sizes[name]) for axis in range(1 if name == "bag_values_V" else 2)
        )
        ports.append(
            TensorSpec(name=name, dtype="float32" if name == "dense_BD" else "int64", shape=shape)
        )
    return ExportManifest(
        run=run,
        student=stored.facts,
        network=stored.network,
        schema_digest=schema.digest,
        tasks=stored.tasks,
        inputs=tuple(ports),
        output=TensorSpec(name=OUTPUT, dtype="float32", shape=("B", len(stored.tasks))),
        checked=dict(checked),
        versions={package: version(package) for package in ("torch", "onnx", "onnxruntime")},
        files=files,
    )
