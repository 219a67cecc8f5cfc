"""Training speed beside peers, on the same data, sizes and threads, in turn within one run.

    python -m benchmarks.peers [--data DIR] [--quick] [--peer-python PATH]

DIR holds `frappe/train.csv`. The peers are FuxiCTR's and torch-rechub's DCNv2, each with its own
trainer and loader, and Wukong in plain torch (`peer_models.py`), because no peer that can be
installed has one. They run in the interpreter PATH:

    python3.11 -m venv peers && peers/bin/pip install \\
        torch==2.13.0 fuxictr==2.3.10 torch-rechub==0.9.0

and `--peer-python peers/bin/python`. PATH is not needed where they are installed beside exfm-ray.

Two settings: Frappe, each table as small as its column; and the same with 5 million ids for the
user. Batches of 4096, dim 16, all cores for torch on both sides, float32; and ours once more in
bf16 (`fast`), a setting that the peers do not have. Ours: tables with row-wise Adagrad, dense part
with Adam, no file read ahead. Peers: Adam over everything, as they come.

A pass is timed with the side's own way from the data to the batch (ours reads the stream's files; a
peer has its rows in memory and uses its quickest loader, which is found by trial), and again with
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
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

DESCRIPTION = (
    "Times training of Wukong and DCNv2 and of their peers on Frappe, and with a table of "
    "5 million ids: about 9 minutes (--quick: 2)."
)
INSTALL = (
    "python3.11 -m venv peers && "
    "peers/bin/pip install torch==2.13.0 fuxictr==2.3.10 torch-rechub==0.9.0"
)
CHECK = (
    "import fuxictr.pytorch.models, torch_rechub.trainers, torch; "
    "print(torch.__version__.split('+')[0])"
)
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
    """The data of some comparisons.

    Attributes:
        user_ids: number of ids of the user; None for those of Frappe.
        batches: at most so many batches of Frappe are used.
        pairs: how often a pass of each side is timed.
    """

    name: str
    user_ids: int | None
    batches: int
    pairs: int


FULL = (Setting("frappe", None, 50, 3), Setting("ids_5m", MANY_IDS, 5, 3))
QUICK = (Setting("frappe", None, 5, 1), Setting("ids_5m", MANY_IDS, 2, 1))


class Pairing(NamedTuple):
    """One comparison.

    Attributes:
        least: bar of the ratio of our examples/s over the peer's; None without a bar.
    """

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
    """Write the rows as a stream of one window, and as the peers read them.

    Both have all columns and the domain; ids count from 1.
    """
    ids = {name: raw[name].factorize()[0] + 1 for name in COLUMNS}
    counts = {name: int(column.max()) for name, column in ids.items()}
    if user_ids:  # log-uniform: Zipf's law with exponent 1
        exponents = np.random.default_rng(0).random(len(raw))
        counts["user"] = user_ids
        ids["user"] = (user_ids**exponents).astype(np.int64)
    features = tuple(indexed(name, counts[name]) for name in COLUMNS)
    schema = Schema(features=features, tasks=("label",))
    ids[DOMAIN_FEATURE] = np.ones(len(raw), np.int64)
    labels = raw["label"].to_numpy(np.float32)

    number = np.arange(len(raw))
    table = packed(
        schema,
        number,
        number,
        np.zeros(len(raw)),
        labels[:, None],
        np.stack(list(ids.values()), axis=1),
        np.zeros((len(raw), 0)),
        {},
    )
    writer = StreamWriter(folder / "stream", schema, {}, fragment_rows=50_000)
    writer.write_window(0, 0, len(raw), 0, [table])
    writer.finish({"rows": len(raw)})

    columns: dict[str, Any] = {**ids, "label": labels}
    np.savez(folder / "train.npz", **columns)
    pd.DataFrame(columns).to_parquet(folder / "train.parquet")
    rows = {feature.name: feature.rows for feature in schema.single}
    (folder / "tables.json").write_text(json.dumps(rows))


class Ours:
    """One of our models.

    Trains a pass over the stream from its files, or over batches in memory.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        **trainer: Any,
    ) -> None:
        tree = {
            "name": folder.name,
            "run": {"dir": folder.parent},
            "fm": {"batch_size": BATCH_SIZE, "model": MODELS[model], **trainer},
        }
        job = Job("fm", Config.model_validate(tree))
        self.stream = EventStream.open(job.stream_root)
        (self.group,) = build_groups(job, self.stream.schema, CPU)
        self.batches = [to_batch(rows, self.stream.schema) for rows in self._from_files()]
        self.rows = sum(len(batch) for batch in self.batches)

    def train(self, way: str) -> float:
        """Train a pass; seconds.

        Args:
            way: READY for the batches in memory, anything else for the stream's files.
        """
        started = time.perf_counter()
        if way == READY:
            for batch in self.batches:
                weights_B = torch.full((len(batch),), 1 / len(batch))
                self.group.trainers[0].learn(TrainBatch(batch, weights_B))
        else:
            for rows in self._from_files():
                self.group.learn(rows)
        return time.perf_counter() - started

    def _from_files(self) -> Iterator[pa.Table]:
        """Yield the rows of the stream in batches."""
        fragments = self.stream.window(0).fragments
        tables = (self.stream.read(0, fragment) for fragment in fragments)
        return regroup(tables, BATCH_SIZE)


