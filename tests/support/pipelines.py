"""Small SDXL-layout pipelines on disk, in exactly the hub's file layout, with random weights.

`write_clip_pipeline` has what SDXL has: a KL autoencoder, two CLIP text encoders with their tokenizers,
and IP-Adapter Plus with a CLIP picture encoder in the published key format. `write_own_pipeline` has what
std-tiny has: our style encoder, our autoencoder, no text. Every weight is random, biases and norms too, so
that a lost or swapped one shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from std_rt.core.schedule import NoiseSchedule
from std_rt.models.autoencoder import AutoencoderPixelShuffle
from std_rt.models.style_encoder import StyleEncoder

__all__ = [
    "randomize",
    "write_clip_pipeline",
    "write_ip_adapter",
    "write_json",
    "write_lora",
    "write_own_pipeline",
    "write_plain_ip_adapter",
    "write_text_lora",
    "write_tiny_vae",
    "write_tokenizer",
]

TEXT_DIMS = (16, 24)  # text_encoder, text_encoder_2; the UNet sees both side by side
POOLED = 20
TIME_DIM = 8
VISION_PX = 32
STYLE_TOKENS = 4


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Small random values in every parameter, around 1 for the weights of norms."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=rng)
            if value.ndim < 2:
                around = 1.0 if name.endswith("weight") else 0.0
                value.copy_(around + 0.1 * noise)
            else:
                value.copy_(noise * value[0].numel() ** -0.5)
    return module.eval()


def write_clip_pipeline(
    folder: Path,
    *,
    seed: int = 0,
    trained_betas: bool = False,
    layers_per_block: int = 2,
    levels: Literal[1, 2] = 2,
    in_channels: int = 4,
    class_name: str = "StableDiffusionXLPipeline",
) -> Path:
    """An SDXL in miniature; latents are 4x smaller than the picture, the UNet halves them once more.

    With one level it does not: the blocks with attention are left, and what is exported is traced sooner.
    The UNet takes ``in_channels``: 8 as InstructPix2Pix, 9 as inpainting models.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(16, 32)[-levels:],
        layers_per_block=layers_per_block,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[-levels:],
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[:levels],
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4)[-levels:],
        cross_attention_dim=sum(TEXT_DIMS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME_DIM,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    randomize(unet, seed).save_pretrained(folder / "unet")
    randomize(vae, seed + 1).save_pretrained(folder / "vae")
    _write_scheduler(folder, trained_betas)
    for i, (role, kind) in enumerate(
        (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection))
    ):
        write_tokenizer(folder / role.replace("text_encoder", "tokenizer"))
        randomize(kind(_text_config(TEXT_DIMS[i])), seed + 2 + i).save_pretrained(folder / role)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=VISION_PX,
        patch_size=8,
        projection_dim=12,
    )
    randomize(CLIPVisionModelWithProjection(vision), seed + 4).save_pretrained(folder / "image_encoder")
    write_ip_adapter(folder / "ip_adapter.safetensors", unet, seed=seed + 5)
    _write_index(folder, "AutoencoderKL", "CLIPVisionModelWithProjection", text=True, class_name=class_name)
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n# A model\n", encoding="utf-8")
    return folder


def write_own_pipeline(
    folder: Path, *, seed: int = 0, levels: Literal[1, 2] = 2, sees_content: bool = False
) -> Path:
    """std-tiny in miniature: latents 8x smaller, two levels or one, no text encoders.

    With ``sees_content`` the UNet takes the clean latents beside the noisy ones.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16 if sees_content else 8,
        out_channels=8,
        block_out_channels=(16, 32)[-levels:],
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        attention_head_dim=(1, 2)[-levels:],
        cross_attention_dim=24,
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME_DIM,
        norm_num_groups=8,
    )
    style = StyleEncoder(64, 8, (8, 8), 1, (12, 12, 12), tokens=6, dim=24, pooled_dim=POOLED)
    vae = AutoencoderPixelShuffle(8, (8, 16), 1, 1)
    randomize(unet, seed).save_pretrained(folder / "unet")
    randomize(vae, seed + 1).save_pretrained(folder / "vae")
    randomize(style, seed + 2).save_pretrained(folder / "image_encoder")
    save_file(_ip_layers(unet, 24, seed + 3), folder / "ip_adapter.safetensors")
    _write_scheduler(folder, trained_betas=True)
    _write_index(folder, "AutoencoderPixelShuffle", "StyleEncoder", text=False)
    return folder


def write_tiny_vae(folder: Path, *, seed: int = 0) -> Path:
    """An AutoencoderTiny folder with 4 latent channels and factor 4, as ``--vae`` takes it."""
    torch.manual_seed(seed)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )
    randomize(vae, seed).save_pretrained(folder)
    return folder


def write_ip_adapter(path: Path, unet: nn.Module, *, seed: int, dim: int = sum(TEXT_DIMS)) -> Path:
    """IP-Adapter Plus under the hub's keys: ``image_proj.*``, ``ip_adapter.{1, 3, ...}.to_k_ip.weight``."""
    rng = torch.Generator().manual_seed(seed)
    hidden, inner, features = 16, 64, 24

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng) * shape[-1] ** -0.5

    state = {
        "latents": draw(1, STYLE_TOKENS, hidden),
        "proj_in.weight": draw(hidden, features),
        "proj_in.bias": draw(hidden),
        "proj_out.weight": draw(dim, hidden),
        "proj_out.bias": draw(dim),
        "norm_out.weight": 1 + 0.1 * draw(dim),
        "norm_out.bias": draw(dim),
    }
    for i in range(4):
        for name in ("0.norm1", "0.norm2", "1.0"):
            state[f"layers.{i}.{name}.weight"] = 1 + 0.1 * draw(hidden)
            state[f"layers.{i}.{name}.bias"] = draw(hidden)
        state[f"layers.{i}.0.to_q.weight"] = draw(inner, hidden)
        state[f"layers.{i}.0.to_kv.weight"] = draw(2 * inner, hidden)
        state[f"layers.{i}.0.to_out.weight"] = draw(hidden, inner)
        state[f"layers.{i}.1.1.weight"] = draw(4 * hidden, hidden)
        state[f"layers.{i}.1.3.weight"] = draw(hidden, 4 * hidden)
    projection = {f"image_proj.{key}": value for key, value in state.items()}
    save_file(projection | _ip_layers(unet, dim, seed + 1), path)
    return path


