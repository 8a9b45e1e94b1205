"""A CLIP text encoder as a tensor-only module: token ids in, what SDXL's UNet is told out.

The network's own layers are called one by one, because its ``forward`` records hidden states through hooks
and builds its mask with shape arithmetic; tests compare the two. Only ``hidden_states[-2]`` and, from an
encoder that projects, the pooled text are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from std_rt.export.components import Network

__all__ = ["ClipText"]

# Added where a token must not look: softmax gives exactly 0 there, and it fits fp16, as -inf would not.
_HIDDEN = -1e4
# CLIP configs from before transformers' pull request 24773 state this end token; it is not the real one.
_LEGACY_END = 2


class ClipText(nn.Module):
    """``input_ids`` int64 [B, L] -> ``hidden_states`` [B, L, D] (, ``text_embeds`` [B, P]), float32.

    Hidden states are those before the last layer, not normed. The pooled text is that of the first end
    token; with the legacy end id 2, of the highest id in the row.
    """

    def __init__(self, encoder: Network, length: int) -> None:
        """``encoder`` is a CLIPTextModel or CLIPTextModelWithProjection; ``length`` is L."""
        super().__init__()
        self.module = encoder
        self.end = int(encoder.config.eos_token_id)
        self.projects = hasattr(encoder, "text_projection")
        hidden = torch.full((length, length), _HIDDEN).triu(1)
        self.register_buffer("mask", hidden, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """See the class."""
        # CLIPTextModel has its layers itself in transformers 5 and one level down in 4.
        model: Network = getattr(self.module, "text_model", self.module)
        hidden = _embed(model.embeddings, input_ids)
        mask = self.get_buffer("mask").to(hidden.dtype)
        for layer in model.encoder.layers[:-1]:
            hidden = _layer(layer, hidden, mask)
        if not self.projects:
            return hidden.float()
        last = model.final_layer_norm(_layer(model.encoder.layers[-1], hidden, mask))
        pooled = self.module.text_projection(self._at_end(last, input_ids))
        return hidden.float(), pooled.float()

    def _at_end(self, last: Tensor, input_ids: Tensor) -> Tensor:
        """``[B, L, D]`` -> ``[B, D]``. Ids are exact in float32; not every runtime has argmax of integers."""
        end = input_ids if self.end == _LEGACY_END else input_ids == self.end
        position = end.float().argmax(1)[:, None, None]
        return torch.gather(last, 1, position.expand(-1, 1, last.shape[2])).squeeze(1)


def _embed(embeddings: Network, input_ids: Tensor) -> Tensor:
    places: Tensor = embeddings.position_embedding.weight[: input_ids.shape[1]]
    words: Tensor = embeddings.token_embedding(input_ids)
    return words + places


def _layer(layer: Network, hidden: Tensor, mask: Tensor) -> Tensor:
    """One pre-norm transformer layer, ``[B, L, D]``."""
    hidden = hidden + _attention(layer.self_attn, layer.layer_norm1(hidden), mask)
    result: Tensor = hidden + layer.mlp(layer.layer_norm2(hidden))
    return result


def _attention(attn: Network, x: Tensor, mask: Tensor) -> Tensor:
    """Causal self-attention, written out: runtimes fuse that form."""
    heads = (int(attn.num_heads), x.shape[2] // int(attn.num_heads))
    q = attn.q_proj(x).unflatten(2, heads).transpose(1, 2)
    k = (attn.k_proj(x) * heads[1] ** -0.5).unflatten(2, heads).permute(0, 2, 3, 1)
    v = attn.v_proj(x).unflatten(2, heads).transpose(1, 2)
    seen = (q @ k + mask).softmax(-1) @ v
    result: Tensor = attn.out_proj(seen.transpose(1, 2).flatten(2))
    return result
