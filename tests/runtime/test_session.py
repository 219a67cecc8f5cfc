"""User errors inside Ray's, the CPUs that a run requests, its Ray session, its memory."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from small_runs import small_config

from exfm_ray.errors import UserError
from exfm_ray.runtime import resources, session
from exfm_ray.runtime.resources import DATA_CPUS, logical_cpus
from exfm_ray.runtime.session import restrict_token_file, user_error

REPOSITORY = Path(__file__).parents[2]


def test_finds_the_mistake_inside_other_errors() -> None:
    """Wrong: a user sees Ray's wrapping instead of the mistake, or a cycle of errors makes the
    search endless."""
    mistake = UserError("here")

    class WrapperError(Exception):
        def __init__(self, **attributes: object) -> None:
            vars(self).update(attributes)

    caused = RuntimeError("outer")
    caused.__cause__ = WrapperError(cause=mistake)
    context = RuntimeError("later")
    context.__context__ = mistake
    cycle = RuntimeError("cycle")
    cycle.__cause__ = WrapperError(cause=cycle)
    for error in (
        mistake,
        caused,
        context,
        WrapperError(worker_failures={0: ValueError(), 1: caused}),
    ):
        assert user_error(error) is mistake
    for error in (cycle, ValueError("no mistake of a user")):
        assert user_error(error) is None


@ray.remote(num_cpus=0)
class Failing:
    """An actor that raises what a scorer or a feed raises."""

    def __init__(self, at_start: bool) -> None:
        if at_start:
            raise UserError("no stream here")

    def fail(self) -> None:
        raise UserError("no window here")


@pytest.mark.parametrize(
    ("at_start", "message"), [(True, "no stream here"), (False, "no window here")]
)
def test_finds_the_mistake_that_an_actor_reports(
    cluster: None,
    at_start: bool,
    message: str,
) -> None:
    """Wrong: a mistake that an actor finds, at its start or later, is shown with a traceback."""
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(Failing.remote(at_start).fail.remote())
    assert message in str(user_error(caught.value) or caught.value)
    assert at_start or str(user_error(caught.value)) == message


def test_requests_cpus_for_every_role_and_for_the_data(tmp_path: Path) -> None:
    """Wrong: Ray has no CPU left for reading and the run hangs."""
    config = small_config(
        tmp_path,
        "x",
        fm={"workers": 3},
        vm={"workers": 2, "shared_pass": False},
        das={"max_actors": 4},
    )
    assert logical_cpus(config) == 3 + 2 * 2 + 4 + DATA_CPUS
    shared = config.model_copy(update={"vm": config.vm.model_copy(update={"shared_pass": True})})
    assert logical_cpus(shared) == 3 + 2 + 4 + DATA_CPUS


def test_an_address_where_nothing_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a wrong RAY_ADDRESS ends in Ray's traceback after minutes."""
    monkeypatch.setattr("exfm_ray.runtime.session.ray.is_initialized", lambda: False)
    monkeypatch.setattr(session, "_log_to", lambda path: None)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        config = small_config(tmp_path, "x")
        message = rf"RAY_ADDRESS is {address}, and no Ray could be .*; correct it, .* or unset it"
        with pytest.raises(UserError, match=message), session.ray_session(config):
            pass


def test_the_token_is_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: others on the machine read the token that Ray wrote."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    restrict_token_file()  # none there
    default = tmp_path / ".ray" / "auth_token"
    named = tmp_path / "token"
    default.parent.mkdir()
    for path in (default, named):
        path.write_text("x")
        path.chmod(0o644)
    restrict_token_file()
    assert [path.stat().st_mode & 0o777 for path in (default, named)] == [0o600, 0o644]
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    restrict_token_file()
    assert named.stat().st_mode & 0o777 == 0o600


def test_a_cluster_is_checked_for_cpus_and_for_the_folder(
    cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Wrong: a run waits without a message for missing CPUs, or fails half-way because a node does
    not see its folder."""
    monkeypatch.setattr(
        "exfm_ray.runtime.session.ray.get_runtime_context",
        lambda: SimpleNamespace(get_node_id=lambda: "another"),
    )
    config = small_config(tmp_path, "x", fm={"workers": 99})
    logs = config.folder / "logs"
    logs.mkdir(parents=True)
    session._check_cluster(config)
    assert "CPUs and this run asks for 103: it waits until nodes join" in caplog.text
    monkeypatch.setattr(session, "_exists", lambda path: False)
    message = (
        rf"{config.folder}: [0-9.]+ does not see this folder; "
        "put run.dir, or EXFM_HOME, on a file system"
    )
    with pytest.raises(UserError, match=message):
        session._check_cluster(config)
    assert not list(logs.iterdir())


def node(cpus: float, **labels: str) -> dict[str, Any]:
    return {"Resources": {"CPU": cpus}, "Labels": labels}


def test_names_the_labeled_nodes_that_a_run_will_wait_for(tmp_path: Path) -> None:
    """Wrong: a run waits without a message for nodes that never come, or reports that it waits for
    nodes that are present."""
    placement = {
        "fm": {"group": "fm", "disk": "ssd"},
        "das": {"group": "cpu"},
        "data": {"group": "cpu"},
    }
    config = small_config(
        tmp_path, "x", placement=placement, fm={"workers": 3}, das={"max_actors": 4}
    )
    ending = "what is to run there waits until such nodes join"
    cpu = node(8, group="cpu")
    assert resources.missing_resources(
        config, [cpu, node(2, group="fm", disk="ssd"), node(9, group="fm")]
    ) == [
        "setting 'placement.fm': the nodes with group=fm,disk=ssd have 2 CPUs, "
        f"3 CPUs are asked for; {ending}"
    ]
    assert resources.missing_resources(config, [cpu, node(9, disk="ssd")]) == [
        f"setting 'placement.fm': no node has group=fm,disk=ssd, 3 CPUs are asked for; {ending}"
    ]
    assert (
        resources.missing_resources(
            config,
            [cpu, node(2, group="fm", disk="ssd", more="x"), node(1, group="fm", disk="ssd")],
        )
        == []
    )


def test_labels_without_a_cluster_are_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a run on one machine waits for ever for a labeled node."""
    monkeypatch.setattr("exfm_ray.runtime.session.ray.is_initialized", lambda: False)
    monkeypatch.setattr("exfm_ray.runtime.session._log_to", lambda path: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = small_config(tmp_path, "x", placement={"vm": {"group": "cpu"}})
    message = "setting 'placement.vm' asks for nodes with group=cpu, but RAY_ADDRESS is not set"
    with pytest.raises(UserError, match=message), session.ray_session(config):
        pass


MEASURE = """
from exfm_ray.runtime.memory import MemoryMeter
meter = MemoryMeter(); meter.sample(); before = meter.peak
block = bytearray(b"x") * (300 << 20); meter.sample(); full = meter.peak
del block; meter.sample()
print(before, full, meter.peak)
"""


def test_memory_is_a_peak() -> None:
    """Wrong: the peak misses memory, counts it twice, or falls again."""
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    before, full, after = (int(word) for word in measured.split())
    assert 290 << 20 < full - before < 310 << 20
    assert after == full
