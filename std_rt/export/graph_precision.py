"""Precision of graphs: fp32, or fp16/bf16 with some parts kept in fp32.

The boundary of every graph stays float32, whatever it computes in. Inside a half-precision graph three
things stay in fp32: norms (their sums of squares pass 65504), time embeddings (sines of large arguments)
and what diffusers concatenates to them. TensorRT is strongly typed, so every change of type is in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from std_rt.core.errors import ExportError
from std_rt.models.components import Network

__all__ = ["half_dtype", "to_half", "vae_compute", "within_range"]

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def half_dtype(compute: str) -> torch.dtype | None:
    """The half-precision type of ``compute``; None for fp32."""
    return _HALVES.get(compute)


def to_half(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module`` (in place) with weights in ``dtype`` and its norms as islands of fp32.

    One tensor at a time: the whole is never in memory twice. Raises ExportError if a weight does not
    fit the type.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.GroupNorm | nn.LayerNorm)]
    kept = {id(parameter) for norm in norms for parameter in norm.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) not in kept and parameter.is_floating_point():
            parameter.data = _cast(name, parameter.data, dtype)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer is not None and buffer.is_floating_point():
                setattr(part, name, buffer.to(dtype))
    for norm in norms:  # tracing follows hooks, so the casts end up in the graph
        norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        norm.register_forward_hook(lambda _, inputs, output: output.to(dtype))
    return module


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    half = value.to(dtype)
    if not torch.isfinite(half).all():
        raise ExportError(
            f"weight {name} is {value.abs().max():.0f}, which exceeds the fp16 range; "
            "use --precision bf16 or fp32"
        )
    return half


@contextmanager
def within_range(module: nn.Module, compute: str, title: str) -> Iterator[None]:
    """Watch a run in fp32 for values outside the fp16 range; ExportError afterwards if there were any.

    A CPU computes fp16 graphs in wider types, so the comparison with torch would pass and the GPU's pictures
    be black. Norms are islands of fp32, so what they take may be large, and what they give is looked at.
    """
    peak = torch.zeros(())

    def look(part: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            torch.maximum(peak, output.detach().abs().amax().float(), out=peak)

    watched = module.modules() if compute == "fp16" else ()
    hooks = [part.register_forward_hook(look) for part in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not peak <= torch.finfo(torch.float16).max:
        raise ExportError(
            f"values in the {title} reach {peak:.0f}, exceed fp16's maximum of 65504 and would produce "
            "black pictures; "
            + ("use --vae fp16-fix, or --precision bf16" if title == "vae" else "use --precision bf16")
        )


def vae_compute(vae: Network, compute: str) -> str:
    """SDXL's own VAE overflows in fp16 (``force_upcast`` in its config says so): then fp32."""
    return "fp32" if compute == "fp16" and getattr(vae.config, "force_upcast", False) else compute
