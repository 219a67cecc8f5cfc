"""Processes that form a gloo group and run what a test asks for: deepspeed is imported in them,
never in pytest's own."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT_S = 120


def _serve(
    rank: int,
    world: int,
    store: str,
    connection: Connection,
) -> None:
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    linear = torch.nn.functional.linear
    while task := connection.recv():
        torch.nn.functional.linear = (
            linear  # DeepSpeed's stage 3 replaces it for good, and its own rounds otherwise
        )
        function, arguments = task
        try:
            connection.send((function(*arguments), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()


class Workers:
    """`world` processes of one group; `run` calls a module-level function on each and returns what
    each returned."""

    def __init__(self, world: int, store: str) -> None:
        context = mp.get_context("spawn")
        self.world = world
        self._connections = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, store, theirs), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results in the order of ranks; the first worker's error fails the test."""
        for connection in self._connections:
            connection.send((function, arguments))
        answers = []
        for rank, connection in enumerate(
            self._connections
        ):  # all of them, or the next run would get what this one left
            assert connection.poll(TIMEOUT_S), (
                f"worker {rank} of {self.world} gave no answer in {TIMEOUT_S} s"
            )
            answers.append(connection.recv())
        for rank, (_, error) in enumerate(answers):
            assert error is None, f"worker {rank} of {self.world}:\n{error}"
        return [result for result, _ in answers]

    def stop(self) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
