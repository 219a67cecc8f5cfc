"""Malformed files, configs and checkpoints: each must be refused in one clear line.

None may end in a traceback. Whole files of a finished run are damaged by seeded mutations: a bit
flipped, bytes cut off, inserted or replaced, JSON values replaced, removed, or changed to point out
of their folder. Then the code that reads that file reads it. An input is `refused` where the reader
refuses it in one line that names the file or the setting; `harmless` where the result is what was
written. A mutation that changes the result without an error is `wrong`, and so is any other error.
"""

from __future__ import annotations

import io
import json
import random
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from exfm_ray.config.root import Config
from exfm_ray.data.readers import WindowPass
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.pipeline.runner import PipelineRunner
from exfm_ray.stores.readers import AugmentedReader
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.stores.supervision import SupervisionStore
from exfm_ray.training.checkpoint import Checkpoints

SEED = 11
JSON_FRACTION = 0.6
"""How often a JSON file gets a mutation that leaves it JSON."""

Reader = Callable[[Path], object]
"""Reads what a target's file belongs to in a run's folder; the result is what was read."""
Mutation = Callable[[Path, random.Random], object]
"""Damages a file in place."""


@dataclass(frozen=True)
class Target:
    """A file to damage.

    Attributes:
        pattern: glob of the file below the run's folder.
        read: the reader of the file.
        never: a mutation that is no damage to it.
    """

    pattern: str
    read: Reader
    never: str = ""


def fuzz(
    run: Path,
    scratch: Path,
    inputs: int,
) -> dict[str, Any]:
    """Read `inputs` malformed inputs made from the files of a finished run.

    Returns:
        inputs, refused, harmless, and `wrong`: file, mutation and outcome of each other input.
    """
    rng = random.Random(SEED)
    counts = Counter[str]()
    wrong = list[str]()
    undamaged = {(target.pattern, target.read): _read(target.read, run) for target in TARGETS}
    for number in range(inputs):
        target = TARGETS[number % len(TARGETS)]
        files = sorted(run.glob(target.pattern))
        assert files, target.pattern
        file = rng.choice(files)
        copy = _copy(run, scratch)
        mutation = _mutate(copy / file.relative_to(run), target, rng)

        outcome = _read(target.read, copy)
        kind = outcome[0] if outcome[0] == "refused" else "wrong"
        if outcome == undamaged[target.pattern, target.read]:
            kind = "harmless"
        counts[kind] += 1
        if kind == "wrong":
            wrong.append(f"{file.relative_to(run)}, {mutation}: {outcome}"[:400])

    for text in BAD_CONFIGS:
        outcome = _read(partial(_config, text=text), scratch)
        kind = outcome[0] if outcome[0] == "refused" else "wrong"
        counts[kind] += 1
        if kind == "wrong":
            wrong.append(f"config {text!r}: {outcome}"[:400])
    shutil.rmtree(scratch, ignore_errors=True)
    print(f"malformed inputs: {dict(counts)}", *wrong, sep="\n  ", flush=True)
    return {
        "inputs": inputs + len(BAD_CONFIGS),
        "refused": counts["refused"],
        "harmless": counts["harmless"],
        "wrong": wrong,
    }


def _copy(run: Path, scratch: Path) -> Path:
    """Copy a run into the empty folder `scratch`; the copy."""
    shutil.rmtree(scratch, ignore_errors=True)
    copy = scratch / run.name
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("wandb", "ray_train"))
    return copy


def _mutate(
    file: Path,
    target: Target,
    rng: random.Random,
) -> str:
    """Damage a file; the name of the mutation."""
    mutations = MUTATIONS
    if file.suffix in OF_KIND and rng.random() < JSON_FRACTION:
        mutations = OF_KIND[file.suffix]
    name = rng.choice([name for name in mutations if name != target.never])
    mutations[name](file, rng)
    return name


def _read(read: Reader, run: Path) -> tuple[str, object]:
    """("read", what was read), ("refused", the message) or ("error", what it was)."""
    try:
        return "read", read(run)
    except UserError as error:
        line = str(error)
        return ("refused", line) if 20 < len(line) < 1500 else ("error", line)
    except Exception as error:  # a person would see a traceback
        return "error", f"{type(error).__name__}: {error}"


