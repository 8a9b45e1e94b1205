"""What every clip is to its users: upright frames with times, and facts about the file they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from av.stream import Disposition

from std_rt.core.arrays import Frame
from std_rt.media.fit import over_white
from std_rt.media.video.colour import Colour

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container.core import Chapter
    from av.stream import AttachmentStream
    from av.subtitles.stream import SubtitleStream
    from av.video.stream import VideoStream

__all__ = ["Clip", "DecodedFrame", "Tags"]


@dataclass(frozen=True)
class DecodedFrame:
    """One upright frame: rgb uint8 [H, W, 3]; pts and duration in the clip's time base (0 = unknown).

    rotation: clockwise degrees that turned it upright. alpha: uint8 [H, W] if the clip keeps it
    (`Clip.keeps_alpha`), else None.
    """

    rgb: Frame
    pts: int
    duration: int
    colour: Colour
    rotation: int = 0
    alpha: Frame | None = None


@dataclass(frozen=True)
class Tags:
    """What a file says about itself: tags of the container and of the video, and the video's disposition."""

    container: Mapping[str, str] = field(default_factory=dict)
    video: Mapping[str, str] = field(default_factory=dict)
    disposition: Disposition = Disposition.default
    timecode: str | None = None


@dataclass
class Clip(ABC):
    """Frames of an open file, in order, and counts of what went wrong; without sound and all else.

    keeps_alpha: set it before reading to get transparency with the frames; otherwise, and in pixels that are
    fully transparent in any case, frames are white where nothing is to be seen. skips: may be set while
    reading, to leave out frames that no other frame needs.
    """

    path: Path
    keeps_alpha: bool = False
    skips: bool = False
    decoded: int = field(default=0, init=False)  # frames
    ended: bool = field(default=False, init=False)  # read to its end, or as far as it goes
    transposed: bool = field(default=False, init=False)  # the last frame's height was its stored width
    laid_over_white: int = field(default=0, init=False)  # frames with transparency that was not kept

    @property
    @abstractmethod
    def time_base(self) -> Fraction:
        """Seconds per unit of pts."""

    @property
    @abstractmethod
    def average_rate(self) -> Fraction | None:
        """Average frames per second; None if the file does not say."""

    @property
    def rate(self) -> Fraction:
        """The same, or a guess (25)."""
        return self.average_rate or Fraction(25)

    @property
    @abstractmethod
    def frames(self) -> int | None:
        """Number of frames as the file says, else an estimate, else None."""

    @property
    @abstractmethod
    def has_alpha(self) -> bool:
        """True if some pixels may be transparent."""

    @abstractmethod
    def read(self) -> Generator[DecodedFrame, None, None]:
        """Upright frames until the end, or as far as a damaged file goes."""

    def key_times(self) -> Sequence[int]:
        """Times (pts) near key frames, where reading may begin; none if the file has no index of them."""
        return ()

    @property
    def sound(self) -> Sequence[AudioStream]:
        """Sound that can be copied."""
        return ()

    @property
    def subtitles(self) -> Sequence[SubtitleStream]:
        """Subtitles that can be copied."""
        return ()

    @property
    def attachments(self) -> Sequence[AttachmentStream]:
        """Files inside the file, such as fonts."""
        return ()

    @property
    def covers(self) -> Sequence[tuple[VideoStream, bytes]]:
        """Cover pictures, which containers list as video: stream and JPEG, PNG or BMP file."""
        return ()

    @property
    def chapters(self) -> list[Chapter]:
        """Chapters, in the file's own time."""
        return []

    @property
    def tags(self) -> Tags:
        """What the file says about itself."""
        return Tags()

    def start_s(self, sounds: Sequence[AudioStream], first: DecodedFrame) -> Fraction:
        """When the first of frames and ``sounds`` starts, by the file's clock: the 0 of the output."""
        return Fraction(0)

    @property
    def pixel_aspect(self) -> Fraction | None:
        """Width by height of one upright pixel; None if pixels are square or the file does not say."""
        return None

    @property
    def frame_step(self) -> int:
        """Units of pts from one frame to the next at the average rate; at least 1."""
        return max(1, round(1 / (self.rate * self.time_base)))

    def losses(self) -> list[str]:
        """One line each on what is in the file and never used, known before it is read."""
        return []

    def notes(self, *, stopped: bool) -> list[str]:
        """After reading: one line each on what a user may want to know about the input."""
        return []

    def _visible(self, rgb: Frame, alpha: Frame | None) -> tuple[Frame, Frame | None]:
        """The frame as it is to be seen: hidden parts white; all laid over white if alpha is not kept."""
        if alpha is None:
            return rgb, None
        if self.keeps_alpha:
            return np.where(alpha[:, :, None] == 0, np.uint8(255), rgb), alpha
        if (alpha < 255).any():
            self.laid_over_white += 1
            return over_white(rgb, alpha), None
        return rgb, None
