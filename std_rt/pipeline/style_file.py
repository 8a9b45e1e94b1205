"""Style files: style tokens, a name and a thumbnail in one small ``.safetensors`` file.

    style_tokens   float32 [1, T, D]
    text_embeds    float32 [1, P], if the style encoder returns them
    thumbnail      uint8 [h, w, 3] RGB, at most 128 px per side
    metadata       ``std_rt_style``: JSON with name, format_version, style_encoder, bundle, sources, sha256;
                   stroke_size unless it is 1 (null: a blend of several)

Tokens fit only the style encoder that made them, so a file names it by its hashes in the bundle's manifest:
bundles that share a style encoder share style files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from std_rt.core.arrays import Frame
from std_rt.core.bundle import Bundle
from std_rt.core.errors import MediaError, UsageError
from std_rt.core.files import check_input, check_output, reason, write_bytes, writing
from std_rt.core.machine import upgrade_hint
from std_rt.media.image import PICTURE_SUFFIXES, Picture, read_picture
from std_rt.media.sources import VIDEO_SUFFIXES
from std_rt.pipeline.conditioning import EncodedStyle, StyleSquares, blend, square

__all__ = [
    "FORMAT_VERSION",
    "SUFFIX",
    "THUMBNAIL_PX",
    "StyleFile",
    "blend_files",
    "check_style_output",
    "clean_name",
    "encode_styles",
    "is_style_file",
    "load_style",
    "open_styles",
    "read_style",
    "save_style",
    "style_encoder_id",
    "style_paths",
    "thumbnail",
]

StyleSource = Frame | EncodedStyle
Encode = Callable[[Frame | StyleSquares, float], EncodedStyle]  # of a picture, at a stroke size

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
THUMBNAIL_PX = 128
_KEY = "std_rt_style"
_NAME_LENGTH = 80
_MAKE = "std-rt styles save art.png -o NAME.safetensors"
_DTYPES = {"style_tokens": "F32", "text_embeds": "F32", "thumbnail": "U8"}


@dataclass(frozen=True, eq=False)
class StyleFile:
    """The contents of a style file.

    ``thumbnail``: uint8 [h, w, 3], at most 128 px per side. ``encoder``: `style_encoder_id` of the bundle
    that made the tokens, ``bundle`` its name. ``sources``: (name of a picture, its share of the blend); the
    shares add up to 1. ``stroke_size``: that of all of them, None if they differ.
    """

    style: EncodedStyle
    name: str
    thumbnail: Frame
    encoder: str
    bundle: str
    sources: tuple[tuple[str, float], ...] = ()
    stroke_size: float | None = 1.0


def style_encoder_id(bundle: Bundle) -> str:
    """sha256 over the hashes of the style encoder's graph and weights, as the manifest lists them."""
    graph, files = bundle.manifest["graphs"]["style_encoder"], bundle.manifest["files"]
    listed = " ".join(str(files[graph[part]]["sha256"]) for part in ("file", "weights"))
    return hashlib.sha256(listed.encode("utf-8")).hexdigest()


def is_style_file(path: Path) -> bool:
    """Whether ``path`` ends in ``.safetensors``."""
    return path.suffix.lower() == SUFFIX


def thumbnail(frame: Frame, side_px: int = THUMBNAIL_PX) -> Frame:
    """The centred square that the style encoder sees, at most ``side_px`` per side."""
    return square(frame, min(side_px, *frame.shape[:2]))


def style_paths(folder: Path) -> list[Path]:
    """Pictures and style files of a folder by name; hidden files and subfolders are left out.

    Raises MediaError if there are none or the folder cannot be read.
    """
    known = PICTURE_SUFFIXES | {SUFFIX}
    try:
        found = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    except OSError as error:
        raise MediaError(f"{folder} cannot be read: {reason(error)}") from error
    styles = [path for path in found if path.suffix.lower() in known]
    if not styles:
        raise MediaError(
            f"{folder} contains no picture or style file (subfolders are not searched); "
            "give files or another folder"
        )
    return sorted(styles, key=lambda path: (path.name.casefold(), path.name))


