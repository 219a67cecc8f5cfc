"""What the teacher thought of a user's earlier examples: representations as int8, and a feature store made of them.

    <store>/<teacher>/window=003/fragment=0000.parquet   example_id int64, scale float32, code int8[D]: value = scale * code
    <store>/<teacher>/window=003/after.safetensors       the feature store after the window: users int64 (U) ascending, count int64 (U),
                                                         total float32 (U, D), last float32 (U, L, D), newest first
    <store>/<teacher>/window=003/manifest.json           written last
    <store>/<teacher>/projection.safetensors             float32 (H, D), drawn from the run's seed
    <store>/<teacher>/pinned/                            the first snapshot, where it represents all windows

An example of window t is given what the store held after window t - 1: nothing of its own window, so never itself. A window is
represented by the snapshot that supervises it, which has not learned it, or by the first one.
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
from safetensors.numpy import load, load_file, save_file
from torch import Tensor

from exfm_ray.config import Config, HistoryConfig
from exfm_ray.das.lag import Policy
from exfm_ray.das.snapshots import SnapshotStore
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import EventStream, Fragment, Window, list_values, window_name
from exfm_ray.errors import UserError, nearest
from exfm_ray.files import atomic_path, read_json, write_json
from exfm_ray.models.layout import Layout
from exfm_ray.models.network import Network
from exfm_ray.models.past import Past
from exfm_ray.models.stored import MANIFEST, PlainModel, copy_model, load_model
from exfm_ray.remote import Place
from exfm_ray.schema import Model, Schema

HISTORY_COLUMN = "history"  # float32[F], added to a fragment's packed columns
LEVELS = 127
Array = np.ndarray[Any, Any]


class Remembered(Model):
    """The manifest of a window's representations. `space`: version of the snapshot in whose space the store after it is."""

    window: int
    teacher: str
    snapshot: int
    space: int
    schema_digest: str
    settings: HistoryConfig
    users: int
    bytes: int


@dataclass(frozen=True)
class FeatureStore:
    """What is kept of every user: `users_U` ascending, number of examples, sum of their values, the last ones (newest first, absent ones 0)."""

    users_U: Array
    count_U: Array
    total_UD: Array
    last_ULD: Array

    @classmethod
    def empty(cls, settings: HistoryConfig) -> FeatureStore:
        """Of nobody."""
        none, width = np.empty(0, np.int64), settings.dim
        return cls(none, none, np.empty((0, width), np.float32), np.empty((0, settings.last, width), np.float32))

    def mapped(self, map_DD: Array) -> FeatureStore:
        """In another space."""
        return FeatureStore(self.users_U, self.count_U, (self.total_UD @ map_DD).astype(np.float32), (self.last_ULD @ map_DD).astype(np.float32))

    def after(self, user_N: Array, value_ND: Array) -> FeatureStore:
        """With a window's examples, in order. Id 0, the missing value, is nobody and is not kept."""
        user_N, value_ND = user_N[user_N > 0], value_ND[user_N > 0]
        order_N = np.argsort(user_N, kind="stable")
        new_V, first_V, count_V = np.unique(user_N[order_N], return_index=True, return_counts=True)
        sorted_ND = value_ND[order_N]
        users_U = np.union1d(self.users_U, new_V)
        old_O, new_at_V = np.searchsorted(users_U, self.users_U), np.searchsorted(users_U, new_V)
        count_U, total_UD = np.zeros(len(users_U), np.int64), np.zeros((len(users_U), value_ND.shape[1]), np.float32)
        count_U[old_O], total_UD[old_O] = self.count_U, self.total_UD
        count_U[new_at_V] += count_V
        if len(new_V):
            total_UD[new_at_V] += np.add.reduceat(sorted_ND, first_V, axis=0)
        kept = self.last_ULD.shape[1]
        last_ULD = np.zeros((len(users_U), kept, value_ND.shape[1]), np.float32)
        last_ULD[old_O] = self.last_ULD
        for place in range(kept if len(new_V) else 0):  # positions, oldest first: each window's examples push the older ones back
            has_V = count_V > place
            end_V = first_V + count_V - 1
            last_ULD[new_at_V[has_V], place] = sorted_ND[end_V[has_V] - place]
            back_V = np.maximum(place - count_V, 0)
            older_V = ~has_V
            before = np.zeros((len(new_V), value_ND.shape[1]), np.float32)
            known_V = np.isin(new_V, self.users_U)
            at_V = np.searchsorted(self.users_U, new_V[known_V])
            before[known_V] = self.last_ULD[at_V, back_V[known_V]]
            last_ULD[new_at_V[older_V], place] = before[older_V]
        return FeatureStore(users_U, count_U, total_UD, last_ULD)

    def summary(self, user_N: Array) -> Array:
        """float32 (N, F) for examples of these users: log(1 + examples), then the mean, or the last ones; zeros for unknown users."""
        kept, width = self.last_ULD.shape[1:]
        summary_NF = np.zeros((len(user_N), 1 + max(kept, 1) * width), np.float32)
        if not len(self.users_U):
            return summary_NF
        at_N = np.minimum(np.searchsorted(self.users_U, user_N), len(self.users_U) - 1)
        known_N = self.users_U[at_N] == user_N
        at_K = at_N[known_N]
        values_KX = self.last_ULD[at_K].reshape(len(at_K), -1) if kept else self.total_UD[at_K] / self.count_U[at_K, None]
        summary_NF[known_N] = np.concatenate([np.log1p(self.count_U[at_K, None]), values_KX], axis=1)
        return summary_NF

    def past(self) -> Past:
        """What examples of each user are given, in the order of the users."""
        return Past(torch.from_numpy(self.users_U), torch.from_numpy(self.summary(self.users_U)))


