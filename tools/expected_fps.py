"""Frames per second to expect of SDXL on NVIDIA GPUs: a calculation, not a measurement.

    python -m tools.expected_fps          # needs torch and diffusers; no weights, no GPU

The networks are made without weights (torch's meta device) from their published configurations, and torch's
own counter counts the operations of one call. A call takes as long as its arithmetic at ``SHARE`` of the
card's peak, or as reading its weights once, whichever is longer; a frame is the encoder, the UNet once per
step and the decoder. Left out are launches, copies, activations that do not fit the cache and the host's
work, which overlaps. fp16 with fp32 accumulation, dense, one frame at a time, no guidance, the prompt baked
in: its keys and values are not computed. In FP8 the UNet's layers have twice the peak and half the bytes; its
attention and the VAE stay in fp16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["GPUS", "SHARE", "Cost", "Gpu", "frame_s", "main"]

SHARE = 0.45  # of the peak: a goal; nothing has been measured
BANDWIDTH_SHARE = 0.8
SIZES_PX, STEPS = (512, 1024), (1, 2, 4)
_ATTENTION = ("attention", "bmm")  # in the names of torch's operators


@dataclass(frozen=True)
class Gpu:
    """``peak``: FLOP/s of tensor cores in fp16 with fp32 accumulation, dense; ``bandwidth``: bytes/s.

    ``fp8``: whether they do FP8 (at twice that).
    """

    name: str
    peak: float
    bandwidth: float
    fp8: bool = True


GPUS = (
    # Ada architecture whitepaper, appendix A (165.2 TFLOPS); 1008 GB/s
    Gpu("RTX 4090", 165.2e12, 1008e9),
    # RTX Blackwell architecture whitepaper, appendix A (209.5 TFLOPS); 1792 GB/s
    Gpu("RTX 5090", 209.5e12, 1792e9),
    # 28 SMs x 256 FMA a clock (half of the rate with fp16 accumulation: Ampere GA102 whitepaper) x 1.777 GHz
    Gpu("RTX 3060 12 GB", 28 * 256 * 2 * 1.777e9, 360e9, fp8=False),
    # H100 datasheet, SXM, without sparsity: 989.4 TFLOPS; 3.35 TB/s
    Gpu("H100 SXM", 989.4e12, 3350e9),
)


@dataclass(frozen=True)
class Cost:
    """Of one call: floating-point operations (a multiply-add is two), and bytes of weights in fp16.

    ``attention``: those of the operations that multiply no weights.
    """

    flop: float
    weight_bytes: float
    attention: float = 0.0

    def without(self, other: Cost) -> Cost:
        """The rest of it."""
        return Cost(
            self.flop - other.flop, self.weight_bytes - other.weight_bytes, self.attention - other.attention
        )

    def in_fp8(self) -> Cost:
        """As an fp16 cost that takes as long."""
        return Cost((self.flop - self.attention) / 2 + self.attention, self.weight_bytes / 2, self.attention)

    def seconds(self, gpu: Gpu, share: float = SHARE) -> float:
        """The longer of arithmetic and reading the weights."""
        return max(self.flop / (share * gpu.peak), self.weight_bytes / (BANDWIDTH_SHARE * gpu.bandwidth))


# Keys and values of the text in the UNet's 70 cross-attention layers: 2 matrices each, 77 tokens of 2048.
TEXT_PARAMETERS = 2 * 2048 * (10 * 640 + 60 * 1280)
TEXT = Cost(2.0 * 77 * TEXT_PARAMETERS, 2.0 * TEXT_PARAMETERS)


def frame_s(gpu: Gpu, vae: Cost, unet: Cost, steps: int, share: float = SHARE) -> float:
    """Seconds of a frame: encode and decode (``vae``), and ``steps`` calls of the UNet."""
    return vae.seconds(gpu, share) + steps * unet.seconds(gpu, share)


def _count(module: Any, call: Callable[[Any], object]) -> Cost:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call(module)
    weights = sum(parameter.numel() for parameter in module.parameters())
    counts = counter.get_flop_counts().get("Global", {})
    attention = sum(flop for name, flop in counts.items() if any(part in str(name) for part in _ATTENTION))
    return Cost(counter.get_total_flops(), 2.0 * weights, attention)


def _networks() -> tuple[Any, Any, Any]:
    """UNet and VAE of SDXL base 1.0, and TAESDXL, from their published config.json."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    from std_rt.training.run.cost import SDXL_UNET, SDXL_VAE

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SDXL_UNET)
        full = AutoencoderKL.from_config(SDXL_VAE)
        return unet, full, AutoencoderTiny()


def _costs(side_px: int) -> tuple[Cost, dict[str, Cost]]:
    """(the UNet, both VAEs: encode and decode together) at a side in pixels."""
    import torch

    unet, full, tiny = _networks()
    with torch.device("meta"):
        latents = torch.empty(1, 4, side_px // 8, side_px // 8)
        image = torch.empty(1, 3, side_px, side_px)
        words, pooled, ids = (torch.empty(shape) for shape in ((1, 77, 2048), (1, 1280), (1, 6)))
        time = torch.zeros(1)
    added = {"text_embeds": pooled, "time_ids": ids}
    cost = _count(unet, lambda net: net(latents, time, words, added_cond_kwargs=added))

    def both(net: Any) -> None:
        net.encode(image)
        net.decode(latents)

    return cost, {"tiny": _count(tiny, both), "full": _count(full, both)}


def main() -> int:
    """Print the costs and the table, in Markdown."""
    whole = {side: _costs(side) for side in SIZES_PX}
    costs = {side: (unet.without(TEXT), vaes) for side, (unet, vaes) in whole.items()}
    for side, (unet, vaes) in costs.items():
        unet_parts = f"UNet {unet.flop / 1e12:.2f} TFLOP ({unet.attention / 1e12:.2f} of them attention)"
        parts = ", ".join(f"{name} VAE {cost.flop / 1e12:.2f} TFLOP" for name, cost in vaes.items())
        print(f"{side} px: {unet_parts}, {unet.weight_bytes / 1e9:.2f} GB; {parts}")
    columns = [f"{side} px, {steps} step{'s' * (steps > 1)}" for side in SIZES_PX for steps in STEPS]
    print("\n| fps, calculated | VAE | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 2) + "|")
    for gpu in GPUS:
        for name, fp8 in (("tiny", False), ("full", False), *([("tiny", True)] if gpu.fp8 else [])):
            cells = [
                f"{1 / frame_s(gpu, vaes[name], unet.in_fp8() if fp8 else unet, steps):.1f}"
                for unet, vaes in costs.values()
                for steps in STEPS
            ]
            print(f"| {gpu.name}{', UNet in FP8' if fp8 else ''} | {name} | " + " | ".join(cells) + " |")
    print("\nkeys and values of a prompt that is not baked in add to every call of the UNet:")
    for gpu in GPUS:
        added = {side: unet.seconds(gpu) - costs[side][0].seconds(gpu) for side, (unet, _) in whole.items()}
        shares = [f"{added[side] / costs[side][0].seconds(gpu):.1%} at {side}" for side in SIZES_PX]
        print(f"{gpu.name}: {1000 * added[SIZES_PX[0]]:.2f} ms, {', '.join(shares)} px")
    return 0


if __name__ == "__main__":
    sys.exit(main())
