"""What the teacher thought of a user's earlier examples: representations as int8, and a feature
store made of them.

    <store>/<teacher>/window=003/fragment=0000.parquet   example_id int64, scale float32, code
    int8[D]: value = scale * code
    <store>/<teacher>/window=003/after.safetensors       the feature store after the window: users int64 (U) ascending, count int64 (U),
                                                         total float32 (U, D), last float32 (U, L,
                                                         D), newest first
    <store>/<teacher>/window=003/manifest.json           written last
    <store>/<teacher>/projection.safetensors             float32 (H, D), drawn from the run's seed
    <store>/<teacher>/pinned/                            the first snapshot, where it represents all windows

An example of window t is given what the store held after window t - 1: nothing of its own window,
so never itself. A window is represented by the snapshot that supervises it, which has not learned
it, or by the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from exfm_ray.base import FrozenModel
from exfm_ray.config.distillation import HistoryConfig
from exfm_ray.config.root import Config
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import EventStream, Fragment, Window, list_values, window_name
from exfm_ray.errors import UserError, nearest
from exfm_ray.models.layout import Layout
from exfm_ray.models.network import Network
from exfm_ray.models.serialization import MANIFEST, LocalModel, copy_model, load_model
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import atomic_path, sha256, write_json
from exfm_ray.storage.cache import local_copy, verify_sha256
from exfm_ray.storage.manifest import read_manifest
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.feature_store import Array, FeatureStore, ridge_alignment
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore, rebuild_hint

HISTORY_COLUMN = "history"  # float32[F], added to a fragment's packed columns
LEVELS = 127


class HistoryManifest(FrozenModel):
    """The manifest of a window's representations.

    Attributes:
        snapshot: which was to represent the window; of a pinned history the first one does.
        space: version of the snapshot in whose space the store after it is.
        sha256, bytes: of the store after it.
    """

    window: int
    teacher: str
    snapshot: int
    space: int
    schema_digest: str
    settings: HistoryConfig
    users: int
    sha256: str
    bytes: int


@dataclass(frozen=True)
class HistoryStore:
    """What one teacher's representations have become."""

    root: AnyPath
    teacher: str
    settings: HistoryConfig
    policy: SnapshotPolicy

    def folder(self, window: int) -> AnyPath:
        """Where a window's representations lie."""
        return self.root / self.teacher / window_name(window)

    def has(self, window: int) -> bool:
        """True when a window's representations are committed."""
        return (self.folder(window) / "manifest.json").exists()

    def ready(self, window: int) -> bool:
        """True when all that the examples of a window may be given is there."""
        return window <= self.policy.first or self.has(window - 1)

    def manifest(self, window: int) -> HistoryManifest:
        """Of a committed window; UserError where it is missing or damaged."""
        folder = self.folder(window)
        path = folder / "manifest.json"
        if not path.exists():
            raise UserError(
                f"{folder}: window {window} is not represented by teacher '{self.teacher}'; run the DAS on it"
            )
        return read_manifest(
            path, HistoryManifest, "a manifest of representations", rebuild_hint(folder)
        )

    def state_before(self, window: int, schema: Schema) -> FeatureStore:
        """What was known before a window; UserError where it is not there, damaged, or not what it
        says: see `_checked`."""
        if window <= self.policy.first:
            return FeatureStore.empty(self.settings.dim, self.settings.last_k)
        manifest = self._checked(window - 1, schema)
        path = self.folder(window - 1) / "after.safetensors"
        try:
            return _read_store(
                path,
                path.stat().st_mtime_ns,
                manifest.sha256,
                self.settings.dim,
                self.settings.last_k,
            )
        except FileNotFoundError:
            raise _damaged(path) from None

    def _checked(self, window: int, schema: Schema) -> HistoryManifest:
        """The manifest of a window: of this teacher and schema, these settings, and of snapshots
        that have not learned the window (rule 2)."""
        manifest = self.manifest(window)
        folder = self.folder(window)
        policy = self.policy
        if (manifest.window, manifest.teacher) != (window, self.teacher):
            raise UserError(
                f"{folder}: of window {manifest.window} and teacher '{manifest.teacher}'; {rebuild_hint(folder)}"
            )
        if manifest.settings != self.settings:
            raise UserError(
                f"{folder}: made with other settings of distillation.history; start a run under another --name"
            )
        if manifest.schema_digest != schema.digest:
            raise UserError(
                f"{folder}: of a stream with another schema (other features, rows or encodings); start a run under another --name"
            )
        if not policy.may_supervise(max(manifest.snapshot, manifest.space), window):
            raise UserError(
                f"{folder}: represented by snapshot {manifest.snapshot} in the space of {manifest.space}, but with das.fm_lag = {policy.fm_lag} it "
                f"takes one that has learned no window after {window - policy.fm_lag}; {rebuild_hint(folder)}"
            )
        return manifest

    def space_before(self, window: int) -> int | None:
        """Of an aligned history the version out of whose space a window's snapshot maps the store;
        None where there is nothing to map."""
        if self.settings.embedding_space != "aligned" or window <= self.policy.first:
            return None
        return (
            self.manifest(window - 1).space
            if self.has(window - 1)
            else self.policy.version(window - 1)
        )

    def join(
        self,
        window: int,
        events: pa.Table,
        schema: Schema,
    ) -> pa.Table:
        """Add `HISTORY_COLUMN` to a window's rows."""
        column = key_column(schema, self.settings)
        width = len(schema.single)
        summary_NF = self.state_before(window, schema).summary(
            list_values(events["sparse"], width)[:, column].astype(np.int64)
        )
        return events.append_column(
            HISTORY_COLUMN,
            pa.FixedSizeListArray.from_arrays(summary_NF.ravel(), summary_NF.shape[1]),
        )

    def publish(
        self,
        stream: EventStream,
        window: Window,
        snapshots: SnapshotStore,
        version: int,
        seed: int,
    ) -> None:
        """Represent a window's examples and move the feature store on. Refuses a snapshot that may
        have learned the window (rule 2)."""
        if not self.policy.may_supervise(version, window.index):
            raise UserError(
                f"window {window.index} must not be represented by snapshot {version}: with das.fm_lag = {self.policy.fm_lag} it takes one that "
                f"has learned no window after {window.index - self.policy.fm_lag}"
            )
        settings = self.settings
        schema = stream.schema
        folder = self.folder(window.index)
        model, space = self._model(snapshots, version, schema)
        store = self.state_before(window.index, schema)
        held = self.space_before(window.index)
        earlier = None if held is None else snapshots.load(held, schema.digest)[0]
        column = key_column(schema, settings)
        users = []
        values = []
        old = []
        for fragment in window.fragments:
            table = stream.read(window.index, fragment)
            value_ND = self._represent(model, table, schema, seed)
            code_ND, scale_N = quantised(value_ND)
            self._write(window.index, fragment, table["example_id"], code_ND, scale_N)
            users.append(
                list_values(table["sparse"], len(schema.single))[:, column].astype(np.int64)
            )
            values.append(code_ND.astype(np.float32) * scale_N[:, None])
            if earlier:
                old.append(self._represent(earlier, table, schema, seed))
        if old:
            store = store.transformed(ridge_alignment(np.concatenate(old), np.concatenate(values)))
        elif held is not None:  # a window without examples: the store stays where it is
            space = held
        if users:
            store = store.updated(np.concatenate(users), np.concatenate(values))
        with atomic_path(folder / "after.safetensors") as temporary:
            save_file(
                {
                    name: np.ascontiguousarray(array)
                    for name, array in store.arrays().items()
                    if array.size
                },
                temporary,
            )
            size = temporary.stat().st_size
            hashed = sha256(temporary)
        facts = HistoryManifest(
            window=window.index,
            teacher=self.teacher,
            snapshot=version,
            space=space,
            schema_digest=schema.digest,
            settings=settings,
            users=len(store.users_U),
            sha256=hashed,
            bytes=size,
        )
        write_json(folder / "manifest.json", facts.model_dump(mode="json"))

    def _model(
        self,
        snapshots: SnapshotStore,
        version: int,
        schema: Schema,
    ) -> tuple[LocalModel, int]:
        """What represents: the snapshot itself, or the first one, of which a copy is kept; and its
        version."""
        if self.settings.embedding_space != "pinned":
            return snapshots.load(version, schema.digest)[0], version
        kept = self.root / self.teacher / "pinned"
        first = self.policy.version(self.policy.first)
        assert first is not None
        if not (kept / MANIFEST).exists():
            copy_model(snapshots.folder(first), kept)
        model, stored = load_model(kept)
        if stored.example.digest != schema.digest:
            raise UserError(
                f"{kept}: this snapshot was trained on another schema than the stream's; start a run under another --name"
            )
        return model, first

    def _represent(
        self,
        model: LocalModel,
        table: pa.Table,
        schema: Schema,
        seed: int,
    ) -> Array:
        parts = [
            extract_features(model, batch, self.settings.layer)
            for batch in to_batch(table, schema).split(512)
        ]
        x_NH = torch.cat(parts)
        return (x_NH @ projection(x_NH.shape[1], self.settings.dim, seed)).numpy()

    def _write(
        self,
        window: int,
        fragment: Fragment,
        ids: pa.ChunkedArray,
        code_ND: Array,
        scale_N: Array,
    ) -> None:
        codes = pa.FixedSizeListArray.from_arrays(pa.array(code_ND.ravel()), code_ND.shape[1])
        with atomic_path(self.folder(window) / Path(fragment.file).name) as temporary:
            pq.write_table(
                pa.table({"example_id": ids, "scale": scale_N, "code": codes}),
                temporary,
                compression="zstd",
            )


