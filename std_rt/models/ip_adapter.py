"""IP-Adapter weights in the hub's layout: which layer gets which image branch, and the projection.

``ip_adapter.{1, 3, 5, ...}.to_k_ip.weight`` count the UNet's attention layers in diffusers' order
(down, up, mid; self- and cross-attention in turn), ``image_proj.*`` is the resampler (Plus) or the
linear projection (plain). Files are mapped, not loaded: of 70 image branches a style uses 10.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from torch import Tensor, nn

from std_rt.core.errors import ExportError, one_line
from std_rt.models.components import Network, quiet, read_config
from std_rt.models.weight_files import open_weights

__all__ = [
    "Branches",
    "adapter_digest",
    "attach_diffusers",
    "check_encoder",
    "choose_layers",
    "make_projection",
    "projection_reads",
    "read_ip_adapter",
]

# Cross-attention layer -> (to_k_ip, to_v_ip), in fp32.
Branches = Mapping[str, tuple[Tensor, Tensor]]

# What an adapter reads -> (key of the encoder's config with its width, encoders of that width).
_ENCODER_WIDTHS = {
    "hidden": ("hidden_size", {1280: "ViT-H", 1664: "ViT-bigG"}),
    "pooled": ("projection_dim", {1024: "ViT-H", 1280: "ViT-bigG"}),
}
# InstantStyle's choice (arXiv 2404.02733): the one block that carries style in SDXL.
_PUBLISHED = "up_blocks.0.attentions.1."


def read_ip_adapter(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """``(image_proj, ip_adapter)`` weights without their prefixes: the projection in fp32, the branches as
    they lie in the file, unread. ``.safetensors``, or ``.bin`` in which no code can run. Raises ExportError.
    """
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in _read(path).items():
        prefix, _, rest = key.partition(".")
        if prefix not in parts:
            raise ExportError(f"{path} is not an IP-Adapter file: it has a key {key!r}")
        parts[prefix][rest] = value
    _check_kind(path, parts["image_proj"], parts["ip_adapter"])
    return {key: value.float() for key, value in parts["image_proj"].items()}, parts["ip_adapter"]


def projection_reads(path: Path) -> tuple[str, int] | None:
    """What the adapter takes from its image encoder: ("hidden", width) for Plus, ("pooled", width) for the
    plain one, None if it has no projection. Raises ExportError."""
    projection, _ = read_ip_adapter(path)
    for key, kind in (("proj_in.weight", "hidden"), ("proj.weight", "pooled")):
        if key in projection:
            return kind, projection[key].shape[1]
    return None


def check_encoder(path: Path, folder: Path) -> None:
    """Raise ExportError unless the CLIP encoder in ``folder`` gives vectors as wide as the adapter reads."""
    reads = projection_reads(path)
    if reads is None:
        return
    kind, width = reads
    key, names = _ENCODER_WIDTHS[kind]
    gives = read_config("image_encoder", folder).get(key)
    if gives not in (None, width):
        taken, given = (f"{side} ({names[side]})" if side in names else str(side) for side in (width, gives))
        raise ExportError(
            f"{path} reads {kind} vectors of {taken}, and the image encoder in {folder} gives {given}; "
            "give --image-encoder the one it was trained with"
        )


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors by their full names, mapped from the file."""
    if path.suffix == ".bin":
        return _read_bin(path)
    if path.suffix != ".safetensors":
        raise ExportError(f"IP-Adapter weights must be .safetensors or .bin, got {path}")
    with open_weights(path, "IP-Adapter") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)


def _read_bin(path: Path) -> dict[str, Tensor]:
    """torch's format, by the reader that builds tensors and containers and runs nothing else."""
    try:
        with path.open("rb") as stream:
            is_zip = (
                stream.read(4) == b"PK\x03\x04"
            )  # the present format can be mapped, the older is read whole
        with quiet():
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"IP-Adapter weights {path} hold more than tensors, perhaps code, and none of it was run; "
            "get the .safetensors of this adapter"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = one_line(error, 200)
        raise ExportError(f"IP-Adapter weights {path} cannot be read: {reason}") from error
    flat = dict(_flatten(found)) if isinstance(found, dict) else {}
    if not flat:
        raise ExportError(f"{path} is not an IP-Adapter file: it holds no named tensors")
    return flat


