"""Halves with islands of fp32, and the watch on what fp16 does not hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from std_rt.core.errors import ExportError
from std_rt.export.graph_precision import half_dtype, to_half, vae_compute, within_range


class Net(nn.Module):
    """A linear layer between two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(8)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8))
        self.register_buffer("offset", torch.full((8,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 8]``."""
        return self.inner(self.before(x)) + self.offset


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_weights_become_halves_and_norms_stay_exact(compute: str) -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(3, 8) * 300
    dtype = half_dtype(compute)
    assert dtype is not None
    with torch.no_grad():
        wanted = net(x)
        found = to_half(net, dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert (net.inner[0].weight.dtype, net.offset.dtype) == (dtype, dtype)
    assert {net.before.weight.dtype, net.inner[1].weight.dtype} == {torch.float32}
    assert {"before.weight", "inner.0.weight", "inner.1.bias", "offset"} <= net.state_dict().keys()
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0.05)


def test_a_norm_of_large_halves_does_not_overflow() -> None:
    """The squares of 300 are beyond fp16."""
    net = to_half(nn.Sequential(nn.LayerNorm(8)), torch.float16)
    with torch.no_grad():
        assert torch.isfinite(net(torch.tensor([[300.0, -300] * 4]).half())).all()


def test_a_weight_beyond_fp16_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight[0, 0] = 1e6
    with pytest.raises(
        ExportError, match=r"weight 0\.weight is 1000000, which exceeds the fp16 range; use --precision"
    ):
        to_half(net, torch.float16)


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_values_beyond_fp16_are_seen_in_the_run(value: float) -> None:
    net = nn.Sequential(nn.Identity(), nn.ReLU6())  # what comes out in the end is small
    found = pytest.raises(ExportError, match=r"values in the vae reach .* use --vae fp16-fix")
    with found, within_range(net, "fp16", "vae"):
        net(torch.tensor([value]))
    with within_range(net, "bf16", "vae"):
        net(torch.tensor([value]))
    assert not net[0]._forward_hooks  # nothing is left behind


def test_a_vae_that_says_so_stays_in_fp32() -> None:
    class Vae:
        class config:
            force_upcast = True

    assert [vae_compute(Vae, compute) for compute in ("fp16", "bf16", "fp32")] == ["fp32", "bf16", "fp32"]
    Vae.config.force_upcast = False
    assert vae_compute(Vae, "fp16") == "fp16"