@lru_cache(maxsize=2)
def _read_store(
    path: AnyPath,
    written_ns: int,
    expected: str,
    dim: int,
    last: int,
) -> FeatureStore:
    """Read, and its hash checked, once per process: all fragments of a window look into the same
    one."""
    if not verify_sha256(path, expected):
        raise _damaged(path)
    return FeatureStore.from_arrays(load_file(local_copy(path, expected)), dim, last)


def _damaged(path: AnyPath) -> UserError:
    return UserError(
        f"{path}: missing or not the file that its manifest describes; {rebuild_hint(path.parent)}"
    )


def quantised(value_ND: Array) -> tuple[Array, Array]:
    """int8 (N, D) and a scale for each row: value = scale * code, off by half a scale at most."""
    scale_N = np.maximum(np.abs(value_ND).max(axis=1), np.float32(1e-12)) / np.float32(LEVELS)
    return np.rint(value_ND / scale_N[:, None]).astype(np.int8), scale_N.astype(np.float32)


@lru_cache(maxsize=4)
def projection(
    width: int,
    dim: int,
    seed: int,
) -> Tensor:
    """Random (H, D), entries of variance 1 / H: keeps distances to within about 1 / sqrt(D)
    (Johnson and Lindenstrauss)."""
    generator = torch.Generator().manual_seed(1_000_033 * (seed + 1))
    matrix_HD: Tensor = torch.randn(width, dim, generator=generator) / width**0.5
    return matrix_HD


