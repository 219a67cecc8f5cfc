"""A run on two nodes of which one dies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from head import Head
from test_cluster_jobs import PIPELINE, ended

from exfm_ray.files import read_json
from exfm_ray.tracking.recorder import read_metrics

ATTEMPTS = 3


@pytest.fixture
def head() -> Iterator[Head]:
    """A head on which a run does not fit alone: it asks for 5 CPUs."""
    head = Head(cpus=3)
    yield head
    head.stop()


def rows(run: Path) -> list[dict[str, object]]:
    """The run's rows without its speed, in one order."""
    found = [{key: value for key, value in row.items() if key != "examples_per_s"} for row in read_metrics(run / "metrics.jsonl")]
    return sorted(found, key=lambda row: str(sorted(row.items())))


@pytest.mark.slow
def test_a_run_survives_the_loss_of_a_node(head: Head) -> None:
    """Wrong: after a node's death, with another in its place, a run hangs, cannot go on, or has other figures."""
    node = head.join(cpus=3)
    assert ended(head.submit("--id", "undisturbed", "--", *PIPELINE, "--name", "undisturbed"))[0] == 0
    lost = [*PIPELINE, "--name", "lost"]
    first = head.submit("--id", "lost", "--", *lost)
    figures = head.home / "runs" / "lost" / "metrics.jsonl"
    while not (figures.exists() and figures.read_text()):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    head.kill(node)
    head.join(cpus=3)
    code = ended(first)[0]
    for _ in range(ATTEMPTS):
        if code == 0:
            break
        code, out, errors = ended(head.submit("--id", "lost", "--", *lost))
    assert code == 0, out + errors
    assert rows(figures.parent) == rows(head.home / "runs" / "undisturbed")
    parts = [read_json(head.home / "runs" / name / "summary.json")["figures"] for name in ("lost", "undisturbed")]
    assert sorted(map(str, parts[0])) == sorted(map(str, parts[1]))
