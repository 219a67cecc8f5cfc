"""The tensors of a checkpoint, independent of the number of workers that write and read them.

Every worker writes one safetensors file with the tensors that it holds. A tensor that is spread
over workers is stored as chunks along its first axis, named `name@first`, where `first` is the
chunk's first index; a reader takes the range that it needs from the chunks that overlap it. A
tensor that is not spread has its plain name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exfm_ray.errors import UserError

RowNumbers = np.ndarray[Any, np.dtype[np.int64]]
"""Row numbers of a table, ascending."""


class _Chunk(NamedTuple):
    first: int
    file: Any
    key: str


class ShardedTensors:
    """Tensors by name, read from their files on access."""

    def __init__(self, chunks: Mapping[str, Sequence[_Chunk]]) -> None:
        self._chunks = chunks

    @classmethod
    def open(cls, paths: Sequence[Path]) -> ShardedTensors:
        """Open the tensors of some files.

        Raises:
            UserError: a file is not a safetensors file.
        """
        chunks: dict[str, list[_Chunk]] = {}
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a readable safetensors file ({error})") from None
            for key in file.keys():  # noqa: SIM118  # the file is not a mapping
                name, at, first = key.rpartition("@")
                if not at:
                    name = key
                    first = "0"
                chunk = _Chunk(int(first), file, key)
                chunks.setdefault(name, []).append(chunk)

        for of_tensor in chunks.values():
            of_tensor.sort(key=lambda chunk: chunk.first)
        return cls(chunks)

    def with_prefix(self, prefix: str) -> ShardedTensors:
        """Return the tensors whose names begin with `prefix`/, named without it."""
        start = prefix + "/"
        matches = {}
        for name, chunks in self._chunks.items():
            if name.startswith(start):
                matches[name.removeprefix(start)] = chunks
        return ShardedTensors(matches)

    def __contains__(self, name: str) -> bool:
        return name in self._chunks

    def __iter__(self) -> Iterator[str]:
        return iter(self._chunks)

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor that is not spread."""
        chunk = self._stored_chunks(name)[0]
        tensor: Tensor = chunk.file.get_tensor(chunk.key)
        return tensor

    def slice(
        self,
        name: str,
        first: int,
        count: int,
    ) -> Tensor:
        """Read `count` entries along the first axis of a tensor, starting at `first`.

        Raises:
            UserError: no chunk holds one of the entries.
        """
        pieces: list[Tensor] = []
        position = first
        end = first + count
        for chunk in self._stored_chunks(name):
            stored = chunk.file.get_slice(chunk.key)
            chunk_end = chunk.first + stored.get_shape()[0]
            piece_end = min(chunk_end, end)
            if chunk.first <= position < piece_end:
                piece = stored[position - chunk.first : piece_end - chunk.first]
                pieces.append(piece)
                position = piece_end

        if position < end:
            raise UserError(
                f"checkpoint: '{name}' has no entries {position} to {end - 1}; "
                "it was written by another model"
            )
        return torch.cat(pieces) if pieces else stored[:0]

    def _stored_chunks(self, name: str) -> Sequence[_Chunk]:
        if name not in self._chunks:
            raise UserError(f"checkpoint: no tensor '{name}'; it was written by another model")
        return self._chunks[name]


def cpu_copy(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that later steps do not change."""
    copy = tensor.detach().to("cpu", copy=True)
    return copy.contiguous()


class RowUpdate(NamedTuple):
    """Rows to write into a table.

    Attributes:
        id_X: row numbers.
        row_XW: the rows, float32.
        momentum_X: their Adagrad state, None to keep the table's.
    """

    id_X: RowNumbers
    row_XW: Tensor
    momentum_X: Tensor | None
