"""The raw sources: which function makes the source that a config names, and users' own ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from pydantic import TypeAdapter, ValidationError

from exfm_ray.base import Name
from exfm_ray.config.data import BUILT_IN_SOURCES, SOURCE_PATH, register_source_name
from exfm_ray.config.root import Config
from exfm_ray.data.sources.base import RawSource
from exfm_ray.errors import UserError, nearest

SourceFactory = Callable[[Config], RawSource]
"""Makes the raw source of a config. It raises UserError for a wrong setting or a missing file."""

PATHS = {
    "kuairand": "exfm_ray.data.sources.kuairand:source",
    "movielens": "exfm_ray.data.sources.movielens:source",
    "frappe": "exfm_ray.data.sources.frappe:source",
    "criteo": "exfm_ray.data.sources.criteo:source",
    "avazu": "exfm_ray.data.sources.avazu:source",
    "table": "exfm_ray.data.sources.table:source",
}
"""Built-in sources, imported on use. `synthetic` and `kafka` have no raw files to query."""

_registered: dict[str, SourceFactory] = {}


def register_source(name: str, factory: SourceFactory) -> None:
    """Add a raw source of your own, so that a config can name it: `data: {source: <name>}`.

    Call this before the config is loaded, in every process that loads it. A config that names the
    function itself, `source: my_package.my_module:my_source`, needs no call.

    Args:
        name: letters, digits, `_`, `-` and `.`.
        factory: takes the config and returns the source.

    Raises:
        ValueError: the name is malformed, or names another source already.
    """
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ValueError(
            f"source '{name}': a name consists of letters, digits, '_', '-' and '.'"
        ) from None
    other = _registered.get(name, factory)
    if name in BUILT_IN_SOURCES or other is not factory:
        raise ValueError(f"source '{name}' is registered already; choose another name")
    _registered[name] = factory
    register_source_name(name)


def raw_source(config: Config) -> RawSource:
    """Make the source that `data.source` names.

    Raises:
        UserError: the setting names no source, or the source refuses the config.
    """
    name = config.data.source
    factory = _registered.get(name)
    if factory is None:
        factory = _import_source(PATHS.get(name, name))
    source = factory(config)
    if not isinstance(source, RawSource):
        raise UserError(
            f"setting 'data.source': '{name}' returned a {type(source).__name__}; "
            "return a RawSource (exfm_ray.data.sources.base)"
        )
    return source


def _import_source(path: str) -> SourceFactory:
    """Import the function that a path such as `my_package.my_module:my_source` names."""
    if not SOURCE_PATH.fullmatch(path):
        raise UserError(
            f"setting 'data.source': '{path}' is not registered in this process; call "
            "register_source first, or set it to my_module:my_source"
        )
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"setting 'data.source': '{path}': cannot import module '{module_name}' "
            f"({type(error).__name__}: {error}); correct its name, or add its folder to PYTHONPATH"
        ) from error

    if not hasattr(module, attribute):
        suggestion = nearest(attribute, vars(module))
        raise UserError(
            f"setting 'data.source': '{path}': module '{module_name}' has no '{attribute}'."
            f"{suggestion}"
        )
    factory: SourceFactory = getattr(module, attribute)
    if not callable(factory):
        raise UserError(
            f"setting 'data.source': '{path}' is a {type(factory).__name__}, not a function; "
            "name a function that takes the config and returns a RawSource"
        )
    return factory
