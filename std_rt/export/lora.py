"""Fuse LoRAs into the UNet (and text encoders) in fp32, before anything is traced."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as XL
from diffusers.utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from std_rt.digest import unet_digest
from std_rt.errors import ExportError
from std_rt.export.quiet import quiet

__all__ = ["fuse_lora", "read_metadata", "source_digest"]


def read_metadata(path: Path) -> dict[str, str]:
    """A LoRA file's own notes (``eta``, ``tau``, ``steps``, ...). Raises ExportError where unreadable."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ExportError(f"LoRA {path} cannot be read: {error}; give a .safetensors file") from error


def source_digest(folder: Path) -> str:
    """``unet_digest`` of a diffusers UNet folder, from the headers of its files; no weight is read.

    Raises ExportError where a file is damaged. A folder without weights has the digest of nothing.
    """
    shapes: dict[str, list[int]] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{path} cannot be read: {error}; download it again") from error
    return unet_digest(shapes)


def _weight_files(folder: Path) -> list[Path]:
    """One file or its shards, as diffusers chooses; halves only where there is nothing else."""
    for stem in ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16"):
        for pattern in (f"{stem}.safetensors", f"{stem}-*-of-*.safetensors"):
            if found := sorted(folder.glob(pattern)):
                return found
    return []


def fuse_lora(parts: Mapping[str, nn.Module], path: Path, scale: float) -> None:
    """Add ``scale`` times the LoRA to ``parts`` (in place): ``unet`` and, where present, the text encoders.

    Reads diffusers', PEFT's and kohya's key names and honours alpha. Raises ExportError where the file
    holds anything that does not fit, rather than fusing the rest.
    """
    unet = parts["unet"]
    try:
        state, alphas, metadata = XL.lora_state_dict(
            {key: value.float() for key, value in _load(path).items()},
            unet_config=unet.config,
            return_lora_metadata=True,
        )
    except (ValueError, KeyError) as error:
        raise ExportError(f"LoRA {path} has unknown key names: {error}") from error
    metadata = metadata or _adapter_metadata(path)
    for role in sorted({key.partition(".")[0] for key in state}):
        if role not in parts:
            raise ExportError(f"LoRA {path} changes {role}, which this pipeline does not have")
        _fuse_part(role, parts[role], state, alphas, metadata, path, scale)


def _load(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)


def _adapter_metadata(path: Path) -> dict[str, Any] | None:
    """diffusers keeps rank and alpha as JSON in the file's metadata, and reads it only from a path."""
    text = read_metadata(path).get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ExportError(f"LoRA {path} has damaged notes (lora_adapter_metadata: {error})") from error
    return found


def _fuse_part(
    role: str,
    module: nn.Module,
    state: dict[str, Tensor],
    alphas: dict[str, Any] | None,
    metadata: dict[str, Any] | None,
    path: Path,
    scale: float,
) -> None:
    # a.b.to_q.lora_A.weight, a.b.to_q.lora.down.weight and a.b.to_q_lora.down.weight are one layer each.
    expected = {re.split(r"[._]lora", key)[0] for key in state if key.startswith(f"{role}.")}
    try:
        with quiet("diffusers", "peft"):
            if role == "unet":
                XL.load_lora_into_unet(state, alphas, module, metadata=metadata)
            else:
                XL.load_lora_into_text_encoder(state, alphas, module, prefix=role, metadata=metadata)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ExportError(
            f"LoRA {path} does not fit the {role}: {' '.join(str(error).split())[:300]}"
        ) from error
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    if len(layers) != len(expected):
        raise ExportError(
            f"LoRA {path} has weights for {len(expected)} layers of the {role}, of which {len(layers)} fit; "
            "it was made for another model"
        )
    for layer in layers.values():
        layer.scale_layer(scale)
        layer.merge()
    recurse_remove_peft_layers(module)
    _forget(module)
    left = [name for name, _ in module.named_parameters() if "lora_" in name]
    assert not left, f"LoRA layers left after fusing: {left[:3]}"


def _forget(module: nn.Module) -> None:
    """Drop PEFT's notes, so that the next LoRA loads as the first did."""
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if hasattr(module, name):
            delattr(module, name)
