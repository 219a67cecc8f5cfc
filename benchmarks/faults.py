"""python -m benchmarks.faults [--quick]: what a run survives, and what that costs.

1. Kills: `run.py pipeline` on a small synthetic stream in a process group of its own, with
   checkpoints inside windows. At random moments (drawn from a fixed seed, from the start to the
   length of an undisturbed run) the whole group gets SIGKILL, and the same command is rerun, until
   it ends. Then metrics.jsonl, summary.json and every exported weight are compared with those of
   the undisturbed run.
2. Resume: seconds from rerunning the command after a kill to the first new checkpoint (one every
   1,000 examples).
3. Checkpoint cost: the demo's models in one process, a checkpoint a window: how much longer
   training takes than without checkpoints (medians over pairs of runs), the time for which it
   stands still, and the processor time of the writing thread.
4. Malformed inputs: see `benchmarks.faults_fuzz`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import yaml

from benchmarks.common import arguments, bar, report
from benchmarks.faults_fuzz import fuzz
from exfm_ray.config.load import load_config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream
from exfm_ray.storage.atomic import read_json, sha256
from exfm_ray.tracking.recorder import IDENTITY, read_metrics
from exfm_ray.training.async_checkpoint import AsyncCheckpointer
from exfm_ray.training.checkpoint import BEGINNING
from exfm_ray.training.job import Job
from exfm_ray.training.local import InMemoryReport, LocalClient, init_single_process
from exfm_ray.training.worker import Worker

DESCRIPTION = (
    "Kills a small pipeline 20 times, times checkpoints, feeds malformed files: "
    "about 15 minutes on two cores (--quick: 4)."
)
REPOSITORY = Path(__file__).parents[1]
SEED = 7
RUN_S = 900.0
KILLS_A_RUN = 4
SETTINGS: dict[str, Any] = {
    "data": {
        "fragment_rows": 1000,
        "synthetic": {
            "windows": 6,
            "events_per_window": 4000,
            "users": 500,
            "ads": 200,
            "advertisers": 20,
        },
    },
    "fm": {
        "model": {
            "type": "wukong",
            "dim": 8,
            "l": 1,
            "n_F": 4,
            "n_L": 4,
            "k": 4,
            "fmb_mlp": [16],
            "mlp": [16],
        },
        "batch_size": 64,
        "threads": 1,
    },
    "das": {"threads": 1, "keep_snapshots": True},  # benchmarks.faults_fuzz damages one
    "vm": {
        "model": {"type": "mlp", "dim": 8, "mlp": [16]},
        "batch_size": 64,
        "threads": 1,
        "models": [
            {"name": "feed", "domain": "feed", "task": "click"},
            {"name": "stories", "domain": "stories", "task": "conversion"},
        ],
    },
    "checkpoint": {"every_examples": 1000},
    "metrics": {"warmup_windows": 1},
    "wandb": {"mode": "disabled"},
}


@dataclass
class Attempt:
    """One start of the command.

    Attributes:
        seconds: how long it ran.
        first_checkpoint_s: seconds until its first checkpoint; None where it wrote none.
        code: exit code.
        output: stdout and stderr.
    """

    seconds: float
    first_checkpoint_s: float | None
    code: int
    output: str

    @property
    def has_traceback(self) -> bool:
        return "Traceback" in self.output


def attempt(
    folder: Path,
    name: str,
    kill_after_s: float | None,
) -> Attempt:
    """Run the command; send SIGKILL to its process group after so many seconds.

    Args:
        kill_after_s: None for `RUN_S`, which is much longer than the command takes.
    """
    command = [sys.executable, "run.py", "pipeline"]
    command += ["--config", str(folder / "faults.yaml"), "--name", name]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    before = checkpoints(folder / name)
    started = time.monotonic()
    deadline = started + (kill_after_s or RUN_S)
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    first_checkpoint_s = None
    while process.poll() is None and time.monotonic() < deadline:
        if first_checkpoint_s is None and checkpoints(folder / name) - before:
            first_checkpoint_s = time.monotonic() - started
        time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    seconds = time.monotonic() - started
    return Attempt(seconds, first_checkpoint_s, process.returncode, output)


def checkpoints(run: Path) -> set[tuple[str, int]]:
    """Return the complete checkpoints of a run's jobs, with their times in ns."""
    complete = set()
    for path in (run / "checkpoints").glob("*/*/manifest.json"):
        with suppress(FileNotFoundError):
            complete.add((str(path), path.stat().st_mtime_ns))
    return complete


