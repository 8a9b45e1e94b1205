"""The stylizer: a frame in, the frame in another style out.

    stylizer = Stylizer.load()
    stylizer.set_style(picture)
    frame, state = stylizer.step(frame, state)

Encode the picture, add the noise of ``tau``, denoise along the trajectory that the bundle was made for,
decode. `State` is a value: the noise is drawn once per (seed, size), so a stream keeps its noise from frame
to frame, and the same seed gives the same noise on every backend.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from std_rt.bundle import Bundle, load_bundle
from std_rt.conditioning import EncodedStyle, StyleEncoder, blend, to_frame, to_image, unet_inputs
from std_rt.engines import Engine, GraphSpec, choose_backend, open_engine
from std_rt.errors import BundleError, UsageError
from std_rt.media import fit
from std_rt.schedule import StepCoefficients, add_noise, step, to_eps

__all__ = ["Pipeline", "State", "Stylizer", "draw_noise", "step_factors"]

Frame = NDArray[np.uint8]
Array = NDArray[np.float32]
Size = tuple[int, int]  # (H, W) in pixels
Picture = Frame | Path | str
Opener = Callable[[GraphSpec], Engine]
Mark = Callable[[str], None]

_SIZES_KEPT = 2  # sizes whose engines stay open: enough for portrait and landscape in turn


def _no_mark(stage: str) -> None:
    """Nobody is timing."""


@dataclass(frozen=True, eq=False)
class State:
    """What a stream carries from frame to frame.

    ``noise`` [K, C, h, w]: the start noise, then one for every stochastic step. ``index``: frames done.
    """

    seed: int
    index: int
    noise: Array


def draw_noise(seed: int, shape: tuple[int, ...]) -> Array:
    """Unit normal noise float32, the same for a seed on every machine and backend."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def step_factors(c: StepCoefficients, prediction_type: str) -> tuple[float, float]:
    """``(p, q)`` of one step as ``x_s = p x_t + q output`` (without the noise term).

    The step is linear in both, so its value at (1, 0) and (0, 1) is all of it.
    """
    unit, zero = np.ones(1), np.zeros(1)
    p = step(unit, to_eps(zero, unit, c, prediction_type), c, zero)
    q = step(zero, to_eps(unit, zero, c, prediction_type), c, zero)
    return float(p[0]), float(q[0])


class Pipeline:
    """The engines of one size, and the buffers they share."""

    def __init__(
        self, engines: Mapping[str, Engine], coefficients: list[StepCoefficients], prediction_type: str
    ) -> None:
        """``engines``: vae_encoder, unet, vae_decoder, opened at one size."""
        self._encode, self._unet, self._decode = (
            engines["vae_encoder"],
            engines["unet"],
            engines["vae_decoder"],
        )
        self._start = coefficients[0]
        self._steps = [(*step_factors(c, prediction_type), c.noise) for c in coefficients]
        self._timesteps = [np.array([c.timestep], np.float32) for c in coefficients]
        self._image = np.empty(self._encode.inputs["image"][0], np.float32)
        self._x = np.empty(self._unet.inputs["sample"][0], np.float32)
        self._term = np.empty_like(self._x)

    def run(self, frame: Frame, noise: Array, inputs: dict[str, Array], mark: Mark = _no_mark) -> Frame:
        """Stylize a frame uint8 [H, W, 3] of exactly this size; ``mark(stage)`` follows each stage."""
        image = to_image(frame, self._image)
        mark("convert")
        z = self._encode(image=image)["latents"]
        mark("vae_encoder")
        self._x[...] = add_noise(z, noise[:1], self._start)
        mark("scheduler")
        self._denoise(noise, inputs, mark)
        image = self._decode(latents=self._x)["image"]
        mark("vae_decoder")
        styled = to_frame(image)
        mark("convert")
        return styled

    def _denoise(self, noise: Array, inputs: dict[str, Array], mark: Mark) -> None:
        """Walk ``x`` from ``tau`` to the clean end, in place."""
        drawn = 1
        for timestep, (p, q, stochastic) in zip(self._timesteps, self._steps, strict=True):
            output = self._unet(sample=self._x, timestep=timestep, **inputs)["noise_pred"]
            mark("unet")
            self._x *= p
            self._x += np.multiply(output, q, out=self._term)
            if stochastic:
                self._x += np.multiply(noise[drawn : drawn + 1], stochastic, out=self._term)
                drawn += 1
            mark("scheduler")


