"""The plan of a job: which input in which style becomes which file, and what of that is finished already."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from std_rt.bulk import places
from std_rt.core.errors import MediaError, UsageError
from std_rt.core.files import missing, reason
from std_rt.media.image import PICTURE_SUFFIXES, WRITABLE_SUFFIXES
from std_rt.media.sources import VIDEO_SUFFIXES
from std_rt.media.video.transcode import CLIP_SUFFIXES

__all__ = ["ITEM", "Wish", "is_clip_name", "item_key", "name_outputs", "wishes"]

ITEM = pa.schema(
    [
        ("key", pa.string()),
        ("input", pa.string()),
        ("style", pa.string()),
        ("strength", pa.float64()),
        ("output", pa.string()),
    ]
)
"""One item: its key (`item_key`), where the input and the style are, and the output's path inside -o."""

_LISTS = (".txt", ".csv", ".parquet")
_TAG = 8  # hex digits that tell outputs apart whose names would be the same


@dataclass(frozen=True, slots=True)
class Wish:
    """One input in one style, and the path of its output before names that are alike are told apart."""

    input: str
    style: str
    strength: float
    name: str

    @property
    def identity(self) -> str:
        """What makes it another item than any other."""
        return f"{self.input}|{self.style}|{self.strength!r}"


@dataclass(frozen=True, slots=True)
class _Source:
    """An input, its path inside the folder that was named, and what a list says of it."""

    place: str
    name: str
    style: str | None = None
    strength: float | None = None


def is_clip_name(name: str) -> bool:
    """Whether a file's name is that of a clip; contents decide when it is read."""
    return PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def wishes(
    inputs: Sequence[str], styles: Sequence[str], strength: float = 1.0, *, out: str = ""
) -> list[Wish]:
    """Every input in every style, or in the style that its list names; each once, in the order given.

    ``inputs``: pictures, clips, folders (with what is below them; ``out`` left out), patterns, and lists:
    ``.txt`` (a path a line), ``.csv`` and ``.parquet`` (columns input and perhaps style and strength; an
    empty cell is as if it were not there). Paths in a list are relative to it. Raises MediaError for a list,
    folder or pattern that gives nothing, UsageError if an input has no style.
    """
    chosen = [places.absolute(style) for style in styles]
    labels = _labels(chosen) if len(chosen) > 1 else dict.fromkeys(chosen, "")
    found: dict[str, Wish] = {}
    for source in _sources(inputs, out):
        name = _output_name(source.name)
        own = strength if source.strength is None else source.strength
        for style in [source.style] if source.style else chosen:
            label = "" if source.style else labels[style]
            wish = Wish(source.place, style, own, f"{label}/{name}" if label else name)
            found.setdefault(wish.identity, wish)
        if not (source.style or chosen):
            raise UsageError(
                f"{source.place} has no style; add --style art.png, or a column style to its list"
            )
    return list(found.values())


def _labels(styles: Sequence[str]) -> dict[str, str]:
    """A folder for each style: its file's name, with a number if two are alike."""
    count = Counter[str]()
    labels = {}
    for style in dict.fromkeys(styles):
        stem = PurePosixPath(style.replace("\\", "/")).stem
        count[stem.casefold()] += 1
        labels[style] = stem if count[stem.casefold()] == 1 else f"{stem}-{_digest(style)[:_TAG]}"
    return labels


def _sources(inputs: Sequence[str], out: str) -> Iterator[_Source]:
    for text in inputs:
        place = places.absolute(text)
        path = places.opened(place)[1]
        if PurePosixPath(text).suffix.lower() in _LISTS:
            yield from _listed_sources(place)
        elif places.stats([place])[0][0] >= 0:
            yield _Source(place, PurePosixPath(path.replace("\\", "/")).name)
        elif any(mark in text for mark in "*?["):
            found = places.matching(place)
            if not found:
                raise MediaError(missing(text))
            yield from (_Source(each, PurePosixPath(each.replace("\\", "/")).name) for each in found)
        else:
            yield from _folder_sources(place, out)


def _folder_sources(folder: str, out: str) -> Iterator[_Source]:
    known = PICTURE_SUFFIXES | VIDEO_SUFFIXES
    inside = f"{out[len(folder) :].strip('/')}/" if out.startswith(f"{folder}/") else None
    names = [
        name
        for name in places.listed(folder)
        if PurePosixPath(name).suffix.lower() in known and not (inside and name.startswith(inside))
    ]
    if not names:
        raise MediaError(
            f"{folder} is no file, and no folder with pictures or clips in it; check the spelling"
        )
    yield from (_Source(places.joined(folder, name), name) for name in names)


