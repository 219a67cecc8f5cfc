"""CPUs and nodes that a run requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exfm_ray.config.root import Config

DATA_CPUS = 2
"""Logical CPUs left for Ray Data's read tasks; without any the run would hang."""


def missing_resources(config: Config, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one message for each resource that a run will have to wait for.

    Args:
        config: the run.
        nodes: the cluster's nodes that are alive, as in `ray.nodes()`.
    """
    messages = []
    requested = logical_cpus(config)
    available = _total_cpus(nodes)
    if available < requested:
        messages.append(
            f"the cluster has {available:g} CPUs and this run asks for {requested}: "
            "it waits until nodes join"
        )

    for role, labels in config.placement:
        if not labels:
            continue
        matches = [node for node in nodes if labels.items() <= node["Labels"].items()]
        role_request = role_cpus(config)[role]
        matching_cpus = _total_cpus(matches)
        if matching_cpus >= role_request:
            continue

        if matches:
            shortage = f"the nodes with {format_labels(labels)} have {matching_cpus:g} CPUs"
        else:
            shortage = f"no node has {format_labels(labels)}"
        cpus = "1 CPU is" if role_request == 1 else f"{role_request} CPUs are"
        messages.append(
            f"setting 'placement.{role}': {shortage}, {cpus} asked for; "
            "what is to run there waits until such nodes join"
        )
    return messages


def _total_cpus(nodes: Sequence[Mapping[str, Any]]) -> float:
    cpus = [node["Resources"].get("CPU", 0) for node in nodes]
    return float(sum(cpus))


def format_labels(labels: Mapping[str, str]) -> str:
    """Return node labels in the notation of `ray start --labels`."""
    pairs = [f"{key}={value}" for key, value in labels.items()]
    return ",".join(pairs)


def role_cpus(config: Config) -> dict[str, int]:
    """Return how many CPUs each role of `placement` requests."""
    vm = config.vm
    jobs = len(vm.models)
    if vm.shared_pass:
        teachers = {student.teacher or config.fm.name for student in vm.models}
        jobs = max(1, len(teachers))
    labelers = 1 + len(config.teachers)
    return {
        "fm": config.fm.workers,
        "vm": vm.workers * jobs,
        "das": config.das.max_actors * labelers,
        "data": DATA_CPUS,
    }


def logical_cpus(config: Config) -> int:
    """Return how many CPUs the run requests for its roles, or a sweep for its trials.

    The CPUs of Ray Data are included.
    """
    roles = sum(role_cpus(config).values())
    trials = config.tune.max_concurrent if config.tune else 0
    return max(roles, trials + DATA_CPUS)
