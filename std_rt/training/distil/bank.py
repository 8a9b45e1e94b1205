"""The trajectory bank: unfinished teacher trajectories, kept between training steps.

Every slot is one trajectory that began at tau: its real latents, its present state, its conditioning, its
guidance and its number. A training step takes some, the teacher moves them one grid point down, and they are
written back, so that any state costs one teacher step instead of a solve from tau (Single Trajectory
Distillation, arXiv 2412.18945, section 3.2).

Every trajectory is visited once at every grid point, so visits over t are uniform as long as finished ones
are replaced. The bank drops a finished trajectory and says how many are missing; `Distiller.draw_states`
starts as many new ones in the next step, which makes the share of fresh starts 1/L (L = grid points of a
trajectory).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import GRID_POINTS
from std_rt.training.distil.base import Conditioning, Rows, cat
from std_rt.training.distil.trajectory import send

__all__ = ["Shape", "States", "TrajectoryBank"]

Shape = tuple[int, int]


@dataclass(frozen=True)
class States(Rows):
    """States on trajectories, one row per sample; latents fp32 ``[B, C, h, w]``."""

    z: Tensor  # the item's own real latents
    x: Tensor  # the state at ``index``
    index: Tensor  # [B] grid index
    scale: Tensor  # [B] guidance scale (diffusers' meaning; w = scale - 1), drawn once per trajectory
    id: Tensor  # [B] number of the trajectory
    cond: Conditioning

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str) -> States:
        """``index`` and ``id`` stay on the CPU: the loop decides by them, and must not wait for a GPU."""
        z, x, scale = (send(v, device) for v in (self.z, self.x, self.scale))
        cond = self.cond.map(lambda v: send(v, device))
        return replace(self, z=z, x=x, scale=scale, cond=cond)

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a checkpoint."""
        plain = {name: value for name, value in vars(self).items() if name != "cond"}
        return plain | {f"cond.{name}": v for name, v in vars(self.cond).items() if v is not None}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> States:
        """The reverse of ``tensors``."""
        cond = {key[5:]: value for key, value in tensors.items() if key.startswith("cond.")}
        plain = {key: value for key, value in tensors.items() if not key.startswith("cond.")}
        return cls(**plain, cond=Conditioning(**cond))


class TrajectoryBank:
    """At most ``capacity`` trajectories per latent size; rows go in and out by slot."""

    def __init__(
        self,
        capacity: int,
        last_index: int,
        device: str = "cpu",
        capacities: dict[Shape, int] | None = None,
        pinned: bool = False,
    ) -> None:
        """``last_index``: the lowest grid index worth training at; below it a trajectory is dropped.

        ``capacities`` are those of sizes that have less than ``capacity``. ``pinned``: on the CPU, in memory
        that CUDA copies from by itself.
        """
        self._own = torch.Tensor.pin_memory if pinned else torch.Tensor.clone
        self.capacity, self.last, self.device = capacity, last_index, device
        self.capacities = capacities or {}
        self.slots: dict[Shape, list[States]] = {}
        self.visits = np.zeros(GRID_POINTS, np.int64)
        self.born = 0

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.slots.values())

    def filled(self, shape: Shape) -> int:
        """Trajectories of one latent size."""
        return len(self.slots.get(shape, []))

    def room(self, shape: Shape) -> int:
        """Slots of one latent size."""
        return self.capacities.get(shape, self.capacity)

    def plan(self, batch: int, shape: Shape, rng: np.random.Generator) -> tuple[int, list[int]]:
        """How many fresh samples a step takes, and from which slots the others come (no slot twice).

        Fresh samples fill free slots. A step never takes more fresh ones than there are slots, so that
        none is thrown away after one use.
        """
        filled = self.filled(shape)
        free = self.room(shape) - filled
        fresh = max(min(batch, free), batch - filled)
        if fresh > free:
            raise RecipeError(
                f"bank.capacity = {self.capacity} is less than the batch of {batch}; "
                f"set bank.capacity to {4 * batch} or so"
            )
        drawn = rng.permutation(filled)[: batch - fresh]
        return fresh, sorted(int(i) for i in drawn)

    def number(self, count: int) -> Tensor:
        """Numbers for ``count`` new trajectories."""
        self.born += count
        return torch.arange(self.born - count, self.born)

    def get(self, shape: Shape, slots: list[int], device: torch.device | str | None = None) -> States:
        """The rows of these slots, as they were put, each with its own conditioning; on ``device``."""
        return cat([self.slots[shape][i].to(device or self.device) for i in slots])

    def count(self, index: Tensor) -> None:
        """Note that these grid indices were trained at."""
        np.add.at(self.visits, index.cpu().numpy(), 1)

    def update(self, shape: Shape, slots: list[int], states: States) -> None:
        """Write advanced states back: the first rows into ``slots``, the rest as new trajectories.

        A row that has passed the last grid point of use leaves, and its slot is free.
        """
        kept = self.slots.setdefault(shape, [])
        # Of rows that were here only the state has moved; all else is not copied again.
        x = states.x.detach().to(self.device)
        for n, slot in enumerate(slots):
            row = slice(n, n + 1)
            kept[slot] = replace(kept[slot], x=self._own(x[row]), index=states.index[row].cpu().clone())
        new = states.rows(slice(len(slots), None)).to(self.device)
        kept.extend(new.rows(slice(n, n + 1)).map(lambda v: self._own(v.detach())) for n in range(len(new)))
        self.slots[shape] = [row for row in kept if int(row.index) >= self.last]
        assert len(self.slots[shape]) <= self.room(shape)

    def mixed(self, states: States, shape: Shape, rng: np.random.Generator) -> States:
        """``states`` under the conditioning of other trajectories of the bank, as in the released code.

        For the ablation only (``bank.stored_conditioning = false``).
        """
        rows = self.slots.get(shape) or [states.rows(slice(0, 1))]
        others = [rows[int(rng.integers(len(rows)))] for _ in range(len(states))]
        device = str(states.x.device)
        return replace(states, cond=cat([row.cond for row in others]).to(device))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything, as named tensors and plain values for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for shape, rows in self.slots.items():
            if rows:
                named = cat(rows).tensors().items()
                tensors |= {f"{shape[0]}x{shape[1]}/{name}": value for name, value in named}
        return tensors, {"visits": self.visits.tolist(), "born": self.born}

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """The reverse of ``state``."""
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            shape, name = key.split("/", 1)
            groups.setdefault(shape, {})[name] = value
        self.slots = {}
        for text, group in groups.items():
            height, width = (int(part) for part in text.split("x"))
            states = States.of(group).to(self.device)
            self.slots[height, width] = [
                states.rows(slice(i, i + 1)).map(self._own) for i in range(len(states))
            ]
        self.visits = np.array(meta["visits"], np.int64)
        self.born = int(meta["born"])
