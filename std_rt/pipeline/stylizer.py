"""The stylizer: a frame in, the frame in another style out.

    stylizer = Stylizer.load()
    stylizer.set_style(picture)
    frame, state = stylizer.step(frame, state)

Encode the picture, add the noise of ``tau``, denoise along the trajectory that the bundle was made for,
decode. `State` is a value: the noise is drawn once per (seed, size), so a stream keeps its noise from frame
to frame, and the same seed gives the same noise on every backend.

`step` is `fit`, `run` and `unfit`. For more frames a second, `run_many` takes several in one call of each
graph, and `stream_batch` overlaps the steps of consecutive frames; both give what `run` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import UsageError
from std_rt.core.schedule import StepCoefficients
from std_rt.engines import Engine
from std_rt.engines.program import Mark, no_mark
from std_rt.engines.registry import GPU_BACKENDS
from std_rt.media import fit
from std_rt.pipeline.conditioning import Conditioning, EncodedStyle, StyleEncoder, blend, told, unet_inputs
from std_rt.pipeline.denoise import noise_draws
from std_rt.pipeline.guidance import check_negative, choose_guidance
from std_rt.pipeline.opening import Opener, RunnerOpener, graph_spec, layout_program, on_host, openers
from std_rt.pipeline.runner_cache import CachedRunner, Quality, RunnerCache, RunnerKey, close_when_open
from std_rt.pipeline.state import State, draw_noise
from std_rt.pipeline.stream_batch import StreamBatch
from std_rt.pipeline.text_encoder import TextEncoder

__all__ = ["Quality", "State", "StreamBatch", "Stylizer", "choose_guidance", "draw_noise"]

Frame = NDArray[np.uint8]
Array = NDArray[np.float32]
Size = tuple[int, int]  # (H, W) in pixels
Picture = Frame | Path | str

_FRAMES_A_CALL = 4
_SIZES_TOLD = 8  # sizes for which it is remembered what the UNet is told


class Stylizer:
    """A bundle, opened on a backend, with a style.

    One thread at a time, but for `encode_style`, `ready` and what computes sizes: these may run in another.
    """

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
        self._asked = bundle.default_steps if steps is None else steps
        self._open_graph = open_graph
        self._open_runner = open_runner or on_host(open_graph)
        self._open_text = open_text or open_graph
        self._text = bundle.conditioning()
        check_negative(bundle, self._text, self.guidance)
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="std-rt-open")
        self._closed = False
        self._style_lock = Lock()
        self._style_engine: Future[Engine] | None = None
        self._encoder: StyleEncoder | None = None
        self._prompts: TextEncoder | None = None
        self._shelf = RunnerCache(self._open_layout)
        self._style: tuple[EncodedStyle, float] | None = None
        self._told: dict[Size, Conditioning] = {}

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
        ways = openers(backend, precision, meanwhile)
        return cls(
            opened,
            ways.graph,
            open_runner=ways.runner,
            open_text=ways.text,
            size=size,
            steps=steps,
            backend=ways.backend,
            reason=ways.reason,
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
        for opened in self._shelf.values():
            return opened.runner().precision
        return "unknown"

    def working_size(self, height_px: int, width_px: int) -> Size:
        """(H, W) at which a frame of the given size is processed."""
        return self.level(height_px, width_px).size

    def level(
        self, height_px: int, width_px: int, *, size: int | Size | None = None, steps: int | None = None
    ) -> Quality:
        """The level of frames of the given size at another working ``size`` (as `load` has it) or ``steps``.

        Raises BundleError where the bundle has no schedule for the steps.
        """
        low, high = self.bundle.size_range
        asked = self.size if size is None else size
        at = fit.working_size(height_px, width_px, asked, self.bundle.size_multiple, low, high)
        asked_steps = self._asked if steps is None else steps
        self.bundle.coefficients(asked_steps)
        return Quality(at, asked_steps)

    def prepare(self, height_px: int, width_px: int) -> None:
        """Begin to open, in the background, what a frame of the given size and a style will need."""
        self._open_style_encoder()
        self._get(RunnerKey(self.level(height_px, width_px)))

    def prepare_levels(
        self, levels: Collection[Quality], *, frames: int = 1, stream_batch: bool = False
    ) -> None:
        """Begin to open these levels in the background, and keep them open until others are asked for here.

        ``frames`` a call (`run_many`), or ``stream_batch``: as they will be used. Levels of one size share
        their engines on a CPU, so that another number of steps costs next to nothing. Raises UsageError where
        they are more than `levels.KEPT`.
        """
        self._check_open()
        self._shelf.keep([RunnerKey(level, frames, stream_batch) for level in levels])

    def ready(self, level: Quality, *, frames: int = 1, stream_batch: bool = False) -> bool:
        """True where a frame at ``level`` would not wait for its engines.

        What opening them raised is raised, once; the next use tries again.
        """
        return self._shelf.ready(RunnerKey(level, frames, stream_batch))

    def frames_per_call(self, size: Size) -> int:
        """How many frames `run_many` does in a call at a working size (H, W) where nobody says.

        Small pictures leave a processor's cores waiting: four of 256 px are the fastest there. What was not
        measured (GPUs) or needs the memory more (large pictures) goes one by one.
        """
        if self.backend in GPU_BACKENDS:
            return 1
        return max(1, min(_FRAMES_A_CALL, _FRAMES_A_CALL * 256 * 256 // (size[0] * size[1])))

    def set_style(self, style: Picture | Sequence[tuple[Picture, float]], strength: float = 1.0) -> None:
        """Set the style: one picture, or (picture, weight) pairs that blend.

        A picture is a frame uint8 [H, W, 3] or the path of a file. ``strength`` scales the style's
        effect; 0 is none, 1 as trained. Raises UsageError on a weight or strength out of range,
        MediaError on an unreadable file.
        """
        self._check_strength(strength)
        pairs = [(style, 1.0)] if isinstance(style, np.ndarray | Path | str) else list(style)
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            raise UsageError('several styles are a list of pairs, as [("a.png", 0.7), ("b.png", 0.3)]')
        self.use_style(blend([(self.encode_style(one), float(weight)) for one, weight in pairs]), strength)

    def encode_style(self, picture: Picture) -> EncodedStyle:
        """A style as a value for `use_style`: the same object for the same picture, as long as remembered.

        May run in another thread than frames do: the encoder has an engine of its own. Raises MediaError on
        an unreadable file.
        """
        frame = _frame(picture)
        engine = self._open_style_encoder().result()
        with self._style_lock:
            if self._encoder is None:
                self._encoder = StyleEncoder(engine, self.bundle.style_px)
            return self._encoder(frame)

    def use_style(self, style: EncodedStyle, strength: float = 1.0) -> None:
        """Set the style to one that is encoded (or blended): no engine runs.

        Costs nothing where both are those in use. Raises UsageError on a strength out of range, or a style of
        another bundle's shape.
        """
        if self._style is not None and self._style[0] is style and self._style[1] == strength:
            return
        self._check_strength(strength)
        made_for = (1, int(self.bundle.style["tokens"]), int(self.bundle.style["dim"]))
        if style.tokens.shape != made_for:
            raise UsageError(
                f"a style of bundle '{self.bundle.name}' has tokens {list(made_for)}, got "
                f"{list(style.tokens.shape)}; encode its picture with this bundle"
            )
        self._style = (style, strength)
        self._told.clear()

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
        self._told.clear()
        if longer:  # engines are made for one length of text
            self._shelf.clear()

    def state(self, height_px: int, width_px: int, *, seed: int = 0) -> State:
        """The state a stream of frames of the given size starts from."""
        return self.state_for(self.working_size(height_px, width_px), seed=seed)

    def state_for(self, at: Quality | Size, *, seed: int = 0) -> State:
        """The state a stream starts from at a level, or at a working size (H, W) and the usual steps.

        A seed has the same noise for one size whatever the steps, as far as they need any.
        """
        size, coefficients = (at, self.coefficients) if isinstance(at, tuple) else self._steps_of(at)
        shape = (noise_draws(coefficients), self.bundle.latent_channels, *self._latent_size(size))
        return State(seed, 0, draw_noise(seed, shape))

    def step(self, frame: Frame, state: State | None = None, *, mark: Mark = no_mark) -> tuple[Frame, State]:
        """Stylize one frame uint8 [H, W, 3] of a stream; give the state returned to the next call.

        A frame that does not have the working size is fitted to it, and comes back at that resolution in
        its own aspect, never larger than it was. ``mark`` is called with a stage's name when it ends.
        """
        working = self.fit(frame)
        shape, size = frame.shape[:2], working.shape[:2]
        state = self._state_for(state, (size[0], size[1]))
        mark("convert")
        styled = self.run(working, state, mark)
        result = self.unfit(styled, (shape[0], shape[1]))
        if result is not styled:
            mark("convert")
        return result, replace(state, index=state.index + 1)

    def fit(self, frame: Frame, level: Quality | None = None) -> Frame:
        """A frame uint8 [H, W, 3] at its working size, or at that of ``level``: what `run` takes.

        The frame itself where it has that size already.
        """
        frame = _checked(frame)
        shape = (frame.shape[0], frame.shape[1])
        size = self.working_size(*shape) if level is None else level.size
        return frame if shape == size else fit.resize(frame, size)

    def unfit(self, styled: Frame, shape: tuple[int, int]) -> Frame:
        """A result of `run` in the aspect of the frame that it was made of, ``shape`` (h, w) px.

        At the resolution of the working size, never larger than that frame; ``styled`` itself where it has
        that size.
        """
        size = (styled.shape[0], styled.shape[1])
        result = fit.result_size((shape[0], shape[1]), size)
        return styled if result == size else fit.resize(styled, result)

    def run(
        self, working: Frame, state: State, mark: Mark = no_mark, *, level: Quality | None = None
    ) -> Frame:
        """Stylize one frame of a working size, as `fit` gives it, with the noise of ``state``.

        With ``level`` (of that size) in its number of steps. Raises UsageError where frame, state and level
        are not of one size.
        """
        return self.run_many([working], [state], mark, level=level, frames=1)[0]

    def run_many(
        self,
        working: Sequence[Frame],
        states: Sequence[State],
        mark: Mark = no_mark,
        *,
        level: Quality | None = None,
        frames: int | None = None,
    ) -> list[Frame]:
        """Stylize frames of one working size, ``frames`` in a call of each graph: what `run` gives for each.

        ``frames`` is `frames_per_call` where it is not given. A last group that is shorter is filled up with
        its last frame, so there is one set of engines. All are painted in the style that is set now.
        """
        if len(working) != len(states):
            raise UsageError(f"every frame needs a state: got {len(working)} frames, {len(states)} states")
        if not working:
            return []
        size = (_checked(working[0]).shape[0], working[0].shape[1])
        count = self.frames_per_call(size) if frames is None else frames
        if count < 1:
            raise UsageError(f"a call takes at least one frame, got {count}")
        opened = self._get(RunnerKey(level or Quality(size, self._asked), count))
        for frame, state in zip(working, states, strict=True):
            self._check_fits(frame, state, opened)
        styled: list[Frame] = []
        for begin in range(0, len(working), count):
            group = [min(begin + i, len(working) - 1) for i in range(count)]
            together = np.stack([working[i] for i in group]) if count > 1 else working[begin][None]
            noise = [states[i].noise for i in group]
            styled.extend(opened.run(together, [self._told_at(size)] * count, noise, mark))
        return styled[: len(working)]

    def stream_batch(self, at: Quality | Size) -> StreamBatch:
        """Frames of a working size (H, W), or of a level, with their steps overlapping; see `StreamBatch`."""
        level = Quality(at, self._asked) if isinstance(at, tuple) else at
        layout = RunnerKey(level, stream=True)
        self._get(layout)  # opens while the first frame is on its way
        return StreamBatch(
            len(self.bundle.coefficients(level.steps)),
            lambda: self._get(layout),
            lambda: self._told_at(level.size),
            self._check_fits,
        )

    def stylize(self, frame: Frame, seed: int = 0) -> Frame:
        """Stylize one frame on its own: `step` without a stream."""
        frame = _checked(frame)
        return self.step(frame, self.state(*frame.shape[:2], seed=seed))[0]

    def close(self) -> None:
        """Close every engine; the stylizer must not be used afterwards."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._shelf.clear()
        if self._style_engine is not None:
            close_when_open(self._style_engine)
            self._style_engine = self._encoder = None

    def __enter__(self) -> Stylizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _state_for(self, state: State | None, size: Size) -> State:
        """``state`` itself, or one with the same seed where the stream has changed its size (or steps)."""
        if state is None:
            return self.state_for(size)
        enough = len(state.noise) >= noise_draws(self.coefficients)
        if enough and state.noise.shape[2:] == self._latent_size(size):
            return state
        return replace(self.state_for(size, seed=state.seed), index=state.index)

    def _latent_size(self, size: Size) -> Size:
        return size[0] // self.bundle.vae_scale, size[1] // self.bundle.vae_scale

    def _steps_of(self, level: Quality) -> tuple[Size, list[StepCoefficients]]:
        return level.size, self.bundle.coefficients(level.steps)

    def _told_at(self, size: Size) -> Conditioning:
        """What the UNet is told at a size; the same object until style or prompt change."""
        if self._style is None:
            raise UsageError("no style is set; call set_style(picture) first")
        if size not in self._told:
            if len(self._told) >= _SIZES_TOLD:
                del self._told[next(iter(self._told))]
            positive = unet_inputs(self._text, *self._style, size)
            self._told[size] = told(self.guidance.mode, self._text, positive)
        return self._told[size]

    def _check_strength(self, strength: float) -> None:
        low, high = self.bundle.style.get("strength_range", (0, 2))
        if not low <= strength <= high:
            raise UsageError(f"style strength must be in {low:g}..{high:g}, got {strength:g}")

    def _check_fits(self, working: Frame, state: State, opened: CachedRunner) -> None:
        """Raise UsageError unless frame and state are of the size and the draws of a runner."""
        size = opened.layout.level.size
        shape = (opened.draws, self.bundle.latent_channels, *self._latent_size(size))
        if _checked(working).shape[:2] != size:
            raise UsageError(
                f"the frame is {working.shape[0]} x {working.shape[1]} px, {size[0]} x {size[1]} are due; "
                "use fit(frame) first"
            )
        if state.noise.shape[1:] != shape[1:] or len(state.noise) < shape[0]:
            raise UsageError(
                f"the state has noise {list(state.noise.shape)} where {list(shape)} is due; "
                "use state_for(...) of this size and these steps"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the stylizer was closed; load it again with Stylizer.load()")

    def _open_style_encoder(self) -> Future[Engine]:
        """The style encoder, opening in the background; opened again where that failed."""
        self._check_open()
        with self._style_lock:
            if self._style_engine is None or _has_failed(self._style_engine):
                shapes = {"style_image": (1, 3, *[self.bundle.style_px] * 2)}
                spec = graph_spec(self.bundle, "style_encoder", shapes)
                self._style_engine = self._pool.submit(self._open_graph, spec)
            return self._style_engine

    def _get(self, layout: RunnerKey) -> CachedRunner:
        self._check_open()
        return self._shelf.get(layout)

    def _open_layout(self, layout: RunnerKey) -> CachedRunner:
        """Begin to open a runner in the background."""
        text = {name: value.shape[1:] for name, value in self._text.items()}
        program, specs = layout_program(self.bundle, layout, self.guidance, text)
        runner = self._pool.submit(self._open_runner, program, specs)
        coefficients = self.bundle.coefficients(layout.level.steps)
        return CachedRunner(layout, coefficients, self.guidance.mode, runner)


def _has_failed(future: Future[Engine]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


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
