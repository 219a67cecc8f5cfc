"""Checkpoints on disk: safetensors and JSON with hashes, whole or absent, the newest few kept.

<root>/windows=003/                    at the end of a window
<root>/windows=003.examples=00051200/  inside the next one, after so many of its examples
    state.rank0000.safetensors         the part of the state that worker 0 holds, see `loop_state`
    state.rank0000.json                hash of that file
    manifest.json                      written last: how far the job is, hashes of the files,
                                       timings
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from exfm_ray.base import FrozenModel
from exfm_ray.engine.tensor_store import ShardedTensors
from exfm_ray.errors import UserError
from exfm_ray.metrics.state import MetricState
from exfm_ray.storage.atomic import sha256, short_hash
from exfm_ray.storage.manifest import read_manifest
from exfm_ray.training.loop import Loop, LoopProgress, Timing
from exfm_ray.training.loop_state import metric_states, restore_loop
from exfm_ray.training.metric_rows import Key

MANIFEST = "manifest.json"
NAME = re.compile(r"windows=(\d+)(?:\.examples=(\d+))?")
MAX_DAMAGED = 1000
"""Most folders of damaged checkpoints of the same name."""


class Cursor(NamedTuple):
    """How far a job is.

    Attributes:
        windows: learned as a whole; passes, over a static set.
        examples: learned of the next one.
        passes: how many passes of the next one are done, such as its evaluation.
    """

    windows: int
    examples: int = 0
    passes: int = 0


BEGINNING = Cursor(0)


class Manifest(FrozenModel):
    """The manifest of a checkpoint.

    Attributes:
        files: name -> SHA-256.
        teacher: version of the snapshot that supervised the last window learned; None without.
        underway: the `LoopProgress` inside a window.
        stopping: the state of early stopping, for a static set.
        digest: of all other fields.
    """

    windows: int
    examples: int
    workers: int
    files: dict[str, str]
    teacher: int | None
    timings: list[dict[str, float]]
    underway: dict[str, Any] | None
    stopping: dict[str, Any] | None
    digest: str = ""

    def sealed(self) -> Manifest:
        """The same manifest with the digest of all other fields."""
        content = self.model_dump(mode="json", exclude={"digest"})
        return self.model_copy(update={"digest": short_hash(content)})

    @property
    def cursor(self) -> Cursor:
        """How far the job was."""
        passes = self.underway["work"] if self.underway else 0
        return Cursor(self.windows, self.examples, passes)


@dataclass(frozen=True)
class JobResult:
    """Figures of a job.

    Attributes:
        states: metric states summed over the windows after the warm-up.
        timings: of each window, or pass over a static set.
    """

    states: dict[Key, MetricState]
    timings: list[Timing]

    @property
    def examples(self) -> int:
        """Examples learned."""
        return sum(t.examples for t in self.timings)

    @property
    def seconds(self) -> float:
        """Seconds of evaluating and learning, without the job's start and its checkpoints."""
        return sum(t.evaluate_s + t.learn_s for t in self.timings)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training job."""

    root: Path

    def folder(self, cursor: Cursor) -> Path:
        """The folder of a checkpoint."""
        inside = f".examples={cursor.examples:08d}" if cursor.examples else ""
        return self.root / f"windows={cursor.windows:03d}{inside}"

    def committed(self) -> list[Path]:
        """Folders of the whole checkpoints, the oldest first."""
        manifests = self.root.glob(f"windows=*/{MANIFEST}")
        folders = [path.parent for path in manifests if NAME.fullmatch(path.parent.name)]
        return sorted(folders, key=_position)

    def latest(self) -> Cursor:
        """How far the job was at the newest whole checkpoint; `BEGINNING` without any."""
        folders = self.committed()
        return _manifest(folders[-1]).cursor if folders else BEGINNING

    def set_aside_damaged(self) -> Iterator[str]:
        """Rename the newest checkpoints as long as they are damaged, so that an older one is used.

        Yields:
            A message for each damaged checkpoint, and for each newer folder without a manifest.
        """
        for folder in reversed(self.committed()):
            damage = _damage(folder)
            if damage is None:
                break
            renamed = folder.rename(_unused_name(folder))
            yield (
                f"checkpoint {folder} is damaged ({damage}); {self._resume_message()}. "
                f"It was renamed to {renamed.name}"
            )
        yield from self._folders_without_manifest()

    def _folders_without_manifest(self) -> Iterator[str]:
        """A message for each folder that is newer than all checkpoints and not one itself."""
        committed = self.committed()
        newest = _position(committed[-1]) if committed else (-1, -1)
        folders = [path for path in self.root.glob("windows=*") if NAME.fullmatch(path.name)]
        for folder in sorted(folders):
            if folder in committed or _position(folder) <= newest:
                continue
            yield (
                f"checkpoint {folder} has no {MANIFEST} and is not used: the run was killed "
                f"while writing it, or the file was lost; {self._resume_message()}. "
                "The folder is deleted after the next checkpoint"
            )

    def _resume_message(self) -> str:
        """Where training resumes."""
        committed = self.committed()
        if not committed:
            return "there is no earlier one, so training starts from the beginning"
        return f"training resumes from {committed[-1].name}"

    def last_good(self) -> str:
        """Which checkpoint is the newest whole one, for an error message."""
        committed = self.committed()
        if not committed:
            return "there is no checkpoint before"
        return f"the last good checkpoint is {committed[-1]}"

    @contextmanager
    def writing(self, what: object) -> Iterator[None]:
        """Convert errors of writing `what`, such as a full disk, to a UserError with a remedy."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            # of an actor's error, all lines but the last are its traceback
            lines = str(error).strip().splitlines()
            cause = lines[-1] if lines else type(error).__name__
            raise UserError(
                f"{what} could not be written ({cause}); {self.last_good()}. "
                "Free disk space or fix the cause, then rerun the same command to resume"
            ) from error

    def load(self, cursor: Cursor, loop: Loop) -> None:
        """Restore a checkpoint written by any number of workers; every worker calls it."""
        folder = self.folder(cursor)
        manifest = _manifest(folder)
        tensors = _tensors(folder, manifest)
        restore_loop(loop, tensors, manifest.workers)
        loop.timings = _timings(manifest)
        loop.underway = LoopProgress(**manifest.underway) if manifest.underway else None

    def stopping(self) -> dict[str, Any] | None:
        """The state of early stopping at the newest whole checkpoint; None without any."""
        cursor = self.latest()
        return _manifest(self.folder(cursor)).stopping if cursor != BEGINNING else None

    def result(self, cursor: Cursor) -> JobResult:
        """The figures at a checkpoint."""
        folder = self.folder(cursor)
        manifest = _manifest(folder)
        states = metric_states(_tensors(folder, manifest))
        return JobResult(states, _timings(manifest))


