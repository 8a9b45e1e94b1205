"""Animated WebP and AVIF as clips: Pillow decodes them, FFmpeg cannot (WebP), or only in part (AVIF's alpha).

Animated GIF and PNG go FFmpeg's way, like every other clip.
"""

from __future__ import annotations

from collections.abc import Generator
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from PIL import Image

from std_rt.core.errors import MediaError
from std_rt.core.files import check_input
from std_rt.media.fit import spread
from std_rt.media.image import Picture, decode_picture, is_animated, open_picture, quiet_pillow
from std_rt.media.video.base import Clip, DecodedFrame
from std_rt.media.video.colour import Colour

__all__ = ["PictureClip", "is_animated_picture"]

_SRGB = Colour(1, False, 1, 1)
_SHORTEST_MS, _USUAL_MS = 10, 100  # browsers show a frame of at most the one for the other


def is_animated_picture(path: Path) -> bool:
    """True for an animated WebP or AVIF. Raises MediaError if ``path`` cannot be read."""
    check_input(path)
    with path.open("rb") as file:
        head = file.read(64)
    is_webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    is_avif = head[4:8] == b"ftyp" and b"avis" in head
    if not (is_webp or is_avif):
        return False
    with open_picture(path) as picture:
        return is_animated(picture)


class PictureClip(Clip):
    """An animated picture; `close` releases its file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._damaged = False
        with quiet_pillow():
            self._image = Image.open(path, formats=["WEBP", "AVIF"])

    def close(self) -> None:
        """Release the file."""
        self._image.close()

    @property
    def time_base(self) -> Fraction:
        """Milliseconds, as Pillow has it."""
        return Fraction(1, 1000)

    @property
    def frames(self) -> int:
        """Their number."""
        return int(getattr(self._image, "n_frames", 1))

    @cached_property
    def average_rate(self) -> Fraction | None:
        """Frames per second by the duration of the first one."""
        picture = self._decode(0)
        return Fraction(1000, self._lasts_ms) if picture is not None else None

    @cached_property
    def has_alpha(self) -> bool:
        """True if a pixel of a frame is transparent."""
        pictures = (self._decode(index) for index in range(self.frames))
        return any(picture is not None and picture.alpha is not None for picture in pictures)

    def _decode(self, index: int) -> Picture | None:
        """A frame, or None if it is damaged."""
        # Not for the whole clip: the lock is for all pictures of the program.
        with quiet_pillow():
            try:
                self._image.seek(index)
                return decode_picture(self.path, self._image)
            except (MediaError, EOFError):
                return None

    @property
    def _lasts_ms(self) -> int:
        """How long the decoded frame is shown."""
        given = int(self._image.info.get("duration", 0))
        return given if given > _SHORTEST_MS else _USUAL_MS

    def read(self) -> Generator[DecodedFrame, None, None]:
        """Frames until the end, or the first that is damaged."""
        longer_ms = 0  # what short frames have gained
        for index in range(self.frames):
            picture = self._decode(index)
            if picture is None:
                self._damaged = True
                break
            at_ms = int(self._image.info.get("timestamp", 0)) + longer_ms
            longer_ms += self._lasts_ms - int(self._image.info.get("duration", 0))
            self.decoded += 1
            rgb, alpha = picture.frame, picture.alpha  # laid over white already
            if alpha is not None and self.keeps_alpha:
                rgb = spread(rgb, alpha)
            elif alpha is not None:
                self.laid_over_white, alpha = self.laid_over_white + 1, None
            yield DecodedFrame(rgb, at_ms, self._lasts_ms, _SRGB, alpha=alpha)
        self.ended = True

    def notes(self, *, stopped: bool) -> list[str]:
        """After reading: one line if a part of it is damaged."""
        return ["the input is damaged or truncated; everything decodable was processed"] * self._damaged
