"""Writes a stream whose source says when each label became known: events without these labels, the
label log, and the releases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from exfm_ray.data.labels.label_log import LOG_SCHEMA, LabelLog, part_path, write_part
from exfm_ray.data.labels.releases import ATTRIBUTION, with_labels
from exfm_ray.data.stream import EventStream, StreamWriter, WindowWriter, list_values
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import write_json
from exfm_ray.storage.remote import AnyPath

Array = np.ndarray[Any, Any]


class LabeledWriter(StreamWriter):
    """Writes a window's labels as a part of the label log when the window is committed.

    The end of that window is then the clock by which windows are released.
    """

    def __init__(
        self,
        root: AnyPath,
        schema: Schema,
        settings: dict[str, Any],
        fragment_rows: int,
        attribution_s: Mapping[str, int],
        late_labels: str,
    ) -> None:
        """Start or continue a stream; see `StreamWriter`.

        Args:
            root: folder of the stream.
            schema: what the examples are.
            settings: how the stream is made, as JSON.
            fragment_rows: rows in a fragment.
            attribution_s: seconds of attribution by task.
            late_labels: "count" or "correct".
        """
        super().__init__(root, schema, settings, fragment_rows)
        self.attribution_s = attribution_s
        stored = {"attribution_s": dict(attribution_s), "late_labels": late_labels}
        write_json(root / ATTRIBUTION, stored)

        stream = EventStream(root, schema)
        self.label_log = LabelLog(stream, attribution_s, correct=late_labels == "correct")

    def window(
        self,
        index: int,
        start_ms: int,
        end_ms: int,
    ) -> WindowWriter:
        return _LabeledWindow(self, index, start_ms, end_ms)

    def finish(self, statistics: dict[str, Any]) -> None:
        """Release all windows that are left, then write the stream's manifest."""
        self.label_log.release(None)
        labels = self.label_log.statistics()
        super().finish(statistics | {"labels": labels})


class _LabeledWindow(WindowWriter):
    def __init__(
        self,
        writer: LabeledWriter,
        index: int,
        start_ms: int,
        end_ms: int,
    ) -> None:
        super().__init__(writer, index, start_ms, end_ms)
        self._labeled = writer
        self._labels: list[pa.Table] = [LOG_SCHEMA.empty_table()]

    def append(self, table: pa.Table, known_NT: Array | None = None) -> None:
        """Add packed rows with their true labels.

        Args:
            table: packed rows.
            known_NT: int64 (N, T), ms at which each label became known.
        """
        if self.committed:
            return
        assert known_NT is not None, "the source says when labels became known"
        schema = self._labeled.schema
        ids_N = table["example_id"].to_numpy()
        labels_NT = list_values(table["labels"], len(schema.tasks)).copy()
        for task in self._labeled.attribution_s:
            column = schema.task_index(task)
            positive_N = labels_NT[:, column] == 1
            self._log(task, ids_N[positive_N], known_NT[positive_N, column])
            labels_NT[:, column] = np.nan
        super().append(with_labels(table, labels_NT))

    def _log(
        self,
        task: str,
        ids: Array,
        times: Array,
    ) -> None:
        """Add positive labels to the window's part of the label log."""
        rows = len(ids)
        columns = [
            ids,
            [task] * rows,
            np.ones(rows, np.int8),
            times,
        ]
        labels = pa.table(columns, names=LOG_SCHEMA.names)
        self._labels.append(labels.cast(LOG_SCHEMA))

    def commit(self, duplicates: int) -> None:
        """Write the window and its part of the log, and release the windows whose time is over."""
        root = self._labeled.root
        label_log = self._labeled.label_log
        if not self.committed:
            labels = pa.concat_tables(self._labels)
            write_part(root, label_log.parts, labels)
        part = part_path(root, label_log.parts)
        assert part.exists()

        super().commit(duplicates)
        label_log.add_window(self.index)
        label_log.add_part()
        stream = EventStream(root, self._labeled.schema)
        window = stream.window(self.index)
        label_log.release(window.end_ms)
