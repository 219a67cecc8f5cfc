"""The commands of run.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from exfm_ray.cli.common import _add_config, _console, _fail, _Parser
from exfm_ray.cli.inspect import compare, dashboard, export, plan, report, runs
from exfm_ray.cli.train import das, pipeline, prepare, train_fm, train_vm, tune
from exfm_ray.config.load import load_config
from exfm_ray.config.root import Config
from exfm_ray.errors import UserError, nearest
from exfm_ray.storage.paths import absolute, home_dir, uses_home_dir


def main(arguments: Sequence[str]) -> int:
    """Run one command; the exit code is 0 only when everything asked for was done."""
    os.environ.setdefault(
        "RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started"
    )  # read when ray is imported
    try:
        if arguments and arguments[0] == "export":
            export(_export_parser().parse_args(arguments[1:]))
            return 0
        if arguments and arguments[0] == "submit":
            return submit(_submit_parser().parse_args(arguments[1:]))
        if arguments and arguments[0] == "plan":
            return plan(_plan_parser().parse_args(arguments[1:]))
        if (
            arguments
            and arguments[0] == "das"
            and len(arguments) > 1
            and not arguments[1].startswith("-")
        ):
            serve(_serve_parser().parse_args(arguments[1:]))
            return 0
        if arguments and arguments[0] in FOLDERS:
            _look(arguments[0], arguments[1:])
            return 0
        options = _parser().parse_args(arguments)
        config = load_config(options.config, options.set, options.name)
        if uses_home_dir():
            print(
                f"relative folders lie below {home_dir()} (EXFM_HOME), which all nodes must see; this run: {config.folder}"
            )
        COMMANDS[options.command](config)
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except Exception as error:
        from exfm_ray.runtime.session import (
            user_error,
        )  # imports ray: seconds that a mistake on the command line need not cost

        known = user_error(error)
        if known is None:
            raise
        return _fail(known)
    return 0


def _command(word: str) -> str:
    if word in OTHERS:
        raise UserError(
            f"'{word}' does not go here: it is `run.py {word}`, see run.py {word} --help"
        )
    if word not in COMMANDS:
        known = [*COMMANDS, *OTHERS]
        raise UserError(
            f"unknown command '{word}': there are {', '.join(known)}." + nearest(word, known)
        )
    return word


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(
        f"  {name:10} {(command.__doc__ or '').splitlines()[0]}"
        for name, command in (COMMANDS | OTHERS).items()
    )
    parser = _Parser(
        prog="run.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"ExFM on Ray.\n\ncommands:\n{lines}",
    )
    parser.add_argument("command", type=_command, metavar="COMMAND")
    _add_config(parser)
    return parser


def _export_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="run.py export", description=export.__doc__)
    parser.add_argument(
        "run", type=absolute, metavar="RUN", help="the run's folder, such as runs/demo"
    )
    parser.add_argument("--vm", required=True, help="name of the vertical model")
    parser.add_argument("--arm", default="ah_sa", help="the arm that is served (default: ah_sa)")
    parser.add_argument(
        "--to",
        type=absolute,
        metavar="DIR",
        help="a new folder (default: RUN/serving/<vm>-<arm>, of a delta <vm>-<arm>-delta)",
    )
    parser.add_argument(
        "--since",
        type=absolute,
        metavar="SERVED",
        help="an earlier served folder of the same student: write only what changed since",
    )
    parser.add_argument(
        "--aot", action="store_true", help="compile with AOTInductor, too; needs a C++ compiler"
    )
    return parser


def _submit_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="run.py submit", description=submit.__doc__)
    parser.add_argument(
        "command",
        nargs="*",
        metavar="COMMAND",
        help="a command of run.py with its arguments, after --",
    )
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's job server (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)",
    )
    parser.add_argument(
        "--id",
        metavar="NAME",
        help="a name for the job; submitted again under it, the command goes on where it stopped",
    )
    parser.add_argument("--stop", metavar="NAME", help="stop the job of this name instead")
    return parser


def submit(options: argparse.Namespace) -> int:
    """Run a command on a Ray cluster: `run.py submit [--address URL] [--id NAME] -- COMMAND
    ARGS...`, `run.py submit --stop NAME`."""
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
    workers.add_argument(
        "--workers", type=int, metavar="N", help="plan for N workers instead of fm.workers"
    )
    workers.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="plan for N workers with a GPU each, whatever fm.device says",
    )
    parser.add_argument(
        "--gpu-gib", type=float, default=80.0, metavar="GIB", help="memory of a GPU (default: 80)"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        help="a worker's peak in TFLOP/s at the training's precision: estimates the examples per second",
    )
    return parser


def _serve_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="run.py das", description=serve.__doc__)
    commands = parser.add_subparsers(dest="command", metavar="start|status|stop", required=True)
    start = commands.add_parser(
        "start",
        description="Start the service for a run's stream; given again, it tries again what is parked.",
    )
    start.add_argument("--follow", action="store_true", help="label windows that appear later, too")
    _add_config(start)
    for name, told in (
        ("status", "Show the services, or a run's."),
        ("stop", "End a run's service, or the only one there is."),
    ):
        command = commands.add_parser(name, description=told)
        _add_config(command, required=False)
    return parser


def serve(options: argparse.Namespace) -> None:
    """The DAS as a service in a running Ray: `run.py das start|status|stop`, see docs/das.md."""
    config = load_config(options.config, options.set, options.name) if options.config else None
    if config is None and (options.set or options.name):
        raise UserError("--set and --name go with --config")
    from exfm_ray.cli.das import start, status, stop
    from exfm_ray.runtime.session import running_ray

    with running_ray():
        if options.command == "start":
            from exfm_ray.pipeline.schedule import vm_jobs

            assert config
            print(start(config, options.follow, [job.checkpoints.root for job in vm_jobs(config)]))
        elif options.command == "stop":
            print(stop(config))
        else:
            for table in status(config):
                _console().print(table)


def _look(command: str, arguments: Sequence[str]) -> None:
    """A command that reads the folders of runs."""
    parser = _Parser(prog=f"run.py {command}", description=OTHERS[command].__doc__)
    for name, told in FOLDERS[command].items():
        if name == "runs":
            parser.add_argument(
                name, type=absolute, nargs="?", default=absolute(name), metavar="DIR", help=told
            )
        else:
            parser.add_argument(name, type=absolute, metavar=name.upper(), help=told)
    OTHERS[command](parser.parse_args(arguments))


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
    "export": export,
    "submit": submit,
    "plan": plan,
    "report": report,
    "runs": runs,
    "compare": compare,
}
"""Commands with arguments of their own."""
FOLDERS = {
    "report": {"run": "the run's folder, such as runs/demo"},
    "runs": {"runs": "the folder of the runs (default: runs)"},
    "compare": {"a": "the folder of a run", "b": "that of another"},
}
"""Those of them whose arguments are folders of runs."""
