"""The tensors of a checkpoint, whichever workers wrote them and however many read them.

Every worker writes one safetensors file of what it holds. A tensor that is spread over workers is
kept in stretches along its first axis, named `name@first`, where `first` is the stretch's first
index; whoever reads takes the stretch that it needs from those that overlap it. A tensor that is
not spread has its plain name. So nothing in a checkpoint depends on the number of workers.
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


class _Chunk(NamedTuple):
    first: int
    file: Any
    key: str


class ShardedTensors:
    """Tensors by name, read when asked for."""

    def __init__(self, places: Mapping[str, Sequence[_Chunk]]) -> None:
        self._places = places

    @classmethod
    def open(cls, paths: Sequence[Path]) -> ShardedTensors:
        """The tensors of some files; UserError where one of them is none of safetensors."""
        places: dict[str, list[_Chunk]] = {}
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a readable safetensors file ({error})") from None
            for key in file.keys():  # noqa: SIM118  # no mapping, only its method's name
                name, at, first = key.rpartition("@")
                slice = _Chunk(int(first), file, key) if at else _Chunk(0, file, key)
                places.setdefault(name if at else key, []).append(slice)
        return cls(
            {name: sorted(found, key=lambda slice: slice.first) for name, found in places.items()}
        )

    def with_prefix(self, prefix: str) -> ShardedTensors:
        """Those whose names begin with `prefix`/, without it."""
        start = prefix + "/"
        return ShardedTensors(
            {
                name.removeprefix(start): found
                for name, found in self._places.items()
                if name.startswith(start)
            }
        )

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor that is not spread."""
        tensor: Tensor = self._found(name)[0].file.get_tensor(self._found(name)[0].key)
        return tensor

    def slice(
        self,
        name: str,
        first: int,
        count: int,
    ) -> Tensor:
        """`count` entries along the first axis, from `first` on."""
        pieces: list[Tensor] = []
        position = first
        end = first + count
        for slice in self._found(name):
            stored = slice.file.get_slice(slice.key)
            last = slice.first + stored.get_shape()[0]
            if slice.first <= position < min(last, end):
                pieces.append(stored[position - slice.first : min(last, end) - slice.first])
                position = min(last, end)
        if position < end:
            raise UserError(
                f"checkpoint: '{name}' has no entries {position} to {end - 1}; it was written by another model"
            )
        return torch.cat(pieces) if pieces else stored[:0]

    def _found(self, name: str) -> Sequence[_Chunk]:
        if name not in self._places:
            raise UserError(f"checkpoint: no tensor '{name}'; it was written by another model")
        return self._places[name]


def cpu_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU that later steps do not change."""
    return tensor.detach().to("cpu", copy=True).contiguous()


class RowUpdate(NamedTuple):
    """Rows to be written into a table: their numbers, int64 ascending (X), the rows (X, W), and
    their Adagrad state (X) unless they keep it."""

    id_X: np.ndarray[Any, np.dtype[np.int64]]
    row_XW: Tensor
    momentum_X: Tensor | None
