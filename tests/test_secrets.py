"""Keys and tokens stay out of what a run leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import run, small_config

from exfm_ray.commands import main
from exfm_ray.config import dump_config

WANDB_KEY = "0123456789abcdef0123456789abcdef01234567"
RAY_TOKEN = "feedfacefeedfacefeedfacefeedface"


def test_no_file_of_a_run_holds_a_secret(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: wandb's key or Ray's token reaches a log, the config, wandb's files or the report."""
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    monkeypatch.setenv("RAY_AUTH_TOKEN", RAY_TOKEN)
    config = small_config(tmp_path, "secrets", wandb={"mode": "offline"}, data={"embedded": {"windows": 2, "events_per_window": 200}})
    run(config, das=False, vm=False)
    assert main(["report", str(config.folder)]) == 0
    assert WANDB_KEY not in dump_config(config)
    files = [path for path in config.folder.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files) and config.folder / "report.html" in files
    for path in files:
        data = path.read_bytes()
        assert WANDB_KEY.encode() not in data and RAY_TOKEN.encode() not in data, path
