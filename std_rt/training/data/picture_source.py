"""The data of a distillation of pictures: shuffled, sharded, cropped, encoded, and resumable.

A sample is a function of (seed, bucket, epoch, position) and of the files, and of nothing else: the order
in which threads finish, what was read ahead and when a run was killed do not change it.

- Each bucket (size by aspect ratio) has its own epochs. Its order in an epoch is a permutation that all
  ranks share; rank r takes positions r, r + world, ... So ranks are disjoint within an epoch and together
  see everything once. A bucket with fewer pictures than ranks wraps round: rank r then takes picture
  r modulo their number, cropped in its own way.
- A file that turns out broken is counted and named, and the next one of its bucket takes its place.
- A base that takes styles gets one with each sample, by the recipe's pairing; where that is any picture, the
  style picture is also what the discriminator takes for real (nothing else is known to be in that style).
- For a base with a motion adapter a sample is so many frames of a clip, with one crop and one mirroring. Its
  style is a picture or a frame, never a clip; as what is real, the picture stands still.
- With a cache, latents and embeddings are kept on disk. Crops are then centred (a mirror image is a second
  file), a style picture has ``style.crops`` crops, a clip gives one of ``CLIP_FRAMES`` frames, and what is
  missing is encoded one by one: batches of another size differ in their last bits, and a resumed run finds
  more files there than the unbroken one did.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from std_rt.core.arrays import Size
from std_rt.core.errors import RecipeError
from std_rt.core.files import write_bytes
from std_rt.training.data.buckets import bucket_sizes, nearest_bucket, place
from std_rt.training.data.picture_set import Frame, random_crop
from std_rt.training.data.pictures import (
    BrokenFileError,
    Entry,
    Index,
    draw_frame,
    index_pictures,
    read_clip,
    read_frame,
)
from std_rt.training.distil.base import Base, Conditioning, Fresh, Motion, StyleCode
from std_rt.training.run.recipe import PicturesConfig, StyleConfig
from std_rt.training.run.sheet import to_tensor

__all__ = ["CLIP_FRAMES", "PictureSource", "long_clips"]

CLIP_FRAMES = 16  # of a clip that are used with a cache, evenly spaced

_CACHE_VERSION = 2
_ORDER, _SAMPLE = 1, 2  # what a random generator is for
_LOG = logging.getLogger(__name__)

Place = tuple[int, int]  # epoch, position in its order
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class _View:
    """A picture, a frame of a clip, or some frames of one; read when it is first looked at."""

    entry: Entry
    index: int = 0
    motion: Motion | None = None  # with it, so many frames from ``index`` on

    @cached_property
    def pixels(self) -> Frame:
        """Upright, ``[H, W, 3]`` or ``[T, H, W, 3]``; raises BrokenFileError."""
        if self.motion is None:
            return read_frame(self.entry, self.index)
        return read_clip(self.entry, self.index, self.motion.frames, self.motion.interval)

    def identity(self) -> list[Any]:
        """Identifies the file as it is now. Raises BrokenFileError if it is gone."""
        try:
            about, path = self.entry.path.stat(), self.entry.path.resolve()
        except OSError as error:
            raise BrokenFileError(error.strerror or str(error)) from error
        shown = [] if self.motion is None else [self.motion.frames, self.motion.interval]
        return [str(path), about.st_size, about.st_mtime_ns, self.entry.offset, self.index, *shown]


@dataclass(frozen=True)
class _Part:
    """Something to encode, or found in the cache."""

    key: str  # in the cache
    stored: Tensors | None  # found there, each tensor with one row, and then nothing below
    raw: Frame | str = ""  # [H, W, 3] of the size that is encoded, of a clip [T, H, W, 3], or a caption
    time_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Sample:
    """One sample, read and cropped or found in the cache."""

    name: str
    broken: dict[str, str]  # files that it could not take
    picture: _Part
    text: _Part | None  # if the base reads text
    style: _Part | None  # if the base takes styles
    real: _Part | None  # the style picture in the bucket's size, where the pairing is "any"


class _Styles:
    """Which picture a sample takes its style from."""

    def __init__(self, config: StyleConfig, pictures: PicturesConfig, own: list[Entry], quiet: bool) -> None:
        self.pairing, self.entries = config.pairing, own
        if config.folder:
            kind = "auto" if pictures.kind == "videos" else pictures.kind
            folder = replace(pictures, folder=config.folder, caption_key="", kind=kind)
            self.entries = index_pictures(folder, quiet, "style.folder").entries
        self._groups: dict[str, list[Entry]] = {}
        for entry in self.entries:
            self._groups.setdefault(_group(entry), []).append(entry)
        if config.pairing == "style":
            self._check(own, config.folder or pictures.folder, quiet)

    def _check(self, own: list[Entry], folder: str, quiet: bool) -> None:
        alone = [entry.name for entry in own if not _group(entry) or not self._others(entry)]
        if len(alone) == len(own):
            raise RecipeError(
                f'style.pairing = "style" takes the folder of a picture for its style, and in {folder} '
                f'no picture has another of its own ({alone[0]}); sort them into folders, or set it to "any"'
            )
        if alone and not quiet:
            _LOG.warning(
                "%d pictures have no other of their style in %s and take a crop of themselves (%s%s)",
                len(alone), folder, ", ".join(alone[:5]), ", ..." if len(alone) > 5 else "",
            )  # fmt: skip

    def _others(self, entry: Entry) -> list[Entry]:
        alike = self._groups.get(_group(entry), [])
        return [other for other in alike if (other.path, other.offset) != (entry.path, entry.offset)]

    def draw(self, entry: Entry, rng: np.random.Generator) -> Iterator[Entry] | None:
        """Style pictures for a sample: the one drawn, then those to take if it is broken.

        None: a crop of the sample's own picture.
        """
        if self.pairing == "crop":
            return None
        fitting = self.entries if self.pairing == "any" else self._others(entry)
        if not fitting:
            return None
        first = int(rng.integers(len(fitting)))
        return (fitting[(first + i) % len(fitting)] for i in range(len(fitting)))


def _group(entry: Entry) -> str:
    """The folder that a picture (or a shard's member) lies in: its style; empty at the top."""
    return PurePosixPath(entry.name.rpartition(":")[2]).parent.name


@dataclass
class _Bucket:
    """The pictures of one size, and how far this rank is in them."""

    size: Size
    entries: list[Entry]
    seed: int
    epoch: int = 0
    taken: int = 0  # of this rank's positions in this epoch
    orders: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def rng(self, purpose: int, *more: int) -> np.random.Generator:
        return np.random.default_rng((purpose, self.seed, *self.size, *more))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of an epoch; the last two are kept (threads may both make one: it is the same)."""
        order = self.orders.get(epoch)
        if order is None:
            order = self.orders[epoch] = self.rng(_ORDER, epoch).permutation(len(self.entries))
            self.orders.pop(epoch - 2, None)
        return order

    def ahead(self, n: int, rank: int, world: int) -> tuple[list[Place], Place]:
        """The next ``n`` places of a rank, and (epoch, taken) after them."""
        epoch, taken = self.epoch, self.taken
        mine = range(rank, max(rank + 1, len(self.entries)), world)
        places = []
        for _ in range(n):
            if taken >= len(mine):
                epoch, taken = epoch + 1, 0
            places.append((epoch, mine[taken]))
            taken += 1
        return places, (epoch, taken)

    @property
    def digest(self) -> str:
        """Identifies the list that positions refer to: the names, in order."""
        return hashlib.sha256("\n".join(e.name for e in self.entries).encode("utf-8")).hexdigest()[:16]


class PictureSource:
    """Fresh samples from pictures, clips or shards, by latent size; its state is part of a checkpoint.

    rank, world: this process among all. RecipeError if there is nothing to draw from.
    """

    def __init__(
        self,
        config: PicturesConfig,
        base: Base,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        style: StyleConfig | None = None,
    ) -> None:
        self.config, self.base, self.rank, self.world = config, base, rank, world
        self.style = style or StyleConfig()
        if self.style.used and base.null_tokens is None:
            raise RecipeError(
                f"[style]: {base.name} takes no style pictures; set style.adapter to an IP-Adapter file"
            )
        sizes = bucket_sizes(config.resolution_px, base.multiple, config.buckets)
        if base.motion is None:
            index = index_pictures(config, quiet=rank > 0)
        else:
            index = long_clips(config, base.motion, quiet=rank > 0)
        self.broken = dict(index.broken)  # name -> reason; those found while reading come to it
        self._named = 0  # of those, in the log
        groups: dict[Size, list[Entry]] = {size: [] for size in sizes}
        for entry in index.entries:
            groups[nearest_bucket(entry.size, sizes)].append(entry)
        self._buckets = {self._shape(s): _Bucket(s, e, seed) for s, e in groups.items() if e}
        self.shapes: list[Size] = list(self._buckets)
        counts = np.array([len(b.entries) for b in self._buckets.values()], np.float64)
        self.weights: NDArray[np.float64] = counts / counts.sum()
        takes_style = base.null_tokens is not None
        self._styles = _Styles(self.style, config, index.entries, rank > 0) if takes_style else None
        self._cache = _Cache(Path(config.cache), base) if config.cache else None
        self._pool = ThreadPoolExecutor(config.workers) if config.workers else None
        self._waiting: dict[tuple[Size, Place], Future[_Sample]] = {}

    def _shape(self, size: Size) -> Size:
        return size[0] // self.base.vae_scale, size[1] // self.base.vae_scale

    def take(self, n: int, shape: Size) -> Fresh:
        """The next ``n`` (at least 1) samples of the latent size ``shape``, one of ``shapes``."""
        bucket = self._buckets[shape]
        places, after = bucket.ahead(n, self.rank, self.world)
        samples = self._gather(bucket, places)
        for sample in samples:
            self._note(sample.broken)
        z, real, cond = self._encoded(samples)
        bucket.epoch, bucket.taken = after
        # As many again as were just asked for is the best guess of the next call.
        self._read_ahead(bucket, bucket.ahead(max(n, self.config.workers), self.rank, self.world)[0])
        return Fresh(z, z, real, cond, [sample.name for sample in samples])

    def _gather(self, bucket: _Bucket, places: list[Place]) -> list[_Sample]:
        if self._pool is None:
            return [self._sample(bucket, at) for at in places]
        self._read_ahead(bucket, places)
        return [self._waiting.pop((bucket.size, at)).result() for at in places]

    def _read_ahead(self, bucket: _Bucket, places: list[Place]) -> None:
        if self._pool is None:
            return
        for at in places:
            if (bucket.size, at) not in self._waiting:
                self._waiting[bucket.size, at] = self._pool.submit(self._sample, bucket, at)

    def _note(self, broken: dict[str, str]) -> None:
        for name, reason in broken.items():
            if name in self.broken:
                continue
            self.broken[name] = reason
            self._named += 1
            if self._named <= 5:
                _LOG.warning("%s is broken (%s); using another picture", name, reason)

    # --- one sample, in any thread -------------------------------------------------------------------

    def _sample(self, bucket: _Bucket, at: Place) -> _Sample:
        """The sample of a place; of the next file of the bucket where its own is broken."""
        epoch, position = at
        first, count = bucket.order(epoch)[position % len(bucket.entries)], len(bucket.entries)
        broken: dict[str, str] = {}
        for step in range(count):
            entry = bucket.entries[(first + step) % count]
            try:
                return self._draw(entry, bucket.size, bucket.rng(_SAMPLE, epoch, position), broken)
            except BrokenFileError as error:
                broken[entry.name] = str(error)
        h, w = bucket.size
        raise RecipeError(
            f"none of the {count} pictures near {h} x {w} px in {self.config.folder} can be read "
            f"({entry.name}: {broken[entry.name]}); repair or remove them"
        )

    def _draw(self, entry: Entry, size: Size, rng: np.random.Generator, broken: dict[str, str]) -> _Sample:
        flip = self.config.flip and rng.random() < 0.5
        view = self._view(entry, rng, self.base.motion)
        picture = self._placed(view, size, rng, flip)
        style, real = (None, None) if self._styles is None else self._style(view, size, rng, broken)
        words = self.base.text is not None
        text = replace(self._part("text", entry.caption), raw=entry.caption) if words else None
        name = f"{entry.name}#{view.index}" if entry.frames else entry.name
        return _Sample(name, broken, picture, text, style, real)

    def _view(self, entry: Entry, rng: np.random.Generator, motion: Motion | None = None) -> _View:
        room = entry
        if motion is not None:  # the frame to start at: any with enough after it
            room = replace(entry, frames=entry.frames - _span(motion) + 1)
        index = draw_frame(room, rng) if self._cache is None else _spread_frame(room, rng)
        return _View(entry, index, motion)

    def _style(
        self, view: _View, size: Size, rng: np.random.Generator, broken: dict[str, str]
    ) -> tuple[_Part, _Part | None]:
        """The style of a sample, and what is real beside it if that is not the sample's own picture."""
        assert self._styles is not None
        entries = self._styles.draw(view.entry, rng)
        if entries is None:
            return self._cropped(replace(view, motion=None), rng), None
        for entry in entries:
            other = self._view(entry, rng)
            try:
                style = self._cropped(other, rng)
                return style, self._placed(other, size, rng) if self._styles.pairing == "any" else None
            except BrokenFileError as error:
                broken[entry.name] = str(error)
        raise BrokenFileError("no style picture for it can be read")

    def _part(self, *what: Any) -> _Part:
        """Something to encode by what identifies it, with what the cache has of it."""
        if self._cache is None:
            return _Part("", None)
        key = self._cache.key([x.identity() if isinstance(x, _View) else x for x in what])
        return _Part(key, self._cache.read(key))

    def _placed(self, view: _View, size: Size, rng: np.random.Generator, flip: bool = False) -> _Part:
        """A picture in the size of a bucket."""
        part = self._part("picture", view, size, flip)
        if part.stored is not None:
            return part
        centred = self.config.centre or self._cache is not None
        height, width = view.pixels.shape[-3:-1]
        placed = place((height, width), size, None if centred else rng, flip)
        clip = view.pixels if view.motion else view.pixels[None]
        shown = [placed.apply(frame) for frame in clip]
        return replace(part, raw=np.stack(shown) if view.motion else shown[0], time_ids=placed.time_ids)

    def _cropped(self, view: _View, rng: np.random.Generator) -> _Part:
        """A style picture as its encoder takes it: any crop, or with a cache one of a few."""
        if self._cache is None:
            return _Part("", None, random_crop(view.pixels, self.base.style_px, rng))
        return self._crop(view, int(rng.integers(self.style.crops)))

    def _crop(self, view: _View, number: int) -> _Part:
        """One of the crops that the cache keeps."""
        part = self._part("style", view, number)
        if part.stored is not None:
            return part
        # Not from the visit, so that the file is the same whoever makes it.
        rng = np.random.default_rng(int(part.key[:16], 16))
        return replace(part, raw=random_crop(view.pixels, self.base.style_px, rng))

    # --- encoding, in the caller's thread ------------------------------------------------------------

    def _encoded(self, samples: Sequence[_Sample]) -> tuple[Tensor, Tensor, Conditioning]:
        """Latents, real latents and conditioning of samples of one size, on the CPU."""
        pictures = self._encode([s.picture for s in samples], self._latents)
        texts = self._encode([s.text for s in samples if s.text is not None], self._words)
        styles = self._encode([s.style for s in samples if s.style is not None], self._tokens)
        cond = self.base.condition(
            (texts["context"], texts["pooled"]) if texts else None,
            StyleCode(**styles) if styles else None,
            pictures["time_ids"],
            pictures["z"],
        )
        real = self._encode([s.real for s in samples if s.real is not None], self._latents)
        if real and self.base.motion is not None:
            real["z"] = real["z"][:, :, None].repeat(1, 1, self.base.motion.frames, 1, 1)
        return pictures["z"], real["z"] if real else pictures["z"], cond

    def _encode(self, parts: list[_Part], encode: Callable[[list[_Part]], Tensors]) -> Tensors:
        """Rows of all parts: in one batch, or with a cache each by itself, if it is not there."""
        if self._cache is None:
            return encode(parts) if parts else {}
        made: dict[str, Tensors] = {}
        for part in parts:
            if part.key not in made:
                made[part.key] = encode([part]) if part.stored is None else part.stored
                if part.stored is None:
                    self._cache.write(part.key, made[part.key])
        names = made[parts[0].key] if parts else {}
        return {name: torch.cat([made[part.key][name] for part in parts]) for name in names}

    def _latents(self, parts: list[_Part]) -> Tensors:
        frames = [np.asarray(p.raw) for p in parts]
        if frames[0].ndim == 3:
            z = self.base.encode(to_tensor(frames)).float().cpu()
        else:
            # Clip by clip: decoders and encoders of pictures take much more memory than what they give.
            clips = [self.base.encode(to_tensor(list(clip))).float().cpu() for clip in frames]
            z = torch.stack(clips).transpose(1, 2).contiguous()
        return {"z": z, "time_ids": torch.tensor([p.time_ids for p in parts], dtype=torch.float32)}

    def _words(self, parts: list[_Part]) -> Tensors:
        found = self.base.read_text([str(p.raw) for p in parts])
        assert found is not None
        return {"context": found[0].cpu(), "pooled": found[1].cpu()}

    def _tokens(self, parts: list[_Part]) -> Tensors:
        found = self.base.look(to_tensor([np.asarray(p.raw) for p in parts])).map(Tensor.cpu)
        return {name: value for name, value in vars(found).items() if value is not None}

    def precompute_styles(self) -> None:
        """Tokens of every crop of every style picture into the cache; needs one.

        Every process goes through all of them, from another place, and leaves what others have made.
        """
        assert self._styles is not None
        assert self._cache is not None
        entries = self._styles.entries
        start = len(entries) * self.rank // self.world
        turned = [*entries[start:], *entries[:start]]
        for entry in track(turned, "encoding style pictures", transient=True, disable=self.rank > 0):
            try:
                for index in _spread_frames(entry):
                    view = _View(entry, index)
                    crops = [self._crop(view, n) for n in range(self.style.crops)]
                    self._encode(crops, self._tokens)
            except BrokenFileError as error:
                self._note({entry.name: str(error)})

    # --- resuming ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able: how far this rank is in each bucket, and the broken files so far."""
        return {
            "world": self.world,
            "broken": dict(self.broken),
            "buckets": {
                f"{h}x{w}": {"epoch": b.epoch, "position": b.taken, "pictures": b.digest}
                for (h, w), b in self._buckets.items()
            },
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state()`` of this rank.

        Where a bucket's pictures or the number of ranks have changed, positions would refer to other
        pictures: the bucket starts its next epoch, with a warning.
        """
        changed = []
        for (h, w), bucket in self._buckets.items():
            kept = state["buckets"].get(f"{h}x{w}", {"epoch": -1})
            if state["world"] == self.world and kept.get("pictures") == bucket.digest:
                bucket.epoch, bucket.taken = kept["epoch"], kept["position"]
            else:
                bucket.epoch, bucket.taken = kept["epoch"] + 1, 0
                changed.append(f"{h}x{w}")
        if changed and self.rank == 0:
            _LOG.warning(
                "pictures or processes differ from the checkpoint's; a new epoch begins for latents of %s",
                ", ".join(changed),
            )
        self.broken |= state["broken"]
        self._drop_waiting()

    def _drop_waiting(self) -> None:
        for future in self._waiting.values():
            future.cancel()
        self._waiting.clear()

    def close(self) -> None:
        """End the threads; the source cannot be used after."""
        self._drop_waiting()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _span(motion: Motion) -> int:
    """Frames of a clip that a sample reaches over."""
    return (motion.frames - 1) * motion.interval + 1


def long_clips(config: PicturesConfig, motion: Motion, quiet: bool) -> Index:
    """The clips of a folder that are long enough; RecipeError if there is none."""
    index = index_pictures(replace(config, kind="videos"), quiet)
    span, what = _span(motion), f"{motion.frames} frames at an interval of {motion.interval}"
    fitting = [entry for entry in index.entries if entry.frames >= span]
    short = [entry for entry in index.entries if entry.frames < span]
    if not fitting:
        longest = max(short, key=lambda entry: entry.frames)
        possible = (longest.frames - 1) // (motion.frames - 1)
        remedy = f"set motion.interval = {possible}" if possible else "set fewer motion.frames"
        raise RecipeError(
            f"no clip in {config.folder} has the {span} frames that {what} need; the longest is "
            f"{longest.name} with {longest.frames}: {remedy}, or give longer clips"
        )
    if short and not quiet:
        named = ", ".join(f"{entry.name} {entry.frames}" for entry in short[:5])
        _LOG.warning(
            "left out %d clips with fewer than the %d frames that %s need (%s%s)",
            len(short), span, what, named, ", ..." if len(short) > 5 else "",
        )  # fmt: skip
    return Index(fitting, index.broken)


def _spread_frames(entry: Entry) -> list[int]:
    """``CLIP_FRAMES`` evenly spaced frames of a clip (or places to start at); of a picture, 0."""
    if not entry.frames:
        return [0]
    return [entry.frames * (2 * i + 1) // (2 * CLIP_FRAMES) for i in range(CLIP_FRAMES)]


def _spread_frame(entry: Entry, rng: np.random.Generator) -> int:
    """One of `_spread_frames`."""
    frames = _spread_frames(entry)
    return frames[int(rng.integers(len(frames)))] if entry.frames else 0


class _Cache:
    """What was encoded, on disk: a file for each picture in each size, each style crop and each caption.

    Captions are few where pictures are many (often there is one), and SDXL's text tokens are ten times
    larger than latents.
    """

    def __init__(self, folder: Path, base: Base) -> None:
        self.folder = folder
        self.made_by = [_CACHE_VERSION, base.digest, base.style_px, _identity(base)]

    def key(self, values: list[Any]) -> str:
        """Name of a file."""
        return hashlib.sha256(json.dumps([self.made_by, values]).encode("utf-8")).hexdigest()

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> Tensors | None:
        """What `write` stored; None if it is missing or damaged."""
        try:
            tensors = load(self._file(key).read_bytes())
            return tensors if int(tensors.pop("crc32")) == _crc32(tensors) else None
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, key: str, tensors: Tensors) -> None:
        """Keep what was encoded; RecipeError if the folder cannot be written."""
        try:
            _write_whole(self._file(key), tensors)
        except OSError as error:
            raise RecipeError(
                f"pictures.cache = {str(self.folder)!r} cannot be written ({error.strerror or error}); "
                "free some room, set another folder, or '' for no cache"
            ) from None


def _write_whole(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file that appears whole or not at all, even if two processes write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {k: v.contiguous() for k, v in tensors.items()}
    write_bytes(path, save(whole | {"crc32": torch.tensor(_crc32(whole))}))


def _crc32(tensors: dict[str, Tensor]) -> int:
    """Over all bytes: safetensors notices a file that is cut off, but not a changed byte."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes(), crc)
    return crc


def _identity(base: Base) -> str:
    """Identifies the networks that encode: shapes and a thousand values of each of their weights.

    A sample of the values, because hashing gigabytes of text encoders would take longer than it saves.
    """
    scaling = [getattr(base.vae.config, name, None) for name in ("scaling_factor", "shift_factor")]
    digest = hashlib.sha256(repr(scaling).encode("utf-8"))
    pipeline = base.text.pipeline if base.text is not None else None
    texts = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    for part in (base.vae, base.style_encoder, *texts):
        if isinstance(part, nn.Module):
            for name, value in part.state_dict().items():
                some = value.detach().flatten()[:: max(1, value.numel() // 1000)].cpu().float()
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(some.numpy().tobytes())
    return digest.hexdigest()
