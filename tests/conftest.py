"""Fixtures for all tests: a small stream, one Ray cluster for the session, engine workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from example import make_stream
from hypothesis import settings
from ray_environment import RAY_ENVIRONMENT
from s3_server import S3, s3_server
from workers import Workers

from exfm_ray.data.stream import EventStream

settings.register_profile("shared", deadline=None)  # a busy machine must not fail a property
settings.load_profile("shared")


HEAVY = {"cluster", "groups", "s3"}
"""Fixtures that start other processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start other processes: `make test-fast` leaves them out."""
    for item in items:
        if HEAVY & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.heavy)


@pytest.fixture
def stream(tmp_path: Path) -> EventStream:
    """Three windows of 1,000 rows in fragments of 400."""
    return make_stream(tmp_path / "stream")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One Ray on this machine for all tests that need it, because its start takes 10 s.

    Its workers inherit the environment.
    """
    import ray

    os.environ |= RAY_ENVIRONMENT
    ray.init(
        num_cpus=6,
        labels={"exfm-group": "tests"},
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Workers]]:
    """World size -> engine workers, which are started once."""
    folder = tmp_path_factory.mktemp("groups")
    groups = {world: Workers(world, str(folder / f"store{world}")) for world in (1, 2)}
    yield groups
    for workers in groups.values():
        workers.stop()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server, whose credentials this process, Ray's processes and engine workers have."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server
