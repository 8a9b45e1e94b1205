"""Parts of an SDXL-layout diffusers folder as fp32 torch modules.

Classes are looked up by the ``_class_name`` in a part's ``config.json``; nothing else is executed.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from std_rt.core.errors import ExportError
from std_rt.models.autoencoder import AutoencoderPixelShuffle
from std_rt.models.style_encoder import StyleEncoder
from std_rt.models.weight_files import check_weights

__all__ = [
    "CLASSES",
    "TEXT_ROLES",
    "Network",
    "check_part",
    "has_fp16_only",
    "load_part",
    "motion_unet",
    "plain_config",
    "quiet",
    "read_config",
    "read_json",
    "resolve",
    "text_roles",
]

# It says with which package its image processors, of which none is used here, would be faster.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "torchvision" not in record.getMessage()
)

# A network of diffusers or transformers: packages without types, so their attributes are not checked.
Network = Any

# The classes that each part may have; any other is refused.
CLASSES: dict[str, tuple[Any, ...]] = {
    "unet": (UNet2DConditionModel,),
    "motion_adapter": (MotionAdapter,),
    "vae": (AutoencoderKL, AutoencoderTiny, AutoencoderPixelShuffle),
    "image_encoder": (CLIPVisionModelWithProjection, StyleEncoder),
    "text_encoder": (CLIPTextModel,),
    "text_encoder_2": (CLIPTextModelWithProjection,),
}
TEXT_ROLES = ("text_encoder", "text_encoder_2")


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """No warnings, no output, and nothing from the named loggers; exceptions pass.

    For libraries that report to their developers what no user can act on. Their progress bars, over a few
    milliseconds for each part, would bury ours, and stay off.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    found = [logging.getLogger(name) for name in loggers]
    before = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(found, before, strict=True):
            logger.setLevel(level)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ExportError if it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path} cannot be read ({error}); is this an SDXL-layout diffusers folder?"
        ) from error
    if not isinstance(found, dict):
        raise ExportError(f"{path} is not a JSON object; is this an SDXL-layout diffusers folder?")
    return found


def resolve(role: str, name: str) -> Any:
    """The class of a part by its name. Raises ExportError for a class that export does not know."""
    known = {kind.__name__: kind for kind in CLASSES[role]}
    if name not in known:
        raise ExportError(f"{role} is of class {name}; std-rt exports {', '.join(known)}")
    return known[name]


def read_config(role: str, folder: Path) -> dict[str, Any]:
    """A part's ``config.json``. Raises ExportError if there is no such part."""
    if not (folder / "config.json").is_file():
        raise ExportError(f"no {role} in {folder.parent}: {folder / 'config.json'} is missing")
    return read_json(folder / "config.json")


def text_roles(pipeline: Path) -> tuple[str, ...]:
    """The text encoders that a pipeline folder has."""
    return tuple(role for role in TEXT_ROLES if (pipeline / role / "config.json").is_file())


def check_part(role: str, folder: Path) -> Any:
    """The class of a part, whose weights are there and whole but not read. Raises ExportError."""
    config = read_config(role, folder)
    kind = resolve(role, config.get("_class_name") or (config.get("architectures") or ["none"])[0])
    check_weights(folder)
    if not list(folder.glob("*.safetensors")):
        raise ExportError(
            f"no .safetensors weights in {folder}; convert .bin weights with save_pretrained first"
        )
    return kind


def has_fp16_only(folder: Path) -> bool:
    """Whether a part's weights have the variant fp16 only, as in many folders from the hub."""
    names = [path.name for path in folder.glob("*.safetensors")]
    return bool(names) and all(".fp16" in name for name in names)


def load_part(role: str, folder: Path) -> Network:
    """One part in fp32, ready for inference. Raises ExportError."""
    kind = check_part(role, folder)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    if kind.__name__.startswith("CLIP"):
        options |= {"dtype": torch.float32, "attn_implementation": "eager"}
    else:
        options |= {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    if has_fp16_only(folder):
        options["variant"] = "fp16"
    try:
        with quiet():
            return kind.from_pretrained(folder, **options).float().eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(
            f"{role} in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error


def plain_config(module: Network) -> dict[str, Any]:
    """A module's config as JSON values, without what diffusers and transformers note about files."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    dropped = ("dtype", "torch_dtype", "transformers_version")
    kept = {key: value for key, value in config.items() if key[0] != "_" and key not in dropped}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=list))
    return plain


def motion_unet(unet: Network, adapter: Network, *, weights: bool = True) -> Network:
    """diffusers' UNetMotionModel of an SDXL UNet and a motion adapter, all weights of the two in it.

    ``weights`` False: the architecture alone, on torch's current device. Raises ValueError or RuntimeError if
    they do not fit together. Of a UNet whose time embedding scales and shifts (std-tiny), the layers are not
    copied but shared.
    """
    shares = unet.config.resnet_time_scale_shift != "default"
    with quiet("diffusers"):
        motion = UNetMotionModel.from_unet2d(unet, adapter, load_weights=weights and not shares)
    if shares:  # the blocks of diffusers 0.42 could have such layers, but its UNetMotionModel makes others
        _share_layers(unet, motion)
        if weights:
            motion.load_motion_modules(adapter)
    elif weights:  # diffusers 0.42 forgets this layer, and what it leaves there is random
        motion.add_embedding.load_state_dict(unet.add_embedding.state_dict())
    if (shares or not weights) and unet.encoder_hid_proj is not None:  # it takes image branches over so only
        motion.set_attn_processor({**motion.attn_processors, **unet.attn_processors})
        motion.encoder_hid_proj = unet.encoder_hid_proj
        motion.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return motion


def _share_layers(unet: Network, motion: Network) -> None:
    """Put the layers of ``unet`` in the place of those that ``motion`` has beside its motion modules."""
    for name in ("conv_in", "time_embedding", "add_embedding", "conv_norm_out", "conv_out"):
        setattr(motion, name, getattr(unet, name))
    ours, theirs = ([*u.down_blocks, u.mid_block, *u.up_blocks] for u in (motion, unet))
    for block, source in zip(ours, theirs, strict=True):
        for name in ("resnets", "attentions", "downsamplers", "upsamplers"):
            if hasattr(source, name):
                setattr(block, name, getattr(source, name))