def write_plain_ip_adapter(path: Path, unet: nn.Module, *, dim: int = sum(TEXT_DIMS)) -> Path:
    """The plain IP-Adapter: one linear layer from CLIP's pooled embedding to 4 tokens."""
    rng = torch.Generator().manual_seed(7)
    projection = {
        "image_proj.proj.weight": torch.randn(4 * dim, 12, generator=rng) * 0.3,
        "image_proj.proj.bias": torch.randn(4 * dim, generator=rng) * 0.1,
        "image_proj.norm.weight": 1 + torch.randn(dim, generator=rng) * 0.1,
        "image_proj.norm.bias": torch.randn(dim, generator=rng) * 0.1,
    }
    save_file(projection | _ip_layers(unet, dim, 8), path)
    return path


def write_lora(
    path: Path, unet: nn.Module, *, seed: int = 0, rank: int = 4, alpha: float = 8.0, **notes: str
) -> Path:
    """A LoRA on every ``to_q`` and ``to_v`` in diffusers' format; rank, alpha and ``notes`` as metadata."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in unet.named_modules():
        if name.endswith((".to_q", ".to_v")) and isinstance(module, nn.Linear):
            out, inner = module.weight.shape
            state[f"unet.{name}.lora_A.weight"] = torch.randn(rank, inner, generator=rng) * 0.3
            state[f"unet.{name}.lora_B.weight"] = torch.randn(out, rank, generator=rng) * 0.3
    config = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": ["to_q", "to_v"]}
    save_file(state, path, {"format": "pt", "lora_adapter_metadata": json.dumps(config), **notes})
    return path


def write_text_lora(path: Path, encoder: nn.Module, *, rank: int = 2) -> Path:
    """A LoRA on ``q_proj`` of the first text encoder, alpha equal to the rank."""
    rng = torch.Generator().manual_seed(9)
    state = {}
    for name, module in encoder.named_modules():
        if name.endswith("q_proj"):
            out, inner = module.weight.shape
            state[f"text_encoder.{name}.lora_A.weight"] = torch.randn(rank, inner, generator=rng)
            state[f"text_encoder.{name}.lora_B.weight"] = torch.randn(out, rank, generator=rng)
    save_file(state, path, {"format": "pt"})
    return path


def write_tokenizer(folder: Path, length: int = 12) -> Path:
    """A CLIP tokenizer that knows single letters and one merge."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "in",
        "in</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    special = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": words[-1]}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\ni n\ni n</w>\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": length,
            "add_prefix_space": False,
            **special,
        },
    )
    return folder


def _text_config(dim: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=56,
        hidden_size=dim,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=POOLED,
        bos_token_id=54,
        eos_token_id=55,
        pad_token_id=55,
    )


def _ip_layers(unet: nn.Module, dim: int, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    state = {}
    for i, layer in enumerate(layers):
        width = unet.get_submodule(layer.removesuffix(".processor")).to_k.weight.shape[0]
        for kind in ("to_k_ip", "to_v_ip"):
            state[f"ip_adapter.{2 * i + 1}.{kind}.weight"] = (
                torch.randn(width, dim, generator=rng) * dim**-0.5
            )
    return state


def _write_scheduler(folder: Path, trained_betas: bool) -> None:
    config: dict[str, Any] = {
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
    }
    if trained_betas:
        config["trained_betas"] = NoiseSchedule.scaled_linear().shifted(4).betas().tolist()
        config["prediction_type"] = "v_prediction"
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", config)


def _write_index(
    folder: Path, vae: str, image_encoder: str, *, text: bool, class_name: str = "StableDiffusionXLPipeline"
) -> None:
    roles = {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
    }
    index: dict[str, Any] = {
        "_class_name": class_name,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "image_encoder": ["transformers", image_encoder],
    }
    index |= {role: ["transformers", kind] if text else [None, None] for role, kind in roles.items()}
    write_json(folder / "model_index.json", index)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
