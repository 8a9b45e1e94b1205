"""The program of a frame against loops written out by hand, run on engines made of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import numpy_model
from support.fake_engine import FakeEngine
from support.numpy_model import KINDS, MODELS, NUMBERS, SIZE, coefficients, encode, engines, unet

from std_rt.core.schedule import NoiseSchedule, StepCoefficients, add_noise, step, to_eps
from std_rt.engines.host import HostRunner
from std_rt.pipeline.denoise import Guidance, denoise
from std_rt.pipeline.program_builder import (
    CONDITIONING,
    NEGATIVE,
    batch_rows,
    eps_factors,
    frame_program,
    graph_shapes,
    step_factors,
)


class Scene(numpy_model.Scene):
    """Frames that can be run."""

    model, masked = "plain", False

    def run(self, kind: str, guidance: Guidance) -> tuple[Any, HostRunner, dict[str, FakeEngine]]:
        numbers, mask = MODELS[self.model], {"mask": self.mask, "image_mask": self.image_mask}
        program = frame_program(numbers, self.cs, kind, SIZE, guidance, self.batch, masked=self.masked)
        opened = engines(program)
        runner = HostRunner(opened, program)
        runner.set(**self.feeds(guidance.mode))
        runner.set(**{name: value for name, value in mask.items() if name in program.feeds})
        return runner.run(self.frame), runner, opened

    def latents(self, kind: str, guidance: Guidance) -> Any:
        """What the decoder was given."""
        return self.run(kind, guidance)[2]["vae_decoder"].calls[0]["latents"]


def reference(scene: Scene, kind: str, guidance: Guidance) -> Any:
    """The readable loop, in float64."""
    image = (scene.frame / 127.5 - 1).transpose(0, 3, 1, 2)
    z, seen = encode(image)["latents"], {}
    if scene.model == "content":
        seen = {"content_latents": z}
    elif scene.model == "inpainting":
        rest = encode(image * (1 - scene.image_mask.astype(np.float64)))["latents"]
        seen = {"mask": scene.mask, "masked_latents": rest}

    def predict(x: Any, timestep: int, negative: bool) -> Any:
        given = scene.negative if negative else scene.positive
        given = {name: value.astype(np.float64) for name, value in given.items()}
        return unet(x, np.full(scene.batch, timestep, np.float64), **given, **seen)

    noise = [value.astype(np.float64) for value in scene.noise]

    def keep(x: Any, timestep: int) -> Any:
        alpha, sigma = NoiseSchedule.scaled_linear().alpha_sigma(timestep)
        return np.where(scene.mask > 0, x, alpha * z + sigma * noise[0])

    after = keep if scene.masked and scene.model != "inpainting" else None
    return denoise(
        z, predict, noise=noise, steps=scene.cs, prediction_type=kind, guidance=guidance, after=after
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_without_guidance_it_is_the_plain_loop_to_the_last_bit(kind: str, gamma: float) -> None:
    """In float32, operation by operation: convert, add noise, scale and add, convert back."""
    scene = Scene(coefficients(gamma=gamma))
    styled, _, _ = scene.run(kind, Guidance())
    image = np.ascontiguousarray(scene.frame.transpose(0, 3, 1, 2) * np.float32(1 / 127.5) - np.float32(1))
    x = add_noise(encode(image)["latents"], scene.noise[0], scene.cs[0])
    drawn = 1
    for c in scene.cs:
        p, q = step_factors(c, kind)
        output = unet(x, np.array([c.timestep], np.float32), **scene.positive)
        x = x * p + output * q
        if c.noise:
            x = x + scene.noise[drawn] * c.noise
            drawn += 1
    assert x.dtype == np.float32
    np.testing.assert_array_equal(scene.latents(kind, Guidance()), x)
    image = x.repeat(8, 2).repeat(8, 3) * np.float32(127.5) + np.float32(128)
    expected = np.clip(image, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(styled, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["none", "full", "residual"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_mode_is_its_loop_reference(
    kind: str, gamma: float, mode: str, model: str, masked: bool
) -> None:
    scene = Scene(coefficients(gamma=gamma), seed=1)
    scene.model, scene.masked = model, masked
    guidance = Guidance(mode, 1.0 if mode == "none" else 6.0)
    expected = reference(scene, kind, guidance)
    np.testing.assert_allclose(
        scene.latents(kind, guidance), expected, rtol=0, atol=3e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize("mode", ["full", "residual"])
def test_guidance_of_1_is_none(mode: str) -> None:
    scene = Scene(coefficients())
    np.testing.assert_allclose(
        scene.latents("epsilon", Guidance(mode, 1.0)), scene.latents("epsilon", Guidance()), atol=1e-6
    )


def test_residual_is_full_for_one_step_and_not_for_two() -> None:
    modes = (Guidance("full", 4.0), Guidance("residual", 4.0))
    one = [Scene(coefficients(1)).latents("v_prediction", guidance) for guidance in modes]
    two = [Scene(coefficients(2)).latents("v_prediction", guidance) for guidance in modes]
    np.testing.assert_allclose(*one, atol=1e-6)
    assert np.abs(two[0] - two[1]).max() > 0.01


def test_residual_is_full_where_the_gap_fades_with_the_noise() -> None:
    """A network in which what the conditioning changes is a share of sigma to the fourth loses nothing."""
    cs = coefficients(4)
    scene = Scene(cs, seed=5)
    sigma = {c.timestep: c.sigma_t for c in cs}

    def network(sample: Any, timestep: Any, style_tokens: Any, **_: Any) -> Any:
        level = style_tokens.mean((1, 2))[:, None, None, None]
        return {"noise_pred": 0.6 * sample + 0.4 * sigma[int(timestep[0])] ** 4 * level}

    found = []
    for mode in ("full", "residual", "none"):
        guidance = Guidance(mode, 1.0 if mode == "none" else 3.0)
        program = frame_program(NUMBERS, cs, "epsilon", SIZE, guidance)
        opened = engines(program)
        opened["unet"] = FakeEngine(network, opened["unet"].inputs, opened["unet"].outputs)
        runner = HostRunner(opened, program)
        runner.set(**scene.feeds(mode))
        runner.run(scene.frame)
        found.append(opened["vae_decoder"].calls[0]["latents"])
    full, residual, none = found
    np.testing.assert_allclose(residual, full, atol=1e-6)
    assert np.abs(full - none).max() > 0.01


def test_residual_asks_for_the_negative_once() -> None:
    scene = Scene(coefficients(4))
    calls = scene.run("epsilon", Guidance("residual", 3.0))[2]["unet"].calls
    told = [call["style_tokens"] for call in calls]
    assert len(calls) == 5
    np.testing.assert_array_equal(told[0], scene.negative["style_tokens"])
    for later in told[1:]:
        np.testing.assert_array_equal(later, scene.positive["style_tokens"])
    assert [int(call["timestep"][0]) for call in calls] == [739, 739, 559, 379, 199]


@pytest.mark.parametrize("mode", ["none", "full", "residual"])
def test_a_batch_is_its_frames_one_by_one(mode: str) -> None:
    guidance = Guidance(mode, 1.0 if mode == "none" else 5.0)
    both = Scene(coefficients(gamma=0.4), seed=3, batch=2)
    together = both.latents("epsilon", guidance)
    for i in range(2):
        one = Scene(both.cs, batch=1)
        one.frame = both.frame[i : i + 1]
        one.noise = [noise[i : i + 1] for noise in both.noise]
        one.positive = {name: value[i : i + 1] for name, value in both.positive.items()}
        one.negative = {name: value[i : i + 1] for name, value in both.negative.items()}
        np.testing.assert_array_equal(together[i : i + 1], one.latents("epsilon", guidance))


def test_feeds_and_shapes_say_what_to_open_and_what_to_set() -> None:
    cs = coefficients(4, gamma=0.5)
    noises = [f"noise_{i}" for i in range(4)]
    plain = frame_program(NUMBERS, cs, "epsilon", SIZE)
    assert sorted(plain.feeds) == sorted([*noises, *CONDITIONING])
    assert plain.graphs == ["vae_encoder", "unet", "vae_decoder"]
    assert graph_shapes(plain)["unet"]["sample"] == (1, 3, 2, 3)
    assert graph_shapes(plain)["vae_encoder"] == {"image": (1, 3, 16, 24)}
    full = frame_program(NUMBERS, cs, "epsilon", SIZE, Guidance("full", 2.0), batch=2)
    assert sorted(full.feeds) == sorted(plain.feeds)
    assert {name: shape[0] for name, shape in graph_shapes(full)["unet"].items()} == dict.fromkeys(
        ("sample", "timestep", *CONDITIONING), 4
    )
    assert graph_shapes(full)["vae_decoder"]["latents"][0] == 2
    assert batch_rows(2, "full") == [(0, True), (1, True), (0, False), (1, False)]
    assert batch_rows(2, "residual") == batch_rows(2, "none") == [(0, False), (1, False)]
    residual = frame_program(NUMBERS, cs, "epsilon", SIZE, Guidance("residual", 2.0))
    assert sorted(residual.feeds) == sorted([*plain.feeds, *(f"negative_{name}" for name in NEGATIVE)])


@pytest.mark.parametrize("mode", ["none", "full", "residual"])
@pytest.mark.parametrize("model", MODELS)
def test_no_launch_writes_what_it_reads_and_nothing_is_written_twice(mode: str, model: str) -> None:
    guidance = Guidance(mode, 1.0 if mode == "none" else 2.0)
    program = frame_program(MODELS[model], coefficients(4, 0.3), "sample", SIZE, guidance, masked=True)
    written = [buffer for launch in program.launches for buffer in launch.outputs.values()]
    assert len(written) == len(set(written))
    for launch in program.launches:
        assert not set(launch.inputs.values()) & set(launch.outputs.values())
    used = {buffer for launch in program.launches for buffer in launch.inputs.values()} | {"styled"}
    assert set(program.buffers) == used  # no launch for nothing


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_the_formulas_of_the_schedule(kind: str) -> None:
    c = StepCoefficients(559, 379, 0.6, 0.8, 0.9, 0.43)
    x, output = np.random.default_rng(0).normal(size=(2, 5))
    eps = to_eps(output, x, c, kind)
    pairs = {
        "step": (step_factors(c, kind), step(x, eps, c)),
        "eps": (eps_factors(c, kind), eps),
    }
    for name, ((p, q), expected) in pairs.items():
        np.testing.assert_allclose(p * x + q * output, expected, err_msg=name)


@pytest.mark.parametrize(
    ("mode", "scale"),
    [("cfg", 2.0), ("none", 2.0), ("full", 0.5), ("full", float("nan")), ("residual", float("inf"))],
)
def test_guidance_that_means_nothing_is_refused(mode: str, scale: float) -> None:
    with pytest.raises(ValueError, match="guidance"):
        Guidance(mode, scale)
