"""The clock of broadcasts and discs: jumps, as where recordings were joined, are taken out.

MPEG transport and program streams may set it anew at any time. Each packet is moved by the offset that brings
it nearest to its predecessor: the present one or that before the last jump, as streams do not jump together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream

__all__ = ["may_jump", "packets_of"]

_AHEAD_S = 10  # further from the last packet of any stream is a jump; the value of FFmpeg's tools
_BACK_S = Fraction(1, 10)  # so is more than this before the end of the stream's own last packet
_TIMED = ("video", "audio")


def may_jump(container: InputContainer) -> bool:
    """True if its kind of file has a clock that starts anywhere and may jump."""
    return container.format.name in ("mpegts", "mpeg")


def packets_of(container: InputContainer, streams: Sequence[Stream]) -> Iterator[Packet[Any]]:
    """Packets of ``streams`` with a clock that does not jump. Raises what PyAV raises.

    It is the same for every choice of streams.
    """
    clock = _Clock() if may_jump(container) else None
    wanted = {stream.index for stream in streams}
    read = (
        list(streams) if clock is None else [s for s in container.streams if s.type in _TIMED or s in streams]
    )
    for packet in container.demux(read):
        if not packet.size:  # The empty ones at the end flush decoders, which their users do themselves.
            continue
        if clock is not None:
            clock.set(packet)
        if packet.stream_index in wanted:
            yield packet


class _Clock:
    def __init__(self) -> None:
        self._offsets = [Fraction(0), Fraction(0)]  # s; after the last jump and before it
        self._now: Fraction | None = None  # of the last packet
        self._due: dict[int, Fraction] = {}  # the end of each stream's last packet
        self._lead: dict[int, int] = {}  # its pts less its dts, in ticks

    def set(self, packet: Packet[Any]) -> None:
        """Move a packet's times."""
        offset, tick = self._offsets[0], packet.time_base
        if packet.pts is not None and packet.dts is not None:
            if abs(packet.pts - packet.dts) * tick > _AHEAD_S:  # Read behind the jump.
                packet.pts = packet.dts + self._lead.get(packet.stream_index, 0)
            self._lead[packet.stream_index] = packet.pts - packet.dts
        if packet.dts is not None and packet.stream.type in _TIMED:
            offset = self._offset_of(packet.stream_index, packet.dts * tick)
            self._now = packet.dts * tick + offset
            self._due[packet.stream_index] = self._now + (packet.duration or 0) * tick
        ticks = round(offset / tick)
        packet.pts = None if packet.pts is None else packet.pts + ticks
        packet.dts = None if packet.dts is None else packet.dts + ticks

    def _offset_of(self, index: int, dts_s: Fraction) -> Fraction:
        if self._now is None:
            return self._offsets[0]
        known = self._due.get(index)
        due = self._now if known is None else known
        offset = min(self._offsets, key=lambda one: abs(dts_s + one - due))
        at = dts_s + offset
        is_back = known is not None and at < known - _BACK_S
        if is_back or abs(at - self._now) > _AHEAD_S:
            offset = due - dts_s
            self._offsets = [offset, self._offsets[0]]
        return offset
