"""The stages of a job without Ray: their files are those of `std-rt stylize`, and items fail alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from support.cli_support import Cli, picture
from support.media_samples import ClipSpec, make_clip

from std_rt.bulk import job
from std_rt.bulk.job import Job
from std_rt.bulk.options import BulkOptions
from std_rt.bulk.plan import ITEM, items, wishes
from std_rt.bulk.stages import PaintBlock, ReadBlock, WriteBlock
from std_rt.core.bundle import Bundle


def run_stages(bundle: Bundle, plan: pa.Table, out: Path, **options: Any) -> list[dict[str, Any]]:
    """All items in one block."""
    chosen = BulkOptions(bundle=str(bundle.path), **options)
    fit = job.fitter(Job(plan, chosen, bundle, str(out), None))  # type: ignore[arg-type]
    read = ReadBlock(fit, chosen.keep_colours).run(plan)
    painted = PaintBlock(chosen, str(out))(read)
    rows: list[dict[str, Any]] = WriteBlock(str(out), chosen.upscale).run(painted).to_pylist()
    return rows


def plan_of(inputs: list[Path], art: Path) -> pa.Table:
    return items(wishes([str(path) for path in inputs], [str(art)]), "", {})


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, ()),
        ({"keep_colours": True}, ("--keep-colours",)),
        ({"upscale": True, "size": 32}, ("--upscale", "--size", 32)),
        ({"seed": 3, "steps": 2, "stroke_size": 0.8}, ("--seed", 3, "--steps", 2, "--stroke-size", 0.8)),
    ],
)
def test_files_are_those_of_stylize(
    cli: Cli, handmade: Bundle, tmp_path: Path, art: Path, options: dict[str, Any], flags: tuple[object, ...]
) -> None:
    inputs = [picture(tmp_path / "in" / f"{seed}.png", 60 + 30 * (seed % 2), 40, seed) for seed in range(5)]
    cut = np.random.default_rng(0).integers(0, 256, (90, 120, 4), np.uint8)
    Image.fromarray(cut).save(tmp_path / "in" / "cut.png")
    inputs.append(tmp_path / "in" / "cut.png")
    run_stages(handmade, plan_of([tmp_path / "in"], art), tmp_path / "out", per_call=1, **options)
    done = cli("stylize", *inputs, "-s", art, "-b", handmade.path, "-o", tmp_path / "one", *flags)
    assert done.code == 0
    for path in inputs:
        alone = (tmp_path / "one" / f"{path.stem}_styled.png").read_bytes()
        assert (tmp_path / "out" / path.name).read_bytes() == alone


def test_a_result_does_not_depend_on_what_shares_its_block(
    handmade: Bundle, tmp_path: Path, art: Path, photos: Path
) -> None:
    plan = plan_of([photos], art)
    run_stages(handmade, plan, tmp_path / "together")
    for index in range(plan.num_rows):
        run_stages(handmade, plan.slice(index, 1), tmp_path / "alone")
    for name in plan["output"].to_pylist():
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_each_item_fails_alone_and_says_why(
    handmade: Bundle, tmp_path: Path, art: Path, photos: Path
) -> None:
    (photos / "bad.png").write_bytes(b"no picture")
    plan = plan_of([photos], art)
    (photos / "b.jpg").unlink()  # after it was planned
    (tmp_path / "out" / "c.png").mkdir(parents=True)
    found = {Path(row["output"]).name: row for row in run_stages(handmade, plan, tmp_path / "out")}
    assert found["bad.png"]["stage"] == found["b.jpg"]["stage"] == "read"
    assert "bad.png cannot be read as a picture" in found["bad.png"]["reason"]
    assert "b.jpg does not exist" in found["b.jpg"]["reason"]
    assert (found["c.png"]["stage"], "c.png cannot be written" in found["c.png"]["reason"]) == ("write", True)
    assert not found["d.png"]["reason"]
    assert found["d.png"]["bytes"] == (tmp_path / "out" / "more" / "d.png").stat().st_size


def test_a_full_disk_is_told_apart(
    handmade: Bundle, tmp_path: Path, art: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    rows = run_stages(handmade, plan_of([photos], art), tmp_path / "out")
    assert all(row["disk_full"] and "the disk is full" in row["reason"] for row in rows)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_style_that_cannot_be_read_fails_its_items_only(
    handmade: Bundle, tmp_path: Path, art: Path, photos: Path
) -> None:
    plan = items(wishes([str(photos)], [str(art), str(tmp_path / "none.png")]), "", {})
    rows = run_stages(handmade, plan, tmp_path / "out")
    assert {row["style"] for row in rows if row["reason"]} == {str(tmp_path / "none.png")}
    assert all("none.png does not exist" in row["reason"] for row in rows if row["reason"])


def test_an_input_in_several_styles_is_decoded_once(
    handmade: Bundle, tmp_path: Path, art: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from std_rt.bulk import stages

    decoded: list[str] = []
    decode = stages._decode
    monkeypatch.setattr(stages, "_decode", lambda place: (decoded.append(place), decode(place))[1])
    other = picture(tmp_path / "art" / "other.png", 32, 32, seed=2)
    plan = items(wishes([str(photos)], [str(art), str(other)]), "", {})
    run_stages(handmade, plan, tmp_path / "out")
    assert plan.num_rows == 10
    assert len(decoded) == 5


def test_a_clip_is_that_of_stylize(cli: Cli, handmade: Bundle, tmp_path: Path, art: Path) -> None:
    (tmp_path / "in").mkdir()
    clip = make_clip(tmp_path / "in" / "clip.mp4", ClipSpec())
    (row,) = run_stages(handmade, plan_of([tmp_path / "in"], art), tmp_path / "out")
    assert not row["reason"]
    assert cli("stylize", clip, "-s", art, "-b", handmade.path, "-o", tmp_path / "one.mp4").code == 0
    assert (tmp_path / "out" / "clip.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()
    assert row["bytes"] == (tmp_path / "one.mp4").stat().st_size


def test_an_animation_becomes_a_clip(handmade: Bundle, tmp_path: Path, art: Path) -> None:
    frames = [Image.new("RGB", (64, 64), (40 * index, 90, 90)) for index in range(3)]
    (tmp_path / "in").mkdir()
    frames[0].save(tmp_path / "in" / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    (row,) = run_stages(handmade, plan_of([tmp_path / "in"], art), tmp_path / "out")
    assert (row["reason"], row["output"], row["frames"]) == ("", "a.png.mp4", 3)


def test_blocks_hold_every_item_once_and_a_clip_alone() -> None:
    names = [f"{index}.png" for index in range(5)] + ["a.mp4"] + ["b.png", "c.mp4", "d.mp4"]
    table = pa.table([names, names, names, [1.0] * len(names), names], schema=ITEM)
    blocks = [block["input"].to_pylist() for block in job.blocks(table, 2)]
    assert blocks == [names[0:2], names[2:4], names[4:5], *([name] for name in names[5:])]