def _flatten(found: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """``{"image_proj": {"x": ...}}`` -> ``image_proj.x``."""
    for key, value in found.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")


def _check_kind(path: Path, projection: Mapping[str, Tensor], branches: Mapping[str, Tensor]) -> None:
    """Raises ExportError for adapters that are not of SDXL's two kinds."""
    if any("lora" in key for key in branches) or any(
        key.startswith(("perceiver_resampler.", "proj.0.", "id_encoder")) for key in projection
    ):
        raise ExportError(
            f"{path} is a FaceID or full-face adapter, which encodes a face, not a style; "
            "give IP-Adapter Plus or the plain one"
        )
    widths = {value.shape[1] for key, value in branches.items() if key.endswith("to_k_ip.weight")}
    families = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
    for width in widths & families.keys() if projection else ():  # our own encoders have any width
        raise ExportError(
            f"{path} was made for {families[width]} (its tokens are {width} wide, SDXL's are 2048); "
            "give one for SDXL, such as --ip-adapter plus"
        )


def cross_layers(unet: Network) -> list[str]:
    """Names of the cross-attention layers in diffusers' order."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return [name for name in names if not name.endswith("attn1")]


class _MappedBranches(Branches):
    """Branches that are read, in fp32, when they are taken out."""

    def __init__(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self._pairs = pairs

    def __getitem__(self, layer: str) -> tuple[Tensor, Tensor]:
        key, value = self._pairs[layer]
        return key.float(), value.float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


def pair_branches(unet: Network, weights: Mapping[str, Tensor]) -> Branches:
    """Cross-attention layer -> (to_k_ip, to_v_ip). Raises ExportError if they do not fit the UNet.

    Only shapes are looked at; a branch is read from the file when it is taken out.
    """
    layers = cross_layers(unet)
    if len(weights) != 2 * len(layers):
        raise ExportError(
            f"the IP-Adapter has weights for {len(weights) // 2} layers, the UNet has {len(layers)}; "
            "it was made for another model"
        )
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for i, layer in enumerate(layers):
        pair = tuple(weights.get(f"{2 * i + 1}.{kind}.weight") for kind in ("to_k_ip", "to_v_ip"))
        wanted = unet.get_submodule(layer).to_k.weight.shape
        for found in pair:
            if found is None or found.shape[0] != wanted[0]:
                size = "nothing" if found is None else f"{list(found.shape)}"
                raise ExportError(
                    f"the IP-Adapter has {size} for {layer}, which is {wanted[0]} wide; wrong model?"
                )
        pairs[layer] = (pair[0], pair[1])  # type: ignore[assignment]
    return _MappedBranches(pairs)


def choose_layers(unet: Network, asked: str, *, own_encoder: bool) -> tuple[str, list[str]]:
    """(layout name, cross-attention layers that keep the image branch).

    ``asked`` is ``all``, ``published``, ``auto`` (all for a model trained with our style encoder, else
    published if the UNet has that block, else all), or layers or their prefixes separated by commas.
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
    kept = [name for name in layers if f"{name}.".startswith(prefixes)]
    if not prefixes or not kept:
        raise ExportError(
            f"--style-layers {asked!r} fits no layer; use all, published or a prefix of: {layers[0]}"
        )
    named = {"all": layers, "published": published}
    return next((name for name, known in named.items() if kept == known), "custom"), kept


def adapter_digest(path: Path) -> str:
    """sha256 over all tensors, in the order of their names: the same for a .bin and its .safetensors.

    Reads the whole file. Raises ExportError.
    """
    projection, branches = read_ip_adapter(path)
    whole = {f"image_proj.{k}": v for k, v in projection.items()}
    whole |= {f"ip_adapter.{k}": v for k, v in branches.items()}
    digest = hashlib.sha256()
    for name in sorted(whole):
        value = whole[name].float().contiguous()
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def attach_diffusers(unet: Network, branches: Branches, tokens: int) -> None:
    """Give ``unet`` (in place) diffusers' own IP-Adapter processors: the reference that export must match.

    Layers outside ``branches`` get a processor without a branch. The UNet then takes
    ``image_embeds=[style_tokens]`` in ``added_cond_kwargs``, tokens ``[B, T, D]`` or ``[B, 1, T, D]``.
    """
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    processors: dict[str, Any] = {}
    for name, old in unet.attn_processors.items():
        layer = name.removesuffix(".processor")
        if layer.endswith("attn1") or ".motion_modules." in layer:  # a motion module attends to its frames
            processors[name] = old
            continue
        if layer not in branches:
            processors[name] = IPAdapterAttnProcessor2_0(0, 0, num_tokens=())
            continue
        weights = branches[layer]
        processor = IPAdapterAttnProcessor2_0(*weights[0].shape, num_tokens=(tokens,))
        for linear, value in zip((processor.to_k_ip[0], processor.to_v_ip[0]), weights, strict=True):
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
    arguments = {
        "image_embed_dim": module.image_embeds.weight.shape[1],
        "cross_attention_dim": module.norm.weight.shape[0],
        "num_image_text_embeds": module.num_image_text_embeds,
    }
    return {"class": "ImageProjection", "arguments": arguments}