class Stylizer:
    """A bundle, opened on a backend, with a style. One thread at a time."""

    def __init__(
        self,
        bundle: Bundle,
        open_graph: Opener,
        *,
        size: int | Size | None = None,
        steps: int | None = None,
        backend: str = "",
        reason: str = "",
    ) -> None:
        """Most callers want `load`. ``open_graph`` opens one graph at static shapes.

        ``size`` is the working size: a side in pixels for about that area, or (H, W). Raises BundleError
        where the bundle needs something that this version does not do, or has no schedule for ``steps``.
        """
        if bundle.guidance["mode"] != "none":
            mode = bundle.guidance["mode"]
            raise BundleError(
                f"bundle '{bundle.name}' needs guidance {mode!r}, which this std-rt lacks; upgrade std-rt"
            )
        self.bundle, self.backend, self.reason = bundle, backend, reason
        self.size: int | Size = bundle.size_default if size is None else size
        self.coefficients = bundle.coefficients(steps)
        self._open_graph = open_graph
        self._text = bundle.conditioning()
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="std-rt-open")
        self._style_engine: Future[Engine] | None = None
        self._encoder: StyleEncoder | None = None
        self._opening: OrderedDict[Size, dict[str, Future[Engine]]] = OrderedDict()
        self._pipelines: dict[Size, Pipeline] = {}
        self._style: tuple[EncodedStyle, float] | None = None
        self._inputs: dict[Size, dict[str, Array]] = {}

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle | None = None,
        *,
        backend: str = "auto",
        size: int | Size | None = None,
        steps: int | None = None,
        precision: str = "auto",
    ) -> Stylizer:
        """Open a bundle by name or folder (None: the built-in model) on a backend.

        Raises BundleError (unknown, damaged, wrong step count) or BackendError (not installed).
        """
        opened = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        name, reason = choose_backend(backend)
        return cls(
            opened,
            lambda spec: open_engine(name, spec, precision),
            size=size,
            steps=steps,
            backend=name,
            reason=reason,
        )

    @property
    def steps(self) -> int:
        """Denoising steps a frame."""
        return len(self.coefficients)

    @property
    def precision(self) -> str:
        """What the UNet computes in, once engines are open: fp32 or bf16."""
        for engines in self._opening.values():
            return engines["unet"].result().precision
        return "unknown"

    def working_size(self, height_px: int, width_px: int) -> Size:
        """(H, W) at which a frame of the given size is processed."""
        low, high = self.bundle.size_range
        return fit.working_size(height_px, width_px, self.size, self.bundle.size_multiple, low, high)

    def prepare(self, height_px: int, width_px: int) -> None:
        """Begin to open, in the background, what a frame of the given size and a style will need."""
        self._open_style_encoder()
        self._open_size(self.working_size(height_px, width_px))

    def set_style(self, style: Picture | Sequence[tuple[Picture, float]], strength: float = 1.0) -> None:
        """Set the style: one picture, or (picture, weight) pairs that blend.

        A picture is a frame uint8 [H, W, 3] or the path of a file. ``strength`` scales the style's
        effect; 0 is none, 1 as trained. Raises UsageError on a weight or strength out of range,
        MediaError on an unreadable file.
        """
        low, high = self.bundle.style.get("strength_range", (0, 2))
        if not low <= strength <= high:
            raise UsageError(f"style strength must be in {low:g}..{high:g}, got {strength:g}")
        pairs = [(style, 1.0)] if isinstance(style, np.ndarray | Path | str) else list(style)
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            raise UsageError('several styles are a list of pairs, as [("a.png", 0.7), ("b.png", 0.3)]')
        encoder = self._style_encoder()
        self._style = (
            blend([(encoder(_frame(picture)), float(weight)) for picture, weight in pairs]),
            strength,
        )
        self._inputs.clear()

    def state(self, height_px: int, width_px: int, *, seed: int = 0) -> State:
        """The state a stream of frames of the given size starts from."""
        return self._state(self.working_size(height_px, width_px), seed)

    def step(self, frame: Frame, state: State | None = None, *, mark: Mark = _no_mark) -> tuple[Frame, State]:
        """Stylize one frame uint8 [H, W, 3] of a stream; give the state returned to the next call.

        A frame that does not have the working size is fitted to it, and comes back at that resolution in
        its own aspect, never larger than it was. ``mark`` is called with a stage's name when it ends.
        """
        frame = _checked(frame)
        shape = (frame.shape[0], frame.shape[1])
        size = self.working_size(*shape)
        state = self._state_for(state, size)
        working = frame if shape == size else fit.to_working(frame, size)
        mark("convert")
        styled = self._pipeline(size).run(working, state.noise, self._inputs_for(size), mark)
        result = fit.result_size(shape, size)
        if result != size:
            styled = fit.from_working(styled, result)
            mark("convert")
        return styled, replace(state, index=state.index + 1)

    def stylize(self, frame: Frame, seed: int = 0) -> Frame:
        """Stylize one frame on its own: `step` without a stream."""
        frame = _checked(frame)
        return self.step(frame, self.state(*frame.shape[:2], seed=seed))[0]

    def close(self) -> None:
        """Close every engine."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        while self._opening:
            self._close_oldest()
        if self._style_engine is not None:
            _close(self._style_engine)
            self._style_engine = self._encoder = None

    def __enter__(self) -> Stylizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _state(self, size: Size, seed: int) -> State:
        scale = self.bundle.vae_scale
        draws = 1 + sum(1 for c in self.coefficients if c.noise)
        shape = (draws, self.bundle.latent_channels, size[0] // scale, size[1] // scale)
        return State(seed, 0, draw_noise(seed, shape))

    def _state_for(self, state: State | None, size: Size) -> State:
        """``state`` itself, or one with the same seed where the size of the stream has changed."""
        if state is None:
            return self._state(size, 0)
        scale = self.bundle.vae_scale
        if state.noise.shape[2:] == (size[0] // scale, size[1] // scale):
            return state
        return replace(self._state(size, state.seed), index=state.index)

    def _pipeline(self, size: Size) -> Pipeline:
        engines = self._open_size(size)
        if size not in self._pipelines:
            opened = {name: future.result() for name, future in engines.items()}
            self._pipelines[size] = Pipeline(opened, self.coefficients, self.bundle.prediction_type)
        return self._pipelines[size]

    def _inputs_for(self, size: Size) -> dict[str, Array]:
        if self._style is None:
            raise UsageError("no style is set; call set_style(picture) first")
        if size not in self._inputs:
            self._inputs[size] = unet_inputs(self._text, *self._style, size)
        return self._inputs[size]

    def _style_encoder(self) -> StyleEncoder:
        if self._encoder is None:
            self._encoder = StyleEncoder(self._open_style_encoder().result(), self.bundle.style_px)
        return self._encoder

    def _open_style_encoder(self) -> Future[Engine]:
        if self._style_engine is None:
            side = self.bundle.style_px
            self._style_engine = self._submit("style_encoder", {"style_image": (1, 3, side, side)})
        return self._style_engine

    def _open_size(self, size: Size) -> dict[str, Future[Engine]]:
        """Engines of a size, opening them side by side where they are not; the least used size is closed."""
        if size in self._opening:
            self._opening.move_to_end(size)
            return self._opening[size]
        while len(self._opening) >= _SIZES_KEPT:
            self._close_oldest()
        shapes = self._shapes(size)
        self._opening[size] = {name: self._submit(name, shapes[name]) for name in shapes}
        return self._opening[size]

    def _shapes(self, size: Size) -> dict[str, dict[str, tuple[int, ...]]]:
        """Input shapes of the graphs at a size, the slowest to open first."""
        scale, style = self.bundle.vae_scale, self.bundle.style
        latents = (1, self.bundle.latent_channels, size[0] // scale, size[1] // scale)
        unet = {
            "sample": latents,
            "timestep": (1,),
            "encoder_hidden_states": self._text["encoder_hidden_states"].shape,
            "text_embeds": self._text["text_embeds"].shape,
            "time_ids": (1, 6),
            "style_tokens": (1, int(style["tokens"]), int(style["dim"])),
            "style_strength": (1,),
        }
        return {"unet": unet, "vae_decoder": {"latents": latents}, "vae_encoder": {"image": (1, 3, *size)}}

    def _submit(self, name: str, shapes: dict[str, tuple[int, ...]]) -> Future[Engine]:
        spec = GraphSpec(name, self.bundle.graph_path(name), shapes, self.bundle.digest)
        return self._pool.submit(self._open_graph, spec)

    def _close_oldest(self) -> None:
        size, engines = self._opening.popitem(last=False)
        self._pipelines.pop(size, None)
        for future in engines.values():
            _close(future)


def _close(future: Future[Engine]) -> None:
    if not future.cancel() and future.exception() is None:
        future.result().close()


def _checked(frame: Any) -> Frame:
    right = isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3
    if right and frame.shape[2] == 3 and frame.size:
        return np.asarray(frame, np.uint8)
    found = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
    raise UsageError(f"a frame is a uint8 array [H, W, 3] in RGB, got {found}")


def _frame(picture: Picture) -> Frame:
    if isinstance(picture, Path | str):
        from std_rt.media.image import read_picture

        return read_picture(Path(picture)).frame
    return _checked(picture)
