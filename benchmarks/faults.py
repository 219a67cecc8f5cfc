"""python -m benchmarks.faults [--quick]: what a run survives, and what that costs.

1. Kills: `run.py pipeline` on a small synthetic stream in a process group of its own, with
   checkpoints inside windows. At random moments (drawn from a fixed seed, from the start to the
   length of an undisturbed run) the whole group gets SIGKILL, and the same command is given again,
   until it ends; then metrics.jsonl, summary.json and every exported weight are compared with the
   undisturbed run's.
2. Resume: seconds from giving the command again, after a kill, to the first new checkpoint (one
   every 1,000 examples).
3. Checkpoint cost: the demo's models in one process, a checkpoint a window: how much longer
   training takes than without any (medians over pairs of runs), the time for which it stands still,
   and the processor time that the writing thread takes beside it.
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

SAYS = "Kills a small pipeline 20 times, times checkpoints, feeds malformed files: about 15 minutes on two cores (--quick: 4)."
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
    "das": {"threads": 1, "keep_snapshots": True},  # one is to be damaged
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
    """One start of the command: how long it ran, how long until its first checkpoint (None: it
    wrote none), its exit code, its output."""

    seconds: float
    learnt_s: float | None
    code: int
    output: str


def attempt(
    folder: Path,
    name: str,
    kill_after_s: float | None,
) -> Attempt:
    """Give the command; SIGKILL to the whole process group after so many seconds, if it has not
    ended by then."""
    command = [
        sys.executable,
        "run.py",
        "pipeline",
        "--config",
        str(folder / "faults.yaml"),
        "--name",
        name,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    before = checkpoints(folder / name)
    started = time.monotonic()
    learnt = None
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    while process.poll() is None and time.monotonic() - started < (kill_after_s or RUN_S):
        if learnt is None and checkpoints(folder / name) - before:
            learnt = time.monotonic() - started
        time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    return Attempt(time.monotonic() - started, learnt, process.returncode, output)


def checkpoints(run: Path) -> set[tuple[str, int]]:
    """Whole checkpoints of a run's jobs, with their times."""
    found = set()
    for path in (run / "checkpoints").glob("*/*/manifest.json"):
        with suppress(FileNotFoundError):
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """All that must be equal: figures of each window, figures of the run, exported weights."""
    rows = [
        {k: v for k, v in row.items() if k != "examples_per_s"}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    by_identity = {json.dumps([row[key] for key in IDENTITY]): row for row in rows}
    assert len(by_identity) == len(rows), "a row was written twice"
    figures = sorted(
        json.dumps(row, sort_keys=True) for row in read_json(folder / "summary.json")["figures"]
    )
    weights = {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted((folder / "exported").rglob("*.safetensors"))
    }
    return {"metrics": by_identity, "figures": figures, "weights": weights}


def kills(folder: Path, count: int) -> dict[str, Any]:
    """Runs killed `KILLS_A_RUN` times each, until there were `count` kills."""
    (folder / "faults.yaml").write_text(yaml.safe_dump(SETTINGS | {"run": {"dir": str(folder)}}))
    whole = attempt(folder, "whole", None)
    assert whole.code == 0, whole.output
    expected = outcome(folder / "whole")
    moments = random.Random(SEED)
    print(f"undisturbed: {whole.seconds:.0f} s", flush=True)
    done = 0
    equal = 0
    runs = 0
    resumed = list[float]()
    tracebacks = 0
    while done < count:
        name = f"killed{runs}"
        killed = 0
        while killed < min(KILLS_A_RUN, count - done):
            moment = moments.uniform(0.5, whole.seconds)
            one = attempt(folder, name, moment)
            if one.code == 0:  # it ended before its moment came
                break
            killed += one.code == -signal.SIGKILL
            tracebacks += "Traceback" in one.output
            assert one.code == -signal.SIGKILL, one.output
        if killed:
            last = attempt(folder, name, None)
            assert last.code == 0, last.output
            resumed += [last.learnt_s] if last.learnt_s is not None else []
            same = outcome(folder / name) == expected
            done = done + killed
            equal = equal + killed * same
            tracebacks = tracebacks + ("Traceback" in last.output)
            took = (
                f"{last.learnt_s:.0f} s"
                if last.learnt_s is not None
                else "nothing was left to learn"
            )
            print(
                f"run {runs}: {killed} kills, {'equal' if same else 'NOT EQUAL'} to the undisturbed one; first checkpoint after {took}",
                flush=True,
            )
        runs += 1
    return {
        "kills": done,
        "kills_with_equal_outcome": equal,
        "runs": runs,
        "undisturbed_s": whole.seconds,
        "tracebacks": tracebacks,
        "resume_s": {
            "median": statistics.median(resumed),
            "longest": max(resumed),
            "measured": len(resumed),
        }
        if resumed
        else None,
    }


class NoSaver(AsyncCheckpointer):
    """Saves nothing."""

    def stage(self, *_: Any) -> None:
        pass

    def save(self, *_: Any) -> None:
        pass


def trained(job: Job, saver: type[AsyncCheckpointer]) -> Worker:
    """A job that was trained from the start, in this process."""
    stream = EventStream.open(job.stream_root)
    if saver is AsyncCheckpointer:
        shutil.rmtree(job.checkpoints.root, ignore_errors=True)
    worker = Worker(job, None, InMemoryReport(), torch.device("cpu"))
    worker.loop.client = LocalClient(worker.loop.reader, job.passes(stream.windows(), BEGINNING))  # type: ignore[assignment]
    worker.saver = saver(job.checkpoints, worker.saver.keep)
    worker.run(stream.windows(), BEGINNING)
    return worker


def seconds_of(worker: Worker) -> float:
    """In which it has trained, all windows but the first, beside which no checkpoint is written."""
    return sum(t.evaluate_s + t.learn_s for t in worker.loop.timings[1:])


def checkpoint_cost(folder: Path, quick: bool) -> dict[str, Any]:
    """The demo's FM and vertical models, each in this process, a checkpoint a window against
    none."""
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
    found = {}
    prepare(settings)
    for job in (Job("fm", settings), Job("vm", settings, settings.vm.models)):
        costs = []
        still = []
        writing = []
        for number in range(pairs + 1):  # the first one warms up
            order = (AsyncCheckpointer, NoSaver) if number % 2 else (NoSaver, AsyncCheckpointer)
            by_saver = {saver: trained(job, saver) for saver in order}
            saved = by_saver[AsyncCheckpointer]
            bare = seconds_of(by_saver[NoSaver])
            stood, wrote = (
                seconds / windows * (windows - 1) / bare
                for seconds in (saved.saver.seconds, saved.saver.writing_s)
            )
            costs.append(stood + seconds_of(saved) / bare - 1)
            still.append(stood)
            writing.append(wrote)
        size = sum(
            path.stat().st_size
            for path in job.checkpoints.folder(job.checkpoints.latest()).iterdir()
        )
        cost = statistics.median(costs[1:])
        spread = statistics.stdev(costs[1:]) / pairs**0.5
        found[job.role] = {
            "bytes": size,
            "cost": cost,
            "standard_error": spread,
            "stands_still": statistics.median(still[1:]),
            "writer_processor_time": statistics.median(writing[1:]),
        }
        print(
            f"{job.role}: {size / 1e6:.1f} MB a checkpoint; training takes {cost:.1%} longer (standard error {spread:.1%}), of which it stands "
            f"still for {statistics.median(still[1:]):.2%}; the writing thread's processor time is {statistics.median(writing[1:]):.2%}",
            flush=True,
        )
    return found


def main() -> None:
    options = arguments("benchmarks.faults", SAYS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        killed = kills(folder, 4 if options.quick else 20)
        malformed = fuzz(folder / "whole", folder / "fuzz", 100 if options.quick else 300)
        cost = checkpoint_cost(folder, options.quick)
    figures = {"kills": killed, "checkpoint": cost, "malformed": malformed}
    bars = {
        "kills_with_equal_outcome": bar(killed["kills_with_equal_outcome"], killed["kills"]),
        "checkpoint_cost": bar(max(role["cost"] for role in cost.values()), 0.05, at_least=False),
        "resume_s": bar(
            killed["resume_s"]["longest"] if killed["resume_s"] else 0.0, 60, at_least=False
        ),
        "malformed_told_clearly": bar(
            malformed["told"], malformed["inputs"] - malformed["harmless"]
        ),
    }
    report("faults", figures, bars)


if __name__ == "__main__":
    main()
