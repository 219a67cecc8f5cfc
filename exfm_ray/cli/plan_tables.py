"""A plan for a terminal."""

from __future__ import annotations

from rich.table import Column, Table

from exfm_ray.planner.memory import UTILIZATION, MemoryPlan, format_bytes
from exfm_ray.planner.table_placement import TableShards

SHOWN = 20
"""Tables that have a line of their own."""


def worker_table(plan: MemoryPlan) -> Table:
    """What the memory of the most laden worker is for, and that of all workers together."""
    fm = plan.fm
    most = plan.peak_worker
    table = Table(
        "bytes of",
        Column(f"worker {most} (most)", justify="right"),
        Column("all workers", justify="right"),
        title=f"{fm.name}: {fm.workers} worker(s), {fm.device}, ZeRO stage {fm.zero_stage}, {fm.precision}",
    )
    everyone = [plan.parts(worker) for worker in range(fm.workers)]
    for part, size in everyone[most].items():
        total = sum(parts[part] for parts in everyone)
        if total:
            table.add_row(part, format_bytes(size), format_bytes(total))
    table.add_section()
    table.add_row(
        "kept",
        format_bytes(int(plan.resident_bytes_W[most])),
        format_bytes(int(plan.resident_bytes_W.sum())),
    )
    table.add_row(
        "at most", format_bytes(int(plan.bytes_W[most])), format_bytes(int(plan.bytes_W.sum()))
    )
    return table


def shards_table(plan: MemoryPlan) -> Table:
    """How the largest tables are cut; rows and bytes (Adagrad's among them) of the worker that
    holds most of each."""
    table = Table(title=f"{len(plan.shards)} table(s), {plan.table_parameters:,} numbers")
    for heading in ("table", "sharding", "worker"):
        table.add_column(heading)
    for heading in ("rows", "width", "rows a worker", "bytes a worker"):
        table.add_column(heading, justify="right")
    shards = sorted(plan.shards, key=lambda shard: -shard.largest_bytes)
    for shard in shards[:SHOWN]:
        rows = int(shard.rows_W.max())
        table.add_row(
            shard.name,
            shard.sharding,
            _holders(shard),
            f"{shard.rows:,}",
            f"{shard.width:,}",
            f"{rows:,}",
            format_bytes(shard.largest_bytes),
        )
    if shards[SHOWN:]:
        table.add_row(f"{len(shards) - SHOWN} smaller ones")
    return table


def _holders(shard: TableShards) -> str:
    holders = shard.rows_W.nonzero()[0]
    return f"{holders[0]}" if len(holders) == 1 else f"{holders[0]} to {holders[-1]}"


def summary_lines(
    plan: MemoryPlan,
    limit_bytes: int,
    tflops: float | None,
) -> list[str]:
    """The rest of the plan as sentences: parameters, operations, speed, the DAS, what does not
    fit."""
    found = [
        f"{plan.parameters:,} parameters, {plan.dense.parameters:,} of them dense.",
        f"{plan.training_flops / 1e9:,.3f} GFLOP per example in training; {plan.worker_examples:,} examples of a batch on each worker.",
    ]
    if tflops:
        found.append(
            f"About {plan.examples_per_s(tflops):,.0f} examples/s, if {plan.fm.workers} x {tflops:g} TFLOP/s are used to {UTILIZATION:.0%} "
            "(assumed) and nothing waits for look-ups, network or data."
        )
    found.append(
        f"Each DAS actor holds {format_bytes(plan.replica_bytes)} (tables and network, float32), and more while it loads a snapshot."
    )
    violations = [f"Does not fit: {line}." for line in plan.violations(limit_bytes)]
    place = "a GPU" if plan.fm.device == "cuda" else "this machine"
    return [*found, *(violations or [f"It fits into the {format_bytes(limit_bytes)} of {place}."])]
