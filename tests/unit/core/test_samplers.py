"""Every schedule against the diffusers scheduler it is named after, driven as diffusers' pipelines do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schedulers import SCHEDULE, SDXL, SHAPE, Draws, compare, cut, make_scheduler, network

from std_rt.core.samplers import SCHEDULES, evaluations, schedule_rows
from std_rt.core.schedule import NoiseSchedule, step, trajectory_timesteps

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# diffusers' schedulers hand torch tensors to NumPy in a way that NumPy 2 is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KINDS = ("epsilon", "v_prediction", "sample")
CASES = [
    ("diffusers", 0.0),
    ("diffusers", 0.3),
    ("diffusers", 1.0),
    ("tcd", 0.0),
    ("tcd", 0.3),
    ("tcd", 1.0),
    ("lcm", 1.0),
    ("lcm_diffusers", 1.0),
    ("ddim_trailing", 0.0),
    ("euler_trailing", 0.0),
]


@pytest.mark.parametrize("prediction_type", KINDS)
@pytest.mark.parametrize(("kind", "gamma"), CASES)
def test_a_schedule_is_its_diffusers_scheduler(kind: str, gamma: float, prediction_type: str) -> None:
    for steps, eta in ((2, 0.75), (4, 0.75), (8, 0.75), (8, 0.5), (12, 0.65), (5, 0.95), (3, 1.0)):
        compare(kind, prediction_type, steps, eta, gamma)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(CASES), st.integers(2, 24), st.integers(50, 100), st.sampled_from([0.1, 0.2, 0.55, 0.7])
)
def test_any_strength_step_count_and_gamma(
    case: tuple[str, float], steps: int, percent: int, gamma: float
) -> None:
    kind = case[0]
    compare(kind, "epsilon", steps, percent / 100, gamma if kind in ("diffusers", "tcd") else case[1])


def test_trailing_timesteps_are_those_of_diffusers_for_every_step_count() -> None:
    for kind in ("ddim_trailing", "euler_trailing"):
        scheduler = make_scheduler(kind, "epsilon")
        for steps in range(1, 51):
            scheduler.set_timesteps(steps)
            found = [c.timestep for c in schedule_rows(SCHEDULE, kind, 1.0, None, steps)]
            assert found == scheduler.timesteps.int().tolist()[:steps], (kind, steps)


@pytest.mark.parametrize("gamma", [0.0, 0.2, 1.0])
def test_tdd_is_tcd_on_a_grid_of_250_but_for_the_last_step(gamma: float) -> None:
    """TDDScheduler is not part of diffusers. All its steps but the last are TCDScheduler's on that grid."""
    tcd = diffusers.TCDScheduler(original_inference_steps=250, **SDXL)
    for steps, eta in ((4, 0.75), (8, 0.75), (5, 1.0), (7, 0.6)):
        timesteps = cut(tcd, "tdd", steps, eta)
        rows = schedule_rows(SCHEDULE, "tdd", eta, None, steps, gamma)
        assert [c.timestep for c in rows] == timesteps.tolist()
        x, output = np.random.default_rng(steps).normal(size=(2, *SHAPE))
        for c, t in zip(rows[:-1], timesteps[:-1], strict=True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("diffusers.schedulers.scheduling_tcd.randn_tensor", Draws(1))
                expected = tcd.step(torch.from_numpy(output), t, torch.from_numpy(x), eta=gamma)
            found = step(x, output, c, Draws(1)().numpy())
            np.testing.assert_allclose(found, expected.prev_sample.numpy(), atol=1e-5)
        assert (rows[-1].alpha_s, rows[-1].sigma_s, rows[-1].noise) == (1, 0, 0)


def test_tdd_without_noise_is_the_first_order_solver_of_diffusers() -> None:
    """TDDScheduler is a DPMSolverSinglestepScheduler of order 1, on its own timesteps."""
    rows = schedule_rows(SCHEDULE, "tdd", 1.0, None, 4)
    timesteps = [c.timestep for c in rows]
    assert timesteps == [999, 751, 499, 251]
    config = {key: value for key, value in SDXL.items() if key != "steps_offset"}
    solver = diffusers.DPMSolverSinglestepScheduler(solver_order=1, lower_order_final=True, **config)
    solver.set_timesteps(timesteps=timesteps)
    x = ours = np.random.default_rng(3).normal(size=SHAPE)
    for c in rows:
        output = torch.from_numpy(network(x, c.timestep))
        x = solver.step(output, torch.tensor(c.timestep), torch.from_numpy(x)).prev_sample.numpy()
        ours = step(ours, network(ours, c.timestep), c)
    np.testing.assert_allclose(ours, x, atol=1e-5)


def test_lcm_scales_its_estimate_as_the_boundary_condition_says() -> None:
    """Too small a thing to show in latents: c_skip is 7e-6 at the lowest timestep of the grid."""
    scheduler = make_scheduler("lcm", "epsilon")
    for c in schedule_rows(SCHEDULE, "lcm", 0.75, None, 37, 1.0):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(c.timestep)
        alpha, _ = SCHEDULE.alpha_sigma(c.target)
        assert c.sigma_s == pytest.approx(alpha * skip * c.sigma_t, rel=1e-9)
        assert c.alpha_s == pytest.approx(alpha * (out + skip * c.alpha_t), rel=1e-12)


def test_std_is_the_trajectory_from_tau() -> None:
    rows = schedule_rows(SCHEDULE, "std", 0.75, 779, 8, 0.0)
    assert rows == SCHEDULE.coefficients(trajectory_timesteps(0.75, 8, 779))
    assert schedule_rows(SCHEDULE, "tcd", 0.75, 779, 2)[0].timestep == 779


@pytest.mark.parametrize("kind", SCHEDULES)
def test_steps_fall_and_end_with_no_noise_to_add(kind: str) -> None:
    gamma = {"lcm": 1.0, "lcm_diffusers": 1.0}.get(kind, 0.0)
    rows = schedule_rows(SCHEDULE, kind, 0.75, None, 8, gamma)
    assert len(rows) == evaluations(kind, 0.75, 8) in (6, 8)
    assert all(a.timestep > b.timestep for a, b in pairwise(rows))
    assert rows[-1].noise == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("euler", 0.75), r"unknown sampler 'euler'; use one of std, .*euler_trailing"),
        (("euler_trailing", 0.75, None, 4, 0.3), r"gamma of sampler 'euler_trailing' must be 0, got 0\.3"),
        (("lcm", 0.75, None, 4, 0.0), "gamma of sampler 'lcm' must be 1, got 0"),
        (("tcd", 0.75, None, 4, 1.5), r"must be in 0\.\.1, got 1\.5"),
        (("euler_trailing", 0.4, None, 2), r"2 steps at eta 0\.4 leave no step to run"),
        (("euler_trailing", 0.75, 739, 4), "starts at timestep 749 in 4 steps, not at 739"),
        (("diffusers", 1.0, None, 60), "does not have 60 different timesteps"),
        (("ddim_trailing", 1.5), r"eta must be in \(0, 1\]"),
        (("tcd", 0.5, None, 26), r"steps must be in 1\.\.25"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_rows(SCHEDULE, *arguments)


def test_noise_alone_is_refused() -> None:
    flat = NoiseSchedule.from_config({"rescale_betas_zero_snr": True})
    with pytest.raises(ValueError, match=r"pure noise .*lower eta"):
        schedule_rows(flat, "std", 1.0)
    assert schedule_rows(flat, "std", 0.9)