def rank_file(rank: int) -> str:
    """The name of a worker's file."""
    return f"state.rank{rank:04d}.safetensors"


def timings_as_json(timings: Sequence[Timing]) -> list[dict[str, float]]:
    """Timings as a manifest stores them."""
    return [timing._asdict() for timing in timings]


def _position(folder: Path) -> tuple[int, int]:
    """Windows and examples in a folder's name, which sorts wrongly as text from 1000 windows on."""
    match = NAME.fullmatch(folder.name)
    assert match
    return int(match[1]), int(match[2] or 0)


def _unused_name(folder: Path) -> Path:
    """The path that a damaged checkpoint is renamed to."""
    renamed = folder.with_name(f"damaged.{folder.name}")
    for number in range(1, MAX_DAMAGED):
        if not renamed.exists():
            break
        renamed = folder.with_name(f"damaged.{folder.name}.{number}")
    return renamed


def _manifest(folder: Path) -> Manifest:
    return read_manifest(folder / MANIFEST, Manifest, "a checkpoint's manifest")


def _damage(folder: Path) -> str | None:
    """The first fault of a checkpoint; None if it is whole."""
    try:
        return _difference(folder, _manifest(folder))
    except UserError as error:
        return str(error)
    except OSError as error:  # the disk fails, or permission is missing
        return f"it cannot be read: {error}"


def _difference(folder: Path, manifest: Manifest) -> str | None:
    """The first difference between a checkpoint and its manifest."""
    if manifest != manifest.sealed():
        return f"{MANIFEST} was changed after it was written"
    if _position(folder) != (manifest.windows, manifest.examples):
        return f"{MANIFEST} is another checkpoint's"
    if sorted(manifest.files) != [rank_file(rank) for rank in range(manifest.workers)]:
        return f"{MANIFEST} does not name a file for each of {manifest.workers} workers"
    for name, expected in manifest.files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} is not the file that {MANIFEST} describes"
    return None


def _tensors(folder: Path, manifest: Manifest) -> ShardedTensors:
    return ShardedTensors.open([folder / rank_file(rank) for rank in range(manifest.workers)])


def _timings(manifest: Manifest) -> list[Timing]:
    timings = []
    for row in manifest.timings:
        counts = {"window": int(row["window"]), "examples": int(row["examples"])}
        timings.append(Timing(**{**row, **counts}))  # type: ignore[arg-type]
    return timings
