"""The stages of ``std-rt train``, chosen by recipe."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

# Stage of a recipe -> its function. Each is imported when it runs: the stages of std-tiny need no Accelerate
# and no DINOv2.
_FUNCTIONS = {
    "autoencoder": ("std_rt.training.tiny.autoencoder_stage", "train_autoencoder"),
    "stylist": ("std_rt.training.tiny.stylist", "train_stylist"),
    "motion": ("std_rt.training.tiny.motion_stage", "train_motion"),
    "distil": ("std_rt.training.distil.loop", "train_distil"),
}


def run_recipe(recipe: Any) -> Path:
    """Run the stage of a recipe to its end, from its checkpoint if there is one; returns what it made."""
    module, name = _FUNCTIONS[recipe.stage]
    made: Path = getattr(import_module(module), name)(recipe)
    return made
