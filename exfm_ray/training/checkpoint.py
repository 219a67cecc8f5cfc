"""Checkpoints at the end of a window: whole or absent, the last two kept.

    <root>/windows=003/<lane>/...       each worker's part of each lane
    <root>/windows=003/metrics.npz      metric states so far
    <root>/windows=003/usage.<model>.npz  when rows were last used, where unused ones are reset
    <root>/windows=003/manifest.json    written last: windows learnt, workers, timings
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from exfm_ray.errors import UserError
from exfm_ray.files import atomic_path, read_json, write_json
from exfm_ray.metrics.state import MetricState
from exfm_ray.training.lane import Lane
from exfm_ray.training.loop import Key, Loop, Timing

KEPT = 2


@dataclass(frozen=True)
class JobResult:
    """What a job has to tell: metric states summed over the windows after the warm-up, and where its time went."""

    states: dict[Key, MetricState]
    timings: list[Timing]

    @property
    def examples(self) -> int:
        """Examples learnt."""
        return sum(t.examples for t in self.timings)

    @property
    def seconds(self) -> float:
        """Seconds in which windows were evaluated and learnt, without the job's start and its checkpoints."""
        return sum(t.evaluate_s + t.learn_s for t in self.timings)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training job."""

    root: Path

    def latest(self) -> int:
        """Windows learnt at the newest whole checkpoint; 0 without any."""
        return max((_windows(path.parent) for path in self.root.glob("windows=*/manifest.json")), default=0)

    def _folder(self, windows: int) -> Path:
        return self.root / f"windows={windows:03d}"

    def save(self, windows: int, loop: Loop, lanes: Sequence[Lane], stopping: dict[str, Any] | None = None) -> None:
        """Write the state after `windows` windows, or passes over a static set; every worker calls it.

        `stopping`: the state of early stopping, for a static set."""
        folder = self._folder(windows)
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # what a killed run had begun
            folder.mkdir(parents=True)
        dist.barrier()
        for lane in lanes:
            lane.save(folder)
        save_file({"cpu": torch.get_rng_state()}, folder / _rng_file())
        dist.barrier()
        if dist.get_rank() == 0:
            _save_states(folder / "metrics.npz", loop.states)
            for group in loop.groups:
                group.save_usage(folder)
            facts = {"windows": windows, "workers": dist.get_world_size(), "timings": [t._asdict() for t in loop.timings], "stopping": stopping}
            write_json(folder / "manifest.json", facts)
            for old in sorted(self.root.glob("windows=*"), key=_windows)[:-KEPT]:
                (old / "manifest.json").unlink(missing_ok=True)
                shutil.rmtree(old)

    def load(self, windows: int, loop: Loop, lanes: Sequence[Lane]) -> None:
        """Restore the state after `windows` windows; every worker calls it."""
        folder = self._folder(windows)
        manifest: dict[str, Any] = read_json(folder / "manifest.json")
        if manifest["workers"] != dist.get_world_size():
            raise UserError(
                f"{folder}: written by {manifest['workers']} workers, this job has {dist.get_world_size()}; "
                "set `workers` back or choose another run name"
            )
        for lane in lanes:
            lane.load(folder)
        for group in loop.groups:
            group.load_usage(folder)
        torch.set_rng_state(load_file(folder / _rng_file())["cpu"])  # dropout draws from it
        result = self.result(windows)
        loop.states, loop.timings = result.states, result.timings

    def stopping(self) -> dict[str, Any] | None:
        """The state of early stopping at the newest whole checkpoint; None without any."""
        done = self.latest()
        state: dict[str, Any] | None = read_json(self._folder(done) / "manifest.json")["stopping"] if done else None
        return state

    def result(self, windows: int) -> JobResult:
        """The figures after `windows` windows."""
        manifest = read_json(self._folder(windows) / "manifest.json")
        return JobResult(_load_states(self._folder(windows) / "metrics.npz"), [Timing(**t) for t in manifest["timings"]])


def _rng_file() -> str:
    """This worker's random state."""
    return f"rng.rank{dist.get_rank():04d}.safetensors"


def _windows(folder: Path) -> int:
    """Windows learnt, from a checkpoint's folder name (which sorts wrongly as text from 1000 on)."""
    return int(folder.name.removeprefix("windows="))


def _save_states(path: Path, states: dict[Key, MetricState]) -> None:
    arrays = {json.dumps([*key, name]): array for key, state in states.items() for name, array in state.to_arrays().items()}
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, allow_pickle=False, **arrays)


def _load_states(path: Path) -> dict[Key, MetricState]:
    grouped: dict[Key, dict[str, np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name, array in arrays.items():
            model, arm, domain, task, part = json.loads(name)
            grouped.setdefault((model, arm, domain, task), {})[part] = array
    return {key: MetricState.from_arrays(parts) for key, parts in grouped.items()}
