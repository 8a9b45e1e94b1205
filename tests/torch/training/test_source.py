"""What a distillation draws: shares, ranks, resuming, stand-ins for broken files, the cache."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.media_samples import make_clip
from torch import Tensor, nn

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import NoiseSchedule
from std_rt.training.data.picture_source import CLIP_FRAMES, PictureSource
from std_rt.training.distil.base import Base, Conditioning, Fresh, TextEncoders
from std_rt.training.run.recipe import PicturesConfig, StyleConfig

SQUARE = (8, 8)


class FakeVae(nn.Module):
    """[B, 3, H, W] -> [B, 4, H/8, W/8]: means, and their own mean as the fourth channel; counts pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.cat([torch.eye(3), torch.full((1, 3), 1 / 3)]), requires_grad=False)
        self.config = SimpleNamespace(block_out_channels=(1, 1, 1, 1), scaling_factor=0.5, shift_factor=None)
        self.batches: list[int] = []

    def encode(self, images: Tensor) -> SimpleNamespace:
        self.batches.append(len(images))
        pooled = nn.functional.avg_pool2d(images, 8)
        return SimpleNamespace(latents=torch.einsum("bchw,kc->bkhw", pooled, self.mix))


class FakeStyle(nn.Module):
    """[B, 3, S, S] -> tokens [B, 2, 3], pooled [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, styles: Tensor) -> tuple[Tensor, Tensor]:
        assert styles.shape[1:] == (3, 32, 32)
        mean = styles.mean((2, 3)) * self.scale
        return torch.stack([mean, styles.amax((2, 3))], 1), mean


class FakeText(TextEncoders):
    """Captions -> context [B, 2, 3], pooled [B, 4], by length and first letter."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(text_encoder=nn.LayerNorm(3), text_encoder_2=None))
        self.captions: list[str] = []

    def __call__(self, captions: Any) -> tuple[Tensor, Tensor]:
        self.captions += captions
        told = torch.tensor([[len(c), ord((c or " ")[0])] for c in captions], dtype=torch.float32)
        return told[:, :, None].expand(-1, -1, 3), told.repeat(1, 2)


def make_base(style: bool = False) -> Base:
    """A base with the sizes of SDXL's VAE and of a UNet with one level."""
    channels = {"in_channels": 4, "out_channels": 4}
    unet: Any = SimpleNamespace(
        config=SimpleNamespace(block_out_channels=(1,), cross_attention_dim=3, **channels)
    )
    schedule = NoiseSchedule.scaled_linear()
    if style:
        encoder: Any = FakeStyle()
        null = torch.zeros(1, 2, 3)
        return Base(unet, FakeVae(), schedule, "fake", "digest", encoder, style_px=32, null_tokens=null)
    return Base(unet, FakeVae(), schedule, "fake", "digest", text=FakeText())


def write_picture(path: Path, h: int, w: int, seed: int) -> None:
    """Smooth noise around a colour, others for each seed."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(0, 160, 3, dtype=np.uint8)
    small = colour + rng.integers(0, 95, (h // 8, w // 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten squares, five wide and one tall picture, each with a caption."""
    for i in range(16):
        h, w = (72, 72) if i < 10 else (64, 104) if i < 15 else (104, 64)
        write_picture(tmp_path / f"in/{i:02d}.png", h, w, i)
        (tmp_path / f"in/{i:02d}.txt").write_text(f"caption {i}", encoding="utf-8")
    return tmp_path / "in"


@pytest.fixture
def config(folder: Path) -> PicturesConfig:
    return PicturesConfig(str(folder), resolution_px=64, workers=0)


@pytest.fixture
def open_source(request: pytest.FixtureRequest) -> Iterator[Any]:
    """PictureSource with the usual arguments, closed at the end."""
    opened = []

    def build(config: PicturesConfig, base: Base | None = None, **settings: Any) -> PictureSource:
        opened.append(PictureSource(config, base or make_base(), **({"seed": 3} | settings)))
        return opened[-1]

    yield build
    for source in opened:
        source.close()


