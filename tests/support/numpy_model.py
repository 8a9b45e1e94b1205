"""A model made of NumPy whose every output can be worked out by hand, in any precision and batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from support.fake_engine import FakeEngine, float_ports

from std_rt.core.bundle import CONTENT, INPAINTING
from std_rt.core.schedule import NoiseSchedule, StepCoefficients, trajectory_timesteps
from std_rt.engines.program import Program
from std_rt.pipeline.denoise import noise_draws
from std_rt.pipeline.program_builder import NEGATIVE, FrameNumbers, graph_shapes

KINDS = ("epsilon", "v_prediction", "sample")
SHAPES: dict[str, tuple[int, ...]] = {
    "encoder_hidden_states": (3, 5),
    "text_embeds": (6,),
    "time_ids": (6,),
    "style_tokens": (2, 4),
    "style_strength": (),
}
NUMBERS = FrameNumbers(8, 3, SHAPES)
# By what the UNet sees beside the noisy latents.
MODELS = {
    "plain": NUMBERS,
    "content": replace(NUMBERS, unet_inputs=CONTENT),
    "inpainting": replace(NUMBERS, unet_inputs=INPAINTING),
}
SIZE = (16, 24)


def coefficients(steps: int = 4, gamma: float = 0.0) -> list[StepCoefficients]:
    """A trajectory from 0.75."""
    return NoiseSchedule.scaled_linear().coefficients(trajectory_timesteps(0.75, steps), gamma)


def unet(
    sample: Any,
    timestep: Any,
    style_tokens: Any,
    text_embeds: Any,
    style_strength: Any,
    content_latents: Any = 0,
    mask: Any = 0,
    masked_latents: Any = 0,
    **_: Any,
) -> Any:
    """Linear in the sample, and different for every conditioning and timestep; any precision, any batch.

    A latent also depends on its neighbour.
    """
    level = style_tokens.mean((1, 2)) * style_strength + 0.5 * text_embeds.mean(1)
    seen = 0.3 * content_latents + 0.1 * mask + 0.2 * masked_latents
    seen = seen + 0.2 * np.roll(sample, 1, -1)
    return (0.7 + timestep / 4000)[:, None, None, None] * sample + level[:, None, None, None] + seen


def encode(image: Any) -> dict[str, Any]:
    """The mean of every block of 8 x 8."""
    b, c, h, w = image.shape
    return {"latents": image.reshape(b, c, h // 8, 8, w // 8, 8).mean((3, 5))}


def engines(program: Program) -> dict[str, FakeEngine]:
    """For every graph of a program."""
    shapes = graph_shapes(program)
    image, latents = shapes["vae_encoder"]["image"], shapes["vae_decoder"]["latents"]
    runs = {
        "vae_encoder": (encode, {"latents": latents}),
        "unet": (lambda **given: {"noise_pred": unet(**given)}, {"noise_pred": shapes["unet"]["sample"]}),
        "vae_decoder": (lambda latents: {"image": latents.repeat(8, 2).repeat(8, 3)}, {"image": image}),
    }
    return {
        name: FakeEngine(run, float_ports(**shapes[name]), float_ports(**out), name)
        for name, (run, out) in runs.items()
    }


class Scene:
    """``batch`` frames, their noise and what the UNet is told of them: positive and negative."""

    def __init__(self, cs: list[StepCoefficients], seed: int = 0, batch: int = 1) -> None:
        rng = np.random.default_rng(seed)

        def draw(*shape: int) -> Any:
            return rng.normal(0, 0.3, (batch, *shape)).astype(np.float32)

        self.cs, self.batch = cs, batch
        self.frame = rng.integers(60, 200, (batch, *SIZE, 3), np.uint8)
        self.noise = [draw(3, SIZE[0] // 8, SIZE[1] // 8) for _ in range(noise_draws(cs))]
        self.positive = {name: draw(*shape) for name, shape in SHAPES.items()}
        self.negative = self.positive | {name: draw(*SHAPES[name]) for name in NEGATIVE}
        self.mask = (draw(1, SIZE[0] // 8, SIZE[1] // 8) > 0).astype(np.float32)
        self.image_mask = (draw(1, *SIZE) > 0).astype(np.float32)

    def feeds(self, mode: str) -> dict[str, Any]:
        """Of a `frame_program`."""
        fed = {f"noise_{i}": value for i, value in enumerate(self.noise)}
        if mode == "full":
            return fed | {name: np.concatenate([self.negative[name], self.positive[name]]) for name in SHAPES}
        fed |= self.positive
        return fed | ({f"negative_{n}": self.negative[n] for n in NEGATIVE} if mode == "residual" else {})
