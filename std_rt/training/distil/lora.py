"""The student, a LoRA on the base: inject it, switch it off (the teacher), average it, write it.

Weights go by the names that ``named_parameters`` has (``<layer>.lora_A.default.weight``); files have
diffusers' names (``unet.<layer>.lora_A.weight``) and carry flat text notes that say where its trajectory
starts and on which base.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from std_rt import __version__
from std_rt.core.errors import RecipeError
from std_rt.core.schedule import GRID_POINTS, trajectory_timesteps
from std_rt.training.distil.base import Adapter, Motion
from std_rt.training.run.checkpoint import whole_file
from std_rt.training.run.recipe import LORA_TARGETS, LoraConfig

__all__ = [
    "Average",
    "adapters_off",
    "add_lora",
    "call_by_position",
    "choose_layers",
    "functional",
    "lora_parameters",
    "make_notes",
    "save_lora",
    "tuner_layers",
]

# diffusers' modules carry no types.
Network = Any

_ADAPTER = "default"
# Layers of an IP-Adapter have the same kind of names (proj_in, ff.net.2, ...) and are not the student's.
_IMAGE_BRANCH = re.compile(r"(^|\.)(encoder_hid_proj|processor)(\.|$)")

_MOTION_PROJECTION = re.compile(r"motion_modules\.\d+\.proj_(in|out)$")


def add_lora(unet: Network, config: LoraConfig, seed: int) -> list[str]:
    """Freeze ``unet`` and put a trainable fp32 LoRA on its layers; returns the layers' names.

    B starts at zero, so the student starts as the teacher, exactly; A depends on ``seed`` alone. Raises
    RecipeError if a target is the name of no layer. Call the network under autocast if it is in a half type.
    """
    layers = choose_layers(unet, config.targets)
    unet.requires_grad_(False)
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=layers)
    with torch.random.fork_rng(devices=[]):  # PEFT draws values that are replaced below
        unet.add_adapter(settings, _ADAPTER)
    rng = torch.Generator().manual_seed(seed)
    for name, value in lora_parameters(unet).items():
        value.data = _initial(name, value, rng)
        value.requires_grad_(True)
    for layer in tuner_layers(unet):
        # PEFT would cast every input to fp32 for A, and autocast back: thousands of launches for nothing.
        layer.cast_input_dtype_enabled = False
    call_by_position(unet)
    return layers


def call_by_position(unet: nn.Module) -> None:
    """Let the projections of motion modules carry a LoRA: diffusers calls them ``proj_in(input=x)``.

    PEFT's layers name that argument otherwise (diffusers 0.42, PEFT 0.21). To be called again after another
    LoRA was put on; does nothing where there are no motion modules.
    """
    for name, module in unet.named_modules():
        if _MOTION_PROJECTION.search(name) and isinstance(module, BaseTunerLayer):
            module.register_forward_pre_hook(_by_position, with_kwargs=True)


def _by_position(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keyword ``input`` -> the first argument."""
    more = dict(kwargs)
    return ((more.pop("input"), *args) if "input" in more else args), more


def _initial(name: str, value: Tensor, rng: torch.Generator) -> Tensor:
    """A: uniform as a linear layer's default; B: zeros. Drawn on the CPU, the same on every device."""
    start = torch.zeros(value.shape)
    if ".lora_A." in name:
        bound = math.prod(value.shape[1:]) ** -0.5
        start.uniform_(-bound, bound, generator=rng)
    return start.to(value.device)


def choose_layers(unet: nn.Module, targets: Sequence[str]) -> list[str]:
    """Linear and conv layers whose name is a target or ends in ``.target``, in the network's order."""
    names = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not _IMAGE_BRANCH.search(name)
    ]
    used = {name: [target for target in targets if f".{name}".endswith(f".{target}")] for name in names}
    found = {target for hits in used.values() for target in hits}
    # A base need not have every layer that SDXL has; a name that SDXL does not have either is a slip.
    lost = [target for target in targets if target not in found and target not in LORA_TARGETS]
    if lost or not found:
        raise RecipeError(_no_such_layer(lost or list(targets), names))
    return [name for name, hits in used.items() if hits]


def _no_such_layer(lost: Sequence[str], names: Sequence[str]) -> str:
    endings = sorted({_ending(name) for name in names})
    near = difflib.get_close_matches(lost[0], endings, 1) if lost else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    asked = ", ".join(repr(target) for target in lost) or "nothing"
    return (
        f"lora.targets: {asked} fits no linear or conv layer of the UNet{hint} (it has {', '.join(endings)})"
    )


def _ending(name: str) -> str:
    """The shortest end of a layer's name that says what it is: ``to_out.0``, ``downsamplers.0.conv``."""
    parts = name.split(".")
    start = len(parts) - 1
    while start > 0 and (parts[start].isdigit() or parts[start] in ("conv", "proj")):
        start -= 1
    return ".".join(parts[start:])


