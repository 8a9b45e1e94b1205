"""One SDXL-layout folder, read completely: what is exported, in torch, before anything is traced."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from std_rt.errors import ExportError
from std_rt.export.components import Network, load_part, plain_config, read_config, read_json
from std_rt.export.ip_adapter import (
    Branches,
    choose_layers,
    make_projection,
    pair_branches,
    projection_config,
    projection_tokens,
    read_ip_adapter,
)
from std_rt.export.lora import fuse_lora
from std_rt.export.modules import CLIP_MEAN, CLIP_STD, ClipStyleEncoder
from std_rt.export.options import ExportOptions
from std_rt.export.text import bake_prompt, null_text
from std_rt.model_card import licence
from std_rt.schedule import NoiseSchedule

__all__ = ["Pipeline", "Style", "read_pipeline"]


# Settings of UNet2DConditionModel that SDXL leaves off.
_UNSUPPORTED = (
    "class_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
    "only_cross_attention",
    "dual_cross_attention",
    "mid_block_only_cross_attention",
)


@dataclass(frozen=True, eq=False)
class Style:
    """The style encoder: ``module(style_image)`` gives tokens, or (tokens, text_embeds)."""

    module: nn.Module
    class_name: str
    config: dict[str, Any]
    image_px: int
    tokens: int
    dim: int
    text_dim: int | None

    def state_dict(self) -> dict[str, Tensor]:
        """Weights by the names of the network inside (a wrapper's own name is left out)."""
        inner = self.module.module if isinstance(self.module, ClipStyleEncoder) else self.module
        return dict(inner.state_dict())


@dataclass(frozen=True, eq=False)
class Pipeline:
    """Everything export needs from the source, LoRAs fused, in fp32."""

    unet: Network
    vae: Network
    style: Style
    branches: Branches
    layout: str
    schedule: NoiseSchedule
    text: dict[str, Any]
    text_mode: str
    sources: list[dict[str, Any]]

    @property
    def vae_scale(self) -> int:
        """Image pixels per latent pixel; every class here has one level a factor of two."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_multiple(self) -> int:
        """Latent sizes must divide by this, or skip connections would not meet."""
        return int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def text_dims(self) -> tuple[int, int]:
        """(context tokens' width, pooled vector's width)."""
        return _text_dims(self.unet)


def read_pipeline(options: ExportOptions) -> Pipeline:
    """Load, check and fuse. Raises ExportError on the first thing that does not fit."""
    source = options.source
    read_json(source / "model_index.json")
    _check_unet(read_config("unet", source / "unet"))
    unet = load_part("unet", source / "unet")
    vae_folder = options.vae or source / "vae"
    vae = load_part("vae", vae_folder)
    _check_vae(vae, unet)
    encoders = {role: load_part(role, source / role) for role in _text_roles(source)}
    sources = [_entry("pipeline", source)]
    for path, scale in options.lora:
        fuse_lora({"unet": unet, **encoders}, path, scale)
        sources.append({**_entry("lora", path), "scale": scale})
    adapter = _adapter_path(options)
    style, branches = _read_style(options, unet, adapter)
    layout, layers = choose_layers(unet, options.style_layers, own_encoder=style.text_dim is not None)
    sources += [_entry("ip_adapter", adapter)] + ([_entry("vae", vae_folder)] if options.vae else [])
    text = bake_prompt(source, encoders, options.prompt) if encoders else null_text(*_text_dims(unet))
    if options.prompt and not encoders:
        raise ExportError(f"{source} has no text encoders, so it takes no --prompt")
    _check_text(text, unet)
    return Pipeline(
        unet,
        vae,
        style,
        {layer: branches[layer] for layer in layers},
        layout,
        NoiseSchedule.from_config(read_json(source / "scheduler" / "scheduler_config.json")),
        text,
        "baked" if encoders else "none",
        sources,
    )


def _text_dims(unet: Network) -> tuple[int, int]:
    config = unet.config
    time_ids = 6 * config.addition_time_embed_dim
    return config.cross_attention_dim, config.projection_class_embeddings_input_dim - time_ids


def _check_unet(config: dict[str, Any]) -> None:
    """Before weights are read: what is not SDXL's kind of UNet often does not even load."""
    kind = config.get("addition_embed_type")
    if kind != "text_time":
        raise ExportError(f"the UNet has addition_embed_type {kind!r}; std-rt exports SDXL's 'text_time'")
    taken, given = config.get("in_channels", 4), config.get("out_channels", 4)
    if taken != given:
        raise ExportError(
            f"the UNet takes {taken} channels and gives {given}; inpainting models are not supported"
        )
    for key in _UNSUPPORTED:
        if np.any(config.get(key) or False):
            raise ExportError(f"the UNet has {key} {config[key]!r}, which std-rt does not export")


def _check_vae(vae: Network, unet: Network) -> None:
    if vae.config.latent_channels != unet.config.in_channels:
        raise ExportError(
            f"the VAE has {vae.config.latent_channels} latent channels, the UNet {unet.config.in_channels}; "
            "give the matching one with --vae"
        )
    for key in ("latents_mean", "latents_std"):
        if getattr(vae.config, key, None) is not None:
            raise ExportError(f"the VAE has {key}, which std-rt does not export")


def _check_text(text: dict[str, Any], unet: Network) -> None:
    wanted = _text_dims(unet)
    found = (text["encoder_hidden_states"].shape[2], text["text_embeds"].shape[1])
    if found != wanted:
        raise ExportError(
            f"the text encoders give vectors of {found[0]} and {found[1]}, "
            f"the UNet takes {wanted[0]} and {wanted[1]}"
        )


def _text_roles(source: Path) -> list[str]:
    return [role for role in ("text_encoder", "text_encoder_2") if (source / role / "config.json").is_file()]


def _adapter_path(options: ExportOptions) -> Path:
    path = options.ip_adapter or options.source / "ip_adapter.safetensors"
    if not path.is_file():
        raise ExportError(
            f"no IP-Adapter weights at {path}, and a style needs them; "
            "give --ip-adapter ip-adapter-plus_*.safetensors"
        )
    return path


def _read_style(options: ExportOptions, unet: Network, adapter: Path) -> tuple[Style, Branches]:
    projection, weights = read_ip_adapter(adapter)
    branches = pair_branches(unet, weights)
    dim = next(iter(branches.values()))[0].shape[1]
    folder = _encoder_folder(options, adapter)
    encoder = load_part("image_encoder", folder)
    own = type(encoder).__name__ == "StyleEncoder"
    if own and projection:
        raise ExportError(
            f"{adapter} has image_proj weights, and {folder} is a StyleEncoder, which has its own"
        )
    if not own and not projection:
        raise ExportError(f"{adapter} has no image_proj weights, which the encoder in {folder} needs")
    style = _own_style(encoder) if own else _clip_style(encoder, unet, projection, adapter, folder)
    if style.dim != dim:
        raise ExportError(f"style tokens are {style.dim} wide, the attention in {adapter} takes {dim}")
    return style, branches


def _encoder_folder(options: ExportOptions, adapter: Path) -> Path:
    """In the pipeline, or beside the adapter as the hub's repositories have it."""
    for folder in (options.image_encoder, options.source / "image_encoder", adapter.parent / "image_encoder"):
        if folder is not None and (folder / "config.json").is_file():
            return folder
    raise ExportError(f"no image_encoder in {options.source} or beside {adapter}; a style needs one")


def _own_style(encoder: Network) -> Style:
    config = encoder.config
    return Style(
        encoder,
        "StyleEncoder",
        plain_config(encoder),
        config.image_px,
        config.tokens,
        config.dim,
        config.pooled_dim,
    )


def _clip_style(
    encoder: Network, unet: Network, weights: dict[str, Tensor], path: Path, folder: Path
) -> Style:
    projection, reads_hidden = make_projection(unet, weights, path)
    mean, std = _statistics(folder)
    module = ClipStyleEncoder(encoder, projection, reads_hidden=reads_hidden, mean=mean, std=std)
    pixels = encoder.config.image_size
    try:
        with torch.no_grad():
            tokens = module(torch.zeros(1, 3, pixels, pixels))
    except RuntimeError as error:
        raise ExportError(
            f"the projection in {path} does not fit the encoder in {folder}: {error}"
        ) from error
    config = {
        "image_encoder": plain_config(encoder),
        "image_proj": projection_config(projection),
        "reads_hidden": reads_hidden,
        "mean": list(mean),
        "std": list(std),
    }
    assert tokens.shape[1] == projection_tokens(projection)
    return Style(module, "ClipStyleEncoder", config, pixels, tokens.shape[1], tokens.shape[2], None)


def _statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The pictures' mean and standard deviation that the encoder was trained with."""
    for place in (folder, folder.parent / "feature_extractor"):
        path = place / "preprocessor_config.json"
        if path.is_file():
            found = read_json(path)
            return tuple(found.get("image_mean", CLIP_MEAN)), tuple(found.get("image_std", CLIP_STD))
    return CLIP_MEAN, CLIP_STD


def _entry(role: str, path: Path) -> dict[str, Any]:
    return {"role": role, "id": path.resolve().name, "sha256": _digest(path), "licence": _licence(path)}


def _digest(path: Path) -> str:
    """sha256 of a file; of a folder's weights and configs: sha256 over their names and hashes."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    listed = sorted(p for pattern in ("**/*.safetensors", "**/*.json") for p in path.glob(pattern))
    lines = [f"{p.relative_to(path).as_posix()} {_digest(p)}" for p in listed]
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()


def _licence(path: Path) -> str:
    """Of a folder, or of the folder that a file lies in; ``unknown`` where nothing says."""
    return licence(path if path.is_dir() else path.parent) or "unknown"
