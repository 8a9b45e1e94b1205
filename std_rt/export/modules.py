"""Tensor-only modules around the pipeline's networks, to be traced: their arguments are the graphs' inputs.

Each wrapper holds the network it wraps as ``module``, so the names in a weights file are those of that
network's ``state_dict``. Attention is written out as two matrix products and a softmax, which OpenVINO
fuses, where torch's own operator leaves a chain of shape arithmetic behind; for GPUs it is ONNX's operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.onnx.ops import attention as onnx_attention

from std_rt.models.components import Network

__all__ = [
    "ClipText",
    "MotionUNet",
    "StyleAttention",
    "UNet",
    "VaeDecoder",
    "VaeEncoder",
    "affine_inverse",
    "latent_affine",
    "prepare_attention",
]

# Added where a token must not look: softmax gives exactly 0 there, and it fits fp16, as -inf would not.
_HIDDEN = -1e4
# CLIP configs from before transformers' pull request 24773 state this end token; it is not the real one.
_LEGACY_END = 2


def _heads(x: Tensor, attn: Attention) -> Tensor:
    """``[B, N, heads * d]`` -> ``[B, N, heads, d]``; inner sizes are constants, so the graph stays clean."""
    return x.unflatten(2, (attn.heads, x.shape[2] // attn.heads))


class Processor(nn.Module):
    """Softmax attention, written out or, with ``fused``, as ONNX's operator."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attn: Attention) -> Tensor:
        """``[B, N, heads * d]`` each, keys and values perhaps for a batch of 1; as the query."""
        if not self.fused:
            return _attend(query, key, value, attn)
        batch = query.shape[0]  # not len(), which tracing makes a number of
        key, value = (x if x.shape[0] == batch else x.expand(batch, -1, -1) for x in (key, value))
        out, *_ = onnx_attention(
            query, key, value, q_num_heads=attn.heads, kv_num_heads=attn.heads, scale=attn.scale
        )
        return out

    def attend_text(self, query: Tensor, text: Tensor, attn: Attention) -> Tensor:
        """Attention to ``[B, L, D]``; to a single token it is that token's value, whatever the query."""
        if text.shape[1] == 1:
            value: Tensor = attn.to_v(text)
            return value
        return self.attend(query, attn.to_k(text), attn.to_v(text), attn)


def _attend(query: Tensor, key: Tensor, value: Tensor, attn: Attention) -> Tensor:
    """The scale goes to the key, which in cross-attention is computed once per style, not once per step."""
    q = _heads(query, attn).transpose(1, 2)
    k = _heads(key * attn.scale, attn).permute(0, 2, 3, 1)
    v = _heads(value, attn).transpose(1, 2)
    return ((q @ k).softmax(-1) @ v).transpose(1, 2).flatten(2)


class SelfAttention(Processor):
    """Attention of ``[B, N, D]`` to itself."""

    def forward(self, attn: Attention, x: Tensor, **_: Any) -> Tensor:
        """As diffusers calls a processor; other arguments do not apply here."""
        out: Tensor = attn.to_out[0](self.attend(attn.to_q(x), attn.to_k(x), attn.to_v(x), attn))
        return out


