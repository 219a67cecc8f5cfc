"""The command line: help, exit codes, and mistakes that end in one line and change no file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refused
from role_locks import role_holder
from small_runs import SETTINGS, merged

import exfm_ray
from exfm_ray.cli.main import console, main
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


COMMANDS = [
    "prepare",
    "pipeline",
    "train-fm",
    "train-vm",
    "tune",
    "das",
    "plan",
    "report",
    "runs",
    "compare",
    "export",
    "dashboard",
    "submit",
]
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
        ".models.0.task': unknown task 'clik': the stream has click, conversion. "
        "Did you mean 'click'?",
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
        "fm.static is set: in a set without time, every teacher has already seen the labels",
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
    """Wrong: a mistake is reported after minutes, as a traceback, in many lines, or after a file
    was written."""
    settings, message = FRESH[name]
    assert message in refused(
        capsys,
        tmp_path,
        "pipeline",
        "--config",
        file,
        *(f"--set={setting}" for setting in settings),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pipelin", "--config", "FILE"], "unknown command 'pipelin': there are prepare, pipeline"),
        (["pipelin"], "submit. Did you mean 'pipeline'?"),
        (["pipeline"], "arguments are required: --config; see run.py pipeline --help"),
        (["das"], "arguments are required: --config; see run.py das --help"),
        (["--config", "FILE", "pipeline"], "'--config': the command comes first, as in `run.py pi"),
        (["submit", "--", "pipelin"], "unknown command 'pipelin': there are prepare, pipeline"),
        (["submit", "--", "submit"], "submit cannot submit itself; name another command after --"),
        (["submit"], "submit takes a command of run.py after --, or --stop NAME"),
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
    message: str,
) -> None:
    """Wrong: argparse exits by itself, with a usage text or another code."""
    assert message in refused(
        capsys, tmp_path, *(str(file) if word == "FILE" else word for word in arguments)
    )


def test_yaml_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Wrong: the YAML reader's drawing of the mistake takes many lines."""
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
def test_a_run_folder_with_other_content(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: Path,
    name: str,
) -> None:
    """Wrong: two runs are mixed, or a role waits forever for files that no role writes."""
    config = load_config(file)
    prepare_stream(config)
    initialize_run_dir(config)
    acquire_role_lock(config.folder, ["fm", "das", "vm"])
    spoil, arguments, message = BROKEN[name]
    spoil(config.folder)
    assert message in refused(capsys, tmp_path, *arguments, "--config", file)


def test_a_run_of_another_process(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: Path,
) -> None:
    """Wrong: two processes run the same role and write every row and checkpoint twice."""
    assert main(["prepare", "--config", str(file)]) == 0
    folder = load_config(file).folder
    with role_holder(folder, "vm") as other:
        for command in ("pipeline", "train-vm"):
            assert main([command, "--config", str(file)]) == 2
            assert f"error: {folder}: process {other.pid} on" in capsys.readouterr().err
        assert main(["das", "--config", str(file)]) == 2
        assert "run train-fm first" in capsys.readouterr().err


def test_prepare_prints_the_size_of_the_stream(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: Path,
) -> None:
    """Wrong: prepare fails, prints nothing useful, or prepares an existing stream again."""
    assert main(["prepare", "--config", str(file), "--name", "p"]) == 0
    assert "4 windows, 3,600 events, 0 duplicates" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in (tmp_path / "runs/p/stream").rglob("*.parquet")}
    assert main(["prepare", "--config", str(file), "--name", "p"]) == 0
    assert {
        path: path.read_bytes() for path in (tmp_path / "runs/p/stream").rglob("*.parquet")
    } == before


def test_prepare_prints_collisions(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: Path,
) -> None:
    """Wrong: a table that is far too small for its ids goes unnoticed, or large ones and index
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


def test_an_interrupt_says_how_to_resume(
    capsys: pytest.CaptureFixture[str],
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: Ctrl-C ends in a traceback or with exit code 0."""

    def interrupted(config: object) -> None:
        """Stop."""
        raise KeyboardInterrupt

    monkeypatch.setattr("exfm_ray.cli.train.prepare", interrupted)
    assert main(["prepare", "--config", str(file)]) == 130
    assert "interrupted; rerun the same command to resume" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a bug looks like the user's mistake."""

    def faulty(config: object) -> None:
        """Fail."""
        raise ZeroDivisionError

    monkeypatch.setattr("exfm_ray.cli.train.prepare", faulty)
    with pytest.raises(ZeroDivisionError):
        main(["prepare", "--config", str(file)])


def shown_help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the help of a command on one line."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong: a command is missing from the help, or has none of its own."""
    text = shown_help(capsys)
    for command in COMMANDS:
        assert f" {command} " in text
        command_help = shown_help(capsys, command)
        assert command_help.startswith(f"usage: run.py {command} ")


@pytest.mark.parametrize("words", ["prepare", "pipeline", "das", "das start", "das status", "plan"])
def test_help_of_a_command_shows_its_options(
    capsys: pytest.CaptureFixture[str], words: str
) -> None:
    """Wrong: a command's help is that of the program, or misses the options of its config."""
    text = shown_help(capsys, *words.split())
    for option in ("--config FILE", "--set section.key=value", "--name NAME"):
        assert option in text
    assert ("--follow" in text) == (words == "das start")


def test_help_imports_nothing_heavy() -> None:
    """Wrong: the help takes seconds, because it imports torch and ray."""
    program = (
        "import sys\nfrom exfm_ray.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'pyarrow', 'pydantic', 'rich') if m in sys.modules])"
    )
    for words in (["--help"], ["pipeline", "--help"], ["das", "start", "--help"], ["pipelin"]):
        command = [sys.executable, "-c", program, *words]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert out.splitlines()[-1] == "[]", words


def test_the_package_is_cheap_to_import_and_has_public_names() -> None:
    """Wrong: `import exfm_ray` takes seconds, or a public name cannot be imported."""
    heavy = "('torch', 'ray', 'pyarrow', 'pydantic', 'numpy')"
    program = f"import sys, exfm_ray; assert not [m for m in {heavy} if m in sys.modules]"
    subprocess.run([sys.executable, "-c", program], check=True)

    for name in exfm_ray.__all__:
        assert getattr(exfm_ray, name).__name__ == name
    assert set(exfm_ray.__all__) <= set(dir(exfm_ray))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        exfm_ray.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (["run.py"], "run.py"),
        (["-m", "exfm_ray"], "python -m exfm_ray"),
    ],
)
def test_the_name_of_the_program(program: list[str], name: str) -> None:
    """Wrong: the help names a program that the user has not started."""
    folder = Path(__file__).parents[2]
    for words, shown in (("--help", name), ("plan --help", f"{name} plan")):
        command = [sys.executable, *program, *words.split()]
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
        assert out.startswith(f"usage: {shown} ")


def test_the_console_script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the installed program has no exit code, or another name in its messages."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/exfm-ray", "plan"])
    assert console() == 2
    assert "see exfm-ray plan --help" in capsys.readouterr().err


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
