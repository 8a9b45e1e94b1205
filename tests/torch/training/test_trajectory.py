"""The maths of a distillation step: levels, jumps, targets, and how states are made without solving."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from std_rt.core.schedule import (
    NoiseSchedule,
    StepCoefficients,
    add_noise,
    step,
    to_eps,
    trajectory_timesteps,
)
from std_rt.training.distil.trajectory import (
    CLEAN,
    Levels,
    content_share,
    draw_start,
    draw_target,
    jump,
    last_index,
    phase_edges,
    pseudo_huber,
    send,
    to_x0_eps,
    trajectory_state,
)
from std_rt.training.run.recipe import PUBLISHED_TAU, target_window

SCHEDULE = NoiseSchedule.scaled_linear()
LEVELS = Levels.of(SCHEDULE, 739)
ETAS = (0.65, 0.75, 0.85, 0.95)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("steps", range(1, 13))
def test_training_starts_where_every_run_starts(eta: float, steps: int) -> None:
    """Acceptance test 1: first timestep of training == first timestep of inference."""
    tau = trajectory_timesteps(eta, 1)[0]
    levels = Levels.of(SCHEDULE, tau)
    start = draw_start("std", levels.tau_index, 0, 3, _generator())
    assert levels.timestep(start).tolist() == [trajectory_timesteps(eta, steps)[0]] * 3


def test_levels_are_the_schedule_at_the_grid_and_clean_at_minus_one() -> None:
    index = torch.tensor([-1, 0, 36, 49])
    assert LEVELS.timestep(index).tolist() == [0, 19, 739, 999]
    assert LEVELS.alpha(index)[:, 0, 0, 0].tolist()[0] == 1
    assert LEVELS.sigma(index)[:, 0, 0, 0].tolist()[0] == 0
    alpha, sigma = SCHEDULE.alpha_sigma(739)
    assert LEVELS.alpha(index)[2].item() == pytest.approx(alpha, rel=1e-6)
    assert LEVELS.sigma(index)[2].item() == pytest.approx(sigma, rel=1e-6)
    assert LEVELS.tau_index == 36


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_jump_is_the_runtimes_step(kind: str) -> None:
    """Training and runtime take the same step for the same network output, whatever it predicts."""
    rng = np.random.default_rng(0)
    x, out = rng.standard_normal((2, 2, 3, 4, 4)).astype(np.float32)
    t, s = torch.tensor([36, 20]), torch.tensor([20, -1])
    args = LEVELS.alpha(t), LEVELS.sigma(t)
    x_0, eps = to_x0_eps(torch.from_numpy(out), torch.from_numpy(x), *args, kind)
    ours = jump(x_0, eps, LEVELS.alpha(s), LEVELS.sigma(s)).numpy()
    for row, c in enumerate(SCHEDULE.coefficients([739, 419])):
        theirs = step(x[row], to_eps(out[row], x[row], c, kind), c)
        np.testing.assert_allclose(ours[row], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_jump_to_where_one_is_changes_nothing(kind: str) -> None:
    x, out = torch.randn(2, 2, 3, 4, 4, generator=_generator())
    t = torch.tensor([30, 3])
    x_0, eps = to_x0_eps(out, x, LEVELS.alpha(t), LEVELS.sigma(t), kind)
    assert torch.allclose(jump(x_0, eps, LEVELS.alpha(t), LEVELS.sigma(t)), x, atol=1e-5)


@given(st.integers(0, 36), st.sampled_from(["std", "tcd", "lcm", "mcm", "dmd", "pcm"]), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_targets_lie_below_t_and_in_the_methods_range(t: int, method: str, seed: int) -> None:
    window, edges = target_window(0.75, 0.5, 739), phase_edges(739, 4)
    s = draw_target(method, torch.full((8,), t), window, edges, _generator(seed))
    assert torch.equal(s, draw_target(method, torch.full((8,), t), window, edges, _generator(seed)))
    assert (s < t).all()
    assert (s >= -1).all()
    if method == "std":
        assert (s >= t - window).all()
    if method in ("lcm", "mcm", "dmd"):
        assert (s == -1).all()
    if method == "pcm":
        assert set(s.tolist()) == {max(e for e in edges if e < t)}


def test_std_and_tcd_reach_every_target() -> None:
    t = torch.full((4000,), 30)
    std = draw_target("std", t, 19, (), _generator())
    tcd = draw_target("tcd", t, 19, (), _generator())
    assert set(std.tolist()) == set(range(11, 30))
    assert set(tcd.tolist()) == set(range(-1, 30))
    counts = torch.bincount(std - 11).float()
    assert (counts / counts.mean() - 1).abs().max() < 0.3


def test_near_the_end_every_target_down_to_clean_is_reached() -> None:
    t = torch.full((400,), 3)
    for method in ("std", "tcd"):
        assert set(draw_target(method, t, 19, (), _generator()).tolist()) == {-1, 0, 1, 2}
        assert set(draw_target(method, t, 19, (), _generator(), stride=3).tolist()) == {-1, 0}
        assert set(draw_target(method, t, 19, (), _generator(), stride=9).tolist()) == {-1}


def test_the_other_methods_start_anywhere_between_the_last_point_and_tau() -> None:
    for method in ("tcd", "lcm", "pcm"):
        drawn = [draw_start(method, 36, 30, 400, _generator()) for _ in range(2)]
        assert set(drawn[0].tolist()) == set(range(30, 37))
        assert torch.equal(*drawn), "by the given generator alone"


def test_a_clean_state_is_what_a_network_of_samples_says_it_is() -> None:
    """sigma is 0 there, and must not be divided by; every other level is far from the guard."""
    out, x = torch.randn(2, 1, 2, 3, 3, generator=_generator())
    clean = torch.tensor([-1])
    x_0, eps = to_x0_eps(out, x, LEVELS.alpha(clean), LEVELS.sigma(clean), "sample")
    assert torch.equal(jump(x_0, eps, LEVELS.alpha(clean), LEVELS.sigma(clean)), out)
    lowest = torch.tensor([0])
    x_0, eps = to_x0_eps(out, x, LEVELS.alpha(lowest), LEVELS.sigma(lowest), "sample")
    assert torch.allclose(jump(x_0, eps, LEVELS.alpha(lowest), LEVELS.sigma(lowest)), x, atol=1e-5)


def test_content_is_gone_when_clean_and_whole_from_tau_up() -> None:
    share = content_share(LEVELS, torch.tensor([-1, 10, 36, 49]))[:, 0, 0, 0].tolist()
    assert share[0] == 0
    assert 0 < share[1] < 1
    assert share[2:] == [1, 1]


def test_phases_end_on_the_schedule_of_as_many_steps() -> None:
    assert phase_edges(739, 4) == tuple((t + 1) // 20 - 1 for t in (559, 379, 199)) + (-1,)
    assert phase_edges(739, 1) == (-1,)


def test_the_window_lets_two_steps_reach_the_end() -> None:
    """Every jump of a 2-, 4-, 6- or 8-step run is one the student was trained on, published starts too."""
    starts = [(eta, trajectory_timesteps(eta, 1)[0]) for eta in ETAS] + list(PUBLISHED_TAU.items())
    for eta, tau in starts:
        window = target_window(eta, 0.5, tau)
        for steps in (2, 4, 6, 8):
            points = [(t + 1) // 20 - 1 for t in trajectory_timesteps(eta, steps, start=tau)] + [-1]
            assert max(a - b for a, b in pairwise(points)) <= window


def test_the_last_index_is_the_lowest_that_a_run_visits() -> None:
    assert last_index(739, (8,)) == 4
    assert last_index(739, (2, 4, 6, 8)) == 4
    assert last_index(739, (2,)) == 18


def test_pseudo_huber_by_hand() -> None:
    a, b = torch.tensor([[5.0, -1.0], [0.0, 2.0]]), torch.tensor([[2.0, -1.0], [0.0, 2.0]])
    expected = ((9 + 1e-6) ** 0.5 - 1e-3 + 0) / 2
    latents = a.view(2, 1, 2, 1), b.view(2, 1, 2, 1)
    assert pseudo_huber(*latents, 1e-3).tolist() == pytest.approx([expected, 0.0])


def _follow(z: torch.Tensor, c: torch.Tensor, noise: torch.Tensor, to: int) -> torch.Tensor:
    """DDIM from content c at tau with the clean estimate z at every grid point, down to index ``to``."""
    x = torch.tensor(add_noise(c.numpy(), noise.numpy(), SCHEDULE.coefficients([739])[0]))
    for i in range(36, to, -1):
        alpha_t, sigma_t = SCHEDULE.alpha_sigma(20 * i + 19)
        alpha_s, sigma_s = SCHEDULE.alpha_sigma(20 * i - 1)
        at = StepCoefficients(20 * i + 19, 20 * i - 1, alpha_t, sigma_t, alpha_s, sigma_s)
        x = torch.tensor(step(x.numpy(), ((x - alpha_t * z) / sigma_t).numpy(), at))
    return x


@pytest.mark.parametrize("to", [35, 20, 4])
def test_a_state_made_from_content_and_target_is_the_solved_one(to: int) -> None:
    z, c, noise = torch.randn(3, 1, 2, 4, 4, generator=_generator(), dtype=torch.float64)
    made = trajectory_state(LEVELS, torch.tensor([to]), z, c, noise)
    assert torch.allclose(made, _follow(z, c, noise, to), atol=1e-5)


def test_unknown_names_raise() -> None:
    with pytest.raises(ValueError, match="method"):
        draw_target("xyz", torch.tensor([3]), 1, (), _generator())
    with pytest.raises(ValueError, match="prediction_type"):
        to_x0_eps(*torch.zeros(4, 1), "xyz")


@given(st.integers(0, 36), st.sampled_from(["std", "tcd"]), st.integers(2, 9), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_with_a_stride_targets_lie_where_a_teacher_step_arrives_or_below(
    t: int, method: str, stride: int, seed: int
) -> None:
    s = draw_target(method, torch.full((8,), t), 9, (), _generator(seed), stride)
    assert (s <= max(-1, t - stride)).all()
    assert (s >= -1).all()


class _Lookups(TorchDispatchMode):
    """Devices of the tables that are asked with indices."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            self.tables.append(args[0].device.type)
        return func(*args, **(kwargs or {}))


def test_levels_of_another_device_are_looked_up_on_the_cpu_where_the_indices_are() -> None:
    """A GPU's table, asked with an index of the CPU, makes every step wait for the GPU."""
    levels, index = LEVELS.to("meta"), torch.tensor([CLEAN, 3, 20])
    with _Lookups() as lookups:
        found = [ask(index) for ask in (levels.timestep, levels.alpha, levels.sigma)]
    assert lookups.tables == ["cpu"] * 3
    assert [(x.device.type, x.shape) for x in found] == [("meta", (3,)), *[("meta", (3, 1, 1, 1))] * 2]


def test_what_goes_to_a_gpu_is_pinned_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *given, **how: calls.append((given, how)) or self)
    x = torch.ones(2)
    send(x, "cuda:0")
    send(x, "cpu")
    assert calls == ["pin", (("cuda:0",), {"non_blocking": True}), (("cpu",), {})]
