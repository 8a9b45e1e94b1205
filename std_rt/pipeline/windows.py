"""Video-to-video: a UNet that sees a window of T frames, run over a clip of any length in constant memory.

    stream = stylizer.window_stream(quality)
    for working in frames:
        results += stream.push(working, state)
    results += stream.flush()

Windows begin every T - overlap frames. In every step, the noise predicted for a frame is the mean over the
windows it is in (MultiDiffusion, arXiv 2302.08113, along time), and all frames are denoised as one clip:

    level:    0 (most noise)   1              2 ...
    window k  --------------->
    window k-1                 ------------>
    window k-2                                ---------->

A frame leaves a level once every window that holds it has been run there, and a window runs at a level once
all its frames have reached it. So steps advance like a wave: while one window takes its first step, the one
before takes its second, and no window is run twice or with frames of two levels. The result is that of a
program that holds the whole clip, but only the frames between the wave's ends are in memory: at most T and
(steps - 1) times the overlap, rounded up to a multiple of T - overlap. So many frames later a result comes.

The last window of a scene is filled up with copies of the last frame, whose predictions are not used; a
scene shorter than T, or a still, is one such window. What follows a cut is a scene of its own: `flush`.

A camera cannot wait for later windows. With ``carried``, a window takes all its steps at once, as soon as
its last frame is there. It paints its new frames; its first ``overlap`` ones, which the window before has
painted, are given to the network as they were there at the same level, so that the two join. Results then
come T - overlap at a time, and T frames are held however many steps there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from std_rt.core.arrays import Array, Frame
from std_rt.core.errors import UsageError
from std_rt.core.schedule import StepCoefficients, add_noise, step, to_eps
from std_rt.engines import Engine
from std_rt.engines.glue import GLUE
from std_rt.engines.hot_swap import close_when_open
from std_rt.engines.program import Mark, no_mark
from std_rt.pipeline.conditioning import Conditioning
from std_rt.pipeline.denoise import Guidance, guided

__all__ = ["WINDOW_GRAPHS", "WindowGraphs", "WindowStream", "Windows"]

WINDOW_GRAPHS = ("vae_encoder", "unet", "vae_decoder")

# x_t and the clean latents of the frames, both [T, C, h, w] -> predicted noise
PredictWindow = Callable[[Array, Array, StepCoefficients], Array]


@dataclass(eq=False, slots=True)
class _Inside:
    """A frame on its way: its latents by level, and the sum of the noise predicted at the last one.

    Levels that no window will run at again are left out.
    """

    z: Array
    states: dict[int, Array]
    noise: Array
    eps: Array | None = None
    windows: int = 0


class Windows:
    """The scheme above on latents, whatever predicts; see the module."""

    def __init__(
        self,
        window: tuple[int, int],
        steps: Sequence[StepCoefficients],
        predict: PredictWindow,
        *,
        carried: bool = False,
    ) -> None:
        """``window``: (frames, overlap). ``carried``: see the module."""
        self._length, self._overlap = window
        self._hop, self._carried = self._length - self._overlap, carried
        self._steps, self._predict = list(steps), predict
        self._draws = np.cumsum([bool(c.noise) for c in self._steps])  # noise[0] is the start's
        self._reset()

    def _reset(self) -> None:
        self._held: deque[_Inside] = deque()
        self._gone = self._finished = 0  # frames that are not held any more, that have come out
        self._ended = False
        self._reached = [0] * (len(self._steps) + 1)  # frames that have come to each level, or beyond
        self._run = [0] * len(self._steps)  # windows run at each level

    @property
    def inside(self) -> int:
        """Frames that have entered and not come out."""
        return self._reached[0] - self._finished

    def push(self, z: Array, noise: Array) -> list[Array]:
        """Take the clean latents [C, h, w] of the next frame and its noise draws [K, C, h, w].

        Returns the clean stylized latents of the frames that are finished. Raises UsageError if the two
        differ in size.
        """
        if noise.shape[1:] != z.shape:
            raise UsageError(
                f"the state has noise {list(noise.shape)} for latents {list(z.shape)}; "
                "use state_for(...) with this size and these steps"
            )
        self._held.append(_Inside(z, {0: add_noise(z, noise[0], self._steps[0])}, noise))
        self._reached[0] += 1
        return self._advance()

    def finish(self) -> list[Array]:
        """The frames still inside; the next one begins a new scene."""
        self._ended = True
        done = self._advance()
        self._reset()
        return done

    def _advance(self) -> list[Array]:
        """Run every window that can be run, lowest level first."""
        for level, c in enumerate(self._steps):
            while self._can_run(level):
                self._window(level, c)
                self._step(level, c)
            self._step(level, c)
        clean = len(self._steps)
        done = [self._held[i - self._gone].states[clean] for i in range(self._finished, self._reached[-1])]
        self._finished += len(done)
        while self._gone < self._finished - (self._overlap if self._carried else 0):
            self._held.popleft()
            self._gone += 1
        return done

    def _exists(self, window: int) -> bool:
        """Whether the window holds a frame, so far, that the one before does not."""
        return self._reached[0] > (window * self._hop + self._overlap if window else 0)

    def _can_run(self, level: int) -> bool:
        window, there = self._run[level], self._reached[level]
        end = window * self._hop + self._length
        return there >= end or (self._ended and self._exists(window) and there == self._reached[0])

    def _window(self, level: int, c: StepCoefficients) -> None:
        begin = self._run[level] * self._hop - self._gone
        frames = [self._held[i] for i in range(begin, min(begin + self._length, len(self._held)))]
        rows = frames + [frames[-1]] * (self._length - len(frames))
        x, z = np.stack([row.states[level] for row in rows]), np.stack([row.z for row in rows])
        eps = self._predict(x, z, c)
        painted = self._reached[level + 1] - self._gone - begin  # frames carried into this window
        for i, frame in enumerate(frames[painted:], painted):
            frame.eps = eps[i] if frame.eps is None else frame.eps + eps[i]
            frame.windows += 1
        self._run[level] += 1

    def _step(self, level: int, c: StepCoefficients) -> None:
        """Bring the frames that no later window of this level changes to the next level."""
        run = self._run[level]
        carried = self._overlap if self._carried and run else 0
        until = min(run * self._hop + carried, self._reached[level])
        if self._ended and not self._exists(run):
            until = self._reached[level]
        for i in range(self._reached[level + 1], until):
            frame = self._held[i - self._gone]
            assert frame.eps is not None
            fresh = frame.noise[int(self._draws[level])] if c.noise else None
            x = frame.states[level] if self._carried else frame.states.pop(level)
            frame.states[level + 1] = step(x, frame.eps / frame.windows, c, fresh)
            frame.eps, frame.windows = None, 0
        self._reached[level + 1] = max(self._reached[level + 1], until)


class WindowGraphs:
    """The three graphs at one size, on the host. Raises the error of opening them at the first use."""

    def __init__(self, engines: Mapping[str, Future[Engine]], size: tuple[int, int]) -> None:
        self._engines, self._size = engines, size

    @property
    def ready(self) -> bool:
        """Whether all are open. Raises the error of opening one."""
        return all(engine.done() and engine.result() is not None for engine in self._engines.values())

    @property
    def precision(self) -> str:
        """The precision of the UNet."""
        return self._engines["unet"].result().precision

    def encode(self, working: Frame) -> Array:
        """Clean latents [C, h, w] of a frame uint8 [H, W, 3]. Raises UsageError for another size."""
        if working.shape[:2] != self._size:
            found = f"{working.shape[0]} x {working.shape[1]}"
            raise UsageError(f"the frame is {found} px instead of {self._size}; use fit(frame) first")
        image = np.empty((1, 3, *self._size), np.float32)
        GLUE["frame_in"].run(frame=working[None], image=image)
        return np.array(self._engines["vae_encoder"].result()(image=image)["latents"][0])

    def decode(self, latents: Array) -> Frame:
        """A frame uint8 [H, W, 3] of clean latents [C, h, w]."""
        given = np.ascontiguousarray(latents[None], np.float32)
        image = self._engines["vae_decoder"].result()(latents=given)["image"]
        frames = np.empty((1, *self._size, 3), np.uint8)
        GLUE["frame_out"].run(image=image, frame=frames)
        frame: Frame = frames[0]
        return frame

    def predict(self, x: Array, timestep: int, given: Mapping[str, Array]) -> Array:
        """The network's output for latents [T, C, h, w].

        ``given``: one side of a `Conditioning`, and the content latents if the network sees them.
        """
        sample, t = np.ascontiguousarray(x, np.float32), np.full(1, timestep, np.float32)
        return np.array(self._engines["unet"].result()(sample=sample, timestep=t, **given)["noise_pred"])

    def close(self) -> None:
        """Close them, now or as soon as they are open."""
        for engine in self._engines.values():
            close_when_open(engine)


class WindowStream:
    """Frames of one quality through `Windows`: results come in the order of `push`, some frames later."""

    def __init__(
        self,
        window: tuple[int, int],
        steps: Sequence[StepCoefficients],
        prediction_type: str,
        guidance: Guidance,
        current: Callable[[], tuple[WindowGraphs, Conditioning]],
        *,
        sees_content: bool = False,
        carried: bool = False,
    ) -> None:
        """``current``: the graphs, and the conditioning of the style and prompt that are set now.

        ``sees_content``: the UNet is given the clean latents of the frames, too. ``carried``: paint as soon
        as a window is full, as for a camera; see the module.
        """
        self._kind, self._guidance, self._current = prediction_type, guidance, current
        self._mark: Mark = no_mark
        self._sees_content = sees_content
        self._windows = Windows(window, steps, self._predict, carried=carried)

    def push(self, working: Frame, noise: Array, mark: Mark = no_mark) -> list[Frame]:
        """Take a frame uint8 [H, W, 3] of the working size and its noise [K, C, h, w]."""
        self._mark = mark
        graphs, _ = self._current()
        z = graphs.encode(working)
        mark("vae_encoder")
        return [*self._decoded(self._windows.push(z, noise))]

    def flush(self, mark: Mark = no_mark) -> Iterator[Frame]:
        """The results of the frames still inside; the next frame begins a scene."""
        self._mark = mark
        yield from self._decoded(self._windows.finish())

    def _decoded(self, latents: Sequence[Array]) -> Iterator[Frame]:
        for each in latents:
            frame = self._current()[0].decode(each)
            self._mark("vae_decoder")
            yield frame

    def _predict(self, x: Array, z: Array, c: StepCoefficients) -> Array:
        graphs, conditioning = self._current()
        seen = {"content_latents": z} if self._sees_content else {}

        def predict(x_t: Array, timestep: int, negative: bool) -> Array:
            given = conditioning.negative if negative else conditioning.positive
            return graphs.predict(x_t, timestep, {**given, **seen})

        if self._guidance.mode == "full":
            eps, _ = guided(x, c, predict, self._kind, self._guidance.scale)
        else:
            eps = to_eps(predict(x, c.timestep, False), x, c, self._kind)
        self._mark("unet")
        return np.asarray(eps, np.float32)
