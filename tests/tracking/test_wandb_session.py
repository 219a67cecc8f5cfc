"""Runs in wandb: what is in their files, and what is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from small_runs import small_config
from wandb_files import KEY, OfflineRun, content, run_files, surroundings

from exfm_ray.config.load import dump_config
from exfm_ray.config.root import Config
from exfm_ray.tracking import wandb_session
from exfm_ray.tracking.wandb_session import close_wandb, open_run

pytestmark = pytest.mark.heavy


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An API key in the environment, a server that does not exist, and an empty home folder."""
    surroundings(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    yield
    close_wandb()


def write(
    config: Config,
    identity: str,
    ne: float,
) -> None:
    run = open_run(
        config,
        identity,
        "feed ah",
        "sweep/feed",
        "vm",
        {"vm.batch_size": 64, "distillation.ah.mlp": (4,)},
        step="window",
    )
    run.log({"window": 3, "ne": ne + 0.1})
    run.log({"window": 7, "ne": ne})
    run.finish()
    close_wandb()


def test_offline_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Wrong: runs cannot be distinguished, curves are drawn over wandb's own counter instead of the
    windows, or wandb fills the console."""
    config = small_config(tmp_path, "one", wandb={"mode": "offline", "project": "other"})
    write(config, "abc", 0.8)
    (path,) = run_files(config.folder).values()
    run = OfflineRun(path)
    start = {
        key: run.start[key]
        for key in ("run_id", "display_name", "run_group", "job_type", "project")
    }
    assert start == {
        "run_id": "abc",
        "display_name": "feed ah",
        "run_group": "sweep/feed",
        "job_type": "vm",
        "project": "other",
    }
    assert run.config == {"vm.batch_size": 64, "distillation.ah.mlp": [4]}
    assert run.metrics == {"window": None, "*": "window"}
    assert run.history == [{"window": 3, "ne": pytest.approx(0.9)}, {"window": 7, "ne": 0.8}]
    assert run.summary["ne"] == 0.8 and len(run.exit) == 1
    assert capfd.readouterr() == ("", "")


def test_a_run_begun_twice_is_one_run(tmp_path: Path) -> None:
    """Wrong: the rest of a killed run stays beside the run that replaces it, and a sync sends
    both."""
    config = small_config(tmp_path, "one", wandb={"mode": "offline"})
    for identity, ne in (("abc", 0.9), ("xabc", 0.7), ("abc", 0.8)):
        write(config, identity, ne)
        time.sleep(1.1)  # wandb's folders are named by the second
    files = run_files(config.folder)
    assert files.keys() == {"abc", "xabc"} and OfflineRun(files["abc"]).summary["ne"] == 0.8


def test_the_key_is_nowhere(tmp_path: Path) -> None:
    """Wrong: the folder of a run contains the API key."""
    config = small_config(tmp_path, "one", wandb={"mode": "offline"})
    write(config, "abc", 0.8)
    written = content(tmp_path)
    assert b"sweep/feed" in written
    assert KEY.encode() not in written and b"secret42" not in written
    assert KEY not in dump_config(config) and set(yaml.safe_load(dump_config(config))["wandb"]) == {
        "mode",
        "project",
    }


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a server that is down blocks a run forever, or the error or the files contain the
    key."""
    monkeypatch.setattr(wandb_session, "START_S", 2.0)
    start = time.monotonic()
    with pytest.raises(Exception, match=r"[Tt]im|connect|refused") as caught:
        write(small_config(tmp_path, "one", wandb={"mode": "online"}), "abc", 0.8)
    assert time.monotonic() - start < 20
    assert KEY not in str(caught.value) and KEY.encode() not in content(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    """Wrong: wandb silently writes to a temporary folder."""
    config = small_config(tmp_path, "one", wandb={"mode": "offline"})
    config.folder.mkdir()
    (config.folder / "wandb").write_text("no folder")
    with pytest.raises(FileExistsError):
        write(config, "abc", 0.8)