def _stream(run: Path) -> object:
    stream = EventStream.open(run / "stream")
    window = stream.window(1)
    return [stream.read(1, fragment).to_pydict() for fragment in window.fragments]


def _supervision(run: Path) -> object:
    stream = EventStream.open(run / "stream")
    store = SupervisionStore(run / "supervision", "fm")
    reader = AugmentedReader(run / "stream", store, SnapshotPolicy(1), (0,), ("click",))
    return [
        reader.read(WindowPass(2, "learn"), fragment).to_pydict()
        for fragment in stream.window(2).fragments
    ]


def _snapshot(run: Path) -> object:
    stream = EventStream.open(run / "stream")
    store = SnapshotStore(run / "snapshots", "fm")
    model, tasks = store.load(2, stream.schema.digest)
    tensors = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return tensors, tasks


def _checkpoint(run: Path) -> object:
    """Report damage, and read the checkpoint before."""
    checkpoints = Checkpoints(run / "checkpoints" / "fm")
    messages = list(checkpoints.set_aside_damaged())
    cursor = checkpoints.latest()
    result = checkpoints.result(cursor)
    if messages:
        raise UserError(messages[0])
    figures = {key: state.figures() for key, state in result.states.items()}
    return cursor, figures, result.timings


def _run_module(arguments: Sequence[str]) -> int:
    """`python -m exfm_ray` in this process; its exit code."""
    before = sys.argv
    sys.argv = ["exfm_ray", *arguments]
    try:
        runpy.run_module("exfm_ray", run_name="__main__")
    except SystemExit as ending:
        return int(ending.code or 0)
    finally:
        sys.argv = before
    return 0


def _command(*arguments: str) -> str:
    """Run a command in this process; what it prints.

    Raises:
        UserError: the command refuses in one line.
    """
    out = io.StringIO()
    errors = io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        code = _run_module(arguments)
    if not code:
        return out.getvalue()
    line = errors.getvalue().strip()
    if line.startswith("error: ") and "\n" not in line:
        raise UserError(line)
    raise RuntimeError(line)


def _report(run: Path) -> object:
    """Report on a run. A file that is missing or incomplete reads as a run that is not as far."""
    _command("report", str(run))
    return "a report"


def _summarize(run: Path) -> object:
    """Write summary.json of a finished run again.

    Without the peak memory, which comes from the last summary.
    """
    documents = yaml.safe_load_all((run / "config.yaml").read_text())
    config = Config.model_validate(next(iter(documents)))
    here = config.run.model_copy(update={"dir": run.parent})
    config = config.model_copy(update={"run": here})
    summary = PipelineRunner(config, EventStream.open(run / "stream")).summarize()
    return summary["windows"], summary["figures"]


def _export(run: Path) -> object:
    target = run.parent / "exported"
    shutil.rmtree(target, ignore_errors=True)
    _command("export", str(run), "--vm", "feed", "--arm", "labels", "--to", str(target))
    return sorted((path.name, path.stat().st_size) for path in target.iterdir())


def _config(folder: Path, text: str) -> object:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bad.yaml").write_text(text)
    return _command("plan", "--config", str(folder / "bad.yaml"))


TARGETS = [
    Target("stream/schema.json", _stream),
    Target("stream/window=001/manifest.json", _stream),
    Target("stream/window=001/*.parquet", _stream),
    Target("supervision/fm/window=002/manifest.json", _supervision),
    Target("supervision/fm/window=002/*.parquet", _supervision),
    Target("snapshots/fm/version=002/model.json", _snapshot),
    Target("snapshots/fm/version=002/*.safetensors", _snapshot),
    # Without a manifest there is no checkpoint yet.
    Target("checkpoints/fm/windows=*/manifest.json", _checkpoint, "removed"),
    Target("checkpoints/fm/windows=*/*.safetensors", _checkpoint),
    Target("exported/feed-labels/*", _export),
    Target("metrics.jsonl", _report),
    Target("timeline.jsonl", _report),
    Target("summary.json", _report),
    Target("summary.json", _summarize),
    Target("timeline.jsonl", _summarize),
    Target("config.yaml", _report),
]

