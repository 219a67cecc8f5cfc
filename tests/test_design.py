"""How the project is built: who may import what, how long a file may get."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "exfm_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each folder of exfm_ray may import from the others. All may import FLOOR.
FLOOR = {"errors", "base", "storage"}
BELOW = {
    "errors": set[str](),
    "base": set[str](),
    "storage": {"errors", "base"},
    "schema": set[str](),
    "config": set[str](),
    "metrics": set[str](),
    "runtime": {"config"},
    "data": {"config", "schema", "runtime"},
    "models": {"config", "schema", "data"},
    "planner": {"config", "schema", "models"},
    "distillation": {"config", "schema", "data", "models"},
    "stores": {"config", "schema", "data", "models"},
    "serving": {"config", "schema", "data", "models"},
    "engine": {"config", "schema", "data", "models", "planner", "distillation"},
    "das": {"config", "schema", "data", "models", "stores", "runtime"},
    "tracking": {"config", "schema", "metrics"},
    "training": {
        "config",
        "schema",
        "data",
        "models",
        "distillation",
        "engine",
        "stores",
        "metrics",
        "tracking",
        "runtime",
    },
    "pipeline": {
        "config",
        "schema",
        "data",
        "models",
        "das",
        "stores",
        "metrics",
        "runtime",
        "tracking",
        "training",
    },
}
TOP = {"cli", "__init__", "__main__"}
"""May import everything."""

PLAIN_TORCH = {"models", "distillation"}
FRAMEWORKS = {"ray", "deepspeed", "torchrec", "wandb", "fbgemm_gpu"}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms(names: set[str]) -> set[str]:
    """Rooms of this package among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("exfm_ray.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    """Wrong: a lower folder depends on an upper one, so it cannot be tested, replaced or understood
    alone."""
    here = room(path)
    if here not in TOP:
        assert here in BELOW, f"{here} is new: add what it may import to BELOW"
        above = rooms(imports(path)) - BELOW[here] - FLOOR - {here}
        assert not above, f"{path.relative_to(PACKAGE)} imports {sorted(above)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_frameworks_stay_in_their_folders(path: Path) -> None:
    """Wrong: models cannot run under plain torch on one device, or deepspeed and torchrec are
    spread over the project."""
    here = room(path)
    roots = {name.split(".")[0] for name in imports(path)}
    assert here not in PLAIN_TORCH or not roots & FRAMEWORKS
    if here != "engine":
        assert not roots & {"deepspeed", "torchrec", "fbgemm_gpu"}
    if here != "tracking":
        assert "wandb" not in roots
    if here in ("base", "errors", "schema", "config", "storage"):
        assert not roots & {"torch", "ray"}


def test_deepspeed_is_imported_in_functions_only() -> None:
    """Wrong: importing a module imports deepspeed, which breaks Ray Train's workers (ray#50406) and
    costs seconds."""
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(name.split(".")[0] == "deepspeed" for name in names), path


ROOT = PACKAGE.parent
SOURCES = [
    path
    for folder in ("exfm_ray", "tuning", "cluster", "benchmarks", "studies", "examples", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
LONGEST = 500
LOOSE = {"base.py", "errors.py", "schema.py", "__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    """Wrong: a file holds more than one idea."""
    assert len(path.read_text().splitlines()) <= LONGEST


def test_no_loose_files() -> None:
    """Wrong: a module lies at the top of the package instead of in a room."""
    assert {path.name for path in PACKAGE.glob("*.py")} == LOOSE


def test_rooms_have_no_circle() -> None:
    """Wrong: two rooms need each other, so neither can be read or tested alone."""
    floors: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in floors:
            below = BELOW.get(name, set()) | (FLOOR if name not in FLOOR else set())
            floors[name] = 1 + max((floor(other) for other in below), default=0)
        return floors[name]

    assert max(floor(name) for name in BELOW) <= 10
