"""The command line: exit codes, and mistakes told in one line that leave everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refused
from role_locks import role_holder
from small_runs import SETTINGS, merged

from exfm_ray.cli.inspect import export
from exfm_ray.cli.main import COMMANDS, main
from exfm_ray.config.load import load_config
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.run_dir import initialize_run_dir
from exfm_ray.storage.atomic import write_json
from exfm_ray.storage.locks import acquire_role_lock


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(merged(SETTINGS, {"run": {"dir": str(tmp_path / "runs")}})))
    return path


MODEL = "vm.models=[{name: a, domain: %s, task: %s}]"
FRESH: dict[str, tuple[list[str], str]] = {
    "unknown setting": (
        ["fm.batchsize=3"],
        "unknown setting 'fm.batchsize'. Did you mean 'batch_size'?",
    ),
    "wrong type": (["fm.workers=two"], "setting 'fm.workers'"),
    "FM's task": (["fm.tasks=[clik]"], "setting 'fm.tasks': unknown task 'clik'"),
    "VM's task": (
        [MODEL % ("feed", "clik")],
        ".models.0.task': unknown task 'clik': the stream has click, conversion. Did you mean 'click'?",
    ),
    "one of VM's tasks": (
        [MODEL % ("feed", "[click, conversio]")],
        "setting 'vm.models.0.task': unknown task 'conversio'",
    ),
    "VM's domain": (
        [MODEL % ("fed", "click")],
        "setting 'vm.models.0.domain': unknown domain 'fed'",
    ),
    "no teacher": (
        ["fm.tasks=[conversion]", MODEL % ("feed", "click")],
        "setting 'vm.models.0.task': 'click' is none of fm.tasks",
    ),
    "no teacher for one": (
        ["fm.tasks=[click]", MODEL % ("feed", "[click, conversion]")],
        "vm.models.0.task': 'conversion' is none of fm.tasks",
    ),
    "sizes": (["fm.model.k=99"], "setting 'fm.model'"),
    "VM's sizes": (["vm.model={type: wukong, k: 99}"], "setting 'vm.model'"),
    "no rows": (
        ["fm.model={type: wukong, n_F: 0, n_L: 0}"],
        "setting 'fm.model.wukong': n_F + n_L is 0",
    ),
    "dim": (
        ["vm.model.dim=10"],
        "setting 'vm.model.dim' is 10: fbgemm's tables take multiples of 4; set it to 12",
    ),
    "heads": (
        ["vm.model={type: finalmlp, heads: 7}"],
        "heads is 7, which does not divide 32, the last width of mlp_1",
    ),
    "table": (
        ["fm.model.embeddings={usr: 2}"],
        "setting 'fm.model': embeddings: no table is named 'usr'. Did you mean 'user",
    ),
    "compile": (
        ["fm.compile=true", "fm.zero_stage=3"],
        "setting 'fm': compile is set with zero_stage 3",
    ),
    "static": (
        ["fm.static={passes: 3}"],
        "fm.static is set: in a set without time no teacher is ignorant of its answers",
    ),
    "no data": (["data.source=frappe", "data.root=/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("name", FRESH)
def test_a_mistake_in_a_setting(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: Path,
    name: str,
) -> None:
    """Wrong: a mistake is told after minutes, by a traceback, in many lines, or after something was
    written."""
    settings, told = FRESH[name]
    assert told in refused(
        capsys,
        tmp_path,
        "pipeline",
        "--config",
        file,
        *(f"--set={setting}" for setting in settings),
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pipelin", "--config", "FILE"], "unknown command 'pipelin': there are prepare, pipeline"),
        (["pipeline"], "the following arguments are required: --config; see run.py --help"),
        ([], "required"),
        (["pipeline", "--config", "FILE", "--what"], "unrecognized arguments: --what"),
        (["pipeline", "--config", "none.yaml"], "none.yaml: no such config file"),
        (["pipeline", "--config", "FILE", "--name", "a/b"], "setting 'name'"),
    ],
)
def test_a_mistake_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: Path,
    arguments: list[str],
    told: str,
) -> None:
    """Wrong: argparse exits by itself, with a usage text or another code."""
    assert told in refused(
        capsys, tmp_path, *(str(file) if word == "FILE" else word for word in arguments)
    )


def test_yaml_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Wrong: the YAML reader's picture of the mistake is told over many lines."""
    (tmp_path / "bad.yaml").write_text("fm:\n  batch_size: [1\nvm: 2\n")
    assert "bad.yaml: not valid YAML" in refused(
        capsys, tmp_path, "pipeline", "--config", tmp_path / "bad.yaml"
    )


