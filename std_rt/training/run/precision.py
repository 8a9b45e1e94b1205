"""Device, number format and attention kernels of the networks in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from std_rt.core.errors import UsageError, one_line
from std_rt.training.run.recipe import Precision

__all__ = ["DTYPES", "attention_kernels", "choose_device", "precision_context", "resolve_precision"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str, instead: str = "--set device=cpu") -> str:
    """``auto`` is CUDA where there is one. If torch cannot use ``name``: UsageError, advising ``instead``."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UsageError(
            f"torch cannot use device {name!r} ({one_line(error, 120)}); use {instead}"
        ) from None
    return chosen


def resolve_precision(precision: Precision, device: str) -> Precision:
    """What ``auto`` is on a type of device: fp16 on CUDA, else bf16.

    A guided teacher step at scale 16 loses 0.0015 in bf16 and 0.0002 in fp16, where the consistency loss
    tells 0.001 apart (docs/lab-notes.md).
    """
    if precision != "auto":
        return precision
    return "fp16" if device == "cuda" else "bf16"


@contextmanager
def precision_context(precision: Precision, device: str) -> Iterator[None]:
    """Autocast for the networks; ``device`` is its type."""
    precision = resolve_precision(precision, device)
    with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
        yield


@contextmanager
def attention_kernels(device: str) -> Iterator[None]:
    """Plain attention on the CPU, where the fused kernel's backward is slow.

    Around whole steps, not around a network's forward: gradient checkpointing runs it again in the backward.
    """
    with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext():
        yield
