"""What all commands share: exit codes, the parser, --config, and printing.

This module and those of the commands import the heavy parts of the package inside functions, so
that `--help` and mistakes on the command line take no seconds.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from exfm_ray.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from exfm_ray.config.root import Config

USER_ERROR = 2
INTERRUPTED = 130
NON_TERMINAL_COLUMNS = 120
"""Width of the output if it is not a terminal and COLUMNS is not set."""


class CommandParser(argparse.ArgumentParser):
    """A parser that raises a UserError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise the mistake as one line."""
        raise UserError(f"{message}; see {self.prog} --help")


if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[CommandParser]


def add_command(
    commands: Commands,
    name: str,
    function: Callable[..., object],
) -> CommandParser:
    """Add a command whose help is the docstring of the function behind it."""
    description = inspect.getdoc(function) or ""
    summary = description.partition("\n")[0]
    return commands.add_parser(name, help=summary, description=description)


def add_config_options(
    parser: CommandParser,
    required: bool = True,
    prefix: str = "",
) -> None:
    """Add --config, --set and --name.

    Args:
        parser: the parser of a command.
        required: --config must be set.
        prefix: of the attributes that hold the values.
    """
    parser.add_argument(
        "--config",
        type=Path,
        required=required,
        dest=f"{prefix}config",
        metavar="FILE",
        help="a YAML file, or the name of a ready config such as demo",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest=f"{prefix}set",
        metavar="section.key=value",
        help="override a setting; may be repeated",
    )
    parser.add_argument(
        "--name",
        dest=f"{prefix}name",
        metavar="NAME",
        help="name of the run; the same command with the same name resumes it",
    )


def run_with_config(
    command: Callable[[Config], None],
    file: Path,
    overrides: list[str],
    name: str | None,
) -> None:
    """Load the config and run a command with it."""
    from exfm_ray.config.load import load_config
    from exfm_ray.storage.paths import home_dir, uses_home_dir

    config = load_config(file, overrides, name)
    if uses_home_dir():
        print(
            f"relative folders start from {home_dir()} (EXFM_HOME), which all nodes must see; "
            f"this run: {config.folder}"
        )
    command(config)


def fail(error: UserError) -> int:
    """Print an error as one line on stderr and return the exit code."""
    lines = [line.strip() for line in str(error).splitlines()]
    message = " ".join(lines)
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR


def console() -> Console:
    """Return a console for stdout, as wide as the terminal or COLUMNS."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console()
    return Console(width=int(os.environ.get("COLUMNS", NON_TERMINAL_COLUMNS)))


def print_lines(lines: list[str]) -> None:
    """Print lines without wrapping, markup or highlighting."""
    terminal = console()
    for line in lines:
        terminal.print(line, highlight=False, soft_wrap=True, markup=False)
