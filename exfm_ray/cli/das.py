"""`das`: score a run's windows once, or as a service in a running Ray."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from exfm_ray.cli.common import (
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

VERBS = "start|status|stop"
OUTER = "das_"
"""Prefix of the options of `das` itself, which differ from those of its verbs."""


def add_commands(commands: Commands) -> None:
    """Add `das` and its verbs to the command line."""
    parser = add_command(commands, "das", score)
    prog = parser.prog
    parser.usage = f"{prog} --config FILE [--set section.key=value] [--name NAME]\n"
    parser.usage += f"       {prog} {VERBS} ..."
    add_config_options(parser, required=False, prefix=OUTER)
    parser.set_defaults(run=partial(_score, parser))

    verbs = parser.add_subparsers(
        prog=prog,
        title="as a service in a running Ray, see docs/das.md",
        metavar=VERBS,
    )
    starting = add_command(verbs, "start", start)
    starting.add_argument(
        "--follow", action="store_true", help="also label windows that appear later"
    )
    add_config_options(starting)
    starting.set_defaults(run=partial(_serve, start))
    for name, verb in (("status", status), ("stop", stop)):
        verb_parser = add_command(verbs, name, verb)
        add_config_options(verb_parser, required=False)
        verb_parser.set_defaults(run=partial(_serve, verb))


def score(config: Config) -> None:
    """Let the DAS score every window with the snapshots that train-fm has published."""
    from exfm_ray.cli.train import run_roles
    from exfm_ray.storage.atomic import read_json
    from exfm_ray.tracking.missing_supervision import missing_supervision

    run_roles(config, "das")
    summary = read_json(config.folder / "summary.json")
    print_lines(missing_supervision(summary))


def start(options: argparse.Namespace, config: Config | None) -> None:
    """Start the service of a run. If it is running, it retries what has failed."""
    from exfm_ray.cli import das_service
    from exfm_ray.pipeline.schedule import vm_jobs

    assert config is not None, "--config is required"
    readers = [job.checkpoints.root for job in vm_jobs(config)]
    print(das_service.start(config, options.follow, readers))


def status(options: argparse.Namespace, config: Config | None) -> None:
    """Show all services, or that of a run."""
    from exfm_ray.cli import das_service

    terminal = console()
    for table in das_service.status(config):
        terminal.print(table)


def stop(options: argparse.Namespace, config: Config | None) -> None:
    """End the service of a run, or the only one."""
    from exfm_ray.cli import das_service

    message = das_service.stop(config)
    print(message)


def _score(parser: CommandParser, options: argparse.Namespace) -> None:
    file = options.das_config
    if file is None:
        parser.error("the following arguments are required: --config")
    run_with_config(score, file, options.das_set, options.das_name)


def _serve(
    verb: Callable[[argparse.Namespace, Config | None], None],
    options: argparse.Namespace,
) -> None:
    """Run a verb of the service with the config that its own options name, if any."""
    if options.das_config or options.das_set or options.das_name:
        raise UserError(f"--config, --set and --name go after {VERBS}, as in `das start --config`")
    if options.config is None and (options.set or options.name):
        raise UserError("--set and --name require --config")

    from exfm_ray.config.load import load_config
    from exfm_ray.runtime.session import running_ray

    config = None
    if options.config is not None:
        config = load_config(options.config, options.set, options.name)
    with running_ray():
        verb(options, config)
