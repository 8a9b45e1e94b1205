"""``std-rt train``: hand a recipe to its stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from std_rt.training.autoencoder import train_autoencoder
from std_rt.training.finish import finish_pipeline
from std_rt.training.recipe import AutoencoderConfig, FinishConfig
from std_rt.training.teacher import train_teacher


def run_recipe(recipe: Any) -> Path:
    """Run the stage of a recipe to its end, going on from its checkpoint; returns the result's folder."""
    if isinstance(recipe, AutoencoderConfig):
        return train_autoencoder(recipe)
    if isinstance(recipe, FinishConfig):
        return finish_pipeline(recipe)
    return train_teacher(recipe)
