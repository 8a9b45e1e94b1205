"""A bundle's weights in torch, in diffusers' own modules: for comparisons, and to train on."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import embeddings
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from std_rt.core.bundle import Bundle
from std_rt.core.errors import BundleError, one_line
from std_rt.models.clip_style import ClipStyleEncoder
from std_rt.models.components import resolve
from std_rt.models.ip_adapter import attach_diffusers

__all__ = ["load_torch_components"]


def load_torch_components(bundle: Bundle) -> dict[str, nn.Module]:
    """``unet``, ``vae`` and ``style_encoder`` in fp32, ready for inference, from the bundle's own weights.

    The UNet has diffusers' IP-Adapter processors and takes projected tokens:
    ``unet(x, t, text, added_cond_kwargs={"text_embeds", "time_ids", "image_embeds": [style_tokens]})``.
    ``style_encoder(style_image)`` gives tokens, or (tokens, text_embeds). The VAE is diffusers' (or
    ours); its scaling is not applied. Raises BundleError if weights and configs do not fit.
    """
    if "quantized" in bundle.manifest:
        origin = bundle.manifest["quantized"]["from"]["name"]
        raise BundleError(
            f"bundle '{bundle.name}' is in int8 and has no torch weights; use the bundle it was made from: "
            f"{origin}"
        )
    graphs = bundle.manifest["graphs"]
    unet = _build("unet", graphs["unet"])
    state = _state(bundle, "unet")
    branches = {
        layer: (
            state.pop(f"{layer}.processor.to_k_ip.0.weight"),
            state.pop(f"{layer}.processor.to_v_ip.0.weight"),
        )
        for layer in bundle.style["layout"]["layers"]
    }
    _fill(bundle, "unet", unet, state)
    attach_diffusers(unet, branches, int(bundle.style["tokens"]))

    vae = _build("vae", graphs["vae_decoder"])
    _fill(bundle, "vae", vae, _state(bundle, "vae_encoder") | _state(bundle, "vae_decoder"))

    entry = graphs["style_encoder"]
    is_clip = entry["class"] == "ClipStyleEncoder"
    style = _clip(entry["config"]) if is_clip else _build("image_encoder", entry)
    inner = style.module if isinstance(style, ClipStyleEncoder) else style
    _fill(bundle, "style_encoder", inner, _state(bundle, "style_encoder"))
    parts = {"unet": unet, "vae": vae, "style_encoder": style}
    return {name: part.float().eval().requires_grad_(False) for name, part in parts.items()}


def _build(role: str, entry: dict[str, Any]) -> nn.Module:
    made: nn.Module = resolve(role, entry["class"]).from_config(entry["config"])
    return made


def _state(bundle: Bundle, graph: str) -> dict[str, Tensor]:
    """The module's ``state_dict``; out of a shared file, only the keys that the manifest renames."""
    stored = load_file(bundle.weights_path(graph))
    state = {key: value.float() for key, value in stored.items() if not key.startswith("constant.")}
    renamed = bundle.manifest["graphs"][graph].get("renamed")
    if not renamed:
        return state
    return {
        ours + key.removeprefix(theirs): value
        for theirs, ours in renamed.items()
        for key, value in state.items()
        if key.startswith(theirs)
    }


def _fill(bundle: Bundle, graph: str, module: nn.Module, state: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = one_line(error, 200)
        raise BundleError(f"bundle '{bundle.name}': weights of {graph} do not fit: {reason}") from error


def _clip(config: dict[str, Any]) -> ClipStyleEncoder:
    kinds = {
        "IPAdapterPlusImageProjection": embeddings.IPAdapterPlusImageProjection,
        "ImageProjection": embeddings.ImageProjection,
    }
    vision = CLIPVisionConfig(**config["image_encoder"], attn_implementation="eager")
    projection = kinds[config["image_proj"]["class"]](**config["image_proj"]["arguments"])
    with torch.no_grad():
        encoder = CLIPVisionModelWithProjection(vision)
    return ClipStyleEncoder(
        encoder, projection, reads_hidden=config["reads_hidden"], mean=config["mean"], std=config["std"]
    )
