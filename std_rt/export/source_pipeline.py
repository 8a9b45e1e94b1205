"""The source of an export: one SDXL-layout folder, its configs read and checked, its parts loaded one by one.

A 2.6 B-parameter UNet in fp32 is 10 GB, so no two large parts are ever in memory together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from std_rt.core.base_model import licence
from std_rt.core.bundle import CONTENT, INPAINTING
from std_rt.core.errors import ExportError
from std_rt.core.files import file_digest
from std_rt.core.schedule import NoiseSchedule
from std_rt.export.export_options import ExportOptions
from std_rt.export.lora_fusion import check_lora, fuse_lora
from std_rt.export.modules import latent_affine
from std_rt.models.clip_style import ClipStyleEncoder, find_encoder, open_adapter
from std_rt.models.components import (
    Network,
    check_part,
    load_part,
    motion_unet,
    plain_config,
    quiet,
    read_config,
    read_json,
    resolve,
    text_roles,
)
from std_rt.models.ip_adapter import (
    Branches,
    check_encoder,
    choose_layers,
    projection_config,
)
from std_rt.models.style_encoder import StyleEncoder

__all__ = ["Source", "Style", "read_source"]

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
    negative: Tensor  # tokens of no style [1, T, D]

    def state_dict(self) -> dict[str, Tensor]:
        """Weights by the names of the network inside (a wrapper's own name is left out)."""
        inner = self.module.module if isinstance(self.module, ClipStyleEncoder) else self.module
        return dict(inner.state_dict())


@dataclass(frozen=True, eq=False)
class Source:
    """A pipeline folder, its configs read and checked. Weights are loaded part by part, each in fp32.

    ``unet`` has SDXL's structure and no weights (it lies on torch's ``meta`` device).
    """

    options: ExportOptions
    unet: Network
    vae_config: Mapping[str, Any]
    text_roles: tuple[str, ...]
    adapter: Path
    layout: str
    layers: tuple[str, ...]
    schedule: NoiseSchedule
    motion: Network | None = None  # with a motion adapter: the video UNet, likewise without weights

    @property
    def folder(self) -> Path:
        """The diffusers folder."""
        return self.options.source

    @property
    def vae_folder(self) -> Path:
        """``--vae``, or that of the pipeline."""
        return self.options.vae or self.folder / "vae"

    @property
    def vae_scale(self) -> int:
        """Image pixels per latent pixel; every class here has one level a factor of two."""
        config = self.vae_config
        return int(2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1))

    @property
    def latent_multiple(self) -> int:
        """Latent sizes must divide by this, or skip connections would not meet."""
        return int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def unet_inputs(self) -> tuple[str, ...]:
        """What the UNet sees beside the noisy latents, as the bundle's manifest names it."""
        return _unet_inputs(self.unet.config.in_channels, self.unet.config.out_channels)

    @property
    def content_affine(self) -> tuple[float, float]:
        """``(shift, scale)`` of the content latents that the UNet was trained to see: z / scale + shift.

        diffusers' InstructPix2Pix pipelines show it the VAE's latents unscaled; those of CosXL are scaled.
        """
        cosxl = read_json(self.folder / "model_index.json").get("is_cosxl_edit")
        if self.unet_inputs != CONTENT or cosxl:
            return 0.0, 1.0
        own = self.folder / "vae"  # a VAE given with --vae may scale its latents in another way
        config = read_config("vae", own) if own.is_dir() else self.vae_config
        with torch.device("meta"), quiet("diffusers"):
            return latent_affine(resolve("vae", config["_class_name"]).from_config(config))

    @property
    def text_dims(self) -> tuple[int, int]:
        """(context tokens' width, pooled vector's width)."""
        config = self.unet.config
        time_ids = 6 * config.addition_time_embed_dim
        return config.cross_attention_dim, config.projection_class_embeddings_input_dim - time_ids

    @property
    def parameters(self) -> int:
        """Of the UNet."""
        return sum(parameter.numel() for parameter in (self.motion or self.unet).parameters())

    def load_unet(self) -> Network:
        """With LoRAs fused; with a motion adapter diffusers' UNetMotionModel."""
        unet = load_part("unet", self.folder / "unet")
        if self.options.motion_adapter is not None:
            unet = _with_motion(unet, load_part("motion_adapter", self.options.motion_adapter), weights=True)
        return self._fused("unet", unet)

    def load_tiny_vae(self, folder: Path) -> Network:
        """A second VAE of the same latents. Raises ExportError if they differ."""
        check_part("vae", folder)
        config = read_config("vae", folder)
        _check_vae(config, taken=self.unet.config.out_channels)
        scale = replace(self, vae_config=config).vae_scale
        if scale != self.vae_scale:
            raise ExportError(
                f"the tiny VAE {folder} makes latents {scale} times smaller than the picture, the other "
                f"{self.vae_scale} times; give one that matches with --tiny-vae"
            )
        return load_part("vae", folder)

    def load_vae(self) -> Network:
        """The VAE of `vae_folder`."""
        return load_part("vae", self.vae_folder)

    def load_text_encoder(self, role: str) -> Network:
        """``text_encoder`` or ``text_encoder_2``, with LoRAs fused."""
        return self._fused(role, load_part(role, self.folder / role))

    def load_style(self) -> tuple[Style, Branches]:
        """The style encoder, and the image branches of the layers that keep one."""
        encoder, branches = open_adapter(self.unet, self.adapter, _encoder_folder(self.options, self.adapter))
        style = _own_style(encoder) if isinstance(encoder, StyleEncoder) else _clip_style(encoder)
        return style, {layer: branches[layer] for layer in self.layers}

    def check_text(self, text: Mapping[str, Any]) -> None:
        """Raise ExportError if baked text does not fit the UNet."""
        found = (text["encoder_hidden_states"].shape[2], text["text_embeds"].shape[1])
        if found != self.text_dims:
            raise ExportError(
                f"the text encoders give vectors of {found[0]} and {found[1]}, "
                f"the UNet takes {self.text_dims[0]} and {self.text_dims[1]}"
            )

    def listed(self) -> list[dict[str, Any]]:
        """What the bundle is made of, for its manifest; reads every byte once to hash it."""
        options = self.options
        found = [self._entry("pipeline", options.source)]
        found += [{**self._entry("lora", path), "scale": scale} for path, scale in options.lora]
        found += [self._entry("ip_adapter", self.adapter)]
        found += [self._entry("motion_adapter", options.motion_adapter)] if options.motion_adapter else []
        found += [self._entry("vae", self.vae_folder)] if options.vae else []
        return found + ([self._entry("tiny_vae", options.tiny_vae)] if options.tiny_vae else [])

    def _entry(self, role: str, path: Path) -> dict[str, Any]:
        terms = licence(path if path.is_dir() else path.parent) or "unknown"
        local = {"role": role, "id": path.resolve().name, "sha256": _digest(path), "licence": terms}
        origin = self.options.origins.get(path)
        return local if origin is None else local | origin.entry()

    def _fused(self, role: str, module: Network) -> Network:
        for path, scale in self.options.lora:
            fuse_lora({role: module}, path, scale, elsewhere={"unet", *self.text_roles})
        return module


