"""exfm-ray: external foundation-model distillation (ExFM) for ads and recommendation, on Ray.

The public names are imported when they are first used, so that `import exfm_ray` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exfm_ray.config.load import load_config
    from exfm_ray.config.root import Config
    from exfm_ray.data.sources.registry import register_source
    from exfm_ray.data.stream import EventStream
    from exfm_ray.models.registry import register_model
    from exfm_ray.pipeline.runner import PipelineRunner
    from exfm_ray.tracking.run_files import RunFiles

__version__ = "0.1.0"

__all__ = [
    "Config",
    "EventStream",
    "PipelineRunner",
    "RunFiles",
    "load_config",
    "register_model",
    "register_source",
]

_MODULES = {
    "Config": "exfm_ray.config.root",
    "EventStream": "exfm_ray.data.stream",
    "PipelineRunner": "exfm_ray.pipeline.runner",
    "RunFiles": "exfm_ray.tracking.run_files",
    "load_config": "exfm_ray.config.load",
    "register_model": "exfm_ray.models.registry",
    "register_source": "exfm_ray.data.sources.registry",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'exfm_ray' has no attribute '{name}'")
    value: object = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
