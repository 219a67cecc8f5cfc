"""Events and labels from Kafka topics: JSON values, one object a message. Offsets are stored with
what was made of the messages.

The consumer belongs to no group and commits nothing to the broker: where it goes on is said by the
stream's own files alone, so that a kill neither loses nor doubles a message. Needs confluent-kafka
(`pip install exfm-ray[kafka]`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from exfm_ray.config.data import KafkaConfig
from exfm_ray.config.root import Config
from exfm_ray.data.follow.folder import END, Arrival, Position, followed_spec
from exfm_ray.data.labels.label_log import LOG_SCHEMA, check_labels
from exfm_ray.data.sources.table import TableFile
from exfm_ray.errors import UserError, nearest
from exfm_ray.schema import Encoding, Kind

Array = np.ndarray[Any, Any]
BATCH = 10_000
FREE = 2**62
"""After all times: nothing holds the watermark back."""
WAIT_S = 0.25
REACH_S = 30.0
"""Longest wait for an answer of the broker before the command fails."""


class KafkaArrivals:
    """The topics of `data.follow`; the stream ends when the file `_END` lies in `data.root` and all
    that was sent by then is read."""

    def __init__(self, config: Config) -> None:
        follow = config.data.follow
        assert follow and follow.kafka
        self.config = config
        self.spec = followed_spec(config)
        self._columns = _columns(self.spec, set(config.data.delayed))
        self._newest_ms: dict[int, int] = {}  # by partition
        self._held_ms = -FREE
        self._events = _Topic(follow.kafka, follow.kafka.topic)
        self._labels = _Topic(follow.kafka, follow.labels) if follow.labels else None

    def events(self, after: Position) -> Arrival | None:
        found = self._events.take(after, self._columns)
        if found is None:
            if self._held_ms == FREE:
                return None
            self._held_ms = FREE  # said once, when the last partition has come to its end
            return Arrival(pa.table({}), Path(self._events.name), after, FREE)
        rows, position, partition_N = found
        rows = _renamed(rows, self.spec, set(self.config.data.delayed))
        for partition in np.unique(partition_N).tolist():
            newest = pc.max(rows["event_time"].filter(pa.array(partition_N == partition))).as_py()
            self._newest_ms[partition] = max(
                self._newest_ms.get(partition, -FREE), newest if newest is not None else -FREE
            )
        self._held_ms = min(
            (self._newest_ms.get(p, -FREE) for p in self._events.behind()), default=FREE
        )
        return Arrival(rows, Path(self._events.name), position, self._held_ms)

    def labels(self, after: Position) -> Arrival | None:
        found = self._labels.take(after, LOG_SCHEMA) if self._labels else None
        if found is None or self._labels is None:
            return None
        rows, position, _ = found
        return Arrival(
            check_labels(rows, self.config.data.delayed, f"topic '{self._labels.name}'"),
            Path(self._labels.name),
            position,
        )

    def ended(self) -> bool:
        return (self.config.data.root / END).exists()


class _Topic:
    """All partitions of a topic, from any offsets on."""

    def __init__(self, config: KafkaConfig, name: str) -> None:
        try:
            import confluent_kafka as kafka
        except ImportError:
            raise UserError(
                "setting 'data.source' is 'kafka', which needs confluent-kafka: pip install exfm-ray[kafka]"
            ) from None
        self.name = name
        self._kafka = kafka
        own = {
            "bootstrap.servers": config.servers,
            "group.id": "exfm-ray",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
        }
        try:
            self._consumer = kafka.Consumer({**config.resolved(), **own})
            topics = self._consumer.list_topics(timeout=REACH_S).topics
        except (kafka.KafkaException, ValueError, TypeError) as error:
            raise UserError(
                f"kafka at {config.servers}: {error}; see data.follow.kafka.servers and options"
            ) from None
        if name not in topics:
            raise UserError(f"kafka at {config.servers}: no topic '{name}'.{nearest(name, topics)}")
        self._partitions = sorted(topics[name].partitions)
        self._position: Position | None = None

    def behind(self) -> list[int]:
        """Partitions of which more is to be read."""
        return [p for p in self._partitions if p not in self._at_end]

    def take(self, after: Position, columns: pa.Schema) -> tuple[pa.Table, Position, Array] | None:
        """The next messages behind the offsets `after` (partition -> next offset): columns, the
        offsets behind them, their partitions; None at the end of all partitions."""
        if self._position != after:
            first = self._kafka.OFFSET_BEGINNING
            self._consumer.assign(
                [
                    self._kafka.TopicPartition(self.name, p, after.get(str(p), first))
                    for p in self._partitions
                ]
            )
            self._position = dict(after)
            self._at_end = set[int]()
        messages: list[Any] = []
        while not messages:
            for message in self._consumer.consume(BATCH, WAIT_S):
                if message.error() is None:
                    messages.append(message)
                    self._at_end.discard(message.partition())
                elif message.error().code() == self._kafka.KafkaError._PARTITION_EOF:
                    self._at_end.add(message.partition())
                else:
                    raise UserError(
                        f"topic '{self.name}', partition {message.partition()}: {message.error().str()}"
                    )
            if not messages and not self.behind():
                return None
        position = self._position | {str(m.partition()): m.offset() + 1 for m in messages}
        rows = _parse(messages, columns, self.name)
        self._position = position
        return rows, position, np.array([m.partition() for m in messages])


def _parse(
    messages: Sequence[Any],
    columns: pa.Schema,
    topic: str,
) -> pa.Table:
    """JSON objects as a table of `columns`; fields that are not named are left out, those that are
    missing are null."""
    options = pj.ParseOptions(
        explicit_schema=columns, newlines_in_values=True, unexpected_field_behavior="ignore"
    )

    def read(some: Sequence[Any]) -> pa.Table:
        return pj.read_json(
            io.BytesIO(b"\n".join(m.value() or b"" for m in some)), parse_options=options
        )

    try:
        table = read(messages)
        if table.num_rows == len(messages):
            return table
    except pa.ArrowException:
        pass
    for message in messages:  # find the one at fault
        reason = "no JSON object"
        try:
            if read([message]).num_rows == 1:
                continue
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
        raise UserError(
            f"topic '{topic}', partition {message.partition()}, offset {message.offset()}: cannot be read ({reason})"
        )
    raise UserError(
        f"topic '{topic}': {len(messages)} messages hold {table.num_rows} objects; send one in each"
    )


def _columns(spec: TableFile, awaited: set[str]) -> pa.Schema:
    """Types come from the schema file: what is hashed is text, what is an index an integer."""
    schema = spec.table_schema
    text = pa.string()
    whole = pa.int64()
    number = pa.float64()
    assert spec.event_time and spec.example_id
    fields = {
        spec.example_id: whole,
        spec.event_time.column: {"s": number, "iso": text}.get(spec.event_time.unit, whole),
    }
    for feature in schema.features:
        kind = whole if feature.encoding is Encoding.INDEX else text
        fields[feature.name] = kind if feature.kind is Kind.SINGLE else pa.list_(kind)
    fields |= dict.fromkeys(
        [*(d.name for d in schema.dense), *(t for t in schema.tasks if t not in awaited)], number
    )
    return pa.schema(list((fields | ({spec.domain: text} if spec.domain else {})).items()))


def _renamed(
    rows: pa.Table,
    spec: TableFile,
    awaited: set[str],
) -> pa.Table:
    """The source's columns by our names, times in ms."""
    assert spec.event_time and spec.example_id
    schema = spec.table_schema
    at = rows[spec.event_time.column]
    try:
        times = {
            "s": lambda: pc.round(pc.multiply(at, 1000)),
            "ms": lambda: at,
            "us": lambda: pc.divide(at, 1000),
            "iso": lambda: pc.cast(
                at, pa.timestamp("ms", tz="UTC") if _zoned(at) else pa.timestamp("ms")
            ),
        }[spec.event_time.unit]()
    except pa.ArrowInvalid as error:
        raise UserError(
            f"column '{spec.event_time.column}': {error}; see `event_time` in the schema file"
        ) from None
    names = [
        *(f.name for f in schema.features),
        *(d.name for d in schema.dense),
        *(t for t in schema.tasks if t not in awaited),
    ]
    columns = {name: rows[name] for name in names} | {
        "event_time": times.cast(pa.int64()),
        "example_id": rows[spec.example_id],
    }
    return pa.table(columns | ({"domain": rows[spec.domain]} if spec.domain else {}))


def _zoned(at: pa.ChunkedArray) -> bool:
    return bool(len(at) and str(at[0].as_py()).endswith(("Z", "+00:00")))
