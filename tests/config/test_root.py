"""The config tree: files, overrides, ready configs, and error messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from exfm_ray.config.arms import Objective
from exfm_ray.config.load import dump_config, load_config
from exfm_ray.config.models import WukongConfig
from exfm_ray.config.root import Config
from exfm_ray.errors import UserError, nearest

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

MISTAKES = {
    "fm.batch_sise=3": r"unknown setting 'fm.batch_sise'. Did you mean 'batch_size'\?",
    "fmm.batch_size=3": r"unknown setting 'fmm'. Did you mean 'fm'\?",
    "zzz=1": r"unknown setting 'zzz'. Known here: name, seed, run, data, fm",
    "fm.batch_size=many": r"setting 'fm.batch_size': .*integer.*\(given: 'many'\)",
    "fm.batch_size=0": r"setting 'fm.batch_size': .*greater than or equal to 1 \(given: 0\)",
    "fm.batch_size=1.5": r"setting 'fm.batch_size': .*integer.*given: 1.5",
    "fm.workers=null": r"setting 'fm.workers': .*integer",
    "fm.zero_stage=4": r"setting 'fm.zero_stage': .*less than or equal to 3",
    "fm.optimizer.dense_lr=0": r"setting 'fm.optimizer.dense_lr': .*greater than 0",
    "fm.model.type=transformer": r"setting 'fm.model': .*'wukong', 'mlp', 'dlrm', 'dcnv2'",
    "fm.model={n_F: 3}": r"setting 'fm.model': give it a 'type': wukong, mlp, dlrm, dcnv2, deepfm",
    "fm.model={type: wukong, n_f: 3}": (
        r"unknown setting 'fm.model.wukong.n_f'. Did you mean 'n_F'\?"
    ),
    "fm.model={type: wukong, mlp: [8, 0]}": (
        r"setting 'fm.model.wukong.mlp.1': .*greater than or equal to 1"
    ),
    "vm.arms=[labels,kdd]": (
        r"setting 'vm.arms.1': 'kdd': unknown objective 'kdd'; an arm is one of labels, kd, ah, "
        r"ah_sa, .*Did you mean 'kd'"
    ),
    "vm.arms=[labels,kd+shares]": (
        r"setting 'vm.arms.1': 'kd\+shares': unknown option 'shares'.*Did you mean 'share'"
    ),
    "vm.arms=[kd,kd]": r"setting 'vm': an arm is named twice",
    "vm.arms=[]": r"setting 'vm.arms': .*at least 1",
    "vm.models=[{name: a}]": (
        r"setting 'vm.models.0.domain': Field required; setting 'vm.models.0.task': Field required"
    ),
    "vm.models=[{name: a, domain: d, task: t, taks: u}]": (
        r"unknown setting 'vm.models.0.taks'. Did you mean 'task'\?"
    ),
    "vm.models=[{name: a, domain: d, task: t}, {name: a, domain: d, task: t}]": (
        r"setting 'vm': two vertical models are named 'a'"
    ),
    "vm.models=[{name: a, domain: d, task: []}]": (
        r"setting 'vm.models.0.task': names no task; set one, or a list of them$"
    ),
    "vm.models=[{name: a, domain: d, task: [t, u, t]}]": (
        r"setting 'vm.models.0.task': names task 't' twice$"
    ),
    "vm.models=[{name: a, domain: d, task: [t, 3]}]": (
        r"setting 'vm.models.0.task.1': .*string \(given: 3\)$"
    ),
    "vm.models=[{name: a, domain: d, task: 3}]": r"setting 'vm.models.0.task': .*\(given: 3\)$",
    "placement={fm: {-x: a}}": (
        r"setting 'placement.fm.-x.\[key\]': '-x' is not a valid label name: letters"
    ),
    "placement={fm: {exfm-group: a b}}": (
        r"setting 'placement.fm.exfm-group': not a valid label value: .* \(given: 'a b'\)"
    ),
    "placement={fm: {exfm-group: 1}}": (
        r"setting 'placement.fm.exfm-group': .*string \(given: 1\)"
    ),
    "placement={fmm: {a: b}}": r"unknown setting 'placement.fmm'. Did you mean 'fm'\?",
    "das.fm_lag=0": r"setting 'das.fm_lag': .*greater than or equal to 1",
    "das.min_actors=3": r"setting 'das': das.max_actors is 1, below das.min_actors = 3",
    "fm.evict_after_windows=0": (
        r"setting 'fm.evict_after_windows': .*greater than or equal to 1 \(given: 0\)"
    ),
    "data.table_rows.user=1": (
        r"setting 'data.table_rows.user': .*greater than or equal to 2 \(given: 1\)"
    ),
    "data.source=kuairan": r"setting 'data.source': .*'kuairand'.*\(given: 'kuairan'\)",
    "distillation.ah.alpha=0": r"setting 'distillation.ah.alpha': .*greater than 0",
    "name=../elsewhere": r"setting 'name': .*pattern",
    "seed=-1": r"setting 'seed': .*greater than or equal to 0",
    "seed": "--set seed: write it as section.key=value",
    "=3": "--set =3: write it as section.key=value",
    "seed.x=3": "--set seed.x=3: 'seed' is a value, not a section",
    "fm.tasks=[a": r"--set fm.tasks=\[a: '\[a' is not a YAML value",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 5\nfm: {batch_size: 32}\n")
    return path


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_name_the_setting(file: Path, override: str) -> None:
    """Wrong: a misspelled or impossible setting is accepted, or the error has no name, no value or
    no suggestion."""
    with pytest.raises(UserError, match=MISTAKES[override]):
        load_config(file, [override])


def test_all_mistakes_are_reported_at_once(file: Path) -> None:
    """Wrong: a user has to correct one setting after the other."""
    with pytest.raises(UserError, match=r"fm.workers.*das.fm_lag"):
        load_config(file, ["fm.workers=0", "das.fm_lag=0"])


def test_overrides_come_after_the_file_and_the_name_last(file: Path) -> None:
    """Wrong: an override is ignored, or removes the rest of its section."""
    assert load_config(file).name == "mine"
    config = load_config(
        file,
        [
            "fm.workers=2",
            "fm.model.type=wukong",
            "fm.model.l=3",
            "name=other",
            "vm.arms=[kd]",
            "data.max_rows=null",
        ],
        "third",
    )
    assert (config.name, config.seed, config.fm.batch_size, config.fm.workers) == (
        "third",
        5,
        32,
        2,
    )
    assert (
        isinstance(config.fm.model, WukongConfig)
        and config.fm.model.l == 3
        and config.vm.arms == (Objective.KD,)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: [1", "not valid YAML"),
        (b"- 1\n", "a config is a mapping of sections, this is a list"),
        (b"7", "this is a int"),
        (b"\xff\xfe\x00", "cannot be read as a config"),
        (b"a: \x00", "not valid YAML"),
    ],
)
def test_files_that_are_not_configs(
    tmp_path: Path,
    content: bytes,
    message: str,
) -> None:
    """Wrong: a file that is not a config ends in a traceback."""
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(path)
    for missing, problem in (
        (tmp_path / "none.yaml", "no such config file"),
        (tmp_path, "cannot be read as a config"),
    ):
        with pytest.raises(UserError, match=problem):
            load_config(missing)


def test_ready_configs_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a ready config is not found outside the repository, hides a user's own file, or
    another file of the package is read as a config."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo.yaml", "configs/demo.yaml"):
        config = load_config(Path(name))
        assert (config.name, len(config.vm.models)) == ("demo", 3)
        assert load_config(Path(name), name="other").name == "other"

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("seed: 7")
    assert (load_config(Path("configs/demo.yaml")).seed, load_config(Path("demo")).seed) == (7, 0)
    for missing in ("../configs/demo.yaml", "/demo", "dem", "."):
        with pytest.raises(UserError, match="no such config file|cannot be read as a config"):
            load_config(Path(missing))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_configs_load_and_survive_a_dump(path: Path) -> None:
    """Wrong: a ready config does not load, or the run's config.yaml is another config."""
    config = load_config(path)
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config


def test_a_vertical_model_has_one_task_or_several(file: Path) -> None:
    """Wrong: a name is read as a list of letters, a list loses its order, or a run's config.yaml
    does not load again."""
    config = load_config(
        file, ["vm.models=[{name: a, domain: d, task: t}, {name: b, domain: d, task: [u, t]}]"]
    )
    assert [student.tasks for student in config.vm.models] == [("t",), ("u", "t")]
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config


def test_folders_are_absolute(file: Path) -> None:
    """Wrong: a run's workers look for the run in their own working folder."""
    config = load_config(file)
    assert (
        config.run.dir.is_absolute()
        and config.data.root.is_absolute()
        and config.folder == config.run.dir / "mine"
    )


def test_nearest() -> None:
    """Wrong: there is a suggestion without a similar name, or none with one."""
    assert nearest("wokers", ["workers", "seed"]) == " Did you mean 'workers'?"
    assert nearest("xyz", ["workers", "seed"]) == ""
