"""IP-Adapter weights in the hub's layout: which layer gets which image branch, and the projection.

``ip_adapter.{1, 3, 5, ...}.to_k_ip.weight`` count the UNet's attention layers in diffusers' order
(down, up, mid; self- and cross-attention in turn), ``image_proj.*`` is the resampler (Plus) or the
linear projection (plain).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from std_rt.errors import ExportError
from std_rt.export.components import Network

__all__ = ["Branches", "attach_diffusers", "choose_layers", "make_projection", "read_ip_adapter"]

Branches = dict[str, tuple[Tensor, Tensor]]

# InstantStyle's choice (arXiv 2404.02733): the one block that carries style in SDXL.
_PUBLISHED = "up_blocks.0.attentions.1."


def read_ip_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``(image_proj, ip_adapter)`` weights without their prefixes, in fp32. Raises ExportError."""
    if path.suffix != ".safetensors":
        raise ExportError(
            f"IP-Adapter weights must be .safetensors, got {path}; the hub has them in both formats"
        )
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"IP-Adapter weights {path} cannot be read: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in state.items():
        prefix, _, rest = key.partition(".")
        if prefix not in parts:
            raise ExportError(f"{path} is no IP-Adapter file: it has a key {key!r}")
        parts[prefix][rest] = value.float()
    return parts["image_proj"], parts["ip_adapter"]


def cross_layers(unet: Network) -> list[str]:
    """Names of the cross-attention layers in diffusers' order."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return [name for name in names if not name.endswith("attn1")]


def pair_branches(unet: Network, weights: Mapping[str, Tensor]) -> Branches:
    """Cross-attention layer -> (to_k_ip, to_v_ip). Raises ExportError where they do not fit the UNet."""
    layers = cross_layers(unet)
    if len(weights) != 2 * len(layers):
        raise ExportError(
            f"the IP-Adapter has weights for {len(weights) // 2} layers, the UNet has {len(layers)}; "
            "it was made for another model"
        )
    branches: Branches = {}
    for i, layer in enumerate(layers):
        pair = tuple(weights.get(f"{2 * i + 1}.{kind}.weight") for kind in ("to_k_ip", "to_v_ip"))
        wanted = unet.get_submodule(layer).to_k.weight.shape
        for found in pair:
            if found is None or found.shape[0] != wanted[0]:
                size = "nothing" if found is None else f"{list(found.shape)}"
                raise ExportError(
                    f"the IP-Adapter has {size} for {layer}, which is {wanted[0]} wide; wrong model?"
                )
        branches[layer] = (pair[0], pair[1])  # type: ignore[assignment]
    return branches


def choose_layers(unet: Network, asked: str, *, own_encoder: bool) -> tuple[str, list[str]]:
    """(layout name, cross-attention layers that keep the image branch).

    ``asked`` is ``all``, ``published``, ``auto`` (all for a model trained with our style encoder, else
    published where the UNet has that block, else all), or layer prefixes separated by commas.
    """
    layers = cross_layers(unet)
    published = [name for name in layers if name.startswith(_PUBLISHED)]
    if asked == "auto":
        asked = "published" if published and not own_encoder else "all"
    if asked == "all":
        return "all", layers
    if asked == "published":
        if not published:
            raise ExportError(
                f"this UNet has no {_PUBLISHED}*, which 'published' keeps; use --style-layers all"
            )
        return "published", published
    prefixes = tuple(part.strip().rstrip(".") + "." for part in asked.split(",") if part.strip())
    kept = [name for name in layers if name.startswith(prefixes)]
    if not prefixes or not kept:
        raise ExportError(
            f"--style-layers {asked!r} fits no layer; use all, published or a prefix of: {layers[0]}"
        )
    return "custom", kept


def attach_diffusers(unet: Network, branches: Branches, tokens: int) -> None:
    """Give ``unet`` (in place) diffusers' own IP-Adapter processors: the reference that export must match.

    Layers outside ``branches`` get a branch of scale 0, which diffusers skips. The UNet then takes
    ``image_embeds=[style_tokens]`` in ``added_cond_kwargs``.
    """
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    processors: dict[str, Any] = {}
    for name, old in unet.attn_processors.items():
        layer = name.removesuffix(".processor")
        if layer.endswith("attn1"):
            processors[name] = old
            continue
        weight = unet.get_submodule(layer).to_k.weight
        style_dim = branches[layer][0].shape[1] if layer in branches else weight.shape[1]
        scale = 1.0 if layer in branches else 0.0
        processor = IPAdapterAttnProcessor2_0(weight.shape[0], style_dim, num_tokens=(tokens,), scale=scale)
        if layer in branches:
            for linear, value in zip(
                (processor.to_k_ip[0], processor.to_v_ip[0]), branches[layer], strict=True
            ):
                linear.weight.data = value
        processors[name] = processor.requires_grad_(False)
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = nn.Identity()
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")


def detach_diffusers(unet: Network) -> None:
    """Undo what `attach_diffusers` did around the processors, which are replaced next."""
    unet.encoder_hid_proj = None
    unet.register_to_config(encoder_hid_dim_type=None)


def make_projection(unet: Network, weights: dict[str, Tensor], path: Path) -> tuple[Network, bool]:
    """(projection, whether it reads CLIP's last hidden layer but one; else the pooled embedding)."""
    try:
        # diffusers' own reading of the published key names; it has no public entrance.
        module = unet._convert_ip_adapter_image_proj_to_diffusers(weights, low_cpu_mem_usage=False)
    except (KeyError, RuntimeError) as error:
        raise ExportError(f"{path} has image_proj weights of an unknown kind: {error}") from error
    if isinstance(module, IPAdapterPlusImageProjection | ImageProjection):
        module = module.float().eval().requires_grad_(False)
        return module, isinstance(module, IPAdapterPlusImageProjection)
    raise ExportError(
        f"{path} is a {type(module).__name__}; std-rt exports IP-Adapter Plus and the plain one"
    )


def projection_config(module: Network) -> dict[str, Any]:
    """What rebuilds the projection: its class and the arguments of its constructor."""
    if isinstance(module, IPAdapterPlusImageProjection):
        hidden, embed = module.proj_in.weight.shape
        first = module.layers[0]
        arguments = {
            "embed_dims": embed,
            "output_dims": module.proj_out.weight.shape[0],
            "hidden_dims": hidden,
            "depth": len(module.layers),
            "heads": first.attn.heads,
            "num_queries": module.latents.shape[1],
            "ffn_ratio": first.ff[1].net[0].proj.weight.shape[0] / hidden,
        }
        return {"class": "IPAdapterPlusImageProjection", "arguments": arguments}
    tokens, dim = module.num_image_text_embeds, module.norm.weight.shape[0]
    arguments = {
        "image_embed_dim": module.image_embeds.weight.shape[1],
        "cross_attention_dim": dim,
        "num_image_text_embeds": tokens,
    }
    return {"class": "ImageProjection", "arguments": arguments}


def projection_tokens(module: Network) -> int:
    """How many style tokens the projection gives."""
    plus = isinstance(module, IPAdapterPlusImageProjection)
    return int(module.latents.shape[1] if plus else module.num_image_text_embeds)
