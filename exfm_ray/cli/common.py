"""What all commands share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from exfm_ray.errors import UserError

USER_ERROR = 2


def _fail(error: UserError) -> int:
    print("error:", " ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
    return USER_ERROR


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see run.py --help")


def _add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--config", type=Path, required=required, help="a YAML file; configs/ holds ready ones"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override a setting; may be repeated",
    )
    parser.add_argument(
        "--name",
        help="name of the run; the same command with the same name goes on where it stopped",
    )


def _write_report(folder: Path) -> Path:
    from exfm_ray.tracking.report import write_report

    return write_report(folder)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 120)))
