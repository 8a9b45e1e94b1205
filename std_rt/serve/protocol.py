"""What goes over the wire: frames with their header, and the settings of a session, job or picture.

docs/serve.md describes both for those who write a client.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from std_rt.core.arrays import Frame, Size
from std_rt.core.errors import MediaError, UsageError
from std_rt.media.picture_formats import DAMAGE
from std_rt.pipeline.conditioning import check_stroke_size
from std_rt.pipeline.stylizer import Stylizer
from std_rt.streaming.temporal import TEMPORAL_MODES

__all__ = [
    "MOST_STYLES",
    "Header",
    "Look",
    "check_frame_size",
    "decode_frame",
    "encode_frame",
    "parse_message",
]

_HEADER = struct.Struct("<IId")
MOST_STYLES = 16
_LONGEST_CROSSFADE_S = 60.0
_LARGEST = 1e9


@dataclass(frozen=True)
class Header:
    """The first 16 bytes of a binary message, little endian: uint32, uint32, float64.

    ``number``: of the frame, rising, from 1. ``received``: of the last result that the client has, 0 for
    none; in results, how many frames were dropped so far. ``at_ms``: the client's clock, returned as it came.
    """

    number: int
    received: int
    at_ms: float

    def pack(self, picture: bytes) -> bytes:
        """A binary message."""
        return _HEADER.pack(self.number, self.received, self.at_ms) + picture

    @classmethod
    def unpack(cls, message: bytes) -> tuple[Header, bytes]:
        """Header and picture. Raises UsageError for a message that is too short."""
        if len(message) <= _HEADER.size:
            raise UsageError(
                f"a frame is a header of {_HEADER.size} bytes and a picture, got {len(message)} bytes"
            )
        return cls(*_HEADER.unpack_from(message)), message[_HEADER.size :]


def check_frame_size(w: int, h: int, max_pixels: int) -> None:
    """Raise MediaError for a frame that is too large."""
    if w * h > max_pixels:
        raise MediaError(f"the frame is {w} x {h} px; the limit is {max_pixels / 1e6:.1f} megapixels")


def decode_frame(data: bytes, max_pixels: int) -> Frame:
    """uint8 [H, W, 3] of a JPEG. Raises MediaError if it is none, damaged, or too large.

    The size is checked before anything is decoded. (Not by `Image.open`, whose own limit warns.)
    """
    try:
        with JpegImageFile(BytesIO(data)) as picture:
            check_frame_size(*picture.size, max_pixels)
            return np.asarray(picture.convert("RGB"))
    except DAMAGE as error:
        raise MediaError("the frame is not a JPEG, or it is damaged") from error


def encode_frame(frame: Frame, quality: int = 85) -> bytes:
    """A JPEG of a frame uint8 [H, W, 3]."""
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def parse_message(text: str) -> dict[str, Any]:
    """A text message: one JSON object. Raises UsageError for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError('a text message is one JSON object, such as {"strength": 0.8}')
    return found


@dataclass(frozen=True)
class Look:
    """How frames are painted, in a session, a job or a picture.

    ``styles``: weight by id. ``size``: side in px of the area that frames are worked at, or (H, W).
    ``crossfade_s``: of the next changes.
    """

    styles: Mapping[str, float] = field(default_factory=dict)
    strength: float = 1.0
    stroke_size: float = 1.0
    keep_colours: bool = False
    size: int | Size | None = None
    steps: int | None = None
    temporal: str = "off"
    crossfade_s: float = 1.0
    seed: int = 0

    def changed(self, asked: Mapping[str, Any], stylizer: Stylizer) -> Look:
        """This look with what a client asks for. Raises StdRtError, one line, for a wrong name or value."""
        values = {**self.__dict__}
        for name, value in asked.items():
            if name not in _PARSERS:
                raise UsageError(f"there is no setting {name!r}; use one of {', '.join(_PARSERS)}")
            key = "crossfade_s" if name == "crossfade" else name
            values[key] = _PARSERS[name](name, value)
        look = Look(**values)
        look.check(stylizer)
        return look

    def check(self, stylizer: Stylizer) -> None:
        """Raise StdRtError unless the stylizer can paint like that."""
        bundle = stylizer.bundle
        bundle.check_strength(self.strength)
        check_stroke_size(self.stroke_size)
        bundle.check_size(self.size)
        if self.steps is not None and self.steps not in bundle.steps_allowed:
            allowed = ", ".join(map(str, bundle.steps_allowed))
            raise UsageError(f"bundle '{bundle.name}' takes {allowed} steps, not {self.steps}")

    def described(self) -> dict[str, Any]:
        """As the client of a session would send it."""
        values = {**self.__dict__, "styles": dict(self.styles), "crossfade": self.crossfade_s}
        del values["crossfade_s"], values["seed"]
        return values


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -_LARGEST <= value <= _LARGEST:  # nor infinite, nor NaN
        raise UsageError(f"{name} must be a number, got {_shown(value)}")
    return float(value)


def _whole(name: str, value: Any) -> int | None:
    if value is None:
        return None
    number = _number(name, value)
    if number != int(number) or not 0 <= number < 2**31:
        raise UsageError(f"{name} must be a whole number, 0 or more, got {_shown(value)}")
    return int(number)


def _size(name: str, value: Any) -> int | Size | None:
    """A side, or [H, W], which is (H, W) where a form said WIDTHxHEIGHT."""
    if isinstance(value, list | tuple) and len(value) == 2:
        height, width = (_whole(name, side) or 0 for side in value)
        return height, width
    return _whole(name, value)


def _seed(name: str, value: Any) -> int:
    return _whole(name, value) or 0


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, got {_shown(value)}")
    return value


def _temporal(name: str, value: Any) -> str:
    if value not in TEMPORAL_MODES:
        raise UsageError(f"{name} must be one of {', '.join(TEMPORAL_MODES)}, got {_shown(value)}")
    return str(value)


def _crossfade(name: str, value: Any) -> float:
    seconds = _number(name, value)
    if not 0 <= seconds <= _LONGEST_CROSSFADE_S:
        raise UsageError(f"{name} must be 0 to {_LONGEST_CROSSFADE_S:g} seconds, got {seconds:g}")
    return seconds


def _styles(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not value:
        raise UsageError(f'{name} must give weights by id, such as {{"ink": 1}}, got {_shown(value)}')
    if len(value) > MOST_STYLES:
        raise UsageError(f"at most {MOST_STYLES} styles are blended, got {len(value)}")
    weights = {str(key): _number(f"the weight of style {key}", weight) for key, weight in value.items()}
    if min(weights.values()) < 0 or max(weights.values()) == 0:
        raise UsageError("style weights must be 0 or more, and one of them above 0")
    return weights


def _shown(value: Any) -> str:
    return repr(value)[:40]


_PARSERS = {
    "styles": _styles,
    "strength": _number,
    "stroke_size": _number,
    "keep_colours": _switch,
    "size": _size,
    "steps": _whole,
    "temporal": _temporal,
    "crossfade": _crossfade,
    "seed": _seed,
}
