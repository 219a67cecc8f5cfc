"""docs/models.md is followed to the letter: its model is trained, stored and loaded again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from exfm_ray.config.models import BackboneConfig
from exfm_ray.config.root import Config
from exfm_ray.models.registry import BACKBONES

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text()
OVERVIEW, RECIPE = PAGE.split("## Add your own in 30 lines")

TRAIN = """
from pathlib import Path
import pytest
import torch
from example import SCHEMA, make_rows
from exfm_ray.config.load import load_config
from exfm_ray.data.batch import to_batch
from exfm_ray.distillation.objective import labels_objective_B
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.network import build_network
from exfm_ray.models.serialization import LocalModel, commit_model, write_tables

config = load_config(Path("try.yaml")).vm.model
tables, network = LocalTables(SCHEMA, config, seed=0), build_network(config, SCHEMA, 2, seed=0)
batch = to_batch(make_rows(256, seed=0), SCHEMA)
optimizer = torch.optim.Adam([*tables.parameters(), *network.parameters()], lr=0.01)
for _ in range(10):
    optimizer.zero_grad()
    loss = labels_objective_B(network(tables(batch), batch.dense_BD), batch.labels_BT).mean()
    loss.backward()
    optimizer.step()
    print(type(network.backbone).__module__, loss.item())

write_tables(Path("stored"), 0, {f"{name}@0": rows for name, rows in tables.tables().items()})
commit_model(Path("stored"), config, SCHEMA, SCHEMA.tasks, network.state_dict(), {})
torch.save(LocalModel(tables, network).eval().score(batch), "probabilities.pt")
"""

LOAD = """
import sys
from pathlib import Path
import torch
from example import SCHEMA, make_rows
from exfm_ray.data.batch import to_batch
from exfm_ray.models.serialization import load_model

model, _ = load_model(Path("stored"))
batch = to_batch(make_rows(256, seed=0), SCHEMA)
assert torch.equal(model.score(batch), torch.load("probabilities.pt"))
print(type(model.network.backbone).__module__)
"""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run_python(program: str, folder: Path) -> str:
    """Run a program in `folder`, from which modules are imported; its output."""
    paths = [folder, ROOT, ROOT / "tests" / "helpers"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_add_your_own(tmp_path: Path) -> None:
    """Wrong: following the page ends in an error, in a model that learns nothing or cannot be
    loaded in another process, or takes more lines than promised."""
    model, _ = blocks(RECIPE, "python")
    (settings,) = blocks(RECIPE, "yaml")
    lines = [line for block in (model, settings) for line in block.splitlines()]
    assert sum(bool(line.strip()) for line in lines) <= 30

    (module,) = re.findall(r"`(\w+)\.py`:\n", RECIPE)
    (tmp_path / f"{module}.py").write_text(model)
    (tmp_path / "try.yaml").write_text(settings)
    printed = run_python(TRAIN, tmp_path).splitlines()
    modules, losses = zip(*(line.split() for line in printed), strict=True)
    assert set(modules) == {module}
    assert float(losses[-1]) < 0.9 * float(losses[0])

    assert run_python(LOAD, tmp_path).split() == [module]


def test_register_model(tmp_path: Path) -> None:
    """Wrong: the page's second way, with a short name, ends in an error."""
    model, registration = blocks(RECIPE, "python")
    (tmp_path / "my_model.py").write_text(model + registration)
    program = """
import my_model
from exfm_ray.config.root import Config
from exfm_ray.models.layout import Inputs
from exfm_ray.models.registry import build_backbone

config = Config.model_validate({"name": "a", "vm": {"model": {"type": "gated", "mlp": [8]}}})
print(type(build_backbone(config.vm.model, Inputs(3, 2))).__name__, config.vm.model.mlp)
"""
    assert run_python(program, tmp_path).strip() == "Gated (8,)"


def test_every_model_and_setting_is_named() -> None:
    """Wrong: the page leaves out a model or a setting, or names one that is gone."""
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", OVERVIEW, flags=re.MULTILINE))
    shared = set(BackboneConfig.model_fields) - {"type"}
    settings = {}
    for config in BACKBONES:
        fields = config.model_fields
        settings[fields["type"].default] = set(fields) - shared - {"type"}
    assert {name: set(re.findall(r"`(\w+)`", row)) for name, row in rows.items()} == settings
    (sentence,) = re.findall(r"^All have (.*?)`exfm_ray", OVERVIEW, flags=re.DOTALL | re.MULTILINE)
    assert shared <= set(re.findall(r"`(\w+)`", sentence))


def test_the_example_of_settings_is_valid() -> None:
    """Wrong: the page's first example is refused."""
    (example,) = blocks(OVERVIEW, "yaml")
    config = Config.model_validate({"name": "page", **yaml.safe_load(example)})
    assert [
        student.model.type if student.model else config.vm.model.type
        for student in config.vm.models
    ] == ["mlp", "din"]