@torch.inference_mode()
def extract_features(
    model: LocalModel,
    batch: Any,
    layer: str,
) -> Tensor:
    """float32 (B, H): what a module of the network puts out, flattened."""
    found: list[Tensor] = []
    hook = model.network.get_submodule(layer).register_forward_hook(
        lambda module, inputs, output: found.append(output)
    )
    try:
        model.score(batch)
    finally:
        hook.remove()
    return found[-1].float().flatten(1)


def key_column(schema: Schema, settings: HistoryConfig) -> int:
    """Which single-valued feature tells whose examples belong together; UserError where there is
    none."""
    key = settings.key or schema.group_by
    names = [feature.name for feature in schema.single]
    if key not in names:
        told = nearest(key, names) if key else " The schema has no group_by."
        raise UserError(
            f"setting 'distillation.history.key' is {key}: name a single-valued feature: {', '.join(names)}.{told}"
        )
    return names.index(key)


def with_history(schema: Schema, settings: HistoryConfig) -> Schema:
    """The schema of examples with `HISTORY_COLUMN` after their dense features."""
    width = 1 + max(settings.last_k, 1) * settings.dim
    dense = [
        *schema.model_dump()["dense"],
        *({"name": f"history.{number}"} for number in range(width)),
    ]
    return Schema.model_validate(schema.model_dump() | {"dense": dense})


def check_history(config: Config, schema: Schema) -> None:
    """UserError where the config's arms remember by a feature, or a layer of the FM, that is not
    there."""
    settings = config.distillation.history
    if not any(arm.uses_history for arm in config.arms):
        return
    key_column(schema, settings)
    with torch.device("meta"):
        network = Network(config.fm.model, schema, tasks=1)
        known = [name for name, _ in network.named_modules() if name]
        if settings.layer not in known:
            told = nearest(settings.layer, known) or f" There are {', '.join(known)}."
            raise UserError(
                f"setting 'distillation.history.layer': the FM's network has no module '{settings.layer}'.{told}"
            )
        found: list[object] = []
        hook = network.get_submodule(settings.layer).register_forward_hook(
            lambda module, inputs, output: found.append(output)
        )
        examples = 3
        network(
            torch.zeros(
                examples, Layout.from_config(config.fm.model, schema).rows, config.fm.model.dim
            ),
            torch.zeros(examples, len(schema.dense)),
        )
        hook.remove()
    if not any(
        isinstance(output, Tensor) and output.ndim > 1 and len(output) == examples
        for output in found[-1:]
    ):
        raise UserError(
            f"setting 'distillation.history.layer' is {settings.layer}: this module of the FM's network puts out no numbers for each example; "
            "name one that does, such as backbone"
        )


def history_store(config: Config) -> HistoryStore | None:
    """A run's; None where no arm remembers."""
    remembers = any(arm.uses_history for arm in config.arms)
    return (
        HistoryStore(
            config.stores / "history",
            config.fm.name,
            config.distillation.history,
            SnapshotPolicy.from_config(config.das),
        )
        if remembers
        else None
    )
