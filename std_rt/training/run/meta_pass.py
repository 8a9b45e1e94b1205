"""One pass through a network without numbers: its operations, and what the backward pass would need.

On PyTorch's ``meta`` device tensors have shapes and no contents, so that SDXL's UNet is built and run in
seconds, in the memory of a small script, and without its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from std_rt.core.errors import RecipeError
from std_rt.models.autoencoder import AutoencoderPixelShuffle
from std_rt.training.run.recipe import LoraConfig as LoraRecipe
from std_rt.training.tiny.pipeline import add_style_attention

__all__ = [
    "Pass", "add_meta_lora", "build_unet", "build_vae", "count", "decode_pass", "keeping", "pooled_dim",
    "token_dim", "unet_pass",
]  # fmt: skip

TEXT_TOKENS = 77
CHECKPOINTED = (ResnetBlock2D, BasicTransformerBlock)  # what diffusers' gradient checkpointing wraps

# diffusers' modules carry no types.
Network = Any


@dataclass(frozen=True)
class Pass:
    """One sample through one network; operations, and bytes that the backward pass needs."""

    forward: float
    lora: float = 0.0  # of these, the LoRA's
    attention: float = 0.0  # of these, between queries, keys and values
    kept: float = 0.0
    kept_checkpointed: float = 0.0

    @property
    def bare(self) -> float:
        return self.forward - self.lora

    @property
    def backward(self) -> float:
        """A frozen layer's is one forward (its input's gradient); LoRA and attention have two gradients."""
        return self.bare + self.attention + 2 * self.lora


def build_unet(config: dict[str, Any], style_tokens: int = 0) -> Network:
    """A frozen UNet of SDXL's kind from its ``config.json``; with ``style_tokens`` as std-tiny's.

    RecipeError where the config is of something else.
    """
    try:
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel.from_config(config)
            if style_tokens:
                add_style_attention(unet, style_tokens)
    except (TypeError, ValueError, KeyError) as error:
        raise RecipeError(f"the base's unet/config.json describes no UNet: {_one_line(error)}") from None
    if unet.config.addition_embed_type != "text_time":
        raise RecipeError("the base's UNet is not of SDXL's kind (no text_time embedding)")
    return unet.requires_grad_(False)


def build_vae(config: dict[str, Any]) -> Network:
    """A frozen autoencoder from its ``config.json``; RecipeError where its class is not known."""
    name = str(config.get("_class_name", "AutoencoderKL"))
    ours = {AutoencoderPixelShuffle.__name__: AutoencoderPixelShuffle}
    kind: Network = ours.get(name) or getattr(diffusers, name, None)
    if not hasattr(kind, "from_config"):
        raise RecipeError(f"the base's vae/config.json names {name}, which diffusers does not have")
    with torch.device("meta"):
        return kind.from_config(config).requires_grad_(False)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def count(module: Network | None) -> int:
    """Parameters of a network; 0 of none."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def add_meta_lora(unet: Network, config: LoraRecipe) -> list[int]:
    """Put a LoRA on a UNet without numbers; the sizes of its tensors. RecipeError where no layer fits."""
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))
    try:
        inject_adapter_in_model(settings, unet, low_cpu_mem_usage=True)
    except ValueError as error:
        raise RecipeError(f"lora.targets do not fit the base: {_one_line(error)}") from None
    return [p.numel() for p in unet.parameters() if p.requires_grad]


def token_dim(unet: Network) -> int:
    """Width of the tokens that cross-attention reads."""
    dim = unet.config.cross_attention_dim
    return int(dim if isinstance(dim, int) else max(dim))


def pooled_dim(unet: Network) -> int:
    """Width of the pooled embedding beside the time ids."""
    config = unet.config
    return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)


def unet_pass(unet: Network, shape: tuple[int, int, int], dtype: torch.dtype, style_tokens: int) -> Pass:
    """One sample through the UNet with its LoRA, all in ``dtype``; latents of ``shape`` (C, h, w)."""
    nn.Module.to(unet, dtype)
    with torch.device("meta"):
        x, t = torch.empty(1, *shape, dtype=dtype), torch.empty(1, dtype=torch.long)
        dim, pooled = token_dim(unet), torch.empty(1, pooled_dim(unet), dtype=dtype)
        context = torch.empty(1, 1 if style_tokens else TEXT_TOKENS, dim, dtype=dtype)
        added: dict[str, Any] = {"text_embeds": pooled, "time_ids": torch.empty(1, 6, dtype=dtype)}
        if style_tokens:
            added["image_embeds"] = [torch.empty(1, 1, style_tokens, dim, dtype=dtype)]
    with FlopCounterMode(display=False) as counter, keeping(unet) as kept:
        unet(x, t, context, added_cond_kwargs=added, return_dict=False)
    by_module = counter.get_flop_counts()
    lora = sum(sum(ops.values()) for name, ops in by_module.items() if _is_lora(name))
    attention = sum(n for op, n in by_module["Global"].items() if "bmm" in str(op) or "attention" in str(op))
    forward = float(counter.get_total_flops())
    return Pass(forward, float(lora), float(attention), kept.bytes, kept.bytes_checkpointed)


def _is_lora(module: str) -> bool:
    return module.endswith((".lora_A.default", ".lora_B.default"))


def decode_pass(vae: Network, shape: tuple[int, int, int]) -> Pass:
    """One sample through the decoder, in fp32."""
    z = torch.empty(1, *shape, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter, keeping(vae) as kept:
        vae.decode(z)
    return Pass(float(counter.get_total_flops()), kept=kept.bytes)


# --- what the backward pass needs -----------------------------------------------------------------------


@dataclass
class _Kept(TorchFunctionMode):
    """Storages that autograd holds on to, parameters left out; each counts once."""

    own: set[int]
    sizes: dict[int, int] = field(default_factory=dict)
    outside: dict[int, int] = field(default_factory=dict)  # also kept where blocks are checkpointed
    block: dict[int, int] | None = None  # of the checkpointed block that runs now
    largest: int = 0
    alive: list[Any] = field(default_factory=list)  # or a new storage might take a counted one's place
    paused: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def bytes_checkpointed(self) -> int:
        """Blocks keep their inputs; one block at a time is run again, and has all of its own."""
        return sum(self.outside.values()) + self.largest

    def keep(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if not self.paused and storage._cdata not in self.own:
            self.alive.append(storage)
            for table in (self.sizes, self.outside if self.block is None else self.block):
                table[storage._cdata] = storage.nbytes()
        return x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Attention is fused on the devices that train: it keeps what goes in and comes out, no matrix."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.paused = True
        out = func(*args, **(kwargs or {}))
        self.paused = False
        for x in (*args[:3], out):
            self.keep(x)
        return out

    def enter_block(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor):
                self.keep(x)
        self.block = {}

    def leave_block(self, *_: Any) -> None:
        self.largest = max(self.largest, sum((self.block or {}).values()))
        self.block = None


@contextmanager
def keeping(module: Network) -> Iterator[_Kept]:
    """Around a forward pass: what it keeps for the backward pass, besides parameters and buffers."""
    kept = _Kept({x.untyped_storage()._cdata for x in (*module.parameters(), *module.buffers())})
    blocks = [m for m in module.modules() if isinstance(m, CHECKPOINTED)]
    hooks = [m.register_forward_pre_hook(kept.enter_block, with_kwargs=True) for m in blocks]
    hooks += [m.register_forward_hook(kept.leave_block) for m in blocks]
    try:
        with kept, saved_tensors_hooks(kept.keep, lambda x: x):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()