class Peer:
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
            "model": MODELS[pairing.model],
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        script = Path(__file__).with_name("peer_models.py")
        self._log = folder / f"{pairing.peer}.log"
        self._command = [str(python), str(script), str(folder), pairing.peer]

    def __enter__(self) -> Callable[[str], float]:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )
        return self.train

    def train(self, way: str) -> float:
        """Train a pass of the peer; seconds.

        Args:
            way: one of its loaders, or READY.
        """
        assert self._process.stdin and self._process.stdout
        print(way, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            command = " ".join(self._command)
            sys.exit(f"the peer's process ended: {command}\n{self._log.read_text()[-2000:]}")
        return float(answer)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def quickest_loader(
    peer: Peer,
    name: str,
    rows: int,
) -> tuple[str, dict[str, float]]:
    """Return the peer's quickest loader, and the examples/s of each in the second of two passes."""
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
    train_peer: Callable[[str], float],
    way: str,
    pairs: int,
) -> dict[str, Any]:
    """Train passes in turn, after one of each side to warm up.

    Returns:
        Examples/s of ours, fast and the peer, and the ratios over the peer.
    """
    own_s = []
    fast_s = []
    peer_s = []
    for _ in range(pairs + 1):
        own_s.append(ours.train(way))
        fast_s.append(fast.train(way))
        peer_s.append(train_peer(way))
    del own_s[0], fast_s[0], peer_s[0]

    ratios = [peer / own for own, peer in zip(own_s, peer_s, strict=True)]
    fast_ratios = [peer / own for own, peer in zip(fast_s, peer_s, strict=True)]
    return {
        "ours": ours.rows / statistics.median(own_s),
        "fast": ours.rows / statistics.median(fast_s),
        "peer": ours.rows / statistics.median(peer_s),
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
        "fast_ratio": statistics.median(fast_ratios),
        "fast_ratios": [min(fast_ratios), max(fast_ratios)],
    }


def variants(
    folder: Path,
    model: str,
    quick: bool,
) -> dict[str, float]:
    """Return examples/s of ours over batches in memory, by precision and compilation.

    Without compilation where `quick`.
    """
    settings: dict[str, dict[str, Any]] = {
        "fp32": {},
        "fp32_medium": {"matmul_precision": "medium"},
        "bf16": FAST,
    }
    if not quick:
        settings["fp32_compiled"] = {"compile": True}
        settings["bf16_compiled"] = {**FAST, "compile": True}
    speeds = {}
    for name, changed in settings.items():
        ours = Ours(folder, model, **changed)
        seconds = [ours.train(READY) for _ in range(3)]
        speeds[name] = ours.rows / min(seconds[1:])
    parts = [f"{name} {speed:,.0f}" for name, speed in speeds.items()]
    print(f"{model}, steps: {', '.join(parts)} examples/s", flush=True)
    return speeds