def outcome(folder: Path) -> dict[str, Any]:
    """Return what must be equal: figures of windows and of the run, exported weights."""
    metrics = {}
    rows = read_metrics(folder / "metrics.jsonl")
    for row in rows:
        identity = json.dumps([row[key] for key in IDENTITY])
        metrics[identity] = {key: value for key, value in row.items() if key != "examples_per_s"}
    assert len(metrics) == len(rows), "a row was written twice"

    summary = read_json(folder / "summary.json")
    figures = sorted(json.dumps(row, sort_keys=True) for row in summary["figures"])
    exported = sorted((folder / "exported").rglob("*.safetensors"))
    weights = {str(path.relative_to(folder)): sha256(path) for path in exported}
    return {"metrics": metrics, "figures": figures, "weights": weights}


@dataclass
class Kills:
    """Kills runs at random moments, and counts what they survive.

    Attributes:
        done: number of kills.
        equal: kills of runs whose outcome equals that of the undisturbed run.
        tracebacks: attempts that printed a traceback.
        resume_s: seconds of last attempts until their first checkpoint.
    """

    folder: Path
    undisturbed_s: float
    expected: dict[str, Any]
    done: int = 0
    equal: int = 0
    tracebacks: int = 0
    resume_s: list[float] = field(default_factory=list)
    _moments: random.Random = field(default_factory=lambda: random.Random(SEED))

    def kill(self, name: str, count: int) -> int:
        """Kill one run up to `count` times, or until it ends before its moment; the kills."""
        for killed in range(count):
            moment = self._moments.uniform(0.5, self.undisturbed_s)
            killed_attempt = attempt(self.folder, name, moment)
            if killed_attempt.code == 0:
                return killed
            assert killed_attempt.code == -signal.SIGKILL, killed_attempt.output
            self.tracebacks += killed_attempt.has_traceback
        return count

    def resume(self, name: str, killed: int) -> None:
        """Let a killed run end, and compare its outcome with the expected one."""
        last = attempt(self.folder, name, None)
        assert last.code == 0, last.output
        is_equal = outcome(self.folder / name) == self.expected
        self.done += killed
        self.equal += killed * is_equal
        self.tracebacks += last.has_traceback
        first_checkpoint = "nothing was left to learn"
        if last.first_checkpoint_s is not None:
            self.resume_s.append(last.first_checkpoint_s)
            first_checkpoint = f"first checkpoint after {last.first_checkpoint_s:.0f} s"
        verdict = "equal" if is_equal else "NOT EQUAL"
        print(
            f"{name}: {killed} kills, {verdict} to the undisturbed run; {first_checkpoint}",
            flush=True,
        )


def kills(folder: Path, count: int) -> dict[str, Any]:
    """Kill runs, up to `KILLS_A_RUN` times each, until there were `count` kills."""
    (folder / "faults.yaml").write_text(yaml.safe_dump(SETTINGS | {"run": {"dir": str(folder)}}))
    whole = attempt(folder, "whole", None)
    assert whole.code == 0, whole.output
    print(f"undisturbed: {whole.seconds:.0f} s", flush=True)

    survived = Kills(folder, whole.seconds, outcome(folder / "whole"))
    runs = 0
    while survived.done < count:
        name = f"killed{runs}"
        killed = survived.kill(name, min(KILLS_A_RUN, count - survived.done))
        if killed:
            survived.resume(name, killed)
        runs += 1

    resume = None
    if survived.resume_s:
        resume = {
            "median": statistics.median(survived.resume_s),
            "longest": max(survived.resume_s),
            "measured": len(survived.resume_s),
        }
    return {
        "kills": survived.done,
        "kills_with_equal_outcome": survived.equal,
        "runs": runs,
        "undisturbed_s": survived.undisturbed_s,
        "tracebacks": survived.tracebacks,
        "resume_s": resume,
    }


class NoCheckpointer(AsyncCheckpointer):
    """Saves nothing."""

    def stage(self, *_: Any) -> None:
        pass

    def save(self, *_: Any) -> None:
        pass


def trained(job: Job, saver: type[AsyncCheckpointer]) -> Worker:
    """Train a job from the start in this process; its worker."""
    stream = EventStream.open(job.stream_root)
    if saver is AsyncCheckpointer:
        shutil.rmtree(job.checkpoints.root, ignore_errors=True)
    worker = Worker(job, None, InMemoryReport(), torch.device("cpu"))
    client: Any = LocalClient(worker.loop.reader, job.passes(stream.windows(), BEGINNING))
    worker.loop.client = client
    worker.saver = saver(job.checkpoints, worker.saver.keep)
    worker.run(stream.windows(), BEGINNING)
    return worker


