"""Checkpoints on disk: safetensors and JSON with hashes, whole or absent, the newest few kept.

<root>/windows=003/                    at the end of a window
<root>/windows=003.examples=00051200/  inside the next one, after so many of its examples
    state.rank0000.safetensors         what worker 0 holds of tables, dense parts, optimizers, averages and adapters (`engine.parts`),
                                       its random state; worker 0 also has metric states and when
                                       table rows were last used
    manifest.json                      written last: how far the job is, hashes of the files, timings
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from exfm_ray.base import FrozenModel
from exfm_ray.engine.tensor_store import ShardedTensors, cpu_copy
from exfm_ray.errors import UserError
from exfm_ray.metrics.state import MetricState
from exfm_ray.storage.atomic import sha256, short_hash
from exfm_ray.storage.manifest import read_manifest
from exfm_ray.training.loop import Key, Loop, LoopProgress, Timing

MANIFEST = "manifest.json"
NAME = re.compile(r"windows=(\d+)(?:\.examples=(\d+))?")


class Cursor(NamedTuple):
    """How far a job has come.

    Attributes:
        windows: learnt as a whole; passes, over a static set.
        examples: learnt of the next one.
        work: how many of its passes are done, such as its evaluation.
    """

    windows: int
    examples: int = 0
    work: int = 0


BEGINNING = Cursor(0)


class Manifest(FrozenModel):
    """What a checkpoint says of itself.

    Attributes:
        files: name -> SHA-256.
        teacher: version of the snapshot that supervised the last window learnt; None without.
        underway: passes that are not finished, inside a window.
        stopping: the state of early stopping, for a static set.
        digest: of all the rest.
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
        """With the digest of all the rest."""
        return self.model_copy(
            update={"digest": short_hash(self.model_dump(mode="json", exclude={"digest"}))}
        )

    @property
    def mark(self) -> Cursor:
        """How far the job was."""
        return Cursor(self.windows, self.examples, self.underway["work"] if self.underway else 0)


@dataclass(frozen=True)
class JobResult:
    """What a job has to tell: metric states summed over the windows after the warm-up, and where
    its time went."""

    states: dict[Key, MetricState]
    timings: list[Timing]

    @property
    def examples(self) -> int:
        """Examples learnt."""
        return sum(t.examples for t in self.timings)

    @property
    def seconds(self) -> float:
        """Seconds in which windows were evaluated and learnt, without the job's start and its
        checkpoints."""
        return sum(t.evaluate_s + t.learn_s for t in self.timings)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training job."""

    root: Path

    def folder(self, mark: Cursor) -> Path:
        """Where a checkpoint lies."""
        inside = f".examples={mark.examples:08d}" if mark.examples else ""
        return self.root / f"windows={mark.windows:03d}{inside}"

    def committed(self) -> list[Path]:
        """Folders of the whole checkpoints, the oldest first."""
        return sorted(
            (
                path.parent
                for path in self.root.glob(f"windows=*/{MANIFEST}")
                if NAME.fullmatch(path.parent.name)
            ),
            key=_order,
        )

    def latest(self) -> Cursor:
        """How far the job was at the newest whole checkpoint; `BEGINNING` without any."""
        found = self.committed()
        return _manifest(found[-1]).mark if found else BEGINNING

    def set_aside_damaged(self) -> Iterator[str]:
        """Rename the newest checkpoints as long as they are damaged, so that the one before is gone
        on from; says which and why.

        Says too which newer folders are no checkpoint for lack of a manifest.
        """
        for folder in reversed(self.committed()):
            damage = _damage(folder)
            if damage is None:
                break
            aside = folder.with_name(f"damaged.{folder.name}")
            for number in range(1, 1000):
                if not aside.exists():
                    break
                aside = folder.with_name(f"damaged.{folder.name}.{number}")
            folder.rename(aside)
            before = self.committed()
            goes_on = (
                f"the one before, {before[-1].name}, is gone on from"
                if before
                else "there is none before, so this job begins anew"
            )
            yield f"checkpoint {folder} is damaged ({damage}); {goes_on}. It was renamed to {aside.name}"
        yield from self._without_manifest()

    def _without_manifest(self) -> Iterator[str]:
        committed = self.committed()
        newest = _order(committed[-1]) if committed else (-1, -1)
        goes_on = f"{committed[-1].name} is gone on from" if committed else "this job begins anew"
        for folder in sorted(
            path
            for path in self.root.glob("windows=*")
            if NAME.fullmatch(path.name) and path not in committed
        ):
            if _order(folder) > newest:
                yield (
                    f"checkpoint {folder} has no {MANIFEST} and is not used: it was not written to its end, as when a run is killed, or that file "
                    f"was lost; {goes_on}, and the folder is deleted when the next checkpoint is whole"
                )

    def last_good(self) -> str:
        """For an error's message."""
        committed = self.committed()
        return (
            f"the last good checkpoint is {committed[-1]}"
            if committed
            else "there is no checkpoint before"
        )

    @contextmanager
    def writing(self, what: object) -> Iterator[None]:
        """Inside, `what` is written: a full disk is a UserError that names it, the last good
        checkpoint and the way out."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            cause = (
                str(error).strip().splitlines()[-1:]
            )  # of an actor's error all before is its traceback
            told = f"{what} could not be written ({cause[0] if cause else type(error).__name__}); {self.last_good()}"
            raise UserError(
                f"{told}. Make room, or mend what is named, and give the command again"
            ) from error

    def load(self, mark: Cursor, loop: Loop) -> None:
        """Restore the state of a checkpoint of any number of workers; every worker calls it."""
        folder = self.folder(mark)
        manifest = _manifest(folder)
        parts = _parts(folder, manifest)
        for lane in loop.lanes:
            lane.restore(parts.with_prefix(f"lanes/{lane.name}"))
        for group in loop.groups:
            if group.sharing and group.sharing.uses:
                own = parts.with_prefix(f"uses/{group.lanes[0].model}")
                group.sharing.uses.restore({name: own[name].numpy() for name in own})
            if group.usage:
                own = parts.with_prefix(f"usage/{group.lanes[0].model}")
                group.usage.restore({name: own[name].numpy() for name in own})
        own = parts.with_prefix(
            f"random/{dist.get_rank() % manifest.workers}"
        )  # dropout draws from it
        torch.set_rng_state(own["cpu"])
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
        loop.states = _states(parts)
        loop.timings = _timings(manifest)
        loop.underway = LoopProgress(**manifest.underway) if manifest.underway else None

    def stopping(self) -> dict[str, Any] | None:
        """The state of early stopping at the newest whole checkpoint; None without any."""
        mark = self.latest()
        return _manifest(self.folder(mark)).stopping if mark != BEGINNING else None

    def result(self, mark: Cursor) -> JobResult:
        """The figures at a checkpoint."""
        manifest = _manifest(self.folder(mark))
        return JobResult(_states(_parts(self.folder(mark), manifest)), _timings(manifest))


def rank_file(rank: int) -> str:
    """The name of a worker's file."""
    return f"state.rank{rank:04d}.safetensors"


