"""Training speed beside peers, on the same data, sizes and threads, in turn within one run.

    python -m benchmarks.peers [--data DIR] [--quick] [--peer-python PATH]

DIR holds `frappe/train.csv`. The peers are FuxiCTR's and torch-rechub's DCNv2, each with its own
trainer and loader, and Wukong in plain torch (`peer_models.py`), for no peer that can be installed
has one. They run in the interpreter PATH:

    python3.11 -m venv peers && peers/bin/pip install torch==2.13.0 fuxictr==2.3.10
    torch-rechub==0.9.0

and `--peer-python peers/bin/python`; PATH is not needed where they are installed beside exfm-ray.
Two settings: Frappe, each table as small as its column; and the same with 5 million ids for the
user. Batches of 4096, dim 16, all cores to torch on both sides, float32; and ours once more in bf16
(`fast`), a setting that the peers do not have. Ours: tables with row-wise Adagrad, dense part with
Adam, no file read ahead; peers: Adam over everything, as they come.

A pass is timed with the side's own way from the data to the batch (ours reads the stream's files; a
peer has its rows in memory and gets the quickest of its loaders, found by trial), and again with
batches ready in memory (`step`). Ratios are medians of pairs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from benchmarks.common import arguments, bar, report
from benchmarks.peer_models import LOADERS, READY
from exfm_ray.config.root import Config
from exfm_ray.data.batch import to_batch
from exfm_ray.data.prepare.packer import packed
from exfm_ray.data.rebatch import regroup
from exfm_ray.data.sources.base import indexed
from exfm_ray.data.sources.frappe import COLUMNS
from exfm_ray.data.stream import EventStream, StreamWriter
from exfm_ray.schema import DOMAIN_FEATURE, Schema
from exfm_ray.training.job import Job
from exfm_ray.training.local import init_single_process
from exfm_ray.training.train_batch import TrainBatch
from exfm_ray.training.worker import build_groups

SAYS = "Times training of Wukong and DCNv2 and of their peers on Frappe, and with a table of 5 million ids: about 9 minutes (--quick: 2)."
INSTALL = "python3.11 -m venv peers && peers/bin/pip install torch==2.13.0 fuxictr==2.3.10 torch-rechub==0.9.0"
BATCH_SIZE = 4096
DIM = 16
MANY_IDS = 5_000_000
THREADS = len(os.sched_getaffinity(0))
CPU = torch.device("cpu")
FAST = {"precision": "bf16"}
MODELS: dict[str, dict[str, Any]] = {
    "dcnv2": {"type": "dcnv2", "dim": DIM, "cross_layers": 2, "mlp": [64, 32]},
    "wukong": {
        "type": "wukong",
        "dim": DIM,
        "l": 2,
        "n_F": 8,
        "n_L": 8,
        "k": 8,
        "fmb_mlp": [128],
        "mlp": [128],
    },
    "dcnv2_wide": {"type": "dcnv2", "dim": DIM, "cross_layers": 3, "mlp": [400, 400, 400]},
}


class Setting(NamedTuple):
    """The data of some comparisons: at most so many batches of Frappe, with ids of its own for the
    user; how often passes are paired."""

    name: str
    user_ids: int | None
    batches: int
    pairs: int


FULL = (Setting("frappe", None, 50, 3), Setting("ids_5m", MANY_IDS, 5, 3))
QUICK = (Setting("frappe", None, 5, 1), Setting("ids_5m", MANY_IDS, 2, 1))


class Pairing(NamedTuple):
    """One comparison; `least` is the bar of its ratio."""

    setting: str
    model: str
    peer: str
    least: float | None

    @property
    def name(self) -> str:
        return f"{self.setting}_{self.model}_over_{self.peer}"


PAIRINGS = (
    Pairing("frappe", "dcnv2", "fuxictr", 2.0),
    Pairing("frappe", "dcnv2", "torch_rechub", 2.0),
    Pairing("frappe", "wukong", "plain_torch", 2.0),
    Pairing("frappe", "dcnv2_wide", "fuxictr", None),
    Pairing("ids_5m", "dcnv2", "fuxictr", 5.0),
    Pairing("ids_5m", "dcnv2", "torch_rechub", 5.0),
    Pairing("ids_5m", "wukong", "plain_torch", 5.0),
)


def write_setting(
    folder: Path,
    raw: pd.DataFrame,
    user_ids: int | None,
) -> None:
    """The rows as a stream of one window, and as the peers read them; all columns and the domain,
    ids from 1 on."""
    ids = {name: raw[name].factorize()[0] + 1 for name in COLUMNS}
    counts = {name: int(column.max()) for name, column in ids.items()}
    if user_ids:  # log-uniform: Zipf's law with exponent 1
        counts["user"] = user_ids
        ids["user"] = (user_ids ** np.random.default_rng(0).random(len(raw))).astype(np.int64)
    schema = Schema(
        features=tuple(indexed(name, counts[name]) for name in COLUMNS), tasks=("label",)
    )
    ids[DOMAIN_FEATURE] = np.ones(len(raw), np.int64)
    labels = raw["label"].to_numpy(np.float32)
    number = np.arange(len(raw))
    sparse = np.stack(list(ids.values()), axis=1)
    table = packed(
        schema,
        number,
        number,
        np.zeros(len(raw)),
        labels[:, None],
        sparse,
        np.zeros((len(raw), 0)),
        {},
    )
    writer = StreamWriter(folder / "stream", schema, {}, fragment_rows=50_000)
    writer.write_window(0, 0, len(raw), 0, [table])
    writer.finish({"rows": len(raw)})
    np.savez(folder / "train.npz", **{**ids, "label": labels})  # type: ignore[arg-type]  # of its stub
    pd.DataFrame({**ids, "label": labels}).to_parquet(folder / "train.parquet")
    (folder / "tables.json").write_text(json.dumps({f.name: f.rows for f in schema.single}))


class Ours:
    """One model on one core group: a pass over the stream from its files, or over batches in
    memory."""

    def __init__(
        self,
        folder: Path,
        model: str,
        **trainer: Any,
    ) -> None:
        fm = {"batch_size": BATCH_SIZE, "model": MODELS[model], **trainer}
        job = Job(
            "fm",
            Config.model_validate({"name": folder.name, "run": {"dir": folder.parent}, "fm": fm}),
        )
        self.stream = EventStream.open(job.stream_root)
        (self.group,) = build_groups(job, self.stream.schema, CPU)
        fragments = self.stream.window(0).fragments
        tables = (self.stream.read(0, fragment) for fragment in fragments)
        self.ready = [to_batch(rows, self.stream.schema) for rows in regroup(tables, BATCH_SIZE)]
        self.fragments = fragments

    def __call__(self, way: str) -> float:
        """Seconds of a pass; `way` is READY, or anything else for the way from the files."""
        started = time.perf_counter()
        if way == READY:
            for batch in self.ready:
                weight_B = torch.full((len(batch),), 1 / len(batch))
                self.group.trainers[0].learn(TrainBatch(batch, weight_B))
        else:
            for rows in regroup(
                (self.stream.read(0, fragment) for fragment in self.fragments), BATCH_SIZE
            ):
                self.group.learn(rows)
        return time.perf_counter() - started


class Theirs:
    """A peer in a process of its own, as a context."""

    def __init__(
        self,
        python: Path,
        folder: Path,
        pairing: Pairing,
    ) -> None:
        settings = {
            "tables": json.loads((folder / "tables.json").read_text()),
            "dim": DIM,
            "batch_size": BATCH_SIZE,
            "threads": THREADS,
        }
        (folder / "settings.json").write_text(
            json.dumps({**settings, "model": MODELS[pairing.model]})
        )
        self._log = folder / f"{pairing.peer}.log"
        self._command = [
            str(python),
            str(Path(__file__).with_name("peer_models.py")),
            str(folder),
            pairing.peer,
        ]

    def __enter__(self) -> Callable[[str], float]:
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "text": True,
            "bufsize": 1,
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self._command, stderr=log, **pipes)
        return self.train

    def train(self, way: str) -> float:
        """Seconds of a pass of the peer; `way` is one of its loaders, or READY."""
        assert self._process.stdin and self._process.stdout
        print(way, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(
                f"the peer's process ended: {' '.join(self._command)}\n{self._log.read_text()[-2000:]}"
            )
        return float(answer)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def quickest_loader(
    peer: Theirs,
    name: str,
    rows: int,
) -> tuple[str, dict[str, float]]:
    """The peer's loader with the most examples/s in the second of two passes, and what each had."""
    speeds = {}
    for loader in LOADERS[name]:
        with peer as train:
            train(loader)
            speeds[loader] = rows / train(loader)
    best = max(speeds, key=lambda loader: speeds[loader])
    return best, speeds