@dataclass(frozen=True)
class HistoryStore:
    """What one teacher's representations have become."""

    root: Place
    teacher: str
    settings: HistoryConfig
    policy: Policy

    def folder(self, window: int) -> Place:
        """Where a window's representations lie."""
        return self.root / self.teacher / window_name(window)

    def has(self, window: int) -> bool:
        """True when a window's representations are committed."""
        return (self.folder(window) / "manifest.json").exists()

    def ready(self, window: int) -> bool:
        """True when all that the examples of a window may be given is there."""
        return window <= self.policy.first or self.has(window - 1)

    def manifest(self, window: int) -> Remembered:
        """Of a committed window."""
        return Remembered.model_validate(read_json(self.folder(window) / "manifest.json"))

    def before(self, window: int) -> FeatureStore:
        """What was known before a window; UserError where it is not there, or is of other settings."""
        if window <= self.policy.first:
            return FeatureStore.empty(self.settings)
        folder = self.folder(window - 1)
        if not self.has(window - 1):
            raise UserError(f"{folder}: window {window - 1} is not represented by teacher '{self.teacher}'; run the DAS on it")
        if self.manifest(window - 1).settings != self.settings:
            raise UserError(f"{folder}: made with other settings of distillation.history; remove {self.root} and run the DAS again")
        path = folder / "after.safetensors"
        return _read_store(path, path.stat().st_mtime_ns, self.settings.dim, self.settings.last)

    def join(self, window: int, events: pa.Table, column: int, width: int) -> pa.Table:
        """Add `HISTORY_COLUMN` to a window's rows; `column` of the `width` single-valued features holds the user."""
        summary_NF = self.before(window).summary(list_values(events["sparse"], width)[:, column].astype(np.int64))
        return events.append_column(HISTORY_COLUMN, pa.FixedSizeListArray.from_arrays(summary_NF.ravel(), summary_NF.shape[1]))

    def publish(self, stream: EventStream, window: Window, snapshots: SnapshotStore, version: int, seed: int) -> None:
        """Represent a window's examples and move the feature store on. Refuses a snapshot that may have learned the window (rule 2)."""
        if not self.policy.may_supervise(version, window.index):
            raise UserError(
                f"window {window.index} must not be represented by snapshot {version}: with das.fm_lag = {self.policy.fm_lag} it takes one that "
                f"has learned no window after {window.index - self.policy.fm_lag}"
            )
        settings, schema, folder = self.settings, stream.schema, self.folder(window.index)
        model, space = self._model(snapshots, version, schema)
        store = self.before(window.index)
        known = window.index > self.policy.first and settings.drift == "aligned"
        earlier = snapshots.load(self.manifest(window.index - 1).space, schema.digest)[0] if known else None
        column = user_column(schema, settings)
        users, values, old = [], [], []
        for fragment in window.fragments:
            table = stream.read(window.index, fragment)
            value_ND = self._represent(model, table, schema, seed)
            code_ND, scale_N = quantised(value_ND)
            self._write(window.index, fragment, table["example_id"], code_ND, scale_N)
            users.append(list_values(table["sparse"], len(schema.single))[:, column].astype(np.int64))
            values.append(code_ND.astype(np.float32) * scale_N[:, None])
            if earlier:
                old.append(self._represent(earlier, table, schema, seed))
        if old:
            store = store.mapped(np.linalg.lstsq(np.concatenate(old), np.concatenate(values), rcond=None)[0])
        if users:
            store = store.after(np.concatenate(users), np.concatenate(values))
        path = folder / "after.safetensors"
        arrays = {"users": store.users_U, "count": store.count_U, "total": store.total_UD, "last": store.last_ULD}
        with atomic_path(path) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items() if array.size}, temporary)
        facts = Remembered(
            window=window.index, teacher=self.teacher, snapshot=version, space=space, schema_digest=schema.digest, settings=settings,
            users=len(store.users_U), bytes=path.stat().st_size,
        )  # fmt: skip
        write_json(folder / "manifest.json", facts.model_dump(mode="json"))

    def _model(self, snapshots: SnapshotStore, version: int, schema: Schema) -> tuple[PlainModel, int]:
        """What represents: the snapshot itself, or the first one, of which a copy is kept; and its version."""
        if self.settings.drift != "pinned":
            return snapshots.load(version, schema.digest)[0], version
        kept, first = self.root / self.teacher / "pinned", self.policy.version(self.policy.first)
        assert first is not None
        if not (kept / MANIFEST).exists():
            copy_model(snapshots.folder(first), kept)
        model, stored = load_model(kept)
        if stored.example.digest != schema.digest:
            raise UserError(f"{kept}: this snapshot was trained on another schema than the stream's; remove {self.root}")
        return model, first

    def _represent(self, model: PlainModel, table: pa.Table, schema: Schema, seed: int) -> Array:
        parts = [represent(model, batch, self.settings.layer) for batch in to_batch(table, schema).split(512)]
        x_NH = torch.cat(parts)
        return (x_NH @ projection(x_NH.shape[1], self.settings.dim, seed)).numpy()

    def _write(self, window: int, fragment: Fragment, ids: pa.ChunkedArray, code_ND: Array, scale_N: Array) -> None:
        codes = pa.FixedSizeListArray.from_arrays(pa.array(code_ND.ravel()), code_ND.shape[1])
        with atomic_path(self.folder(window) / Path(fragment.file).name) as temporary:
            pq.write_table(pa.table({"example_id": ids, "scale": scale_N, "code": codes}), temporary, compression="zstd")


