"""Checkpoints: everything a run needs to go on, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from std_rt.errors import RecipeError


def _flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[Any]]:
    tensors = {
        f"{i}.{key}": value.contiguous().clone()
        for i, entry in state["state"].items()
        for key, value in entry.items()
    }
    return tensors, state["param_groups"]


def _unflatten_optimizer(tensors: dict[str, Tensor], groups: list[Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": groups}


def save_checkpoint(
    path: Path,
    modules: dict[str, dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    generator: torch.Generator,
    progress: dict[str, Any],
) -> None:
    """Write modules, optimizer, random states and progress to ``path`` (safetensors), atomically."""
    optim, groups = _flatten_optimizer(optimizer.state_dict())
    tensors = {f"module/{m}/{k}": v.contiguous().clone() for m, sd in modules.items() for k, v in sd.items()}
    tensors |= {f"optimizer/{k}": v for k, v in optim.items()}
    tensors["torch_rng"] = generator.get_state()
    meta = {
        "groups": json.dumps(groups),
        "numpy_rng": json.dumps(rng.bit_generator.state),
        "progress": json.dumps(progress),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, meta)
    partial.replace(path)


def load_checkpoint(
    path: Path,
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Restore optimizer and random states; return the modules' state dicts and the progress."""
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as f:
            meta = f.metadata()
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"checkpoint {path} cannot be read ({error}); delete it to start over") from None
    modules: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("module/"):
            _, module, key = name.split("/", 2)
            modules.setdefault(module, {})[key] = value
    optim = {k.removeprefix("optimizer/"): v for k, v in tensors.items() if k.startswith("optimizer/")}
    optimizer.load_state_dict(_unflatten_optimizer(optim, json.loads(meta["groups"])))
    rng.bit_generator.state = json.loads(meta["numpy_rng"])
    generator.set_state(tensors["torch_rng"])
    return modules, json.loads(meta["progress"])
