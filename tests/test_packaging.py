"""The wheel: what it holds, and that it runs where no checkout is."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = [
    "--set=data.synthetic={windows: 3, events_per_window: 600, users: 150, ads: 80}",
    "--set=data.fragment_rows=300",
    "--set=vm.arms=[labels, ah]",
    "--set=wandb.mode=disabled",
]
pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the files that git knows."""
    source = tmp_path_factory.mktemp("source")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.split("\0"):
        path = ROOT / name
        if not name or not path.exists() or name.startswith("tests/"):
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(path.readlink())
        else:
            target.write_bytes(path.read_bytes())
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


def test_what_the_wheel_holds(wheel: Path) -> None:
    """Wrong: ready configs, the report's template, types or the licence are missing after
    `pip install`."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "exfm_ray/py.typed",
        "exfm_ray/configs/demo.yaml",
        "exfm_ray/configs/wukong/2gf.yaml",
        "exfm_ray/tracking/report.html.j2",
        "exfm_ray/models/wukong.py",
        "tuning/sweep.py",
        "cluster/jobs.py",
    ):
        assert name in names, name
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "configs/")) for name in names)


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs Python with the wheel's files, in an empty folder: what it prints."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = str(site)
    work = tmp_path / "work"
    work.mkdir()

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_commands_run_from_the_wheel(installed: Callable[..., str], tmp_path: Path) -> None:
    """Wrong: an installed package needs files of the checkout, such as its configs."""
    found = installed("-c", "import exfm_ray; print(exfm_ray.__file__)")
    assert found.startswith(str(tmp_path / "site"))
    assert "examples" in installed("-m", "exfm_ray", "plan", "--config", "demo")


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(installed: Callable[..., str], tmp_path: Path) -> None:
    """Wrong: an installed package needs files of the checkout once processes start."""
    installed("-m", "exfm_ray", "pipeline", "--config", "demo", *TINY)
    assert (tmp_path / "work" / "runs" / "demo" / "report.html").exists()