def compare(
    ours: Ours,
    fast: Ours,
    train: Callable[[str], float],
    loader: str,
    pairs: int,
) -> dict[str, Any]:
    """Passes in turn after one of each side to warm up: examples/s of all, ratios over the peer;
    with loading, and steps alone."""
    figures: dict[str, Any] = {"loader": loader}
    rows = sum(len(batch) for batch in ours.ready)
    for kind, way in (("pass", loader), ("step", READY)):
        seconds = [(ours(way), fast(way), train(way)) for _ in range(pairs + 1)][1:]
        ratios = [theirs / own for own, _, theirs in seconds]
        fast_ratios = [theirs / own for _, own, theirs in seconds]
        own, own_fast, theirs = (
            rows / statistics.median(side) for side in zip(*seconds, strict=True)
        )
        figures[kind] = {
            "ours": own,
            "fast": own_fast,
            "peer": theirs,
            "ratio": statistics.median(ratios),
            "ratios": [min(ratios), max(ratios)],
        }
        figures[kind] |= {
            "fast_ratio": statistics.median(fast_ratios),
            "fast_ratios": [min(fast_ratios), max(fast_ratios)],
        }
    return figures


def variants(
    folder: Path,
    model: str,
    quick: bool,
) -> dict[str, float]:
    """Examples/s of ours over batches in memory, by precision and, if not `quick`, compilation."""
    settings: dict[str, dict[str, Any]] = {
        "fp32": {},
        "fp32_medium": {"matmul_precision": "medium"},
        "bf16": FAST,
    }
    if not quick:
        settings |= {"fp32_compiled": {"compile": True}, "bf16_compiled": {**FAST, "compile": True}}
    speeds = {}
    for name, changed in settings.items():
        ours = Ours(folder, model, **changed)
        seconds = [ours(READY) for _ in range(3)][1:]
        speeds[name] = sum(len(batch) for batch in ours.ready) / min(seconds)
    print(
        f"{model}, steps: "
        + ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items())
        + " examples/s",
        flush=True,
    )
    return speeds


