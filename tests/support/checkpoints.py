"""The miniature SDXL of `pipelines.py` in other people's formats: a checkpoint in the original key layout."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from std_rt.export.lora_fusion import original_names

__all__ = ["original_state", "write_checkpoint"]

_CLIP_G = (
    ("text_model.", ""),
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
    ("encoder.layers", "transformer.resblocks"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
)
_VAE = (
    (r"conv_norm_out", "norm_out"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
    (r"\.resnets\.", ".block."),
    (r"(down|up)samplers\.0\.conv", r"\1sample.conv"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"down_blocks\.", "down."),
)


def write_checkpoint(path: Path, pipeline: Path, *, vae: bool = True, **extra: Tensor) -> Path:
    """``pipeline`` (a diffusers folder) as one file in the layout of the original SDXL code."""
    state = original_state(pipeline) | extra
    if not vae:
        state = {key: value for key, value in state.items() if not key.startswith("first_stage_model.")}
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def original_state(pipeline: Path) -> dict[str, Tensor]:
    """Every weight under its original name and in its original shape."""
    state = {f"model.diffusion_model.{key}": value for key, value in _unet(pipeline / "unet").items()}
    state |= {f"first_stage_model.{key}": value for key, value in _vae(pipeline / "vae").items()}
    clip = load_file(pipeline / "text_encoder" / "model.safetensors")
    start = "conditioner.embedders.0.transformer.text_model."
    state |= {start + key.removeprefix("text_model."): value for key, value in clip.items()}
    state[f"{start}embeddings.position_ids"] = torch.arange(12).unsqueeze(0)
    other = _open_clip(load_file(pipeline / "text_encoder_2" / "model.safetensors"))
    return state | {f"conditioner.embedders.1.model.{key}": value for key, value in other.items()}


def _unet(folder: Path) -> dict[str, Tensor]:
    unet = UNet2DConditionModel.from_pretrained(folder)
    names = original_names(unet)
    state = {}
    for key, value in unet.state_dict().items():
        name, _, kind = key.rpartition(".")
        state[f"{names[name]}.{kind}"] = value
    return state


def _vae(folder: Path) -> dict[str, Tensor]:
    found = load_file(folder / "diffusion_pytorch_model.safetensors")
    top = max(int(match[1]) for key in found if (match := re.search(r"up_blocks\.(\d+)", key)))
    state = {}
    for key, value in found.items():
        for pattern, new in _VAE:
            key = re.sub(pattern, new, key)
        key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{top - int(match[1])}", key)
        is_projection = "attn_1" in key and key.endswith("weight") and value.ndim == 2
        state[key] = value[:, :, None, None] if is_projection else value
    return state


def _open_clip(found: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {"text_projection": found.pop("text_projection.weight").T, "logit_scale": torch.tensor(4.6)}
    parts: dict[str, list[Tensor]] = {}
    for key in sorted(found):
        match = re.fullmatch(r"(.+self_attn)\.([qkv])_proj\.(weight|bias)", key)
        if match is None:
            state[_renamed(key)] = found[key]
        else:
            target = f"{_renamed(match[1]).replace('self_attn', 'attn')}.in_proj_{match[3]}"
            parts.setdefault(target, []).append(
                found[f"{match[1]}.{'qkv'[len(parts.get(target, []))]}_proj.{match[3]}"]
            )
    return state | {key: torch.cat(values) for key, values in parts.items()}


def _renamed(key: str) -> str:
    for old, new in _CLIP_G:
        key = key.replace(old, new)
    return key
