"""Muon against its definition: the momentum's singular vectors, with singular values near one."""

import pytest
import torch

from std_rt.training.run.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_singular_vectors_stay_and_singular_values_become_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    side = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, side))[0] for n in shape)
    matrix = left @ torch.diag(torch.logspace(0, -1.5, side)) @ right.T
    values = left.T @ orthogonalized(matrix[None])[0] @ right
    assert torch.allclose(values, torch.diag(values.diagonal()), atol=1e-4)
    assert values.diagonal().min() > 0.3
    assert values.diagonal().max() < 1.3


def test_a_step_by_hand() -> None:
    """Two steps of a convolution: momentum, Nesterov's look ahead, scale and decay."""
    torch.manual_seed(1)
    start, one, two = (torch.randn(8, 4, 3, 3) for _ in range(3))
    weight = torch.nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    expected, mean = start.clone(), torch.zeros_like(start)
    for gradient in (one, two):
        weight.grad = gradient.clone()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        move = orthogonalized((0.1 * gradient + 0.9 * mean).reshape(1, 8, 36)).reshape(8, 4, 3, 3)
        expected = 0.95 * expected - 0.1 * 0.2 * 6 * move
        assert torch.allclose(weight, expected, atol=1e-5)


def test_weights_of_one_shape_move_as_each_alone() -> None:
    torch.manual_seed(2)
    start = [torch.randn(8, 4, 3, 3), torch.randn(8, 36), torch.randn(6, 5), torch.randn(8, 4, 3, 3)]
    gradients = [torch.randn_like(x) for x in start]

    def moved(chosen: list[int]) -> list[torch.Tensor]:
        weights = [torch.nn.Parameter(start[i].clone()) for i in chosen]
        for weight, i in zip(weights, chosen, strict=True):
            weight.grad = gradients[i].clone()
        Muon(weights, lr=0.1).step()
        return [weight.detach() for weight in weights]

    for i, weight in enumerate(moved([0, 1, 2, 3])):
        assert torch.allclose(weight, moved([i])[0], atol=1e-5)
        assert not torch.allclose(weight, start[i], atol=1e-3)
