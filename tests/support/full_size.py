"""An SDXL at its true sizes with random weights, in the hub's file layout: 2.57 B parameters in the UNet.

    python tests/full_size.py FOLDER        about 9 GB: a pipeline, an IP-Adapter Plus, a rank-64 LoRA

Weights are slices of one random block, scaled by each layer's fan-in, so that activations neither die nor
overflow and a file of any size costs no more than writing it. Files are written tensor by tensor.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from support.pipelines import write_json, write_tokenizer
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from std_rt.models.weight_files import Slot, write_weights

__all__ = ["write_full_size"]

UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": False,  # as the VAE that was mended for fp16
}
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 54, "eos_token_id": 55}
TEXT_1 = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **TEXT
)
TEXT_2 = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
    **TEXT,
)
VISION = CLIPVisionConfig(  # ViT-H/14
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    projection_dim=1024,
    hidden_act="gelu",
)
LORA_RANK = 64
# As published: attention, feed-forward, convolutions, samplers, time embeddings, projections.
LORA_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "samplers.0.conv", "time_emb_proj"),
)

Shapes = Mapping[str, tuple[int, ...]]


def write_full_size(folder: Path) -> None:
    """Pipeline, ``ip_adapter.safetensors`` and ``lora.safetensors`` in ``folder``."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        parts: dict[str, nn.Module] = {
            "unet": unet,
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(TEXT_1),
            "text_encoder_2": CLIPTextModelWithProjection(TEXT_2),
            "image_encoder": CLIPVisionModelWithProjection(VISION),
        }
        projection = IPAdapterPlusImageProjection(1280, 2048, 1280, 4, 20, 64, 16)
    for name, part in parts.items():
        _write_part(folder / name, part)
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name, length=77)
    _write_adapter(folder / "ip_adapter.safetensors", unet, projection)
    _write_lora(folder / "lora.safetensors", unet)
    _write_configs(folder)


def _write_part(folder: Path, part: nn.Module) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = part.config
    if hasattr(config, "to_diff_dict"):
        write_json(folder / "config.json", {"architectures": [type(part).__name__], **config.to_diff_dict()})
        name = "model.safetensors"
    else:
        kept = {key: value for key, value in dict(config).items() if not key.startswith("_")}
        write_json(folder / "config.json", {"_class_name": type(part).__name__, **kept})
        name = "diffusion_pytorch_model.safetensors"
    shapes = {key: tuple(value.shape) for key, value in part.state_dict().items()}
    _write(folder / name, {key: shape for key, shape in shapes.items() if "position_ids" not in key})


def _write_adapter(path: Path, unet: nn.Module, projection: nn.Module) -> None:
    """Under the published keys: the projection's are those that diffusers renames."""
    shapes = {f"image_proj.{_published(k)}": tuple(v.shape) for k, v in projection.state_dict().items()}
    for i in range(4):  # to_k and to_v are one matrix there
        shapes.pop(f"image_proj.layers.{i}.0.to_v.weight", None)
        inner, width = shapes.pop(f"image_proj.layers.{i}.0.to_k.weight")
        shapes[f"image_proj.layers.{i}.0.to_kv.weight"] = (2 * inner, width)
    layers = [name.removesuffix(".processor") for name in unet.attn_processors]
    for i, layer in enumerate(layers):
        if layer.endswith("attn2"):
            width = unet.get_submodule(layer).to_k.weight.shape[0]
            for kind in ("to_k_ip", "to_v_ip"):
                shapes[f"ip_adapter.{i}.{kind}.weight"] = (width, 2048)
    _write(path, shapes)


def _published(key: str) -> str:
    """diffusers' name of a resampler weight -> the name it is published under."""
    for ours, theirs in (
        (".ln0.", ".0.norm1."),
        (".ln1.", ".0.norm2."),
        (".attn.to_out.0.", ".0.to_out."),
        (".attn.", ".0."),
        (".ff.0.", ".1.0."),
        (".ff.1.net.0.proj.", ".1.1."),
        (".ff.1.net.2.", ".1.3."),
    ):
        key = key.replace(ours, theirs)
    return key


def _write_lora(path: Path, unet: nn.Module) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(LORA_LAYERS):
            out, inner, *kernel = module.weight.shape
            shapes[f"unet.{name}.lora_A.weight"] = (LORA_RANK, inner, *kernel)
            shapes[f"unet.{name}.lora_B.weight"] = (out, LORA_RANK, *(1 for _ in kernel))
    _write(path, shapes, gain=0.3)


def _write_configs(folder: Path) -> None:
    scheduler = {
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
    }
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionXLPipeline"})


def _write(path: Path, shapes: Shapes, gain: float = 0.7) -> None:
    """A safetensors file in fp16, one tensor at a time."""
    write_weights(path, {key: Slot("F16", shape) for key, shape in shapes.items()}, _values(shapes, gain))


def _values(shapes: Shapes, gain: float) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    block = rng.standard_normal(1 << 22).astype(np.float32)
    for key, shape in shapes.items():
        size = math.prod(shape)
        start = int(rng.integers(len(block)))
        drawn = np.resize(np.roll(block, -start), size)
        if len(shape) == 1:
            scale, shift = (0.1, 1.0) if "norm" in key and key.endswith("weight") else (0.02, 0.0)
        else:
            scale, shift = gain * math.prod(shape[1:]) ** -0.5, 0.0
        yield (drawn * np.float32(scale) + np.float32(shift)).astype(np.float16)


if __name__ == "__main__":
    write_full_size(Path(sys.argv[1]))
