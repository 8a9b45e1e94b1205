"""The data of a distillation of pictures: shuffled, sharded, cropped, encoded, and resumable.

A sample is a function of (seed, bucket, epoch, position) and of the files, and of nothing else: the order
in which threads finish, what was read ahead and when a run was killed do not change it.

- Each bucket (size by aspect ratio) has its own epochs. Its order in an epoch is a permutation that all
  ranks share; rank r takes positions r, r + world, ... So ranks are disjoint within an epoch and together
  see everything once. A bucket with fewer pictures than ranks wraps round: rank r then takes picture
  r modulo their number, cropped in its own way.
- A file that turns out broken is counted and named, and the next one of its bucket takes its place.
- With a cache, latents and embeddings of samples are kept on disk. Crops are then centred (a mirror image is
  a second file), the style crop of each file is fixed, a clip gives one of ``CLIP_FRAMES`` frames, and
  missing samples are encoded one by one: batches of another size differ in their last bits, and a resumed
  run finds more files there than the unbroken one did.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from std_rt.core.errors import RecipeError
from std_rt.core.files import write_bytes
from std_rt.training.data.buckets import Size, bucket_sizes, nearest_bucket, place
from std_rt.training.data.picture_set import Frame, random_crop
from std_rt.training.data.pictures import BrokenFileError, Entry, draw_frame, index_pictures, read_frame
from std_rt.training.distil.base import Base, Conditioning, Fresh, cat
from std_rt.training.run.recipe import PicturesConfig
from std_rt.training.run.sheet import to_tensor

__all__ = ["CLIP_FRAMES", "PictureSource"]

CLIP_FRAMES = 16  # of a clip that are used with a cache, evenly spaced

_CACHE_VERSION = 1
_ORDER, _SAMPLE = 1, 2  # what a random generator is for
_LOG = logging.getLogger(__name__)

Place = tuple[int, int]  # epoch, position in its order
Encoded = tuple[Tensor, Conditioning]  # [n, C, h, w], n rows; on the CPU


@dataclass(frozen=True)
class _Sample:
    """One sample, read and cropped or found in the cache."""

    name: str
    caption: str
    broken: dict[str, str]  # files that it could not take
    key: str = ""  # in the cache
    stored: Encoded | None = None  # found there, and then nothing below
    time_ids: tuple[int, ...] = ()
    frames: tuple[Frame, ...] = ()  # [H, W, 3] of the bucket's size; [S, S, 3] if the base takes styles


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
    ) -> None:
        self.config, self.base, self.rank, self.world = config, base, rank, world
        sizes = bucket_sizes(config.resolution_px, base.multiple, config.buckets)
        index = index_pictures(config, quiet=rank > 0)
        self.broken = dict(index.broken)  # name -> reason; those found while reading come to it
        self._named = 0  # of those, in the log
        groups: dict[Size, list[Entry]] = {size: [] for size in sizes}
        for entry in index.entries:
            groups[nearest_bucket(entry.size, sizes)].append(entry)
        self._buckets = {self._shape(s): _Bucket(s, e, seed) for s, e in groups.items() if e}
        self.shapes: list[Size] = list(self._buckets)
        counts = np.array([len(b.entries) for b in self._buckets.values()], np.float64)
        self.weights: NDArray[np.float64] = counts / counts.sum()
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
        z, cond = self._encoded(samples)
        bucket.epoch, bucket.taken = after
        # As many again as were just asked for is the best guess of the next call.
        self._read_ahead(bucket, bucket.ahead(max(n, self.config.workers), self.rank, self.world)[0])
        return Fresh(z, z, z, cond, [sample.name for sample in samples])

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
        if self._cache is None:
            index, key, stored = draw_frame(entry, rng), "", None
        else:
            index = _spread_frame(entry, rng)
            key = self._cache.key(entry, index, size, flip)
            stored = self._cache.read(key, entry.caption)
            # Not from the visit, so that the file is the same whoever makes it.
            rng = np.random.default_rng(int(key[:16], 16))
        name = f"{entry.name}#{index}" if entry.frames else entry.name
        if stored is not None:
            return _Sample(name, entry.caption, broken, key, stored)
        frame = read_frame(entry, index)
        centred = self.config.centre or self._cache is not None
        placed = place(frame.shape[:2], size, None if centred else rng, flip)
        frames: tuple[Frame, ...] = (placed.apply(frame),)
        if self.base.style_encoder is not None:
            frames += (random_crop(frame, self.base.style_px, rng),)
        return _Sample(name, entry.caption, broken, key, None, placed.time_ids, frames)

    # --- encoding, in the caller's thread ------------------------------------------------------------

    def _encoded(self, samples: list[_Sample]) -> Encoded:
        if self._cache is None:
            return self._encode(samples)
        made: dict[str, Encoded] = {}
        rows = []
        for sample in samples:
            row = sample.stored or made.get(sample.key)
            if row is None:
                row = made[sample.key] = self._encode([sample])
                self._cache.write(sample.key, sample.caption, row)
            rows.append(row)
        return torch.cat([z for z, _ in rows]), cat([cond for _, cond in rows])

    def _encode(self, samples: Sequence[_Sample]) -> Encoded:
        """Latents and conditioning of samples of one size, as one batch."""
        z = self.base.encode(to_tensor([s.frames[0] for s in samples])).float().cpu()
        styles = None
        if self.base.style_encoder is not None:
            styles = to_tensor([s.frames[1] for s in samples]).to(next(self.base.style_encoder.parameters()))
        time_ids = torch.tensor([s.time_ids for s in samples], dtype=torch.float32)
        cond = self.base.condition([s.caption for s in samples], styles, time_ids)
        return z, cond.to("cpu")

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


def _spread_frame(entry: Entry, rng: np.random.Generator) -> int:
    """One of ``CLIP_FRAMES`` evenly spaced frames of a clip; 0 for a picture."""
    if not entry.frames:
        return 0
    return entry.frames * (2 * int(rng.integers(CLIP_FRAMES)) + 1) // (2 * CLIP_FRAMES)


class _Cache:
    """Encoded samples on disk, two files each: what depends on the picture, and what on the caption alone.

    Captions are few where pictures are many (often there is one), and SDXL's text tokens are ten times
    larger than latents.
    """

    def __init__(self, folder: Path, base: Base) -> None:
        self.folder = folder
        self.of_text = ("context", "pooled") if base.style_encoder is None else ()
        self.made_by = [_CACHE_VERSION, base.digest, base.style_px, _identity(base)]

    def key(self, entry: Entry, index: int, size: Size, flip: bool) -> str:
        """Name of a sample's file. Raises BrokenFileError if the picture is gone."""
        try:
            about, path = entry.path.stat(), entry.path.resolve()
        except OSError as error:
            raise BrokenFileError(error.strerror or str(error)) from error
        picture = [str(path), about.st_size, about.st_mtime_ns, entry.offset, index]
        return _sha256(self.made_by, picture, size, flip)

    def _files(self, key: str, caption: str) -> list[Path]:
        keys = [key, _sha256(self.made_by, caption)] if self.of_text else [key]
        return [self.folder / k[:2] / f"{k}.safetensors" for k in keys]

    def read(self, key: str, caption: str) -> Encoded | None:
        """The sample that `write` stored; None if it is missing or damaged."""
        tensors: dict[str, Tensor] = {}
        try:
            for path in self._files(key, caption):
                part = load(path.read_bytes())
                if int(part.pop("crc32")) != _crc32(part):
                    return None
                tensors |= part
            z = tensors.pop("z")
            return z, Conditioning(**tensors)
        except (OSError, SafetensorError, KeyError, TypeError):
            return None

    def write(self, key: str, caption: str, row: Encoded) -> None:
        """Keep one encoded sample; RecipeError if the folder cannot be written."""
        z, cond = row
        tensors = {"z": z} | {k: v for k, v in vars(cond).items() if v is not None}
        parts = [{k: v for k, v in tensors.items() if k not in self.of_text}]
        parts += [{k: tensors[k] for k in self.of_text}] if self.of_text else []
        try:
            for path, part in zip(self._files(key, caption), parts, strict=True):
                _write_whole(path, part)
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


def _sha256(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode("utf-8")).hexdigest()


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
