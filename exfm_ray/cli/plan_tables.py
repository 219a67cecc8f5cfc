"""Tables of a memory plan for a terminal."""

from __future__ import annotations

from rich.table import Column, Table

from exfm_ray.planner.memory import UTILIZATION, MemoryPlan, format_bytes
from exfm_ray.planner.table_placement import TableShards

MAX_TABLES = 20
"""Embedding tables that have a line of their own, the largest ones."""


def worker_table(plan: MemoryPlan) -> Table:
    """Create the table of memory by purpose: of the worker with most, and of all workers."""
    fm = plan.fm
    peak = plan.peak_worker
    table = Table(
        "bytes of",
        Column(f"worker {peak} (most)", justify="right"),
        Column("all workers", justify="right"),
        title=f"{fm.name}: {fm.workers} worker(s), {fm.device}, ZeRO stage {fm.zero_stage}, "
        f"{fm.precision}",
    )
    parts_by_worker = [plan.parts(worker) for worker in range(fm.workers)]
    for part, size in parts_by_worker[peak].items():
        total = sum(parts[part] for parts in parts_by_worker)
        if total:
            table.add_row(part, format_bytes(size), format_bytes(total))

    table.add_section()
    for heading, bytes_W in (("resident", plan.resident_bytes_W), ("peak", plan.bytes_W)):
        of_peak_worker = int(bytes_W[peak])
        of_all = int(bytes_W.sum())
        table.add_row(heading, format_bytes(of_peak_worker), format_bytes(of_all))
    return table


def shards_table(plan: MemoryPlan) -> Table:
    """Create the table of how the largest embedding tables are cut.

    Rows and bytes are those of the worker that holds most of a table; bytes include Adagrad's.
    """
    table = Table(title=f"{len(plan.shards)} table(s), {plan.table_parameters:,} numbers")
    for heading in ("table", "sharding", "worker"):
        table.add_column(heading)
    for heading in ("rows", "width", "rows per worker", "bytes per worker"):
        table.add_column(heading, justify="right")

    shards = sorted(plan.shards, key=lambda shard: -shard.largest_bytes)
    for shard in shards[:MAX_TABLES]:
        table.add_row(
            shard.name,
            shard.sharding,
            _holders(shard),
            f"{shard.rows:,}",
            f"{shard.width:,}",
            f"{int(shard.rows_W.max()):,}",
            format_bytes(shard.largest_bytes),
        )
    others = len(shards) - MAX_TABLES
    if others > 0:
        table.add_row(f"{others} smaller ones")
    return table


def _holders(shard: TableShards) -> str:
    (holders,) = shard.rows_W.nonzero()
    first = holders[0]
    last = holders[-1]
    if first == last:
        return f"{first}"
    return f"{first} to {last}"


def summary_lines(
    plan: MemoryPlan,
    limit_bytes: int,
    tflops: float | None,
) -> list[str]:
    """Describe the rest of the plan: parameters, operations, speed, the DAS, what does not fit.

    Args:
        plan: of the FM's training.
        limit_bytes: memory of a GPU, or of the machine.
        tflops: peak of a worker, to estimate the speed; None: no estimate.
    """
    training_gflops = plan.training_flops / 1e9
    lines = [
        f"{plan.parameters:,} parameters, {plan.dense.parameters:,} of them dense.",
        f"{training_gflops:,.3f} GFLOP per example in training; "
        f"{plan.worker_examples:,} examples of a batch on each worker.",
    ]
    if tflops:
        lines.append(
            f"About {plan.examples_per_s(tflops):,.0f} examples/s if {plan.fm.workers} x "
            f"{tflops:g} TFLOP/s are used to {UTILIZATION:.0%} (assumed) and nothing waits for "
            "lookups, network or data."
        )
    lines.append(
        f"Each DAS actor holds {format_bytes(plan.replica_bytes)} (tables and network, float32), "
        "and more while it loads a snapshot."
    )

    violations = plan.violations(limit_bytes)
    lines += [f"Does not fit: {violation}." for violation in violations]
    if not violations:
        place = "a GPU" if plan.fm.device == "cuda" else "this machine"
        lines.append(f"It fits into the {format_bytes(limit_bytes)} of {place}.")
    return lines