BAD_CONFIGS = [
    "[]",
    "7",
    "a: b",
    "name: ../../etc",
    "name: a/b",
    "name: ''",
    "seed: -1",
    "seed: x",
    "{",
    "\t",
    "fm: 3",
    "fm: {workers: 0}",
    "fm: {workers: 1e9x}",
    "fm: {workers: 1, min_workers: 2}",
    "fm: {zero_stage: 4}",
    "fm: {model: {type: nothing}}",
    "fm: {model: {dim: 8}}",
    "fm: {precision: fp64}",
    "fm: {zero_stage: 3, optimizer: {ema: 0.9}}",
    "fm: {optimizer: {dense_lr: -1}}",
    "fm: {optimizer: {dense_lr: .nan}}",
    "fm: {name: ../x}",
    "vm: {arms: []}",
    "vm: {arms: [labels, labels]}",
    "vm: {models: [{name: a}]}",
    "vm: {models: [{name: ../a, domain: d, task: t}]}",
    "vm: {models: [{name: a, domain: d, task: []}]}",
    "data: {source: nowhere}",
    "data: {source: table}",
    "data: {fragment_rows: 0}",
    "data: {synthetic: {windows: 0}}",
    "data: {synthetic: {ads: 1}}",
    "das: {fm_lag: 0}",
    "das: {min_actors: 3, max_actors: 1}",
    "checkpoint: {keep: 0}",
    "checkpoint: {every_examples: 0}",
    "checkpoint: {every: 3}",
    "metrics: {warmup_windows: -1}",
    "wandb: {mode: sometimes}",
    "run: {dir: 3}",
    "distillation: {ah: {alpha: 0}}",
    "tune: {}",
    "fm: {static: {validation_window: 0}}",
    "fm: &a {name: *a}",
    "data: !!python/object:os.system {}",
]


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _cut(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def _noise(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    length = rng.randrange(1, 64)
    data[start : start + length] = rng.randbytes(length)
    path.write_bytes(data)


def _grow(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(40))


def _value(path: Path, rng: random.Random) -> None:
    """Replace one value by one of another kind."""

    def replace(node: Any, key: Any) -> None:
        node[key] = rng.choice([None, -1, 2**70, "", "../../x", [], {}, [[1]], True, 1e308])

    _change(path, rng, replace)


def _remove(path: Path, rng: random.Random) -> None:
    _change(path, rng, lambda node, key: node.pop(key))


def _escape(path: Path, rng: random.Random) -> None:
    """Make every file name point out of the folder."""
    text = path.read_text()
    for suffix in (".parquet", ".safetensors"):
        text = text.replace(f'{suffix}"', f'{suffix}/../../../../etc/passwd"')
    path.write_text(text)


def _empty_row(path: Path, rng: random.Random) -> None:
    """Insert a line that is JSON but no row."""
    lines = path.read_text().splitlines(keepends=True)
    position = rng.randrange(len(lines) + 1)
    line = rng.choice(["{}\n", "[]\n", "null\n", '{"role": 3}\n'])
    lines.insert(position, line)
    path.write_text("".join(lines))


def _change(
    path: Path,
    rng: random.Random,
    change: Callable[[Any, Any], object],
) -> None:
    """Change one value of a JSON file.

    Args:
        change: called with a list or object of the file, and the index or key of the value in it.
    """
    tree = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        keys: Iterable[Any] = ()
        if isinstance(node, dict):
            keys = node
        elif isinstance(node, list):
            keys = range(len(node))
        for key in keys:
            places.append((node, key))
            collect(node[key])

    collect(tree)
    node, key = rng.choice(places)
    change(node, key)
    path.write_text(json.dumps(tree))


MUTATIONS: dict[str, Mutation] = {
    "a bit flipped": _flip,
    "cut": _cut,
    "bytes replaced": _noise,
    "bytes added": _grow,
    "emptied": lambda path, _: path.write_bytes(b""),
    "of another kind": lambda path, _: path.write_bytes(b"PK\x03\x04 no such format"),
    "removed": lambda path, _: path.unlink(),
}
JSON_MUTATIONS: dict[str, Mutation] = {
    "a value replaced": _value,
    "a value removed": _remove,
    "names lead elsewhere": _escape,
    "a list": lambda path, _: path.write_text("[1, 2]"),
    "deep": lambda path, _: path.write_text("[" * 50_000),
}
OF_KIND: dict[str, dict[str, Mutation]] = {
    ".json": JSON_MUTATIONS,
    ".jsonl": {"a row that is none": _empty_row},
}
"""Suffix -> mutations that leave a file of its kind."""
