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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from std_rt.bundle import Bundle, load_bundle
from std_rt.conditioning import EncodedStyle, StyleEncoder, blend, guided_inputs, unet_inputs
from std_rt.engines import Engine, GraphSpec, choose_backend, open_engine, open_runner
from std_rt.engines.base import GPU_BACKENDS
from std_rt.engines.program import Mark, Program, Runner, no_mark, open_on_host
from std_rt.engines.switching import SwitchingRunner
from std_rt.errors import BundleError, UsageError
from std_rt.frame_program import (
    MODES,
    NEGATIVE,
    FrameNumbers,
    Guidance,
    frame_program,
    graph_shapes,
    noise_draws,
)
from std_rt.media import fit
from std_rt.text import TextEncoder

__all__ = ["State", "Stylizer", "choose_guidance", "draw_noise"]

Frame = NDArray[np.uint8]
Array = NDArray[np.float32]
Size = tuple[int, int]  # (H, W) in pixels
Picture = Frame | Path | str
Opener = Callable[[GraphSpec], Engine]
RunnerOpener = Callable[[Program, dict[str, GraphSpec]], Runner]

_SIZES_KEPT = 2  # sizes whose engines stay open: enough for portrait and landscape in turn


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


def choose_guidance(bundle: Bundle, scale: float | None = None, mode: str | None = None) -> Guidance:
    """How frames are guided: as the bundle says, or as asked. Scale 1 is none, whatever the mode.

    A bundle without guidance of its own takes mode ``full`` where only a scale is asked. Raises UsageError
    where scale and mode do not fit together, BundleError where the bundle has no negative or another
    std-rt's guidance.
    """
    own = bundle.guidance
    if own["mode"] not in MODES:
        raise BundleError(
            f"bundle '{bundle.name}' needs guidance {own['mode']!r}, which this std-rt lacks; upgrade std-rt"
        )
    if mode is not None and mode not in MODES:
        raise UsageError(f"there is no guidance mode {mode!r}; use one of {', '.join(MODES)}")
    if scale is not None and not 1 <= scale < float("inf"):
        raise UsageError(f"guidance must be 1 (none) or more, got {scale:g}")
    if mode == "none" and scale not in (None, 1):
        raise UsageError(f"guidance {scale:g} does not go with mode 'none'; leave one of the two out")
    if mode == "none" or scale == 1 or (mode is None and scale is None and own["mode"] == "none"):
        return Guidance()
    chosen = float(own["scale"]) if scale is None else scale
    if chosen == 1:
        raise UsageError(f"guidance mode {mode!r} needs a scale above 1; give --guidance")
    return Guidance(mode or (own["mode"] if own["mode"] != "none" else "full"), chosen)


class _Opened:
    """A size that is open or being opened, and what its runner was last given."""

    def __init__(self, runner: Future[Runner]) -> None:
        self.runner = runner
        self._noise: Array | None = None
        self._inputs: dict[str, Array] | None = None

    def feed(self, noise: Array, inputs: dict[str, Array]) -> Runner:
        """The runner, told ``noise`` [K, C, h, w] and ``inputs`` where they are not those it has."""
        runner = self.runner.result()
        if noise is not self._noise:
            runner.set(**{f"noise_{i}": noise[i : i + 1] for i in range(len(noise))})
            self._noise = noise
        if inputs is not self._inputs:
            runner.set(**inputs)
            self._inputs = inputs
        return runner


