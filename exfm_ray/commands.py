"""The commands of run.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from exfm_ray.config import Config, load_config
from exfm_ray.errors import UserError, nearest
from exfm_ray.files import read_json

USER_ERROR = 2


def main(arguments: Sequence[str]) -> int:
    """Run one command; the exit code is 0 only when everything asked for was done."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started")  # read when ray is imported
    try:
        options = _parser().parse_args(arguments)
        config = load_config(options.config, options.set, options.name)
        COMMANDS[options.command](config)
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except Exception as error:
        from exfm_ray.runtime import user_error  # imports ray: seconds that a mistake on the command line need not cost

        known = user_error(error)
        if known is None:
            raise
        return _fail(known)
    return 0


def _fail(error: UserError) -> int:
    print("error:", " ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
    return USER_ERROR


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see run.py --help")


def _command(word: str) -> str:
    if word not in COMMANDS:
        raise UserError(f"unknown command '{word}': there are {', '.join(COMMANDS)}." + nearest(word, COMMANDS))
    return word


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:10} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items())
    parser = _Parser(prog="run.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=f"ExFM on Ray.\n\ncommands:\n{lines}")
    parser.add_argument("command", type=_command, metavar="COMMAND")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file; configs/ holds ready ones")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a setting; may be repeated")
    parser.add_argument("--name", help="name of the run; the same command with the same name goes on where it stopped")
    return parser


def prepare(config: Config) -> None:
    """Turn the raw data set into an event stream."""
    from exfm_ray.pipeline import prepare_stream

    stream = prepare_stream(config)
    windows = [stream.window(w) for w in stream.windows()]
    print(f"{stream.root}: {len(windows)} windows, {sum(w.rows for w in windows):,} events, {sum(w.duplicates for w in windows):,} duplicates")
    tables = read_json(stream.root / "manifest.json").get("tables", {})
    shares = {name: table["values_in_shared_rows"] / table["values"] for name, table in tables.items() if table["shared"]}
    for name in sorted(shares, key=lambda name: -shares[name]):
        used, rows = tables[name]["used"], tables[name]["rows"] - 1
        print(f"  table {name}: {shares[name]:.1%} of the values share their row with another id; {used:,} of {rows:,} rows used")


def _run(config: Config, fm: bool, das: bool, vm: bool) -> None:
    from exfm_ray.pipeline import Run, prepare_stream

    run = Run(config, prepare_stream(config))
    run.execute(fm, das, vm)
    run.summarise()
    report(config)


def report(config: Config) -> None:
    """Write the run's report.html anew from its figures."""
    from exfm_ray.tracking.report import write_report

    write_report(config.folder)


def pipeline(config: Config) -> None:
    """The whole of ExFM: FM, DAS and VMs side by side, over all windows."""
    _run(config, fm=True, das=True, vm=True)
    show(config)


def train_fm(config: Config) -> None:
    """Train the foundation model alone; it publishes a snapshot after each window."""
    _run(config, fm=True, das=False, vm=False)
    show(config)


def das(config: Config) -> None:
    """Let the DAS score every window with the snapshots that train-fm has published."""
    _run(config, fm=False, das=True, vm=False)


def train_vm(config: Config) -> None:
    """Train the vertical models from supervision that the DAS has written."""
    _run(config, fm=False, das=False, vm=True)
    show(config)


def tune(config: Config) -> None:
    """Search the settings of the vertical models' arms; the section `tune` says which."""
    from tuning.sweep import tune

    tune(config)


def show(config: Config) -> None:
    """Print the run's summary."""
    summary = read_json(config.folder / "summary.json")
    wanted = {student.domain for student in config.vm.models} | {"all"}
    rows = [row for row in summary["figures"] if row["domain"] in wanted]
    place = {"pass": "best pass", "window": "window"} if config.fm.static else {}
    console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 120)))
    table = Table(title=f"{config.name}: windows {summary['windows'][0]} to {summary['windows'][-1]}" if summary["windows"] else config.name)
    for column in (*place.values(), "domain", "task", "model", "arm"):
        table.add_column(column)
    columns = {"ne": "NE", "auc": "AUC", "gauc": "gAUC", "calibration": "calibr."}
    columns |= {"log_loss": "log loss"} if config.fm.static else {"best_ne": "best NE", "ne_gain": "NE gain %", "transfer_ratio": "TR"}
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: (row["domain"] != "all", row["domain"], row["task"])):
        identity = (str(row[key]) for key in (*place, "domain", "task", "model", "arm"))
        table.add_row(*identity, *(_cell(key, row.get(key)) for key in columns))
    console.print(table)
    seconds = ", ".join(f"{role} {r['examples']:,} examples in {r['seconds']:.0f} s" for role, r in summary["roles"].items() if r["examples"])
    memory = f"peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB"
    console.print(f"{seconds}; {memory}. Everything is in {config.folder}", highlight=False, soft_wrap=True)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 100:.2f}" if key == "ne_gain" else f"{value:.2f}" if key == "transfer_ratio" else f"{value:.4f}"


COMMANDS: dict[str, Callable[[Config], None]] = {
    "prepare": prepare,
    "pipeline": pipeline,
    "train-fm": train_fm,
    "das": das,
    "train-vm": train_vm,
    "tune": tune,
    "report": report,
}