def read_style(
    source: Path | Frame | StyleSquares,
    bundle: Bundle,
    encode: Encode,
    name: str | None = None,
    *,
    stroke_size: float | None = None,
) -> StyleFile:
    """A style from a picture or a style file; ``encode`` encodes pictures for ``bundle``.

    ``source`` is a path, a frame uint8 [H, W, 3] or its squares. ``name``: default is the file's own, or its
    stem.
    ``stroke_size`` None: a style file's own, 1 for a picture. Raises MediaError as `load_style` does, or if a
    picture cannot be read.
    """
    if isinstance(source, Path):
        if is_style_file(source):
            loaded = load_style(source, bundle, stroke_size)
            return loaded if name is None else replace(loaded, name=clean_name(name))
        picture: Frame | StyleSquares = _picture(source).frame
        origin, called = source.name, name or source.stem
    else:
        picture, origin, called = source, name or "a picture", name or "style"
    stroke_size = 1.0 if stroke_size is None else stroke_size
    return StyleFile(
        style=encode(picture, stroke_size),
        name=clean_name(called),
        thumbnail=thumbnail(picture.large if isinstance(picture, StyleSquares) else picture),
        encoder=style_encoder_id(bundle),
        bundle=bundle.name,
        sources=((clean_name(origin), 1.0),),
        stroke_size=stroke_size,
    )


