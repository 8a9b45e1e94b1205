"""The stages of ``std-rt train``, chosen by recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from std_rt.training.run.recipe import AutoencoderConfig, DistilConfig, FinishConfig, StylistConfig


def run_recipe(recipe: Any) -> Path:
    """Run the stage of a recipe to its end, from its checkpoint if there is one; returns what it made."""
    # Each stage is imported when it runs: the others need no Accelerate and no DINOv2.
    if isinstance(recipe, DistilConfig):
        from std_rt.training.distil.loop import train_distil

        return train_distil(recipe)
    if isinstance(recipe, AutoencoderConfig):
        from std_rt.training.tiny.autoencoder_stage import train_autoencoder

        return train_autoencoder(recipe)
    if isinstance(recipe, FinishConfig):
        from std_rt.training.tiny.finish import finish_pipeline

        return finish_pipeline(recipe)
    if isinstance(recipe, StylistConfig):
        from std_rt.training.tiny.stylist import train_stylist

        return train_stylist(recipe)
    from std_rt.training.tiny.teacher import train_teacher

    return train_teacher(recipe)