BROKEN: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "other settings": (
        lambda folder: None,
        ["pipeline", "--set=fm.batch_size=32"],
        "this folder holds a run with other settings",
    ),
    "other stream": (
        lambda folder: None,
        ["pipeline", "--set=data.synthetic.seed=7"],
        "other settings",
    ),
    "damaged settings": (
        lambda folder: (folder / "stream/settings.json").write_text("{"),
        ["pipeline"],
        "settings.json: not valid JSON",
    ),
    "DAS without FM": (
        lambda folder: None,
        ["das"],
        "version=001, which is not there; run train-fm first",
    ),
    "VM without DAS": (
        lambda folder: None,
        ["train-vm"],
        "no supervision of window 1 by 'fm'; run das first",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_folder_that_does_not_fit(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: Path,
    name: str,
) -> None:
    """Wrong: a run is mixed with another one's, or a role waits for ever for what nobody makes."""
    config = load_config(file)
    prepare_stream(config)
    initialize_run_dir(config)
    acquire_role_lock(config.folder, ["fm", "das", "vm"])
    spoil, arguments, told = BROKEN[name]
    spoil(config.folder)
    assert told in refused(capsys, tmp_path, *arguments, "--config", file)


def test_a_run_that_another_process_drives(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: Path,
) -> None:
    """Wrong: a command that is given twice writes every row and checkpoint twice."""
    assert main(["prepare", "--config", str(file)]) == 0
    folder = load_config(file).folder
    with role_holder(folder, "vm") as other:
        for command in ("pipeline", "train-vm"):
            assert main([command, "--config", str(file)]) == 2
            assert f"error: {folder}: process {other.pid} on" in capsys.readouterr().err
        assert main(["das", "--config", str(file)]) == 2
        assert "run train-fm first" in capsys.readouterr().err


def test_prepare_tells_what_it_made(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: Path,
) -> None:
    """Wrong: prepare fails, prints nothing of use, or prepares again what is there."""
    assert main(["prepare", "--config", str(file), "--name", "p"]) == 0
    assert "4 windows, 3,600 events, 0 duplicates" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in (tmp_path / "runs/p/stream").rglob("*.parquet")}
    assert main(["prepare", "--config", str(file), "--name", "p"]) == 0
    assert {
        path: path.read_bytes() for path in (tmp_path / "runs/p/stream").rglob("*.parquet")
    } == before


def test_prepare_tells_what_shares_rows(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: Path,
) -> None:
    """Wrong: a table that is far too small for its ids goes unnoticed, or roomy ones and index
    tables fill the screen."""
    lines = [f"{i},user{i % 60},{i % 8},{i % 3},{i % 2}\n" for i in range(600)]
    (tmp_path / "log.csv").write_text("at,user,ad,hour,click\n" + "".join(lines))
    features: list[dict[str, Any]] = [
        {"name": "user", "rows": 999},
        {"name": "ad", "rows": 99_999},
        {"name": "hour", "rows": 9, "encoding": "index"},
    ]
    spec = {
        "format": "csv",
        "files": "log.csv",
        "event_time": {"column": "at"},
        "schema": {"features": features, "tasks": ["click"]},
    }
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(spec))
    settings = [
        "data.source=table",
        f"data.root={tmp_path}",
        f"data.schema_file={tmp_path / 'schema.yaml'}",
        "vm.models=[]",
    ]
    settings.append("data.table_rows={user: 3}")
    assert (
        main(
            [
                "prepare",
                "--config",
                str(file),
                "--name",
                "shared",
                *(f"--set={setting}" for setting in settings),
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  table user: 100.0% of the values share their row with another id; 2 of 2 rows used"
    ]


def test_an_interrupt_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str],
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: Ctrl-C ends in a traceback or with exit code 0."""

    def interrupted(config: object) -> None:
        """Stop."""
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "prepare", interrupted)
    assert main(["prepare", "--config", str(file)]) == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a bug is told as if it were the user's mistake."""

    def faulty(config: object) -> None:
        """Fail."""
        raise ZeroDivisionError

    monkeypatch.setitem(COMMANDS, "prepare", faulty)
    with pytest.raises(ZeroDivisionError):
        main(["prepare", "--config", str(file)])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong: a command has no line in the help."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(
        f"  {name}" in out and (command.__doc__ or "?")[:20] in out
        for name, command in [*COMMANDS.items(), ("export", export)]
    )


def test_show_without_windows_after_the_warm_up(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: Path,
) -> None:
    """Wrong: a run shorter than its warm-up ends in an error at the last moment."""
    from exfm_ray.cli.train import show
    from exfm_ray.config.load import load_config

    config = load_config(file)
    role = {"seconds": 1.0, "examples": 1000}
    write_json(
        config.folder / "summary.json",
        {"windows": [], "figures": [], "roles": {"fm": role}, "peak_memory_bytes": 2**30},
    )
    show(config)
    assert "fm 1,000 examples in 1 s; peak memory 1.0 GiB" in capsys.readouterr().out
