"""Commands that look at runs, plan a training, and export models."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from exfm_ray.cli.common import (
    USER_ERROR,
    CommandParser,
    add_command,
    add_config_options,
    console,
    print_lines,
    run_with_config,
)
from exfm_ray.errors import UserError

if TYPE_CHECKING:
    from exfm_ray.cli.common import Commands
    from exfm_ray.config.root import Config
    from exfm_ray.schema import Schema


def add_commands(commands: Commands) -> None:
    """Add the commands of this module to the command line."""
    parser = add_command(commands, "plan", plan)
    _add_plan_options(parser)
    parser.set_defaults(run=plan)

    parser = add_command(commands, "report", report)
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the run, such as runs/demo")
    parser.set_defaults(run=report)

    parser = add_command(commands, "runs", runs)
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("runs"),
        metavar="DIR",
        help="the folder of the runs (default: runs)",
    )
    parser.set_defaults(run=runs)

    parser = add_command(commands, "compare", compare)
    parser.add_argument("a", type=Path, metavar="A", help="the folder of a run")
    parser.add_argument("b", type=Path, metavar="B", help="the folder of another run")
    parser.set_defaults(run=compare)

    parser = add_command(commands, "export", export)
    _add_export_options(parser)
    parser.set_defaults(run=export)

    parser = add_command(commands, "dashboard", dashboard)
    add_config_options(parser)
    parser.set_defaults(run=_run_dashboard)


def _add_plan_options(parser: CommandParser) -> None:
    add_config_options(parser)
    workers = parser.add_mutually_exclusive_group()
    workers.add_argument(
        "--workers", type=int, metavar="N", help="plan for N workers instead of fm.workers"
    )
    workers.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="plan for N workers with a GPU each, regardless of fm.device",
    )
    parser.add_argument(
        "--gpu-gib", type=float, default=80.0, metavar="GIB", help="memory of a GPU (default: 80)"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        help="peak TFLOP/s of a worker at the training's precision, to estimate examples/s",
    )


def _add_export_options(parser: CommandParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the run, such as runs/demo")
    parser.add_argument("--vm", required=True, help="name of the vertical model")
    parser.add_argument("--arm", default="ah_sa", help="the arm to serve (default: ah_sa)")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="a new folder (default: RUN/serving/<vm>-<arm>, for a delta <vm>-<arm>-delta)",
    )
    parser.add_argument(
        "--since",
        type=Path,
        metavar="SERVED",
        help="an earlier export of the same model: write only what has changed since",
    )
    parser.add_argument(
        "--aot", action="store_true", help="also compile with AOTInductor; needs a C++ compiler"
    )


def plan(options: argparse.Namespace) -> int:
    """Calculate what each worker of the FM's training would hold, before anything starts."""
    from exfm_ray.cli.plan_tables import shards_table, summary_lines, worker_table
    from exfm_ray.config.load import load_config
    from exfm_ray.pipeline.preflight import check_models
    from exfm_ray.planner.memory import plan_fm

    config = load_config(options.config, options.set + _plan_overrides(options), options.name)
    schema = _known_schema(config)
    check_models(config, schema)
    memory_plan = plan_fm(config, schema)

    limit_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if config.fm.device == "cuda":
        limit_bytes = int(options.gpu_gib * 2**30)
    terminal = console()
    terminal.print(worker_table(memory_plan))
    terminal.print(shards_table(memory_plan))
    print_lines(summary_lines(memory_plan, limit_bytes, options.tflops))
    return USER_ERROR if memory_plan.violations(limit_bytes) else 0


def _plan_overrides(options: argparse.Namespace) -> list[str]:
    if options.gpus is not None:
        return [f"fm.workers={options.gpus}", "fm.device=cuda"]
    if options.workers is not None:
        return [f"fm.workers={options.workers}"]
    return []


def _known_schema(config: Config) -> Schema:
    """Return the schema of the run's prepared stream, else of its source, without reading data."""
    from exfm_ray.data.prepare.prepare import source_schema, stream_folder
    from exfm_ray.data.stream import EventStream

    root = stream_folder(config)
    if (root / "schema.json").exists():
        return EventStream.open(root).schema
    try:
        return source_schema(config)
    except UserError as error:
        raise UserError(
            f"{error}; or run `run.py prepare` with this config where the data are"
        ) from None


def report(options: argparse.Namespace) -> None:
    """Print the metrics of a run and rewrite its report.html from its files."""
    from exfm_ray.cli.run_tables import figures_table
    from exfm_ray.storage.paths import absolute
    from exfm_ray.tracking.report import write_report
    from exfm_ray.tracking.run_files import RunFiles

    folder = absolute(options.run_folder)
    page = write_report(folder)
    console().print(figures_table(RunFiles.open(folder)))
    print(page)


def runs(options: argparse.Namespace) -> None:
    """List the runs of a folder with their state and main metrics."""
    from exfm_ray.cli.run_tables import runs_table
    from exfm_ray.storage.paths import absolute

    table = runs_table(absolute(options.folder))
    console().print(table)


def compare(options: argparse.Namespace) -> None:
    """Show the metrics of two runs side by side, and the settings that differ."""
    from exfm_ray.cli.run_tables import compare_tables
    from exfm_ray.storage.paths import absolute
    from exfm_ray.tracking.run_files import RunFiles

    a = RunFiles.open(absolute(options.a))
    b = RunFiles.open(absolute(options.b))
    terminal = console()
    for table in compare_tables(a, b):
        terminal.print(table)


def export(options: argparse.Namespace) -> None:
    """Write a trained vertical model in the form in which it is served."""
    from exfm_ray.serving.export import export_student
    from exfm_ray.storage.paths import absolute

    folder = export_student(
        absolute(options.run_folder),
        options.vm,
        options.arm,
        absolute(options.to) if options.to else None,
        absolute(options.since) if options.since else None,
        options.aot,
    )
    files = [f"{path.name} {path.stat().st_size:,} bytes" for path in sorted(folder.iterdir())]
    print(f"{folder}: {', '.join(files)}")


def dashboard(config: Config) -> None:
    """Make a workspace and a report of the run, and of its sweep, on wandb's server."""
    try:
        from exfm_ray.tracking.dashboard import save
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -e '.[dashboard]'") from None

    for url in save(config, _known_schema(config)):
        print(url)


def _run_dashboard(options: argparse.Namespace) -> None:
    run_with_config(dashboard, options.config, options.set, options.name)