def lora_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The student's weights by name, in the network's order (the same in every process and run)."""
    return {name: p for name, p in unet.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def tuner_layers(unet: nn.Module) -> list[BaseTunerLayer]:
    """The layers that carry a LoRA. Finding them walks over all modules: keep the list."""
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapters_off(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Inside, the network of these `tuner_layers` is the teacher. Nestable; restored on exceptions.

    Sets the layers' own switch and leaves ``requires_grad`` alone, which PEFT's method would toggle:
    DDP's reducer counts on it. Nothing may be differentiated backwards inside that ran outside with
    gradient checkpointing, which runs the forward again.
    """
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, switch in zip(layers, before, strict=True):
            layer._disable_adapters = switch


@torch.no_grad()
def functional(unet: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """``unet(*args, **kwargs)`` with ``tensors`` in the place of its LoRA, without gradients.

    The live weights are not written to: a graph made before may be differentiated after. ``unet`` is the
    bare network, not its DDP wrapper.
    """
    # torch multiplies another way (rounding otherwise) with weights that want gradients, so these do too.
    weights = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    return torch.func.functional_call(unet, weights, args, kwargs, tie_weights=False)


class Average:
    """Moving average of the LoRA, on its device: ``tensors = decay * tensors + (1 - decay) * live``."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._live = dict(parameters)
        self.tensors = {name: value.detach().clone() for name, value in self._live.items()}

    def update(self, decay: float) -> None:
        """One step towards the live weights; ``decay`` in [0, 1], 0 copies them."""
        get_ema_multi_avg_fn(decay)(list(self.tensors.values()), list(self._live.values()), None)


def make_notes(
    *,
    method: str,
    eta: float,
    tau: int,
    run_steps: Sequence[int],
    guidance: Sequence[float],
    base: str,
    base_digest: str,
    step: int,
    seed: int,
    adapter: Adapter | None = None,
    motion: Motion | None = None,
) -> dict[str, str]:
    """Metadata of a LoRA's file: where it starts, for which step counts, on which base.

    ``tau`` is a grid timestep; ``guidance`` the range of the teacher's scale; ``base_digest`` that of
    ``std_rt.core.base_model.unet_digest``; ``adapter`` and ``motion`` the IP-Adapter and the motion
    adapter that teacher and student had.
    """
    timesteps = {str(count): trajectory_timesteps(eta, count, tau) for count in run_steps}
    return {
        "std_rt_version": __version__,
        "method": method,
        "eta": repr(float(eta)),
        "tau": str(tau),
        "grid": str(GRID_POINTS),
        "steps": " ".join(timesteps),
        "timesteps": json.dumps(timesteps),
        "guidance": json.dumps([float(scale) for scale in guidance]),
        "base": base,
        "base_digest": base_digest,
        "step": str(step),
        "seed": str(seed),
    } | ({} if adapter is None else {
        "ip_adapter": adapter.name,
        "ip_adapter_digest": adapter.digest,
        "style_layers": ",".join(adapter.layers),
    }) | ({} if motion is None else {
        "motion_adapter": motion.name,
        "frames": str(motion.frames),
        "interval": str(motion.interval),
    })  # fmt: skip


def save_lora(
    path: Path,
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, str],
    config: LoraConfig,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write ``tensors`` (named as by `lora_parameters`) in the form that ``pipe.load_lora_weights`` reads.

    Alpha over rank is multiplied into A, so that alpha is the rank in the file: diffusers refuses files with
    ``.alpha`` tensors beside its own names, and other readers do not know its metadata.
    The file appears whole or not at all. Raises RecipeError if a weight is not finite in ``dtype``, or
    if the file cannot be written; an earlier file is kept in both cases.
    """
    # Into A, since B may be near the smallest numbers of fp16.
    strength = config.alpha / config.rank
    scaled = {name: value * strength if ".lora_A." in name else value for name, value in tensors.items()}
    state = {
        f"unet.{name.replace(f'.{_ADAPTER}.', '.')}": _stored(name, value, dtype)
        for name, value in scaled.items()
    }
    with whole_file(path) as partial:
        save_file(state, partial, {**notes, **_adapter_notes(config)})


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    stored = value.detach().to("cpu", dtype).contiguous()
    if not stored.isfinite().all():
        raise RecipeError(
            f"{name} is not finite as {str(dtype).removeprefix('torch.')}, so no LoRA is written; "
            "continue from an earlier snapshot with a lower learning_rate"
        )
    return stored


def _adapter_notes(config: LoraConfig) -> dict[str, str]:
    """Rank and alpha (see `save_lora`), ours and in the form that diffusers reads."""
    adapter = {
        "unet.r": config.rank,
        "unet.lora_alpha": config.rank,
        "unet.target_modules": list(config.targets),
    }
    return {
        "format": "pt",
        "rank": str(config.rank),
        "alpha": str(config.rank),
        "lora_adapter_metadata": json.dumps(adapter),
    }
