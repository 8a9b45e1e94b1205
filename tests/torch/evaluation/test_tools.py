"""Outputs of other networks for evaluate's pairs, and votes counted on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from std_rt.core.errors import MediaError
from std_rt.media import read_picture, write_picture
from tools import peers, tally


def _add(folder: Path, name: str, level: int) -> None:
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, np.full((16, 16, 3), level, np.uint8))


def test_every_picture_and_frame_meets_its_own_style(tmp_path: Path) -> None:
    contents = {"a.b--x": 10, "b--y": 20, "clip.1--z/0000": 30, "clip.1--z/0001": 40}
    for name, level in contents.items():
        _add(tmp_path / "content", name, level)
    styles = {"a.b--x": 100, "b--y": 120, "clip.1--z": 140}
    for name, level in styles.items():
        _add(tmp_path / "style", name, level)

    def add(photo: Tensor, style: Tensor) -> Tensor:
        return photo + style

    assert peers.write_outputs(tmp_path, "sum", add) == 4
    for name, level in contents.items():
        found = read_picture(tmp_path / "sum" / f"{name}.png").frame
        assert found.shape == (16, 16, 3)
        assert (found == level + styles[name.split("/")[0]]).all(), name


def test_a_folder_without_pairs_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="--save-outputs"):
        peers.write_outputs(tmp_path, "sum", lambda photo, _: photo)


def test_a_tally_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key, votes = tmp_path / "blind.key.json", tmp_path / "votes.csv"
    key.write_text(json.dumps({"rows": [["old", "new"], ["new", "old"]]}), encoding="utf-8")
    votes.write_text("1,B\n2,A>B\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["tally", str(key), str(votes)])
    tally.main()
    title, new, old = (line.split() for line in capsys.readouterr().out.splitlines())
    assert title[:3] == ["of", "2", "votes"]
    assert new == ["new", "2", "1.00", "-", "2"]
    assert old == ["old", "0", "2.00", "0", "-"]
    votes.write_text("3,B\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        tally.main()
    assert "'3,B' is not a vote" in capsys.readouterr().err
