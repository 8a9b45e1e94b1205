"""Live sessions of a server: each has its own styles, settings and threads, and all share one stylizer.

    pool = SessionPool(stylizer, library, limits, look)
    live = pool.open(PushedFrames(limits))      # BusyError when the limit is reached
    live.join(read, ended)                      # read is called with every result, in the session's thread
    live.source.push(header, jpeg)
    pool.close(live)

A session is `live.session.Session`: what is new here is a source that clients push frames into, and a thread
that encodes results. The newest frame wins on the way in; on the way out a source rests while its client has
not read the last result, so one that stops reading costs the others nothing. Frames of different sessions
take turns at the engines (`core.turns`), and share calls where that is faster (`streaming.shared_calls`).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from threading import Condition, Event, Lock, Thread
from typing import Any

from std_rt.core.arrays import Frame
from std_rt.core.errors import StdRtError, UsageError, one_line
from std_rt.live.metrics import Counts, rounded
from std_rt.live.session import Session, Settings
from std_rt.live.style_mixer import NUDGE_S, StyleMixer
from std_rt.media.camera.frame_source import Captured, Source
from std_rt.pipeline.runner_cache import MAX_KEPT
from std_rt.pipeline.stylizer import Quality, Stylizer
from std_rt.serve.library import Library
from std_rt.serve.limits import BusyError, Limits, MissingError
from std_rt.serve.protocol import Header, Look, decode_frame, encode_frame
from std_rt.streaming.shared_calls import SharedCalls
from std_rt.streaming.temporal import TemporalFilter

__all__ = ["LiveSession", "PushedFrames", "Result", "SessionPool"]

_JOIN_S = 30.0
_HEADERS_KEPT = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Result:
    """A painted frame, uint8 [H, W, 3]."""

    header: Header
    frame: Frame

    @cached_property
    def jpeg(self) -> bytes:
        """The frame, encoded once for all who ask."""
        return encode_frame(self.frame)


Reader = Callable[[Result], None]


class PushedFrames:
    """A source that a client pushes its frames into; the newest wins. See `Source`."""

    name, is_camera, fps, status = "browser", False, None, ""

    def __init__(self, limits: Limits, now: Callable[[], float] = time.perf_counter) -> None:
        self._max_pixels, self._now = limits.frame_px, now
        self._changed = Condition()
        self._newest: tuple[Header, bytes | Callable[[], Frame], float] | None = None
        self._closed = False
        self._count = 0
        self._taken: dict[int, Header] = {}  # by the index of the captured frame
        self.faults: dict[str, int] = {}
        self.replaced = self.number = 0  # frames replaced; the last frame's number
        self.rests: Callable[[], bool] = lambda: False
        """Whether frames are to wait, because results are not read; `wake` when that may have changed."""

    def push(self, header: Header, data: bytes | Callable[[], Frame]) -> None:
        """Take a frame in place of one that still waits: a JPEG, or what `read` is to call for it."""
        self.number = header.number
        with self._changed:
            self.replaced += self._newest is not None
            self._newest = header, data, self._now()
            self._changed.notify_all()

    def wake(self) -> None:
        """Have `read` ask again whether frames are to wait."""
        with self._changed:
            self._changed.notify_all()

    def header(self, index: int) -> Header:
        """The header of the frame that was captured as ``index``."""
        return self._taken[index]

    def first_frame(self) -> Frame | None:
        """None: frames come when the client sends them."""
        return None

    def read(self) -> Captured | None:
        """Wait for the next frame and decode it. Raises MediaError as `decode_frame` does."""
        with self._changed:
            while not self._closed and (self._newest is None or self.rests()):
                self._changed.wait()
            if self._closed or self._newest is None:
                return None
            (header, data, at_s), self._newest = self._newest, None
        index, self._count = self._count, self._count + 1
        self._taken = {key: kept for key, kept in self._taken.items() if key > index - _HEADERS_KEPT}
        self._taken[index] = header
        return Captured(data() if callable(data) else decode_frame(data, self._max_pixels), at_s, index)

    def close(self) -> None:
        """End `read`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Prepared:
    """A source whose frames wait until the engines for them are open, which holds up no other session."""

    def __init__(self, source: Source, prepare: Callable[[Frame], None]) -> None:
        self._source, self._prepare = source, prepare

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self) -> Captured | None:
        taken = self._source.read()
        if taken is not None:
            self._prepare(taken.frame)
        return taken


