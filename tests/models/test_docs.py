"""docs/models.md is followed to the letter: in a copy of the package, with its model trained."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from exfm_ray.config.models import BackboneConfig
from exfm_ray.config.root import Config
from exfm_ray.models.registry import BACKBONES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text()
OVERVIEW, RECIPE = PAGE.split("## Add your own in 30 lines")

TRAIN = """
from pathlib import Path
import torch
from example import SCHEMA, make_rows
from exfm_ray.config.load import load_config
from exfm_ray.data.batch import to_batch
from exfm_ray.distillation.objective import labels_objective_B
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.network import build_network

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
"""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def apply(text: str, diff: str) -> str:
    """Every hunk's old lines stand in the file once, and give way to its new ones."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert text.count(old) == 1, f"not once in the file:\n{old}"
        text = text.replace(old, new)
    return text


def test_add_your_own(tmp_path: Path) -> None:
    """Wrong: who does what the page says gets an error, a model that learns nothing, or has to
    write more than it promises."""
    (model,), (config, registry), (settings,) = (
        blocks(RECIPE, "python"),
        blocks(RECIPE, "diff"),
        blocks(RECIPE, "yaml"),
    )
    written = [line for block in (model, settings) for line in block.splitlines()]
    written += [
        line[1:] for diff in (config, registry) for line in diff.splitlines() if line[0] == "+"
    ]
    assert sum(bool(line.strip()) for line in written) <= 30
    shutil.copytree(
        ROOT / "exfm_ray", tmp_path / "exfm_ray", ignore=shutil.ignore_patterns("__pycache__")
    )
    places = re.findall(r"`(exfm_ray/\S+\.py)`", RECIPE)
    assert len(places) == 3
    (tmp_path / places[0]).write_text(model)
    for place, diff in zip(places[1:], (config, registry), strict=True):
        (tmp_path / place).write_text(apply((tmp_path / place).read_text(), diff))
    (tmp_path / "try.yaml").write_text(settings)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests" / "helpers")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    modules, losses = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert set(modules) == {"exfm_ray.models.gated"}
    assert float(losses[-1]) < 0.9 * float(losses[0])


def test_every_model_and_setting_is_named() -> None:
    """Wrong: the page leaves out a model or a setting, or names one that is gone."""
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", OVERVIEW, flags=re.MULTILINE))
    shared = set(BackboneConfig.model_fields)
    own = {
        c.model_fields["type"].default: set(c.model_fields) - shared - {"type"} for c in BACKBONES
    }
    assert {name: set(re.findall(r"`(\w+)`", row)) for name, row in rows.items()} == own
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