def same(a: Fresh, b: Fresh) -> bool:
    """Bit for bit."""
    pairs = [(a.z, b.z), *((x, getattr(b.cond, name)) for name, x in vars(a.cond).items())]
    return a.names == b.names and all(
        x is y is None or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs
    )


# --- what comes out ---------------------------------------------------------------------------------


def test_shapes_and_shares(config: PicturesConfig, open_source: Any) -> None:
    source = open_source(config)
    assert dict(zip(source.shapes, source.weights.tolist(), strict=True)) == {
        (6, 10): 5 / 16, SQUARE: 10 / 16, (10, 6): 1 / 16
    }  # fmt: skip
    assert open_source(replace(config, buckets=False)).shapes == [SQUARE]


def test_samples_are_the_pictures_with_their_captions_and_sizes(
    config: PicturesConfig, open_source: Any
) -> None:
    base = make_base()
    fresh = open_source(replace(config, flip=False, centre=True), base).take(3, (6, 10))
    assert fresh.z.shape == (3, 4, 6, 10)
    assert fresh.c is fresh.z
    assert base.vae.batches == [3]
    for row, name in enumerate(fresh.names):
        number = int(Path(name).stem)
        # 64 x 104 covers 48 x 80 at 49 x 80: one row is over.
        assert fresh.cond.time_ids[row].tolist() == [64, 104, 0, 0, 48, 80]
        caption = f"caption {number}"
        assert fresh.cond.pooled[row].tolist() == [len(caption), ord("c")] * 2
        picture = Image.open(Path(config.folder) / name).resize((80, 49), Image.Resampling.BOX)
        means = np.asarray(picture, np.float64)[:48].reshape(6, 8, 10, 8, 3).mean((1, 3)) / 127.5 - 1
        assert np.abs(fresh.z[row, :3].permute(1, 2, 0).numpy() - means / 2).max() < 0.02


def test_crops_and_mirrors_vary_and_are_told(config: PicturesConfig, open_source: Any) -> None:
    source = open_source(replace(config, buckets=False))
    rows = [source.take(16, SQUARE) for _ in range(6)]
    wide = [ids for f in rows for ids in f.cond.time_ids.tolist() if ids[:2] == [64, 104]]
    assert {ids[4] for ids in wide} == {64}
    assert len({ids[3] for ids in wide}) > 8
    assert all(0 <= ids[3] <= 40 and ids[2] == 0 for ids in wide)
    by_name: dict[str, set[bytes]] = {}
    for fresh in rows:
        for name, z in zip(fresh.names, fresh.z, strict=True):
            by_name.setdefault(name, set()).add(z.numpy().tobytes())
    # A square picture differs between visits by its mirror image at least.
    assert all(len(seen) >= 2 for seen in by_name.values())


def test_styles_are_other_crops_of_the_same_pictures(config: PicturesConfig, open_source: Any) -> None:
    fresh = open_source(config, make_base(style=True)).take(4, SQUARE)
    assert fresh.cond.tokens.shape == (4, 2, 3)
    assert fresh.cond.context.abs().sum() == 0
    mean = fresh.z[:, :3].mean((2, 3)) * 2
    apart = torch.cdist(mean, fresh.cond.pooled)
    assert apart.argmin(1).tolist() == [0, 1, 2, 3]
    assert (apart.diagonal() > 1e-4).all()


def test_clips_give_a_random_frame_a_visit(tmp_path: Path, open_source: Any) -> None:
    make_clip(tmp_path / "a.mp4")
    source = open_source(PicturesConfig(str(tmp_path), resolution_px=32, workers=0))
    seen = names(source, 40, source.shapes[0])
    assert {name.split("#")[0] for name in seen} == {"a.mp4"}
    assert len(set(seen)) > 8


# --- styles -----------------------------------------------------------------------------------------


@pytest.fixture
def styles(tmp_path: Path) -> Path:
    """Four pictures, each of one grey: 0, 60, 120, 180."""
    (tmp_path / "styles").mkdir()
    for i in range(4):
        Image.new("RGB", (40, 40), (60 * i,) * 3).save(tmp_path / f"styles/{i}.png")
    return tmp_path / "styles"


def greys(fresh: Fresh) -> list[int]:
    """The grey of each sample's style picture."""
    return [round((float(row) + 1) * 127.5) for row in fresh.cond.pooled[:, 0]]


