"""One frame of a bundle as a `Program`: encode, add noise, denoise step by step, decode.

    program = frame_program(numbers, bundle.coefficients(4), "epsilon", (256, 256), Guidance("full", 6.0))
    shapes = graph_shapes(program)  # what to open each graph at

Every step of a sampler is a linear combination of the latents, the network's outputs and noise, whatever the
network predicts and however it is guided, so its factors are computed once, here. Guidance ``full`` is one
call at twice the batch, negative first. The result equals `denoise.denoise` up to rounding (tested).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from std_rt.core.arrays import Size
from std_rt.core.bundle import CONTENT, INPAINTING
from std_rt.core.schedule import StepCoefficients, step, to_eps
from std_rt.engines.glue import GLUE
from std_rt.engines.program import FRAME, STYLED, Launch, Program
from std_rt.engines.protocol import Ports
from std_rt.pipeline.denoise import Guidance, gap_share

__all__ = [
    "CONDITIONING",
    "NEGATIVE",
    "FrameNumbers",
    "ProgramWriter",
    "Terms",
    "batch_rows",
    "eps_factors",
    "frame_program",
    "graph_shapes",
    "step_factors",
]

Terms = list[tuple[str, float | Sequence[float]]]  # (buffer, factor, or one for each row)

# UNet inputs fed with a frame, and those of them that differ for the negative prompt.
CONDITIONING = ("encoder_hidden_states", "text_embeds", "time_ids", "style_tokens", "style_strength")
NEGATIVE = ("encoder_hidden_states", "text_embeds", "style_tokens")

_FLOAT, _BYTE = np.dtype(np.float32), np.dtype(np.uint8)


@dataclass(frozen=True)
class FrameNumbers:
    """The numbers of a model that decide shapes.

    ``conditioning``: the shapes of `CONDITIONING` without the batch axis. ``unet_inputs``: what the UNet sees
    beside the noisy latents (`Bundle.unet_inputs`).
    """

    vae_scale: int
    latent_channels: int
    conditioning: Mapping[str, tuple[int, ...]]
    unet_inputs: tuple[str, ...] = ()


def eps_factors(c: StepCoefficients, prediction_type: str) -> tuple[float, float]:
    """``(l, m)`` of ``eps = l x_t + m output``.

    It is linear in both, so its values at (1, 0) and (0, 1) determine it.
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


def batch_rows(batch: int, mode: str) -> list[tuple[int, bool]]:
    """(frame, whether it gets the negative prompt) of every row of `CONDITIONING` in `frame_program`."""
    plain = [(frame, False) for frame in range(batch)]
    return [(frame, True) for frame in range(batch)] + plain if mode == "full" else plain


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
    *,
    masked: bool = False,
) -> Program:
    """The program of ``batch`` frames of ``size`` (H, W) px.

    Feeds: ``noise_0`` ... [batch, C, h, w] (as many as `noise_draws` says), and `CONDITIONING`: of the batch;
    in mode ``full`` of twice the batch, negatives first; in mode ``residual`` of the batch, and also
    ``negative_NAME`` for each of `NEGATIVE`.

    With ``masked`` every step puts the latents outside the feed ``mask`` [batch, 1, h, w] back on the frame's
    own trajectory (blended latents, arXiv 2206.02779). A UNet that inpaints always takes its mask as an input
    instead: the feeds are ``mask`` and ``image_mask`` [batch, 1, H, W].
    """
    build = ProgramBuilder(numbers, prediction_type, size, guidance or Guidance(), batch)
    build.masked = masked and numbers.unet_inputs != INPAINTING
    build.start(coefficients[0])
    for i, c in enumerate(coefficients):
        build.step(i, c, last=i == len(coefficients) - 1)
    return build.decode(build.x)


