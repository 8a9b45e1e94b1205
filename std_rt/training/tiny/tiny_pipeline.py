"""std-tiny as a diffusers folder: build, save and load (UNet, style encoder, autoencoder, scheduler)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from std_rt.core.schedule import NoiseSchedule
from std_rt.models.autoencoder import AutoencoderPixelShuffle
from std_rt.models.style_encoder import StyleEncoder
from std_rt.training.run.recipe import UNetConfig

TIME_ID_DIM = 32
MODEL_CARD = """---
license: apache-2.0
---
A small stylization model in the layout of SDXL with IP-Adapter, trained by the recipes of std-rt.
"""


class PassThrough(nn.Module):
    """Replaces IP-Adapter's projection: our style encoder gives projected tokens already."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


def add_style_attention(unet: UNet2DConditionModel, tokens: int) -> None:
    """Give every cross-attention layer an image branch (``to_k_ip``, ``to_v_ip``)."""
    processors = {}
    for name, processor in unet.attn_processors.items():
        if name.endswith("attn1.processor"):
            processors[name] = processor
            continue
        attention = unet.get_submodule(name.removesuffix(".processor"))
        ip = IPAdapterAttnProcessor2_0(attention.inner_dim, attention.cross_attention_dim, (tokens,), 1.0)
        processors[name] = ip
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([PassThrough()])
    unet.config.encoder_hid_dim_type = "ip_image_proj"


def build_unet(config: UNetConfig, latent_channels: int) -> UNet2DConditionModel:
    """The SDXL-layout UNet in miniature, with the image branch on every cross-attention layer.

    The clean content latents stand beside the noisy ones at the input.
    """
    # As in SDXL, the finest level has no attention: over its many positions that would cost more than
    # all the rest, and style reaches it through the scale and shift of the time embedding.
    kinds = ["", *["CrossAttn"] * (len(config.block_out_channels) - 1)]
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple(f"{k}DownBlock2D" for k in kinds),
        up_block_types=tuple(f"{k}UpBlock2D" for k in reversed(kinds)),
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=tuple(c // config.attention_head_dim for c in config.block_out_channels),
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_DIM,
        projection_class_embeddings_input_dim=config.pooled_dim + 6 * TIME_ID_DIM,
        norm_num_groups=16,
    )
    add_style_attention(unet, config.style_tokens)
    return unet


def run_unet(
    unet: UNet2DConditionModel,
    x: Tensor,
    t: Tensor,
    tokens: Tensor,
    pooled: Tensor,
    time_ids: Tensor,
    content: Tensor,
) -> Tensor:
    """One evaluation with the null text context (a single zero token); returns ``[B, C, h, w]``.

    ``x``, and ``content``, the clean content latents: ``[B, C, h, w]``.
    """
    null = x.new_zeros(x.shape[0], 1, unet.config.cross_attention_dim)
    added = {"text_embeds": pooled, "time_ids": time_ids, "image_embeds": [tokens[:, None]]}
    return unet(torch.cat([x, content], 1), t, null, added_cond_kwargs=added, return_dict=False)[0]


def random_time_ids(batch: int, rng: np.random.Generator) -> Tensor:
    """``[B, 6]`` sizes at random: a crop says nothing of the true ones, so the model learns not to look."""
    size = torch.from_numpy(rng.integers(8, 129, (batch, 2)) * 8).float()
    return torch.cat([size, torch.zeros(batch, 2), size], 1)


@dataclass
class TinyPipeline:
    """The four parts of std-tiny in torch."""

    unet: UNet2DConditionModel
    style_encoder: StyleEncoder
    vae: AutoencoderPixelShuffle
    schedule: NoiseSchedule


def new_pipeline(config: UNetConfig, vae: AutoencoderPixelShuffle, snr_ratio: float) -> TinyPipeline:
    """A pipeline with random weights around a trained autoencoder.

    Prediction type: v; ``snr_ratio`` is the resolution ratio by which the schedule is shifted.
    """
    v = vae.config
    style = StyleEncoder(
        latent_channels=v.latent_channels,
        patchify_channels=tuple(v.encoder_channels or v.channels),
        patchify_blocks=v.encoder_blocks,
        tokens=config.style_tokens,
        dim=config.cross_attention_dim,
        pooled_dim=config.pooled_dim,
        patchify_shortcut=v.shortcut,
    )
    style.patchify.load_state_dict(vae.encoder.state_dict())
    shifted = NoiseSchedule.scaled_linear().shifted(snr_ratio)
    schedule = NoiseSchedule(shifted.alphas_cumprod, "v_prediction")
    return TinyPipeline(build_unet(config, v.latent_channels), style, vae, schedule)


def _split_ip(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """UNet weights, and the image branch under IP-Adapter's published keys (odd numbers count layers)."""
    layers = [k.removesuffix("to_k_ip.0.weight") for k in state if k.endswith("to_k_ip.0.weight")]
    ip = {}
    for i, layer in enumerate(layers):
        for kind in ("to_k_ip", "to_v_ip"):
            ip[f"ip_adapter.{2 * i + 1}.{kind}.weight"] = state[f"{layer}{kind}.0.weight"].contiguous()
    return {k: v for k, v in state.items() if "_ip.0.weight" not in k}, ip


def save_tiny(pipeline: TinyPipeline, folder: Path) -> None:
    """Write the diffusers folder: unet, vae, image_encoder, scheduler, ip_adapter.safetensors, index.

    The folder appears whole or not at all; one of that name is replaced.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _write(pipeline, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _write(pipeline: TinyPipeline, folder: Path) -> None:
    folder.mkdir(parents=True)
    weights, ip = _split_ip(pipeline.unet.state_dict())
    (folder / "unet").mkdir(exist_ok=True)
    # The first belongs to the adapter, the second to one machine.
    ours = ("encoder_hid_dim_type", "_name_or_path")
    config = {k: v for k, v in dict(pipeline.unet.config).items() if k not in ours}
    config |= {"_class_name": "UNet2DConditionModel"}
    (folder / "unet/config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    contiguous = {k: v.contiguous() for k, v in weights.items()}
    save_file(contiguous, folder / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    save_file(ip, folder / "ip_adapter.safetensors", {"format": "pt"})
    pipeline.vae.save_pretrained(folder / "vae")
    pipeline.style_encoder.save_pretrained(folder / "image_encoder")
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {
        "_class_name": "TCDScheduler",
        "num_train_timesteps": 1000,
        "trained_betas": pipeline.schedule.betas().tolist(),
        "prediction_type": pipeline.schedule.prediction_type,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
    }
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    index = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["std_rt.models.autoencoder", "AutoencoderPixelShuffle"],
        "image_encoder": ["std_rt.models.style_encoder", "StyleEncoder"],
        "scheduler": ["diffusers", "TCDScheduler"],
        "text_encoder": [None, None],
        "text_encoder_2": [None, None],
        "tokenizer": [None, None],
        "tokenizer_2": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def load_tiny(folder: Path) -> TinyPipeline:
    """Read a folder written by ``save_tiny`` (fp32)."""
    style = StyleEncoder.from_pretrained(folder / "image_encoder")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    add_style_attention(unet, style.config.tokens)
    ip = load_file(folder / "ip_adapter.safetensors")
    layers = [p for n, p in unet.attn_processors.items() if n.endswith("attn2.processor")]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.to_k_ip[0].weight.copy_(ip[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"])
            layer.to_v_ip[0].weight.copy_(ip[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"])
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    vae = AutoencoderPixelShuffle.from_pretrained(folder / "vae")
    return TinyPipeline(unet.eval(), style.eval(), vae.eval(), NoiseSchedule.from_config(config))
