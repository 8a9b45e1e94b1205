"""Picture files byte by byte: kinds that no library at hand writes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Chunks = Sequence[tuple[bytes, bytes]]
Tag = tuple[int, Sequence[int] | bytes]  # (type, values); types as in TIFF: 1 byte, 3 short, 4 long

_GREY, _RGB, _GREY_ALPHA, _RGBA = 0, 2, 4, 6  # PNG colour types


def write_png(path: Path, pixels: NDArray[Any], bits: int = 0, chunks: Chunks = ()) -> Path:
    """A PNG of uint8 or uint16 [H, W] or [H, W, 2..4]; ``bits`` below 8 packs grey; chunks precede IDAT."""
    h, w = pixels.shape[:2]
    depth = bits or pixels.dtype.itemsize * 8
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    colour = (_GREY, _GREY_ALPHA, _RGB, _RGBA)[channels - 1]
    if depth < 8:
        wide = np.unpackbits(pixels[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in wide]
    else:
        rows = [row.astype(f">u{depth // 8}").tobytes() for row in pixels]
    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts))
    return path


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_tiff(
    path: Path, pixels: NDArray[Any], photometric: int = -1, tags: Mapping[int, Tag] | None = None
) -> Path:
    """An uncompressed little-endian TIFF of any type, [H, W] or [H, W, channels], with more ``tags``."""
    h, w = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if photometric < 0:
        photometric = 2 if channels > 2 else 1
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    entries: dict[int, Tag] = {
        256: (3, [w]),
        257: (3, [h]),
        258: (3, [pixels.dtype.itemsize * 8] * channels),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, [0]),
        277: (3, [channels]),
        278: (3, [h]),
        279: (4, [len(data)]),
        339: (3, [kind] * channels),
        **(tags or {}),
    }
    path.write_bytes(_tiff(entries, data))
    return path


def _tiff(entries: Mapping[int, Tag], data: bytes) -> bytes:
    """Header, data, directory, and what does not fit into it."""
    start = 8 + len(data) + len(data) % 2
    after = start + 2 + 12 * len(entries) + 4
    table, rest = b"", b""
    for tag, (kind, values) in sorted(entries.items()):
        packed = values if isinstance(values, bytes) else b"".join(_value(kind, value) for value in values)
        if tag == 273:
            packed = struct.pack("<I", 8)
        table += struct.pack("<HHI", tag, kind, len(values))
        if len(packed) <= 4:
            table += packed.ljust(4, b"\0")
        else:
            table += struct.pack("<I", after + len(rest))
            rest += packed + bytes(len(packed) % 2)
    head = b"II*\0" + struct.pack("<I", start) + data + bytes(len(data) % 2)
    return head + struct.pack("<H", len(entries)) + table + bytes(4) + rest


def _value(kind: int, value: int) -> bytes:
    return struct.pack({1: "<B", 3: "<H", 4: "<I"}[kind], value)


def heic_head(*brands: bytes) -> bytes:
    """The first box of an ISO media file: enough to tell what it is."""
    box = b"ftyp" + brands[0] + bytes(4) + b"".join(brands)
    return struct.pack(">I", len(box) + 4) + box + bytes(200)