def test_any_picture_may_be_the_style_and_is_then_what_is_real(
    config: PicturesConfig, open_source: Any, styles: Path
) -> None:
    style = StyleConfig(pairing="any", folder=str(styles))
    fresh = open_source(config, make_base(style=True), style=style).take(24, SQUARE)
    assert set(greys(fresh)) == {0, 60, 120, 180}
    assert greys(fresh) == [round((float(row) / 0.5 + 1) * 127.5) for row in fresh.real.mean((1, 2, 3))]
    assert fresh.c is fresh.z
    assert not torch.equal(fresh.z, fresh.real)


def test_a_base_with_text_gets_captions_and_tokens(
    config: PicturesConfig, open_source: Any, styles: Path
) -> None:
    base = replace(make_base(style=True), text=FakeText())
    style = StyleConfig(pairing="any", folder=str(styles))
    fresh = open_source(config, base, style=style).take(4, SQUARE)
    assert fresh.cond.tokens is not None
    assert fresh.cond.context.shape == (4, 2, 3)
    captions = [f"caption {int(Path(name).stem)}" for name in fresh.names]
    assert fresh.cond.pooled[:, 0].tolist() == [len(c) for c in captions]


def _in_folders(config: PicturesConfig) -> PicturesConfig:
    """Squares 0 to 4 in one folder, 5 to 9 in another; the wide and the tall ones away."""
    root = Path(config.folder)
    for i, path in enumerate(sorted(root.glob("*.png"))):
        path.with_suffix(".txt").unlink()
        if i >= 10:
            path.unlink()
            continue
        (root / "ab"[i // 5]).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (20 * i,) * 3).save(root / "ab"[i // 5] / path.name)
        path.unlink()
    return config


def test_another_picture_of_the_same_style_lies_in_its_folder(
    config: PicturesConfig, open_source: Any
) -> None:
    source = open_source(_in_folders(config), make_base(style=True), style=StyleConfig(pairing="style"))
    seen = set()
    for _ in range(6):
        fresh = source.take(10, SQUARE)
        assert fresh.real is fresh.z
        for name, grey in zip(fresh.names, greys(fresh), strict=True):
            own, other = int(Path(name).stem), grey // 20
            assert own != other
            assert own // 5 == other // 5
            seen.add((own, other))
    assert len(seen) > 25


def test_a_style_folder_has_the_styles_under_the_same_names(
    config: PicturesConfig, open_source: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "art/a").mkdir(parents=True)
    Image.new("RGB", (40, 40), (250,) * 3).save(tmp_path / "art/a/x.png")
    style = StyleConfig(pairing="style", folder=str(tmp_path / "art"))
    fresh = open_source(_in_folders(config), make_base(style=True), style=style).take(10, SQUARE)
    for name, grey in zip(fresh.names, greys(fresh), strict=True):
        assert grey == (250 if name.startswith("a/") else 20 * int(Path(name).stem))
    assert "5 pictures have no other of their style in" in caplog.text


def test_styles_that_cannot_be_paired_are_one_line(
    config: PicturesConfig, open_source: Any, tmp_path: Path
) -> None:
    own = make_base(style=True)
    for base, style, message in (
        (own, StyleConfig(pairing="style"), r'^style\.pairing = "style" takes the folder of'),
        (make_base(), StyleConfig(pairing="any"), r"^\[style\]: fake takes no style pictures; set style\.ad"),
        (own, StyleConfig(pairing="any", folder=str(tmp_path / "no")), r"^style\.folder = .*no"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            open_source(config, base, style=style)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_pairs_are_the_same_after_resuming(
    config: PicturesConfig, open_source: Any, styles: Path, tmp_path: Path, workers: int, cached: bool
) -> None:
    config = replace(config, workers=workers, cache=str(tmp_path / "cache") if cached else "")
    style = StyleConfig(pairing="any", folder=str(styles))
    unbroken = open_source(config, make_base(style=True), style=style)
    unbroken.take(7, SQUARE)
    state = unbroken.state()
    expected = unbroken.take(9, SQUARE)
    resumed = open_source(config, make_base(style=True), style=style)
    resumed.load_state(state)
    found = resumed.take(9, SQUARE)
    assert same(found, expected)
    assert torch.equal(found.real, expected.real)


def test_a_broken_style_picture_is_replaced_and_named(
    config: PicturesConfig, open_source: Any, styles: Path
) -> None:
    _cut(styles / "1.png")
    style = StyleConfig(pairing="any", folder=str(styles))
    source = open_source(config, make_base(style=True), style=style)
    assert set(greys(source.take(24, SQUARE))) == {0, 120, 180}
    assert source.broken.keys() == {"1.png"}
    for path in styles.glob("*.png"):
        _cut(path)
    with pytest.raises(RecipeError, match=r"none of the 10 pictures .*no style picture for it can be read"):
        open_source(config, make_base(style=True), style=style).take(1, SQUARE)


def test_precomputed_styles_leave_nothing_to_look_at(
    cached: PicturesConfig, open_source: Any, styles: Path
) -> None:
    style = StyleConfig(pairing="any", folder=str(styles), crops=3)
    lazy = open_source(replace(cached, cache=f"{cached.cache}-lazy"), make_base(style=True), style=style)
    base = make_base(style=True)
    source = open_source(cached, base, style=style)
    source.precompute_styles()
    assert len(_files(cached)) == 4 * 3
    base.release_style_encoder()
    found, expected = source.take(30, SQUARE), lazy.take(30, SQUARE)
    assert same(found, expected)
    assert torch.equal(found.real, expected.real)
    for path in _files(cached):
        path.unlink()
    with pytest.raises(RecipeError, match=r"not in pictures\.cache, .*run the same command again"):
        open_source(cached, replace(base), style=style).take(1, SQUARE)


def test_every_process_precomputes_what_others_have_not(
    cached: PicturesConfig, open_source: Any, styles: Path
) -> None:
    style = StyleConfig(pairing="any", folder=str(styles), crops=2)
    first, second = (open_source(cached, make_base(style=True), style=style, rank=r, world=2) for r in (0, 1))
    first.precompute_styles()
    before = {path: path.stat().st_mtime_ns for path in _files(cached)}
    second.precompute_styles()
    assert {path: path.stat().st_mtime_ns for path in _files(cached)} == before
    assert len(before) == 8


# --- order ------------------------------------------------------------------------------------------


def names(source: PictureSource, n: int, shape: tuple[int, int] = SQUARE) -> list[str]:
    return source.take(n, shape).names


def test_epochs_are_shuffled_and_complete(config: PicturesConfig, open_source: Any) -> None:
    source = open_source(config)
    first, second = names(source, 10), names(source, 4) + names(source, 6)
    assert sorted(first) == sorted(second) == [f"{i:02d}.png" for i in range(10)]
    assert first != second
    assert first != sorted(first)
    assert names(open_source(config, seed=4), 10) != first
    assert Counter(names(open_source(config), 30)) == Counter(first * 3)


def test_ranks_are_disjoint_and_together_complete(config: PicturesConfig, open_source: Any) -> None:
    """Over several epochs, at a number of pictures that the ranks do not divide evenly."""
    ranks = [open_source(config, rank=r, world=3) for r in range(3)]
    for _ in range(3):
        seen = [names(source, count) for source, count in zip(ranks, (4, 3, 3), strict=True)]
        assert sorted(itertools.chain(*seen)) == [f"{i:02d}.png" for i in range(10)]


def test_a_bucket_smaller_than_the_world_serves_every_rank(config: PicturesConfig, open_source: Any) -> None:
    ranks = [open_source(config, rank=r, world=3) for r in range(3)]
    assert [names(source, 2, (10, 6)) for source in ranks] == [["15.png"] * 2] * 3
    wide = [open_source(config, rank=r, world=7) for r in range(7)]
    seen = [names(source, 1, (6, 10))[0] for source in wide]
    assert len(set(seen[:5])) == 5
    assert seen[5:] == seen[:2]


def test_reading_ahead_changes_nothing(config: PicturesConfig, open_source: Any) -> None:
    plain, threaded = open_source(config), open_source(replace(config, workers=3))
    for n, shape in ((3, SQUARE), (1, (6, 10)), (5, SQUARE), (7, (6, 10)), (2, (10, 6)), (16, SQUARE)):
        assert same(plain.take(n, shape), threaded.take(n, shape))
    assert plain.state() == threaded.state()


def test_buckets_do_not_depend_on_each_other(config: PicturesConfig, open_source: Any) -> None:
    a, b = open_source(config), open_source(config)
    wide = a.take(3, (6, 10)), a.take(2, (6, 10))
    square = a.take(4, SQUARE)
    assert same(b.take(4, SQUARE), square)
    assert same(b.take(3, (6, 10)), wide[0])
    assert same(b.take(2, (6, 10)), wide[1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_resuming_equals_going_on(
    config: PicturesConfig, open_source: Any, tmp_path: Path, workers: int, cached: bool
) -> None:
    config = replace(config, workers=workers)
    calls = [(3, SQUARE), (4, (6, 10)), (9, SQUARE), (3, (6, 10)), (2, (10, 6)), (5, SQUARE)]

    def opened(name: str) -> Any:
        cache = str(tmp_path / name) if cached else ""
        return open_source(replace(config, cache=cache), make_base(style=True))

    unbroken = opened("one")
    whole = [unbroken.take(*call) for call in calls]
    killed = opened("two")
    for call in calls[:3]:
        killed.take(*call)
    state = json.loads(json.dumps(killed.state()))
    killed.take(*calls[3])  # what came after the checkpoint is lost, but for what it left in the cache
    resumed = opened("two")
    resumed.load_state(state)
    for call, expected in zip(calls[3:], whole[3:], strict=True):
        assert same(resumed.take(*call), expected)
    assert resumed.state() == unbroken.state()
    killed.load_state(state)
    assert same(killed.take(*calls[3]), whole[3])


def test_other_pictures_or_ranks_begin_a_new_epoch(
    config: PicturesConfig, open_source: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(config)
    names(source, 3), names(source, 2, (6, 10))
    state = source.state()
    write_picture(Path(config.folder) / "99.png", 72, 72, 99)
    grown = open_source(config)
    grown.load_state(state)
    assert "a new epoch begins for latents of 8x8" in caplog.text
    assert len(set(names(grown, 11))) == 11
    assert grown.state()["buckets"]["8x8"]["epoch"] == 1
    assert grown.state()["buckets"]["6x10"] == state["buckets"]["6x10"]
    split = open_source(config, rank=0, world=2)
    split.load_state(state)
    assert {b["epoch"] for b in split.state()["buckets"].values()} == {1}


# --- broken files -----------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_replaced_counted_and_named(
    config: PicturesConfig, open_source: Any, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(config.folder)
    before = names(open_source(config), 10)
    _cut(folder / "03.png")
    _cut(folder / "04.png")
    (folder / "zero.png").touch()
    source = open_source(replace(config, workers=workers))
    assert source.broken.keys() == {"zero.png"}
    assert names(source, 10) == [{"03.png": "05.png", "04.png": "05.png"}.get(n, n) for n in before]
    names(source, 10)
    assert source.state()["broken"].keys() == {"zero.png", "03.png", "04.png"}
    assert caplog.text.count("03.png is broken") == 1
    resumed = open_source(config)
    resumed.load_state(source.state())
    assert resumed.broken == source.broken


def test_a_bucket_without_any_readable_file_is_an_error(config: PicturesConfig, open_source: Any) -> None:
    _cut(Path(config.folder) / "15.png")
    source = open_source(config)
    with pytest.raises(RecipeError, match=r"none of the 1 pictures near 80 x 48 px.*15\.png"):
        source.take(1, (10, 6))


# --- the cache --------------------------------------------------------------------------------------


@pytest.fixture
def cached(config: PicturesConfig, tmp_path: Path) -> PicturesConfig:
    return replace(config, cache=str(tmp_path / "cache"), flip=False)


def _files(cached: PicturesConfig) -> list[Path]:
    return sorted(p for p in Path(cached.cache).rglob("*") if p.is_file())


@pytest.mark.parametrize("style", [False, True])
def test_a_second_epoch_encodes_nothing(cached: PicturesConfig, open_source: Any, style: bool) -> None:
    base, one = make_base(style), StyleConfig(crops=1) if style else None
    source = open_source(cached, base, style=one)
    first = source.take(10, SQUARE)
    assert sum(base.vae.batches) == 10
    again_base = make_base(style)
    again = open_source(replace(cached, workers=2), again_base, style=one).take(10, SQUARE)
    second = source.take(10, SQUARE)
    assert sum(base.vae.batches) == 10
    assert again_base.vae.batches == []
    assert style or not again_base.text.captions
    assert same(again, first)
    order = [second.names.index(name) for name in first.names]
    assert same(Fresh(second.z[order], second.c, second.real, second.cond.rows(order), first.names), first)
    assert all(p.suffix == ".safetensors" for p in _files(cached))


def test_a_sample_is_encoded_once_a_batch_and_captions_are_shared(
    cached: PicturesConfig, open_source: Any
) -> None:
    for path in Path(cached.folder).glob("*.txt"):
        path.unlink()
    base = make_base()
    open_source(cached, base).take(4, (10, 6))
    assert base.vae.batches == [1]
    open_source(cached, base).take(5, (6, 10))
    assert len(_files(cached)) == 6 + 1  # pictures, and the one caption
    flipped = open_source(replace(cached, flip=True), base)
    flipped.take(40, (10, 6))
    assert len(base.vae.batches) == 1 + 5 + 1  # the mirror image is new


def test_another_network_or_picture_is_another_file(cached: PicturesConfig, open_source: Any) -> None:
    open_source(cached).take(10, SQUARE)
    vae = make_base()
    vae.vae.mix.mul_(2)
    other = open_source(cached, vae).take(10, SQUARE)
    assert len(vae.vae.batches) == 10
    scaled = make_base()
    scaled.vae.config.scaling_factor = 1.0
    assert torch.equal(open_source(cached, scaled).take(10, SQUARE).z, other.z)
    write_picture(Path(cached.folder) / "03.png", 72, 72, 1003)
    changed = make_base()
    open_source(cached, changed).take(10, SQUARE)
    assert changed.vae.batches == [1]


@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
def test_a_damaged_cache_file_is_made_again(cached: PicturesConfig, open_source: Any, how: str) -> None:
    expected = open_source(cached).take(10, SQUARE)
    for path in _files(cached):
        data = bytearray(path.read_bytes())
        data[-9] ^= 64
        path.write_bytes({"cut": data[:-20], "flipped": data, "empty": b""}[how])
    base = make_base()
    assert same(open_source(cached, base).take(10, SQUARE), expected)
    assert len(base.vae.batches) == 10
    open_source(cached, base).take(10, SQUARE)
    assert len(base.vae.batches) == 10


def test_a_clip_in_the_cache_gives_few_frames(tmp_path: Path, open_source: Any) -> None:
    (tmp_path / "in").mkdir()
    make_clip(tmp_path / "in/a.mp4")
    config = PicturesConfig(
        str(tmp_path / "in"), resolution_px=32, workers=0, cache=str(tmp_path / "c"), flip=False
    )
    base = make_base()
    source = open_source(config, base)
    source.take(60, source.shapes[0])
    assert 6 < len(base.vae.batches) <= min(12, CLIP_FRAMES)


def test_an_unwritable_cache_says_so(cached: PicturesConfig, open_source: Any) -> None:
    Path(cached.cache).write_text("a file is in the way", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"pictures\.cache = .* cannot be written"):
        open_source(cached).take(1, SQUARE)


def test_conditioning_of_the_cache_has_the_types_of_the_base(
    cached: PicturesConfig, open_source: Any
) -> None:
    plain = open_source(replace(cached, cache="", centre=True)).take(4, SQUARE)
    written, stored = (open_source(cached).take(4, SQUARE) for _ in range(2))
    assert isinstance(stored.cond, Conditioning)
    assert same(written, stored)
    assert written.names == plain.names
    assert torch.allclose(written.z, plain.z, atol=1e-6)
    assert torch.equal(written.cond.time_ids, plain.cond.time_ids)
    assert torch.equal(written.cond.context, plain.cond.context)
