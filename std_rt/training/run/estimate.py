"""What a distillation would take, before it starts: parameters, memory, time per step.

Networks are built on PyTorch's ``meta`` device, where tensors have shapes and no numbers: one forward pass
there counts operations and what is kept for the backward pass, reads no weights and takes seconds for SDXL.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from std_rt.core.schedule import grid_timestep
from std_rt.training.data.buckets import bucket_sizes
from std_rt.training.distil.discriminator import Heads
from std_rt.training.distil.precision import DTYPES
from std_rt.training.distil.trajectory import last_index
from std_rt.training.run.meta_pass import (
    TEXT_TOKENS,
    Network,
    Pass,
    add_meta_lora,
    build_unet,
    build_vae,
    count,
    decode_pass,
    pooled_dim,
    token_dim,
    unet_pass,
)
from std_rt.training.run.recipe import DistilConfig, distil_tau

__all__ = ["Estimate", "describe", "estimate", "measure_flops"]

GIB = 2**30
# Convolutions and attention at training sizes reach about this share of a large matmul's speed.
MATMUL_SHARE = 0.4
# Of what the UNet keeps: kernels' working memory, copies that autocast makes, gradients on their way.
ACTIVATION_MARGIN = 1.5
# bitsandbytes: tensors from this size on take two bytes a number, and two scales a block.
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256
DINO_SIZES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "giant": (1536, 40)}
DINO_PATCH_PX = 14


@dataclass(frozen=True)
class Estimate:
    """What one process of a distillation takes; memory in GiB on the device that trains."""

    config: DistilConfig
    lora_parameters: int
    lora_layers: int
    heads_parameters: int
    unet_parameters: int
    vae_parameters: int
    latent: tuple[int, int, int]  # C, h, w
    memory_gib: dict[str, float]  # by what it is for; activations as the recipe has them
    activations_gib: float  # without gradient checkpointing
    checkpointed_gib: float  # with it
    bank_gib: float
    forward_flops: float  # the bare UNet, one sample
    evaluations: dict[str, float]  # per sample, in forward passes of the bare UNet
    samples: int  # per optimizer step
    device: str
    flops_per_s: float  # of a large matmul
    uncounted: tuple[str, ...]  # what the time leaves out

    @property
    def total_gib(self) -> float:
        return sum(self.memory_gib.values())

    @property
    def step_flops(self) -> float:
        return self.samples * self.forward_flops * sum(self.evaluations.values())

    @property
    def step_s(self) -> float:
        """At ``MATMUL_SHARE`` of a matmul's speed."""
        return self.step_flops / (MATMUL_SHARE * self.flops_per_s)