def state_of(loop: Loop) -> dict[str, Tensor]:
    """This worker's part of the state, copied to the CPU; names as `engine.parts` reads them."""
    rank = dist.get_rank()
    state: dict[str, Tensor] = {}
    for lane in loop.lanes:
        state |= {f"lanes/{lane.name}/{name}": tensor for name, tensor in lane.state().items()}
    state[f"random/{rank}/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state[f"random/{rank}/cuda"] = torch.cuda.get_rng_state()
    if rank == 0:
        for group in loop.groups:
            if group.sharing and group.sharing.uses:
                state |= {
                    f"uses/{group.lanes[0].model}/{name}": torch.from_numpy(array)
                    for name, array in group.sharing.uses.state().items()
                }
            if group.usage:
                arrays = group.usage.state()
                state |= {
                    f"usage/{group.lanes[0].model}/{name}": torch.from_numpy(array)
                    for name, array in arrays.items()
                }
        for key, metric in loop.states.items():
            state |= {
                f"metrics/{json.dumps(key)}/{name}": cpu_copy(torch.from_numpy(np.asarray(a)))
                for name, a in metric.to_arrays().items()
            }
    return state


def _order(folder: Path) -> tuple[int, int]:
    """Windows and examples, from a folder's name (which sorts wrongly as text from 1000 windows
    on)."""
    match = NAME.fullmatch(folder.name)
    assert match
    return int(match[1]), int(match[2] or 0)


def _manifest(folder: Path) -> Manifest:
    return read_manifest(folder / MANIFEST, Manifest, "a checkpoint's manifest")


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is whole."""
    try:
        return _difference(folder, _manifest(folder))
    except UserError as error:
        return str(error)
    except OSError as error:  # the disk fails, or the file may not be read
        return f"it cannot be read: {error}"


def _difference(folder: Path, manifest: Manifest) -> str | None:
    if manifest != manifest.sealed():
        return f"{MANIFEST} was changed after it was written"
    if _order(folder) != manifest.mark[:2]:
        return f"{MANIFEST} is another checkpoint's"
    if sorted(manifest.files) != [rank_file(rank) for rank in range(manifest.workers)]:
        return f"{MANIFEST} does not name a file for each of {manifest.workers} workers"
    for name, expected in manifest.files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} is not the file that {MANIFEST} describes"
    return None


def _parts(folder: Path, manifest: Manifest) -> ShardedTensors:
    return ShardedTensors.open([folder / rank_file(rank) for rank in range(manifest.workers)])


def _timings(manifest: Manifest) -> list[Timing]:
    timings = []
    for row in manifest.timings:
        whole = {"window": int(row["window"]), "examples": int(row["examples"])}
        timings.append(Timing(**{**row, **whole}))  # type: ignore[arg-type]
    return timings


def _states(parts: ShardedTensors) -> dict[Key, MetricState]:
    found: dict[Key, dict[str, Any]] = {}
    metrics = parts.with_prefix("metrics")
    for name in metrics:
        text, _, part = name.rpartition("/")
        model, arm, domain, task = json.loads(text)
        found.setdefault((model, arm, domain, task), {})[part] = metrics[name].numpy()
    return {key: MetricState.from_arrays(arrays) for key, arrays in found.items()}


def timings_as_json(timings: Sequence[Timing]) -> list[dict[str, float]]:
    """For a manifest."""
    return [timing._asdict() for timing in timings]
