"""Writes a stream of which the source tells when each label became known: events without them, the
label log, the releases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from exfm_ray.data.labels.label_log import LOG_SCHEMA, LabelLog, part_path, write_part
from exfm_ray.data.labels.releases import ATTRIBUTION
from exfm_ray.data.stream import EventStream, StreamWriter, WindowWriter, list_values
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import write_json
from exfm_ray.storage.remote import AnyPath

Array = np.ndarray[Any, Any]


class LabeledWriter(StreamWriter):
    """A window's labels become a part of the log when it is committed; its end is then the clock by
    which windows are released."""

    def __init__(
        self,
        root: AnyPath,
        schema: Schema,
        settings: dict[str, Any],
        fragment_rows: int,
        attribution_s: Mapping[str, int],
        late_labels: str,
    ) -> None:
        super().__init__(root, schema, settings, fragment_rows)
        self.attribution_s = attribution_s
        write_json(
            root / ATTRIBUTION, {"attribution_s": dict(attribution_s), "late_labels": late_labels}
        )
        self.ledger = LabelLog(EventStream(root, schema), attribution_s, late_labels == "correct")

    def window(
        self,
        index: int,
        start_ms: int,
        end_ms: int,
    ) -> WindowWriter:
        return _LabelledWindow(self, index, start_ms, end_ms)

    def finish(self, statistics: dict[str, Any]) -> None:
        """Release all that is left: nothing more will come."""
        self.ledger.release(None)
        super().finish(statistics | {"labels": self.ledger.statistics()})


class _LabelledWindow(WindowWriter):
    def __init__(
        self,
        writer: LabeledWriter,
        index: int,
        start_ms: int,
        end_ms: int,
    ) -> None:
        super().__init__(writer, index, start_ms, end_ms)
        self._labelled = writer
        self._log: list[pa.Table] = []

    def append(self, table: pa.Table, known_NT: Array | None = None) -> None:
        """Add packed rows with their true labels; `known_NT`: when each label became known, ms."""
        if self.committed:
            return
        assert known_NT is not None, "the source tells when labels became known"
        schema = self._labelled.schema
        labels_NT = list_values(table["labels"], len(schema.tasks)).copy()
        for task in self._labelled.attribution_s:
            column = schema.task_index(task)
            positive = labels_NT[:, column] == 1
            rows = int(positive.sum())
            ids = table["example_id"].to_numpy()[positive]
            times = known_NT[positive, column]
            self._log.append(
                pa.table(
                    [ids, [task] * rows, np.ones(rows, np.int8), times], names=LOG_SCHEMA.names
                ).cast(LOG_SCHEMA)
            )
            labels_NT[:, column] = np.nan
        hidden = pa.FixedSizeListArray.from_arrays(pa.array(labels_NT.ravel()), labels_NT.shape[1])
        super().append(
            table.set_column(
                table.column_names.index("labels"), table.schema.field("labels"), hidden
            )
        )

    def commit(self, duplicates: int) -> None:
        """Write the window and its part of the log, and release what is over by then."""
        root = self._labelled.root
        ledger = self._labelled.ledger
        if not self.committed:
            write_part(root, ledger.parts, pa.concat_tables([LOG_SCHEMA.empty_table(), *self._log]))
        assert part_path(root, ledger.parts).exists()
        super().commit(duplicates)
        ledger.add_window(self.index)
        ledger.add_part()
        ledger.release(EventStream(root, self._labelled.schema).window(self.index).end_ms)