class ProgramWriter:
    """Writes a program launch by launch."""

    def __init__(self, numbers: FrameNumbers, prediction_type: str, size: Size, batch: int) -> None:
        """For ``batch`` frames of ``size`` (H, W) px, whose latents have the shape ``latents``."""
        height, width = size
        scale = numbers.vae_scale
        self.kind = prediction_type
        self.latents = (batch, numbers.latent_channels, height // scale, width // scale)
        self._numbers, self._image = numbers, (batch, 3, height, width)
        frames = (batch, height, width, 3)
        self._launches: list[Launch] = []
        self._buffers: Ports = {FRAME: (frames, _BYTE), STYLED: (frames, _BYTE)}
        self._constants: dict[str, NDArray[np.float32]] = {}
        self._carried: set[str] = set()

    def feeds(self, rows: int, names: Sequence[str] = CONDITIONING, prefix: str = "") -> None:
        """Declare ``names`` of `CONDITIONING` as feeds of ``rows`` rows."""
        for name in names:
            self.buffer(f"{prefix}{name}", (rows, *self._numbers.conditioning[name]))

    def encode(self) -> str:
        """Encode the frame; the name of its latents."""
        image = self.buffer("image", self._image)
        self.launch("frame_in", {"frame": FRAME}, {"image": image}, "convert")
        z = self.buffer("z", self.latents)
        self.launch("vae_encoder", {"image": image}, {"latents": z}, "vae_encoder")
        return z

    def seen(self, z: str) -> dict[str, str]:
        """What the UNet sees of the frame beside its noisy latents (port -> buffer [B, ...]).

        ``z`` names the frame's clean latents.
        """
        if self._numbers.unet_inputs == CONTENT:
            return {"content_latents": z}
        if self._numbers.unet_inputs == INPAINTING:
            return {"mask": self.mask(), "masked_latents": self._masked_latents()}
        return {}

    def mask(self) -> str:
        """The feed ``mask``: 1 where to paint."""
        batch, _, *size = self.latents
        return self.buffer("mask", (batch, 1, *size))

    def _masked_latents(self) -> str:
        """Encode the frame with all that is to be painted in grey."""
        batch, _, *size = self._image
        grey = self.constant("grey", 0.0, self._image)
        given = {"x": grey, "y": "image", "mask": self.buffer("image_mask", (batch, 1, *size))}
        image = self.buffer("masked_image", self._image)
        self.launch("blend", given, {"out": image}, "convert")
        z = self.buffer("masked_latents", self.latents)
        self.launch("vae_encoder", {"image": image}, {"latents": z}, "vae_encoder")
        return z

    def decode(self, latents: str) -> Program:
        """Decode the latents into the frame, which completes the program."""
        image = self.buffer("decoded", self._image)
        self.launch("vae_decoder", {"latents": latents}, {"image": image}, "vae_decoder")
        self.launch("frame_out", {"image": image}, {"frame": STYLED}, "convert")
        return Program(tuple(self._launches), self._buffers, self._constants, frozenset(self._carried))

    def unet(self, sample: str, timestep: str, given: Mapping[str, str], output: str) -> str:
        """Call the UNet with ``given`` (port of `CONDITIONING` or `seen` -> buffer); returns ``output``."""
        self.buffer(output, self.shape(sample))
        inputs = {"sample": sample, "timestep": timestep, **given}
        self.launch("unet", inputs, {"noise_pred": output}, "unet")
        return output

    def combine(self, out: str, terms: Terms) -> str:
        """``out`` as the sum of two to four terms of buffer and factor, in their order."""
        shape = self.shape(terms[0][0])
        self.buffer(out, shape)
        if len(terms) > 3:
            part = self.combine(f"{out}.part", terms[:3])
            terms = [(part, 1.0), *terms[3:]]
        inputs = dict(zip("xyz", (buffer for buffer, _ in terms), strict=False))
        for port, (_, factor) in zip("abc", terms, strict=False):
            inputs[port] = self.constant(f"{out}.{port}", factor, (shape[0], 1, 1, 1))
        self.launch(f"combine{len(terms)}", inputs, {"out": out}, "scheduler")
        return out

    def blend(self, out: str, x: str, y: str, mask: str) -> str:
        """``out`` as ``x`` where the mask is 1 and ``y`` where it is 0."""
        self.buffer(out, self.shape(x))
        self.launch("blend", {"x": x, "y": y, "mask": mask}, {"out": out}, "scheduler")
        return out

    def join(self, out: str, x: str, y: str) -> str:
        """``out`` as the rows of ``x`` and then those of ``y``."""
        rows = self.shape(x)[0] + self.shape(y)[0]
        self.buffer(out, (rows, *self.shape(x)[1:]))
        self.launch("join", {"x": x, "y": y}, {"out": out}, "scheduler")
        return out

    def split_last(self, x: str, rest: str, last: str) -> tuple[str, str]:
        """``rest``: all rows of ``x`` but the last; ``last``: that row."""
        rows, *axes = self.shape(x)
        self.buffer(rest, (rows - 1, *axes))
        self.buffer(last, (1, *axes))
        self.launch("split_last", {"x": x}, {"rest": rest, "last": last}, "scheduler")
        return rest, last

    def twice(self, x: str, out: str) -> str:
        """``out`` as the rows of ``x``, twice."""
        rows, *axes = self.shape(x)
        self.buffer(out, (2 * rows, *axes))
        self.launch("double", {"x": x}, {"out": out}, "scheduler")
        return out

    def halves(self, x: str, first: str, second: str) -> tuple[str, str]:
        """``first`` and ``second`` as the halves of ``x``."""
        rows, *axes = self.shape(x)
        for name in (first, second):
            self.buffer(name, (rows // 2, *axes))
        self.launch("halves", {"x": x}, {"first": first, "second": second}, "scheduler")
        return first, second

    def constant(self, name: str, value: float | Sequence[float], shape: tuple[int, ...]) -> str:
        """A buffer filled once: with one value, or one for each row."""
        rows = np.asarray(value, np.float32).reshape(-1, *[1] * (len(shape) - 1))
        self._constants[name] = np.broadcast_to(rows, shape).copy()  # OpenVINO wants to be able to write
        return self.buffer(name, shape)

    def carry(self, name: str, shape: tuple[int, ...]) -> str:
        """A buffer that keeps its contents between runs; zero at first."""
        self._carried.add(name)
        return self.buffer(name, shape)

    def buffer(self, name: str, shape: tuple[int, ...]) -> str:
        """A float buffer; one that no launch writes is a feed."""
        self._buffers[name] = (shape, _FLOAT)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a buffer."""
        return self._buffers[name][0]

    def launch(self, graph: str, inputs: Mapping[str, str], outputs: Mapping[str, str], stage: str) -> None:
        """Append an `engines.program.Launch`."""
        self._launches.append(Launch(graph, inputs, outputs, stage))


class ProgramBuilder(ProgramWriter):
    """Writes the program of whole frames; ``x`` names the current latents."""

    def __init__(
        self, numbers: FrameNumbers, prediction_type: str, size: Size, guidance: Guidance, batch: int
    ) -> None:
        super().__init__(numbers, prediction_type, size, batch)
        self._guidance = guidance
        self._draws = 0
        self.x = ""
        self.masked = False
        self._z = self._start_noise = ""
        self._seen: dict[str, str] = {}
        self._first: StepCoefficients | None = None
        self._rows = len(batch_rows(batch, guidance.mode))  # of a call of the UNet
        self.feeds(self._rows)
        if guidance.mode == "residual":
            self.feeds(self._rows, NEGATIVE, "negative_")

    def start(self, c: StepCoefficients) -> None:
        """Add the noise of the first timestep to the frame's latents."""
        self._first = c
        self._z, self._start_noise = self.encode(), self._noise()
        self.x = self.combine("sample_0", [(self._z, c.alpha_t), (self._start_noise, c.sigma_t)])
        self._seen = self.seen(self._z)
        if self._guidance.mode == "full":
            self._seen = {port: self.twice(x, f"double_{port}") for port, x in self._seen.items()}

    def step(self, index: int, c: StepCoefficients, *, last: bool) -> None:
        """One step, from the timestep of ``c`` to its target."""
        self.constant(f"timestep_{index}", c.timestep, (self._rows,))
        p, q = step_factors(c, self.kind)
        w = self._guidance.scale
        terms: Terms
        match self._guidance.mode:
            case "none":
                terms = [(self.x, p), (self._unet(index), q)]
            case "full":
                negative, positive = self._unet_twice(index)
                terms = [(self.x, p), (negative, q * (1 - w)), (positive, q * w)]
            case _:
                terms = self._residual(index, c, last)
        if c.noise:
            terms.append((self._noise(), c.noise))
        self.x = self.combine(f"sample_{index + 1}", terms)
        if self.masked:
            # What a stochastic step takes from sigma_s it gives back as fresh noise.
            sigma = float(np.hypot(c.sigma_s, c.noise))
            level: Terms = [(self._z, c.alpha_s), (self._start_noise, sigma)]
            kept = self._z if last else self.combine(f"kept_{index + 1}", level)
            self.x = self.blend(f"masked_{index + 1}", self.x, kept, self.mask())

    def _residual(self, index: int, c: StepCoefficients, last: bool) -> Terms:
        """Terms of a step guided by the gap of the first one; see `denoise.Guidance`."""
        w, (p, q) = self._guidance.scale, step_factors(c, self.kind)
        if index == 0:
            negative, positive = self._unet(index, negative=True), self._unet(index)
            if not last:
                _, on_output = eps_factors(c, self.kind)
                self.combine("guidance_gap", [(positive, on_output), (negative, -on_output)])
            return [(self.x, p), (negative, q * (1 - w)), (positive, q * w)]
        assert self._first is not None
        _, on_eps = c.affine()
        share = (w - 1) * gap_share(c, self._first)
        return [(self.x, p), (self._unet(index), q), ("guidance_gap", on_eps * share)]

    def _unet(self, index: int, *, negative: bool = False) -> str:
        """Call the UNet on ``_x``; the name of its output."""
        prefix = "negative_" if negative else ""
        given = {name: f"{prefix}{name}" if name in NEGATIVE else name for name in CONDITIONING}
        return self.unet(self.x, f"timestep_{index}", given | self._seen, f"{prefix}output_{index}")

    def _unet_twice(self, index: int) -> tuple[str, str]:
        """Call the UNet at twice the batch; the names of its outputs for negative and positive."""
        double = self.twice(self.x, f"double_{index}")
        given = {name: name for name in CONDITIONING} | self._seen
        output = self.unet(double, f"timestep_{index}", given, f"output_{index}")
        return self.halves(output, f"negative_output_{index}", f"positive_output_{index}")

    def _noise(self) -> str:
        self._draws += 1
        return self.buffer(f"noise_{self._draws - 1}", self.latents)
