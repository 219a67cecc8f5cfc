"""User histories: what the teacher's representations say about a user's earlier examples.

    <store>/<teacher>/window=003/fragment=0000.parquet
        example_id  int64
        scale       float32
        code        int8 [D]; a representation is scale * code
    <store>/<teacher>/window=003/after.safetensors   the feature store after the window
        users       int64 (U), ascending
        count       int64 (U)
        total       float32 (U, D)
        last        float32 (U, L, D), newest first
    <store>/<teacher>/window=003/manifest.json       written last
    <store>/<teacher>/pinned/                        the first snapshot, if it represents them all

An example of window t gets what the store held after window t - 1: nothing of its own window, so
never itself. A window is represented by the snapshot that supervises it, which has not learned it,
or by the first snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from exfm_ray.config.distillation import HistoryConfig
from exfm_ray.config.root import Config
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import EventStream, Fragment, Window, list_values
from exfm_ray.errors import UserError, nearest
from exfm_ray.models.serialization import MANIFEST, LocalModel, copy_model, load_model
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import atomic_path, sha256
from exfm_ray.storage.cache import local_copy, verify_sha256
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.base import WindowManifest, WindowStore
from exfm_ray.stores.feature_store import Array, FeatureStore, ridge_alignment
from exfm_ray.stores.representations import check_layer, quantize, represent
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore, rebuild_hint

HISTORY_COLUMN = "history"
"""Column of the joined rows: float32 [F], the summary of the example's user."""
STATE_FILE = "after.safetensors"


class HistoryManifest(WindowManifest):
    """The manifest of a window's representations.

    Attributes:
        snapshot: the version that supervises the window. It represents the window, too, unless
            the history is pinned to the first version.
        space: version of the snapshot whose embedding space the store after the window is in.
        schema_digest: digest of the stream's schema.
        settings: the settings that the history was made with.
        users: number of users in the store after the window.
        sha256: of the file of the store after the window.
        bytes: size of that file.
    """

    space: int
    schema_digest: str
    settings: HistoryConfig
    users: int
    sha256: str
    bytes: int