class LiveSession:
    """One session and the thread that encodes its results. `SessionPool.open` makes it."""

    def __init__(self, pool: SessionPool, source: Source, look: Look, *, owned: bool) -> None:
        """``owned``: it ends with its client's connection."""
        self.id = secrets.token_hex(8)
        self.source, self.owned, self.look = source, owned, look
        self._pool, self._stylizer, self._library = pool, pool.stylizer, pool.library
        self.mixer = StyleMixer(
            self._stylizer.encode_style,
            self._stylizer.bundle,
            strength=look.strength,
            stroke_size=look.stroke_size,
        )
        self._cards: dict[str, int] = {}  # index in the mixer, by style id
        self._readers: list[Reader] = []
        self._told: list[Callable[[str], None]] = []  # called once, with the reason of the end
        self.over = self.by_webrtc = False  # by_webrtc: its client's frames and results go that way
        self._reason: str | None = None
        self._joining = Lock()
        self._applying = Lock()
        self._asked: tuple[Any, ...] | None = None
        self._opened = Event()  # engines that are waited for, or there is no more need of them
        self.session = Session(
            self._stylizer,
            _Prepared(source, self._prepare),
            self.mixer,
            Settings(temporal=look.temporal, seed=look.seed),
            mirror=source.is_camera,
        )
        self.session.stream.calls = pool.calls
        self._thread = Thread(target=self._present, name=f"std-rt-serve-{self.id[:4]}", daemon=True)

    def start(self) -> None:
        """Show the look's styles and begin. Raises StdRtError."""
        try:
            self._apply_styles(self.look, 0.0)
            self._tune(self.look)
            self.session.start()
        except BaseException:
            self.mixer.close()
            raise
        self._rest()
        self._thread.start()

    def join(self, reader: Reader, ended: Callable[[str], None]) -> None:
        """Call ``reader`` with every result and ``ended`` with the reason of the end, in other threads."""
        with self._joining:
            self._readers.append(reader)
            self._told.append(ended)
            self._rest()
            reason = self._reason
        if reason is not None:
            ended(reason)

    def leave(self, reader: Reader, ended: Callable[[str], None]) -> None:
        """Undo `join`."""
        with self._joining:
            self._readers.remove(reader)
            self._told.remove(ended)
            self._rest()

    def _rest(self) -> None:
        """The server's own camera costs nothing while nobody looks."""
        if not self.owned:
            self.session.pause(not self._readers)

    def apply(self, asked: dict[str, Any]) -> Look:
        """Change settings (`Look.changed`); takes as long as new styles take to encode. Raises StdRtError."""
        if "seed" in asked:
            raise UsageError("the seed of a session is the one that the server was started with")
        with self._applying:  # several clients may change the server's own camera
            before, look = self.look, self.look.changed(asked, self._stylizer)
            if look.styles != before.styles:
                are_others = look.styles.keys() != before.styles.keys()
                self._apply_styles(look, look.crossfade_s if are_others else NUDGE_S)
            if look.strength != before.strength:
                self.mixer.set_strength(look.strength)
            if look.stroke_size != before.stroke_size:
                self.mixer.set_stroke_size(look.stroke_size)
            self.look = look
            self._tune(look)
            return look

    def _apply_styles(self, look: Look, fade_s: float) -> None:
        if not look.styles:
            raise UsageError("a session needs a style; add one with POST /v1/styles")
        self.mixer.set_weights({self._card(key): weight for key, weight in look.styles.items()}, fade_s)

    def _card(self, key: str) -> int:
        """The mixer's index of a style, added if necessary."""
        style = self._library.get(key)
        if key not in self._cards:
            source = style.file if style.picture is None else style.picture
            assert source is not None
            self._cards[key] = self.mixer.add(source, style.name)
        return self._cards[key]

    def _tune(self, look: Look) -> None:
        """Set what the stream takes from its next frame on; size and steps once their engines are open."""
        stream = self.session.stream
        stream.keep_colours = look.keep_colours
        if stream.temporal.mode != look.temporal:
            stream.temporal = TemporalFilter(look.temporal, self.session.metrics.warped)

    def _prepare(self, frame: Frame) -> None:
        """In the capturing thread, for each frame: open the engines that are asked for, and wait for them."""
        look = self.look
        asked = (frame.shape[:2], look.size, look.steps)
        if asked == self._asked:
            return
        height, width = frame.shape[:2]
        quality = self._stylizer.quality(height, width, size=look.size, steps=look.steps)
        if self._pool.prepare(self, quality):
            self._opened.clear()
            self._stylizer.when_open(quality, self._opened.set)
            self._opened.wait()
            if not self.over:
                self._stylizer.ready(quality)  # raises what opening raised
        self.session.stream.size, self.session.stream.steps = look.size, look.steps
        self._asked = asked

    def _present(self) -> None:
        """The presenting thread: encode each result once, for all readers."""
        reason = ""
        try:
            while not self.session.over:
                packet = self.session.get(0.2)
                if packet is None or packet.styled is None:
                    continue
                header = self._header(packet.index, self._drops(), packet.captured_s)
                result = Result(header, packet.styled)
                for reader in list(self._readers):
                    reader(result)
                self.session.presented(packet)
        except StdRtError as error:
            reason = one_line(error)
        except Exception:  # noqa: BLE001 (told to the client, and logged)
            _log.exception("a session has failed")
            reason = "the engines failed; the server's log says more"
        self.over = True
        with self._joining:
            self._reason = reason or "the source has ended"
            told = list(self._told)
        for tell in told:
            tell(self._reason)

    def _drops(self) -> int:
        return self.session.metrics.counts().drops + int(getattr(self.source, "replaced", 0))

    def _header(self, index: int, drops: int, captured_s: float) -> Header:
        if isinstance(self.source, PushedFrames):
            sent = self.source.header(index)
            return Header(sent.number, drops, sent.at_ms)
        return Header(index + 1, drops, captured_s * 1000)

    def figures(self) -> dict[str, Any]:
        """The last two seconds, as the server sees them: arrival of a frame to its result."""
        recent = self.session.metrics.recent()
        quality = self.session.stream.quality
        return {
            "fps": rounded(recent.fps, 1),
            "latency_p50_ms": rounded(recent.latency_p50_ms, 1),
            "latency_p95_ms": rounded(recent.latency_p95_ms, 1),
            "size": None if quality is None else [quality.size[1], quality.size[0]],
            "steps": None if quality is None else quality.steps,
            "drops": self._drops(),
            "style": self.mixer.title(time.perf_counter()),
            "transport": "webrtc" if self.by_webrtc else "websocket",
        }

    def close(self) -> Counts:
        """End its threads; returns what was counted."""
        self.over = True
        self._opened.set()
        self.session.close()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)
        self.mixer.close()
        return self.session.metrics.counts()


