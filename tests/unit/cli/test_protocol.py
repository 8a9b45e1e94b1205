"""`std-rt evaluate --protocol std` and `std-rt tally`, end to end on small folders."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli_support import Cli, Result, picture
from support.handmade import write_handmade
from support.media_samples import make_clip

from std_rt.media import read_picture
from std_rt.pipeline.stylizer import Stylizer


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    """Two contents; four styles in folders of movements, two of them called alike."""
    for i in range(2):
        picture(tmp_path / "coco" / "val2017" / f"{i}.png", 80, 70, seed=i)
    for i, name in enumerate(("cubism/1", "cubism/2", "ink/1", "ink/wash/3")):
        picture(tmp_path / "wikiart" / f"{name}.png", 64, 64, seed=9 + i)
    return tmp_path / "coco", tmp_path / "wikiart"


def _run(cli: Cli, sets: tuple[Path, Path], bundle: Path, folder: Path, *more: object) -> Result:
    return cli("evaluate", *sets, "--protocol", "std", "--size", 64, "-b", bundle, "-o", folder, *more)


def _whole(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))


def test_everything_is_written_and_says_what_is_missing(
    cli: Cli, bundle: Path, sets: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "judged"
    make_clip(sets[0] / "clip.mp4")
    result = _run(cli, sets, bundle, folder, "--steps", 1, "--steps", 2, "--frames", 3)
    last = json.loads(result.out.splitlines()[-1])
    assert last["pairs"] == 3 * 4
    assert last["evaluations"] == {"handmade-1-step": 1, "handmade-2-step": 2}
    names = {"outputs", "results.json", "table.md", "plots.svg", "sheet.png", "blind.png", "blind.key.json"}
    names.add("slices.png")
    assert {path.name for path in folder.iterdir()} == {*names, "vote", "vote.key.json"}
    assert {f"{content}--{style}.png" for content in "01" for style in ("cubism_1", "2", "ink_1", "3")} <= {
        path.name for path in (folder / "outputs" / "handmade-1-step").iterdir()
    }
    whole = _whole(folder)
    for label, rows in whole["by_pair"].items():
        value, low, high = whole["estimates"]["texture"][label]
        assert value == pytest.approx(np.mean([row["texture"] for row in rows.values()]))
        assert low < value < high
    one, two = (whole["estimates"]["texture"][f"handmade-{n}-step"][0] for n in (1, 2))
    difference = whole["differences"]["texture"]["handmade-1-step"]["handmade-2-step"]
    assert difference[0] == pytest.approx(one - two)
    assert len(whole["estimates"]["warping"]["handmade-1-step"]) == 1  # one clip has no interval
    missing = next(line for line in result.out.splitlines() if line.startswith("Not measured: "))
    for text in ("CSD, CSD CSLS (--csd FILE)", "ArtFID, FID to styles, LPIPS to content (--artfid FOLDER)"):
        assert text in missing
    assert "warping" not in missing
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert re.search(r"\| UNet evaluations \| 1 \| 2 \|", table)
    assert re.search(r"\| texture ↓ \| \d\.\d{3} ±\d\.\d{3}\*? \|", table)
    assert (folder / "plots.svg").read_text(encoding="utf-8").count("<circle") > 20


def test_a_run_goes_on_where_it_stopped(
    cli: Cli, bundle: Path, sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is judged as it is, what is lost is painted again, and nothing else is."""
    folder = tmp_path / "judged"
    flags = ("--steps", 1, "--pairs", 5)
    assert _run(cli, sets, bundle, folder, *flags).code == 0
    before = _whole(folder)
    outputs = sorted((folder / "outputs" / "handmade-1-step").iterdir())
    assert len(outputs) == 5
    painted = read_picture(outputs[3]).frame
    outputs[3].unlink()
    picture(outputs[0], 64, 64, seed=77)
    _run(cli, sets, bundle, folder, *flags)
    assert (read_picture(outputs[3]).frame == painted).all()
    after = _whole(folder)
    changed = [
        name
        for name, row in before["by_pair"]["handmade-1-step"].items()
        if after["by_pair"]["handmade-1-step"][name] != row
    ]
    assert changed == [outputs[0].stem]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a bundle was opened")

    with monkeypatch.context() as patch:
        patch.setattr(Stylizer, "load", refuse)
        assert _run(cli, sets, bundle, folder, *flags).code == 0
    assert "(pairs differ)" in _run(cli, sets, bundle, folder, "--steps", 1, "--pairs", 4).error
    other = write_handmade(tmp_path / "handmade", gamma=0.5)
    assert "(handmade-1-step differ)" in _run(cli, sets, other.path, folder, *flags).error
    paint, painted_now = Stylizer.stylize, []

    def cut_off(self: Stylizer, *args: Any, **more: Any) -> Any:
        if len(painted_now) == 3:
            raise KeyboardInterrupt
        painted_now.append(args)
        return paint(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Stylizer, "stylize", cut_off)
        _run(cli, sets, other.path, folder, *flags, "--overwrite")
    assert len([path for path in outputs if path.exists()]) == 3  # and none of the first bundle
    assert _run(cli, sets, other.path, folder, *flags).code == 0
    assert (read_picture(outputs[0]).frame != read_picture(outputs[3]).frame).any()
    assert _whole(folder)["bundles"]["handmade-1-step"]["digest"] == other.digest


