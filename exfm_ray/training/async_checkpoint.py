"""Write checkpoints while training goes on: copy the state, let a thread write the copy.

Every worker writes its own file and, beside it, the file's hash. Worker 0's thread waits for all
hashes and commits the checkpoint by its manifest; the newest few checkpoints stay. An error in the
thread is raised in the worker by the next checkpoint at the latest.
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
    timings_as_json,
)
from exfm_ray.training.loop import Loop
from exfm_ray.training.loop_state import loop_state
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
        writing_s: processor time of the writing threads.
    """

    checkpoints: Checkpoints
    keep: int
    seconds: float = 0.0
    writing_s: float = 0.0
    _staged: dict[str, Tensor] | None = field(default=None, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)

    def stage(self, loop: Loop) -> None:
        """Copy the state for the next `save`, once the previous checkpoint is written.

        Later changes of the models do not change the copy.

        Raises:
            UserError: the previous checkpoint could not be written: the disk is full, or a weight
                is not finite.
        """
        started = time.perf_counter()
        self.finish()
        self._staged = loop_state(loop)
        self.seconds += time.perf_counter() - started

    def save(
        self,
        cursor: Cursor,
        loop: Loop,
        teacher: int | None = None,
        stopping: dict[str, Any] | None = None,
    ) -> None:
        """Begin to write the checkpoint at `cursor`: the staged state, or else the current one.

        Raises:
            UserError: as `stage`.
        """
        if self._staged is None:
            self.stage(loop)
        assert self._staged is not None
        started = time.perf_counter()
        state = self._staged
        self._staged = None
        rank = dist.get_rank()
        folder = self.checkpoints.folder(cursor)
        if rank == 0:
            with self.checkpoints.writing(f"{folder}: the checkpoint"):
                shutil.rmtree(folder, ignore_errors=True)  # of a killed run
                folder.mkdir(parents=True)
        dist.barrier()

        facts = {
            "windows": cursor.windows,
            "examples": cursor.examples,
            "workers": dist.get_world_size(),
            "teacher": teacher,
            "timings": timings_as_json(loop.timings),
            "underway": asdict(loop.underway) if loop.underway else None,
            "stopping": stopping,
        }
        self._thread = threading.Thread(
            target=self._write,
            args=(folder, rank, state, facts),
            daemon=True,
            name=f"checkpoint {folder.name}",
        )
        self._thread.start()
        self.seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk; raise its error if it had one."""
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
        """Run in the thread: write this worker's file; on rank 0 commit the checkpoint."""
        try:
            self._check_finite(folder, state)
            with self.checkpoints.writing(f"{folder}: the checkpoint"):
                write_part(folder, rank, state)
                if rank == 0:
                    files = self._await_parts(folder, facts["workers"])
                    manifest = Manifest(files=files, **facts).sealed()
                    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
                    remove_old(self.checkpoints, self.keep)
        except BaseException as error:  # the worker must see every error of its thread
            self._error = error
        self.writing_s += time.thread_time()

    def _check_finite(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Raise a UserError if a weight is not finite, so that the good checkpoints stay."""
        bad_name = not_finite(state)
        if bad_name:
            raise UserError(
                f"{folder.name}: '{bad_name}' is not finite, the model has diverged, so this "
                f"checkpoint is not written; {self.checkpoints.last_good()}. "
                "Lower the learning rates under another --name"
            )

    def _await_parts(self, folder: Path, workers: int) -> dict[str, str]:
        """Wait for all workers' files; return their hashes by name."""
        deadline = time.monotonic() + PATIENCE_S
        waiting = list(range(workers))
        while waiting:
            waiting = [rank for rank in waiting if not _hash_file(folder, rank).exists()]
            if waiting and time.monotonic() > deadline:
                raise TimeoutError(
                    f"{folder}: worker 0 waited {PATIENCE_S:.0f} s "
                    f"for the parts of workers {waiting}"
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
        digest = sha256(temporary)
    write_json(_hash_file(folder, rank), {"sha256": digest})


def remove_old(checkpoints: Checkpoints, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`, and the half-written ones of killed runs."""
    committed: Sequence[Path] = checkpoints.committed()
    for old in committed[:-keep]:
        (old / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(old)
    for folder in checkpoints.root.glob("windows=*"):
        if folder not in committed:
            shutil.rmtree(folder, ignore_errors=True)


def _hash_file(folder: Path, rank: int) -> Path:
    return folder / f"state.rank{rank:04d}.json"
