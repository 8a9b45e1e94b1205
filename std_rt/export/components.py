"""Read the parts of an SDXL-layout diffusers folder into fp32 torch modules.

Classes are looked up by the ``_class_name`` in a part's ``config.json``; nothing else is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from std_rt.core.errors import ExportError
from std_rt.export.sources.weight_files import check_weights

__all__ = ["CLASSES", "Network", "load_part", "plain_config", "read_config", "read_json", "resolve"]

# A network of diffusers or transformers: packages without types, so their attributes are not checked.
Network = Any

# _class_name -> module that has it. A name outside this table is refused.
CLASSES: dict[str, dict[str, str]] = {
    "unet": {"UNet2DConditionModel": "diffusers"},
    "vae": {
        "AutoencoderKL": "diffusers",
        "AutoencoderTiny": "diffusers",
        "AutoencoderPixelShuffle": "std_rt.models.autoencoder",
    },
    "image_encoder": {
        "CLIPVisionModelWithProjection": "transformers",
        "StyleEncoder": "std_rt.models.style_encoder",
    },
    "text_encoder": {"CLIPTextModel": "transformers"},
    "text_encoder_2": {"CLIPTextModelWithProjection": "transformers"},
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ExportError where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path} cannot be read ({error}); is this an SDXL-layout diffusers folder?"
        ) from error
    if not isinstance(found, dict):
        raise ExportError(f"{path} holds no JSON object; is this an SDXL-layout diffusers folder?")
    return found


def resolve(role: str, name: str) -> type[nn.Module]:
    """The class of a part. Raises ExportError for a class that export does not know."""
    known = CLASSES[role]
    if name not in known:
        raise ExportError(f"{role} is of class {name}; std-rt exports {', '.join(known)}")
    found: type[nn.Module] = getattr(import_module(known[name]), name)
    return found


def read_config(role: str, folder: Path) -> dict[str, Any]:
    """A part's ``config.json``. Raises ExportError where there is no such part."""
    if not (folder / "config.json").is_file():
        raise ExportError(f"no {role} in {folder.parent}: {folder / 'config.json'} is missing")
    return read_json(folder / "config.json")


def load_part(role: str, folder: Path) -> Network:
    """Load one part in fp32, ready for inference. Raises ExportError."""
    config = read_config(role, folder)
    name = config.get("_class_name") or (config.get("architectures") or ["none"])[0]
    load: Callable[..., nn.Module] = resolve(role, name).from_pretrained  # type: ignore[attr-defined]
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    if role.startswith("text") or name.startswith("CLIP"):
        options |= {"dtype": torch.float32, "attn_implementation": "eager"}
    else:
        options |= {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    check_weights(folder)
    variant = _variant(folder)
    if variant is not None:
        options["variant"] = variant
    _no_progress_bars()
    try:
        return load(folder, **options).float().eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(
            f"{role} in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error


def _no_progress_bars() -> None:
    """Bars over a few milliseconds, one for each part, would bury ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _variant(folder: Path) -> str | None:
    """``fp16`` where only ``*.fp16.safetensors`` lies there, as in many folders from the hub."""
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise ExportError(
            f"no .safetensors weights in {folder}; convert .bin weights with save_pretrained first"
        )
    return None if any(".fp16" not in path.name for path in files) else "fp16"


def plain_config(module: Network) -> dict[str, Any]:
    """A module's config as JSON values, without what diffusers and transformers note about files."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in ("dtype", "torch_dtype", "transformers_version"):
        kept.pop(key, None)
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=list))
    return plain