def peer_python(requested: Path | None) -> Path:
    """Return the interpreter that has the peers.

    Ends the program with instructions to make one where they are missing.
    """
    python = requested or Path(sys.executable)
    way_out = f"Make one that can, and name it by --peer-python:\n  {INSTALL}"
    done = subprocess.run([str(python), "-c", CHECK], capture_output=True, text=True)
    if done.returncode:
        last_line = done.stderr.strip().splitlines()[-1]
        sys.exit(f"{python} cannot import the peers: {last_line}\n{way_out}")
    peer_version = done.stdout.strip()
    if peer_version != torch.__version__.split("+")[0]:
        sys.exit(
            f"{python} has torch {peer_version}, this is {torch.__version__}: "
            f"both sides need the same.\n{way_out}"
        )
    return python


def run(
    python: Path,
    folder: Path,
    pairing: Pairing,
    loader: str | None,
    pairs: int,
) -> dict[str, Any]:
    """Make one comparison.

    Args:
        loader: the peer's quickest loader; None to find it.
    """
    peer = Peer(python, folder, pairing)
    speeds: dict[str, float] = {}
    if loader is None:
        rows = len(pd.read_parquet(folder / "train.parquet", columns=["label"]))
        loader, speeds = quickest_loader(peer, pairing.peer, rows)
    ours = Ours(folder, pairing.model)
    fast = Ours(folder, pairing.model, **FAST)
    figures: dict[str, Any] = {"loader": loader}
    with peer as train_peer:
        figures["pass"] = compare(ours, fast, train_peer, loader, pairs)
        figures["step"] = compare(ours, fast, train_peer, READY, pairs)
    if speeds:
        figures["loaders"] = speeds

    parts = [comparison_text(kind, figures[kind]) for kind in ("pass", "step")]
    print(f"{pairing.name}, examples/s: {', '.join(parts)}; its loader: {loader}", flush=True)
    return figures


def comparison_text(kind: str, figures: Mapping[str, Any]) -> str:
    """Describe one comparison in a line."""
    return (
        f"{kind}: ours {figures['ours']:,.0f}, fast {figures['fast']:,.0f}, "
        f"peer {figures['peer']:,.0f}, ratios {figures['ratio']:.2f} and "
        f"{figures['fast_ratio']:.2f}"
    )


def main() -> None:
    help_text = "interpreter that has fuxictr, torch-rechub and torch"
    options = arguments("benchmarks.peers", DESCRIPTION, {"--peer-python": help_text})
    python = peer_python(options.peer_python)
    source = options.data / "frappe" / "train.csv"
    if not source.is_file():
        sys.exit(f"{source}: no such file; --data names the folder that holds frappe/")
    torch.set_num_threads(THREADS)
    init_single_process()
    raw = pd.read_csv(source)

    figures: dict[str, Any] = {}
    loaders: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for setting in QUICK if options.quick else FULL:
            folder = Path(scratch) / setting.name
            folder.mkdir()
            write_setting(folder, raw[: setting.batches * BATCH_SIZE], setting.user_ids)
            for pairing in PAIRINGS:
                if pairing.setting == setting.name:
                    loader = loaders.get(pairing.peer)
                    comparison = run(python, folder, pairing, loader, setting.pairs)
                    figures[pairing.name] = comparison
                    loaders[pairing.peer] = comparison["loader"]
        frappe = Path(scratch) / "frappe"
        figures["variants"] = {model: variants(frappe, model, options.quick) for model in MODELS}

    bars = {}
    with_bar = [pairing for pairing in PAIRINGS if pairing.least]
    for key, suffix in (("ratio", ""), ("fast_ratio", "_fast")):
        for pairing in with_bar:
            ratio = figures[pairing.name]["pass"][key]
            bars[f"{pairing.name}{suffix}"] = bar(ratio, pairing.least or 0.0)
    sizes = {"threads": THREADS, "batch_size": BATCH_SIZE, "models": MODELS}
    report("peers", {**sizes, **figures}, bars)


if __name__ == "__main__":
    main()
