"""Which rows a pass over a window reads."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from exfm_ray.data.labels.corrections import learnt_fragments, with_corrections
from exfm_ray.data.labels.releases import is_released, with_released_labels
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.storage.remote import AnyPath


@dataclass(frozen=True)
class WindowPass:
    """One reading of a window. `number`: of the pass over a static set, counted from 1; 0 in a
    stream, which is read once."""

    window: int
    purpose: Literal["evaluate", "learn"]
    number: int = 0


class FragmentReader(Protocol):
    """Reads the rows that a job needs; runs in Ray Data's tasks, so it is small and can be
    serialised."""

    def ready(self, work: WindowPass) -> bool:
        """True when all that the pass needs is committed."""
        ...

    def missing_input(self, work: WindowPass) -> str:
        """What `ready` waits for, for the error message."""
        ...

    def fragments(self, work: WindowPass) -> Sequence[Fragment]:
        """The fragments of a ready pass; each becomes exactly one block."""
        ...

    def read(self, work: WindowPass, fragment: Fragment) -> pa.Table:
        """Packed rows of one fragment."""
        ...


@dataclass(frozen=True)
class StreamReader:
    """All rows of a stream's windows, with the released labels of `tasks`; to learn, with the
    corrections that it delivers among them."""

    root: AnyPath
    tasks: tuple[str, ...] = ()

    def ready(self, work: WindowPass) -> bool:
        return is_released(EventStream.open(self.root), work.window, self.tasks)

    def missing_input(self, work: WindowPass) -> str:
        return f"window {work.window} of {self.root} and its labels"

    def fragments(self, work: WindowPass) -> Sequence[Fragment]:
        stream = EventStream.open(self.root)
        if work.purpose == "learn":
            return learnt_fragments(stream, work.window, self.tasks)
        return stream.window(work.window).fragments

    def read(self, work: WindowPass, fragment: Fragment) -> pa.Table:
        stream = EventStream.open(self.root)

        def own() -> pa.Table:
            return with_released_labels(stream, work.window, fragment, self.tasks)

        return (
            with_corrections(stream, work.window, fragment, self.tasks, own, stream.read)
            if work.purpose == "learn"
            else own()
        )


@dataclass(frozen=True)
class ShuffledReader(StreamReader):
    """For passes that learn, the fragments come in an order drawn from the seed and the pass, and
    so do the rows of each fragment.

    Rows stay within their fragment: `data.fragment_rows` is the buffer of the shuffle. Passes that
    evaluate keep the order.
    """

    seed: int = 0

    def fragments(self, work: WindowPass) -> Sequence[Fragment]:
        fragments = super().fragments(work)
        if work.purpose == "evaluate":
            return fragments
        return [fragments[i] for i in self._generator(work, 0).permutation(len(fragments))]

    def read(self, work: WindowPass, fragment: Fragment) -> pa.Table:
        table = super().read(work, fragment)
        if work.purpose == "evaluate":
            return table
        return table.take(
            pa.array(
                self._generator(work, zlib.crc32(fragment.file.encode())).permutation(
                    table.num_rows
                )
            )
        )

    def _generator(self, work: WindowPass, part: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, work.number, work.window, part])