def test_bundles_are_compared_at_equal_evaluations(
    cli: Cli, bundle: Path, sets: tuple[Path, Path], tmp_path: Path
) -> None:
    guided = write_handmade(tmp_path / "guided", guidance=("full", 2.0), negative=0.0)
    flags = ("-b", guided.path, "--evaluations", 4, "--pairs", 2)
    result = _run(cli, sets, bundle, tmp_path / "judged", *flags)
    found = json.loads(result.out.splitlines()[-1])
    assert {label: one["steps"] for label, one in found["bundles"].items()} == {
        "handmade-4-step": 4,
        "guided-2-step": 2,
    }
    assert set(found["evaluations"].values()) == {4}
    error = _run(cli, sets, guided.path, tmp_path / "odd", "--evaluations", 3).error
    assert "cannot make 3 UNet evaluations a picture (guidance full); use --evaluations with one of" in error
    peer = f"earlier={tmp_path / 'judged' / 'outputs' / 'guided-2-step'}"
    again = _run(cli, sets, bundle, tmp_path / "next", "--peer", peer, "--steps", 1, "--pairs", 2)
    last = json.loads(again.out.splitlines()[-1])
    assert last["evaluations"] == {"handmade-1-step": 1, "earlier": 4}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--protocol", "tcd"), "--protocol must be std, got 'tcd'"),
        (("--protocol", "std", "--teacher", "x"), "--teacher compares networks in torch"),
        (("--protocol", "std", "--save-outputs", "x"), "--save-outputs is part of --protocol; -o FOLDER"),
        (("--evaluations", 4, "--steps", 2), "--evaluations and --steps are mutually exclusive"),
        (("--protocol", "std", "--pairs", 0), "--pairs must be at least 1"),
    ],
)
def test_what_does_not_fit_together_is_one_line(
    cli: Cli, sets: tuple[Path, Path], tmp_path: Path, flags: tuple[object, ...], reason: str
) -> None:
    assert reason in cli("evaluate", *sets, *flags, "-o", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(cli: Cli, sets: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.md").write_text("mine", encoding="utf-8")
    error = cli("evaluate", *sets, "--protocol", "std", "-o", tmp_path / "mine").error
    assert f"-o {tmp_path / 'mine'} is not empty, and not of an earlier run; add --overwrite" in error
    error = cli("evaluate", *sets, "--protocol", "std", "-o", tmp_path / "mine" / "table.md").error
    assert "is a file; name a folder" in error
    assert (tmp_path / "mine" / "table.md").read_text(encoding="utf-8") == "mine"


def test_a_folder_without_pictures_is_named(cli: Cli, sets: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    error = cli("evaluate", sets[0], tmp_path / "empty", "--protocol", "std").error
    assert f"{tmp_path / 'empty'} and its subfolders hold no picture" in error


class _Page(HTMLParser):
    """The ids, and everything that is fetched, of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.ids += [str(known["id"])] if "id" in known else []
        self.fetched += [str(known[name]) for name in ("src", "href") if known.get(name)]


def test_the_voting_page_is_blind_and_needs_no_network(
    cli: Cli, bundle: Path, sets: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "judged"
    _run(cli, sets, bundle, folder, "--steps", 1, "--steps", 2)
    text = (folder / "vote" / "index.html").read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert "handmade" not in text
    page = _Page()
    page.feed(text)
    assert page.fetched == []  # the script names pictures of its own folder only
    assert set(re.findall(r'find\("(\w+)"\)', text)) <= set(page.ids)
    key = json.loads((folder / "vote.key.json").read_text(encoding="utf-8"))
    assert f'const run = {{"id": "{key["run"]}", "rows": 8}};' in text
    pictures = folder / "vote" / "pictures"
    assert len(list(pictures.iterdir())) == 4 * len(key["rows"]) == 4 * 8
    for number, row in enumerate(key["rows"], 1):
        assert sorted(row) == ["handmade-1-step", "handmade-2-step"]
        shown = [read_picture(pictures / f"{number:04d}-{side}.jpg").frame for side in ("A", "B")]
        found = [
            {
                path.name
                for path in (folder / "outputs" / label).iterdir()
                if np.abs(read_picture(path).frame.astype(int) - frame).mean() < 2
            }
            for label, frame in zip(row, shown, strict=True)
        ]
        assert found[0] & found[1], "both sides are of one pair, and what the key says"
    assert {row[0] for row in key["rows"]} == set(key["rows"][0])  # either can be left


def test_votes_of_the_page_are_counted(
    cli: Cli, bundle: Path, sets: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "judged"
    _run(cli, sets, bundle, folder, "--steps", 1, "--steps", 2)
    key = json.loads((folder / "vote.key.json").read_text(encoding="utf-8"))
    lines = [f"{i},{'A>B' if row[0] == 'handmade-2-step' else 'B>A'}" for i, row in enumerate(key["rows"], 1)]
    votes = tmp_path / "votes.csv"
    votes.write_text("\n".join([f"# run {key['run']}, voter ann", *lines]), encoding="utf-8")
    result = cli("tally", folder / "vote.key.json", votes)
    _, best, other = result.out.splitlines()
    assert " ".join(best.split()) == "handmade-2-step 8 of 8 1.00 100 % (68-100)* 100 % (68-100)* -"
    assert " ".join(other.split()).startswith("handmade-1-step 0 of 8 2.00 0 % (0-32)*")
    votes.write_text("9,A>B\n", encoding="utf-8")
    assert "'9,A>B' is not a vote" in cli("tally", folder / "vote.key.json", votes).error
    # Another candidate joins: the page that votes were cast on stays.
    more = _run(cli, sets, bundle, folder, "--steps", 1, "--steps", 2, "--steps", 4)
    assert "vote.key.json is of other candidates and was kept" in more.out
    assert json.loads((folder / "vote.key.json").read_text(encoding="utf-8")) == key


@pytest.mark.long
def test_with_all_weights(cli: Cli, bundle: Path, sets: tuple[Path, Path], tmp_path: Path) -> None:
    """Fake weights in the published layouts bring every column."""
    pytest.importorskip("torch")
    from support.artfid import write_artfid
    from support.clip_weights import DIM, write_clip, write_csd, write_predictor
    from support.weights import write_vgg
    from transformers import CLIPVisionModelWithProjection

    clip = write_clip(tmp_path / "clip")
    csd = write_csd(tmp_path / "csd.bin", CLIPVisionModelWithProjection.from_pretrained(clip))
    write_predictor(tmp_path / "linearMSE.pth", DIM)
    flags = ("--clip", clip, "--csd", csd, "--aesthetic", tmp_path / "linearMSE.pth", "--artfid")
    flags += (write_artfid(tmp_path / "artfid"), "--vgg", write_vgg(tmp_path / "vgg.safetensors"))
    folder = tmp_path / "judged"
    result = cli(
        *("evaluate", *sets, "--protocol", "std", "--size", 80, "-b", bundle, "-o", folder, "--pairs", 6),
        *flags,
    )
    whole = _whole(folder)
    estimates = whole["estimates"]
    assert {"csd", "csd_csls", "aesthetic", "vgg_style", "vgg_content", "artfid", "fid", "lpips"} <= set(
        estimates
    )
    for label, row in estimates["artfid"].items():
        lpips, fid = (estimates[name][label][0] for name in ("lpips", "fid"))
        assert row[0] == pytest.approx((1 + lpips) * (1 + fid))
        assert row[1] < row[0] < row[2]
    assert estimates["lpips"]["photo"][0] == 0
    clips = "a clip among CONTENTS, or --video FILE"
    missing = f"Not measured: DINO content (--dino FOLDER); warping, clip sharpness ({clips})."
    assert missing in result.out.splitlines()
    small = cli("evaluate", *sets, "--protocol", "std", "--size", 64, *flags, "-o", tmp_path / "small").error
    assert "--artfid needs pictures of at least 75 px, got 64; give a larger --size" in small
