"""The status of a service, as tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from rich.table import Table

State = Mapping[str, Any]


def status_tables(state: State) -> Iterator[Table]:
    """Yield the service's summary, its actors, the last windows, what has failed, and the faults.

    Tables without rows are left out, except for the first two.
    """
    yield _summary(state)
    yield _actors(state)
    for table in (_written(state), _failed(state), _faults(state)):
        if table.row_count:
            yield table


def _summary(state: State) -> Table:
    table = Table(
        title=f"teacher '{state['teacher']}', {state['store']}",
        title_justify="left",
        show_header=False,
    )
    table.add_row("serves", _serves(state))
    backlog = state["backlog"]
    table.add_row(
        "backlog",
        f"{backlog['windows']} windows, {backlog['fragments']} fragments, "
        f"{backlog['examples']:,} examples",
    )
    table.add_row("speed", f"{state['examples_per_s']:,.0f} examples/s over the last half minute")
    for name in ("throttled", "error"):
        if state[name]:
            table.add_row(name, state[name])
    return table


def _serves(state: State) -> str:
    """Describe for whom the service works."""
    serves = []
    if state["detached"]:
        serves.append("follows the stream" if state["follow"] else "all windows up to its start")
    if state["clients"]:
        serves.append(f"{state['clients']} client(s)")
    return ", ".join(serves) or "no one"


def _actors(state: State) -> Table:
    table = Table(
        "actor",
        "process",
        "state",
        "snapshots",
        "fragments in progress",
        title="actors",
        title_justify="left",
    )
    for actor in state["actors"]:
        loading = [f"{version} (loading)" for version in actor["loading"]]
        snapshots = [str(version) for version in actor["snapshots"]]
        table.add_row(
            str(actor["number"]),
            str(actor["process"] or ""),
            _activity(actor),
            ", ".join(snapshots + loading),
            str(actor["fragments"]),
        )
    return table


def _activity(actor: Mapping[str, Any]) -> str:
    if not actor["up"]:
        return "starting"
    return "scoring" if actor["fragments"] else "idle"


def _written(state: State) -> Table:
    table = Table(
        "window",
        "snapshot",
        "lag, windows",
        "examples",
        "snapshot's age",
        "window's age",
        title="supervision written; ages since the snapshot was published and the window ended",
    )
    for row in state["written"]:
        lag = row["window"] - row["snapshot"] + 1
        snapshot_age_s = row["ended_s"] - row["snapshot_s"]
        window_age_s = row["ended_s"] - row["label_s"]
        table.add_row(
            str(row["window"]),
            str(row["snapshot"]),
            str(lag),
            f"{row['examples']:,}",
            seconds(snapshot_age_s),
            seconds(window_age_s),
        )
    return table


def _failed(state: State) -> Table:
    table = Table(
        "window",
        "fragment",
        "snapshot",
        "attempts",
        "cause",
        title="failed; rerun `das start` or the requesting command to retry",
    )
    for row in state["failed"]:
        table.add_row(
            str(row["window"]),
            row["fragment"] or "all",
            str(row["snapshot"] or ""),
            str(row["tries"]),
            row["cause"],
        )
    return table


def _faults(state: State) -> Table:
    table = Table("ago", "fault", title="last faults", title_justify="left")
    for at_s, message in state["faults"][-5:]:
        age_s = time.time() - at_s
        table.add_row(seconds(age_s), message)
    return table


def seconds(value: float) -> str:
    """Format an age: 12.3 s, or h:mm:ss, or days."""
    if value < 60:
        return f"{value:.1f} s"
    return str(timedelta(seconds=round(value)))
