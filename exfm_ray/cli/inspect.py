"""Commands that look at runs, plan and export."""

from __future__ import annotations

import argparse
import os

from exfm_ray.cli.common import USER_ERROR, _console, _write_report
from exfm_ray.config.load import load_config
from exfm_ray.config.root import Config
from exfm_ray.errors import UserError
from exfm_ray.schema import Schema


def export(options: argparse.Namespace) -> None:
    """Write a trained vertical model as it is served: `run.py export RUN --vm NAME`, see `run.py
    export --help`."""
    from exfm_ray.serving.export import export_student

    folder = export_student(
        options.run, options.vm, options.arm, options.to, options.since, options.aot
    )
    files = ", ".join(
        f"{path.name} {path.stat().st_size:,} bytes" for path in sorted(folder.iterdir())
    )
    print(f"{folder}: {files}")


def plan(options: argparse.Namespace) -> int:
    """Say on paper what the FM's training would need on N workers: `run.py plan --config FILE
    [--gpus N]`, see `run.py plan --help`."""
    from exfm_ray.cli.plan_tables import shards_table, summary_lines, worker_table
    from exfm_ray.pipeline.preflight import check_models
    from exfm_ray.planner.memory import plan_fm

    workers = options.workers if options.gpus is None else options.gpus
    overrides = ([] if workers is None else [f"fm.workers={workers}"]) + (
        [] if options.gpus is None else ["fm.device=cuda"]
    )
    config = load_config(options.config, [*options.set, *overrides], options.name)
    schema = _known_schema(config)
    check_models(config, schema)
    planned = plan_fm(config, schema)
    machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit_bytes = int(options.gpu_gib * 2**30) if config.fm.device == "cuda" else machine_bytes
    console = _console()
    for table in (worker_table(planned), shards_table(planned)):
        console.print(table)
    for line in summary_lines(planned, limit_bytes, options.tflops):
        console.print(line, highlight=False, soft_wrap=True)
    return USER_ERROR if planned.violations(limit_bytes) else 0


def _known_schema(config: Config) -> Schema:
    """The schema of the run's prepared stream, else of its source; no data are read."""
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
    """Write a run's report.html anew from its files, whole or not: `run.py report RUN`."""
    from exfm_ray.cli.run_tables import figures_table
    from exfm_ray.tracking.run_files import RunFiles

    path = _write_report(options.run)
    _console().print(figures_table(RunFiles.open(options.run)))
    print(path)


def runs(options: argparse.Namespace) -> None:
    """List the runs of a folder with their state and figures: `run.py runs [DIR]`."""
    from exfm_ray.cli.run_tables import runs_table

    _console().print(runs_table(options.runs))


def compare(options: argparse.Namespace) -> None:
    """Show two runs' figures beside each other, and the settings in which they differ: `run.py
    compare A B`."""
    from exfm_ray.cli.run_tables import compare_tables
    from exfm_ray.tracking.run_files import RunFiles

    for table in compare_tables(RunFiles.open(options.a), RunFiles.open(options.b)):
        _console().print(table)


def dashboard(config: Config) -> None:
    """Make a workspace and a report of the run, and of its sweep, on wandb's server."""
    try:
        from exfm_ray.tracking.dashboard import save
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -e '.[dashboard]'") from None

    for address in save(config, _known_schema(config)):
        print(address)