class Stylizer:
    """A bundle, opened on a backend, with a style. One thread at a time."""

    def __init__(
        self,
        bundle: Bundle,
        open_graph: Opener,
        *,
        open_runner: RunnerOpener | None = None,
        open_text: Opener | None = None,
        size: int | Size | None = None,
        steps: int | None = None,
        backend: str = "",
        reason: str = "",
        guidance: float | None = None,
        guidance_mode: str | None = None,
    ) -> None:
        """Most callers want `load`. ``open_graph`` opens one graph at static shapes.

        ``open_runner`` opens the program of a frame; without it, its graphs are opened by ``open_graph``
        and run from here. ``open_text`` opens text encoders, where another precision is due.
        ``size`` is the working size: a side in pixels for about that area, or (H, W).
        ``guidance`` (diffusers' scale; 1 is none) and ``guidance_mode`` override the bundle's. Raises
        BundleError where the bundle needs something that this version does not do, has no schedule for
        ``steps``, or no negative for guidance; UsageError where scale and mode do not fit together.
        """
        self.bundle, self.backend, self.reason = bundle, backend, reason
        self.guidance = choose_guidance(bundle, guidance, guidance_mode)
        self.size: int | Size = bundle.size_default if size is None else size
        self.coefficients = bundle.coefficients(steps)
        self._open_graph, self._open_runner = open_graph, open_runner
        self._open_text = open_text or open_graph
        self._text = bundle.conditioning()
        _check_negative(bundle, self._text, self.guidance)
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="std-rt-open")
        self._style_engine: Future[Engine] | None = None
        self._encoder: StyleEncoder | None = None
        self._prompts: TextEncoder | None = None
        self._opened: OrderedDict[Size, _Opened] = OrderedDict()
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
        guidance: float | None = None,
        guidance_mode: str | None = None,
        meanwhile: Callable[[str], None] | None = None,
    ) -> Stylizer:
        """Open a bundle by name or folder (None: the built-in model) on a backend.

        With ``meanwhile``, frames run on a CPU backend until the engines of a GPU backend are built, and
        ``meanwhile`` is told when that changes. Raises BundleError (unknown, damaged, wrong step count) or
        BackendError (not installed), and UsageError where ``guidance`` and ``guidance_mode`` do not fit
        together.
        """
        opened = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        name, reason = choose_backend(backend)
        first = name if meanwhile is None or name not in GPU_BACKENDS else choose_backend("cpu")[0]

        def open_graph(spec: GraphSpec) -> Engine:
            return open_engine(first, spec, precision)

        def open_on(backend: str, program: Program, specs: dict[str, GraphSpec]) -> Runner:
            return open_runner(backend, program, specs, precision, open_graph)

        def open_both(program: Program, specs: dict[str, GraphSpec]) -> Runner:
            if meanwhile is None or first == name:
                return open_on(name, program, specs)
            # Asked for first: the building takes minutes, the slow runner is opened beside it.
            coming = in_background(lambda: open_on(name, program, specs))
            return SwitchingRunner(open_on(first, program, specs), coming, meanwhile, (first, name))

        return cls(
            opened,
            open_graph,
            open_runner=open_both,
            open_text=lambda spec: open_engine(first, spec, "fp32"),  # once a prompt: exact costs nothing
            size=size,
            steps=steps,
            backend=name,
            reason=reason,
            guidance=guidance,
            guidance_mode=guidance_mode,
        )

    @property
    def steps(self) -> int:
        """Denoising steps a frame."""
        return len(self.coefficients)

    @property
    def precision(self) -> str:
        """What the UNet computes in, once engines are open: fp32 or bf16."""
        for opened in self._opened.values():
            return opened.runner.result().precision
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

    def set_prompt(self, prompt: str, negative: str | None = None) -> None:
        """Say in words what the picture is to be, where the bundle has its text encoders.

        ``negative`` None is what the model takes for no negative prompt; it counts with guidance only.
        Raises UsageError where the bundle's prompt is baked in.
        """
        if self._prompts is None:
            self._prompts = TextEncoder(self.bundle, self._open_text)
        found = dict(self._prompts.encode(prompt, negative))
        self._prompts.release()
        longer = found["encoder_hidden_states"].shape != self._text["encoder_hidden_states"].shape
        self._text = {**self._text, **found}
        self._inputs.clear()
        while longer and self._opened:  # engines are made for one length of text
            self._close_oldest()

    def state(self, height_px: int, width_px: int, *, seed: int = 0) -> State:
        """The state a stream of frames of the given size starts from."""
        return self._state(self.working_size(height_px, width_px), seed)

    def step(self, frame: Frame, state: State | None = None, *, mark: Mark = no_mark) -> tuple[Frame, State]:
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
        runner = self._open_size(size).feed(state.noise, self._inputs_for(size))
        styled = runner.run(working[None], mark)[0]
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
        while self._opened:
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
        shape = (
            noise_draws(self.coefficients),
            self.bundle.latent_channels,
            size[0] // scale,
            size[1] // scale,
        )
        return State(seed, 0, draw_noise(seed, shape))

    def _state_for(self, state: State | None, size: Size) -> State:
        """``state`` itself, or one with the same seed where the size of the stream has changed."""
        if state is None:
            return self._state(size, 0)
        scale = self.bundle.vae_scale
        if state.noise.shape[2:] == (size[0] // scale, size[1] // scale):
            return state
        return replace(self._state(size, state.seed), index=state.index)

    def _inputs_for(self, size: Size) -> dict[str, Array]:
        if self._style is None:
            raise UsageError("no style is set; call set_style(picture) first")
        if size not in self._inputs:
            positive = unet_inputs(self._text, *self._style, size)
            self._inputs[size] = guided_inputs(self.guidance.mode, self._text, positive)
        return self._inputs[size]

    def _style_encoder(self) -> StyleEncoder:
        if self._encoder is None:
            self._encoder = StyleEncoder(self._open_style_encoder().result(), self.bundle.style_px)
        return self._encoder

    def _open_style_encoder(self) -> Future[Engine]:
        if self._style_engine is None:
            spec = self._spec("style_encoder", {"style_image": (1, 3, *[self.bundle.style_px] * 2)})
            self._style_engine = self._pool.submit(self._open_graph, spec)
        return self._style_engine

    def _open_size(self, size: Size) -> _Opened:
        """A size's runner, opening in the background where it is not; the least used size is closed."""
        if size in self._opened:
            self._opened.move_to_end(size)
            return self._opened[size]
        while len(self._opened) >= _SIZES_KEPT:
            self._close_oldest()
        program = self._program(size)
        specs = {name: self._spec(name, shapes) for name, shapes in graph_shapes(program).items()}
        self._opened[size] = _Opened(self._pool.submit(self._run_opener, program, specs))
        return self._opened[size]

    def _run_opener(self, program: Program, specs: dict[str, GraphSpec]) -> Runner:
        if self._open_runner is None:
            return open_on_host(program, specs, self._open_graph)
        return self._open_runner(program, specs)

    def _program(self, size: Size) -> Program:
        bundle, style = self.bundle, self.bundle.style
        text = {name: self._text[name].shape[1:] for name in ("encoder_hidden_states", "text_embeds")}
        shapes = {"time_ids": (6,), "style_tokens": (int(style["tokens"]), int(style["dim"]))}
        numbers = FrameNumbers(
            bundle.vae_scale, bundle.latent_channels, {**text, **shapes, "style_strength": ()}
        )
        return frame_program(numbers, self.coefficients, bundle.prediction_type, size, self.guidance)

    def _spec(self, name: str, shapes: dict[str, tuple[int, ...]]) -> GraphSpec:
        compute = self.bundle.manifest.get("precision", {}).get(name, {}).get("compute", "fp32")
        return GraphSpec(name, self.bundle.graph_path(name), shapes, self.bundle.digest, compute=compute)

    def _close_oldest(self) -> None:
        _, opened = self._opened.popitem(last=False)
        _close(opened.runner)


def in_background(work: Callable[[], Runner]) -> Future[Runner]:
    """``work`` in a thread of its own that no exit waits for: a build cannot be stopped half-way."""
    future: Future[Runner] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (whoever asks the future gets it)
            future.set_exception(error)

    Thread(target=run, name="std-rt-build", daemon=True).start()
    return future


def _close(future: Future[Engine] | Future[Runner]) -> None:
    if not future.cancel() and future.exception() is None:
        future.result().close()


def _check_negative(bundle: Bundle, text: dict[str, Array], guidance: Guidance) -> None:
    missing = [name for name in NEGATIVE if f"negative_{name}" not in text]
    if guidance.mode != "none" and missing:
        raise BundleError(
            f"bundle '{bundle.name}' has no negative for guidance {guidance.scale:g}; "
            f"use --guidance 1, or export it again with --guidance {guidance.scale:g}"
        )


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
