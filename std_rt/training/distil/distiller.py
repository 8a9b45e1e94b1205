"""One distillation step in parts: draw states, teacher step, student jump, compare.

Nothing here steps an optimizer or talks to other processes; ``loop.py`` does, and the tests call these
parts by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from std_rt.core.errors import RecipeError
from std_rt.training.distil.bank import Shape, States, TrajectoryBank
from std_rt.training.distil.base import Base, Fresh, cat
from std_rt.training.distil.discriminator import draw_real_index, has_pair, renoise
from std_rt.training.distil.lora import Average, adapters_off, functional, tuner_layers
from std_rt.training.distil.matching import Matching
from std_rt.training.distil.motion import Representation
from std_rt.training.distil.trajectory import (
    CLEAN,
    Levels,
    draw_start,
    draw_target,
    jump,
    last_index,
    phase_edges,
    pseudo_huber,
    randint,
    run_indices,
    send,
    to_x0_eps,
    trajectory_state,
)
from std_rt.training.run.precision import precision_context, resolve_precision
from std_rt.training.run.recipe import DistilConfig, distil_tau, target_window
from std_rt.training.run.training_run import random_state, restore_random_state

__all__ = ["Distiller", "Source", "StepBatch"]

Watch = Callable[[str], AbstractContextManager[Any]]
_TOGETHER = 4  # trajectories solved at once when the bank is filled


class Source(Protocol):
    """Where fresh samples come from; its state is part of the checkpoint."""

    shapes: list[Shape]
    weights: Any

    def take(self, n: int, shape: Shape) -> Fresh: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class StepBatch:
    """Everything one micro-batch needs, drawn and solved by the teacher."""

    states: States  # at t
    slots: list[int]  # where the first rows came from in the bank; the others are fresh
    shape: Shape
    s: Tensor  # [B] grid index the student jumps to
    # [B, C, h, w] where the averaged student arrives from the teacher's state below t; None: DMD has none.
    target: Tensor | None
    real: Tensor  # [B, C, h, w] the item's own real latents at r
    pair: Tensor  # [B] whether there is an r below s
    # Rows that the discriminator is shown, at least one: a tensor, or all.
    judged: Tensor | slice = field(default_factory=lambda: slice(None))
    frames: Tensor | None = None  # [B, F] of each clip that it is shown; None: pictures

    def shown(self, latents: Tensor) -> Tensor:
        """What the discriminator is shown of ``[B, C, (T,) h, w]``: pictures ``[N, C, h, w]``."""
        rows = latents[self.judged]
        if self.frames is None:
            return rows
        each = torch.arange(len(rows), device=rows.device)[:, None]
        return rows.transpose(1, 2)[each, self.frames[self.judged]].flatten(0, 1)

    def per_picture(self, values: Tensor) -> Tensor:
        """``[B, ...]`` -> a row for each picture that is shown ``[N, ...]``."""
        rows = values[self.judged]
        return rows if self.frames is None else rows.repeat_interleave(self.frames.shape[1], 0)

    @property
    def judged_share(self) -> float:
        """Share of the batch that those rows are; brings their mean to one over the batch."""
        return 1.0 if isinstance(self.judged, slice) else len(self.judged) / len(self.pair)


class Distiller:
    """Teacher, student and averaged student of one UNet, with the bank and every random choice."""

    def __init__(
        self,
        config: DistilConfig,
        base: Base,
        source: Source,
        average: Average,
        *,
        device: str = "cpu",
        rank: int = 0,
        watch: Watch = nullcontext,
    ) -> None:
        self.config, self.base, self.source, self.average = config, base, source, average
        self.device, self.watch = device, watch
        self.tau = distil_tau(config)
        # Random choices are made on the CPU, whatever the device, so that they are the same everywhere.
        self.levels = Levels.of(base.schedule, self.tau, dims=4 if base.motion is None else 5)
        if not self.levels.alpha(torch.tensor(self.levels.tau_index)):
            raise RecipeError(
                f"{base.name} has zero terminal SNR: at eta {config.eta:g} nothing of the picture is left to "
                "start from; set eta = 0.98 or less"
            )
        self.device_levels = self.levels.to(device)
        self.own_runs = [run_indices(self.tau, n) for n in config.run_steps]  # of the student
        self.last = last_index(self.tau, config.run_steps)
        self.window = target_window(config.eta, config.window, self.tau)
        self.edges = phase_edges(self.tau, config.phases)
        self.representation = self._representation()
        self.matching = Matching(self, average.tensors) if config.method == "dmd" else None
        where = device if config.bank.device == "auto" else config.bank.device
        pinned = where == "cpu" and torch.device(device).type == "cuda"
        self.bank = TrajectoryBank(config.bank.capacity, self.last, where, self._capacities(), pinned)
        self.rng = np.random.default_rng((config.seed, rank))
        self.generator = torch.Generator().manual_seed(int(self.rng.integers(2**62)))
        self._precision = partial(precision_context, config.precision, torch.device(device).type)

    @cached_property
    def tuner_layers(self) -> list[Any]:
        """The UNet's layers that carry the student."""
        return tuner_layers(self.base.unet)

    @property
    def uses_bank(self) -> bool:
        return self.config.method == "std" and self.config.bank.enabled

    def below(self, index: Tensor) -> Tensor:
        """Where one teacher step arrives, the clean end at the lowest."""
        return (index - self.config.stride).clamp(min=CLEAN)

    def judging(self) -> AbstractContextManager[None]:
        """Precision of decoder, features and heads: never fp16, in which SDXL's decoder overflows.

        In its place bf16 where the GPU has that, or fp32.
        """
        device = torch.device(self.device).type
        precision = resolve_precision(self.config.precision, device)
        if precision == "fp16":
            has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if has_bf16 else "fp32"
        return precision_context(precision, device)

    # --- the networks -------------------------------------------------------------------------------

    @torch.no_grad()
    def teacher_step(self, states: States, to: Tensor | None = None) -> Tensor:
        """One guided DDIM step of the frozen base, to grid index ``to [B]`` or ``stride`` points down."""
        to = self.below(states.index) if to is None else to
        t = self.device_levels.timestep(states.index)
        with self.watch("teacher"), self._precision(), adapters_off(self.tuner_layers):
            if self.config.guidance == (1.0, 1.0):
                output = self.base.predict(self.base.unet, states.x, t, states.cond)
            else:
                both = cat([states.cond, self.base.null(states.cond)])
                twice = torch.cat([states.x, states.x])
                styled, free = self.base.predict(self.base.unet, twice, t.repeat(2), both).chunk(2)
                output = free + self.levels.column(states.scale) * (styled - free)
        return self._jump(output, states.x, states.index, to)

    @torch.no_grad()
    def target_jump(self, states: States, x_next: Tensor, s: Tensor, index: Tensor | None = None) -> Tensor:
        """The averaged student's jump from the teacher's state at ``index`` to s, exact if equal."""
        index = self.below(states.index) if index is None else index
        with self.watch("target"), self._precision():
            run = partial(functional, self.base.unet, self.average.tensors)
            unet = run if self.config.ema_target else self.base.unet
            output = self.base.predict(unet, x_next, self.device_levels.timestep(index), states.cond)
        arrived = self._jump(output, x_next, index, s)
        here = send(self.levels.column(s == index), self.device)
        return torch.where(here, x_next, arrived)

    def student_jump(self, unet: Any, states: States, s: Tensor, watched: str = "student") -> Tensor:
        """The student's jump from t to s; ``unet`` is the base's UNet with its LoRA, perhaps wrapped.

        ``watched`` names the span of the timing that it counts in.
        """
        with self.watch(watched), self._precision():
            t = self.device_levels.timestep(states.index)
            output = self.base.predict(unet, states.x, t, states.cond)
        return self._jump(output, states.x, states.index, s)

    def _jump(self, output: Tensor, x: Tensor, index: Tensor, s: Tensor) -> Tensor:
        at = self.device_levels
        kind = self.base.schedule.prediction_type
        x_0, eps = to_x0_eps(output, x, at.alpha(index), at.sigma(index), kind)
        return jump(x_0, eps, at.alpha(s), at.sigma(s))

    def _representation(self) -> Representation | None:
        """Of clips, what the loss compares; the same in every process."""
        if self.base.motion is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return Representation(self.config.motion, self.base.unet.config.out_channels).to(self.device)

    def _capacities(self) -> dict[Shape, int]:
        """Rarely drawn sizes get fewer trajectories, or theirs would be young for most of a run."""
        most = float(np.max(self.source.weights))
        shares = zip(self.source.shapes, self.source.weights, strict=True)
        least = 2 * self.config.batch
        return {
            shape: max(least, round(self.config.bank.capacity * float(share) / most))
            for shape, share in shares
        }

    # --- drawing ------------------------------------------------------------------------------------

    def draw_shape(self) -> Shape:
        """A latent size, by its share of the pictures."""
        return self.source.shapes[int(self.rng.choice(len(self.source.shapes), p=self.source.weights))]

    def fresh(self, count: int, shape: Shape, index: Tensor | None = None) -> States:
        """New trajectories: content noised to the method's start (or to ``index``), guidance drawn once."""
        with self.watch("data"):
            new = self.source.take(count, shape)
        noise = torch.randn(new.z.shape, generator=self.generator)
        low, high = self.config.guidance
        scale = low + (high - low) * torch.rand(count, generator=self.generator)
        keep = torch.rand(count, generator=self.generator) >= self.config.drop_conditioning
        if index is None:
            index = draw_start(self.config.method, self.levels.tau_index, self.last, count, self.generator)
        x = trajectory_state(self.levels, index, new.z, new.c, noise)
        cond = self.base.masked(new.cond, keep)
        return States(new.real, x, index, scale, self.bank.number(count), cond).to(self.device)

    def solved(self, count: int, shape: Shape) -> States:
        """Without the bank: every state solved by the teacher from tau down to a random t."""
        states = self.fresh(count, shape)
        top = torch.full((count,), self.levels.tau_index)
        return self.run_down(states, randint(torch.full((count,), self.last), top, self.generator))

    def run_down(self, states: States, until: Tensor) -> States:
        """Teacher steps until every row is at its own grid index ``until [B]``."""
        x, index = states.x.clone(), states.index.clone()
        for _ in range(int((index - until).max())):
            rows = (index > until).nonzero()[:, 0]
            if not len(rows):
                break
            to = torch.maximum(self.below(index[rows]), until[rows])
            x[rows] = self.teacher_step(replace(states, x=x, index=index).rows(rows), to)
            index[rows] = to
        return replace(states, x=x, index=index)

    def spread_bank(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Fill the bank with trajectories at random grid points, so that the first steps see all of t.

        Without it the first batch all starts at tau and goes down together, in waves. On a GPU this takes
        minutes; ``say`` is told how far it is.
        """
        # Without gradients there is room for more than the batch, and each call costs the host as much.
        together = self.config.batch if self.base.motion is not None else max(self.config.batch, _TOGETHER)
        for i, shape in enumerate(self.source.shapes):
            wanted = self.bank.room(shape)
            say(f"filling the trajectory bank, size {i + 1} of {len(self.source.shapes)}")
            while self.bank.filled(shape) < wanted:
                count = min(together, wanted - self.bank.filled(shape))
                self.bank.update(shape, [], self.solved(count, shape))

    def draw_states(self) -> tuple[States, list[int], Shape]:
        """States for one micro-batch: (states, bank slots of the first rows, latent size)."""
        shape, count = self.draw_shape(), self.config.batch
        if not self.uses_bank:
            std = self.config.method == "std"
            states = self.solved(count, shape) if std else self.fresh(count, shape)
            if self.config.method == "mcm":
                states = self.restarted(states)
            elif self.config.method == "dmd":
                states = self.on_own_run(states)
            return states, [], shape
        new, slots = self.bank.plan(count, shape, self.rng)
        parts = [self.bank.get(shape, slots, self.device)] if slots else []
        parts += [self.fresh(new, shape)] if new else []
        return cat(parts), slots, shape

    @torch.no_grad()
    def restarted(self, states: States) -> States:
        """MCM: some rows start from the student's own result, one jump from tau, noised to their own level.

        Then training sees what a run will: states on the way to the student's clips, not to the data's.
        """
        own = torch.rand(len(states), generator=self.generator) < self.config.motion.own_starts
        first, again = send(torch.randn((2, *states.x.shape), generator=self.generator), self.device)
        rows = own.nonzero()[:, 0]
        if not len(rows):
            return states
        some, at = states.rows(rows), self.device_levels
        top = torch.full_like(some.index, at.tau_index)
        start = replace(some, x=renoise(some.z, top, at, first[rows]), index=top)
        clean = self.student_jump(self.base.unet, start, torch.full_like(top, CLEAN))
        x = states.x.clone()
        x[rows] = renoise(clean, some.index, at, again[rows])
        return replace(states, x=x)

    @torch.no_grad()
    def on_own_run(self, states: States) -> States:
        """DMD: fresh states, brought by the student's own run of a random step count to a random step of it.

        So it is trained at the states that its runs will meet (DMD2's backward simulation).
        """
        first = torch.zeros_like(states.index)
        chosen = randint(first, torch.full_like(first, len(self.own_runs) - 1), self.generator)
        some = [self.own_runs[int(i)] for i in chosen]
        reached = randint(first, torch.tensor([len(run) - 1 for run in some]), self.generator)
        x, index = states.x.clone(), states.index.clone()
        for step in range(1, int(reached.max()) + 1):
            rows = (reached >= step).nonzero()[:, 0]
            to = torch.tensor([some[int(row)][step] for row in rows])
            x[rows] = self.student_jump(self.base.unet, replace(states, x=x, index=index).rows(rows), to)
            index[rows] = to
        return replace(states, x=x, index=index)

    def draw(self) -> StepBatch:
        """States, the teacher's step, the target and the real latents of one micro-batch."""
        stored, slots, shape = self.draw_states()
        if self.matching is not None:
            self.bank.count(stored.index)
            return self._unpaired(stored, shape)
        mixed = self.uses_bank and not self.config.bank.stored_conditioning
        states = self.bank.mixed(stored, shape, self.rng) if mixed else stored
        self.bank.count(states.index)
        index = states.index
        stride = self._strides(index)
        s = draw_target(self.config.method, index, self.window, self.edges, self.generator, stride)
        # A phase of PCM may end within a stride: the teacher goes no further than the target.
        after = torch.maximum((index - stride).clamp(min=CLEAN), s)
        x_next = self.teacher_step(states, after)
        r = draw_real_index(s, self.generator, self.config.adversarial.real)
        pair = has_pair(s, self.config.adversarial.real)
        judged: Tensor | slice = slice(None)
        if self.config.adversarial.jumps == "last":
            # r was drawn all the same, so that both settings see the same states.
            r, pair = torch.full_like(s, CLEAN), s == CLEAN
            # One row even if none counts: every process runs the heads, or their gradients could not meet.
            rows = pair.nonzero()[:, 0] if pair.any() else torch.zeros(1, dtype=torch.long)
            judged = send(rows, self.device)
        noise = send(torch.randn(states.z.shape, generator=self.generator), self.device)
        real = renoise(states.z, r, self.device_levels, noise)
        target = self.target_jump(states, x_next, s, after)
        if self.uses_bank:
            moved = replace(stored, x=x_next, index=after)
            self.bank.update(shape, slots, moved)
        pair = send(pair, self.device)
        return StepBatch(states, slots, shape, s, target, real, pair, judged, self._frames(len(s)))

    def _unpaired(self, states: States, shape: Shape) -> StepBatch:
        """DMD's: jumps to the clean end, without a target; the discriminator sees clean pictures beside."""
        end = torch.full_like(states.index, CLEAN)
        pair = send(torch.ones(len(states), dtype=torch.bool), self.device)
        return StepBatch(states, [], shape, end, None, states.z, pair)

    def _frames(self, batch: int) -> Tensor | None:
        """Which frames of each clip the discriminator is shown ``[B, F]``, rising; None of pictures."""
        if self.base.motion is None or not self.config.adversarial.weight:
            return None
        order = torch.rand(batch, self.base.motion.frames, generator=self.generator).argsort(1)
        return send(order[:, : self.config.motion.judged].sort(1).values, self.device)

    def _strides(self, index: Tensor) -> Tensor:
        """Grid points that the teacher goes, ``[B]``.

        The first step of a trajectory is shorter by chance, or every one would visit the same grid points.
        """
        full = torch.full_like(index, self.config.stride)
        if self.config.stride == 1:
            return full
        first = randint(torch.ones_like(index), full, self.generator)
        return torch.where(index == self.levels.tau_index, first, full)

    def consistency_loss(self, x_s: Tensor, batch: StepBatch, head: Any = None) -> Tensor:
        """L_STD: pseudo-Huber distance of the student's and the target's x_s, mean over the batch.

        Of clips their representations are compared; ``head`` is that of the representation, perhaps wrapped.
        DMD has its own loss in its place.
        """
        if self.matching is not None:
            return self.matching.student_loss(x_s, batch.states)
        target = batch.target
        assert target is not None, "only DMD does without"
        if self.representation is not None:
            x_s, target = self.representation.student(x_s, head), self.representation.target(target)
        return pseudo_huber(x_s, target, self.config.huber_c).mean()

    # --- resuming -----------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Bank, random states and place in the data: the state of this process alone."""
        tensors, bank = self.bank.state()
        random, meta = random_state(self.rng, self.generator)
        named = {f"bank/{name}": value for name, value in tensors.items()}
        return named | random, meta | {"bank": bank, "source": self.source.state()}

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """The reverse of `state`."""
        bank = {k.removeprefix("bank/"): v for k, v in tensors.items() if k.startswith("bank/")}
        self.bank.restore(bank, meta["bank"])
        restore_random_state(self.rng, self.generator, tensors, meta)
        self.source.load_state(meta["source"])