def peer_python(given: Path | None) -> Path:
    """The interpreter that has the peers; ends the program, saying how to make one, where it lacks
    them."""
    python = given or Path(sys.executable)
    way_out = f"Make one that can, and name it by --peer-python:\n  {INSTALL}"
    check = [
        str(python),
        "-c",
        "import fuxictr.pytorch.models, torch_rechub.trainers, torch; print(torch.__version__.split('+')[0])",
    ]
    done = subprocess.run(check, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{python} cannot import the peers: {done.stderr.strip().splitlines()[-1]}\n{way_out}"
        )
    if done.stdout.strip() != torch.__version__.split("+")[0]:
        sys.exit(
            f"{python} has torch {done.stdout.strip()}, this is {torch.__version__}: both sides need the same.\n{way_out}"
        )
    return python


def run(
    python: Path,
    folder: Path,
    pairing: Pairing,
    loader: str | None,
    pairs: int,
) -> dict[str, Any]:
    """One comparison; the peer's quickest loader is found where none is given."""
    peer = Theirs(python, folder, pairing)
    trials: dict[str, Any] = {}
    if loader is None:
        loader, trials = quickest_loader(
            peer, pairing.peer, len(pd.read_parquet(folder / "train.parquet", columns=["label"]))
        )
    with peer as train:
        found = compare(
            Ours(folder, pairing.model), Ours(folder, pairing.model, **FAST), train, loader, pairs
        )
    words = "{0}: ours {1[ours]:,.0f}, fast {1[fast]:,.0f}, peer {1[peer]:,.0f}, ratios {1[ratio]:.2f} and {1[fast_ratio]:.2f}"
    told = (words.format(kind, found[kind]) for kind in ("pass", "step"))
    print(f"{pairing.name}, examples/s: {', '.join(told)}; its loader: {loader}", flush=True)
    return found | ({"loaders": trials} if trials else {})


def main() -> None:
    options = arguments(
        "benchmarks.peers", SAYS, {"--peer-python": "interpreter that has fuxictr, torch-rechub and torch"}
    )
    python = peer_python(options.peer_python)
    source = options.data / "frappe" / "train.csv"
    if not source.is_file():
        sys.exit(f"{source}: no such file; --data names the folder that holds frappe/")
    torch.set_num_threads(THREADS)
    init_single_process()
    raw = pd.read_csv(source)
    figures: dict[str, Any] = {}
    loaders: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for setting in QUICK if options.quick else FULL:
            folder = Path(scratch) / setting.name
            folder.mkdir()
            write_setting(folder, raw[: setting.batches * BATCH_SIZE], setting.user_ids)
            for pairing in (p for p in PAIRINGS if p.setting == setting.name):
                found = run(python, folder, pairing, loaders.get(pairing.peer), setting.pairs)
                figures[pairing.name], loaders[pairing.peer] = found, found["loader"]
        figures["variants"] = {
            model: variants(Path(scratch) / "frappe", model, options.quick) for model in MODELS
        }
    bars = {p.name: bar(figures[p.name]["pass"]["ratio"], p.least) for p in PAIRINGS if p.least}
    bars |= {
        f"{p.name}_fast": bar(figures[p.name]["pass"]["fast_ratio"], p.least)
        for p in PAIRINGS
        if p.least
    }
    report(
        "peers", {"threads": THREADS, "batch_size": BATCH_SIZE, "models": MODELS, **figures}, bars
    )


if __name__ == "__main__":
    main()
