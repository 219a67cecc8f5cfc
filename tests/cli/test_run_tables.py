"""The tables of `run.py report`, `runs` and `compare`."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from run_folders import write_run

from exfm_ray.cli.main import main
from exfm_ray.tracking.run_files import RunFiles


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command and return its output without the frames of tables."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return re.sub(r"[─━┃│┏┓┗┛└┘├┤┬┴┼╇╈┡┩┳]+", " ", capsys.readouterr().out)


def line(text: str, *words: str) -> list[str]:
    """Return the words of the only line that begins with `words`."""
    lines = [row.split() for row in text.splitlines()]
    matches = [row for row in lines if row[: len(words)] == list(words)]
    assert len(matches) == 1, (words, text)
    return matches[0]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Wrong: a run is missing, a damaged one hides the others, or a state, number or arm belongs to
    another run."""
    whole, _ = write_run(tmp_path, "whole")
    write_run(tmp_path, "killed", windows=2, roles=("fm",))
    damaged, _ = write_run(tmp_path, "damaged")
    (damaged.folder / "config.yaml").write_text("a: [")
    (tmp_path / "no_run").mkdir()
    text = printed(capsys, "runs", tmp_path)
    assert "3 run(s)" in text and "no_run" not in text
    figures = RunFiles.open(whole.folder).figures
    click = next(
        row
        for row in figures
        if (row["model"], row["domain"], row["task"]) == ("fm", "all", "click")
    )
    best = max(
        (row for row in figures if row["model"] == "stories"), key=lambda row: row["ne_gain"]
    )
    assert line(text, "whole")[1:2] == ["done"] and "4 of 4 windows" in text
    assert line(text, "whole")[-6:-3] == ["click", f"{click['ne']:.4f}", "feed"]
    assert best[
        "arm"
    ] != "labels" and f"stories conversion: {best['arm']} {100 * best['ne_gain']:+.2f}" in re.sub(
        " +", " ", text
    )
    assert line(text, "killed")[1] == "unfinished" and "fm 2 of 4" in text and "feed 0 of 4" in text
    assert line(text, "damaged")[1] == "damaged"
    assert time.strftime("%Y-%m-%d") in text


def test_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Wrong: A and B are swapped, a difference has the wrong sign, or the wrong settings are
    listed."""
    first, _ = write_run(tmp_path, "one")
    second, _ = write_run(
        tmp_path,
        "two",
        windows=3,
        distillation={"ah": {"beta": 2.0}},
        vm={"arms": ["labels", "kd"]},
    )
    text = printed(capsys, "compare", first.folder, second.folder)
    a, b = (
        next(
            row
            for row in RunFiles.open(config.folder).figures
            if (row["model"], row["arm"]) == ("feed", "kd")
        )
        for config in (first, second)
    )
    cells = line(text, "feed", "kd", "feed", "click")[4:]
    assert a["ne"] != b["ne"]
    assert cells[:3] == [
        f"{a['ne']:.4f}",
        f"{b['ne']:.4f}",
        f"{100 * (b['ne'] / a['ne'] - 1):+.2f}",
    ]
    assert cells[3:5] == [f"{100 * a['ne_gain']:+.2f}", f"{100 * b['ne_gain']:+.2f}"]
    assert line(text, "distillation.ah.beta") == ["distillation.ah.beta", "4.0", "2.0"]
    assert line(text, "vm.arms")[1:] == [
        "['labels',",
        "'kd',",
        "'ah',",
        "'ah_sa']",
        "['labels',",
        "'kd']",
    ]
    rows = text.split("settings that differ")[1].splitlines()
    listed = [row.split()[0] for row in rows if row.strip()]
    assert sorted(listed) == [
        "distillation.ah.beta",
        "setting",
        "vm.arms",
    ]  # neither the name nor the folder


def test_report_writes_the_page_and_prints_its_path(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Wrong: the page is not rewritten, or its path and the metrics are not printed."""
    config, _ = write_run(tmp_path, "r")
    page = config.folder / "report.html"
    page.write_text("old")
    text = printed(capsys, "report", config.folder)
    assert text.splitlines()[-1] == str(page) and "plotly" in page.read_text()
    row = next(
        row
        for row in RunFiles.open(config.folder).figures
        if (row["model"], row["arm"]) == ("stories", "ah")
    )
    assert f"{row['ne']:.4f}" in line(text, "stories", "conversion", "stories", "ah")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "RUNS/none"], "none: no such folder"),
        (["report", "RUNS"], "no run here: it has no config.yaml"),
        (["report"], "the following arguments are required: RUN"),
        (["runs", "RUNS/r"], "no runs here"),
        (["runs", "RUNS/none"], "none: no such folder"),
        (["compare", "RUNS/r", "RUNS/r"], "compare needs two different runs"),
        (["compare", "RUNS/r", "RUNS"], "no run here"),
        (["compare", "RUNS/r"], "the following arguments are required: B"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    """Wrong: a folder without a run ends in a traceback, gets a page, or the exit code is 0."""
    write_run(tmp_path, "r")
    before = set(tmp_path.rglob("*"))
    assert main([argument.replace("RUNS", str(tmp_path)) for argument in arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and message in error and error.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before
