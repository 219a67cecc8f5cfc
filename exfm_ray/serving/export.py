"""From a run's exported student to its served folder, or to a delta since an earlier one.

Everything is checked before the folder appears.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Self

import torch

from exfm_ray.config.arms import Arm
from exfm_ray.data.batch import Batch, to_batch
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError, nearest
from exfm_ray.models.serialization import MANIFEST as MODEL_MANIFEST
from exfm_ray.models.serialization import LocalModel, StoredModel, load_model
from exfm_ray.models.user_features import UserFeatures
from exfm_ray.schema import Schema
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
"""Largest difference of a probability from the trained model's. Float32 sums in another order stay
a hundred times below."""


def export_student(
    run: Path,
    vm: str,
    arm: str,
    to: Path | None = None,
    since: Path | None = None,
    aot: bool = False,
) -> Path:
    """Write the student `vm` of `arm` and return the folder.

    Args:
        run: the run's folder.
        vm: name of the vertical model.
        arm: its arm.
        to: the folder to write; None for <run>/serving/<vm>-<arm>, or that name with `-delta`.
        since: a served folder of the same student: write only the changes.
        aot: compile with AOTInductor, too.

    Raises:
        UserError: there is no such student, it is damaged, the folder exists, or a written model
            predicts otherwise than the trained one.
    """
    source = find_student(run, vm, arm)
    suffix = "-delta" if since else ""
    folder = to or run / "serving" / f"{vm}-{arm}{suffix}"
    if since and aot:
        raise UserError(
            "--aot and --since do not go together: a delta holds no compiled program; "
            "leave one of them out"
        )
    check_tools(aot)

    export = _Export.open(run, source, arm)
    if since is None:
        with new_folder(folder) as new:
            export.write(new, aot, program=True)
        return folder

    expected = _manifest(run.name, export.stored, {}, {})
    check_same_student(since, read_served(since), expected)
    with (
        new_folder(folder) as new,
        tempfile.TemporaryDirectory(dir=new.parent, prefix=".full.") as full,
    ):
        target = export.write(Path(full), aot=False, program=False)
        write_delta(new, since, Path(full), target)
    return folder


def find_student(
    run: Path,
    vm: str,
    arm: str,
) -> Path:
    """Find the folder of an exported student.

    Raises:
        UserError: there is none; the message lists the students that exist.
    """
    arms: dict[str, list[str]] = {}
    for manifest in sorted((run / "exported").glob(f"*/{MODEL_MANIFEST}")):
        name, _, arm_of_name = manifest.parent.name.rpartition("-")
        arms.setdefault(name, []).append(arm_of_name)

    if not arms:
        raise UserError(
            f"{run}: it has no exported vertical model; give the folder of a run whose VMs were "
            "trained (run.py train-vm or pipeline)"
        )
    if vm not in arms:
        raise UserError(
            f"{run}: no vertical model '{vm}': there are {', '.join(arms)}.{nearest(vm, arms)}"
        )
    if arm not in arms[vm]:
        raise UserError(
            f"{run}: '{vm}' has no arm '{arm}': there are {', '.join(arms[vm])}."
            f"{nearest(arm, arms[vm])}"
        )
    return run / "exported" / f"{vm}-{arm}"


@dataclass(frozen=True)
class _Export:
    """A student that is being exported.

    Attributes:
        run: name of the run.
        model: the trained model.
        stored: its manifest.
        stream: the stream on which it was trained.
        user_features: feature store of an arm with +history.
        rows: rows with which the written models are checked.
    """

    run: str
    model: LocalModel
    stored: StoredModel
    stream: EventStream
    user_features: UserFeatures | None
    rows: Batch

    @classmethod
    def open(
        cls,
        run: Path,
        source: Path,
        arm: str,
    ) -> Self:
        """Load a student and the rows to check it with.

        Args:
            run: the run's folder.
            source: folder of the exported student.
            arm: its arm.

        Raises:
            UserError: the student is damaged, or it does not fit the stream.
        """
        model, stored = load_model(source)
        stream = EventStream.open(store_root_of_run(run) / "stream")
        if Arm(arm).uses_history and not stored.remembered:
            raise UserError(
                f"{source}: arm '{arm}' was stored without its feature store, by an earlier "
                "version; train it again under another --name"
            )
        if stream.schema.digest != stored.stream.digest:
            raise UserError(
                f"{source}: trained on another schema than {stream.root} has; "
                "export from the run that trained it"
            )

        user_features = UserFeatures.read(source) if stored.remembered else None
        rows = check_rows(stream, stored, user_features)
        return cls(run.name, model, stored, stream, user_features, rows)

    def write(
        self,
        folder: Path,
        aot: bool,
        program: bool,
    ) -> ExportManifest:
        """Fill `folder` with the student and its manifest.

        Args:
            folder: an empty folder.
            aot: write the compiled program, too.
            program: write the torch.export program, too.

        Raises:
            UserError: a written model predicts otherwise than the trained one.
        """
        write_tables(folder, self.model.tables.tables())
        history = self.stored.facts.get("history")
        schema = served_schema(self.stored.stream, self.stream, history)
        write_json(folder / SCHEMA, schema)
        if self.user_features:
            self.user_features.write(folder)

        predictors = self._write_programs(folder, aot, program)
        batches = check_batches(self.rows)
        differences = compare(self.model, self.stored, predictors, batches)
        checked = {"rows": len(self.rows), "largest_difference": differences}
        manifest = _manifest(self.run, self.stored, checked, hashes(folder))
        write_manifest(folder, manifest)
        return manifest

    def _write_programs(
        self,
        folder: Path,
        aot: bool,
        program: bool,
    ) -> dict[str, Predict]:
        """Write the graph in every requested form: name of the file -> how to run it."""
        # Traced with values in every bag: torch.export takes a size of 0 or 1 for a constant.
        example = inputs_of(self.stored.example, _full_bags(self.rows))
        predictors: dict[str, Predict] = {}
        with silence_output():
            traced = trace(ServedGraph.from_model(self.model, self.stored), example)
            if program:
                predictors[PROGRAM] = write_program(traced, folder)
            predictors[ONNX] = write_onnx(traced, example, folder)
            if aot:
                predictors[COMPILED] = write_compiled(traced, folder)
        return predictors


def check_rows(
    stream: EventStream,
    stored: StoredModel,
    user_features: UserFeatures | None,
) -> Batch:
    """Read the first rows of the last window that has some, with their user features.

    Raises:
        UserError: the stream has no events.
    """
    for window in reversed(stream.windows()):
        for fragment in stream.window(window).fragments:
            if fragment.rows > 1:
                table = stream.read(window, fragment).slice(0, CHECKED_ROWS)
                rows = to_batch(table, stream.schema)
                return with_user_features(rows, stored, user_features) if user_features else rows
    raise UserError(f"{stream.root}: no events to check the written model with")


def with_user_features(
    rows: Batch,
    stored: StoredModel,
    user_features: UserFeatures,
) -> Batch:
    """Append the features of each row's user to its dense features."""
    key = stored.facts["history"]["key"]
    names = [feature.name for feature in stored.example.single]
    users_B = rows.sparse_BS[:, names.index(key)]
    dense_BD = torch.cat([rows.dense_BD, user_features.of(users_B)], dim=1)
    return replace(rows, dense_BD=dense_BD)


