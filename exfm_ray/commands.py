"""The commands of run.py."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from exfm_ray.config import Config, load_config
from exfm_ray.errors import UserError, nearest
from exfm_ray.files import read_json
from exfm_ray.places import base, lasting, placed
from exfm_ray.schema import Schema
from exfm_ray.tracking.lacking import lacking

USER_ERROR = 2


def main(arguments: Sequence[str]) -> int:
    """Run one command; the exit code is 0 only when everything asked for was done."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started")  # read when ray is imported
    try:
        if arguments and arguments[0] == "export":
            export(_export_parser().parse_args(arguments[1:]))
            return 0
        if arguments and arguments[0] == "submit":
            return submit(_submit_parser().parse_args(arguments[1:]))
        if arguments and arguments[0] == "plan":
            return plan(_plan_parser().parse_args(arguments[1:]))
        if arguments and arguments[0] == "das" and len(arguments) > 1 and not arguments[1].startswith("-"):
            serve(_serve_parser().parse_args(arguments[1:]))
            return 0
        if arguments and arguments[0] in FOLDERS:
            _look(arguments[0], arguments[1:])
            return 0
        options = _parser().parse_args(arguments)
        config = load_config(options.config, options.set, options.name)
        if placed():
            print(f"relative folders lie below {base()} (EXFM_HOME), which all nodes must see; this run: {config.folder}")
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
    if word in OTHERS:
        raise UserError(f"'{word}' does not go here: it is `run.py {word}`, see run.py {word} --help")
    if word not in COMMANDS:
        known = [*COMMANDS, *OTHERS]
        raise UserError(f"unknown command '{word}': there are {', '.join(known)}." + nearest(word, known))
    return word


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:10} {(command.__doc__ or '').splitlines()[0]}" for name, command in (COMMANDS | OTHERS).items())
    parser = _Parser(prog="run.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=f"ExFM on Ray.\n\ncommands:\n{lines}")
    parser.add_argument("command", type=_command, metavar="COMMAND")
    _add_config(parser)
    return parser


def _add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--config", type=Path, required=required, help="a YAML file; configs/ holds ready ones")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a setting; may be repeated")
    parser.add_argument("--name", help="name of the run; the same command with the same name goes on where it stopped")


def _export_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="run.py export", description=export.__doc__)
    parser.add_argument("run", type=lasting, metavar="RUN", help="the run's folder, such as runs/demo")
    parser.add_argument("--vm", required=True, help="name of the vertical model")
    parser.add_argument("--arm", default="ah_sa", help="the arm that is served (default: ah_sa)")
    parser.add_argument("--to", type=lasting, metavar="DIR", help="a new folder (default: RUN/serving/<vm>-<arm>, of a delta <vm>-<arm>-delta)")
    parser.add_argument("--since", type=lasting, metavar="SERVED", help="an earlier served folder of the same student: write only what changed since")
    parser.add_argument("--aot", action="store_true", help="compile with AOTInductor, too; needs a C++ compiler")
    return parser


def export(options: argparse.Namespace) -> None:
    """Write a trained vertical model as it is served: `run.py export RUN --vm NAME`, see `run.py export --help`."""
    from exfm_ray.serving.export import export_student

    folder = export_student(options.run, options.vm, options.arm, options.to, options.since, options.aot)
    files = ", ".join(f"{path.name} {path.stat().st_size:,} bytes" for path in sorted(folder.iterdir()))
    print(f"{folder}: {files}")


def _submit_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="run.py submit", description=submit.__doc__)
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="a command of run.py with its arguments, after --")
    parser.add_argument("--address", metavar="URL", help="the cluster's job server (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)")
    parser.add_argument("--id", metavar="NAME", help="a name for the job; submitted again under it, the command goes on where it stopped")
    parser.add_argument("--stop", metavar="NAME", help="stop the job of this name instead")
    return parser


def submit(options: argparse.Namespace) -> int:
    """Run a command on a Ray cluster: `run.py submit [--address URL] [--id NAME] -- COMMAND ARGS...`, `run.py submit --stop NAME`."""
    if bool(options.stop) == bool(options.command):
        raise UserError("submit takes a command of run.py after --, or --stop NAME")
    if options.command and options.command[0] not in OTHERS.keys() - {"submit"}:
        _command(options.command[0])
    from cluster import jobs

    if options.stop:
        jobs.stop(options.address, options.stop)
        return 0
    return jobs.submit(options.address, options.id, options.command)


