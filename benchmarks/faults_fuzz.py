"""Malformed files, configs and checkpoints: each must be told in one clear line, and none may end
in a traceback.

Whole files of a finished run are spoilt by seeded mutations: a bit flipped, bytes cut off, put in
or replaced, JSON values replaced, removed, or made to point out of their folder. Then whoever reads
that file reads it. An input is told where the reader refuses it in one line that names the file or
the setting; harmless where what is read is what was written. A mutation that changes what is read,
unseen, is neither, and so is any other error.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from exfm_ray.cli.main import main as command
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
Reader = Callable[[Path], object]
"""Reads of a run's folder what a target's file belongs to; the result is what was read."""


@dataclass(frozen=True)
class Target:
    """A file, by a pattern below the run's folder, who reads it, and a mutation that is no damage
    to it."""

    pattern: str
    read: Reader
    never: str = ""


def fuzz(
    run: Path,
    scratch: Path,
    inputs: int,
) -> dict[str, Any]:
    """Feed so many malformed inputs made from the files of a finished run.

    Returns:
        inputs, told, harmless, and `wrong`: what was neither, each with its file and mutation.
    """
    draw = random.Random(SEED)
    counts = Counter[str]()
    wrong = list[str]()
    kept = {(target.pattern, target.read): _read(target, run) for target in TARGETS}
    for number in range(inputs):
        target = TARGETS[number % len(TARGETS)]
        files = sorted(run.glob(target.pattern))
        assert files, target.pattern
        file = draw.choice(files)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(
            run, scratch / run.name, ignore=shutil.ignore_patterns("wandb", "ray_train")
        )
        copy = scratch / run.name / file.relative_to(run)
        names = (
            OF_KIND[file.suffix] if file.suffix in OF_KIND and draw.random() < 0.6 else MUTATIONS
        )
        name = draw.choice([name for name in names if name != target.never])
        names[name](copy, draw)
        outcome = _read(target, scratch / run.name)
        kind = (
            "harmless"
            if outcome == kept[target.pattern, target.read]
            else "told"
            if outcome[0] == "told"
            else "wrong"
        )
        counts[kind] += 1
        if kind == "wrong":
            wrong.append(f"{file.relative_to(run)}, {name}: {outcome}"[:400])
    for config in BAD_CONFIGS:
        outcome = _read(Target("", lambda folder, text=config: _config(folder, text)), scratch)  # type: ignore[misc]
        counts["told" if outcome[0] == "told" else "wrong"] += 1
        if outcome[0] != "told":
            wrong.append(f"config {config!r}: {outcome}"[:400])
    shutil.rmtree(scratch, ignore_errors=True)
    print(f"malformed inputs: {dict(counts)}", *wrong, sep="\n  ", flush=True)
    return {
        "inputs": inputs + len(BAD_CONFIGS),
        "told": counts["told"],
        "harmless": counts["harmless"],
        "wrong": wrong,
    }


def _read(target: Target, run: Path) -> tuple[str, object]:
    """("read", what), ("told", the line) or ("error", what it was)."""
    try:
        return "read", target.read(run)
    except UserError as error:
        line = str(error)
        return ("told", line) if 20 < len(line) < 1500 else ("error", line)
    except Exception as error:  # what a person would see as a traceback
        return "error", f"{type(error).__name__}: {error}"


def _stream(run: Path) -> object:
    stream = EventStream.open(run / "stream")
    window = stream.window(1)
    return [stream.read(1, fragment).to_pydict() for fragment in window.fragments]


def _supervision(run: Path) -> object:
    stream = EventStream.open(run / "stream")
    reader = AugmentedReader(
        run / "stream",
        SupervisionStore(run / "supervision", "fm"),
        SnapshotPolicy(1),
        (0,),
        ("click",),
    )
    return [
        reader.read(WindowPass(2, "learn"), fragment).to_pydict()
        for fragment in stream.window(2).fragments
    ]


def _snapshot(run: Path) -> object:
    stream = EventStream.open(run / "stream")
    store = SnapshotStore(run / "snapshots", "fm")
    model, tasks = store.load(2, stream.schema.digest)
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}, tasks


def _checkpoint(run: Path) -> object:
    """Damage is told, and the checkpoint before is taken."""
    checkpoints = Checkpoints(run / "checkpoints" / "fm")
    told = list(checkpoints.set_aside_damaged())
    mark = checkpoints.latest()
    result = checkpoints.result(mark)
    if told:
        raise UserError(told[0])
    return mark, {key: state.figures() for key, state in result.states.items()}, result.timings


def _command(*arguments: str) -> str:
    """Run a command in this process; what it prints. UserError with its line where it refuses."""
    out = io.StringIO()
    errors = io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        code = command(arguments)
    if code:
        line = errors.getvalue().strip()
        raise (
            UserError(line)
            if line.startswith("error: ") and "\n" not in line
            else RuntimeError(line)
        )
    return out.getvalue()


def _report(run: Path) -> object:
    """The report of a run: what it tells of a file that is not there, or is not whole, is that the
    run is not as far."""
    _command("report", str(run))
    return "a report"


def _summarise(run: Path) -> object:
    """What a command that finds all done writes anew, but for the peak memory, which it takes from
    the last summary."""
    config = Config.model_validate(
        next(iter(yaml.safe_load_all((run / "config.yaml").read_text())))
    )
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": run.parent})})
    summary = PipelineRunner(config, EventStream.open(run / "stream")).summarize()
    return summary["windows"], summary["figures"]


def _export(run: Path) -> object:
    shutil.rmtree(run.parent / "exported", ignore_errors=True)
    _command(
        "export", str(run), "--vm", "feed", "--arm", "labels", "--to", str(run.parent / "exported")
    )
    return sorted((path.name, path.stat().st_size) for path in (run.parent / "exported").iterdir())


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
    Target(
        "checkpoints/fm/windows=*/manifest.json", _checkpoint, "removed"
    ),  # without it there is no checkpoint yet
    Target("checkpoints/fm/windows=*/*.safetensors", _checkpoint),
    Target("exported/feed-labels/*", _export),
    Target("metrics.jsonl", _report),
    Target("timeline.jsonl", _report),
    Target("summary.json", _report),
    Target("summary.json", _summarise),
    Target("timeline.jsonl", _summarise),
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


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def _noise(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    length = draw.randrange(1, 64)
    data[at : at + length] = draw.randbytes(length)
    path.write_bytes(data)


def _grow(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(40))


def _value(path: Path, draw: random.Random) -> None:
    """Replace one value somewhere by one of another kind."""
    _change(
        path,
        draw,
        lambda at, key: at.__setitem__(
            key, draw.choice([None, -1, 2**70, "", "../../x", [], {}, [[1]], True, 1e308])
        ),
    )


def _remove(path: Path, draw: random.Random) -> None:
    _change(path, draw, lambda at, key: at.pop(key))


def _escape(path: Path, draw: random.Random) -> None:
    """Every name of a file points out of the folder."""
    text = path.read_text()
    for suffix in (".parquet", ".safetensors"):
        text = text.replace(f'{suffix}"', f'{suffix}/../../../../etc/passwd"')
    path.write_text(text)


def _empty_row(path: Path, draw: random.Random) -> None:
    """A line that is JSON and no row."""
    lines = path.read_text().splitlines(keepends=True)
    lines.insert(
        draw.randrange(len(lines) + 1), draw.choice(["{}\n", "[]\n", "null\n", '{"role": 3}\n'])
    )
    path.write_text("".join(lines))


def _change(
    path: Path,
    draw: random.Random,
    change: Callable[[Any, Any], object],
) -> None:
    tree = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in (
            node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        ):
            places.append((node, key))
            walk(node[key])

    walk(tree)
    change(*draw.choice(places))
    path.write_text(json.dumps(tree))


MUTATIONS: dict[str, Callable[[Path, random.Random], object]] = {
    "a bit flipped": _flip,
    "cut": _cut,
    "bytes replaced": _noise,
    "bytes added": _grow,
    "emptied": lambda path, _: path.write_bytes(b""),
    "of another kind": lambda path, _: path.write_bytes(b"PK\x03\x04 no such format"),
    "removed": lambda path, _: path.unlink(),
}
JSON_MUTATIONS: dict[str, Callable[[Path, random.Random], object]] = {
    "a value replaced": _value,
    "a value removed": _remove,
    "names lead elsewhere": _escape,
    "a list": lambda path, _: path.write_text("[1, 2]"),
    "deep": lambda path, _: path.write_text("[" * 50_000),
}
OF_KIND: dict[str, dict[str, Callable[[Path, random.Random], object]]] = {
    ".json": JSON_MUTATIONS,
    ".jsonl": {"a row that is none": _empty_row},
}
"""Mutations that leave a file what its suffix says."""
