"""Export: an SDXL-layout diffusers folder (and a LoRA) -> a bundle. Needs ``pip install '.[export]'``.

Importing this costs nothing; torch is loaded by the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from std_rt.export.build import export_pipeline
    from std_rt.export.restore import load_torch_components

__all__ = ["export_pipeline", "load_torch_components"]

_HOMES = {"export_pipeline": "build", "load_torch_components": "restore"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
