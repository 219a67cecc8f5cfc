"""What goes up with a job."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import get_uri_for_directory

from cluster.upload import REPOSITORY, staged
from exfm_ray.errors import UserError


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_code_and_configs_go_up_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a module is missing on the cluster, or data, runs, tests, the git history or the
    environment are sent."""
    monkeypatch.chdir(REPOSITORY)
    with staged(["pipeline", "--config", "configs/demo.yaml"]) as folder:
        found = files(folder)
    expected = {"run.py", "pyproject.toml"}
    for part in ("exfm_ray", "tuning", "configs"):
        expected |= {
            str(path.relative_to(REPOSITORY))
            for path in (REPOSITORY / part).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
    assert found == expected
    assert not folder.exists()


def test_compiled_code_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: what python leaves beside the code makes each upload another."""
    monkeypatch.setattr("cluster.upload.REPOSITORY", tmp_path)
    for name in ("exfm_ray/engine/a.py", "exfm_ray/engine/__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with staged(["pipeline"]) as folder:
        assert files(folder) == {"exfm_ray/engine/a.py"}


def test_the_same_code_is_uploaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: each submission makes a package of its own, which the cluster keeps."""
    monkeypatch.chdir(REPOSITORY)
    uris = []
    for _ in range(2):
        with staged(["report", "--config=configs/demo.yaml"]) as folder:
            uris.append(get_uri_for_directory(str(folder), include_gitignore=True))
    assert uris[0] == uris[1]


@pytest.mark.parametrize("words", [["--config", "mine/own.yaml"], ["--config=mine/own.yaml"]])
def test_a_config_of_ones_own_goes_up_at_its_place(
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


def test_configs_that_cannot_go_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a config that is not there, or lies outside, is found missing only by the cluster; or
    the cluster's own is refused."""
    monkeypatch.chdir(tmp_path)
    for config, told in (
        ("none.yaml", "no such config file here"),
        ("../own.yaml", "only a file below the working folder"),
    ):
        with pytest.raises(UserError, match=told), staged(["pipeline", "--config", config]):
            pass
    with staged(["pipeline", "--config", "/mnt/exfm/own.yaml"]), staged(["export", "runs/demo"]):
        pass
