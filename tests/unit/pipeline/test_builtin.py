"""The model in the box: intact, small enough, the same on every engine, and it stylizes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from std_rt import Stylizer
from std_rt.core.bundle import Bundle, load_bundle, verify_bundle
from std_rt.evaluation.measures import score
from std_rt.examples import scenes, styles
from std_rt.media.image import read_picture, write_picture

MB = 1_000_000


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle()


@pytest.fixture(scope="module")
def stylizer(bundle: Bundle) -> Iterator[Stylizer]:
    with Stylizer.load(bundle) as opened:
        yield opened


def test_it_is_intact_and_within_its_size(bundle: Bundle) -> None:
    verify_bundle(bundle)
    weights = {bundle.weights_path(graph) for graph in bundle.graph_names}
    assert sum(path.stat().st_size for path in weights) <= 40 * MB
    assert bundle.tau == 739
    assert bundle.default_steps == 4
    assert {source["licence"] for source in bundle.manifest["sources"]} == {"apache-2.0"}


def test_the_manifest_names_no_place_on_a_machine(bundle: Bundle) -> None:
    text = (bundle.path / "manifest.json").read_text(encoding="utf-8")
    assert "/home" not in text
    assert "runs/" not in text
    assert str(Path.cwd()) not in text


def test_torch_gives_the_same_picture(bundle: Bundle) -> None:
    from std_rt.evaluation.diffusers_baseline import DiffusersLoop

    frame, style = scenes(128)["lake"], styles(256)["swirls"]
    loop = DiffusersLoop(bundle, 4, (128, 128))
    loop.set_style(style)
    theirs = loop.step(frame)
    for backend in ("openvino", "onnxruntime"):
        with Stylizer.load(bundle, size=(128, 128), backend=backend, precision="fp32") as stylizer:
            stylizer.set_style(style)
            ours = stylizer.stylize(frame)
        assert np.abs(ours.astype(int) - theirs).mean() < 0.5, backend


def test_it_moves_pictures_towards_the_style_and_keeps_the_drawing(stylizer: Stylizer) -> None:
    """Over twelve example pairs the palette and the texture come nearer to the style; nobody is lost."""
    before, after = [], []
    looks = list(styles(256).values())
    for i, frame in enumerate(scenes(256).values()):
        for style in looks[i % 2 :: 2]:  # every scene in three styles, every style in two scenes
            stylizer.set_style(style)
            before.append(score(frame, frame, style))
            after.append(score(stylizer.stylize(frame), frame, style))
    assert np.mean([s.colour for s in after]) < 0.75 * np.mean([s.colour for s in before])
    assert np.mean([s.texture for s in after]) < 0.9 * np.mean([s.texture for s in before])
    assert np.mean([s.structure for s in after]) > 0.75


def test_style_strength_zero_leaves_the_style_out(stylizer: Stylizer) -> None:
    frame = scenes(256)["cat"]
    outputs = []
    for name in ("swirls", "ink"):
        stylizer.set_style(styles(256)[name], strength=0.0)
        outputs.append(stylizer.stylize(frame))
    assert np.array_equal(*outputs)


def test_the_command_paints_a_picture_in_a_process_of_its_own(tmp_path: Path) -> None:
    write_picture(tmp_path / "in.png", scenes(300)["street"][:200])
    write_picture(tmp_path / "style.png", styles(256)["wave"])
    command = [sys.executable, "-m", "std_rt", "stylize", "in.png", "--style", "style.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    height, width = read_picture(tmp_path / "in_styled.png").frame.shape[:2]
    assert abs(width / height - 1.5) < 0.01
    assert max(height, width) <= 300
