"""Processes that form a gloo group and run functions for a test.

deepspeed is imported in them, never in pytest's process.
"""

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
        # DeepSpeed's stage 3 replaces this function for good, and its version rounds differently.
        torch.nn.functional.linear = linear
        function, arguments = task
        try:
            connection.send((function(*arguments), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()


class Workers:
    """`world` processes of one group, in which `run` calls module-level functions."""

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
        """Call a function in every process; return the results by rank. An error fails the test."""
        for connection in self._connections:
            connection.send((function, arguments))
        answers = []
        # All answers are read, or the next run would get those of this one.
        for rank, connection in enumerate(self._connections):
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
