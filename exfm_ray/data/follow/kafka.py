"""Events and labels from Kafka topics: JSON values, one object a message.

The consumer belongs to no group and commits nothing to the broker. Offsets are stored in the
stream's own files, with the windows and labels made of the messages, so that a kill neither loses
nor doubles a message. Needs confluent-kafka (`pip install exfm-ray[kafka]`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from exfm_ray.config.data import KafkaConfig
from exfm_ray.config.root import Config
from exfm_ray.data.follow.folder import END, Arrival, Position, followed_spec
from exfm_ray.data.labels.label_log import LOG_SCHEMA, check_labels
from exfm_ray.data.sources.schema_file import TableFile
from exfm_ray.errors import UserError, nearest
from exfm_ray.schema import Encoding, Kind, SparseFeature

Array = np.ndarray[Any, Any]
BATCH = 10_000
FREE = 2**62
"""After all times: no partition delays the watermark."""
WAIT_S = 0.25
REACH_S = 30.0
"""Longest wait for an answer of the broker before the command fails."""


class KafkaArrivals:
    """The topics of `data.follow`.

    The stream ends when the file `_END` lies in `data.root` and everything sent by then is read.
    """

    def __init__(self, config: Config) -> None:
        follow = config.data.follow
        assert follow and follow.kafka
        self.config = config
        self.spec = followed_spec(config)
        self._delayed = set(config.data.delayed)
        self._columns = _columns(self.spec, self._delayed)
        self._newest_ms: dict[int, int] = {}  # by partition
        self._held_ms = -FREE
        self._events = _Topic(follow.kafka, follow.kafka.topic)
        self._labels = _Topic(follow.kafka, follow.labels) if follow.labels else None

    def events(self, after: Position) -> Arrival | None:
        name = Path(self._events.name)
        messages = self._events.take(after, self._columns)
        if messages is None:
            if self._held_ms == FREE:
                return None
            self._held_ms = FREE  # reported once, when the last partition reaches its end
            return Arrival(pa.table({}), name, after, FREE)

        rows = _renamed(messages.rows, self.spec, self._delayed)
        self._note_newest(rows["event_time"], messages.partition_N)
        behind = [self._newest(partition) for partition in self._events.behind()]
        self._held_ms = min(behind, default=FREE)
        return Arrival(rows, name, messages.position, self._held_ms)

    def _note_newest(self, times: pa.ChunkedArray, partition_N: Array) -> None:
        """Note the newest event time of each partition."""
        for partition in np.unique(partition_N).tolist():
            in_partition_N = pa.array(partition_N == partition)
            newest_ms = pc.max(times.filter(in_partition_N)).as_py()
            if newest_ms is None:
                newest_ms = -FREE
            self._newest_ms[partition] = max(self._newest(partition), newest_ms)

    def _newest(self, partition: int) -> int:
        return self._newest_ms.get(partition, -FREE)

    def labels(self, after: Position) -> Arrival | None:
        if self._labels is None:
            return None
        messages = self._labels.take(after, LOG_SCHEMA)
        if messages is None:
            return None
        topic = self._labels.name
        tasks = self.config.data.delayed
        rows = check_labels(messages.rows, tasks, f"topic '{topic}'")
        return Arrival(rows, Path(topic), messages.position)

    def ended(self) -> bool:
        marker = self.config.data.root / END
        return marker.exists()


class _Messages(NamedTuple):
    """Messages as columns, the position behind them, and the partition of each."""

    rows: pa.Table
    position: Position
    partition_N: Array


class _Topic:
    """All partitions of a topic, from any offsets on."""

    def __init__(self, config: KafkaConfig, name: str) -> None:
        try:
            import confluent_kafka as kafka
        except ImportError:
            raise UserError(
                "setting 'data.source' is 'kafka', which needs confluent-kafka: "
                "pip install exfm-ray[kafka]"
            ) from None
        self.name = name
        self._kafka = kafka
        fixed = {
            "bootstrap.servers": config.servers,
            "group.id": "exfm-ray",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
        }
        try:
            self._consumer = kafka.Consumer({**config.resolved(), **fixed})
            topics = self._consumer.list_topics(timeout=REACH_S).topics
        except (kafka.KafkaException, ValueError, TypeError) as error:
            raise UserError(
                f"kafka at {config.servers}: {error}; see data.follow.kafka.servers and options"
            ) from None
        if name not in topics:
            raise UserError(f"kafka at {config.servers}: no topic '{name}'.{nearest(name, topics)}")
        self._partitions = sorted(topics[name].partitions)
        self._position: Position = {}
        self._assigned = False
        self._at_end: set[int] = set()

    def behind(self) -> list[int]:
        """Partitions that have more messages to read."""
        at_end = self._at_end
        return [partition for partition in self._partitions if partition not in at_end]

    def take(self, after: Position, columns: pa.Schema) -> _Messages | None:
        """The next messages behind offsets, or None at the end of all partitions.

        Args:
            after: next offset of each partition.
            columns: columns of the messages.
        """
        self._seek(after)
        messages: list[Any] = []
        while not messages:
            for message in self._consumer.consume(BATCH, WAIT_S):
                if self._is_row(message):
                    messages.append(message)
            if not messages and not self.behind():
                return None

        position = dict(self._position)
        for message in messages:
            partition = str(message.partition())
            position[partition] = message.offset() + 1
        rows = _parse(messages, columns, self.name)
        self._position = position
        partition_N = np.array([message.partition() for message in messages])
        return _Messages(rows, position, partition_N)

    def _seek(self, after: Position) -> None:
        """Continue at these offsets, unless the consumer stands there already."""
        if self._assigned and self._position == after:
            return
        first = self._kafka.OFFSET_BEGINNING
        partitions = []
        for partition in self._partitions:
            offset = after.get(str(partition), first)
            start = self._kafka.TopicPartition(self.name, partition, offset)
            partitions.append(start)
        self._consumer.assign(partitions)
        self._assigned = True
        self._position = dict(after)
        self._at_end = set()

    def _is_row(self, message: Any) -> bool:
        """True for a message with a value. Notes partitions that are read to their end."""
        partition = message.partition()
        error = message.error()
        if error is None:
            self._at_end.discard(partition)
            return True
        if error.code() != self._kafka.KafkaError._PARTITION_EOF:
            raise UserError(f"topic '{self.name}', partition {partition}: {error.str()}")
        self._at_end.add(partition)
        return False


def _parse(
    messages: Sequence[Any],
    columns: pa.Schema,
    topic: str,
) -> pa.Table:
    """JSON objects as a table of `columns`. Other fields are left out, missing ones are null."""
    try:
        table = _parse_json(messages, columns)
    except pa.ArrowException:
        _raise_first_bad(messages, columns, topic)
        raise
    if table.num_rows == len(messages):
        return table
    _raise_first_bad(messages, columns, topic)
    raise UserError(
        f"topic '{topic}': {len(messages)} messages hold {table.num_rows} objects; send one in each"
    )


def _parse_json(messages: Sequence[Any], columns: pa.Schema) -> pa.Table:
    options = pj.ParseOptions(
        explicit_schema=columns,
        newlines_in_values=True,
        unexpected_field_behavior="ignore",
    )
    values = [message.value() or b"" for message in messages]
    lines = io.BytesIO(b"\n".join(values))
    return pj.read_json(lines, parse_options=options)


def _raise_first_bad(
    messages: Sequence[Any],
    columns: pa.Schema,
    topic: str,
) -> None:
    """Raise UserError for the first message that holds no readable object, if there is one."""
    for message in messages:
        reason = "no JSON object"
        try:
            table = _parse_json([message], columns)
            if table.num_rows == 1:
                continue
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
        place = f"partition {message.partition()}, offset {message.offset()}"
        raise UserError(f"topic '{topic}', {place}: cannot be read ({reason})")


def _columns(spec: TableFile, delayed: set[str]) -> pa.Schema:
    """The columns of event messages.

    Types come from the schema file: hashed features are text, features with `encoding: index` are
    integers. Tasks in `delayed` have no column.
    """
    schema = spec.table_schema
    assert spec.event_time and spec.example_id
    time_types = {"s": pa.float64(), "iso": pa.string()}
    fields = {
        spec.example_id: pa.int64(),
        spec.event_time.column: time_types.get(spec.event_time.unit, pa.int64()),
    }
    for feature in schema.features:
        fields[feature.name] = _feature_type(feature)
    for dense in schema.dense:
        fields[dense.name] = pa.float64()
    for task in schema.tasks:
        if task not in delayed:
            fields[task] = pa.float64()
    if spec.domain:
        fields[spec.domain] = pa.string()
    return pa.schema(list(fields.items()))


def _feature_type(feature: SparseFeature) -> pa.DataType:
    value = pa.string()
    if feature.encoding is Encoding.INDEX:
        value = pa.int64()
    if feature.kind is Kind.SINGLE:
        return value
    return pa.list_(value)


def _renamed(
    rows: pa.Table,
    spec: TableFile,
    delayed: set[str],
) -> pa.Table:
    """The source's columns under the names that the packer expects, times in ms."""
    assert spec.event_time and spec.example_id
    schema = spec.table_schema
    at = rows[spec.event_time.column]
    try:
        times = _milliseconds(at, spec.event_time.unit)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"column '{spec.event_time.column}': {error}; see `event_time` in the schema file"
        ) from None

    names = [
        *(feature.name for feature in schema.features),
        *(feature.name for feature in schema.dense),
        *(task for task in schema.tasks if task not in delayed),
    ]
    columns = {name: rows[name] for name in names}
    columns["event_time"] = times.cast(pa.int64())
    columns["example_id"] = rows[spec.example_id]
    if spec.domain:
        columns["domain"] = rows[spec.domain]
    return pa.table(columns)


def _milliseconds(at: pa.ChunkedArray, unit: str) -> pa.ChunkedArray:
    """Times in ms since the epoch."""
    if unit == "ms":
        return at
    if unit == "s":
        milliseconds = pc.multiply(at, 1000)
        return pc.round(milliseconds)
    if unit == "us":
        return pc.divide(at, 1000)
    zone = "UTC" if _has_zone(at) else None
    timestamp = pa.timestamp("ms", tz=zone)
    return pc.cast(at, timestamp)


def _has_zone(at: pa.ChunkedArray) -> bool:
    """True when the first time ends in a time zone."""
    if not len(at):
        return False
    first = str(at[0].as_py())
    return first.endswith(("Z", "+00:00"))
