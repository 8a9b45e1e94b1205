"""State of a distillation on disk: what resumes it, written so that a kill at any moment loses nothing.

``checkpoints/000300/`` holds one file that all processes share (LoRA, average, discriminator, optimizers)
and one of each process (bank, random states, place in the data). A file named ``newest`` says which folder
is whole; it is replaced last, so a folder that was being written when the power went is never read.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from std_rt.core.errors import RecipeError
from std_rt.core.files import write_text
from std_rt.training.distil.discriminator import Adversary
from std_rt.training.distil.distiller import Distiller
from std_rt.training.distil.lora import Average
from std_rt.training.run.checkpoint import (
    flatten_optimizer,
    load_state,
    restore_optimizer,
    save_state,
    unpacking,
)
from std_rt.training.run.recipe import DistilConfig, as_dict, check_same_run

__all__ = ["DistilState", "Logs", "start_folder"]


def start_folder(folder: Path, config: DistilConfig, *, write: bool) -> None:
    """Make the run folder and keep the recipe in it; RecipeError where another recipe's run lies there."""
    if (folder / "checkpoints" / "newest").exists():
        check_same_run(config, folder)
    if not write:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.json", json.dumps(as_dict(config), indent=1))
    except OSError as error:
        raise RecipeError(f"the run folder {folder} cannot be written: {error}; set --output") from None


class Logs:
    """Losses since the last line of the log; they stay on the device until a line is written."""

    def __init__(self, accelerator: Accelerator, per_step: int) -> None:
        self.accelerator, self.per_step = accelerator, per_step
        self.kept: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.kept.setdefault(name, []).append(value.detach().float())

    def means(self, step: int) -> dict[str, float]:
        """Means over steps and processes; RecipeError names the first step with a value that is no number."""
        stacked = {name: torch.stack(values) for name, values in self.kept.items()}
        self.kept = {}
        means = {name: float(self.accelerator.reduce(v.mean(), "mean").item()) for name, v in stacked.items()}
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        if wrong:
            raise RecipeError(self._complaint(wrong[0], stacked[wrong[0]], step))
        return means

    def _complaint(self, name: str, values: Tensor, step: int) -> str:
        bad = (~values.isfinite()).nonzero()
        per_step = 1 if name == "gradient" else self.per_step  # noted once an optimizer step
        back = 0 if not len(bad) else (len(values) - 1 - int(bad[0])) // per_step
        return (
            f"the {name} is not a number at step {step - back}; lower learning_rate or set "
            "precision = 'fp32', then run the same command to go on from the last checkpoint"
        )


class DistilState:
    """Saves and restores one process's part of a run."""

    def __init__(
        self,
        folder: Path,
        distiller: Distiller,
        parameters: dict[str, nn.Parameter],
        average: Average,
        adversary: Adversary | None,
        optimizers: dict[str, Any],
        accelerator: Accelerator,
    ) -> None:
        self.root = folder / "checkpoints"
        self.distiller, self.parameters, self.average, self.adversary = (
            distiller,
            parameters,
            average,
            adversary,
        )
        self.optimizers = {name: o for name, o in optimizers.items() if o is not None}
        self.accelerator = accelerator

    def save(self, step: int) -> None:
        """Write a checkpoint; on an error the last good one stands and the error says so."""
        target = self.root / f"{step:06d}"
        rank = self.accelerator.process_index
        tensors, meta = self._own()
        standing = self._newest() or self.root
        save_state(target / f"rank{rank}.safetensors", tensors, meta, last_good=standing)
        if self.accelerator.is_main_process:
            tensors, meta = self._shared(step)
            save_state(target / "shared.safetensors", tensors, meta, last_good=standing)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._publish(target)

    def _publish(self, target: Path) -> None:
        try:
            write_text(self.root / "newest", target.name, durable=True)
        except OSError as error:
            raise RecipeError(
                f"{self.root / 'newest'} cannot be written ({error}); the checkpoint before it stands"
            ) from None
        for old in self.root.iterdir():
            if old.is_dir() and old != target:
                shutil.rmtree(old)

    def restore(self) -> int:
        """Load the newest checkpoint; returns its step, 0 where there is none."""
        folder = self._newest()
        self._check_together(folder)
        if folder is None:
            return 0
        shared = folder / "shared.safetensors"
        tensors, meta = load_state(shared)
        with unpacking(shared):
            if meta["world"] != self.accelerator.num_processes:
                raise RecipeError(
                    f"{self.root.parent} was trained by {meta['world']} processes, now there are "
                    f"{self.accelerator.num_processes}; start as many, or choose another output"
                )
            self._load_shared(tensors, meta)
        own = folder / f"rank{self.accelerator.process_index}.safetensors"
        state = load_state(own)
        with unpacking(own):
            self._load_own(*state)
        return int(meta["step"])

    def _check_together(self, folder: Path | None) -> None:
        """Every process must see the same checkpoint, or they would train different weights."""
        step = torch.tensor([0 if folder is None else int(folder.name)], device=self.accelerator.device)
        steps = set(self.accelerator.gather(step).tolist())
        if len(steps) > 1:
            raise RecipeError(
                f"processes would go on from different steps {sorted(steps)} of {self.root.parent}; "
                "the output must be one folder that all nodes share"
            )

    def _newest(self) -> Path | None:
        """The last whole checkpoint's folder."""
        pointer = self.root / "newest"
        return self.root / pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None

    # --- what all processes share -------------------------------------------------------------------

    def _shared(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"lora/{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"average/{name}": value for name, value in self.average.tensors.items()}
        if self.adversary is not None:
            heads = self.adversary.heads.state_dict()
            tensors |= {f"heads/{name}": value for name, value in heads.items()}
        groups = {}
        for name, optimizer in self.optimizers.items():
            flat, groups[name] = flatten_optimizer(f"{name}_optimizer", optimizer)
            tensors |= flat
        scaler = self.accelerator.scaler
        meta = {"step": step, "world": self.accelerator.num_processes, "groups": groups}
        return tensors, meta | {"scaler": None if scaler is None else scaler.state_dict()}

    def _load_shared(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(tensors[f"lora/{name}"])
            for name, average in self.average.tensors.items():
                average.copy_(tensors[f"average/{name}"])
        if self.adversary is not None:
            self.adversary.heads.load_state_dict(_part(tensors, "heads/"))
        for name, optimizer in self.optimizers.items():
            restore_optimizer(f"{name}_optimizer", optimizer, tensors, meta["groups"][name])
        if self.accelerator.scaler is not None and meta["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(meta["scaler"])

    # --- what each process has ----------------------------------------------------------------------

    def _own(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        d = self.distiller
        tensors, bank = d.bank.state()
        named = {f"bank/{name}": value for name, value in tensors.items()}
        named["generator"] = d.generator.get_state()
        return named, {"bank": bank, "rng": d.rng.bit_generator.state, "source": d.source.state()}

    def _load_own(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        d = self.distiller
        d.bank.restore(_part(tensors, "bank/"), meta["bank"])
        d.generator.set_state(tensors["generator"])
        d.rng.bit_generator.state = meta["rng"]
        d.source.load_state(meta["source"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
