"""A small random motion adapter and video LoRA in diffusers' layout, for `write_clip_pipeline`'s UNet."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from safetensors.torch import save_file
from support.pipelines import randomize

__all__ = ["motion_unet", "write_motion_adapter", "write_v2v_lora"]

# What the published v2v LoRAs change: image layers, and in every motion module these.
_BLOCK = "transformer_blocks.0"
_MOTION_LAYERS = (
    *("proj_in", "proj_out", f"{_BLOCK}.ff.net.0.proj", f"{_BLOCK}.ff.net.2"),
    *(f"{_BLOCK}.{attn}.to_{to}" for attn in ("attn1", "attn2") for to in ("q", "k", "v", "out.0")),
)


def write_motion_adapter(
    folder: Path, widths: tuple[int, ...] = (16, 32), *, layers: int = 2, longest: int = 16, seed: int = 0
) -> Path:
    """A MotionAdapter folder for a UNet of these widths, as SDXL's: without a module in the middle."""
    torch.manual_seed(seed)
    adapter = MotionAdapter(
        block_out_channels=widths,
        motion_layers_per_block=layers,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=longest,
        use_motion_mid_block=False,
    )
    randomize(adapter, seed + 11).save_pretrained(folder)
    return folder


def motion_unet(pipeline: Path, adapter: Path) -> UNetMotionModel:
    """What diffusers makes of the two, with all weights of the first."""
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet", low_cpu_mem_usage=False)
    motion = UNetMotionModel.from_unet2d(unet, MotionAdapter.from_pretrained(adapter))
    motion.add_embedding.load_state_dict(unet.add_embedding.state_dict())  # which diffusers leaves random
    return motion.eval()


def write_v2v_lora(path: Path, unet: UNetMotionModel, *, prefix: str = "", rank: int = 2) -> Path:
    """A LoRA in the published layout on every ``to_q`` of the picture's layers, and all motion layers.

    ``prefix``: before every key, as the ``base_model.model.`` of PEFT.
    """
    rng = torch.Generator().manual_seed(3)
    state = {}
    for name, module in unet.named_modules():
        motion = name.partition(".motion_modules.")[2].partition(".")[2]
        if motion in _MOTION_LAYERS or (not motion and name.endswith(".to_q")):
            out, inner = module.weight.shape
            state[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, inner, generator=rng) * 0.3
            state[f"{prefix}{name}.lora_B.weight"] = torch.randn(out, rank, generator=rng) * 0.3
    save_file(state, path, {"format": "pt"})
    return path
