"""Triplets are made deterministically, and a stopped run goes on with the same files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.weights import random_conv

from std_rt.training.run.recipe import DataConfig
from std_rt.training.run.sheet import to_tensor
from std_rt.training.tiny.tiny_pipeline import load_tiny
from std_rt.training.tiny.trajectories import sample
from std_rt.training.tiny.triplets import find_triplets
from tools import make_triplets
from tools.teachers import adain, style_swap, whiten_and_colour

DECODER = (
    "00.block4_conv1 512 256,01.block3_conv1 256 256,02.block3_conv2 256 256,03.block3_conv3 256 256,"
    "04.block3_conv4 256 128,05.block2_conv1 128 128,06.block2_conv2 128 64,07.block1_conv1 64 64,"
    "08.block1_conv2 64 3"
)


@pytest.fixture(params=["judged", "unjudged"])
def maker(
    data: DataConfig,
    vgg_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> make_triplets.Maker:
    torch.manual_seed(0)
    state = load_file(vgg_file)
    for line in DECODER.split(","):
        name, inputs, outputs = line.split()
        random_conv(state, f"decoder.{name}_decode", int(inputs), int(outputs), 3)
    save_file(state, tmp_path / "adain.safetensors")
    monkeypatch.setattr(make_triplets, "JUDGE_PX", 64)
    monkeypatch.setattr(make_triplets, "LIMIT", (9.0, 9.0))
    monkeypatch.setattr(make_triplets, "LIMITS", {})
    adain = str(tmp_path / "adain.safetensors") if request.param == "judged" else None
    args = Namespace(
        adain=adain, microast=None, cd_wct=None, magenta=None, fixed=None, destylizer=None,
        photos=data.photos, art=data.art, sources="", seed=3, candidates=2,
        sides=(64, 96), style_px=64, photos_per_style=1,
    )  # fmt: skip
    return make_triplets.Maker(args)


def test_a_stopped_run_goes_on_with_the_same_files(maker: make_triplets.Maker, tmp_path: Path) -> None:
    with torch.no_grad():
        make_triplets.make_all(maker, tmp_path / "whole", range(4))
        make_triplets.make_all(maker, tmp_path / "broken", range(2))
        table = tmp_path / "broken" / "metadata.csv"
        table.write_bytes(table.read_bytes()[:-9])  # the last line is cut off
        make_triplets.make_all(maker, tmp_path / "broken", range(4))
    assert len(find_triplets(tmp_path / "whole")) == 4
    rows = list(make_triplets.known_rows(table).values())
    assert len(rows) == 4
    assert all(bool(row["style_distance"]) == (maker.vgg is not None) for row in rows)
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*"))
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name


def test_photos_of_a_style_share_its_picture(maker: make_triplets.Maker, tmp_path: Path) -> None:
    maker.photos_per_style, maker.candidates = 3, 1  # which of several tries is best depends on the photo
    make_triplets.make_all(maker, tmp_path, range(6))
    style, content = (
        [p.read_bytes() for p in sorted((tmp_path / k).iterdir())] for k in ("style", "content")
    )
    assert style[0] == style[1] == style[2] != style[3] == style[4] == style[5]
    assert len(set(content)) > 3


def test_artworks_are_the_targets_of_what_a_destylizer_makes_of_them(
    maker: make_triplets.Maker, stylist_folder: Path, tmp_path: Path
) -> None:
    """Target and style are crops of one artwork; the photo is the network's run without a style."""
    maker.destylizer, maker.kinds, maker.weights = load_tiny(stylist_folder), ["destylized"], [1.0]
    made, photo, art = maker.make(5) or pytest.fail("nothing was made")
    again = sample(maker.destylizer, made.stylized, None, 2).clamp(-1, 1)
    assert torch.equal(made.photo, again)
    assert not torch.equal(made.photo, made.stylized)
    source = maker.art.frames[maker.art.names.index(art)]
    assert torch.isclose(made.stylized.mean(), to_tensor([source]).mean(), atol=0.3)
    assert photo == art
    assert bool(made.style_distance >= 0) == (maker.vgg is not None)


def test_transfers_give_the_style_statistics() -> None:
    torch.manual_seed(0)
    x, style = torch.randn(1, 6, 12, 12), 2 * torch.randn(1, 6, 10, 14) + 1
    assert torch.allclose(adain(x, style).mean((2, 3)), style.mean((2, 3)), atol=1e-4)
    y = whiten_and_colour(x, style, 1.0)
    assert torch.allclose(torch.cov(y[0].flatten(1)), torch.cov(style[0].flatten(1)), atol=1e-3)
    # A picture swapped with its own patches stays what it is.
    assert torch.allclose(style_swap(x, x), x, atol=1e-4)
