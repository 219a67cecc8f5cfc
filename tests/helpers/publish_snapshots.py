"""Snapshots of random weights, which a scorer can load, without any training."""

from __future__ import annotations

from example import SCHEMA

from exfm_ray.config.models import MLPConfig, ModelConfig
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.network import build_network
from exfm_ray.models.serialization import commit_model, write_tables
from exfm_ray.schema import Schema
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.snapshots import SnapshotStore

MODEL = MLPConfig(dim=4, mlp=(8,))


def publish(
    root: AnyPath,
    version: int,
    schema: Schema = SCHEMA,
    named: int | None = None,
    scale: float = 1.0,
    model: ModelConfig = MODEL,
) -> SnapshotStore:
    """Publish a version of teacher fm with weights drawn from the seed `version`.

    Args:
        root: folder of the snapshots.
        version: of the snapshot.
        schema: of the stream.
        named: the version that its manifest names, if another one.
        scale: factor of the tables.
        model: of the teacher.
    """
    store = SnapshotStore(root, "fm")
    folder = store.folder(version)
    tables = LocalTables(schema, model, seed=version).tables()
    write_tables(folder, 0, {f"{name}@0": table * scale for name, table in tables.items()})
    network = build_network(model, schema, len(schema.tasks), version)
    commit_model(
        folder,
        model,
        schema,
        schema.tasks,
        network.state_dict(),
        {"teacher": "fm", "version": named or version},
    )
    return store
