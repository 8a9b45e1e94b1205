"""Outputs of other networks for evaluate's pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from std_rt.core.errors import MediaError
from std_rt.media import read_picture, write_picture
from tools import peers


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
