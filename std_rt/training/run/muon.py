"""The Muon optimizer, for hidden weights of a network trained on little compute.

Each matrix moves by its momentum with all singular values made nearly one (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon), scaled to the size that AdamW's steps have, so that AdamW's
learning rates and decay fit (Liu et al. 2025, arXiv 2502.16982). A convolution's weight is the matrix of its
outputs by everything it sees. torch.optim.Muon takes no convolutions and computes in bf16, which CPUs without
such units emulate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Newton-Schulz iteration: these coefficients bring singular values in (0, 1] to about 0.7 to 1.2 fastest.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 4


def orthogonalized(matrices: Tensor) -> Tensor:
    """``[B, M, N]`` with the same singular vectors and singular values near 1, but for those near 0."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For parameters of two or more axes, the first of them the outputs."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step, with Nesterov's look ahead."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.flatten(1).shape, []).append(p)
            # Those of one shape together: a GPU would spend the step starting thousands of small products.
            for shape, parameters in alike.items():
                updates = orthogonalized(torch.stack([self._ahead(group, p).flatten(1) for p in parameters]))
                scale = 0.2 * max(shape) ** 0.5
                for p, update in zip(parameters, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * scale)

    def _ahead(self, group: dict[str, Any], p: nn.Parameter) -> Tensor:
        """The momentum moved on, and the gradient moved towards it."""
        assert p.grad is not None
        mean = self.state[p].setdefault("momentum", torch.zeros_like(p))
        mean.lerp_(p.grad, 1 - group["momentum"])
        return p.grad.lerp(mean, group["momentum"])


def hidden_weights(module: nn.Module) -> list[nn.Parameter]:
    """What Muon is for: trained matrices and convolutions, but not the first, the last and the embeddings."""
    others = ("conv_in", "conv_out", "embedding")
    return [
        p
        for name, p in module.named_parameters()
        if p.requires_grad and p.dim() >= 2 and not any(other in name for other in others)
    ]
