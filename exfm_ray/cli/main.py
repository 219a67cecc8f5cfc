"""The command line: one parser with a sub-parser for each command, and the exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from exfm_ray.cli import das, inspect, submit, train
from exfm_ray.cli.common import INTERRUPTED, CommandParser, fail
from exfm_ray.errors import UserError, nearest

HELP = ("-h", "--help")


def main(arguments: Sequence[str], prog: str = "run.py") -> int:
    """Run one command.

    Args:
        arguments: the command line without the program.
        prog: name of the program in help and error messages.

    Returns:
        The exit code. It is 0 only if everything that was requested is done.
    """
    # Ray reads this when it is imported.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started")
    try:
        return _run(arguments, prog)
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        # Imports ray, which would cost seconds for a mistake on the command line.
        from exfm_ray.runtime.session import user_error

        cause = user_error(error)
        if cause is None:
            raise
        return fail(cause)


def console() -> int:
    """Run the command line of this process: the entry point of the console script."""
    program, *arguments = sys.argv
    return main(arguments, prog=Path(program).stem)


def _run(arguments: Sequence[str], prog: str) -> int:
    parser, names = _parser(prog)
    if arguments:
        _check_command(arguments[0], names, prog)

    options = parser.parse_args(arguments)
    exit_code: int | None = options.run(options)
    if exit_code is None:
        return 0
    return exit_code


def _parser(prog: str) -> tuple[argparse.ArgumentParser, Collection[str]]:
    """Build the parser of all commands. Returns it with the names of the commands."""
    parser = CommandParser(
        prog=prog, description="External foundation-model distillation (ExFM) on Ray."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train.add_commands(commands)
    das.add_commands(commands)
    inspect.add_commands(commands)
    submit.add_commands(commands)
    return parser, commands.choices


def _check_command(
    word: str,
    names: Collection[str],
    prog: str,
) -> None:
    """Refuse an unknown command with a suggestion, which argparse does not have."""
    if word in names or word in HELP:
        return
    if word.startswith("-"):
        raise UserError(
            f"'{word}': the command comes first, as in `{prog} pipeline --config FILE`; "
            f"see {prog} --help"
        )
    raise UserError(
        f"unknown command '{word}': there are {', '.join(names)}.{nearest(word, names)}"
    )
