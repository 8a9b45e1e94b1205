"""`std-rt evaluate`: a bundle with clips, and LoRAs beside their teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli_support import Cli, Result, picture
from support.handmade import write_handmade
from support.media_samples import ClipSpec, make_clip

from std_rt.evaluation.picture_quality import time_slice, weight_free
from std_rt.media import read_picture, write_picture

NOTES = {"method": "std", "eta": "0.75", "tau": "739", "base": "tiny", "guidance": "[2.0, 4.0]"}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two contents and two styles."""
    for i in range(2):
        picture(tmp_path / "contents" / f"{i}.png", 80, 70, seed=i)
        picture(tmp_path / "styles" / f"{i}.png", 64, 64, seed=9 + i)
    return tmp_path / "contents", tmp_path / "styles"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from support.pipelines import write_own_pipeline

    return write_own_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def loras(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one recipe, and one of another."""
    from support.pipelines import write_lora

    from std_rt.training.distil.base import load_base

    base, root = load_base(teacher), tmp_path_factory.mktemp("table")
    files = []
    for seed, run in enumerate(("std-0", "std-1", "no-bank-0")):
        (root / run).mkdir()
        notes = {**NOTES, "base_digest": base.digest}
        files.append(write_lora(root / run / "lora.safetensors", base.unet, seed=seed, **notes))
    return files


def _last(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.err
    return dict(json.loads(result.out.splitlines()[-1]))


def test_the_old_name_still_works(cli: Cli) -> None:
    assert "std-rt eval" in cli("eval", "--help").out
    listed = [line.split("│")[1].split()[:1] for line in cli("--help").out.splitlines() if "│" in line]
    assert ["evaluate"] in listed
    assert ["eval"] not in listed


@pytest.mark.parametrize("size", ["100", "128x64", "64"])
def test_pictures_are_scored_at_any_size(
    cli: Cli, bundle: Path, folders: tuple[Path, Path], tmp_path: Path, size: str
) -> None:
    sheet = tmp_path / "sheet.png"
    flags = ("--pairs", 2, "--size", size, "--bundle", bundle, "-o", sheet)
    scores = _last(cli("evaluate", *folders, *flags))["scores"]
    assert list(scores) == ["handmade-4-step", "reinhard", "cv2.stylization", "photo"]
    assert all(0 <= value["colour"] < 1 for value in scores.values())
    assert scores["photo"]["ssim"] == scores["photo"]["sharpness"] == pytest.approx(1)
    assert sheet.exists()


def test_no_pair_is_judged_twice(cli: Cli, bundle: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ("--pairs", 99, "--size", 64, "--bundle", bundle, "-o", tmp_path / "sheet.png")
    result = cli("evaluate", *folders, *flags)
    assert _last(result)["pairs"] == 4
    assert "note: only 4 distinct pairs exist; --pairs 99 was reduced to that" in result.err


def test_a_clip_is_judged_for_flicker(
    cli: Cli, bundle: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    clip, other = (
        make_clip(folders[0] / "clip.mp4"),
        make_clip(tmp_path / "named.mp4", ClipSpec(pts=(0, 512))),
    )
    table = tmp_path / "found.json"
    flags = ("--pairs", 3, "--size", 64, "--bundle", bundle, "--video", other, "--frames", 4)
    found = _last(cli("evaluate", *folders, *flags, "-o", tmp_path / "sheet.png", "--table", table))
    assert found["warping"].keys() == {str(clip), str(other)}
    for errors in found["warping"].values():
        ours = {"handmade-4-step", "handmade-4-step, temporal off"}
        assert errors.keys() == {"source", *ours, "reinhard", "cv2.stylization"}
        assert 0 <= errors["source"] < 0.1
    assert found["sharpness"].keys() == found["warping"].keys()
    assert all(row["source"] == pytest.approx(1) for row in found["sharpness"].values())
    assert found["scores"]["reinhard"].keys() == {
        "colour", "texture", "structure", "ssim", "lattice", "sharpness",
    }  # fmt: skip
    whole = json.loads(table.read_text(encoding="utf-8"))
    by_pair = whole.pop("by_pair")
    assert whole == found
    for label, rows in by_pair.items():
        assert list(rows) == ["0--1", "1--0", "clip--1"]
        mean = np.mean([row["colour"] for row in rows.values()])
        assert found["scores"][label]["colour"] == pytest.approx(mean)


def test_a_video_to_video_bundle_stands_beside_others_in_one_table(
    cli: Cli, bundle: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """The numbers and slices are those of the outputs that are saved."""
    v2v = write_handmade(tmp_path / "v2v", window=(3, 1)).path
    clip, saved, slices = make_clip(tmp_path / "clip.mp4"), tmp_path / "pairs", tmp_path / "slices.png"
    flags = ("--pairs", 1, "--size", 64, "--steps", 2, "--frames", 5, "--bundle", bundle, "--bundle", v2v)
    paths = ("--video", clip, "--save-outputs", saved, "--slices", slices, "-o", tmp_path / "sheet.png")
    result = cli("evaluate", *folders, *flags, *paths)
    rows = _last(result)["clips"][str(clip)]
    labels = ["source", "handmade-2-step", "handmade-2-step, temporal off"]
    labels += ["v2v-2-step", "v2v-2-step, temporal off", "reinhard", "cv2.stylization"]
    assert list(rows) == labels
    sheet, style = read_picture(slices).frame, read_picture(saved / "style" / "clip--1.png").frame
    places = {0: "content/clip--1", 3: "v2v-2-step/clip--1", 4: "v2v-2-step/clip--1/off"}
    contents = [read_picture(path).frame for path in sorted((saved / places[0]).glob("*.png"))]
    for i, place in places.items():
        frames = [read_picture(path).frame for path in sorted((saved / place).glob("*.png"))]
        judged = [weight_free(*pair, style) for pair in zip(frames, contents, strict=True)]
        for name in ("colour", "texture", "structure", "ssim", "lattice"):
            assert rows[labels[i]][name] == pytest.approx(np.mean([one[name] for one in judged]))
        assert (sheet[18:78, 68 * i : 68 * i + 64] == time_slice(frames)).all()
    heading, *lines = result.out[result.out.index("clip clip") :].splitlines()
    titles = "clip clip warping error sharpness colour texture structure SSIM lattice"
    assert " ".join(heading.split()) == titles
    for (label, row), line in zip(rows.items(), lines, strict=False):
        figures = (
            f"{row[name]:.3f}" for name in ("sharpness", "colour", "texture", "structure", "ssim", "lattice")
        )
        assert line.removeprefix(label).split() == [f"{row['warping']:.4f}", *figures]
    more = ("--slices", tmp_path / "no.png", "-o", tmp_path / "no.png")
    assert "--slices is for clips, and there are none" in cli("evaluate", *folders, *flags, *more).error


def test_students_beside_their_teacher(
    cli: Cli, folders: tuple[Path, Path], teacher: Path, loras: list[Path], tmp_path: Path
) -> None:
    sheet, table = tmp_path / "sheet.png", tmp_path / "found.json"
    files = [flag for lora in loras for flag in ("--lora", lora)]
    flags = ("--steps", 2, "--steps", 4, "--guidance", 1, "--guidance", 2, "--pairs", 2, "--size", 64)
    found = _last(
        cli("evaluate", *folders, "--teacher", teacher, *files, *flags, "-o", sheet, "--table", table)
    )
    rows = {(row["label"], row["steps"], row["guidance"]): row for row in found["table"]}
    assert len(rows) == 1 + 3 * 4  # the reference; teacher, std and std no-bank at four settings
    assert rows["reference", 37, 3.0]["mean"]["latent_rmse"] == 0
    assert rows["reference", 37, 3.0]["evaluations"] == 74
    std = rows["std", 4, 2.0]
    assert std["evaluations"] == 8
    assert len(std["seeds"]) == 2
    assert std["spread"]["latent_rmse"] > 0
    assert rows["std no-bank", 2, 1.0]["spread"] is None
    whole = json.loads(table.read_text(encoding="utf-8"))
    assert len(whole["rows"]) == 1 + 4 * 4
    assert whole["rows"][1]["timesteps"] == [739, 379]
    height, width = read_picture(sheet).frame.shape[:2]
    assert (width, height) == (6 * 68, 2 * 68 + 18)  # content, style, reference, teacher, std, std no-bank


def test_same_command_same_numbers(
    cli: Cli, folders: tuple[Path, Path], teacher: Path, loras: list[Path], tmp_path: Path
) -> None:
    flags = ("--teacher", teacher, "--lora", loras[0], "--pairs", 2, "--size", 64, "--reference-steps", 8)

    def run(name: str, *more: object) -> Any:
        return _last(cli("evaluate", *folders, *flags, "-o", tmp_path / name, *more))["table"]

    first = run("a.png")
    assert first == run("b.png")
    assert first != run("c.png", "--seed", 1)
    cut = run("d.png", "--schedule", "diffusers")
    assert cut[-1]["evaluations"] == first[-1]["evaluations"]
    assert cut[-1]["mean"]["latent_rmse"] != first[-1]["mean"]["latent_rmse"]


def test_a_mask_and_a_clip(cli: Cli, folders: tuple[Path, Path], teacher: Path, tmp_path: Path) -> None:
    white = np.zeros((64, 64, 3), np.uint8)
    white[16:, :40] = 255
    write_picture(tmp_path / "mask.png", white)
    make_clip(tmp_path / "clip.mp4")
    flags = ("--teacher", teacher, "--pairs", 1, "--size", 64, "--reference-steps", 4, "--steps", 2)
    masked = _last(
        cli("evaluate", *folders, *flags, "--mask", tmp_path / "mask.png", "-o", tmp_path / "a.png")
    )
    assert [row["mean"]["outside_max"] for row in masked["table"]] == [0, 0]
    moving = _last(
        cli(
            "evaluate",
            *folders,
            *flags,
            "--video",
            tmp_path / "clip.mp4",
            "--frames",
            3,
            "-o",
            tmp_path / "b.png",
        )
    )
    assert all(row["mean"]["warping"] > 0 and row["mean"]["clip_sharpness"] > 0 for row in moving["table"])
    assert list(moving["warping_of_source"]) == [str(tmp_path / "clip.mp4")]


def test_what_does_not_fit_together_is_one_line(
    cli: Cli, folders: tuple[Path, Path], teacher: Path, loras: list[Path], tmp_path: Path
) -> None:
    write_picture(tmp_path / "black.png", np.zeros((64, 64, 3), np.uint8))
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--lora", loras[0]), "--lora needs --teacher"),
        (("--teacher", teacher, "--bundle", "x"), "mutually exclusive"),
        (("--teacher", teacher, "--peer", "a=b"), "mutually exclusive"),
        (("--teacher", teacher, "--size", "64x32"), "square"),
        (("--teacher", teacher, "--size", 72), "not a multiple of 16"),
        (("--teacher", teacher, "--size", 16), "too small"),
        (("--teacher", teacher, "--schedule", "euler"), "aligned or diffusers"),
        (("--teacher", teacher, "--guidance", 0), "above 0"),
        (("--teacher", teacher, "--size", 64, "--steps", 40), "--steps 40 cannot be run"),
        (("--teacher", teacher, "--size", 64, "--steps", 51), "1..50"),
        (("--teacher", teacher, "--size", 64, "--reference-steps", 51), "1..50"),
        (("--teacher", teacher, "--size", 64, "--eta", 1.5), "eta"),
        (("--teacher", teacher, "--size", 64, "--device", "abacus"), "--device cpu"),
        (("--teacher", teacher, "--size", 64, "--mask", tmp_path / "black.png"), "all black"),
        (("--teacher", teacher, "--size", 64, "--lora", tmp_path / "black.png"), "cannot be read"),
        (("--teacher", tmp_path), "model_index.json"),
        (("--aesthetic", tmp_path / "a.pth"), "add --clip"),
    ]
    for flags, reason in cases:
        error = cli("evaluate", *folders, *flags, "-o", tmp_path / "sheet.png", "--pairs", 1).error
        assert reason in error, (flags, error)
        assert not (tmp_path / "sheet.png").exists()


def _saved(cli: Cli, bundle: Path, folders: tuple[Path, Path], folder: Path) -> dict[str, Any]:
    flags = ("--pairs", 2, "--size", 64, "--steps", 1, "--steps", 2, "--bundle", bundle, "--frames", 3)
    return _last(
        cli("evaluate", *folders, *flags, "-o", folder.parent / "first.png", "--save-outputs", folder)
    )


def test_saved_outputs_come_back_as_a_peer_with_the_same_scores(
    cli: Cli, bundle: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    make_clip(folders[0] / "2.mp4")
    saved, sheet, blind = tmp_path / "pairs", tmp_path / "sheet.png", tmp_path / "blind.png"
    first = _saved(cli, bundle, folders, saved)
    assert {path.name for path in saved.iterdir()} == {
        *("content", "style", "handmade-1-step", "handmade-2-step", "outputs.json")
    }
    assert {path.name for path in (saved / "content").iterdir()} == {"0--1.png", "1--0.png", "2--1"}
    peers = ("--peer", f"one={saved / 'handmade-1-step'}", "--peer", f"photo_={saved / 'content'}")
    result = cli(
        *("evaluate", *folders, "--pairs", 2, "--size", 64, "--frames", 3, "--steps", 2),
        *("--bundle", f"mine={bundle}", *peers, "-o", sheet, "--blind", blind),
    )
    second = _last(result)
    assert list(second["scores"]) == [
        *("mine-2-step", "one", "photo_", "reinhard", "cv2.stylization", "photo")
    ]
    assert second["scores"]["one"] == pytest.approx(first["scores"]["handmade-1-step"])
    assert second["scores"]["mine-2-step"] == pytest.approx(first["scores"]["handmade-2-step"])
    assert second["scores"]["photo_"] == second["scores"]["photo"]
    for name in ("warping", "sharpness"):
        (before,), (after,) = first[name].values(), second[name].values()
        assert after["one"] == pytest.approx(before["handmade-1-step"])
    key = json.loads((tmp_path / "blind.key.json").read_text(encoding="utf-8"))
    assert all(sorted(row) == ["mine-2-step", "one", "photo_"] for row in key["rows"])
    assert not any(label in line for line in result.out.splitlines() if "blind" in line for label in key)


def test_a_peer_of_another_size_is_resized_with_a_note(
    cli: Cli, bundle: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("0--1", "1--0"):
        picture(tmp_path / "peer" / f"{name}.jpg", 96, 96)
    flags = ("--pairs", 2, "--size", 64, "--bundle", bundle, "--peer", f"other={tmp_path / 'peer'}")
    result = cli("evaluate", *folders, *flags, "-o", tmp_path / "sheet.png")
    assert "other" in _last(result)["scores"]
    assert "outputs of other were resized from 96x96 to 64x64 px" in result.err


def test_outputs_that_do_not_fit_are_one_line_before_any_work(
    cli: Cli, bundle: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    empty, wide, clip = tmp_path / "empty", tmp_path / "wide", tmp_path / "clip"
    empty.mkdir()
    for name in ("0--1", "1--0"):
        picture(wide / f"{name}.png", 64, 48)
        picture(clip / f"{name}.png", 64, 64)
    picture(clip / "2--1" / "0000.png", 64, 64)
    make_clip(folders[0] / "2.mp4")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--peer", empty), f"has no name; write NAME=FOLDER, as in --peer MicroAST={empty}"),
        (("--peer", f"a={tmp_path / 'none'}"), "there is no folder"),
        (("--peer", f"a={empty}"), "lacks 2 of 2 pictures, such as 0--1.png"),
        (("--peer", f"a={wide}"), "0--1.png is 64x48 px, but pairs are square; give outputs of 64x64 px"),
        (("--peer", f"a={clip}"), "lacks 2 of 3 pictures, such as 2--1/0001.png"),
        (("--peer", f"photo={clip}"), "cannot be called 'photo'"),
        (("--peer", f"a/b={clip}"), "cannot be called 'a/b'"),
        (("--peer", f"a={clip}", "--peer", f"a={clip}"), "two candidates are called 'a'"),
        (("--bundle", bundle, "--bundle", bundle), "two candidates are called 'handmade-4-step'"),
        (("--blind", tmp_path / "blind.png"), "2 to 26 candidates, got 1"),
        (("--save-outputs", wide), "is not empty; add --overwrite"),
        (("--steps", 77), "77"),
    ]
    for flags, reason in cases:
        given = ("--pairs", 2, "--size", 64, "--frames", 3, "--bundle", bundle, *flags)
        error = cli("evaluate", *folders, *given, "-o", tmp_path / "sheet.png").error
        assert reason in error, (flags, error)
        assert not list(tmp_path.glob("*.png"))


def test_files_of_one_name_are_told_apart_or_refused(
    cli: Cli, bundle: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    picture(folders[0] / "0.jpg", 64, 64, seed=5)
    (folders[1] / "1.png").unlink()
    flags = ("--pairs", 3, "--size", 64, "--bundle", bundle, "-o", tmp_path / "sheet.png")
    assert "have one name without suffix" in cli("evaluate", *folders, *flags).error


def test_vgg_weights_add_two_columns(
    cli: Cli, bundle: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    from support.weights import write_vgg

    flags = ("--pairs", 1, "--size", 64, "--bundle", bundle, "-o", tmp_path / "sheet.png")
    flags += ("--video", make_clip(tmp_path / "clip.mp4"), "--frames", 2)
    result = cli("evaluate", *folders, *flags, "--vgg", write_vgg(tmp_path / "vgg.safetensors"))
    scores, (rows,) = _last(result)["scores"], _last(result)["clips"].values()
    assert result.out.count("VGG style  VGG content") == 2
    assert rows["source"]["vgg_content"] == 0 < rows["reinhard"]["vgg_content"]
    assert scores["photo"]["vgg_content"] == 0
    assert 0 < scores["reinhard"]["vgg_style"] < 1
    other = cli("evaluate", *folders, *flags, "--overwrite", "--vgg", tmp_path / "sheet.png")
    assert "does not hold VGG-19" in other.error


def test_vgg_without_torch_is_one_line(
    cli: Cli, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("std_rt.core.machine.find_spec", lambda name: None if name == "torch" else name)
    error = cli("evaluate", *folders, "--vgg", "vgg.safetensors", "-o", tmp_path / "sheet.png").error
    assert "std-rt evaluate with --vgg needs torch; run: pip install" in error