def read_source(options: ExportOptions) -> Source:
    """Check what configs and headers tell. Raises ExportError on the first thing that does not fit."""
    folder = options.source
    read_json(folder / "model_index.json")
    config = read_config("unet", folder / "unet")
    _check_unet(config)
    with torch.device("meta"), quiet("diffusers"):
        unet = resolve("unet", config["_class_name"]).from_config(config)
    vae_config = read_config("vae", options.vae or folder / "vae")
    check_part("vae", options.vae or folder / "vae")
    _check_vae(vae_config, taken=unet.config.out_channels)
    roles = text_roles(folder)
    for role in ("unet", *roles):
        check_part(role, folder / role)
    motion = None if options.motion_adapter is None else _read_motion(options, unet)
    for path, _ in options.lora:
        check_lora({"unet": motion or unet}, path, elsewhere=roles)
    adapter = options.ip_adapter or folder / "ip_adapter.safetensors"
    if not adapter.is_file():
        raise ExportError(
            f"no IP-Adapter weights at {adapter}, and a style needs them; "
            "give --ip-adapter ip-adapter-plus_*.safetensors"
        )
    encoder = _encoder_folder(options, adapter)
    own = check_part("image_encoder", encoder) is StyleEncoder
    if not own:
        check_encoder(adapter, encoder)
    layout, layers = choose_layers(unet, options.style_layers, own_encoder=own)
    schedule = _schedule(folder / "scheduler" / "scheduler_config.json")
    return Source(options, unet, vae_config, roles, adapter, layout, tuple(layers), schedule, motion)


def _read_motion(options: ExportOptions, unet: Network) -> Network:
    """The video UNet on torch's ``meta`` device. Raises ExportError if the adapter does not fit."""
    folder, (frames, _) = options.motion_adapter, options.window or (0, 0)
    assert folder is not None
    check_part("motion_adapter", folder)
    config = read_config("motion_adapter", folder)
    longest = int(config.get("motion_max_seq_length", 32))
    if frames > longest:
        raise ExportError(f"--frames {frames} is more than the {longest} that {folder} has positions for")
    if config.get("conv_in_channels"):
        raise ExportError(f"{folder} is a PIA adapter (conv_in_channels), which std-rt does not export")
    if _unet_inputs(unet.config.in_channels, unet.config.out_channels) == INPAINTING:
        raise ExportError("--motion-adapter does not work with an inpainting UNet; give another base")
    with torch.device("meta"), quiet("diffusers"):
        adapter = resolve("motion_adapter", config["_class_name"]).from_config(config)
        return _with_motion(unet, adapter, weights=False)


