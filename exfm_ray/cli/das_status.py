"""What a service tells of itself, as tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from rich.table import Table

State = Mapping[str, Any]


def status_tables(state: State) -> Iterator[Table]:
    """The service as a whole, its actors, the last windows it wrote, what is parked and the last
    faults; only those with rows."""
    yield _summary(state)
    actors = Table(
        "actor",
        "process",
        "state",
        "snapshots",
        "fragments in hand",
        title="actors",
        title_justify="left",
    )
    for actor in state["actors"]:
        coming = [f"{version} (coming)" for version in actor["coming"]]
        doing = "starting" if not actor["up"] else "at work" if actor["fragments"] else "idle"
        held = ", ".join([*map(str, actor["snapshots"]), *coming])
        actors.add_row(
            str(actor["number"]), str(actor["process"] or ""), doing, held, str(actor["fragments"])
        )
    yield actors
    written = Table(
        "window", "snapshot", "lag, windows", "examples", "snapshot's age", "age of its end"
    )
    written.title = "supervision written, and how long before that its snapshot was published and the window had ended"
    for row in state["written"]:
        lag = row["window"] - row["snapshot"] + 1
        ages = (row["ended_s"] - row["snapshot_s"], row["ended_s"] - row["label_s"])
        written.add_row(
            str(row["window"]),
            str(row["snapshot"]),
            str(lag),
            f"{row['examples']:,}",
            *map(seconds, ages),
        )
    parked = Table(
        "window",
        "fragment",
        "snapshot",
        "tries",
        "cause",
        title="parked, until `das start` or the command that asked is given again",
    )
    for row in state["parked"]:
        parked.add_row(
            str(row["window"]),
            row["fragment"] or "all",
            str(row["snapshot"] or ""),
            str(row["tries"]),
            row["cause"],
        )
    faults = Table("ago", "fault", title="last faults", title_justify="left")
    for at_s, told in state["faults"][-5:]:
        faults.add_row(seconds(time.time() - at_s), told)
    yield from (table for table in (written, parked, faults) if table.row_count)


def _summary(state: State) -> Table:
    backlog = state["backlog"]
    serves = (
        ["all windows there at its start" if not state["follow"] else "follows the stream"]
        if state["lasting"]
        else []
    )
    serves += [f"{state['clients']} client(s)"] if state["clients"] else []
    table = Table(
        title=f"teacher '{state['teacher']}', {state['store']}",
        title_justify="left",
        show_header=False,
    )
    table.add_row("serves", ", ".join(serves) or "nobody")
    table.add_row(
        "backlog",
        f"{backlog['windows']} windows, {backlog['fragments']} fragments, {backlog['examples']:,} examples",
    )
    table.add_row("speed", f"{state['examples_per_s']:,.0f} examples/s over the last half minute")
    for name in ("held_back", "error"):
        if state[name]:
            table.add_row(name.replace("_", " "), state[name])
    return table


def seconds(value: float) -> str:
    """An age: 12.3 s, or h:mm:ss, or days."""
    return f"{value:.1f} s" if value < 60 else str(timedelta(seconds=round(value)))
