"""Writing checkpoints while training goes on: the state is copied, a thread writes the copy.

Every worker writes its own file and, beside it, its hash. Worker 0's thread waits for all hashes
and commits the checkpoint by its manifest; the newest few stay. What fails in the thread fails the
training, at the next checkpoint at the latest.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import atomic_path, read_json, sha256, write_json
from exfm_ray.training.checkpoint import (
    MANIFEST,
    Checkpoints,
    Cursor,
    Manifest,
    rank_file,
    state_of,
    timings_as_json,
)
from exfm_ray.training.loop import Loop
from exfm_ray.training.nan_check import not_finite

PATIENCE_S = 1800.0
"""Longest that worker 0 waits for the other workers' files of a checkpoint."""
POLL_S = 0.02


@dataclass
class AsyncCheckpointer:
    """One worker's writer; all workers call its methods in step.

    Attributes:
        keep: how many checkpoints stay.
        seconds: for which training stood still.
        writing_s: processor time that writing has taken beside it.
    """

    checkpoints: Checkpoints
    keep: int
    seconds: float = 0.0
    writing_s: float = 0.0
    _taken: dict[str, Tensor] | None = field(default=None, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)

    def stage(self, loop: Loop) -> None:
        """Copy the state, once the checkpoint before is written: what the next `save` writes,
        whatever happens to the model until then.

        UserError where the one before could not be written: the disk is full, or the model's
            weights are no longer numbers.
        """
        begun = time.perf_counter()
        self.finish()
        self._taken = state_of(loop)
        self.seconds += time.perf_counter() - begun

    def save(
        self,
        mark: Cursor,
        loop: Loop,
        teacher: int | None = None,
        stopping: dict[str, Any] | None = None,
    ) -> None:
        """Begin to write the state at `mark`: the one taken, or else as it is now. UserError as
        `take`."""
        if self._taken is None:
            self.stage(loop)
        assert self._taken is not None
        begun = time.perf_counter()
        folder = self.checkpoints.folder(mark)
        state = self._taken
        self._taken = None
        if dist.get_rank() == 0:
            with self.checkpoints.writing(f"{folder}: the checkpoint"):
                shutil.rmtree(folder, ignore_errors=True)  # what a killed run had begun
                folder.mkdir(parents=True)
        dist.barrier()
        facts = {
            "windows": mark.windows,
            "examples": mark.examples,
            "workers": dist.get_world_size(),
            "teacher": teacher,
            "timings": timings_as_json(loop.timings),
            "underway": asdict(loop.underway) if loop.underway else None,
            "stopping": stopping,
        }
        arguments = (folder, dist.get_rank(), state, facts)
        self._thread = threading.Thread(
            target=self._write, args=arguments, daemon=True, name=f"checkpoint {folder.name}"
        )
        self._thread.start()
        self.seconds += time.perf_counter() - begun

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk; its error, if it had one."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            raise self._error

    def _write(
        self,
        folder: Path,
        rank: int,
        state: Mapping[str, Tensor],
        facts: dict[str, Any],
    ) -> None:
        try:
            self._check(folder, state)
            with self.checkpoints.writing(f"{folder}: the checkpoint"):
                write_part(folder, rank, state)
                if rank == 0:
                    files = self._await_parts(folder, facts["workers"])
                    write_json(
                        folder / MANIFEST,
                        Manifest(files=files, **facts).sealed().model_dump(mode="json"),
                    )
                    remove_old(self.checkpoints, self.keep)
        except BaseException as error:  # a thread's error must reach the worker, whatever it is
            self._error = error
        self.writing_s += time.thread_time()

    def _check(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """UserError where a weight is not a number: such a state must not push out a good one."""
        bad = not_finite(state)
        if bad:
            raise UserError(
                f"{folder.name}: '{bad}' is not finite, the model has diverged, so this checkpoint is not written; {self.checkpoints.last_good()}. "
                "Lower the learning rates under another --name"
            )

    def _await_parts(self, folder: Path, workers: int) -> dict[str, str]:
        """Hashes of all workers' files."""
        deadline = time.monotonic() + PATIENCE_S
        waiting = list(range(workers))
        while waiting:
            waiting = [rank for rank in waiting if not _hash_file(folder, rank).exists()]
            if waiting and time.monotonic() > deadline:
                raise TimeoutError(
                    f"{folder}: worker 0 waited {PATIENCE_S:.0f} s for the parts of workers {waiting}"
                )
            time.sleep(POLL_S if waiting else 0)
        return {
            rank_file(rank): read_json(_hash_file(folder, rank))["sha256"]
            for rank in range(workers)
        }


def write_part(
    folder: Path,
    rank: int,
    state: Mapping[str, Tensor],
) -> None:
    """Write one worker's file, then its hash."""
    with atomic_path(folder / rank_file(rank)) as temporary:
        save_file(dict(state), temporary)
        hashed = sha256(temporary)
    write_json(_hash_file(folder, rank), {"sha256": hashed})


def remove_old(checkpoints: Checkpoints, keep: int) -> None:
    """Remove all committed checkpoints but the newest `keep`, and what killed runs have left
    half-written before them."""
    committed: Sequence[Path] = checkpoints.committed()
    for old in committed[:-keep]:
        (old / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(old)
    for folder in checkpoints.root.glob("windows=*"):
        if folder not in committed:
            shutil.rmtree(folder, ignore_errors=True)


def _hash_file(folder: Path, rank: int) -> Path:
    return folder / f"state.rank{rank:04d}.json"