class SessionPool:
    """The sessions of a server. Any thread may call any method."""

    def __init__(self, stylizer: Stylizer, library: Library, limits: Limits, look: Look) -> None:
        """``look``: what a session starts with."""
        self.stylizer, self.library, self.limits, self.look = stylizer, library, limits, look
        self.calls = SharedCalls(stylizer)
        self._lock = Lock()
        self._places = 0
        self._sessions: dict[str, LiveSession] = {}
        self._qualities: dict[str, Quality] = {}
        self.opened = self.refused = self._frames = self._drops = 0

    def open(self, source: Source, *, owned: bool = True) -> LiveSession:
        """A running session. Raises BusyError at the limit, and StdRtError if no style can be shown."""
        with self._lock:
            if self._places >= self.limits.sessions:
                self.refused += 1
                raise BusyError(f"busy: {self._places} sessions run, which is the limit; try again later")
            self._places += 1
        try:
            live = LiveSession(self, source, self.look, owned=owned)
            live.start()
        except BaseException:
            with self._lock:
                self._places -= 1
            raise
        with self._lock:
            self.opened += 1
            self._sessions[live.id] = live
        return live

    def close(self, live: LiveSession) -> None:
        """End a session, once; returns when its threads have ended."""
        with self._lock:
            if self._sessions.pop(live.id, None) is None:
                return
            self._qualities.pop(live.id, None)
        counts = live.close()
        with self._lock:
            self._places -= 1
            self._frames += counts.frames
            self._drops += counts.drops

    def find(self, key: str | None) -> LiveSession:
        """The session of an id; None: the one that was opened last. Raises MissingError."""
        with self._lock:
            if key is None and self._sessions:
                return self._sessions[next(reversed(self._sessions))]
            if key in self._sessions:
                return self._sessions[key]
        raise MissingError("there is no session to look at yet; open the page and start a camera")

    def prepare(self, live: LiveSession, quality: Quality) -> bool:
        """Begin to open the engines of a quality, and keep those of all sessions open.

        False if that would be too many: they open when a frame comes, and may close again.
        """
        with self._lock:
            if not live.over:
                self._qualities[live.id] = quality
            kept = set(self._qualities.values())
        if len(kept) > MAX_KEPT:
            return False
        self.stylizer.prepare_qualities(sorted(kept, key=lambda each: (each.size, each.steps)))
        return True

    def counts(self) -> dict[str, int]:
        """Totals since the start, and the places that are taken now, also by sessions that begin or end."""
        with self._lock:
            running, places = list(self._sessions.values()), self._places
            totals = {"frames": self._frames, "drops": self._drops}
        for counts in (live.session.metrics.counts() for live in running):
            totals["frames"] += counts.frames
            totals["drops"] += counts.drops
        return {
            "sessions": places,
            "sessions_opened": self.opened,
            "sessions_refused": self.refused,
            **totals,
        }

    def close_all(self) -> None:
        """End every session."""
        with self._lock:
            running = list(self._sessions.values())
        for live in running:
            self.close(live)