def _with_motion(unet: Network, adapter: Network, *, weights: bool) -> Network:
    """diffusers' UNetMotionModel of the two. Raises ExportError if they do not fit together."""
    wide, theirs = list(unet.config.block_out_channels), list(adapter.config.block_out_channels)
    if wide != theirs:
        raise ExportError(
            f"the motion adapter is for a UNet of widths {theirs}, this one has {wide}; "
            "give --motion-adapter one made for this model (SDXL's: 320, 640, 1280)"
        )
    try:
        motion = motion_unet(unet, adapter, weights=weights)
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"the motion adapter does not fit the UNet: {str(error)[:200]}") from error
    return motion.eval().requires_grad_(False)


def _schedule(path: Path) -> NoiseSchedule:
    """Raises ExportError for a schedule that is not of SDXL's kind, which default betas would hide."""
    config = read_json(path)
    kind = str(config.get("_class_name", ""))
    if kind.startswith(("EDM", "FlowMatch")):
        raise ExportError(
            f"{path} names {kind}: a CosXL, Playground 2.5 or flow model, whose noise levels are not SDXL's; "
            "std-rt exports SDXL pipelines"
        )
    try:
        return NoiseSchedule.from_config(config)
    except ValueError as error:
        raise ExportError(f"{path} cannot be used: {error}") from error


def _check_unet(config: dict[str, Any]) -> None:
    """Before weights are read: what is not SDXL's kind of UNet often does not even load."""
    kind = config.get("addition_embed_type")
    if kind != "text_time":
        raise ExportError(f"the UNet has addition_embed_type {kind!r}; std-rt exports SDXL's 'text_time'")
    _unet_inputs(config.get("in_channels", 4), config.get("out_channels", 4))
    for key in _UNSUPPORTED:
        if np.any(config.get(key) or False):
            raise ExportError(f"the UNet has {key} {config[key]!r}, which std-rt does not export")


def _unet_inputs(taken: int, given: int) -> tuple[str, ...]:
    """What stands beside the ``given`` latent channels at the input. Raises ExportError for other counts."""
    known: dict[int, tuple[str, ...]] = {given: (), 2 * given: CONTENT, 2 * given + 1: INPAINTING}
    if taken not in known:
        raise ExportError(
            f"the UNet takes {taken} channels and gives {given}; std-rt exports those that take {given}, "
            f"{2 * given} (with content latents, as InstructPix2Pix) or {2 * given + 1} (inpainting)"
        )
    return known[taken]


def _check_vae(config: Mapping[str, Any], taken: int) -> None:
    """Raise ExportError unless the VAE's latents are those of the UNet: ``taken`` channels, one scale."""
    given = config.get("latent_channels", 4)
    if given != taken:
        raise ExportError(
            f"the VAE has {given} latent channels, the UNet {taken}; give the matching one with --vae"
        )
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ExportError(f"the VAE has {key}, which std-rt does not export")


def _encoder_folder(options: ExportOptions, adapter: Path) -> Path:
    """As asked, in the pipeline, or beside the adapter as the hub's repositories have it."""
    return find_encoder(adapter, options.image_encoder, options.source / "image_encoder")


def _own_style(encoder: StyleEncoder) -> Style:
    negative, config = encoder.negative(), plain_config(encoder)
    _, count, dim = negative.shape
    text_dim = int(config["pooled_dim"])
    return Style(encoder, "StyleEncoder", config, encoder.image_px, count, dim, text_dim, negative)


def _clip_style(style: ClipStyleEncoder) -> Style:
    config = {
        "image_encoder": plain_config(style.module["image_encoder"]),
        "image_proj": projection_config(style.module["image_proj"]),
        "reads_hidden": style.reads_hidden,
        "mean": list(style.mean),
        "std": list(style.std),
    }
    negative = style.negative()
    _, count, dim = negative.shape
    return Style(style, "ClipStyleEncoder", config, style.image_px, count, dim, None, negative)


def _digest(path: Path) -> str:
    """sha256 of a file; of a folder's weights and configs: sha256 over their names and hashes."""
    if path.is_file():
        return file_digest(path)
    listed = sorted(p for pattern in ("**/*.safetensors", "**/*.json") for p in path.glob(pattern))
    lines = [f"{p.relative_to(path).as_posix()} {_digest(p)}" for p in listed]
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()
