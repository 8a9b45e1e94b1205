"""The readable loop against closed forms. (The compiled program against it: test_program_builder.)"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.numpy_model import KINDS, coefficients

from std_rt.core.schedule import StepCoefficients
from std_rt.pipeline.denoise import GUIDANCE_MODES, Guidance, denoise, img2img, noise_draws

Z = np.random.default_rng(0).normal(size=(2, 3, 4, 5))


def perfect(steps: list[StepCoefficients], clean: Any, kind: str) -> Any:
    """A network that knows the clean latents, whatever it is meant to predict."""
    by_timestep = {c.timestep: c for c in steps}

    def predict(x: Any, timestep: int, negative: bool) -> Any:
        c = by_timestep[timestep]
        eps = (x - c.alpha_t * clean) / c.sigma_t
        return {"epsilon": eps, "sample": clean, "v_prediction": c.alpha_t * eps - c.sigma_t * clean}[kind]

    return predict


def noises(steps: list[StepCoefficients]) -> list[Any]:
    return list(np.random.default_rng(1).normal(size=(noise_draws(steps), *Z.shape)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_network_that_knows_the_answer_is_led_to_it(kind: str, gamma: float, count: int) -> None:
    steps = coefficients(count, gamma)
    found = denoise(Z, perfect(steps, -Z, kind), noise=noises(steps), steps=steps, prediction_type=kind)
    np.testing.assert_allclose(found, -Z, atol=1e-9)


@pytest.mark.parametrize("mode", GUIDANCE_MODES)
def test_guidance_pushes_away_from_the_negative(mode: str) -> None:
    """With constant eps and eps_negative, full guidance is a constant eps of its own."""
    steps, noise = coefficients(4), noises(coefficients(4))
    asked: list[bool] = []

    def predict(x: Any, timestep: int, negative: bool) -> Any:
        asked.append(negative)
        return np.full_like(x, 0.1 if negative else 0.3)

    guidance = Guidance(mode, 1.0 if mode == "none" else 3.0)
    found = denoise(Z, predict, noise=noise, steps=steps, guidance=guidance)
    plain = denoise(Z, lambda x, *_: np.full_like(x, 0.3), noise=noise, steps=steps)
    wanted = denoise(Z, lambda x, *_: np.full_like(x, 0.1 + 3 * 0.2), noise=noise, steps=steps)
    assert asked.count(True) == {"none": 0, "full": 4, "residual": 1}[mode]
    assert asked.count(False) == 4
    if mode == "none":
        np.testing.assert_array_equal(found, plain)
    elif mode == "full":
        np.testing.assert_allclose(found, wanted, atol=1e-12)
    else:  # it fades: between the two
        assert np.all((found - plain) * (wanted - plain) > 0)
        assert np.abs(found - plain).max() < np.abs(wanted - plain).max()


def test_after_sees_every_target_and_may_change_the_latents() -> None:
    steps, seen = coefficients(4), []

    def after(x: Any, timestep: int) -> Any:
        seen.append(timestep)
        return x + (timestep == -1)

    found = denoise(Z, perfect(steps, Z, "epsilon"), noise=noises(steps), steps=steps, after=after)
    assert seen == [c.target for c in steps]
    np.testing.assert_allclose(found, Z + 1, atol=1e-9)


def test_a_whole_frame_is_encoded_denoised_and_decoded() -> None:
    steps = coefficients(2)
    predict = perfect(steps, 2 * Z, "epsilon")
    found = img2img(
        Z / 3, lambda image: 3 * image, predict, lambda z: z + 1, noise=noises(steps), steps=steps
    )
    np.testing.assert_allclose(found, 2 * Z + 1, atol=1e-9)


@pytest.mark.parametrize(("mode", "scale"), [("cfg", 2.0), ("none", 2.0), ("full", 0.5), ("full", np.inf)])
def test_guidance_that_does_not_fit_is_refused(mode: str, scale: float) -> None:
    with pytest.raises(ValueError, match=r"guidance (mode|scale)"):
        Guidance(mode, scale)
