"""Models that are not built in: how a config names them, and what it says of mistakes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from example import SCHEMA, make_rows
from torch import Tensor

from exfm_ray.config.load import dump_config, load_config
from exfm_ray.config.models import MLPConfig
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import FMConfig
from exfm_ray.data.batch import to_batch
from exfm_ray.errors import UserError
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.layout import Inputs
from exfm_ray.models.network import build_network
from exfm_ray.models.registry import build_backbone, register_model
from exfm_ray.models.serialization import (
    MANIFEST,
    LocalModel,
    commit_model,
    load_model,
    write_tables,
)
from exfm_ray.storage.atomic import read_json, write_json

MODULE = """
from pydantic import Field
from exfm_ray.config.models import BackboneConfig
from exfm_ray.models.backbone import Backbone

class Mean(Backbone):
    class Config(BackboneConfig):
        scale: float = Field(1.0, gt=0)

    def __init__(self, config, inputs):
        super().__init__()
        if config.dim < 2:
            raise ValueError("model.dim is 1, set it to 2 or more")
        self.scale = config.scale
        self.out_features = config.dim

    def forward(self, embedded_BRE, dense_BD):
        return self.scale * embedded_BRE.mean(dim=1)

class NoSettings(Backbone):
    pass

class NoModel:
    Config = Mean.Config
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of which modules are imported, with the module `plugin_models`."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "plugin_models.py").write_text(MODULE)
    (folder / "plugin_broken.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(folder)
    for name in ("plugin_models", "plugin_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def load(folder: Path, model: str) -> Config:
    file = folder / "mine.yaml"
    file.write_text(f"vm: {{models: [{{name: a, domain: feed, task: click, model: {model}}}]}}")
    return load_config(file)


def test_class_path(plugin: Path) -> None:
    """Wrong: a model's own settings are lost or not checked, or do not survive config.yaml."""
    config = load(plugin, "{type: 'plugin_models:Mean', dim: 4, scale: 2}")
    (plugin / "mine.yaml").write_text(dump_config(config))
    assert load_config(plugin / "mine.yaml") == config
    model = config.vm.models[0].model
    assert model is not None
    assert model.model_dump() == {
        "dim": 4,
        "embeddings": {},
        "init_std": 0.05,
        "dropout": 0.0,
        "type": "plugin_models:Mean",
        "scale": 2.0,
    }
    backbone = build_backbone(model, Inputs(3, 0))
    rows = torch.randn(5, 3, 4)
    assert torch.equal(backbone(rows, torch.empty(5, 0)), 2 * rows.mean(dim=1))


@pytest.mark.parametrize(
    ("model", "message"),
    {
        "{type: 'plugin_models:Mean', scael: 2}": "unknown setting 'vm.models.0.model."
        r"plugin_models:Mean.scael'. Did you mean 'scale'\?$",
        "{type: 'plugin_models:Mean', scale: 0}": "setting 'vm.models.0.model.plugin_models:Mean."
        r"scale': Input should be greater than 0 \(given: 0\)$",
        "{type: 'plugin_models:Mena'}": "setting 'vm.models.0.model': type 'plugin_models:Mena': "
        r"module 'plugin_models' has no class 'Mena'. Did you mean 'Mean'\?$",
        "{type: 'plugin_modles:Mean'}": "type 'plugin_modles:Mean': cannot import module "
        "'plugin_modles' .*correct its name, or add its folder to PYTHONPATH$",
        "{type: 'plugin_broken:Mean'}": "cannot import module 'plugin_broken' "
        r"\(ModuleNotFoundError: No module named 'no_such_package'\)",
        "{type: 'plugin_models:NoSettings'}": "'plugin_models:NoSettings': the class declares no "
        "settings; give it a class attribute `Config`",
        "{type: 'plugin-models:Mean'}": "is not of the form my_module:MyModel$",
        "{type: mpl}": "expected tags: 'wukong', .*, or my_module:MyModel for a model of your "
        r"own. Did you mean 'mlp'\?$",
    }.items(),
)
def test_mistakes(plugin: Path, model: str, message: str) -> None:
    """Wrong: a mistake in a custom model's type or settings ends in a traceback, or in a message
    without a way out."""
    with pytest.raises(UserError, match=message):
        load(plugin, model)


def test_a_class_that_is_no_backbone(plugin: Path) -> None:
    """Wrong: a class of another kind is trained until something breaks."""
    model = load(plugin, "{type: 'plugin_models:NoModel'}").vm.models[0].model
    assert model is not None
    with pytest.raises(ValueError, match="plugin_models:NoModel, which is not an interaction"):
        build_backbone(model, Inputs(3, 0))


def test_stored_and_loaded(plugin: Path) -> None:
    """Wrong: a snapshot or an export of a custom model cannot be loaded, or loading one whose
    module is missing ends in a traceback."""
    config = load(plugin, "{type: 'plugin_models:Mean', dim: 4, scale: 2}").vm.models[0].model
    assert config is not None
    model = LocalModel(
        LocalTables(SCHEMA, config, seed=1), build_network(config, SCHEMA, 2, seed=1)
    ).eval()
    folder = plugin / "stored"
    write_tables(folder, 0, {f"{name}@0": rows for name, rows in model.tables.tables().items()})
    commit_model(folder, config, SCHEMA, SCHEMA.tasks, model.network.state_dict(), {})

    batch = to_batch(make_rows(20, seed=3), SCHEMA)
    loaded, manifest = load_model(folder)
    assert torch.equal(loaded.score(batch), model.score(batch))
    assert manifest.network == config

    content = read_json(folder / MANIFEST)
    content["network"]["type"] = "plugin_gone:Mean"
    write_json(folder / MANIFEST, content)
    with pytest.raises(UserError, match="cannot import module 'plugin_gone'"):
        load_model(folder)


class Sum(Backbone):
    """The sum of the rows."""

    def __init__(self, config: SumConfig, inputs: Inputs) -> None:
        super().__init__()
        self.out_features = config.dim

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        return embedded_BRE.sum(dim=1)


class SumConfig(MLPConfig):
    type: str = "sum"  # type: ignore[assignment]


def test_registered_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a registered model is unknown to configs, or takes the name of another one."""
    monkeypatch.setattr("exfm_ray.config.models._config_of_name", {})
    register_model(SumConfig, Sum)
    register_model(SumConfig, Sum)  # a module that is reloaded
    config = Config.model_validate({"name": "a", "fm": {"model": {"type": "sum", "dim": 8}}})
    assert isinstance(build_backbone(config.fm.model, Inputs(3, 0)), Sum)
    assert config == Config(name="a", fm=FMConfig(model=SumConfig(dim=8)))

    class Other(MLPConfig):
        type: str = "sum"  # type: ignore[assignment]

    class BuiltIn(MLPConfig):
        pass

    for taken in (Other, BuiltIn):
        with pytest.raises(ValueError, match="exists already; choose another name"):
            register_model(taken, Sum)
