"""Commands that prepare, train, score and search."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from exfm_ray.cli.common import _console, _write_report
from exfm_ray.config.root import Config
from exfm_ray.storage.atomic import read_json
from exfm_ray.tracking.html_page import missing_supervision


def prepare(config: Config) -> None:
    """Turn the raw data set into an event stream; with data.follow, take what comes until it
    ends."""
    from exfm_ray.pipeline.preflight import follow_stream, prepare_stream

    stream = follow_stream(config) if config.data.follow else prepare_stream(config)
    windows = [stream.window(w) for w in stream.windows()]
    print(
        f"{stream.root}: {len(windows)} windows, {sum(w.rows for w in windows):,} events, {sum(w.duplicates for w in windows):,} duplicates"
    )
    tables = read_json(stream.root / "manifest.json").get("tables", {})
    shares = {
        name: table["values_in_shared_rows"] / table["values"]
        for name, table in tables.items()
        if table["shared"]
    }
    for name in sorted(shares, key=lambda name: -shares[name]):
        used = tables[name]["used"]
        rows = tables[name]["rows"] - 1
        print(
            f"  table {name}: {shares[name]:.1%} of the values share their row with another id; {used:,} of {rows:,} rows used"
        )


def _run(
    config: Config,
    fm: bool,
    das: bool,
    vm: bool,
) -> None:
    from exfm_ray.das.client import LabelingFailedError
    from exfm_ray.data.new_ids import write_new_ids
    from exfm_ray.pipeline.preflight import prepare_stream
    from exfm_ray.pipeline.runner import PipelineRunner

    while True:
        stream = prepare_stream(config)
        over = stream.complete  # asked first: what is there by then is done below
        run = PipelineRunner(config, stream)
        try:
            worked = run.execute(fm, das, vm)
        except LabelingFailedError:  # names one cause; summary and report have all
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


def pipeline(config: Config) -> None:
    """The whole of ExFM: FM, DAS and VMs side by side, over all windows."""
    _run(config, fm=True, das=True, vm=True)
    show(config)


def train_fm(config: Config) -> None:
    """Train the foundation model alone; it publishes a snapshot after each window."""
    _run(config, fm=True, das=False, vm=False)
    show(config)


def das(config: Config) -> None:
    """Let the DAS score every window with the snapshots that train-fm has published; `das
    start|status|stop`: as a service."""
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


def show(config: Config) -> None:
    """Print the run's summary."""
    summary = read_json(config.folder / "summary.json")
    wanted = {student.domain for student in config.vm.models} | {"all"}
    rows = [row for row in summary["figures"] if row["domain"] in wanted]
    place = {"pass": "best pass", "window": "window"} if config.fm.static else {}
    console = _console()
    table = Table(
        title=f"{config.name}: windows {summary['windows'][0]} to {summary['windows'][-1]}"
        if summary["windows"]
        else config.name
    )
    for column in (*place.values(), "domain", "task", "model", "arm"):
        table.add_column(column)
    columns = {"ne": "NE", "auc": "AUC", "gauc": "gAUC", "calibration": "calibr."}
    columns |= (
        {"log_loss": "log loss"}
        if config.fm.static
        else {"best_ne": "best NE", "ne_gain": "NE gain %", "transfer_ratio": "TR"}
    )
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: (row["domain"] != "all", row["domain"], row["task"])):
        identity = (str(row[key]) for key in (*place, "domain", "task", "model", "arm"))
        table.add_row(*identity, *(_cell(key, row.get(key)) for key in columns))
    console.print(table)
    _show_lacking(summary)
    seconds = ", ".join(
        f"{role} {r['examples']:,} examples in {r['seconds']:.0f} s"
        for role, r in summary["roles"].items()
        if r["examples"]
    )
    memory = f"peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB"
    console.print(
        f"{seconds}; {memory}. Everything is in {config.folder}", highlight=False, soft_wrap=True
    )


def _show_lacking(summary: Mapping[str, Any]) -> None:
    for line in missing_supervision(summary):
        _console().print(line, highlight=False, soft_wrap=True, markup=False)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return (
        f"{value * 100:.2f}"
        if key == "ne_gain"
        else f"{value:.2f}"
        if key == "transfer_ratio"
        else f"{value:.4f}"
    )
