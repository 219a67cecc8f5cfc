"""Which rows a pass over a window reads."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from exfm_ray.data.labels.corrections import learned_fragments, with_corrections
from exfm_ray.data.labels.releases import is_released, with_released_labels
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.storage.remote import AnyPath


@dataclass(frozen=True)
class WindowPass:
    """One reading of a window.

    Attributes:
        window: index of the window.
        purpose: whether the rows are evaluated or learned.
        number: of the pass over a static set, counted from 1; 0 in a stream, which is read once.
    """

    window: int
    purpose: Literal["evaluate", "learn"]
    number: int = 0


class FragmentReader(Protocol):
    """Reads the rows that a job needs. Runs in Ray Data's tasks, so it is small and picklable."""

    def ready(self, window_pass: WindowPass) -> bool:
        """True when everything that the pass needs is committed."""
        ...

    def missing_input(self, window_pass: WindowPass) -> str:
        """What `ready` waits for, in words for an error message."""
        ...

    def fragments(self, window_pass: WindowPass) -> Sequence[Fragment]:
        """The fragments of a ready pass; each becomes exactly one block."""
        ...

    def read(self, window_pass: WindowPass, fragment: Fragment) -> pa.Table:
        """Packed rows of one fragment."""
        ...


@dataclass(frozen=True)
class StreamReader:
    """All rows of a stream's windows, with the released labels of `tasks`.

    A pass that learns also gets the corrections that its window delivers.
    """

    root: AnyPath
    tasks: tuple[str, ...] = ()

    def ready(self, window_pass: WindowPass) -> bool:
        stream = EventStream.open(self.root)
        return is_released(stream, window_pass.window, self.tasks)

    def missing_input(self, window_pass: WindowPass) -> str:
        window = window_pass.window
        return f"window {window} of {self.root} and its labels"

    def fragments(self, window_pass: WindowPass) -> Sequence[Fragment]:
        stream = EventStream.open(self.root)
        if window_pass.purpose == "learn":
            return learned_fragments(stream, window_pass.window, self.tasks)
        window = stream.window(window_pass.window)
        return window.fragments

    def read(self, window_pass: WindowPass, fragment: Fragment) -> pa.Table:
        stream = EventStream.open(self.root)
        window = window_pass.window

        def read_events() -> pa.Table:
            return with_released_labels(stream, window, fragment, self.tasks)

        if window_pass.purpose == "evaluate":
            return read_events()
        return with_corrections(stream, window, fragment, self.tasks, read_events, stream.read)


@dataclass(frozen=True)
class ShuffledReader(StreamReader):
    """Shuffles the fragments of a pass that learns, and the rows within each fragment.

    The order is drawn from the seed and the pass. Rows stay within their fragment:
    `data.fragment_rows` is the buffer of the shuffle. Passes that evaluate keep the order.
    """

    seed: int = 0

    def fragments(self, window_pass: WindowPass) -> Sequence[Fragment]:
        fragments = super().fragments(window_pass)
        if window_pass.purpose == "evaluate":
            return fragments
        count = len(fragments)
        generator = self._generator(window_pass, 0)
        shuffled = generator.permutation(count)
        return [fragments[i] for i in shuffled]

    def read(self, window_pass: WindowPass, fragment: Fragment) -> pa.Table:
        table = super().read(window_pass, fragment)
        if window_pass.purpose == "evaluate":
            return table
        part = zlib.crc32(fragment.file.encode())
        generator = self._generator(window_pass, part)
        shuffled = generator.permutation(table.num_rows)
        return table.take(pa.array(shuffled))

    def _generator(self, window_pass: WindowPass, part: int) -> np.random.Generator:
        entropy = [
            self.seed,
            window_pass.number,
            window_pass.window,
            part,
        ]
        return np.random.default_rng(entropy)
