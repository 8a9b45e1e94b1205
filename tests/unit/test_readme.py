"""The Python in the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from support.media_samples import ClipSpec, frame_times, make_clip

from std_rt import Stylizer
from std_rt.core.bundle import Bundle
from std_rt.live.keys import markdown_table
from std_rt.media import read_picture, write_picture

README = Path(__file__).parents[2] / "README.md"


def test_the_example_runs(handmade: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    load = Stylizer.load
    monkeypatch.setattr(Stylizer, "load", lambda **options: load(handmade, **options))
    monkeypatch.chdir(tmp_path)
    for value, name in enumerate(("art", "ink", "one", "two")):
        write_picture(Path(f"{name}.png"), np.full((32, 48, 3), 60 * value, np.uint8))
    make_clip(Path("clip.mp4"), ClipSpec())
    exec(compile(code, str(README), "exec"), {})
    assert read_picture(Path("styled_two.png")).frame.shape == (32, 48, 3)
    assert len(frame_times(Path("styled.mp4"))) == len(frame_times(Path("clip.mp4")))


def test_the_readme_shows_the_table_of_keys() -> None:
    assert markdown_table() in README.read_text(encoding="utf-8")
