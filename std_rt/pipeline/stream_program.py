"""The stream batch as a `Program`: N steps of N consecutive frames in one call of the UNet.

    program = stream_program(numbers, bundle.coefficients(4), "epsilon", (256, 256), Guidance())

Each run takes one frame and returns one. In between, slot i holds the frame that has done i steps: the new
frame enters slot 0, one call of the UNet does step i of the frame in slot i, then every frame moves up by
one. What leaves the last slot is decoded: the frame that entered N - 1 runs before. The first N - 1 results
are meaningless. StreamDiffusion (arXiv 2312.12491) does this for the steps of LCM.

A step is linear in latents, output and noise (`program_builder`), so N steps at once are one linear
combination with different factors for every row. Nothing crosses from row to row: a frame comes out as if
processed alone, up to the summation order of a network with another batch size.

Rows of the UNet's call, as in `unet_rows`:

- ``none``: slots 0 to N - 1.
- ``full``: all slots with the negative prompt, then all with the prompt.
- ``residual``: slot 0 with the negative prompt, slots 1 to N - 1 with the prompt, and slot 0 again with the
  prompt. The gap between the two moves up with its frame.

What the UNet sees of a frame beside its noisy latents moves up with it, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from std_rt.core.arrays import Size
from std_rt.core.schedule import StepCoefficients
from std_rt.engines.program import Program
from std_rt.pipeline.denoise import Guidance, gap_share
from std_rt.pipeline.program_builder import (
    CONDITIONING,
    FrameNumbers,
    ProgramWriter,
    Terms,
    eps_factors,
    step_factors,
)

__all__ = ["stream_program", "unet_rows"]


def unet_rows(slots: int, mode: str) -> list[tuple[int, bool]]:
    """(slot, whether it gets the negative prompt) of every row of the UNet's call."""
    plain = [(slot, False) for slot in range(slots)]
    match mode:
        case "none":
            return plain
        case "full":
            return [(slot, True) for slot in range(slots)] + plain
        case _:
            return [(0, True), *plain[1:], (0, False)]


def stream_program(
    numbers: FrameNumbers,
    coefficients: Sequence[StepCoefficients],
    prediction_type: str,
    size: Size,
    guidance: Guidance | None = None,
) -> Program:
    """The program of a stream of frames of ``size`` (H, W) px, with a slot for every step.

    Feeds: ``noise_0`` [1, C, h, w] of the entering frame; if a step is stochastic ``noise_steps``
    [N, C, h, w], row i the noise of step i of the frame in slot i (any finite values if that step has
    none); and `CONDITIONING` with a row for each of `unet_rows`. For a UNet that inpaints also ``mask`` and
    ``image_mask`` [1, 1, ...] of the entering frame.
    """
    build = StreamProgramBuilder(numbers, coefficients, prediction_type, size, guidance or Guidance())
    return build.decode(build.advance(build.enter()))


class StreamProgramBuilder(ProgramWriter):
    def __init__(
        self,
        numbers: FrameNumbers,
        coefficients: Sequence[StepCoefficients],
        prediction_type: str,
        size: Size,
        guidance: Guidance,
    ) -> None:
        super().__init__(numbers, prediction_type, size, 1)
        self._cs, self._guidance = list(coefficients), guidance
        self._slots = len(self._cs)
        self._rows = unet_rows(self._slots, guidance.mode)
        self.feeds(len(self._rows))
        self._seen: dict[str, str] = {}

    def enter(self) -> str:
        """Latents of all slots [N, ...], the entering frame first."""
        c = self._cs[0]
        noise, z = self.buffer("noise_0", self.latents), self.encode()
        start = self.combine("start", [(z, c.alpha_t), (noise, c.sigma_t)])
        self._seen = {port: self._seen_by_rows(port, x) for port, x in self.seen(z).items()}
        return self._behind(start, "samples", "waiting")

    def advance(self, samples: str) -> str:
        """One step for every slot; returns the latents [1, ...] of the finished frame."""
        terms = self._terms(samples)
        if any(c.noise for c in self._cs):
            noise = self.buffer("noise_steps", (self._slots, *self.latents[1:]))
            terms.append((noise, [c.noise for c in self._cs]))
        stepped = self.combine("stepped", terms)
        if self._slots == 1:
            return stepped
        return self.split_last(stepped, "waiting", "done")[1]

    def _terms(self, samples: str) -> Terms:
        factors = [step_factors(c, self.kind) for c in self._cs]
        p, q = [p for p, _ in factors], [q for _, q in factors]
        w = self._guidance.scale
        match self._guidance.mode:
            case "none":
                return [(samples, p), (self._call(samples), q)]
            case "full":
                output = self._call(self.twice(samples, "doubled"))
                negative, positive = self.halves(output, "negative_output", "positive_output")
                return [(samples, p), (negative, [v * (1 - w) for v in q]), (positive, [v * w for v in q])]
            case _:
                return self._residual(samples, p, q)

    def _residual(self, samples: str, p: list[float], q: list[float]) -> Terms:
        """Terms guided by the gap that every frame had in its first step.

        Row 0 is ``p x + (1 - w) q negative + w q positive``, the others ``p x + q output + share gap``: in
        both, one buffer has the second terms of all rows and one the third.
        """
        w, first = self._guidance.scale, self._cs[0]
        output = self._call(self.join("rows", samples, "start"))
        second, positive = self.split_last(output, "second", "positive_output")
        third = self._behind(positive, "third", "gaps")
        if self._slots > 1:
            self._keep_gaps(second, third)
        shares = [(w - 1) * gap_share(c, first) * c.affine()[1] for c in self._cs[1:]]
        return [(samples, p), (second, [q[0] * (1 - w), *q[1:]]), (third, [q[0] * w, *shares])]

    def _keep_gaps(self, second: str, third: str) -> None:
        """Move all gaps up by one; that of slot 0 is still in network outputs and becomes noise."""
        _, on_output = eps_factors(self._cs[0], self.kind)
        others = self._slots - 1
        terms: Terms = [(third, [on_output, *[1.0] * others]), (second, [-on_output, *[0.0] * others])]
        self.split_last(self.combine("all_gaps", terms), "gaps", "spent")

    def _call(self, sample: str) -> str:
        """The UNet on all rows, each at the timestep of its slot."""
        timesteps = [self._cs[slot].timestep for slot, _ in self._rows]
        at = self.constant("timesteps", timesteps, (len(timesteps),))
        return self.unet(sample, at, {name: name for name in CONDITIONING} | self._seen, "output")

    def _seen_by_rows(self, port: str, entering: str) -> str:
        """What every row of the UNet's call sees at ``port``; ``entering`` [1, ...] is the new frame's."""
        slots = self._behind(entering, f"{port}_of_slots", f"{port}_waiting")
        if self._slots > 1:
            self.split_last(slots, f"{port}_waiting", f"{port}_spent")
        match self._guidance.mode:
            case "none":
                return slots
            case "full":
                return self.twice(slots, f"{port}_of_rows")
            case _:
                return self.join(f"{port}_of_rows", slots, entering)

    def _behind(self, first: str, out: str, carried: str) -> str:
        """``first`` [1, ...] in front of the other slots' carried rows; ``first`` itself with one slot."""
        if self._slots == 1:
            return first
        self.carry(carried, (self._slots - 1, *self.shape(first)[1:]))
        return self.join(out, first, carried)
