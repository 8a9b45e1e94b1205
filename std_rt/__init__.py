"""Real-time diffusion stylization of pictures and video.

    from std_rt import Stylizer

Importing the package is cheap: NumPy, OpenCV and the engine load when `Stylizer` is first touched.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from std_rt.pipeline.stylizer import State, Stylizer

__all__ = ["State", "StdRtError", "Stylizer", "__version__"]

__version__ = "0.1.0"
_LAZY = {
    "State": "std_rt.pipeline.stylizer",
    "Stylizer": "std_rt.pipeline.stylizer",
    "StdRtError": "std_rt.core.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'std_rt' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
