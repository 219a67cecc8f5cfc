"""CPUs and nodes that a run asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exfm_ray.config.root import Config

DATA_CPUS = 2
"""Logical CPUs left to Ray Data's read tasks; with none left the run would hang."""


def missing_resources(config: Config, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a run will wait for, in words: CPUs, or nodes with the labels of `placement`. `nodes`:
    the living ones, of `ray.nodes()`."""
    asked = logical_cpus(config)
    there = _cpus(nodes)
    found = (
        [f"the cluster has {there:g} CPUs and this run asks for {asked}: it waits until nodes join"]
        if there < asked
        else []
    )
    for role, labels in config.placement:
        fitting = [node for node in nodes if labels.items() <= node["Labels"].items()]
        needs = role_cpus(config)[role]
        given = _cpus(fitting)
        if labels and given < needs:
            those = (
                f"the nodes with {_written(labels)} have {given:g} CPUs"
                if fitting
                else f"no node has {_written(labels)}"
            )
            wanted = "1 CPU is" if needs == 1 else f"{needs} CPUs are"
            found.append(
                f"setting 'placement.{role}': {those}, {wanted} asked for; what is to run there waits until such nodes join"
            )
    return found


def _cpus(nodes: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(node["Resources"].get("CPU", 0) for node in nodes))


def _written(labels: Mapping[str, str]) -> str:
    """As `ray start --labels` takes them."""
    return ",".join(f"{key}={value}" for key, value in labels.items())


def role_cpus(config: Config) -> dict[str, int]:
    """CPUs that each role of `placement` asks for."""
    teachers = {student.teacher or config.fm.name for student in config.vm.models}
    jobs = max(1, len(teachers)) if config.vm.shared_pass else len(config.vm.models)
    das = config.das.max_actors * (1 + len(config.teachers))
    return {"fm": config.fm.workers, "vm": config.vm.workers * jobs, "das": das, "data": DATA_CPUS}


def logical_cpus(config: Config) -> int:
    """CPUs that the roles, or a sweep's trials, ask for, and some for Ray Data."""
    return max(
        sum(role_cpus(config).values()),
        (config.tune.max_concurrent if config.tune else 0) + DATA_CPUS,
    )