@dataclass(frozen=True)
class HistoryStore(WindowStore):
    """The user histories by one teacher.

    Attributes:
        settings: `distillation.history`.
        policy: decides which windows have a teacher.
    """

    settings: HistoryConfig
    policy: SnapshotPolicy

    contents: ClassVar[str] = "representations"

    def rebuild_hint(self, window: int) -> str:
        """Return what a user can do about a window whose files are damaged or stale."""
        return rebuild_hint(self.folder(window))

    def manifest(self, window: int) -> HistoryManifest:
        """Read the manifest of a committed window.

        Raises:
            UserError: it is missing, damaged, or of another window or teacher.
        """
        return self._read_manifest(window, HistoryManifest)

    def ready(self, window: int) -> bool:
        """Return True when everything that a window's examples may get is committed."""
        return window <= self.policy.first or self.has(window - 1)

    def state_before(self, window: int, schema: Schema) -> FeatureStore:
        """Read the feature store from before a window.

        Raises:
            UserError: it is missing, damaged, or of another window, teacher, schema, snapshot or
                other settings.
        """
        dim = self.settings.dim
        last = self.settings.last_k
        if window <= self.policy.first:
            return FeatureStore.empty(dim, last)

        manifest = self._checked_manifest(window - 1, schema)
        path = self.folder(window - 1) / STATE_FILE
        try:
            written_ns = path.stat().st_mtime_ns
            return _read_state(path, written_ns, manifest.sha256, dim, last)
        except FileNotFoundError:
            raise _damaged(path) from None

    def _checked_manifest(self, window: int, schema: Schema) -> HistoryManifest:
        """Read a manifest of this schema, these settings, and snapshots that rule 2 allows."""
        manifest = self.manifest(window)
        folder = self.folder(window)
        if manifest.settings != self.settings:
            raise UserError(
                f"{folder}: made with other settings of distillation.history; "
                "start a run under another --name"
            )
        if manifest.schema_digest != schema.digest:
            raise UserError(
                f"{folder}: of a stream with another schema (other features, rows or encodings); "
                "start a run under another --name"
            )
        latest = max(manifest.snapshot, manifest.space)
        if not self.policy.may_supervise(latest, window):
            lag = self.policy.fm_lag
            raise UserError(
                f"{folder}: represented by snapshot {manifest.snapshot} in the space of "
                f"{manifest.space}, but with das.fm_lag = {lag} it takes one that has learned no "
                f"window after {window - lag}; {self.rebuild_hint(window)}"
            )
        return manifest

    def space_before(self, window: int) -> int | None:
        """Return the version whose space an aligned history leaves when it takes in a window.

        None if there is nothing to map: the history is not aligned, or it is empty before `window`.
        """
        is_aligned = self.settings.embedding_space == "aligned"
        if not is_aligned or window <= self.policy.first:
            return None
        if self.has(window - 1):
            return self.manifest(window - 1).space
        return self.policy.version(window - 1)

    def join(
        self,
        window: int,
        events: pa.Table,
        schema: Schema,
    ) -> pa.Table:
        """Add `HISTORY_COLUMN` to a window's rows."""
        user_N = user_ids(events, schema, self.settings)
        state = self.state_before(window, schema)
        summary_NF = state.summary(user_N)
        column = pa.FixedSizeListArray.from_arrays(summary_NF.ravel(), summary_NF.shape[1])
        return events.append_column(HISTORY_COLUMN, column)

    def publish(
        self,
        stream: EventStream,
        window: Window,
        snapshots: SnapshotStore,
        version: int,
        seed: int,
    ) -> None:
        """Represent a window's examples and write the feature store after the window.

        Args:
            stream: the stream.
            window: the window.
            snapshots: the teacher's snapshots.
            version: the version that supervises the window.
            seed: seed of the projection.

        Raises:
            UserError: the snapshot may have learned from the window (rule 2).
        """
        self.policy.refuse_later_snapshot(version, window.index, "represented by")
        schema = stream.schema
        model, space = self._representing_model(snapshots, version, schema)
        state = self.state_before(window.index, schema)
        space_before = self.space_before(window.index)
        model_before = None
        if space_before is not None:
            model_before, _ = snapshots.load(space_before, schema.digest)

        users = []
        values = []
        values_before = []
        for fragment in window.fragments:
            table = stream.read(window.index, fragment)
            value_ND = self._represent(model, table, schema, seed)
            code_ND, scale_N = quantize(value_ND)
            self._write_codes(window.index, fragment, table["example_id"], code_ND, scale_N)

            user_N = user_ids(table, schema, self.settings)
            users.append(user_N)
            stored_ND = code_ND.astype(np.float32) * scale_N[:, None]
            values.append(stored_ND)
            if model_before:
                before_ND = self._represent(model_before, table, schema, seed)
                values_before.append(before_ND)

        if space_before is not None and not values_before:
            space = space_before  # no examples to map by: the store stays in its space
        state = _with_examples(state, users, values, values_before)
        self._commit(window.index, version, space, schema, state)

    def _representing_model(
        self,
        snapshots: SnapshotStore,
        version: int,
        schema: Schema,
    ) -> tuple[LocalModel, int]:
        """Load the model that represents examples.

        Returns:
            The model, `version` itself or a copy of the first snapshot; and its version.
        """
        if self.settings.embedding_space != "pinned":
            model, _ = snapshots.load(version, schema.digest)
            return model, version

        copy = self.root / self.teacher / "pinned"
        first = self.policy.version(self.policy.first)
        assert first is not None
        if not (copy / MANIFEST).exists():
            copy_model(snapshots.folder(first), copy)
        model, stored = load_model(copy)
        if stored.example.digest != schema.digest:
            raise UserError(
                f"{copy}: this snapshot was trained on another schema than the stream's; "
                "start a run under another --name"
            )
        return model, first

    def _represent(
        self,
        model: LocalModel,
        table: pa.Table,
        schema: Schema,
        seed: int,
    ) -> Array:
        rows = to_batch(table, schema)
        return represent(model, rows, self.settings.layer, self.settings.dim, seed)

    def _write_codes(
        self,
        window: int,
        fragment: Fragment,
        ids: pa.ChunkedArray,
        code_ND: Array,
        scale_N: Array,
    ) -> None:
        codes = pa.FixedSizeListArray.from_arrays(pa.array(code_ND.ravel()), code_ND.shape[1])
        table = pa.table({"example_id": ids, "scale": scale_N, "code": codes})
        path = self.folder(window) / Path(fragment.file).name
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def _commit(
        self,
        window: int,
        version: int,
        space: int,
        schema: Schema,
        state: FeatureStore,
    ) -> None:
        """Write the feature store after a window, then the window's manifest."""
        arrays = {name: array for name, array in state.arrays().items() if array.size}
        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        with atomic_path(self.folder(window) / STATE_FILE) as temporary:
            save_file(tensors, temporary)
            size = temporary.stat().st_size
            digest = sha256(temporary)

        self._write_manifest(
            HistoryManifest(
                window=window,
                teacher=self.teacher,
                snapshot=version,
                space=space,
                schema_digest=schema.digest,
                settings=self.settings,
                users=len(state.users_U),
                sha256=digest,
                bytes=size,
            )
        )