@lru_cache(maxsize=2)
def _read_store(path: Place, written_ns: int, dim: int, last: int) -> FeatureStore:
    """Read once per process: all fragments of a window look into the same one."""
    arrays = load_file(path) if isinstance(path, Path) else load(path.read_bytes())
    if not arrays:
        return FeatureStore.empty(HistoryConfig(dim=dim, last=last))
    return FeatureStore(arrays["users"], arrays["count"], arrays["total"], arrays.get("last", np.zeros((len(arrays["users"]), 0, dim), np.float32)))


def quantised(value_ND: Array) -> tuple[Array, Array]:
    """int8 (N, D) and a scale for each row: value = scale * code, off by half a scale at most."""
    scale_N = np.maximum(np.abs(value_ND).max(axis=1), np.float32(1e-12)) / np.float32(LEVELS)
    return np.rint(value_ND / scale_N[:, None]).astype(np.int8), scale_N.astype(np.float32)


@lru_cache(maxsize=4)
def projection(width: int, dim: int, seed: int) -> Tensor:
    """Random (H, D), entries of variance 1 / H: keeps distances to within about 1 / sqrt(D) (Johnson and Lindenstrauss)."""
    generator = torch.Generator().manual_seed(1_000_033 * (seed + 1))
    matrix_HD: Tensor = torch.randn(width, dim, generator=generator) / width**0.5
    return matrix_HD


@torch.inference_mode()
def represent(model: PlainModel, batch: Any, layer: str) -> Tensor:
    """float32 (B, H): what a module of the network puts out, flattened."""
    found: list[Tensor] = []
    hook = model.network.get_submodule(layer).register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        model.score(batch)
    finally:
        hook.remove()
    return found[-1].float().flatten(1)


def user_column(schema: Schema, settings: HistoryConfig) -> int:
    """Which single-valued feature tells whose examples belong together; UserError where there is none."""
    key, names = settings.key or schema.group_by, [feature.name for feature in schema.single]
    if key not in names:
        told = nearest(key, names) if key else " The schema has no group_by."
        raise UserError(f"setting 'distillation.history.key' is {key}: name a single-valued feature: {', '.join(names)}.{told}")
    return names.index(key)


def with_history(schema: Schema, settings: HistoryConfig) -> Schema:
    """The schema of examples with `HISTORY_COLUMN` after their dense features."""
    width = 1 + max(settings.last, 1) * settings.dim
    dense = [*schema.model_dump()["dense"], *({"name": f"history.{number}"} for number in range(width))]
    return Schema.model_validate(schema.model_dump() | {"dense": dense})


def check_history(config: Config, schema: Schema) -> None:
    """UserError where the config's arms remember by a feature, or a layer of the FM, that is not there."""
    settings = config.distillation.history
    if not any(arm.remembers for arm in config.arms):
        return
    user_column(schema, settings)
    with torch.device("meta"):
        network = Network(config.fm.model, schema, tasks=1)
        known = [name for name, _ in network.named_modules() if name]
        if settings.layer not in known:
            told = nearest(settings.layer, known) or f" There are {', '.join(known)}."
            raise UserError(f"setting 'distillation.history.layer': the FM's network has no module '{settings.layer}'.{told}")
        found: list[object] = []
        hook = network.get_submodule(settings.layer).register_forward_hook(lambda module, inputs, output: found.append(output))
        examples = 3
        network(torch.zeros(examples, Layout.of(config.fm.model, schema).rows, config.fm.model.dim), torch.zeros(examples, len(schema.dense)))
        hook.remove()
    if not any(isinstance(output, Tensor) and output.ndim > 1 and len(output) == examples for output in found[-1:]):
        raise UserError(
            f"setting 'distillation.history.layer' is {settings.layer}: this module of the FM's network puts out no numbers for each example; "
            "name one that does, such as backbone"
        )


def history_store(config: Config) -> HistoryStore | None:
    """A run's; None where no arm remembers."""
    remembers = any(arm.remembers for arm in config.arms)
    return HistoryStore(config.stores / "history", config.fm.name, config.distillation.history, Policy.of(config.das)) if remembers else None