def seconds_of(worker: Worker) -> float:
    """Return the seconds of training, without the first window: it writes no checkpoint."""
    return sum(timing.evaluate_s + timing.learn_s for timing in worker.loop.timings[1:])


class CheckpointCost(NamedTuple):
    """The cost of checkpoints, as fractions of the seconds of training without them.

    Attributes:
        total: how much longer training takes.
        stands_still: for which training stands still.
        writing: processor time of the writing thread.
    """

    total: float
    stands_still: float
    writing: float


def one_cost(
    job: Job,
    windows: int,
    saves_first: bool,
) -> CheckpointCost:
    """Train once with and once without checkpoints."""
    savers: list[type[AsyncCheckpointer]] = [NoCheckpointer, AsyncCheckpointer]
    if saves_first:
        savers.reverse()
    workers = {saver: trained(job, saver) for saver in savers}
    saving = workers[AsyncCheckpointer]
    bare_s = seconds_of(workers[NoCheckpointer])
    stands_still = saving.saver.seconds / windows * (windows - 1) / bare_s
    writing = saving.saver.writing_s / windows * (windows - 1) / bare_s
    total = stands_still + seconds_of(saving) / bare_s - 1
    return CheckpointCost(total, stands_still, writing)


def checkpoint_cost(folder: Path, quick: bool) -> dict[str, Any]:
    """Measure the demo's FM and vertical models, each in this process, a checkpoint a window."""
    init_single_process()
    torch.set_num_threads(1)
    windows, pairs = (3, 3) if quick else (6, 7)
    overrides = [
        f"run.dir={folder}",
        f"data.synthetic.windows={windows}",
        "data.synthetic.events_per_window=40000",
        "vm.arms=[labels]",
    ]
    settings = load_config(REPOSITORY / "configs" / "demo.yaml", overrides, "cost")
    prepare(settings)
    by_role = {}
    for job in (Job("fm", settings), Job("vm", settings, settings.vm.models)):
        costs = [one_cost(job, windows, number % 2 == 1) for number in range(pairs + 1)]
        del costs[0]  # it warms up
        figures = cost_figures(job, costs)
        by_role[job.role] = figures
        print(
            f"{job.role}: {figures['bytes'] / 1e6:.1f} MB a checkpoint; training takes "
            f"{figures['cost']:.1%} longer (standard error {figures['standard_error']:.1%}), of "
            f"which it stands still for {figures['stands_still']:.2%}; the writing thread's "
            f"processor time is {figures['writer_processor_time']:.2%}",
            flush=True,
        )
    return by_role


def cost_figures(job: Job, costs: Sequence[CheckpointCost]) -> dict[str, float]:
    """Return medians over the pairs of runs, and the bytes of a checkpoint."""
    totals = [cost.total for cost in costs]
    checkpoint = job.checkpoints.folder(job.checkpoints.latest())
    return {
        "bytes": sum(path.stat().st_size for path in checkpoint.iterdir()),
        "cost": statistics.median(totals),
        "standard_error": statistics.stdev(totals) / len(totals) ** 0.5,
        "stands_still": statistics.median(cost.stands_still for cost in costs),
        "writer_processor_time": statistics.median(cost.writing for cost in costs),
    }


def main() -> None:
    options = arguments("benchmarks.faults", DESCRIPTION)
    quick = options.quick
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        killed = kills(folder, 4 if quick else 20)
        malformed = fuzz(folder / "whole", folder / "fuzz", 100 if quick else 300)
        cost = checkpoint_cost(folder, quick)

    figures = {"kills": killed, "checkpoint": cost, "malformed": malformed}
    highest_cost = max(of_role["cost"] for of_role in cost.values())
    longest_resume = killed["resume_s"]["longest"] if killed["resume_s"] else 0.0
    damaged = malformed["inputs"] - malformed["harmless"]
    bars = {
        "kills_with_equal_outcome": bar(killed["kills_with_equal_outcome"], killed["kills"]),
        "checkpoint_cost": bar(highest_cost, 0.05, at_least=False),
        "resume_s": bar(longest_resume, 60, at_least=False),
        "malformed_refused_clearly": bar(malformed["refused"], damaged),
    }
    report("faults", figures, bars)


if __name__ == "__main__":
    main()