def _plan_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="run.py plan", description=plan.__doc__)
    _add_config(parser)
    workers = parser.add_mutually_exclusive_group()
    workers.add_argument("--workers", type=int, metavar="N", help="plan for N workers instead of fm.workers")
    workers.add_argument("--gpus", type=int, metavar="N", help="plan for N workers with a GPU each, whatever fm.device says")
    parser.add_argument("--gpu-gib", type=float, default=80.0, metavar="GIB", help="memory of a GPU (default: 80)")
    parser.add_argument("--tflops", type=float, help="a worker's peak in TFLOP/s at the training's precision: estimates the examples per second")
    return parser


def plan(options: argparse.Namespace) -> int:
    """Say on paper what the FM's training would need on N workers: `run.py plan --config FILE [--gpus N]`, see `run.py plan --help`."""
    from exfm_ray.pipeline import check_models
    from exfm_ray.plan import plan_fm
    from exfm_ray.plan_table import remarks, shards_table, worker_table

    workers = options.workers if options.gpus is None else options.gpus
    overrides = ([] if workers is None else [f"fm.workers={workers}"]) + ([] if options.gpus is None else ["fm.device=cuda"])
    config = load_config(options.config, [*options.set, *overrides], options.name)
    schema = _known_schema(config)
    check_models(config, schema)
    planned = plan_fm(config, schema)
    machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit_bytes = int(options.gpu_gib * 2**30) if config.fm.device == "cuda" else machine_bytes
    console = _console()
    for table in (worker_table(planned), shards_table(planned)):
        console.print(table)
    for line in remarks(planned, limit_bytes, options.tflops):
        console.print(line, highlight=False, soft_wrap=True)
    return USER_ERROR if planned.misfits(limit_bytes) else 0


def _serve_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="run.py das", description=serve.__doc__)
    commands = parser.add_subparsers(dest="command", metavar="start|status|stop", required=True)
    start = commands.add_parser("start", description="Start the service for a run's stream; given again, it tries again what is parked.")
    start.add_argument("--follow", action="store_true", help="label windows that appear later, too")
    _add_config(start)
    for name, told in (("status", "Show the services, or a run's."), ("stop", "End a run's service, or the only one there is.")):
        command = commands.add_parser(name, description=told)
        _add_config(command, required=False)
    return parser


def serve(options: argparse.Namespace) -> None:
    """The DAS as a service in a running Ray: `run.py das start|status|stop`, see docs/das.md."""
    config = load_config(options.config, options.set, options.name) if options.config else None
    if config is None and (options.set or options.name):
        raise UserError("--set and --name go with --config")
    from exfm_ray.das.commands import start, status, stop
    from exfm_ray.runtime import running_ray

    with running_ray():
        if options.command == "start":
            from exfm_ray.pipeline import vm_jobs

            assert config
            print(start(config, options.follow, [job.checkpoints.root for job in vm_jobs(config)]))
        elif options.command == "stop":
            print(stop(config))
        else:
            for table in status(config):
                _console().print(table)


def _known_schema(config: Config) -> Schema:
    """The schema of the run's prepared stream, else of its source; no data are read."""
    from exfm_ray.data.prepare import source_schema, stream_folder
    from exfm_ray.data.stream import EventStream

    root = stream_folder(config)
    if (root / "schema.json").exists():
        return EventStream.open(root).schema
    try:
        return source_schema(config)
    except UserError as error:
        raise UserError(f"{error}; or run `run.py prepare` with this config where the data are") from None


def prepare(config: Config) -> None:
    """Turn the raw data set into an event stream; with data.follow, take what comes until it ends."""
    from exfm_ray.pipeline import follow_stream, prepare_stream

    stream = follow_stream(config) if config.data.follow else prepare_stream(config)
    windows = [stream.window(w) for w in stream.windows()]
    print(f"{stream.root}: {len(windows)} windows, {sum(w.rows for w in windows):,} events, {sum(w.duplicates for w in windows):,} duplicates")
    tables = read_json(stream.root / "manifest.json").get("tables", {})
    shares = {name: table["values_in_shared_rows"] / table["values"] for name, table in tables.items() if table["shared"]}
    for name in sorted(shares, key=lambda name: -shares[name]):
        used, rows = tables[name]["used"], tables[name]["rows"] - 1
        print(f"  table {name}: {shares[name]:.1%} of the values share their row with another id; {used:,} of {rows:,} rows used")


