"""The stylizer: a frame in, the frame in another style out.

    stylizer = Stylizer.load()
    stylizer.set_style(picture)
    frame, state = stylizer.step(frame, state)

Each frame goes through `denoise.img2img`, which runs here as a compiled program on a backend. `State` is a
value: noise is drawn once per (seed, size), so a stream keeps its noise from frame to frame, and a seed draws
the same noise on every backend. `step` is `fit`, `run` and `unfit`, then `chroma.keep_colours` if wanted. For
streams there is `std_rt.streaming.frame_stream`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from types import TracebackType

import numpy as np

from std_rt.core.arrays import Array, Frame, Size
from std_rt.core.bundle import CONTENT, INPAINTING, Bundle, load_bundle
from std_rt.core.errors import UsageError
from std_rt.core.turns import Turns
from std_rt.engines import Engine
from std_rt.engines.gpu.driver import choose_gpu
from std_rt.engines.hot_swap import close_when_open, has_failed
from std_rt.engines.program import Mark, no_mark
from std_rt.engines.registry import GPU_BACKENDS, choose_form
from std_rt.media import chroma, fit
from std_rt.media.fit import check_frame
from std_rt.pipeline.conditioning import (
    Conditioning,
    EncodedStyle,
    StyleEncoder,
    StyleSquares,
    blend,
    check_negative,
    check_stroke_size,
    choose_guidance,
    conditioning_for,
    unet_inputs,
)
from std_rt.pipeline.denoise import noise_draws
from std_rt.pipeline.mask import Mask, unless_whole
from std_rt.pipeline.openers import (
    GraphOpener,
    Openers,
    graph_spec,
    openers,
    program_for,
    window_specs,
)
from std_rt.pipeline.runner_cache import (
    RECENT,
    CachedRunner,
    Quality,
    RunnerCache,
    RunnerKey,
    Submitted,
)
from std_rt.pipeline.text_encoder import TextEncoder
from std_rt.pipeline.windows import WindowGraphs, WindowStream

__all__ = ["Quality", "State", "Stylizer", "draw_noise"]

Picture = Frame | Path | str

_FRAMES_PER_CALL = 4
_LARGE_BYTES = 2**30
# Sizes of a small bundle that stay open: a folder's 4:3 and 3:2 in both directions, 150 MB each for std-tiny.
_SMALL_BYTES, _SMALL_RECENT = 2**28, 4
_WINDOW_SIZES = 2  # sizes whose graphs for windows stay open: portrait and landscape in turn
_CACHED_SIZES = 8  # sizes whose conditioning is remembered


@dataclass(frozen=True, eq=False)
class State:
    """What a stream carries from frame to frame.

    ``noise`` [K, C, h, w]: the start noise, then one for every stochastic step; extra ones are
    ignored. ``index``: frames done.
    """

    seed: int
    index: int
    noise: Array


def draw_noise(seed: int, shape: tuple[int, ...]) -> Array:
    """Unit normal noise float32, the same for a seed on every machine and backend.

    The first rows of a longer draw are those of a shorter one.
    """
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class Stylizer:
    """A bundle, opened on a backend, with a style.

    Threads take turns, in the order in which they asked: a frame of one waits for that of another;
    `encode_style` has its own engine and its own turn, and `ready` never waits. ``lock`` makes several calls
    one turn, such as `use_style` and the frames meant for that style.
    """

    def __init__(
        self,
        bundle: Bundle,
        openers: Openers | GraphOpener,
        *,
        size: int | Size | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_mode: str | None = None,
        vae: str = "full",
    ) -> None:
        """Use `load` unless in a test. A bare function opens one graph at static shapes; programs then run
        on the host.

        ``size`` is the working size: a side in pixels for about that area, or (H, W). ``guidance``
        (diffusers' scale; 1 is none) and ``guidance_mode`` override the bundle's. ``vae`` is one of
        `core.bundle.VAES`; tiny is faster and loses detail. Raises BundleError if it is not there,
        the bundle needs a newer std-rt, has no schedule for ``steps``, or no negative prompt for guidance;
        UsageError if it does not support ``size``, or scale and mode do not fit together.
        """
        self._openers = openers if isinstance(openers, Openers) else Openers.on_host(openers)
        self.bundle, self.backend, self.reason = bundle, self._openers.backend, self._openers.reason
        self.guidance = choose_guidance(bundle, guidance, guidance_mode)
        self.vae = vae
        bundle.vae_graph("vae_decoder", vae)  # raises if it is not there
        bundle.check_size(size)
        self.size: int | Size = bundle.size_default if size is None else size
        self.coefficients = bundle.coefficients(steps)
        self._asked_steps = bundle.default_steps if steps is None else steps
        self._text = bundle.conditioning()
        check_negative(bundle, self._text, self.guidance)
        if bundle.window is not None and self.guidance.mode == "residual":
            raise UsageError(
                f"bundle '{bundle.name}' is video-to-video, which has no residual guidance; "
                "use --guidance-mode full or none"
            )
        self.keep_colours = False
        """Whether results get the colours of their frames (`media.chroma`); any thread may set it."""
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="std-rt-open")
        self._closed = False
        self.lock = Turns()
        self._style_lock = Lock()
        self._style_engine: Future[Engine] | None = None
        self._encoder: StyleEncoder | None = None
        self._prompts: TextEncoder | None = None
        recent = _SMALL_RECENT if bundle.total_bytes < _SMALL_BYTES else RECENT
        self._cache = RunnerCache(self._open_runner, recent)
        self._style: tuple[EncodedStyle, float] | None = None
        self._conditioning: dict[Size, Conditioning] = {}
        self._window_graphs: dict[tuple[Size, int], WindowGraphs] = {}  # by size and text tokens
        self._everywhere = Mask(np.full((1, 1), 255, np.uint8))

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle | None = None,
        *,
        backend: str = "auto",
        device: str | None = None,
        size: int | Size | None = None,
        steps: int | None = None,
        precision: str = "auto",
        guidance: float | None = None,
        guidance_mode: str | None = None,
        vae: str = "full",
        meanwhile: Callable[[str], None] | None = None,
    ) -> Stylizer:
        """Open a bundle by name or folder (None: the built-in model) on a backend.

        With ``meanwhile``, frames run on a CPU backend until the engines of a GPU backend are built;
        ``meanwhile`` is called with a message when that changes. ``device`` is the GPU, as ``cuda:1``; a
        process has one (`engines.gpu.driver.choose_gpu`). ``precision`` is auto (see
        `engines.registry.choose_form`), fp32, bf16, int8 or fp8. Raises BundleError (unknown, damaged, wrong
        step count, no such form) or BackendError (not installed, wrong precision), and UsageError if it does
        not support ``size``, ``guidance`` and ``guidance_mode`` do not fit together, or for a ``device`` that
        is not there.
        """
        if device is not None:
            choose_gpu(device)
        opened = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        opened.check_precision(precision)
        if meanwhile is not None:
            opened.check_single_frames("--build-in-background")
        chosen = openers(backend, precision, meanwhile)
        choose_form(chosen.backend, precision, opened.forms)  # raises if the backend cannot run it
        return cls(
            opened,
            chosen,
            size=size,
            steps=steps,
            guidance=guidance,
            guidance_mode=guidance_mode,
            vae=vae,
        )

    @property
    def steps(self) -> int:
        """Denoising steps per frame."""
        return len(self.coefficients)

    @property
    def precision(self) -> str:
        """The precision of the UNet, once engines are open: fp32, bf16, fp16, int8 or fp8."""
        for runner in self._cache.values():
            return runner.wait().precision
        for graphs in self._window_graphs.values():
            return graphs.precision
        return "unknown"

    @property
    def precision_reason(self) -> str:
        """`precision`, and why: ``int8: this processor has VNNI and no bf16 units``."""
        why = choose_form(self.backend, self._openers.precision, self.bundle.forms)[1]
        return f"{self.precision}: {why}"

    def working_size(self, height_px: int, width_px: int) -> Size:
        """(H, W) at which a frame of the given size is processed."""
        return self.quality(height_px, width_px).size

    def quality(
        self, height_px: int, width_px: int, *, size: int | Size | None = None, steps: int | None = None
    ) -> Quality:
        """The quality of frames of the given size, at another working ``size`` (as in `load`) or ``steps``.

        Raises BundleError if the bundle has no schedule for the steps.
        """
        low, high = self.bundle.size_range
        asked = self.size if size is None else size
        working = fit.working_size(height_px, width_px, asked, self.bundle.size_multiple, low, high)
        asked_steps = self._asked_steps if steps is None else steps
        self.bundle.coefficients(asked_steps)
        return Quality(working, asked_steps)

    def quality_at(self, at: Quality | Size) -> Quality:
        """A quality itself, or that of a working size (H, W) and the stylizer's steps."""
        return Quality(at, self._asked_steps) if isinstance(at, tuple) else at

    def prepare(self, height_px: int, width_px: int, *, masked: bool = False) -> None:
        """Start to open, in the background, the engines for frames of this size and for styles."""
        self._open_style_encoder()
        if self.bundle.window is not None:
            self.window_stream(self.quality(height_px, width_px))
            return
        self.runner(RunnerKey(self.quality(height_px, width_px), masked=masked and self._blends))

    def prepare_qualities(
        self, qualities: Collection[Quality], *, frames: int = 1, stream_batch: bool = False
    ) -> None:
        """Start to open these in the background, and keep them open until the next call.

        ``frames`` per call (`run_many`), or ``stream_batch``: as they will be used. On a CPU, qualities of
        one size share their engines, so another number of steps costs next to nothing. Raises UsageError for
        more than `runner_cache.MAX_KEPT`.
        """
        with self.lock:
            self._check_open()
            if self.bundle.window is not None:
                for quality in qualities:
                    self._graphs_of_windows(quality.size)
                return
            self._cache.keep([RunnerKey(quality, frames, stream_batch) for quality in qualities])

    def ready(self, quality: Quality, *, frames: int = 1, stream_batch: bool = False) -> bool:
        """True if a frame at ``quality`` would not wait for its engines.

        Raises, once, the error of opening them; the next use tries again.
        """
        if self.bundle.window is not None:
            graphs = self._window_graphs.get(self._window_key(quality.size))
            return graphs is not None and graphs.ready
        return self._cache.ready(RunnerKey(quality, frames, stream_batch))

    def when_open(self, quality: Quality, call: Callable[[], None]) -> None:
        """Have ``call`` called, in any thread, once the engines of a quality are open or have failed to open.

        At once if they are, or if nobody has asked for them.
        """
        self._cache.when_done(RunnerKey(quality), call)

    def frames_per_call(self, size: Size) -> int:
        """How many frames `run_many` puts into one call at a working size (H, W) by default.

        Small pictures leave a processor's cores waiting: four of 256 px are the fastest. A GPU has more of
        them: two of 512 px, which is not measured yet; but a large model would need another engine of
        gigabytes for it, built in minutes. Large pictures need the memory: one by one.
        """
        on_gpu = self.backend in GPU_BACKENDS
        if on_gpu and self.bundle.total_bytes > _LARGE_BYTES:
            return 1
        room = 2 * 512 * 512 if on_gpu else _FRAMES_PER_CALL * 256 * 256
        return max(1, min(_FRAMES_PER_CALL, room // (size[0] * size[1])))

    def set_style(
        self,
        style: Picture | Sequence[tuple[Picture, float]],
        strength: float = 1.0,
        *,
        stroke_size: float = 1.0,
        keep_colours: bool = False,
    ) -> None:
        """Set the style: one picture, or (picture, weight) pairs that blend.

        A picture is a frame uint8 [H, W, 3] or the path of a file. ``strength`` scales the style's
        effect: 1 is as trained, at 0 the model paints in no style. ``stroke_size`` (0.5..2) scales its
        strokes; 1 is as in the picture. ``keep_colours`` gives results the colours of their frames. Raises
        UsageError on a weight, strength or stroke size out of range, MediaError on an unreadable file.
        """
        self.bundle.check_strength(strength)
        pairs = [(style, 1.0)] if isinstance(style, np.ndarray | Path | str) else style
        if not isinstance(pairs, Sequence) or not all(
            isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs
        ):
            raise UsageError(
                "a style is a picture or its path, and several must be a list of pairs, as "
                '[("a.png", 0.7), ("b.png", 0.3)]'
            )
        encoded = [(self.encode_style(one, stroke_size), float(weight)) for one, weight in pairs]
        self.use_style(blend(encoded), strength, keep_colours=keep_colours)

    def encode_style(self, picture: Picture | StyleSquares, stroke_size: float = 1.0) -> EncodedStyle:
        """A style as a value for `use_style`: the same object for the same picture, as long as it is cached.

        ``stroke_size`` (0.5..2): see `conditioning.style_views`. May run in another thread than frames do:
        the encoder has its own engine. Raises MediaError for a file that cannot be read, UsageError for a
        stroke size out of range.
        """
        check_stroke_size(stroke_size)
        frame = picture if isinstance(picture, StyleSquares) else _frame(picture)
        try:
            engine = self._open_style_encoder().result()
        except CancelledError:  # closed meanwhile
            self._check_open()
            raise
        with self._style_lock:
            self._check_open()
            if self._encoder is None:
                self._encoder = StyleEncoder(engine, self.bundle.style_px)
            return self._encoder(frame, stroke_size)

    def use_style(
        self, style: EncodedStyle, strength: float = 1.0, *, keep_colours: bool | None = None
    ) -> None:
        """Set the style to one that is encoded (or blended) already: no engine runs.

        Costs nothing if style and strength are already in use. ``keep_colours`` None leaves it as it is.
        Raises UsageError for a strength out of range, or a style in the shape of another bundle.
        """
        if keep_colours is not None:
            self.keep_colours = keep_colours
        now = self._style
        if now is not None and now[0] is style and now[1] == strength:
            return
        self.bundle.check_strength(strength)
        made_for = (1, int(self.bundle.style["tokens"]), int(self.bundle.style["dim"]))
        if style.tokens.shape != made_for:
            raise UsageError(
                f"a style of bundle '{self.bundle.name}' has tokens {list(made_for)}, got "
                f"{list(style.tokens.shape)}; encode its picture with this bundle"
            )
        with self.lock:
            self._style = (style, strength)
            self._conditioning.clear()

    def set_prompt(self, prompt: str, negative: str | None = None) -> None:
        """Set the prompt, for a bundle that has text encoders.

        ``negative`` None is the model's empty negative prompt; it matters with guidance only. Raises
        UsageError if the bundle's prompt is baked in.
        """
        with self.lock:
            if self._prompts is None:
                self._prompts = TextEncoder(self.bundle, self._openers.text)
            found = dict(self._prompts.encode(prompt, negative))
            self._prompts.release()
            longer = found["encoder_hidden_states"].shape != self._text["encoder_hidden_states"].shape
            self._text = {**self._text, **found}
            self._conditioning.clear()
            if longer:  # engines are built for one length of text
                self._cache.clear()

    def state(self, height_px: int, width_px: int, *, seed: int = 0) -> State:
        """The state a stream of frames of the given size starts from."""
        return self.state_for(self.working_size(height_px, width_px), seed=seed)

    def state_for(self, at: Quality | Size, *, seed: int = 0) -> State:
        """The state a stream starts from at a quality, or at a working size (H, W) and the usual steps.

        For one size, a seed draws the same noise whatever the steps.
        """
        quality = self.quality_at(at)
        draws = noise_draws(self.bundle.coefficients(quality.steps))
        shape = (draws, self.bundle.latent_channels, *self._latent_size(quality.size))
        return State(seed, 0, draw_noise(seed, shape))

    def step(
        self, frame: Frame, state: State | None = None, *, mark: Mark = no_mark, mask: Mask | None = None
    ) -> tuple[Frame, State]:
        """Stylize one frame uint8 [H, W, 3] of a stream; give the state returned to the next call.

        A frame that does not have the working size is fitted to it, and comes back at that resolution in
        its own aspect, never larger than it was. ``mark`` is called with a stage's name when it ends.

        With a ``mask`` the result has the size of the frame, and the frame's own pixels where the mask is
        black. Raises UsageError if the mask has another aspect.
        """
        working, mask = self.fit(frame), unless_whole(mask)
        if mask is not None:
            mask.check((frame.shape[0], frame.shape[1]))
        shape, size = frame.shape[:2], working.shape[:2]
        state = self._state_for(state, (size[0], size[1]))
        mark("convert")
        styled = self.run_many([working], [state], mark, frames=1, mask=mask)[0]
        whole = (shape[0], shape[1])
        result = self.unfit(styled, whole) if mask is None else fit.resize(styled, whole)
        if result is not styled:
            mark("convert")
        if self.keep_colours:
            result = chroma.keep_colours(frame, result)
            mark("colours")
        if mask is not None:
            result = mask.composite(frame, result)
            mark("convert")
        return result, replace(state, index=state.index + 1)

    def fit(self, frame: Frame, quality: Quality | None = None) -> Frame:
        """A frame uint8 [H, W, 3] at its working size, or at that of ``quality``: what `run` takes.

        The frame itself if it already has that size.
        """
        frame = check_frame(frame)
        size = self.working_size(frame.shape[0], frame.shape[1]) if quality is None else quality.size
        return fit.resize(frame, size)

    def unfit(self, styled: Frame, shape: tuple[int, int]) -> Frame:
        """A result of `run` in the aspect of its frame, whose ``shape`` was (h, w) px.

        At the resolution of the working size, never larger than that frame; ``styled`` itself if it
        already has that size.
        """
        return fit.resize(styled, fit.result_size(shape, (styled.shape[0], styled.shape[1])))

    def run(
        self, working: Frame, state: State, mark: Mark = no_mark, *, quality: Quality | None = None
    ) -> Frame:
        """Stylize one frame of a working size, as `fit` returns it, with the noise of ``state``.

        ``quality`` (of that size) sets the number of steps. Raises UsageError if frame, state and quality
        differ in size.
        """
        return self.run_many([working], [state], mark, quality=quality, frames=1)[0]

    def run_many(
        self,
        working: Sequence[Frame],
        states: Sequence[State],
        mark: Mark = no_mark,
        *,
        quality: Quality | None = None,
        frames: int | None = None,
        mask: Mask | None = None,
        styles: Sequence[tuple[EncodedStyle, float]] | None = None,
    ) -> list[Frame]:
        """Stylize frames of one working size, ``frames`` in each call: the same results as `run`.

        ``frames`` defaults to `frames_per_call`. A shorter last group is filled up with its last frame, so
        one set of engines is enough. All frames get the style that is set now, or each its own of ``styles``
        (style and strength), of which the last is set afterwards. With a ``mask`` the latents
        outside it are kept; laying the result over the frame is left to the caller (`Mask.composite`).
        """
        with self.lock:
            groups = self.submit_many(
                working, states, mark, quality=quality, frames=frames, mask=mask, styles=styles
            )
            return [frame for group in groups for frame in group.collect(mark)][: len(working)]

    def submit_many(
        self,
        working: Sequence[Frame],
        states: Sequence[State],
        mark: Mark = no_mark,
        *,
        quality: Quality | None = None,
        frames: int | None = None,
        mask: Mask | None = None,
        styles: Sequence[tuple[EncodedStyle, float]] | None = None,
    ) -> list[Submitted]:
        """The first half of `run_many`: groups of frames, each to be collected once, with ``lock`` held.

        Only GPU backends that replay a frame as a whole go on meanwhile; others are done when this returns.
        """
        if len(working) != len(states):
            raise UsageError(f"every frame needs a state: got {len(working)} frames, {len(states)} states")
        if not working:
            return []
        size = (working[0].shape[0], working[0].shape[1])
        if self.bundle.window is not None:
            return [self._stills(working, states, mark, quality or self.quality_at(size), mask)]
        count = self.frames_per_call(size) if frames is None else frames
        if count < 1:
            raise UsageError(f"a call takes at least one frame, got {count}")
        masked = mask is not None and self._blends
        masks = self.mask_feeds(size, mask)
        submitted: list[Submitted] = []
        with self.lock:
            runner = self.runner(RunnerKey(quality or self.quality_at(size), count, masked=masked))
            for frame, state in zip(working, states, strict=True):
                runner.check(frame, state.noise)
            conditioned = [self._conditioned(size, style) for style in styles or (self._style,)]
            conditioned *= len(working) // len(conditioned)
            for begin in range(0, len(working), count):
                group = [min(begin + i, len(working) - 1) for i in range(count)]
                together = np.stack([working[i] for i in group]) if count > 1 else working[begin][None]
                noise = [states[i].noise for i in group]
                conditioning = [conditioned[i] for i in group]
                submitted.append(runner.submit(together, conditioning, noise, mark, masks))
        return submitted

    def _stills(
        self,
        working: Sequence[Frame],
        states: Sequence[State],
        mark: Mark,
        quality: Quality,
        mask: Mask | None,
    ) -> Submitted:
        """Each frame as a scene of its own: a window of equal frames."""
        if mask is not None:
            self.bundle.check_single_frames("--mask")
        with self.lock:
            stream, styled = self.window_stream(quality), []
            for frame, state in zip(working, states, strict=True):
                styled += [*stream.push(frame, state.noise, mark), *stream.flush(mark)]
        result = np.stack(styled)
        return Submitted(lambda mark: result, running=False)

    def window_stream(self, quality: Quality, *, carried: bool = False) -> WindowStream:
        """Frames of a scene at a quality, for a bundle whose UNet sees several at once.

        Its graphs begin to open. Hold ``lock`` while it works. ``carried``: see `pipeline.windows`.
        """
        assert self.bundle.window is not None
        steps, size = self.bundle.coefficients(quality.steps), quality.size

        def current() -> tuple[WindowGraphs, Conditioning]:
            return self._graphs_of_windows(size), self.conditioning(size)

        with self.lock:
            self._graphs_of_windows(size)
        kind = self.bundle.prediction_type
        return WindowStream(
            self.bundle.window,
            steps,
            kind,
            self.guidance,
            current,
            sees_content=self.bundle.unet_inputs == CONTENT,
            carried=carried,
        )

    def _window_key(self, size: Size) -> tuple[Size, int]:
        return size, self._text["encoder_hidden_states"].shape[1]

    def _graphs_of_windows(self, size: Size) -> WindowGraphs:
        self._check_open()
        key = self._window_key(size)
        if key not in self._window_graphs:
            while len(self._window_graphs) >= _WINDOW_SIZES:
                self._window_graphs.pop(next(iter(self._window_graphs))).close()
            text = {name: value.shape for name, value in self._text.items()}
            specs = window_specs(self.bundle, size, self.guidance, text, self.vae)
            opening = {name: self._pool.submit(self._openers.graph, spec) for name, spec in specs.items()}
            self._window_graphs[key] = WindowGraphs(opening, size)
        return self._window_graphs[key]

    def stylize(self, frame: Frame, seed: int = 0, *, mask: Mask | None = None) -> Frame:
        """Stylize one frame on its own: `step` without a stream."""
        frame = check_frame(frame)
        return self.step(frame, self.state(*frame.shape[:2], seed=seed), mask=mask)[0]

    def close(self) -> None:
        """Close every engine; the stylizer must not be used afterwards."""
        with self.lock:
            with self._style_lock:
                self._closed = True
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._cache.clear()
            while self._window_graphs:
                self._window_graphs.popitem()[1].close()
            with self._style_lock:
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
        """``state`` itself, or one with the same seed if the stream has changed its size or steps."""
        if state is None:
            return self.state_for(size)
        enough = len(state.noise) >= noise_draws(self.coefficients)
        if enough and state.noise.shape[2:] == self._latent_size(size):
            return state
        return replace(self.state_for(size, seed=state.seed), index=state.index)

    def _latent_size(self, size: Size) -> Size:
        return size[0] // self.bundle.vae_scale, size[1] // self.bundle.vae_scale

    def conditioning(self, size: Size) -> Conditioning:
        """The UNet's inputs at a working size; the same object until style or prompt change.

        Raises UsageError if no style is set.
        """
        with self.lock:
            if self._style is None:
                raise UsageError("no style is set; call set_style(picture) first")
            if size not in self._conditioning:
                if len(self._conditioning) >= _CACHED_SIZES:
                    del self._conditioning[next(iter(self._conditioning))]
                positive = unet_inputs(self._text, *self._style, size)
                self._conditioning[size] = conditioning_for(self.guidance.mode, self._text, positive)
            return self._conditioning[size]

    def _conditioned(self, size: Size, style: tuple[EncodedStyle, float] | None) -> Conditioning:
        if style is not None:
            self.use_style(*style)
        return self.conditioning(size)

    def mask_feeds(self, size: Size, mask: Mask | None = None) -> dict[str, Array]:
        """What programs of a working size (H, W) take of a mask; a UNet that inpaints always takes one."""
        if self._blends:
            return {} if mask is None else {"mask": mask.feeds(size, self.bundle.vae_scale)["mask"]}
        return (mask or self._everywhere).feeds(size, self.bundle.vae_scale)

    @property
    def _blends(self) -> bool:
        """Whether a mask works on the latents; else the UNet itself takes it."""
        return self.bundle.unet_inputs != INPAINTING

    def runner(self, key: RunnerKey) -> CachedRunner:
        """The runner of a key, which starts to open in the background if necessary.

        Hold ``lock`` while it runs; another thread may have it closed otherwise.
        """
        self.bundle.check_single_frames("this command")
        with self.lock:
            self._check_open()
            return self._cache.get(key)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the stylizer was closed; load it again with Stylizer.load()")

    def _open_style_encoder(self) -> Future[Engine]:
        """The style encoder, opening in the background; again, if that failed."""
        with self._style_lock:
            self._check_open()
            if self._style_engine is None or has_failed(self._style_engine):
                shapes = {"style_image": (1, 3, *[self.bundle.style_px] * 2)}
                spec = graph_spec(self.bundle, "style_encoder", shapes)
                self._style_engine = self._pool.submit(self._openers.graph, spec)
            return self._style_engine

    def _open_runner(self, key: RunnerKey) -> CachedRunner:
        """Start to open a runner in the background."""
        text = {name: value.shape[1:] for name, value in self._text.items()}
        program, specs = program_for(self.bundle, key, self.guidance, text, self.vae)
        runner = self._pool.submit(self._openers.runner, program, specs)
        steps = self.bundle.coefficients(key.quality.steps)
        latents = (self.bundle.latent_channels, *self._latent_size(key.quality.size))
        return CachedRunner(key, steps, latents, self.guidance.mode, runner)


def _frame(picture: Picture) -> Frame:
    if isinstance(picture, Path | str):
        from std_rt.media.image import read_picture

        return read_picture(Path(picture)).frame
    return check_frame(picture)
