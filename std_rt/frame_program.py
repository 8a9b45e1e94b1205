"""One frame of a bundle as a `Program`: encode, add noise, denoise step by step, decode.

    program = frame_program(numbers, bundle.coefficients(4), "epsilon", (256, 256), Guidance("full", 6.0))
    shapes = graph_shapes(program)  # what to open each graph at

Every step of a sampler is a linear combination of the latents, the network's outputs and noise, whatever
the network predicts and however it is guided, so its factors are settled here, once. With them:

- ``none``: one call of the UNet a step.
- ``full``: one call at twice the batch, negative first: ``u + w (c - u)`` (arXiv 2207.12598, as diffusers has
  it).
- ``residual``: the UNet is told the negative in the first step alone, which is that of ``full``. What it
  changed there, ``c - u`` as noise, is carried on, and fades with ``(sigma_t / sigma_tau)^4``: the less
  noise, the less there is to guess (the power was measured on std-tiny). One evaluation more a frame than
  ``none``. StreamDiffusion (arXiv 2312.12491) keeps the first step's clean estimate as the negative instead.
  On a trajectory that reaches x_0 that gap never closes, and std-tiny's pictures were farther from those of
  ``full`` than without guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from std_rt.engines.base import Ports
from std_rt.engines.program import FRAME, GLUE, STYLED, Launch, Program
from std_rt.schedule import StepCoefficients, step, to_eps

__all__ = [
    "CONDITIONING",
    "MODES",
    "NEGATIVE",
    "FrameNumbers",
    "Guidance",
    "eps_factors",
    "frame_program",
    "graph_shapes",
    "noise_draws",
    "step_factors",
]

Terms = list[tuple[str, float]]  # (buffer, factor)
Size = tuple[int, int]  # (H, W) in pixels

MODES = ("none", "full", "residual")
# UNet inputs that a frame is fed, and those of them that the negative has values of its own for.
CONDITIONING = ("encoder_hidden_states", "text_embeds", "time_ids", "style_tokens", "style_strength")
NEGATIVE = ("encoder_hidden_states", "text_embeds", "style_tokens")

_FADING = 4  # power of the noise with which residual guidance fades
_FLOAT, _BYTE = np.dtype(np.float32), np.dtype(np.uint8)


@dataclass(frozen=True)
class Guidance:
    """``scale`` is diffusers' guidance scale, 1 and up; that of ``none`` is 1. Else ValueError."""

    mode: str = "none"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"guidance mode {self.mode!r} is none of {', '.join(MODES)}")
        if not 1 <= self.scale < float("inf") or (self.mode == "none" and self.scale != 1):
            raise ValueError(f"guidance {self.scale:g} does not go with mode {self.mode!r}")


@dataclass(frozen=True)
class FrameNumbers:
    """What of a model decides shapes. ``conditioning`` gives those of `CONDITIONING` without the batch."""

    vae_scale: int
    latent_channels: int
    conditioning: Mapping[str, tuple[int, ...]]


def eps_factors(c: StepCoefficients, prediction_type: str) -> tuple[float, float]:
    """``(l, m)`` of ``eps = l x_t + m output``.

    It is linear in both, so its values at (1, 0) and (0, 1) are all of it.
    """
    unit, zero = np.ones(1), np.zeros(1)
    on_x, on_output = to_eps(zero, unit, c, prediction_type), to_eps(unit, zero, c, prediction_type)
    return float(on_x[0]), float(on_output[0])


def step_factors(c: StepCoefficients, prediction_type: str) -> tuple[float, float]:
    """``(p, q)`` of one step as ``x_s = p x_t + q output`` (without the noise term)."""
    unit, zero = np.ones(1), np.zeros(1)
    p = step(unit, to_eps(zero, unit, c, prediction_type), c, zero)
    q = step(zero, to_eps(unit, zero, c, prediction_type), c, zero)
    return float(p[0]), float(q[0])


