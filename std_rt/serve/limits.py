"""What a server takes at most: sessions, sizes, times; and what it says of the rest."""

from __future__ import annotations

from dataclasses import dataclass

from std_rt.core.errors import StdRtError, UsageError

__all__ = ["BusyError", "ConflictError", "Limits", "MissingError"]


class BusyError(StdRtError):
    """The server does as much as it may already."""


class ConflictError(UsageError):
    """Not possible as things are: something of the server's own, not done yet, or no room."""


class MissingError(UsageError):
    """What a client names is not there, or no longer."""


@dataclass(frozen=True)
class Limits:
    """Upper bounds of everything that a client can ask for; beyond them the answer is one line.

    ``sessions`` and ``viewers`` at once; ``pictures`` and ``jobs`` waiting or under way. ``*_bytes`` of a
    request body or a message, ``*_px`` pixels of one picture or frame, ``clip_frames`` frames of a
    clip, ``keep_s`` how long uploads and results stay, ``body_s`` and ``clip_body_s`` how long a body may
    take, ``idle_s`` how long it may stand still, and ``headers_s`` how long a connection may take to ask for
    something. ``unread``: results a client may leave unread.
    """

    sessions: int = 8
    viewers: int = 32
    pictures: int = 4
    jobs: int = 8
    styles: int = 64
    message_bytes: int = 64 << 10
    frame_bytes: int = 4 << 20
    frame_px: int = 3840 * 2160
    picture_bytes: int = 64 << 20
    picture_px: int = 50_000_000
    clip_bytes: int = 512 << 20
    clip_px: int = 4096 * 2304
    clip_frames: int = 36_000
    keep_s: float = 3600.0
    body_s: float = 60.0
    clip_body_s: float = 1800.0
    idle_s: float = 20.0
    headers_s: float = 20.0
    unread: int = 3
