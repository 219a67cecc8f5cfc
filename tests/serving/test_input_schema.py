"""schema.json: what it says of ids suffices to compute their rows, without the code that prepared
them."""

from __future__ import annotations

import struct
from pathlib import Path

import pyarrow as pa
import pytest
from example import SCHEMA, make_stream

from exfm_ray.data.prepare.encode import hash_rows
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.serving.input_schema import served_schema
from exfm_ray.storage.atomic import read_json, write_json

MASK = 2**64 - 1


def siphash(data: bytes, key: bytes) -> int:
    """SipHash-2-4 after Aumasson and Bernstein (2012), section 2."""
    k0, k1 = struct.unpack("<QQ", key)
    v0 = k0 ^ 0x736F6D6570736575
    v1 = k1 ^ 0x646F72616E646F6D
    v2 = k0 ^ 0x6C7967656E657261
    v3 = k1 ^ 0x7465646279746573

    def turn(x: int, by: int) -> int:
        return (x << by | x >> (64 - by)) & MASK

    def rounds(count: int) -> None:
        nonlocal v0, v1, v2, v3
        for _ in range(count):
            v0 = (v0 + v1) & MASK
            v2 = (v2 + v3) & MASK
            v1 = turn(v1, 13) ^ v0
            v3 = turn(v3, 16) ^ v2
            v0 = turn(v0, 32)
            v2 = (v2 + v1) & MASK
            v0 = (v0 + v3) & MASK
            v1 = turn(v1, 17) ^ v2
            v3 = turn(v3, 21) ^ v0
            v2 = turn(v2, 32)

    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) % 256])
    for (word,) in struct.iter_unpack("<Q", padded):
        v3 ^= word
        rounds(2)
        v0 ^= word
    v2 ^= 0xFF
    rounds(4)
    return v0 ^ v1 ^ v2 ^ v3


def mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def row(value: str | int | float, content: dict[str, object]) -> int:
    """The row of a raw value by the words of schema.json."""
    if isinstance(value, str):
        bits = mix(siphash(value.encode(), b"0123456789123456"))
    else:
        bits = int.from_bytes(
            struct.pack("<d" if isinstance(value, float) else "<q", value), "little"
        )
    return (
        mix(((bits ^ int(str(content["salt"]), 16)) + 0x9E3779B97F4A7C15) & MASK)
        % (int(str(content["rows"])) - 1)
        + 1
    )


@pytest.fixture
def stream(tmp_path: Path) -> EventStream:
    stream = make_stream(tmp_path / "stream", windows=1, rows=10)
    moments = {
        "age": {"count": 10.0, "mean": 30.0, "std": 4.0},
        "price": {"count": 10.0, "mean": 1.0, "std": 0.5},
    }
    write_json(
        stream.root / "manifest.json",
        {**read_json(stream.root / "manifest.json"), "dense": moments},
    )
    return stream


def test_siphash_is_siphash() -> None:
    """Wrong: the next test proves something about another hash. Vectors: the first two of SipHash's
    reference implementation."""
    assert [siphash(data, bytes(range(16))) for data in (b"", b"\0")] == [
        0x726FDB47DD0E0E31,
        0x74F839C593DC67FD,
    ]


def test_rows_can_be_computed_from_the_file(stream: EventStream) -> None:
    """Wrong: a server in another language looks an id up in another row than training did."""
    content = served_schema(SCHEMA, stream)
    table = content["tables"]["user"]
    assert [[kind, value, row(value, table)] for kind, value, _ in table["examples"]] == table[
        "examples"
    ]
    texts = ["user7", "an id of more than eight bytes", "8 bytes.", "köln"]
    for values in (texts, [5, -7, 2**40], [0.25, -1e9]):
        assert [row(value, table) for value in values] == hash_rows(
            pa.array(values), "user", 101
        ).tolist()


def test_columns_are_in_the_graphs_order(stream: EventStream) -> None:
    """Wrong: a server puts a feature into another's column, or normalizes by another's mean."""
    content = served_schema(SCHEMA, stream)
    assert [column["name"] for column in content["sparse_BS"]] == ["user", "ad", "hour", "domain"]
    assert [(bag["name"], bag["table"], bag["max_length"]) for bag in content["bags"]] == [
        ("keywords", "keywords", 3),
        ("clicked_ads", "ad", 5),
    ]
    assert content["dense_BD"][1] == {
        "name": "price",
        "transform": "log1p",
        "mean": 1.0,
        "std": 0.5,
    }
    assert content["domains"] == {"feed": 1, "search": 2, "stories": 3} and content["tables"][
        "domain"
    ] == {"rows": 4, "encoding": "index"}


def test_a_stream_without_moments_is_refused(stream: EventStream) -> None:
    """Wrong: a student is served with dense features that no server can normalize."""
    write_json(stream.root / "manifest.json", {"windows": [0]})
    with pytest.raises(
        UserError, match="has no mean and std of dense feature 'age'; prepare the stream again"
    ):
        served_schema(SCHEMA, stream)
