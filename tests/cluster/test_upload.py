"""What is uploaded with a job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import get_uri_for_directory

from cluster.upload import CODE_ROOT, PACKAGES, staged
from exfm_ray.errors import UserError


def files(folder: Path) -> set[str]:
    """All files below a folder, links followed, without compiled code."""
    paths = set()
    for parent, _, names in os.walk(folder, followlinks=True):
        if "__pycache__" not in parent:
            paths |= {str(Path(parent, name).relative_to(folder)) for name in names}
    return paths


def test_code_and_ready_configs_are_uploaded_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a module is missing on the cluster, or data, runs, tests, the git history or the
    environment are sent."""
    monkeypatch.chdir(tmp_path)
    with staged(["pipeline", "--config", "configs/demo.yaml"]) as folder:
        uploaded = files(folder)
    expected = set()
    for package in PACKAGES:
        expected |= {f"{package}/{name}" for name in files(CODE_ROOT / package)}
    assert uploaded == expected
    assert {"exfm_ray/__main__.py", "exfm_ray/configs/demo.yaml"} < uploaded
    assert not folder.exists()


def test_uploaded_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: the entry point of a job is missing, or it imports the code installed on the node
    instead of the uploaded code."""
    monkeypatch.chdir(tmp_path)
    with staged(["pipeline"]) as folder:
        usage = subprocess.run(
            [sys.executable, "-m", "exfm_ray", "--help"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        origin = subprocess.run(
            [sys.executable, "-c", "import exfm_ray; print(exfm_ray.__file__)"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    assert "pipeline" in usage
    assert origin.strip() == str(folder / "exfm_ray" / "__init__.py")


def test_compiled_code_is_not_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: the files that python leaves beside the code make each upload a new one."""
    monkeypatch.setattr("cluster.upload.CODE_ROOT", tmp_path)
    for name in ("exfm_ray/engine/a.py", "exfm_ray/engine/__pycache__/a.pyc", "tuning/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with staged(["pipeline"]) as folder:
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"exfm_ray/engine/a.py", "tuning/b.py"}


def test_the_same_code_is_uploaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: each submission makes a package of its own, which the cluster keeps."""
    monkeypatch.chdir(CODE_ROOT)
    uris = []
    for _ in range(2):
        with staged(["report", "--config=configs/demo.yaml"]) as folder:
            uris.append(get_uri_for_directory(str(folder), include_gitignore=True))
    assert uris[0] == uris[1]


@pytest.mark.parametrize("words", [["--config", "mine/own.yaml"], ["--config=mine/own.yaml"]])
def test_a_users_config_is_uploaded_to_its_relative_path(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
) -> None:
    """Wrong: the cluster does not find the config that the command names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.yaml").write_text("name: own\n")
    (tmp_path / "mine" / "secret.txt").write_text("x")
    with staged(["pipeline", *words]) as folder:
        assert (folder / "mine" / "own.yaml").read_text() == "name: own\n"
        assert not (folder / "mine" / "secret.txt").exists()


@pytest.mark.parametrize("config", ["demo", "demo.yaml", "configs/demo.yaml", "/mnt/exfm/own.yaml"])
def test_ready_configs_and_configs_of_the_cluster_need_no_upload(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: str,
) -> None:
    """Wrong: a config that the cluster has is refused as missing."""
    monkeypatch.chdir(tmp_path)
    with staged(["pipeline", "--config", config]) as folder:
        assert {path.name for path in folder.iterdir()} == set(PACKAGES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("none.yaml", "no such config file here"),
        ("../own.yaml", "only a file below the working folder"),
    ],
)
def test_configs_that_cannot_be_uploaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: str,
    message: str,
) -> None:
    """Wrong: only the cluster finds that a config is missing or lies outside the working folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message), staged(["pipeline", "--config", config]):
        pass


def test_a_command_without_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a command that names no config cannot be submitted."""
    monkeypatch.chdir(tmp_path)
    with staged(["export", "runs/demo"]) as folder:
        assert (folder / "exfm_ray").is_dir()