def open_styles(
    pairs: Sequence[tuple[Path, float]],
    bundle: Bundle,
    stroke_size: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[tuple[StyleSource, float]]:
    """Weighted files, read before any engine is opened: pictures as frames, style files as styles.

    ``say`` is given the notes on pictures, a line each. Raises MediaError as `read_picture` and `load_style`.
    """
    opened: list[tuple[StyleSource, float]] = []
    for path, weight in pairs:
        if is_style_file(path):
            opened.append((load_style(path, bundle, stroke_size).style, weight))
            continue
        picture = _picture(path)
        opened.append((picture.frame, weight))
        for line in picture.notes:
            say(f"{path.name}: {line}")
    return opened


def _picture(path: Path) -> Picture:
    if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
        raise MediaError(f"{path} is a clip; a style is a picture or a style file")
    return read_picture(path)


def encode_styles(
    encode: Encode,
    pairs: Sequence[tuple[StyleSource | Path, float]],
    bundle: Bundle,
    stroke_size: float | None = None,
) -> EncodedStyle:
    """One style from weighted paths, frames and styles; raises as `read_style` and `blend` do."""

    def one(source: StyleSource | Path) -> EncodedStyle:
        if isinstance(source, EncodedStyle):
            return source
        return read_style(source, bundle, encode, stroke_size=stroke_size).style

    return blend([(one(source), weight) for source, weight in pairs])


def blend_files(parts: list[tuple[StyleFile, float]], name: str) -> StyleFile:
    """The weighted mean of styles as one, with its sources and a thumbnail of stripes. As `blend` raises."""
    style = blend([(part.style, weight) for part, weight in parts])
    top = max(weight for _, weight in parts)
    total = sum(weight / top for _, weight in parts)
    shared = [(part, weight / top / total) for part, weight in parts if weight]
    sources = [(source, share * own) for part, share in shared for source, own in part.sources]
    first = shared[0][0]
    return StyleFile(
        style=style,
        name=clean_name(name),
        thumbnail=_stripes(shared),
        encoder=first.encoder,
        bundle=first.bundle,
        sources=tuple(sources),
        stroke_size=first.stroke_size if len({part.stroke_size for part, _ in shared}) == 1 else None,
    )


def _stripes(parts: list[tuple[StyleFile, float]]) -> Frame:
    """Each style's share of the width, cut from its thumbnail in place."""
    side = max(min(part.thumbnail.shape[:2]) for part, _ in parts)
    edges = np.round(np.cumsum([0.0, *(share for _, share in parts)]) * side).astype(int)
    frames = [square(part.thumbnail, side) for part, _ in parts]
    columns = [frame[:, a:b] for frame, a, b in zip(frames, edges[:-1], edges[1:], strict=True)]
    return np.ascontiguousarray(np.concatenate(columns, axis=1))


def clean_name(name: str) -> str:
    """``name`` as one printable line of at most 80 characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return line[:_NAME_LENGTH] or "style"


def check_style_output(path: Path, overwrite: bool = False) -> None:
    """Raise MediaError, before any work, if a style file cannot be written to ``path``."""
    if not is_style_file(path):
        raise MediaError(f"{path}: a style file ends in {SUFFIX}; use -o {path.with_suffix(SUFFIX)}")
    check_output(path, overwrite=overwrite)


def save_style(path: Path, style: StyleFile, overwrite: bool = False) -> None:
    """Write a style file, whole or not at all.

    Raises MediaError if the name does not end in ``.safetensors``, the file exists and ``overwrite`` is
    False, or it cannot be written; UsageError if its arrays are not valid.
    """
    from safetensors.numpy import save

    check_style_output(path, overwrite)
    tensors = {name: np.ascontiguousarray(value) for name, value in _tensors(style).items()}
    problem = _array_problem(tensors)
    if problem:
        raise UsageError(f"style '{style.name}' cannot be saved: {problem}; encode its picture again")
    data = save(tensors, {_KEY: _canonical(_metadata(style, tensors))})
    with writing(path):
        write_bytes(path, data)


def _tensors(style: StyleFile) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {"style_tokens": style.style.tokens, "thumbnail": style.thumbnail}
    if style.style.text_embeds is not None:
        tensors["text_embeds"] = style.style.text_embeds
    return tensors


def _metadata(style: StyleFile, tensors: dict[str, NDArray[Any]]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": clean_name(style.name),
        "style_encoder": style.encoder,
        "bundle": clean_name(style.bundle),
        "sources": [[clean_name(name), share] for name, share in style.sources],
    }
    if style.stroke_size != 1:
        body["stroke_size"] = style.stroke_size
    return body | {"sha256": _digest(body, tensors)}


def _canonical(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _digest(metadata: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> str:
    """sha256 over metadata (without the hash) and arrays, which detects truncated or changed files."""
    body = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(_canonical(body).encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)} ".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def load_style(path: Path, bundle: Bundle | None, stroke_size: float | None = None) -> StyleFile:
    """Read a style file for ``bundle``; None reads a style of any bundle, to inspect it.

    Raises MediaError, one line, if the file is missing, not safetensors, not a style (a LoRA), damaged,
    from a later std-rt, made for another style encoder or at another ``stroke_size`` (None: any), or holds
    arrays of other shapes than the bundle's.
    """
    style = _read(path)
    if bundle is None:
        return style
    source = style.sources[0][0] if len(style.sources) == 1 else "art.png"
    if style.encoder != style_encoder_id(bundle):
        raise MediaError(
            f"{path} was made for the style encoder of bundle '{style.bundle}' ({style.encoder[:12]}), "
            f"not for that of '{bundle.name}' ({style_encoder_id(bundle)[:12]}); make it again: "
            f"std-rt styles save {source} -o {path} --bundle {bundle.name} --overwrite"
        )
    problem = _shape_problem(style.style, bundle)
    if problem:
        raise MediaError(f"{path} does not fit bundle '{bundle.name}': {problem}; {_again(path)}")
    if stroke_size not in (None, style.stroke_size):
        own = "several stroke sizes" if style.stroke_size is None else f"stroke size {style.stroke_size:g}"
        again = f"std-rt styles save {source} --stroke-size {stroke_size:g} -o {path} --overwrite"
        raise MediaError(
            f"{path} was saved at {own} without its picture, which stroke size {stroke_size:g} needs; "
            f"leave out --stroke-size, or save it again: {again}"
        )
    return style


def _again(path: Path) -> str:
    return f"make it again: std-rt styles save art.png -o {path} --overwrite"


def _read(path: Path) -> StyleFile:
    if path.is_dir():
        raise MediaError(f"{path} is a folder; give a style file inside it")
    check_input(path)
    with _opened(path) as file:
        metadata = _read_metadata(path, file)
        tensors = _read_tensors(path, file)
    damaged = MediaError(f"{path} is damaged (its contents have changed); {_again(path)}")
    try:
        if metadata.get("sha256") != _digest(metadata, tensors):
            raise damaged
        stroke_size = metadata.get("stroke_size", 1.0)
        return StyleFile(
            style=EncodedStyle(tensors["style_tokens"], tensors.get("text_embeds")),
            name=clean_name(str(metadata["name"])),
            thumbnail=tensors["thumbnail"],
            encoder=str(metadata["style_encoder"]),
            bundle=clean_name(str(metadata["bundle"])),
            sources=tuple((clean_name(str(name)), float(share)) for name, share in metadata["sources"]),
            stroke_size=None if stroke_size is None else float(stroke_size),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise damaged from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The opened file, its header checked. Errors in the block are raised as MediaError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        if _begins_like_one(path):
            raise MediaError(f"{path} is damaged or truncated ({reason(error)}); {_again(path)}") from error
        raise MediaError(f"{path} is not a {SUFFIX} file despite its name; make one: {_MAKE}") from error


def _begins_like_one(path: Path) -> bool:
    """A safetensors file begins with the length of its header, 8 bytes, and the header's brace."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def _read_metadata(path: Path, file: Any) -> dict[str, Any]:
    """The metadata. Raises MediaError if the file is something else, or from a later std-rt."""
    text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise MediaError(f"{path} {_what_else(list(file.keys()))}")
    try:
        metadata = json.loads(text)
        version = int(metadata["format_version"])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise MediaError(f"{path} is damaged (its metadata cannot be read); {_again(path)}") from error
    if version > FORMAT_VERSION:
        raise MediaError(
            f"{path} is a style file of version {version} and this std-rt reads up to {FORMAT_VERSION}; "
            f"upgrade std-rt: {upgrade_hint()}"
        )
    return dict(metadata)


def _what_else(keys: list[str]) -> str:
    if any("lora" in key.lower() for key in keys):
        return f"is a LoRA, not a style; use it with std-rt export --lora, or make a style: {_MAKE}"
    found = f"{len(keys)} tensors, the first {min(keys)[:60]!r}" if keys else "no tensors"
    return f"is not a style file (it contains {found}); make one: {_MAKE}"


def _read_tensors(path: Path, file: Any) -> dict[str, NDArray[Any]]:
    """The arrays of a style, their types and shapes checked before anything is read."""
    keys = set(file.keys())
    lacking = sorted({"style_tokens", "thumbnail"} - keys)
    if lacking:
        raise MediaError(f"{path} is damaged ({lacking[0]} is missing); {_again(path)}")
    for name in sorted(keys & _DTYPES.keys()):
        found = file.get_slice(name).get_dtype()
        if found != _DTYPES[name]:
            raise MediaError(
                f"{path} is damaged ({name} is stored as {found} instead of {_DTYPES[name]}); {_again(path)}"
            )
    tensors = {name: np.array(file.get_tensor(name)) for name in sorted(keys & _DTYPES.keys())}
    problem = _array_problem(tensors)
    if problem:
        raise MediaError(f"{path} is damaged ({problem}); {_again(path)}")
    return tensors


def _array_problem(tensors: dict[str, NDArray[Any]]) -> str:
    """Why the arrays are not those of a style; "" if they are."""
    for name, ndim in (("style_tokens", 3), ("text_embeds", 2)):
        value = tensors.get(name)
        if value is None:
            continue
        if value.dtype != np.float32:
            return f"{name} is {value.dtype} instead of float32"
        if value.ndim != ndim or value.shape[0] != 1 or not value.size:
            return f"{name} has shape {list(value.shape)} instead of {ndim} axes, the first of 1"
        if not np.isfinite(value).all():
            return f"{name} contains NaN or infinite numbers"
    small = tensors["thumbnail"]
    if small.dtype != np.uint8 or small.ndim != 3 or small.shape[2] != 3 or not small.size:
        return f"thumbnail is {small.dtype} {list(small.shape)} instead of uint8 [h, w, 3]"
    if max(small.shape[:2]) > THUMBNAIL_PX:
        return f"thumbnail is {small.shape[1]} x {small.shape[0]} px, the limit is {THUMBNAIL_PX}"
    return ""


def _shape_problem(style: EncodedStyle, bundle: Bundle) -> str:
    expected = [1, int(bundle.style["tokens"]), int(bundle.style["dim"])]
    if list(style.tokens.shape) != expected:
        return f"its tokens are {list(style.tokens.shape)} instead of {expected}"
    if (style.text_embeds is not None) != bool(bundle.style["gives_text_embeds"]):
        return f"it has {'no ' if style.text_embeds is None else ''}text_embeds"
    if style.text_embeds is not None:
        width = bundle.graph_outputs("style_encoder").get("text_embeds", [0])[-1]
        if style.text_embeds.shape[1] != width:
            return f"its text_embeds are {list(style.text_embeds.shape)} instead of [1, {width}]"
    return ""
