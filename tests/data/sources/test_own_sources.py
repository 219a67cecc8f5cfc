"""Sources of a user's own: named by their path, or registered under a name."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from exfm_ray.config.load import load_config
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare, source_schema
from exfm_ray.data.sources.base import RawSource
from exfm_ray.data.sources.registry import PATHS, _import_source, register_source
from exfm_ray.data.stream import list_values
from exfm_ray.errors import UserError
from exfm_ray.schema import Schema, SparseFeature
from exfm_ray.storage.atomic import read_json

MakeConfig = Callable[..., Config]
MODULE = '''
"""A little log: time in seconds, user, and whether the user clicked."""

from exfm_ray.data.sources.base import RawSource, read_csv, require
from exfm_ray.schema import Schema, SparseFeature

NOT_A_FUNCTION = 7


def clicks(config):
    log = require(config.data.root, "clicks.csv")
    table = read_csv([log], {"seconds": "BIGINT", "user": "VARCHAR", "click": "DOUBLE"})
    features = (SparseFeature(name="user", rows=config.data.hash_rows),)
    return RawSource(
        schema=Schema(features=features, tasks=("click",)),
        files=(log,),
        query=f'SELECT seconds * 1000 AS event_time, "user", click FROM {table} ORDER BY seconds',
    )


def nothing(config):
    return None
'''


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The folder of a log with two events in each of three hours."""
    lines = ["seconds,user,click"]
    for hour in range(3):
        lines.append(f"{3600 * hour},ann,1")
        lines.append(f"{3600 * hour + 60},bob,0")
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "clicks.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with sources, unique to the test."""
    name = f"shop_{tmp_path.name}"
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / f"{name}.py").write_text(textwrap.dedent(MODULE))
    (folder / f"{name}_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(folder)
    return name


def test_a_source_named_by_its_path(
    tmp_path: Path,
    log: Path,
    module: str,
) -> None:
    """Wrong: a source of one's own needs an edit in this package, its events are not those of its
    query, or a stream of it is taken for that of another source."""
    tree = {
        "run": {"dir": str(tmp_path / "runs")},
        "data": {
            "source": f"{module}:clicks",
            "root": str(log),
            "hash_rows": 50,
            "window": {"by": "time", "length_s": 3600},
        },
    }
    file = tmp_path / "shop.yaml"
    file.write_text(yaml.safe_dump(tree))
    config = load_config(file)
    assert source_schema(config).tables == {"user": 50, "domain": 2}

    stream = prepare(config)
    assert stream.windows() == [0, 1, 2]
    for index in stream.windows():
        window = stream.window(index)
        rows = stream.read(index, window.fragments[0])
        assert (window.rows, window.start_ms) == (2, 3_600_000 * index)
        assert list_values(rows["labels"], 1)[:, 0].tolist() == [1, 0]
    settings = read_json(stream.root / "settings.json")
    assert settings["data"]["source"] == f"{module}:clicks"
    assert [name for name, *_ in settings["files"]] == ["clicks.csv"]


def test_a_registered_source(make: MakeConfig, log: Path) -> None:
    """Wrong: a registered name is refused by the config, or another source takes it."""

    def visits(config: Config) -> RawSource:
        file = config.data.root / "clicks.csv"
        schema = Schema(features=(SparseFeature(name="user", rows=20),), tasks=("click",))
        query = f"""SELECT seconds * 1000 AS event_time, "user", click FROM read_csv('{file}')"""
        return RawSource(schema=schema, files=(file,), query=query)

    register_source("visits", visits)
    register_source("visits", visits)
    stream = prepare(make("visits", log, window={"length_s": 3600}))
    assert [stream.window(index).rows for index in stream.windows()] == [2, 2, 2]

    with pytest.raises(ValueError, match="'visits' is registered already"):
        register_source("visits", lambda config: visits(config))
    with pytest.raises(ValueError, match="'table' is registered already"):
        register_source("table", visits)
    with pytest.raises(ValueError, match="'my visits': a name consists of"):
        register_source("my visits", visits)
    with pytest.raises(ValidationError, match="Did you mean 'visits'"):
        make("visit", log)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "{module}x:clicks",
            r"'data\.source': .*cannot import module '{module}x' \(ModuleNotFoundError.*PYTHONPATH",
        ),
        ("{module}_broken:clicks", r"'data\.source': .*\(ZeroDivisionError: division by zero\)"),
        (
            "{module}:click",
            r"'data\.source': .*module '{module}' has no 'click'\. Did you mean 'clicks'\?",
        ),
        ("{module}:NOT_A_FUNCTION", r"'data\.source': .* is a int, not a function"),
        ("{module}:nothing", r"'data\.source': .*returned a NoneType; return a RawSource"),
    ],
)
def test_a_wrong_path_names_the_setting(
    make: MakeConfig,
    log: Path,
    module: str,
    path: str,
    message: str,
) -> None:
    """Wrong: a mistake in the path is a traceback, or leaves half a stream."""
    config = make(path.format(module=module), log)
    with pytest.raises(UserError, match=message.format(module=module)):
        prepare(config)
    assert not (config.folder / "stream").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kuairan", "no such source; .*'kuairand'.*Did you mean 'kuairand'"),
        ("my_module.my_source", "no such source; .*or my_module:my_source"),
        ("../my_module:my_source", "no such source"),
        (7, "valid string"),
    ],
)
def test_an_unknown_name_is_refused(
    make: MakeConfig,
    name: str,
    message: str,
) -> None:
    """Wrong: a misspelled source is found out only when the data are read, or not at all."""
    with pytest.raises(ValidationError, match=message):
        make(name)


def test_the_former_name_of_the_synthetic_stream(make: MakeConfig) -> None:
    """Wrong: configs of older runs cannot be read."""
    assert make("embedded").data.source == "synthetic"


@pytest.mark.parametrize("name", PATHS)
def test_built_in_sources_are_importable(name: str) -> None:
    """Wrong: the table of built-in sources names a module or function that is not there."""
    factory = _import_source(PATHS[name])
    assert factory.__module__ == f"exfm_ray.data.sources.{name}"
