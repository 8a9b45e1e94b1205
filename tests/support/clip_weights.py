"""Tiny random CLIP, CSD and aesthetic predictor in the layouts of the published files."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from support.pipelines import randomize
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

PX, DIM = 32, 12
VISION = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": PX, "patch_size": 8, "projection_dim": DIM, "hidden_act": "quick_gelu",
}  # fmt: skip


def write_clip(folder: Path) -> Path:
    """A CLIPModel as a transformers folder."""
    text = {
        "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 8, "projection_dim": DIM,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=DIM)
    randomize(CLIPModel(config), 0).save_pretrained(folder)
    return folder


def _openai(vision: CLIPVisionModelWithProjection) -> dict[str, Tensor]:
    """The weights of a transformers CLIP under the names of OpenAI's files, which CSD keeps."""
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
    }
    state = {k.removeprefix("vision_model."): v for k, v in vision.state_dict().items()}
    found = {new: state[old] for old, new in names.items()}
    for kind in ("weight", "bias"):
        found[f"ln_pre.{kind}"] = state[f"pre_layrnorm.{kind}"]
        found[f"ln_post.{kind}"] = state[f"post_layernorm.{kind}"]
        for i in range(VISION["num_hidden_layers"]):
            a, b = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            heads = [state[f"{a}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            found[f"{b}attn.in_proj_{kind}"] = torch.cat(heads)
            pairs = {
                "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
                "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
            }  # fmt: skip
            found |= {f"{b}{new}.{kind}": state[f"{a}{old}.{kind}"] for old, new in pairs.items()}
    return found


def csd_state(vision: CLIPVisionModelWithProjection) -> dict[str, Tensor]:
    """As published: DistributedDataParallel's prefix, backbone, and two projections."""
    state = {f"module.backbone.{k}": v.clone() for k, v in _openai(vision).items()}
    state["module.last_layer_style"] = vision.visual_projection.weight.T.clone()
    return state | {"module.last_layer_content": torch.zeros(128, DIM)}


def write_csd(path: Path, vision: CLIPVisionModelWithProjection) -> Path:
    """With everything else that the authors' training kept in the file."""
    known = {
        "model_state_dict": csd_state(vision),
        "opt_bb": {"state": {}, "param_groups": [{"lr": np.float64(0.1)}]},
        "iter": 3,
        "args": argparse.Namespace(arch="vit_large", lr=np.float64(0.003)),
        "fp16_scaler": None,
    }
    torch.save(known, path)
    return path


def write_predictor(path: Path, dim: int = DIM) -> nn.Sequential:
    """The improved predictor's layers; dropout counts in its names."""
    layers = nn.Sequential(
        nn.Linear(dim, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    torch.save({f"layers.{k}": v for k, v in layers.state_dict().items()}, path)
    return layers.eval()