def _run(config: Config, fm: bool, das: bool, vm: bool) -> None:
    from exfm_ray.das.client import ParkedError
    from exfm_ray.data.drift import write_new_ids
    from exfm_ray.pipeline import Run, prepare_stream

    while True:
        stream = prepare_stream(config)
        over = stream.complete  # asked first: what is there by then is done below
        run = Run(config, stream)
        try:
            worked = run.execute(fm, das, vm)
        except ParkedError:  # names one cause; summary and report have all
            run.summarise()
            _write_report(config.folder)
            raise
        if worked or over:
            run.summarise()
            if over and not config.fm.static:  # written once, of the whole stream
                write_new_ids(run.stream, config.folder / "new_ids.json")
            _write_report(config.folder)
        if over:
            return
        time.sleep(config.data.follow.poll_s if config.data.follow else 0)


def _write_report(folder: Path) -> Path:
    from exfm_ray.tracking.report import write_report

    return write_report(folder)


def _look(command: str, arguments: Sequence[str]) -> None:
    """A command that reads the folders of runs."""
    parser = _Parser(prog=f"run.py {command}", description=OTHERS[command].__doc__)
    for name, told in FOLDERS[command].items():
        if name == "runs":
            parser.add_argument(name, type=lasting, nargs="?", default=lasting(name), metavar="DIR", help=told)
        else:
            parser.add_argument(name, type=lasting, metavar=name.upper(), help=told)
    OTHERS[command](parser.parse_args(arguments))


def report(options: argparse.Namespace) -> None:
    """Write a run's report.html anew from its files, whole or not: `run.py report RUN`."""
    from exfm_ray.tracking.overview import figures_table
    from exfm_ray.tracking.run_files import RunFiles

    path = _write_report(options.run)
    _console().print(figures_table(RunFiles.open(options.run)))
    print(path)


def runs(options: argparse.Namespace) -> None:
    """List the runs of a folder with their state and figures: `run.py runs [DIR]`."""
    from exfm_ray.tracking.overview import runs_table

    _console().print(runs_table(options.runs))


def compare(options: argparse.Namespace) -> None:
    """Show two runs' figures beside each other, and the settings in which they differ: `run.py compare A B`."""
    from exfm_ray.tracking.overview import compare_tables
    from exfm_ray.tracking.run_files import RunFiles

    for table in compare_tables(RunFiles.open(options.a), RunFiles.open(options.b)):
        _console().print(table)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 120)))


def pipeline(config: Config) -> None:
    """The whole of ExFM: FM, DAS and VMs side by side, over all windows."""
    _run(config, fm=True, das=True, vm=True)
    show(config)


def train_fm(config: Config) -> None:
    """Train the foundation model alone; it publishes a snapshot after each window."""
    _run(config, fm=True, das=False, vm=False)
    show(config)


def das(config: Config) -> None:
    """Let the DAS score every window with the snapshots that train-fm has published; `das start|status|stop`: as a service."""
    _run(config, fm=False, das=True, vm=False)
    _show_lacking(read_json(config.folder / "summary.json"))


def train_vm(config: Config) -> None:
    """Train the vertical models from supervision that the DAS has written."""
    _run(config, fm=False, das=False, vm=True)
    show(config)


def tune(config: Config) -> None:
    """Search the settings of the vertical models' arms; the section `tune` says which."""
    from tuning.sweep import tune

    tune(config)


def dashboard(config: Config) -> None:
    """Make a workspace and a report of the run, and of its sweep, on wandb's server."""
    try:
        from exfm_ray.tracking.dashboard import save
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -e '.[dashboard]'") from None

    for address in save(config, _known_schema(config)):
        print(address)


def show(config: Config) -> None:
    """Print the run's summary."""
    summary = read_json(config.folder / "summary.json")
    wanted = {student.domain for student in config.vm.models} | {"all"}
    rows = [row for row in summary["figures"] if row["domain"] in wanted]
    place = {"pass": "best pass", "window": "window"} if config.fm.static else {}
    console = _console()
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
    _show_lacking(summary)
    seconds = ", ".join(f"{role} {r['examples']:,} examples in {r['seconds']:.0f} s" for role, r in summary["roles"].items() if r["examples"])
    memory = f"peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB"
    console.print(f"{seconds}; {memory}. Everything is in {config.folder}", highlight=False, soft_wrap=True)


def _show_lacking(summary: Mapping[str, Any]) -> None:
    for line in lacking(summary):
        _console().print(line, highlight=False, soft_wrap=True, markup=False)


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
    "dashboard": dashboard,
}
OTHERS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "export": export, "submit": submit, "plan": plan, "report": report, "runs": runs, "compare": compare,
}  # fmt: skip
"""Commands with arguments of their own."""
FOLDERS = {
    "report": {"run": "the run's folder, such as runs/demo"},
    "runs": {"runs": "the folder of the runs (default: runs)"},
    "compare": {"a": "the folder of a run", "b": "that of another"},
}
"""Those of them whose arguments are folders of runs."""
