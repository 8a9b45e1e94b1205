"""The cost of a distillation, before it starts: parameters, memory by kind, rough time of a step.

Networks are built on PyTorch's ``meta`` device, where tensors have shapes and no numbers: one forward pass
there counts operations and the sizes of all layers' outputs, reads no weights and takes seconds for SDXL.
What training keeps for the backward pass is about those outputs; all sums are for one process.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from std_rt.core.errors import ExportError, RecipeError, one_line
from std_rt.models.autoencoder import AutoencoderPixelShuffle
from std_rt.models.components import motion_unet
from std_rt.models.ip_adapter import attach_diffusers, make_projection, pair_branches, read_ip_adapter
from std_rt.models.ip_adapter import choose_layers as choose_style_layers
from std_rt.models.perceptual import load_perceptual
from std_rt.training.data.buckets import bucket_sizes
from std_rt.training.distil.base import check_source, read_json, style_adapter, style_encoder_folder
from std_rt.training.distil.discriminator import Heads
from std_rt.training.distil.features import PerceptualFeatures
from std_rt.training.distil.lora import choose_layers
from std_rt.training.distil.trajectory import CLEAN, draw_target, last_index, phase_edges
from std_rt.training.run.precision import DTYPES, resolve_precision
from std_rt.training.run.recipe import (
    DistilConfig,
    Precision,
    describe_rates,
    distil_tau,
    target_window,
)
from std_rt.training.tiny.tiny_pipeline import add_style_attention

__all__ = ["Estimate", "describe", "describe_run", "estimate", "measure_flops"]

GIB = 2**30
MATMUL_SHARE = 0.4  # of a large matmul's speed that convolutions and attention reach at training sizes
MARGIN = 1.5  # on kept outputs: working memory of kernels, copies that autocast makes, gradients on their way
CHECKPOINTED = 0.1  # of the outputs that gradient checkpointing keeps, measured on SDXL
DECODER_CHECKPOINTED = 0.65  # the same of its decoder, whose last blocks have most of them
TEXT_TOKENS = 77
DINO_SIZES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "giant": (1536, 40)}
DINO_PATCH_PX = 14

# The architecture of SDXL base 1.0, so that its cost can be estimated without a download.
SDXL_NAME = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SDXL_MOTION_NAME = "guoyww/animatediff-motion-adapter-sdxl-beta"
SDXL_MOTION: dict[str, Any] = {"block_out_channels": [320, 640, 1280], "use_motion_mid_block": False}
SDXL_TEXT_PARAMETERS = 817_720_320  # CLIP ViT-L's and OpenCLIP bigG's text towers with their projection

# diffusers' modules carry no types.
Network = Any


@dataclass(frozen=True)
class Estimate:
    """What one process of a distillation takes."""

    parameters: dict[str, int]  # lora, heads, unet, vae
    lora_layers: int
    memory_gib: dict[str, float]  # by kind, on the device that trains
    bank_gib: float  # of the CPU's memory if it is not among these
    evaluations: dict[str, float]  # per sample, in forward passes of the bare UNet
    step_flops: float
    flops_per_s: float  # of a large matmul
    device: str

    @property
    def step_s(self) -> float:
        """At ``MATMUL_SHARE`` of a matmul's speed."""
        return self.step_flops / (MATMUL_SHARE * self.flops_per_s)


def describe_run(config: DistilConfig) -> list[str]:
    """An estimate of ``config`` as lines; RecipeError if the base's configs are missing or do not fit."""
    named = {
        "pictures.folder": config.pictures.folder,
        "style.folder": config.style.folder,
        "sheet.contents": config.sheet.contents,
        "sheet.styles": config.sheet.styles,
    }
    lost = [
        f"{key} = {name!r} does not exist yet"
        for key, name in named.items()
        if name and not Path(name).exists()
    ]
    return [*describe(config, estimate(config)), *lost]