def _with_examples(
    state: FeatureStore,
    users: Sequence[Array],
    values: Sequence[Array],
    values_before: Sequence[Array],
) -> FeatureStore:
    """Map a feature store into a window's space and add the window's examples.

    Args:
        state: the store before the window.
        users: user ids (N) by fragment.
        values: representations (N, D) by fragment.
        values_before: the same examples in the store's present space; empty: nothing is mapped.
    """
    if values_before:
        map_DD = ridge_alignment(np.concatenate(values_before), np.concatenate(values))
        state = state.transformed(map_DD)
    if users:
        state = state.updated(np.concatenate(users), np.concatenate(values))
    return state


@lru_cache(maxsize=2)
def _read_state(
    path: AnyPath,
    written_ns: int,
    expected: str,
    dim: int,
    last: int,
) -> FeatureStore:
    """Read and check a feature store once per process: all fragments of a window share it."""
    if not verify_sha256(path, expected):
        raise _damaged(path)
    arrays = load_file(local_copy(path, expected))
    return FeatureStore.from_arrays(arrays, dim, last)


def _damaged(path: AnyPath) -> UserError:
    return UserError(
        f"{path}: missing or not the file that its manifest describes; {rebuild_hint(path.parent)}"
    )


def user_ids(
    events: pa.Table,
    schema: Schema,
    settings: HistoryConfig,
) -> Array:
    """Return the user of each example, int64 (N): the value of the feature that groups them."""
    column = key_column(schema, settings)
    sparse_NS = list_values(events["sparse"], len(schema.single))
    user_N: Array = sparse_NS[:, column].astype(np.int64)
    return user_N


def key_column(schema: Schema, settings: HistoryConfig) -> int:
    """Return which single-valued feature says whose examples belong together.

    Raises:
        UserError: there is no such feature.
    """
    key = settings.key or schema.group_by
    names = [feature.name for feature in schema.single]
    if key not in names:
        hint = nearest(key, names) if key else " The schema has no group_by."
        raise UserError(
            f"setting 'distillation.history.key' is {key}: name a single-valued feature: "
            f"{', '.join(names)}.{hint}"
        )
    return names.index(key)


def with_history(schema: Schema, settings: HistoryConfig) -> Schema:
    """Return the schema of examples with `HISTORY_COLUMN` after their dense features."""
    values = max(settings.last_k, 1)
    width = 1 + values * settings.dim
    added = [{"name": f"history.{number}"} for number in range(width)]
    fields = schema.model_dump()
    fields["dense"] = [*fields["dense"], *added]
    return Schema.model_validate(fields)


def check_history(config: Config, schema: Schema) -> None:
    """Check the settings of the arms that use user histories against the schema and the FM.

    Raises:
        UserError: the feature that groups examples, or the FM's layer, does not exist.
    """
    settings = config.distillation.history
    if any(arm.uses_history for arm in config.arms):
        key_column(schema, settings)
        check_layer(config.fm.model, schema, settings.layer)


def history_store(config: Config) -> HistoryStore | None:
    """Return a run's user histories, None if no arm uses them."""
    if not any(arm.uses_history for arm in config.arms):
        return None
    return HistoryStore(
        root=config.stores / "history",
        teacher=config.fm.name,
        settings=config.distillation.history,
        policy=SnapshotPolicy.from_config(config.das),
    )
