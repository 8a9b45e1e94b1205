"""Example pictures and styles, rendered by code: the repository ships no one's photographs or paintings.

Everything is a function of its size and a fixed seed, so two machines draw the same pictures.
"""

from __future__ import annotations

from std_rt.examples.scenes import SCENES
from std_rt.examples.styles import STYLES

__all__ = ["SCENES", "STYLES"]