def estimate(
    config: DistilConfig,
    unet_config: dict[str, Any],
    vae_config: dict[str, Any] | None = None,
    *,
    style_tokens: int = 0,
    encoder_parameters: int = 0,
    heads: int | None = None,
    device: str = "",
    flops_per_s: float | None = None,
) -> Estimate:
    """What ``config`` takes on a base with these ``config.json`` files.

    ``style_tokens``: of a base conditioned on a style picture (std-tiny); 0: on text. ``encoder_parameters``:
    of frozen text or style encoders. ``heads``: the discriminator's parameters, where it does not read
    DINOv2. ``flops_per_s`` takes the place of measuring ``device`` (the one training would choose).
    RecipeError where the recipe does not fit the base.
    """
    unet = build_unet(unet_config, style_tokens)
    vae = None if vae_config is None else build_vae(vae_config)
    frozen, where = count(unet), device or _device()
    sizes = _latent_sizes(config, unet, _vae_scale(vae_config))
    shape = (int(unet.config.in_channels), *sizes[len(sizes) // 2])
    lora = add_meta_lora(unet, config.lora)
    student = unet_pass(unet, shape, DTYPES[config.precision], style_tokens)
    judge = _judge(config, vae, shape)
    heads = _heads(config, unet) if heads is None else heads
    others = count(vae) + encoder_parameters
    memory = _weights(config, frozen, others, lora, heads, on_cpu=where == "cpu")
    memory |= _activations(config, student, judge)
    bank = _bank_bytes(config, unet, shape, len(sizes), style_tokens) / GIB
    if config.bank.device != "cpu" or where == "cpu":
        memory["bank"] = bank
    return Estimate(
        lora_parameters=sum(lora),
        lora_layers=len(lora) // 2,
        heads_parameters=heads,
        unet_parameters=frozen,
        vae_parameters=count(vae),
        latent=shape,
        memory_gib={name: gib for name, gib in memory.items() if gib},
        activations_gib=_activation_gib(config, student.kept),
        checkpointed_gib=_activation_gib(config, student.kept_checkpointed),
        bank_gib=bank,
        forward_flops=student.bare,
        evaluations=_evaluations(config, student, judge),
        samples=config.batch * config.accumulate,
        device=_device_name(where),
        flops_per_s=flops_per_s or measure_flops(where, config.precision),
        uncounted=_uncounted(config, vae),
        config=config,
    )


# --- sizes ----------------------------------------------------------------------------------------------


def _vae_scale(config: dict[str, Any] | None) -> int:
    """Image pixels per latent pixel; SDXL's where there is no config."""
    known = config or {}
    levels = known.get("block_out_channels") or known.get("encoder_block_out_channels") or (0,) * 4
    return int(2 ** (len(levels) - 1))


def _latent_sizes(config: DistilConfig, unet: Network, vae_scale: int) -> list[tuple[int, int]]:
    """Latent heights and widths of the training, the square in the middle. RecipeError as the data's."""
    if config.latents.file:
        return [(config.latents.side, config.latents.side)]
    multiple = vae_scale * 2 ** (len(unet.config.block_out_channels) - 1)
    sizes = bucket_sizes(config.pictures.resolution_px, multiple, config.pictures.buckets)
    return [(h // vae_scale, w // vae_scale) for h, w in sizes]


# --- the discriminator ----------------------------------------------------------------------------------


def _uses_dino(config: DistilConfig) -> bool:
    return config.adversarial.weight > 0 and config.adversarial.features == "dinov2"


def _dino(config: DistilConfig) -> tuple[int, int]:
    """Width and depth of the DINOv2, by its name; the smallest one's for a name that does not say."""
    name = config.adversarial.dino.lower()
    return next((size for kind, size in DINO_SIZES.items() if kind in name), DINO_SIZES["small"])


def _dino_parameters(config: DistilConfig) -> int:
    width, depth = _dino(config)
    return 12 * width**2 * depth if _uses_dino(config) else 0


def _judge(config: DistilConfig, vae: Network | None, shape: tuple[int, int, int]) -> Pass:
    """One sample through decoder and DINOv2."""
    if vae is None or not _uses_dino(config):
        return Pass(0.0)
    decoder = decode_pass(vae, shape)
    width, depth = _dino(config)
    tokens = (config.adversarial.size_px // DINO_PATCH_PX) ** 2 + 1
    seen = depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    # About twenty maps of the width a block, the multilayer perceptron's being four times as wide.
    return Pass(decoder.forward + seen, kept=decoder.kept + 20 * 4.0 * depth * tokens * width)


def _heads(config: DistilConfig, unet: Network) -> int:
    if not _uses_dino(config):
        return 0
    with torch.device("meta"):
        return count(Heads([_dino(config)[0]] * len(config.adversarial.blocks), pooled_dim(unet)))


# --- sums -----------------------------------------------------------------------------------------------


def _evaluations(config: DistilConfig, student: Pass, judge: Pass) -> dict[str, float]:
    """Work per sample, in forward passes of the bare UNet."""
    guided = 1 if config.guidance == (1.0, 1.0) else 2
    again = student.forward if config.gradient_checkpointing else 0.0
    parts = {
        "teacher": guided * _teacher_steps(config) * student.bare,
        "target": student.forward,
        "student": student.forward + student.backward + again,
        # The fake one forward and backward, the real one forward.
        "adversarial": 3 * judge.forward,
    }
    return {name: flops / student.bare for name, flops in parts.items() if flops}


def _uncounted(config: DistilConfig, vae: Network | None) -> tuple[str, ...]:
    judged = config.adversarial.weight > 0
    parts = {
        "data loading": True,
        "encoding of pictures and captions": not config.latents.file,
        "the discriminator on the style encoder": judged and not _uses_dino(config),
        "the discriminator (no autoencoder given)": _uses_dino(config) and vae is None,
        "sheets": True,
    }
    return tuple(name for name, applies in parts.items() if applies)


def _teacher_steps(config: DistilConfig) -> float:
    """One; without the bank, all from tau down to a state drawn uniformly, and one more."""
    if config.method != "std" or config.bank.enabled:
        return 1.0
    tau = distil_tau(config)
    grid_step = grid_timestep(1) - grid_timestep(0)
    top = (tau - grid_timestep(0)) // grid_step
    return 1.0 + (top - last_index(tau, config.run_steps)) / 2


def _weights(
    config: DistilConfig, unet: int, others: int, lora: list[int], heads: int, *, on_cpu: bool
) -> dict[str, float]:
    """Everything that lies in memory all the time, GiB; ``others`` are frozen networks in fp32."""
    # On the CPU the base stays in fp32, and autocast holds its copy of it until the backward pass is done.
    base_bytes = 4 if config.precision == "fp32" else 6 if on_cpu else 2
    states = sum(_optimizer_bytes(n, config.optimizer) for n in lora) + 8 * heads
    parts = {
        "base": base_bytes * unet,
        "encoders": 4 * (others + _dino_parameters(config)),
        "lora": 4 * (sum(lora) + heads),
        "average": 4 * sum(lora),
        "gradients": 4 * (sum(lora) + heads),
        "optimizer": states,
    }
    return {name: size / GIB for name, size in parts.items()}


def _activations(config: DistilConfig, student: Pass, judge: Pass) -> dict[str, float]:
    """What a micro-batch keeps for its backward pass, GiB."""
    kept = student.kept_checkpointed if config.gradient_checkpointing else student.kept
    return {"activations": _activation_gib(config, kept), "judging": judge.kept * config.batch / GIB}


def _activation_gib(config: DistilConfig, kept: float) -> float:
    return kept * config.batch * ACTIVATION_MARGIN / GIB


def _optimizer_bytes(numbers: int, kind: str) -> int:
    """Adam's two moments of a tensor of so many numbers."""
    if kind != "adamw8bit" or numbers < SMALLEST_8BIT:
        return 8 * numbers
    return 2 * numbers + 2 * 4 * -(-numbers // BLOCK_8BIT)


def _bank_bytes(
    config: DistilConfig, unet: Network, shape: tuple[int, int, int], sizes: int, style_tokens: int
) -> float:
    """At most so many: every latent size has a bank of ``capacity`` trajectories, all in fp32."""
    if config.method != "std" or not config.bank.enabled:
        return 0.0
    tokens = 1 + style_tokens if style_tokens else TEXT_TOKENS
    latents = 2 * shape[0] * shape[1] * shape[2]
    numbers = latents + tokens * token_dim(unet) + pooled_dim(unet) + 6 + 5
    return 4.0 * numbers * config.bank.capacity * sizes


# --- the machine ----------------------------------------------------------------------------------------


def _device() -> str:
    """The device that Accelerate would choose."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _device_name(device: str) -> str:
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return device if device != "cpu" else f"this CPU ({torch.get_num_threads()} threads)"


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def measure_flops(device: str, precision: str, seconds: float = 0.3) -> float:
    """Operations per second of a large matmul in ``precision``, measured for about ``seconds``."""
    side = 512 if device == "cpu" else 4096
    rng = torch.Generator().manual_seed(0)
    a = torch.rand(side, side, generator=rng).to(device, DTYPES[precision])
    a @ a
    _synchronize(device)
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        for _ in range(10):
            a @ a
        _synchronize(device)
        count += 10
    return 2.0 * side**3 * count / spent


# --- for people -----------------------------------------------------------------------------------------

MEANINGS = {
    "base": "base weights",
    "encoders": "autoencoder and encoders",
    "lora": "LoRA and heads",
    "average": "moving average",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "judging": "decoder and DINOv2 activations",
    "bank": "trajectory bank",
}


def describe(found: Estimate) -> list[str]:
    """An estimate in a few lines for people, with what it assumes."""
    return [*_size_lines(found), *_memory_lines(found), *_work_lines(found)]


def _size_lines(found: Estimate) -> list[str]:
    heads = f", and {found.heads_parameters:,} in the discriminator's heads" if found.heads_parameters else ""
    return [
        f"trains   {found.lora_parameters:,} parameters in a LoRA of rank {found.config.lora.rank} on "
        f"{found.lora_layers} layers{heads}",
        f"frozen   {found.unet_parameters:,} parameters in the UNet, {found.vae_parameters:,} in the "
        "autoencoder",
    ]


def _memory_lines(found: Estimate) -> list[str]:
    parts = ", ".join(f"{MEANINGS[name]} {gib:.2f}" for name, gib in found.memory_gib.items() if gib >= 0.005)
    chosen = "with" if found.config.gradient_checkpointing else "without"
    lines = [
        f"memory   about {found.total_gib:.2f} GiB on {found.device}, PyTorch's own on top: {parts}",
        f"         activations are rough: {found.activations_gib:.2f} GiB without gradient checkpointing, "
        f"{found.checkpointed_gib:.2f} with it (this recipe: {chosen})",
    ]
    if "bank" not in found.memory_gib and found.bank_gib:
        lines.append(f"         the trajectory bank takes up to {found.bank_gib:.2f} GiB of the CPU's memory")
    return lines


def _work_lines(found: Estimate) -> list[str]:
    c, h, w = found.latent
    units = " + ".join(f"{name} {count:.1f}" for name, count in found.evaluations.items())
    return [
        f"work     a sample takes {sum(found.evaluations.values()):.1f} UNet evaluations ({units}; student: "
        f"forward and backward) of {_amount(found.forward_flops)}FLOP at latents {c}x{h}x{w}",
        f"time     about {_seconds(found.step_s)} a step of {found.samples} samples: an estimate, from "
        f"{_amount(found.step_flops)}FLOP at {MATMUL_SHARE:.0%} of the {_amount(found.flops_per_s)}FLOP/s of "
        f"a {found.config.precision} matmul on {found.device}; without {', '.join(found.uncounted)}",
    ]


def _amount(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e6:.3g} M"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 600 else f"{value / 60:.0f} min"
