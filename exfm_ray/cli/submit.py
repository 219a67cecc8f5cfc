"""`submit`: run a command as a job of a Ray cluster."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from exfm_ray.cli.common import add_command
from exfm_ray.errors import UserError, nearest

if TYPE_CHECKING:
    from exfm_ray.cli.common import Commands


def add_commands(commands: Commands) -> None:
    """Add `submit` to the command line."""
    parser = add_command(commands, "submit", submit)
    parser.usage = f"{parser.prog} [--address URL] [--id NAME] -- COMMAND ...\n"
    parser.usage += f"       {parser.prog} [--address URL] --stop NAME"
    parser.add_argument(
        "command",
        nargs="*",
        metavar="COMMAND",
        help="a command of run.py with its arguments, after --",
    )
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's job server "
        "(default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)",
    )
    parser.add_argument(
        "--id",
        metavar="NAME",
        help="a name for the job; submit again under the same name to resume",
    )
    parser.add_argument("--stop", metavar="NAME", help="stop the job of this name instead")
    parser.set_defaults(run=submit, commands=commands.choices)


def submit(options: argparse.Namespace) -> int:
    """Run a command on a Ray cluster, follow its log and end with its exit code."""
    if bool(options.stop) == bool(options.command):
        raise UserError("submit takes a command of run.py after --, or --stop NAME")
    if options.command:
        _check_command(options.command[0], [*options.commands])

    from cluster import jobs

    if options.stop:
        jobs.stop(options.address, options.stop)
        return 0
    return jobs.submit(options.address, options.id, options.command)


def _check_command(word: str, known: list[str]) -> None:
    known.remove("submit")
    if word == "submit":
        raise UserError("submit cannot submit itself; name another command after --")
    if word not in known:
        raise UserError(
            f"unknown command '{word}': there are {', '.join(known)}.{nearest(word, known)}"
        )
