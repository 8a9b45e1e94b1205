"""``std-rt train RECIPE --dry-run``: what a distillation would cost, from its base's configs alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open

from std_rt.core.errors import RecipeError
from std_rt.training.distil.base import check_source
from std_rt.training.distil.discriminator import Heads
from std_rt.training.run.estimate import describe, estimate
from std_rt.training.run.recipe import DistilConfig

__all__ = ["describe_run"]

# The architecture of SDXL base 1.0, so that its cost can be told without a download.
SDXL_NAME = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 32,
}
SDXL_TEXT_PARAMETERS = 817_720_320  # CLIP ViT-L's and OpenCLIP bigG's text towers with their projection


def describe_run(config: DistilConfig) -> list[str]:
    """Lines for people: parameters, memory, time. RecipeError where the base's configs are out of reach."""
    unet, vae, style, encoders = _configs(config.base)
    heads = None
    if style and config.adversarial.features == "style":
        judged = Heads([style["latent_channels"], *style["widths"]], style["pooled_dim"])
        heads = sum(p.numel() for p in judged.parameters()) if config.adversarial.weight else 0
    found = estimate(
        config,
        unet,
        vae,
        style_tokens=int(style.get("tokens", 0)),
        encoder_parameters=encoders,
        heads=heads,
    )
    return describe(found)


def _configs(base: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
    """Configs of (UNet, VAE, style encoder or {}), and how many parameters the encoders have."""
    folder = check_source(base)
    if folder.is_dir():
        unet, vae = (_read(folder / part / "config.json") for part in ("unet", "vae"))
        path = folder / "image_encoder" / "config.json"
        style = _read(path) if path.is_file() else {}
        if style.get("_class_name") == "StyleEncoder":
            return unet, vae, style, _stored(folder / "image_encoder")
        return unet, vae, {}, sum(_stored(folder / part) for part in ("text_encoder", "text_encoder_2"))
    if base == SDXL_NAME:
        return SDXL_UNET, SDXL_VAE, {}, SDXL_TEXT_PARAMETERS
    try:
        unet = UNet2DConditionModel.load_config(base, subfolder="unet")
        return unet, AutoencoderKL.load_config(base, subfolder="vae"), {}, 0
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise RecipeError(
            f"base = {base!r} is no folder, and its configs could not be loaded: {reason}"
        ) from None


def _stored(folder: Path) -> int:
    """Numbers in the weights of a part, from the files' headers; one variant of several."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for path in [p for p in files if "fp16" not in p.name] or files:
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read ({error}); is base a diffusers folder?") from None
