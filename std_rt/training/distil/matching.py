"""Distribution matching (DMD2, arXiv 2405.14867) in the place of the consistency loss.

The student's clean result is noised again, to a random level of the trajectory, and two networks estimate it
clean: the teacher, and a second LoRA (DMD's "fake score") that learns all along from the student's results
alone. Where the two differ, the student makes something more or less often than the teacher finds likely;
that difference is its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from std_rt.training.distil.bank import States
from std_rt.training.distil.trajectory import CLEAN, randint, send, trajectory_state

if TYPE_CHECKING:
    from std_rt.training.distil.distiller import Distiller

__all__ = ["Matching"]


class Matching:
    """The second LoRA and both losses; ``tensors``, named as the student's, are all there is to save.

    It begins as the teacher, as the student does: ``start`` are the student's first weights.
    """

    def __init__(self, distiller: Distiller, start: Mapping[str, Tensor]) -> None:
        self.distiller = distiller
        self.tensors = {name: nn.Parameter(value.detach().clone()) for name, value in start.items()}

    def student_loss(self, clean: Tensor, states: States) -> Tensor:
        """Half the squared distance of ``clean [B, C, h, w]`` to itself less the gradient, a scalar.

        The gradient (second LoRA's estimate less the teacher's) is relative to how far the teacher's estimate
        lies from ``clean``, per sample, as in DMD (arXiv 2311.18828, equation 8).
        """
        with torch.no_grad():
            noised = self._noised(clean, states)
            likely = self.distiller.teacher_step(noised, _end(noised))
            size = (clean - likely).abs().flatten(1).mean(1).clamp(min=1e-6)
            gradient = (self._estimate(noised) - likely) / size.view(-1, 1, 1, 1)
        return 0.5 * F.mse_loss(clean, (clean - gradient).detach())

    def score_loss(self, clean: Tensor, states: States) -> Tensor:
        """The second LoRA's: squared error of its estimates of the student's results, a scalar."""
        clean = clean.detach()
        return F.mse_loss(self._estimate(self._noised(clean, states)), clean)

    def _noised(self, clean: Tensor, states: States) -> States:
        """``states`` at random grid points, on trajectories that end at ``clean``.

        Those of a network that sees the content begin there; others get plain noise, as in DMD2.
        """
        d = self.distiller
        low, high = torch.zeros_like(states.index), torch.full_like(states.index, d.levels.tau_index)
        index = randint(low, high, d.generator)
        noise = send(torch.randn(clean.shape, generator=d.generator), d.device)
        content = clean.detach() if states.cond.content is None else states.cond.content
        x = trajectory_state(d.device_levels, index, clean.detach(), content, noise)
        return replace(states, x=x, index=index)

    def _estimate(self, states: States) -> Tensor:
        def network(*args: Any, **kwargs: Any) -> Any:
            unet = self.distiller.base.unet
            return functional_call(unet, dict(self.tensors), args, kwargs, tie_weights=False)

        return self.distiller.student_jump(network, states, _end(states), "score")


def _end(states: States) -> Tensor:
    return torch.full_like(states.index, CLEAN)