def _full_bags(rows: Batch) -> Batch:
    """Two rows with two values in each bag, all of them the missing value."""
    bags = len(rows.bag_lengths_MB)
    return replace(
        rows,
        sparse_BS=rows.sparse_BS[:2],
        dense_BD=rows.dense_BD[:2],
        bag_lengths_MB=torch.full((bags, 2), 2),
        bag_values_V=torch.zeros(4 * bags, dtype=torch.int64),
    )


def check_batches(rows: Batch) -> list[Batch]:
    """The rows together, one alone, three, and three whose bags are all empty."""
    one = next(rows.split(1))
    three = next(rows.split(3))
    without_values = replace(
        three,
        bag_values_V=three.bag_values_V[:0],
        bag_lengths_MB=torch.zeros_like(three.bag_lengths_MB),
    )
    return [rows, one, three, without_values]


def compare(
    model: LocalModel,
    stored: StoredModel,
    predictors: Mapping[str, Predict],
    batches: Sequence[Batch],
) -> dict[str, float]:
    """Compare written models with the trained model.

    Args:
        model: the trained model.
        stored: its manifest.
        predictors: name of a file -> how to run it.
        batches: what to predict.

    Returns:
        Name of a file -> largest difference of its probabilities.

    Raises:
        UserError: a difference is above TOLERANCE.
    """
    differences = {}
    for name, predict in predictors.items():
        differences[name] = 0.0
        for batch in batches:
            written_BT = predict(inputs_of(stored.example, batch))
            trained_BT = model.score(batch)
            largest = float((written_BT - trained_BT).abs().max())
            if not largest <= TOLERANCE:  # NaN, too
                raise UserError(
                    f"{name}: its probabilities differ from the trained model's by up to "
                    f"{largest:.1e} in a batch of {len(batch)}, where {TOLERANCE:.0e} is allowed; "
                    "nothing was written. Are the versions of torch, onnx and onnxruntime those "
                    "of pyproject.toml?"
                )
            differences[name] = max(differences[name], largest)
    return differences


def _manifest(
    run: str,
    stored: StoredModel,
    checked: Mapping[str, object],
    files: dict[str, str],
) -> ExportManifest:
    packages = ("torch", "onnx", "onnxruntime")
    return ExportManifest(
        run=run,
        student=stored.facts,
        network=stored.network,
        schema_digest=stored.example.digest,
        tasks=stored.tasks,
        inputs=_input_specs(stored.example),
        output=TensorSpec(name=OUTPUT, dtype="float32", shape=("B", len(stored.tasks))),
        checked=dict(checked),
        versions={package: version(package) for package in packages},
        files=files,
    )


def _input_specs(schema: Schema) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of the graph's inputs."""
    shapes: dict[str, tuple[int | str, ...]] = {
        "sparse_BS": ("B", len(schema.single)),
        "dense_BD": ("B", len(schema.dense)),
        "bag_values_V": ("V",),
        "bag_lengths_MB": (len(schema.bags), "B"),
    }
    specs = []
    for name in input_names(schema):
        dtype = "float32" if name == "dense_BD" else "int64"
        specs.append(TensorSpec(name=name, dtype=dtype, shape=shapes[name]))
    return tuple(specs)