def estimate(config: DistilConfig, device: str = "", flops_per_s: float | None = None) -> Estimate:
    """What ``config`` takes on ``device`` (by default the one that training would choose).

    ``flops_per_s``: instead of measuring the device. RecipeError as `describe_run`.
    """
    chosen = torch.accelerator.current_accelerator(check_available=True)  # as Accelerate chooses
    device = device or (chosen.type if chosen else "cpu")
    config = replace(config, precision=_precision(config, device))
    unet_config, vae_config, style, encoders = _configs(config.base)
    own = bool(style)
    unet, vae = _build_unet(unet_config, int(style.get("tokens", 0))), _build_vae(vae_config)
    tokens = int(style["tokens"]) if own else 0
    if config.style.adapter:
        tokens, more = _add_adapter(unet, config)
        encoders += more
    sizes = _latent_sizes(config, unet, vae)
    picture = (int(unet.config.in_channels), *sizes[len(sizes) // 2])
    shape: tuple[int, ...] = picture
    if config.motion.adapter:
        unet = _add_motion(unet, config.motion.adapter)
        shape = (picture[0], config.motion.frames, *picture[1:])
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    words = 1 if own else TEXT_TOKENS
    inputs = _unet_inputs(unet, shape, pooled, words, tokens)
    flops, outputs = _forward(unet, **inputs)
    dim = inputs["encoder_hidden_states"].shape[2]
    judge = _judge(config, style, vae, picture, pooled + (dim if tokens else 0))
    judged = config.motion.judged if config.motion.adapter else 1  # pictures of a sample

    modules = dict(unet.named_modules())
    layers = [modules[name].weight for name in choose_layers(unet, config.lora.targets)]
    # A and B of a linear layer; of a convolution, A has the kernel's size and B none.
    lora = sum(config.lora.rank * (w.numel() // w.shape[0] + w.shape[0]) for w in layers)
    counts = {"lora": lora, "heads": judge.heads, "unet": _count(unet), "vae": _count(vae)}

    context = dim * (words + tokens)
    channels = shape[0] + int(unet.config.out_channels)  # z and x, and the content where the UNet sees it
    row = channels * math.prod(shape[1:]) + context + pooled + 6 + 5  # of the bank, all fp32
    with_bank = config.method == "std" and config.bank.enabled
    bank = 4 * row * config.bank.capacity * len(sizes) / GIB if with_bank else 0.0
    kept = outputs * DTYPES[config.precision].itemsize * config.batch * MARGIN
    recomputed = config.gradient_checkpointing and vae._supports_gradient_checkpointing
    kept_judging = judged * (judge.kept + judge.decoder * (DECODER_CHECKPOINTED if recomputed else 1))
    half = config.precision != "fp32" and device != "cpu" and not own
    wide = counts["vae"] + judge.frozen + encoders * (0.5 if half else 1)
    memory = _weights(config, counts, wide, on_cpu=device == "cpu") | {
        "activations": kept * (CHECKPOINTED if config.gradient_checkpointing else 1) / GIB,
        "decoder and DINOv2 activations": 4 * kept_judging * config.batch / GIB,
        "trajectory bank": bank if config.bank.device != "cpu" or device == "cpu" else 0.0,
    }
    work = _evaluations(config, lora / counts["unet"], judged * judge.flops / flops)
    return Estimate(
        parameters=counts,
        lora_layers=len(layers),
        memory_gib={name: gib for name, gib in memory.items() if gib},
        bank_gib=bank,
        evaluations=work,
        step_flops=config.batch * config.accumulate * flops * sum(work.values()),
        flops_per_s=flops_per_s or measure_flops(device, config.precision),
        device=device,
    )


def _precision(config: DistilConfig, device: str) -> Precision:
    return resolve_precision(config.precision, torch.device(device).type)


# --- the base's networks ----------------------------------------------------------------------------------


def _configs(base: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
    """Configs of (UNet, VAE, style encoder or {}), and how many parameters the encoders have."""
    folder = check_source(base)
    if folder.is_dir():
        unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
        path = folder / "image_encoder" / "config.json"
        style = read_json(path) if path.is_file() else {}
        if style.get("_class_name") == "StyleEncoder":
            return unet, vae, style, _stored(folder / "image_encoder")
        return unet, vae, {}, sum(_stored(folder / part) for part in ("text_encoder", "text_encoder_2"))
    if base == SDXL_NAME:
        return SDXL_UNET, SDXL_VAE, {}, SDXL_TEXT_PARAMETERS
    try:
        unet = diffusers.UNet2DConditionModel.load_config(base, subfolder="unet")
        return unet, diffusers.AutoencoderKL.load_config(base, subfolder="vae"), {}, 0
    except (OSError, ValueError) as error:
        reason = one_line(error, 150)
        raise RecipeError(f"base = {base!r} is not a folder, and cannot be fetched: {reason}") from None


def _stored(folder: Path) -> int:
    """Numbers in the weights of a part, by the size of its files; one variant of several, in fp32."""
    files = sorted(folder.glob("*.safetensors"))
    return sum(path.stat().st_size for path in [p for p in files if "fp16" not in p.name] or files) // 4


def _build_unet(config: dict[str, Any], style_tokens: int) -> Network:
    """A UNet of SDXL's kind; with ``style_tokens`` as std-tiny's."""
    try:
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel.from_config(config)
            if style_tokens:
                add_style_attention(unet, style_tokens)
    except (TypeError, ValueError, KeyError) as error:
        reason = one_line(error, 200)
        raise RecipeError(f"the base's unet/config.json does not describe a UNet: {reason}") from None
    if unet.config.addition_embed_type != "text_time":
        raise RecipeError("the base's UNet is not an SDXL UNet (it has no text_time embedding)")
    return unet


def _add_adapter(unet: Network, config: DistilConfig) -> tuple[int, int]:
    """Give a UNet without numbers the recipe's image branches: (style tokens, parameters of their encoder).

    The encoder counts nothing where the tokens are computed before the first step.
    """
    path, folder = style_adapter(config.style), style_encoder_folder(Path(config.base), config.style)
    try:
        projection, weights = read_ip_adapter(path)
        branches = pair_branches(unet, weights)
        _, layers = choose_style_layers(unet, config.style.layers, own_encoder=False)
        module, _ = make_projection(unet, projection, path)
    except ExportError as error:
        raise RecipeError(str(error)) from None
    tokens = module.latents.shape[1] if hasattr(module, "latents") else module.num_image_text_embeds
    with torch.device("meta"):
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in layers:
            key, value = branches[layer]
            kept[layer] = key.to("meta"), value.to("meta")
        attach_diffusers(unet, kept, tokens)
    return tokens, 0 if config.style.precompute else _stored(folder) + _count(module)


def _add_motion(unet: Network, source: str) -> Network:
    """A UNet without numbers with a motion adapter's modules, by the adapter's config."""
    try:
        found = SDXL_MOTION if source == SDXL_MOTION_NAME else diffusers.MotionAdapter.load_config(source)
        with torch.device("meta"):
            adapter = diffusers.MotionAdapter.from_config(found)
            return motion_unet(unet, adapter, weights=False)
    except (OSError, TypeError, ValueError, KeyError) as error:
        reason = one_line(error, 200)
        raise RecipeError(f"motion.adapter = {source!r} does not fit the base's UNet: {reason}") from None


def _build_vae(config: dict[str, Any]) -> Network:
    name = str(config.get("_class_name", "AutoencoderKL"))
    ours = {AutoencoderPixelShuffle.__name__: AutoencoderPixelShuffle}
    kind: Network = ours.get(name) or getattr(diffusers, name, None)
    if not hasattr(kind, "from_config"):
        raise RecipeError(f"the base's vae/config.json names {name}, which diffusers does not have")
    with torch.device("meta"):
        return kind.from_config(config)


def _latent_sizes(config: DistilConfig, unet: Network, vae: Network) -> list[tuple[int, int]]:
    """Latent heights and widths of the training, the square in the middle."""
    if config.triplets.folder:
        return [(config.triplets.side, config.triplets.side)]
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    multiple = scale * 2 ** (len(unet.config.block_out_channels) - 1)
    sizes = bucket_sizes(config.pictures.resolution_px, multiple, config.pictures.buckets)
    return [(h // scale, w // scale) for h, w in sizes]


def _unet_inputs(
    unet: Network, shape: tuple[int, ...], pooled: int, words: int, style_tokens: int
) -> dict[str, Any]:
    """One sample, without numbers; ``shape`` ``[C, h, w]``, of clips ``[C, T, h, w]``."""
    rows = shape[1] if len(shape) == 4 else 1  # of the context
    dims = unet.config.cross_attention_dim
    dim = dims if isinstance(dims, int) else max(dims)
    with torch.device("meta"):
        added: dict[str, Any] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        if style_tokens:
            added["image_embeds"] = [torch.empty(1, 1, style_tokens, dim)]
        return {
            "sample": torch.empty(1, *shape),
            "timestep": torch.empty(1, dtype=torch.long),
            "encoder_hidden_states": torch.empty(rows, words, dim),
            "added_cond_kwargs": added,
        }


def _forward(call: Network, *args: Any, **kwargs: Any) -> tuple[float, int]:
    """Operations of one forward pass, and the numbers in the outputs of all its layers."""
    network: Network = getattr(call, "__self__", call)
    sizes: list[int] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel())

    leaves = [m for m in network.modules() if not list(m.children())]
    hooks = [m.register_forward_hook(note) for m in leaves]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return float(counter.get_total_flops()), sum(sizes)


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# --- the discriminator ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judge:
    """The discriminator's part, for one sample."""

    heads: int = 0  # parameters that train
    frozen: int = 0  # parameters of DINOv2
    flops: float = 0.0  # of decoder and DINOv2
    kept: float = 0.0  # numbers that DINOv2 keeps for the backward pass
    decoder: float = 0.0  # and the decoder


def _judge(
    config: DistilConfig, style: dict[str, Any], vae: Network, shape: tuple[int, ...], pooled: int
) -> _Judge:
    chosen = config.adversarial
    if not chosen.weight:
        return _Judge()
    if chosen.features == "style":
        channels = [style["latent_channels"], *style["widths"]] if style else []
        return _Judge(_count_heads(channels, pooled))
    flops, outputs = _forward(vae.decode, torch.empty(1, *shape, device="meta"))
    if chosen.features == "perceptual":
        features = PerceptualFeatures(load_perceptual(chosen.perceptual), vae.decode)
        features.to("meta")
        side = 2 ** (len(vae.config.block_out_channels) - 1)
        seen, kept = _forward(
            features.network, torch.empty(1, 3, side * shape[1], side * shape[2], device="meta")
        )
        heads = _count_heads(features.channels, pooled)
        return _Judge(heads, _count(features.network), flops + seen, kept, outputs)
    named = (size for kind, size in DINO_SIZES.items() if kind in chosen.dino.lower())
    width, depth = next(named, DINO_SIZES["small"])
    tokens = (chosen.size_px // DINO_PATCH_PX) ** 2 + 1
    return _Judge(
        _count_heads([width] * len(chosen.blocks), pooled),
        12 * width**2 * depth,
        flops + depth * (24 * tokens * width**2 + 4 * tokens**2 * width),
        # About twenty maps of the width per block, the multilayer perceptron's being four times as wide.
        20.0 * depth * tokens * width,
        outputs,
    )


def _count_heads(channels: list[int], pooled: int) -> int:
    with torch.device("meta"):
        return _count(Heads(channels, pooled))


# --- sums -------------------------------------------------------------------------------------------------


def _weights(config: DistilConfig, counts: dict[str, int], wide: float, *, on_cpu: bool) -> dict[str, float]:
    """Everything held in memory all the time, GiB; ``wide``: numbers in fp32 of other frozen networks."""
    # On the CPU the base stays in fp32, and autocast holds its copy of it until the backward pass is done.
    base_bytes = 4 if config.precision == "fp32" else 6 if on_cpu else 2
    moments = 2 if config.optimizer == "adamw8bit" else 8  # Adam's two, bytes per number
    loras = counts["lora"] * (2 if config.method == "dmd" else 1)  # its score is one, too
    trained = loras + counts["heads"]
    parts = {
        "base weights": base_bytes * counts["unet"],
        "autoencoder and encoders": 4 * wide,
        "LoRA and heads": 4 * trained,
        "moving average": 4 * counts["lora"],
        "gradients": 4 * trained,
        "optimizer states": moments * loras + 8 * counts["heads"],
    }
    return {name: size / GIB for name, size in parts.items()}


def _judged_share(config: DistilConfig) -> float:
    """Share of the samples that the discriminator is shown."""
    if config.adversarial.jumps == "all":
        return 1.0
    tau = distil_tau(config)
    last, top = last_index(tau, config.run_steps), (tau + 1) // 20 - 1
    index = torch.arange(last, top + 1).repeat(500)
    window, edges = target_window(config.eta, config.window, tau), phase_edges(tau, config.phases)
    rng = torch.Generator().manual_seed(0)
    s = draw_target(config.method, index, window, edges, rng, config.stride)
    return float((s == CLEAN).float().mean())


def _evaluations(config: DistilConfig, lora: float, judge: float) -> dict[str, float]:
    """Work per sample in forward passes of the bare UNet; ``lora`` and ``judge`` cost those shares of one."""
    guided = 1 if config.guidance == (1.0, 1.0) else 2
    judge *= _judged_share(config)
    forward = 1 + lora
    again = forward if config.gradient_checkpointing else 0.0
    teacher_steps = 1.0
    if config.method == "std" and not config.bank.enabled:  # from tau down to a state drawn uniformly
        tau = distil_tau(config)
        teacher_steps += ((tau + 1) // 20 - 1 - last_index(tau, config.run_steps)) / 2
    dmd = config.method == "dmd"
    # On average a state lies in the middle of an own run.
    own_steps = sum(n - 1 for n in config.run_steps) / len(config.run_steps) / 2
    parts = {
        "teacher": guided * teacher_steps,
        "target": 0.0 if dmd else forward,
        "own runs": own_steps * forward if dmd else 0.0,
        "score": 3 * forward + lora if dmd else 0.0,  # estimates in both losses, and the backward of one
        # A frozen layer's backward is one forward (its input's gradient); the LoRA's are two.
        "student": forward + again + 1 + 2 * lora,
        "adversarial": 3 * judge,  # the fake one forward and backward, the real one forward
    }
    return {name: units for name, units in parts.items() if units}


# --- the machine ------------------------------------------------------------------------------------------


def measure_flops(device: str, precision: str, seconds: float = 0.3) -> float:
    """Operations per second of a large matmul in ``precision``, measured for about ``seconds``."""
    side = 512 if device == "cpu" else 4096
    a = torch.rand(side, side).to(device, DTYPES[precision])
    (a @ a)[0, 0].item()  # CUDA loads its libraries at the first product
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        for _ in range(10):
            product = a @ a
        product[0, 0].item()  # waits for the device
        count += 10
    return 2.0 * side**3 * count / spent


# --- as text ----------------------------------------------------------------------------------------------


def describe(config: DistilConfig, found: Estimate) -> list[str]:
    """An estimate as a table, with what it assumes."""
    counts, samples = found.parameters, config.batch * config.accumulate
    heads = f", {counts['heads']:,} in the discriminator's heads" if counts["heads"] else ""
    units = " + ".join(f"{name} {count:.1f}" for name, count in found.evaluations.items())
    elsewhere = "" if "trajectory bank" in found.memory_gib or not found.bank_gib else (
        f"; the trajectory bank takes {found.bank_gib:.2f} GiB of the CPU's memory"
    )  # fmt: skip
    return [
        f"trains   {counts['lora']:,} parameters in a LoRA of rank {config.lora.rank} on "
        f"{found.lora_layers} layers{heads}",
        f"frozen   {counts['unet']:,} parameters in the UNet, {counts['vae']:,} in the autoencoder",
        f"rate     {describe_rates(config)}",
        f"memory   about {sum(found.memory_gib.values()):.2f} GiB on {found.device}, PyTorch's own on top"
        f"{elsewhere}",
        *(f"  {gib:8.2f} GiB  {name}" for name, gib in found.memory_gib.items() if gib >= 0.005),
        f"work     {sum(found.evaluations.values()):.1f} UNet evaluations per sample ({units})",
        f"time     about {found.step_s:.3g} s per step of {samples} samples, at {MATMUL_SHARE:.0%} of the "
        f"{found.flops_per_s / 1e12:.3g} TFLOP/s of a {_precision(config, found.device)} matmul here; "
        "data loading, encoding and sheets come on top",
    ]