class TextAttention(Processor):
    """Cross-attention to the text only: for a layer outside the style layout."""

    def forward(self, attn: Attention, x: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        """``encoder_hidden_states`` is (text, style, strength)."""
        query = attn.to_q(x)
        out: Tensor = attn.to_out[0](self.attend_text(query, encoder_hidden_states[0], attn).expand_as(query))
        return out


class StyleAttention(Processor):
    """Decoupled cross-attention (IP-Adapter, arXiv 2308.06721, eq. 5): text plus ``strength`` times style.

    Parameters are named as in diffusers' processor (``to_k_ip.0.weight``), so that weights go both ways.
    """

    def __init__(self, to_k_ip: Tensor, to_v_ip: Tensor, *, fused: bool = False) -> None:
        super().__init__(fused=fused)
        self.to_k_ip = nn.ModuleList([_linear(to_k_ip)])
        self.to_v_ip = nn.ModuleList([_linear(to_v_ip)])

    def forward(self, attn: Attention, x: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        """``encoder_hidden_states`` is (text [B, L, D], style [B, T, D], strength [B])."""
        text, style, strength = encoder_hidden_states
        query = attn.to_q(x)
        # Strength on the value is strength on the result, and leaves nothing to do at every step.
        value = strength[:, None, None] * self.to_v_ip[0](style)
        # Always written out: TensorRT-RTX 1.7.1 crashes on two operators with one query. It is a few tokens.
        styled = _attend(query, self.to_k_ip[0](style), value, attn)
        out: Tensor = attn.to_out[0](styled + self.attend_text(query, text, attn))
        return out


class SplitGEGLU(nn.Module):
    """diffusers' GEGLU as two products with half the weight each: one copy of a wide tensor less."""

    def __init__(self, module: GEGLU) -> None:
        super().__init__()
        self.proj = module.proj

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` -> ``[B, N, inner]``."""
        half = self.proj.out_features // 2
        weight, bias = self.proj.weight, self.proj.bias
        return F.linear(x, weight[:half], bias[:half]) * F.gelu(F.linear(x, weight[half:], bias[half:]))


class PlainGroupNorm(nn.GroupNorm):
    """GroupNorm by InstanceNormalization, as opset 20 has it.

    ONNX Runtime has no kernel for the operator of later opsets and makes a dozen small ones of each.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, ...]``."""
        rows = F.instance_norm(x.reshape(x.shape[0], self.num_groups, -1), eps=self.eps)
        shape = (-1, *(1,) * (x.ndim - 2))
        return rows.reshape(x.shape) * self.weight.view(shape) + self.bias.view(shape)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return layer


def prepare_attention(
    unet: Network, styled: Mapping[str, tuple[Tensor, Tensor]], *, fused: bool = False
) -> None:
    """Replace the attention processors (in place) by those above; ``fused``: for opset 23, with its operator.

    ``styled`` maps a cross-attention layer's name to its (to_k_ip, to_v_ip) weights; cross-attention
    layers outside it keep the text only.
    """
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            _check_plain(name, module)
    processors: dict[str, nn.Module] = {}
    for name in unet.attn_processors:
        layer = name.removesuffix(".processor")
        if layer.endswith("attn1") or ".motion_modules." in layer:
            processors[name] = SelfAttention(fused=fused)
        else:
            weights = styled.get(layer)
            processors[name] = (
                TextAttention(fused=fused) if weights is None else StyleAttention(*weights, fused=fused)
            )
    unet.set_attn_processor(processors)
    _split_geglu(unet)
    for module in unet.modules() if fused else ():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = PlainGroupNorm


def _check_plain(name: str, attn: Attention) -> None:
    """The processors above leave out what SDXL's layers do not have."""
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross")
    found = [key for key in extras if getattr(attn, key, None)]
    if found or attn.residual_connection or attn.rescale_output_factor != 1:
        raise ValueError(
            f"attention layer {name} has {', '.join(found) or 'a residual'}, which SDXL's layers do not"
        )


def _split_geglu(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, GEGLU):
            setattr(module, name, SplitGEGLU(child))
        else:
            _split_geglu(child)


class Wrapper(nn.Module):
    """float32 outside, ``dtype`` (that of the network's weights) inside."""

    def __init__(self, module: Network, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.module: Network = module
        self.dtype = dtype


class UNet(Wrapper):
    """One noise prediction; style tokens come projected, so no resampler runs at every step.

    Content latents come as the sampler's are scaled, and go in as z / scale + shift.
    """

    def __init__(
        self, module: Network, dtype: torch.dtype = torch.float32, content: tuple[float, float] = (0, 1)
    ) -> None:
        """``content``: (shift, scale)."""
        super().__init__(module, dtype)
        self.content = content

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        style_tokens: Tensor,
        style_strength: Tensor,
        content_latents: Tensor | None = None,
        mask: Tensor | None = None,
        masked_latents: Tensor | None = None,
    ) -> Tensor:
        """``sample`` [B, C, h, w] -> ``noise_pred`` of the same shape.

        ``content_latents``, ``masked_latents`` [B, C, h, w] and ``mask`` [B, 1, h, w]: if the UNet sees them.
        """
        context = tuple(x.to(self.dtype) for x in (encoder_hidden_states, style_tokens, style_strength))
        # In float32: diffusers puts them beside the embeddings of time_ids, and casts both afterwards.
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        content = None if content_latents is None else affine_inverse(content_latents, *self.content)
        seen = [x for x in (sample, content, mask, masked_latents) if x is not None]
        x = (torch.cat(seen, 1) if len(seen) > 1 else sample).to(self.dtype)
        return self._predict(x, timestep, context, added).float()

    def _predict(
        self, x: Tensor, timestep: Tensor, context: tuple[Tensor, ...], added: dict[str, Tensor]
    ) -> Tensor:
        output: Tensor = self.module(x, timestep, context, added_cond_kwargs=added, return_dict=False)[0]
        return output


class MotionUNet(UNet):
    """The noise predictions of one window: ``sample`` [T, C, h, w], everything else with a batch of 1.

    Keys and values of text and style are computed once and broadcast over the frames.
    """

    def _predict(
        self, x: Tensor, timestep: Tensor, context: tuple[Tensor, ...], added: dict[str, Tensor]
    ) -> Tensor:
        output = super()._predict(x.transpose(0, 1)[None], timestep, context, added)
        return output[0].transpose(0, 1)


class VaeEncoder(Wrapper):
    """Image in [-1, 1] -> latents as the UNet wants them: (mean - shift) * scaling."""

    def forward(self, image: Tensor) -> Tensor:
        """``[B, 3, H, W]`` -> ``[B, C, h, w]``."""
        encoded = self.module.encode(image.to(self.dtype))
        half: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        z = half.float()
        shift, scale = latent_affine(self.module)
        return z if (shift, scale) == (0, 1) else (z - shift) * scale


class VaeDecoder(Wrapper):
    """Latents as the UNet gives them -> image, not clamped."""

    def forward(self, latents: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, 3, H, W]``."""
        z = affine_inverse(latents, *latent_affine(self.module))
        image: Tensor = self.module.decode(z.to(self.dtype)).sample
        return image.float()


def affine_inverse(latents: Tensor, shift: float, scale: float) -> Tensor:
    """Latents as the VAE itself has them."""
    return latents if (shift, scale) == (0, 1) else latents / scale + shift


def latent_affine(vae: Network) -> tuple[float, float]:
    """``(shift, scale)`` of (z - shift) * scale, which brings a VAE's latents to the UNet's range."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return float(shift), float(vae.config.scaling_factor)


class ClipText(nn.Module):
    """A CLIP text encoder: ``input_ids`` int64 [B, L] -> ``hidden_states`` [B, L, D] (, ``text_embeds``
    [B, P]), float32.

    The network's own layers are called one by one, because its ``forward`` records hidden states through
    hooks and builds its mask with shape arithmetic; tests compare the two.

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
        positions: Tensor = model.embeddings.position_embedding.weight[: input_ids.shape[1]]
        hidden: Tensor = model.embeddings.token_embedding(input_ids) + positions
        mask = self.get_buffer("mask").to(hidden.dtype)
        for layer in model.encoder.layers[:-1]:
            hidden = _layer(layer, hidden, mask)
        if not self.projects:
            return hidden.float()
        last = model.final_layer_norm(_layer(model.encoder.layers[-1], hidden, mask))
        # Ids are exact in float32, and not every runtime has argmax of integers.
        end = input_ids if self.end == _LEGACY_END else input_ids == self.end
        position = end.float().argmax(1)[:, None, None].expand(-1, 1, last.shape[2])
        pooled: Tensor = self.module.text_projection(torch.gather(last, 1, position).squeeze(1))
        return hidden.float(), pooled.float()


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
