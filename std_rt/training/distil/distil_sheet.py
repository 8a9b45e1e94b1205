"""Periodic sheets of a distillation: content, style, the teacher over all grid points, the student at few."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import trajectory_timesteps
from std_rt.training.distil.base import Base
from std_rt.training.distil.distiller import Distiller
from std_rt.training.distil.lora import adapters_off, functional
from std_rt.training.distil.precision import precision_context
from std_rt.training.distil.sampling import Scene, encode_scene, reference_timesteps, sample_latents
from std_rt.training.run.recipe import DistilConfig
from std_rt.training.run.sheet import save_sheet, spread_pairs, to_frames

__all__ = ["SheetMaker"]


class SheetMaker:
    """The same unseen pairs and noise in every sheet; the teacher's pictures are made once."""

    def __init__(self, config: DistilConfig, base: Base, distiller: Distiller, folder: Path) -> None:
        self.config, self.base, self.distiller, self.folder = config, base, distiller, folder
        self.scene = self._scene() if config.sheet.contents else None
        self.left: list[list[Any]] = []  # content, style, teacher of each row

    def make(self, step: int) -> Path | None:
        """Write the sheet of this step; None where the recipe names no held-out pictures."""
        if self.scene is None:
            return None
        if not self.left:
            with adapters_off(self.base.unet):
                teacher = self._run(reference_timesteps(self.distiller.tau), sum(self.config.guidance) / 2)
            self.left = [
                list(row) for row in zip(self.scene.contents, self.scene.styles, teacher, strict=True)
            ]
        columns = [
            self._run(trajectory_timesteps(self.config.eta, n, start=self.distiller.tau), 1.0, student=True)
            for n in self.config.run_steps
        ]
        path = self.folder / "sheets" / f"{step:06d}.png"
        save_sheet(path, [[*left, *outs] for left, *outs in zip(self.left, *columns, strict=True)])
        return path

    def _scene(self) -> Scene:
        sheet = self.config.sheet
        for name, value in (("contents", sheet.contents), ("styles", sheet.styles)):
            if value and not Path(value).is_dir():
                raise RecipeError(
                    f"sheet.{name} = {value!r} is no folder; set it to one, or to '' for no sheets"
                )
        contents = Path(sheet.contents)
        pairs = spread_pairs(contents, Path(sheet.styles or contents), sheet.pairs, sheet.size_px)
        draws = max(self.config.run_steps)
        return encode_scene(self.base, pairs, draws=draws, device=self.distiller.device)

    @torch.no_grad()
    def _run(self, timesteps: list[int], guidance: float, *, student: bool = False) -> list[Any]:
        """Frames of all rows; LCM draws new noise between its steps, the others are deterministic."""
        assert self.scene is not None
        gamma = 1.0 if student and self.config.method == "lcm" else 0.0
        averaged = partial(functional, self.base.unet, self.distiller.average.tensors)
        unet: Any = averaged if student else self.base.unet
        frames: list[Any] = []
        for i in range(len(self.scene.z)):
            row = slice(i, i + 1)
            cond, noise = self.scene.cond.rows(row), self.scene.noise[:, row]
            with precision_context(self.config.precision, torch.device(self.distiller.device).type):
                z: Tensor = sample_latents(
                    self.base, cond, self.scene.z[row], timesteps, guidance, noise, gamma, unet=unet
                )
            frames += to_frames(self.base.decode(z.float()))
        return frames
