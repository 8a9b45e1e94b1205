"""`std-rt eval` at sizes that are no multiple of anything, and not square."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cli_support import Cli, picture


@pytest.mark.parametrize("size", ["100", "128x64", "64"])
def test_eval_scores_at_any_size(cli: Cli, bundle: Path, tmp_path: Path, size: str) -> None:
    for i in range(2):
        picture(tmp_path / "contents" / f"{i}.png", 160, 130, seed=i)
        picture(tmp_path / "styles" / f"{i}.png", 150, 140, seed=i + 5)
    sheet = tmp_path / "sheet.png"
    options = ("--pairs", 2, "--size", size, "--bundle", bundle, "-o", sheet)
    done = cli("eval", tmp_path / "contents", tmp_path / "styles", *options)
    assert done.code == 0, done.err
    scores = json.loads(done.out.splitlines()[-1])["scores"]
    assert scores.keys() == {"std-rt", "reinhard", "cv2.stylization"}
    assert all(0 <= value["colour"] < 1 for value in scores.values())
    assert sheet.exists()
