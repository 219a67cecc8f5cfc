"""Where relative folders lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import SETTINGS

from exfm_ray.config.root import Config
from exfm_ray.errors import UserError
from exfm_ray.storage.paths import absolute, home_dir, store_root_of_run, uses_home_dir
from exfm_ray.storage.remote import RemotePath


@pytest.fixture
def upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a Ray job."""
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("EXFM_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


def test_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a run on this machine writes somewhere else than where it was started."""
    monkeypatch.delenv("EXFM_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert not uses_home_dir()
    assert (
        absolute("runs") == tmp_path / "runs"
        and absolute(Path("/data")) == Path("/data")
        and absolute(Path()) == tmp_path
    )


def test_a_job_writes_nothing_into_its_uploaded_code(
    tmp_path: Path,
    upload: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a run is lost with the job, or cannot be resumed after a change of the code, which
    makes another upload."""
    assert uses_home_dir() and home_dir() == tmp_path / "home" / "exfm-ray"
    monkeypatch.setenv("EXFM_HOME", str(tmp_path / "shared"))
    config = Config.model_validate(SETTINGS | {"run": {}})
    assert (
        config.run.dir == tmp_path / "shared" / "runs" and config.data.root == tmp_path / "shared"
    )
    other = upload.with_name("_ray_pkg_4567")
    other.mkdir()
    monkeypatch.chdir(other)
    assert Config.model_validate(SETTINGS | {"run": {}}) == config


def test_exfm_home_counts_outside_of_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a command in an image, whose working folder is lost with the container, writes its run
    there."""
    monkeypatch.setenv("EXFM_HOME", str(tmp_path))
    assert uses_home_dir() and absolute("runs") == tmp_path / "runs"


def test_stores_of_an_existing_run(tmp_path: Path) -> None:
    """Wrong: the stores of another run are read from the wrong place, or a config.yaml that no
    command of ours wrote can name any place."""
    assert store_root_of_run(tmp_path) == tmp_path
    file = tmp_path / "config.yaml"
    file.write_text("name: a\nrun: {storage: null}\n")
    assert store_root_of_run(tmp_path) == tmp_path
    file.write_text("name: a\nrun: {storage: 's3://bucket/runs'}\n---\n# python\n")
    assert store_root_of_run(tmp_path) == RemotePath("s3://bucket/runs") / "a"
    for text in (
        "name: ../b\nrun: {storage: 's3://bucket/runs'}",
        "name: a\nrun: {storage: 's3://me:secret@bucket'}",
        "name: 3\nrun: {storage: []}",
    ):
        file.write_text(text)
        with pytest.raises(
            UserError, match="config.yaml: settings 'name' and 'run.storage' lead to no store"
        ) as caught:
            store_root_of_run(tmp_path)
        assert "secret" not in str(caught.value)