def _listed_sources(place: str) -> Iterator[_Source]:
    """The rows of a list. Their names are those of the files, under the folder next to the list."""
    folder = place.rpartition("/")[0] if places.is_address(place) else str(PurePosixPath(place).parent)
    rows = _read_list(place)
    if not rows:
        raise MediaError(f"{place} lists nothing; give it one input a row")
    for row in rows:
        text = str(row["input"])
        is_own = places.is_address(text) or PurePosixPath(text).is_absolute()
        name = PurePosixPath(text).name if is_own or ".." in PurePosixPath(text).parts else text
        source, style = (
            given if not given or places.is_address(given) else places.joined(folder, given)
            for given in (text, str(row.get("style") or ""))
        )
        strength = row.get("strength")
        yield _Source(source, name, style or None, None if strength in (None, "") else float(strength))


def _read_list(place: str) -> list[dict[str, Any]]:
    suffix = PurePosixPath(place).suffix.lower()
    try:
        with places.fetched(place) as path:
            if suffix == ".txt":
                lines = path.read_text(encoding="utf-8").splitlines()
                return [{"input": line.strip()} for line in lines if line.strip()]
            table = csv.read_csv(path) if suffix == ".csv" else parquet.read_table(path)
    except FileNotFoundError:
        raise MediaError(missing(place)) from None
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise MediaError(f"{place} cannot be read as a list: {reason(error)}") from error
    if "input" not in table.column_names:
        raise MediaError(f"{place} has no column input; it has {', '.join(table.column_names)}")
    rows = table.select([name for name in ("input", "style", "strength") if name in table.column_names])
    return [row for row in rows.to_pylist() if row["input"]]


def _output_name(name: str) -> str:
    """The path of a result: its input's, with a suffix that can be written."""
    path = PurePosixPath(name)
    writable, usual = (CLIP_SUFFIXES, ".mp4") if is_clip_name(name) else (WRITABLE_SUFFIXES, ".png")
    is_kept = path.suffix.lower() in writable and path.suffix.lower() != ".gif"
    return str(path if is_kept else path.with_suffix(usual))


def name_outputs(found: Sequence[Wish], taken: Mapping[str, str]) -> list[str]:
    """A path for each wish, no two alike on any file system, none that ``taken`` gives to another.

    ``taken``: identities by the outputs that earlier runs wrote. Where names would be alike, each gets eight
    digits of its identity's hash; that depends on nothing but the item itself.
    """
    count = Counter(_folded(wish.name) for wish in found)
    owners = {_folded(name): identity for name, identity in taken.items()}
    names = []
    for wish in found:
        folded = _folded(wish.name)
        alone = count[folded] == 1 and owners.get(folded, wish.identity) == wish.identity
        names.append(wish.name if alone else _tagged(wish))
    twins = [name for name, times in Counter(map(_folded, names)).items() if times > 1]
    if twins:
        raise UsageError(
            f"two inputs would become {twins[0]}; give them to two commands with other -o folders"
        )
    return names


def _tagged(wish: Wish) -> str:
    path = PurePosixPath(wish.name)
    return str(path.with_name(f"{path.stem}-{_digest(wish.identity)[:_TAG]}{path.suffix}"))


def _folded(name: str) -> str:
    """The name as file systems see it that ignore case and spell accents in their own way."""
    return unicodedata.normalize("NFC", name).casefold()


def item_key(wish: Wish, source: places.Stat, style: places.Stat, made_by: str) -> str:
    """The key of an item: another if the input or style (size or time), the bundle or an option changes.

    ``made_by``: the bundle's digest and the options that change pictures.
    """
    return _digest(json.dumps([wish.identity, source, style, made_by]))[:32]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def items(found: Sequence[Wish], made_by: str, taken: Mapping[str, str]) -> pa.Table:
    """The plan as a table of `ITEM` rows."""
    all_places = list(dict.fromkeys(place for wish in found for place in (wish.input, wish.style)))
    known = dict(zip(all_places, places.stats(all_places), strict=True))
    keys = [item_key(wish, known[wish.input], known[wish.style], made_by) for wish in found]
    columns: Iterable[Sequence[Any]] = (
        keys,
        [wish.input for wish in found],
        [wish.style for wish in found],
        [wish.strength for wish in found],
        name_outputs(found, taken),
    )
    return pa.table([pa.array(column) for column in columns], schema=ITEM)
