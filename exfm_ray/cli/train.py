"""Commands that prepare a stream, train and search."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from exfm_ray.cli.common import (
    add_command,
    add_config_options,
    console,
    print_lines,
    run_with_config,
)

if TYPE_CHECKING:
    from exfm_ray.cli.common import Commands
    from exfm_ray.config.root import Config


def add_commands(commands: Commands) -> None:
    """Add the commands of this module to the command line."""
    functions: dict[str, Callable[[Config], None]] = {
        "prepare": prepare,
        "pipeline": pipeline,
        "train-fm": train_fm,
        "train-vm": train_vm,
        "tune": tune,
    }
    for name, function in functions.items():
        parser = add_command(commands, name, function)
        add_config_options(parser)
        parser.set_defaults(run=partial(_run, function))


def _run(function: Callable[[Config], None], options: argparse.Namespace) -> None:
    run_with_config(function, options.config, options.set, options.name)


def prepare(config: Config) -> None:
    """Turn the raw data set into an event stream.

    With data.follow it reads new data until the stream ends.
    """
    from exfm_ray.pipeline.preflight import follow_stream, prepare_stream
    from exfm_ray.storage.atomic import read_json

    make_stream = follow_stream if config.data.follow else prepare_stream
    stream = make_stream(config)

    events = 0
    duplicates = 0
    numbers = stream.windows()
    for number in numbers:
        window = stream.window(number)
        events += window.rows
        duplicates += window.duplicates
    print(f"{stream.root}: {len(numbers)} windows, {events:,} events, {duplicates:,} duplicates")
    manifest = read_json(stream.root / "manifest.json")
    _print_collisions(manifest.get("tables", {}))


def _print_collisions(tables: dict[str, Any]) -> None:
    """Print the fraction of values in rows of several ids for each such table, highest first."""
    fractions = {}
    for name, table in tables.items():
        if table["shared"]:
            fractions[name] = table["values_in_shared_rows"] / table["values"]

    for name, fraction in sorted(fractions.items(), key=lambda item: -item[1]):
        used = tables[name]["used"]
        rows = tables[name]["rows"] - 1
        print(
            f"  table {name}: {fraction:.1%} of the values share their row with another id; "
            f"{used:,} of {rows:,} rows used"
        )


def pipeline(config: Config) -> None:
    """Run FM, DAS and vertical models side by side over all windows: the whole of ExFM."""
    run_roles(config, "fm", "das", "vm")
    show(config)


def train_fm(config: Config) -> None:
    """Train the foundation model alone; it publishes a snapshot after each window."""
    run_roles(config, "fm")
    show(config)


def train_vm(config: Config) -> None:
    """Train the vertical models from supervision that the DAS has written."""
    run_roles(config, "vm")
    show(config)


def tune(config: Config) -> None:
    """Search settings of the vertical models' arms, as the section `tune` describes."""
    from tuning.sweep import tune

    tune(config)


def run_roles(config: Config, *names: str) -> None:
    """Run roles (`fm`, `das`, `vm`) to the end of the stream and write summary and report."""
    from exfm_ray.das.client import LabelingFailedError
    from exfm_ray.data.new_ids import write_new_ids
    from exfm_ray.pipeline.preflight import prepare_stream
    from exfm_ray.pipeline.runner import PipelineRunner
    from exfm_ray.pipeline.schedule import Role
    from exfm_ray.tracking.report import write_report

    roles = frozenset(Role(name) for name in names)
    while True:
        stream = prepare_stream(config)
        # Read before the work: whatever the stream holds now is done below.
        complete = stream.complete
        runner = PipelineRunner(config, stream)
        try:
            worked = runner.execute(roles)
        except LabelingFailedError:
            # The error names one cause; summary and report list all.
            runner.summarize()
            write_report(config.folder)
            raise

        if worked or complete:
            runner.summarize()
            if complete and not config.fm.static:  # written once, for the whole stream
                write_new_ids(runner.stream, config.folder / "new_ids.json")
            write_report(config.folder)
        if complete:
            return
        time.sleep(config.data.follow.poll_s if config.data.follow else 0)


def show(config: Config) -> None:
    """Print the run's summary."""
    from exfm_ray.cli.run_tables import summary_table
    from exfm_ray.storage.atomic import read_json
    from exfm_ray.tracking.missing_supervision import missing_supervision

    summary = read_json(config.folder / "summary.json")
    console().print(summary_table(config, summary))
    print_lines(missing_supervision(summary))

    speeds = []
    for role, figures in summary["roles"].items():
        examples = figures["examples"]
        if examples:
            speeds.append(f"{role} {examples:,} examples in {figures['seconds']:.0f} s")
    roles = ", ".join(speeds)
    memory_gib = summary["peak_memory_bytes"] / 2**30
    print_lines([f"{roles}; peak memory {memory_gib:.1f} GiB. Everything is in {config.folder}"])
