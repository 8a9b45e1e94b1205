"""The step formula and the grid against diffusers' TCDScheduler, and what must hold by itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from std_rt.core import schedule as sch

ETAS = [i / 50 for i in range(1, 51)]
KINDS = ("epsilon", "v_prediction", "sample")
SCHEDULE = sch.NoiseSchedule.scaled_linear()


def _tcd(kind: str = "epsilon", **config: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.TCDScheduler(prediction_type=kind, clip_sample=False, **config)


def _arrays(seed: int, n: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(size=(n, 1, 4, 3, 3)))


def test_timesteps_are_those_of_tcd_for_every_eta_and_step_count() -> None:
    tcd = _tcd()
    for points, eta in enumerate(ETAS, 1):
        # diffusers cuts int(50 * eta), which binary rounding makes one too small for 0.58; ours does not.
        strength = eta + 1e-9 if eta < 1 else eta
        for steps in range(1, points + 1):
            tcd.set_timesteps(steps, strength=strength)
            assert sch.trajectory_timesteps(eta, steps) == tcd.timesteps.tolist(), (eta, steps)


@pytest.mark.parametrize("eta", ETAS)
def test_a_trajectory_starts_at_tau_and_falls(eta: float) -> None:
    points = sch.start_index(eta) + 1
    for steps in (1, points // 2 or 1, points):
        timesteps = sch.trajectory_timesteps(eta, steps)
        assert timesteps[0] == sch.start_timestep(eta)
        assert all(a > b >= 19 for a, b in pairwise(timesteps))
    with pytest.raises(ValueError, match=rf"steps must be in 1\.\.{points} "):
        sch.trajectory_timesteps(eta, points + 1)


def test_eta_of_the_paper_starts_at_739() -> None:
    assert sch.start_timestep(0.75) == 739
    assert [sch.grid_timestep(i) for i in (0, 36, 49)] == [19, 739, 999]
    for outside in (-1, 50):
        with pytest.raises(ValueError, match=rf"grid index {outside} is outside 0\.\.49"):
            sch.grid_timestep(outside)
    assert sch.trajectory_timesteps(0.75, 4) == [739, 559, 379, 199]


def test_another_start_must_lie_on_the_grid() -> None:
    assert sch.trajectory_timesteps(0.75, 2, start=399)[0] == 399
    with pytest.raises(ValueError, match="not on the grid"):
        sch.trajectory_timesteps(0.75, 2, start=400)


@pytest.mark.parametrize("eta", [0.0, 0.019, 1.01])
def test_eta_outside_its_range_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match="eta must be in"):
        sch.start_index(eta)


def test_img2img_timesteps_are_those_of_the_diffusers_pipeline() -> None:
    tcd = _tcd()
    for eta in (0.3, 0.5, 0.75, 1.0):
        for steps in (4, 8, 20, 50):
            tcd.set_timesteps(steps)
            tail = tcd.timesteps[steps - min(int(steps * eta), steps) :]
            assert sch.img2img_timesteps(eta, steps) == tail.tolist()
    with pytest.raises(ValueError, match="no step to run"):
        sch.img2img_timesteps(0.2, 4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ETAS), st.data(), st.sampled_from(KINDS), st.sampled_from([0.0, 0.3, 1.0]))
def test_each_step_is_the_tcd_step(eta: float, data: st.DataObject, kind: str, gamma: float) -> None:
    torch = pytest.importorskip("torch")
    steps = data.draw(st.integers(1, sch.start_index(eta) + 1))
    tcd = _tcd(kind)
    tcd.set_timesteps(steps, strength=eta + 1e-9 if eta < 1 else eta)
    x, output, noise = _arrays(steps, 3)
    for i, c in enumerate(SCHEDULE.coefficients(sch.trajectory_timesteps(eta, steps), gamma)):
        tcd._step_index = i
        theirs = tcd.step(torch.from_numpy(output), c.timestep, torch.from_numpy(x), eta=gamma)
        eps = sch.to_eps(output, x, c, kind)
        ours = sch.step(x, eps, c, np.zeros_like(noise))
        if c.target == -1:  # theirs ends at timestep 0, ours at the clean picture: take the rest of the way
            alpha, sigma = SCHEDULE.alpha_sigma(0)
            np.testing.assert_allclose(alpha * ours + sigma * eps, theirs.pred_noised_sample, atol=2e-5)
            continue
        kept = c.alpha_s / SCHEDULE.alpha_sigma(int((1 - gamma) * c.target))[0]
        np.testing.assert_allclose(ours, kept * theirs.pred_noised_sample.numpy(), atol=2e-5)
        noised = sch.step(x, eps, c, noise)
        np.testing.assert_allclose(noised - ours, max(0, 1 - kept**2) ** 0.5 * noise, atol=1e-7)
        assert c.noise == pytest.approx((1 - kept**2) ** 0.5)


@given(st.integers(0, 999), st.integers(-1, 999), st.sampled_from(KINDS))
def test_the_true_noise_moves_along_the_schedule(t: int, s: int, kind: str) -> None:
    x_0, eps = _arrays(t, 2)
    c = sch.NoiseSchedule(SCHEDULE.alphas_cumprod, kind).coefficient(t, s, 0.0)
    x_t = sch.add_noise(x_0, eps, c)
    outputs = {"epsilon": eps, "sample": x_0, "v_prediction": c.alpha_t * eps - c.sigma_t * x_0}
    x_s = sch.step(x_t, sch.to_eps(outputs[kind], x_t, c, kind), c)
    alpha, sigma = SCHEDULE.alpha_sigma(s)
    np.testing.assert_allclose(x_s, alpha * x_0 + sigma * eps, atol=1e-9)


@given(st.integers(1, 999), st.floats(0.05, 1.0))
def test_a_stochastic_step_keeps_the_variance_of_the_schedule(s: int, gamma: float) -> None:
    c = SCHEDULE.coefficient(999, s, gamma)
    alpha, sigma = SCHEDULE.alpha_sigma(s)
    assert c.alpha_s == pytest.approx(alpha)
    assert c.sigma_s**2 + c.noise**2 == pytest.approx(sigma**2)
    assert SCHEDULE.coefficient(999, s).noise == 0, "unless asked for"


def test_a_stochastic_step_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="needs noise"):
        sch.step(np.ones(1), np.ones(1), SCHEDULE.coefficient(739, 559, 0.3))


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_alphas_are_those_of_a_diffusers_config(kind: str) -> None:
    config = {"beta_schedule": kind, "beta_start": 0.001, "beta_end": 0.02}
    ours = sch.NoiseSchedule.from_config(config | {"prediction_type": "v_prediction"})
    np.testing.assert_allclose(ours.alphas_cumprod, _tcd(**config).alphas_cumprod.numpy(), rtol=2e-5)
    assert ours.prediction_type == "v_prediction"


def test_a_config_that_says_nothing_is_stable_diffusions() -> None:
    ours = sch.NoiseSchedule.from_config({})
    np.testing.assert_allclose(ours.alphas_cumprod, _tcd().alphas_cumprod.numpy(), rtol=2e-5)
    assert ours.prediction_type == "epsilon"


def test_a_shifted_schedule_survives_trained_betas() -> None:
    shifted = SCHEDULE.shifted(4.0)
    snr = SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod)
    moved = shifted.alphas_cumprod / (1 - shifted.alphas_cumprod)
    np.testing.assert_allclose(np.log(moved) - np.log(snr), 2 * np.log(4.0), atol=1e-9)
    config = {"trained_betas": shifted.betas().tolist(), "prediction_type": "v_prediction"}
    again = sch.NoiseSchedule.from_config(config)
    np.testing.assert_allclose(again.alphas_cumprod, shifted.alphas_cumprod, rtol=1e-9)
    assert again.prediction_type == "v_prediction"
    assert again.shifted(2.0).prediction_type == "v_prediction"


def test_an_unknown_schedule_or_prediction_is_named() -> None:
    with pytest.raises(ValueError, match="'cosine'"):
        sch.NoiseSchedule.from_config({"beta_schedule": "cosine"})
    with pytest.raises(ValueError, match="'velocity'"):
        sch.NoiseSchedule(SCHEDULE.alphas_cumprod, "velocity")
    x = np.zeros((1, 1, 1, 1))
    with pytest.raises(ValueError, match="'velocity'"):
        sch.to_eps(x, x, SCHEDULE.coefficient(999, 0), "velocity")


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_zero_terminal_snr_is_diffusers(kind: str) -> None:
    config = {"beta_schedule": kind, "beta_start": 0.00085, "beta_end": 0.012}
    zero = config | {"rescale_betas_zero_snr": True}
    ours = sch.NoiseSchedule.from_config(zero).alphas_cumprod
    # diffusers ends at a tiny number in the place of 0, so that its samplers need not divide by it.
    np.testing.assert_allclose(ours, _tcd(**zero).alphas_cumprod.numpy(), atol=2e-6)
    assert ours[-1] == 0
    assert abs(ours[499] - sch.NoiseSchedule.from_config(config).alphas_cumprod[499]) > 0.01
