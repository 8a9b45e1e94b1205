"""What every training stage shares: the run folder, resuming, the optimizer step, progress and log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from std_rt.core.errors import RecipeError
from std_rt.core.files import write_text
from std_rt.training.run.checkpoint import load_checkpoint, save_checkpoint
from std_rt.training.run.recipe import as_dict, check_same_run
from std_rt.training.run.sheet import save_curve


class Run:
    """A resumable run in ``config.output``: the same call goes on where the last one stopped.

    Everything random must come from ``rng`` and ``generator``, which are part of the checkpoint, so
    that a resumed run equals an unbroken one.
    """

    def __init__(
        self, config: Any, modules: dict[str, nn.Module], parameters: list[nn.Parameter], weight_decay: float
    ) -> None:
        self.config, self.modules, self.parameters = config, modules, parameters
        self.folder = Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            check_same_run(config, self.folder)
        self.optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        self.rng = np.random.default_rng(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.start, self.seen = 0, 0
        self.losses: list[float] = []
        self._restore()
        write_text(self.folder / "recipe.json", json.dumps(as_dict(config), indent=1))

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _restore(self) -> None:
        if not self.checkpoint.exists():
            return
        states, progress = load_checkpoint(self.checkpoint, self.optimizer, self.rng, self.generator)
        for name, module in self.modules.items():
            module.load_state_dict(states[name])
        self.start, self.losses = progress["step"], progress["losses"]

    def steps(self, rate: Callable[[int], float], stop_after: int | None = None) -> Iterator[int]:
        """Step numbers still to do, with the learning rate ``rate(step)`` set and a progress bar drawn."""
        self.end = min(self.config.steps, stop_after or self.config.steps)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as bar:
            task = bar.add_task(self.config.stage, total=self.config.steps, completed=self.start, note="")
            self.clock = time.monotonic()
            for step in range(self.start, self.end):
                for group in self.optimizer.param_groups:
                    group["lr"] = rate(step)
                yield step
                bar.update(task, completed=step + 1, note=f"loss {np.mean(self.losses[-100:]):.4f}")

    def update(self, loss: Tensor, samples: int) -> None:
        """One optimizer step; RecipeError where the loss is not a number (the last checkpoint stands)."""
        value = loss.item()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not (math.isfinite(value) and torch.isfinite(norm)):
            raise RecipeError(
                f"the loss is not a number at step {len(self.losses)}; lower learning_rate or set "
                "bf16 = false, then run the same command to go on from the last checkpoint"
            )
        self.optimizer.step()
        self.losses.append(round(value, 5))
        self.seen += samples

    def due(self, step: int) -> bool:
        """Whether a checkpoint and a sheet are due after this step."""
        return (step + 1) % self.config.snapshot_every == 0 or step + 1 == self.end

    def sheet(self, step: int) -> Path:
        return self.folder / "sheets" / f"{step + 1:06d}.png"

    def save(self, step: int, **figures: float) -> None:
        """Write the checkpoint, a line of the log and the loss curve."""
        row: dict[str, float] = {
            "step": step + 1,
            "loss": float(np.mean(self.losses[-self.config.snapshot_every :])),
        }
        row |= {"samples_per_s": self.seen / (time.monotonic() - self.clock), **figures}
        states = {name: module.state_dict() for name, module in self.modules.items()}
        progress = {"step": step + 1, "losses": self.losses}
        save_checkpoint(self.checkpoint, states, self.optimizer, self.rng, self.generator, progress)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        save_curve(self.folder / "loss.png", self.losses, f"{self.config.stage} loss")


def cosine_rate(
    base: float, step: int, steps: int, warmup: int, flat: float = 0.0, floor: float = 0.02
) -> float:
    """Linear warm-up, ``base`` until the share ``flat`` of all steps, then a cosine to ``floor * base``."""
    late = max(0.0, (step / steps - flat) / (1 - flat))
    return base * min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * late)))
