"""Bake one prompt into constants: what the UNet is told in text while a bundle runs without text encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from std_rt.errors import ExportError
from std_rt.export.components import Network

__all__ = ["bake_prompt", "null_text"]

Array = NDArray[np.float32]


def null_text(context_dim: int, pooled_dim: int) -> dict[str, Array]:
    """For a model without text: one zero token and a zero pooled vector."""
    return {
        "encoder_hidden_states": np.zeros((1, 1, context_dim), np.float32),
        "text_embeds": np.zeros((1, pooled_dim), np.float32),
    }


def bake_prompt(source: Path, encoders: dict[str, Network], prompt: str) -> dict[str, Array]:
    """SDXL's encoding: last hidden layer but one of each encoder side by side, pooled from the last.

    ``encoders`` maps text_encoder / text_encoder_2 to CLIP models; their tokenizers lie in ``source``.
    """
    from transformers import CLIPTokenizer

    hidden, pooled = [], None
    for role, encoder in encoders.items():
        folder = source / role.replace("text_encoder", "tokenizer")
        if not folder.is_dir():
            raise ExportError(f"{source} has a {role} but no {folder.name}")
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        tokens = tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            encoded = encoder(tokens.input_ids, output_hidden_states=True)
        hidden.append(encoded.hidden_states[-2])
        pooled = encoded.text_embeds if "text_embeds" in encoded else pooled
    if pooled is None:
        raise ExportError(f"{source} has no text_encoder_2, which gives the pooled text SDXL's UNet needs")
    return {"encoder_hidden_states": torch.cat(hidden, -1).numpy(), "text_embeds": pooled.numpy()}