def noise_draws(coefficients: Sequence[StepCoefficients]) -> int:
    """Noises a frame needs: one to start from, and one for every stochastic step."""
    return 1 + sum(1 for c in coefficients if c.noise)


def graph_shapes(program: Program) -> dict[str, dict[str, tuple[int, ...]]]:
    """The static input shapes that each graph of a program is called with."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for launch in program.launches:
        if launch.graph not in GLUE:
            shapes = {port: program.buffers[buffer][0] for port, buffer in launch.inputs.items()}
            if found.setdefault(launch.graph, shapes) != shapes:
                raise ValueError(f"the program calls {launch.graph} at two shapes")
    return found


def frame_program(
    numbers: FrameNumbers,
    coefficients: Sequence[StepCoefficients],
    prediction_type: str,
    size: Size,
    guidance: Guidance | None = None,
    batch: int = 1,
) -> Program:
    """The program of ``batch`` frames of ``size`` (H, W) px.

    Feeds: ``noise_0`` ... [batch, C, h, w] (as many as `noise_draws` says), and `CONDITIONING`: of the batch;
    in mode ``full`` of twice the batch, negatives first; in mode ``residual`` of the batch, and besides
    ``negative_`` and the name for each of `NEGATIVE`.
    """
    build = _Build(numbers, prediction_type, size, guidance or Guidance(), batch)
    build.start(coefficients[0])
    for i, c in enumerate(coefficients):
        build.step(i, c, last=i == len(coefficients) - 1)
    return build.finish()


class _Build:
    """A program that is being written, launch by launch; ``_x`` names the latents it has come to."""

    def __init__(
        self, numbers: FrameNumbers, prediction_type: str, size: Size, guidance: Guidance, batch: int
    ) -> None:
        height, width = size
        scale = numbers.vae_scale
        self._kind, self._guidance, self._batch = prediction_type, guidance, batch
        self._latents = (batch, numbers.latent_channels, height // scale, width // scale)
        self._image = (batch, 3, height, width)
        self._launches: list[Launch] = []
        frames = (batch, height, width, 3)
        self._buffers: Ports = {FRAME: (frames, _BYTE), STYLED: (frames, _BYTE)}
        self._constants: dict[str, NDArray[np.float32]] = {}
        self._draws = 0
        self._first_sigma = 0.0
        self._x = ""
        self._rows = batch * (2 if guidance.mode == "full" else 1)  # of a call of the UNet
        for name in CONDITIONING:
            self._buffer(name, (self._rows, *numbers.conditioning[name]))
        for name in NEGATIVE if guidance.mode == "residual" else ():
            self._buffer(f"negative_{name}", (self._rows, *numbers.conditioning[name]))

    def start(self, c: StepCoefficients) -> None:
        """The frame's latents with the noise of the first timestep."""
        image = self._buffer("image", self._image)
        self._launch("frame_in", {"frame": FRAME}, {"image": image}, "convert")
        z = self._buffer("z", self._latents)
        self._launch("vae_encoder", {"image": image}, {"latents": z}, "vae_encoder")
        self._x = self._combine("sample_0", [(z, c.alpha_t), (self._noise(), c.sigma_t)])

    def step(self, index: int, c: StepCoefficients, *, last: bool) -> None:
        """``_x`` from the timestep of ``c`` to its target."""
        self._constant(f"timestep_{index}", c.timestep, (self._rows,))
        p, q = step_factors(c, self._kind)
        w = self._guidance.scale
        match self._guidance.mode:
            case "none":
                terms = [(self._x, p), (self._unet(index), q)]
            case "full":
                negative, positive = self._unet_twice(index)
                terms = [(self._x, p), (negative, q * (1 - w)), (positive, q * w)]
            case _:
                terms = self._residual(index, c, last)
        if c.noise:
            terms.append((self._noise(), c.noise))
        self._x = self._combine(f"sample_{index + 1}", terms)

    def finish(self) -> Program:
        """Decode, and the program is complete."""
        image = self._buffer("decoded", self._image)
        self._launch("vae_decoder", {"latents": self._x}, {"image": image}, "vae_decoder")
        self._launch("frame_out", {"image": image}, {"frame": STYLED}, "convert")
        return Program(tuple(self._launches), self._buffers, self._constants)

    def _residual(self, index: int, c: StepCoefficients, last: bool) -> Terms:
        """Terms of a step that is guided by the gap of the first one; see the module's head."""
        w, (p, q) = self._guidance.scale, step_factors(c, self._kind)
        if index == 0:
            self._first_sigma = c.sigma_t
            negative, positive = self._unet(index, negative=True), self._unet(index)
            if not last:
                _, on_output = eps_factors(c, self._kind)
                self._combine("guidance_gap", [(positive, on_output), (negative, -on_output)])
            return [(self._x, p), (negative, q * (1 - w)), (positive, q * w)]
        _, on_eps = c.affine()
        share = (w - 1) * (c.sigma_t / self._first_sigma) ** _FADING
        return [(self._x, p), (self._unet(index), q), ("guidance_gap", on_eps * share)]

    def _unet(self, index: int, *, negative: bool = False) -> str:
        """Call the UNet on ``_x``; the name of its output."""
        prefix = "negative_" if negative else ""
        given = {name: f"{prefix}{name}" if name in NEGATIVE else name for name in CONDITIONING}
        output = self._buffer(f"{prefix}output_{index}", self._latents)
        self._call_unet(index, self._x, given, output)
        return output

    def _unet_twice(self, index: int) -> tuple[str, str]:
        """Call the UNet at twice the batch; the names of its outputs for negative and positive."""
        shape = (2 * self._batch, *self._latents[1:])
        double = self._buffer(f"double_{index}", shape)
        self._launch("double", {"x": self._x}, {"out": double}, "scheduler")
        output = self._buffer(f"output_{index}", shape)
        self._call_unet(index, double, {name: name for name in CONDITIONING}, output)
        halves = [
            self._buffer(f"{half}_{index}", self._latents) for half in ("negative_output", "positive_output")
        ]
        outputs = dict(zip(("first", "second"), halves, strict=True))
        self._launch("halves", {"x": output}, outputs, "scheduler")
        return halves[0], halves[1]

    def _call_unet(self, index: int, sample: str, given: Mapping[str, str], output: str) -> None:
        inputs = {"sample": sample, "timestep": f"timestep_{index}", **given}
        self._launch("unet", inputs, {"noise_pred": output}, "unet")

    def _combine(self, out: str, terms: Terms) -> str:
        """``out`` as the sum of two to four terms of buffer and factor, in their order."""
        self._buffer(out, self._latents)
        if len(terms) > 3:
            part = self._combine(f"{out}.part", terms[:3])
            terms = [(part, 1.0), *terms[3:]]
        inputs = dict(zip("xyz", (buffer for buffer, _ in terms), strict=False))
        for port, (_, factor) in zip("abc", terms, strict=False):
            inputs[port] = self._constant(f"{out}.{port}", factor, (self._batch, 1, 1, 1))
        self._launch(f"combine{len(terms)}", inputs, {"out": out}, "scheduler")
        return out

    def _noise(self) -> str:
        self._draws += 1
        return self._buffer(f"noise_{self._draws - 1}", self._latents)

    def _constant(self, name: str, value: float, shape: tuple[int, ...]) -> str:
        self._constants[name] = np.full(shape, value, np.float32)
        return self._buffer(name, shape)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> str:
        self._buffers[name] = (shape, _FLOAT)
        return name

    def _launch(self, graph: str, inputs: Mapping[str, str], outputs: Mapping[str, str], stage: str) -> None:
        self._launches.append(Launch(graph, inputs, outputs, stage))
