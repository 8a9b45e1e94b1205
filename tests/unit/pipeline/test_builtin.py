"""The model in the box: intact, small enough, the same on every engine, and it stylizes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from std_rt import Stylizer
from std_rt.core.bundle import CONTENT, Bundle, load_bundle, verify_bundle
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
    """Both forms and the self-check together."""
    verify_bundle(bundle)
    assert bundle.total_bytes <= 40 * MB
    assert "unet" in bundle.quantized("int8")
    assert bundle.tau == 739
    assert {source["licence"] for source in bundle.manifest["sources"]} == {"apache-2.0"}


def test_two_steps_without_guidance_are_its_default(bundle: Bundle) -> None:
    assert (bundle.default_steps, bundle.steps_allowed) == (2, [1, 2, 4])
    assert bundle.manifest["guidance"] == {"mode": "none", "scale": 1.0}
    assert bundle.unet_inputs == CONTENT  # what few steps rest on


def _multiplications(bundle: Bundle, graph: str, size_px: int) -> int:
    """Of all convolutions and matrix products for one picture of ``size_px`` squared."""
    from openvino import Core

    axes = {"height": size_px, "width": size_px, "latent_height": size_px // 8, "latent_width": size_px // 8}
    model = Core().read_model(bundle.graph_path(graph))
    inputs = bundle.manifest["graphs"][graph]["inputs"]
    model.reshape({p["name"]: [axes.get(n, 1 if n == "batch" else n) for n in p["shape"]] for p in inputs})
    total = 0
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in ("Convolution", "MatMul"):
            continue
        second = node.input(1).get_shape()
        if kind == "MatMul":
            second = [0, second[-1 if node.get_attributes()["transpose_b"] else -2]]
        total += int(np.prod(node.output(0).get_shape()) * np.prod(second[1:]))
    return total


def test_a_frame_costs_what_two_ordinary_cores_can_do(bundle: Bundle) -> None:
    """6.5 GMAC at 256 px and 2 steps; the style encoder runs once a style."""
    calls = {"vae_encoder": 1, "unet": bundle.default_steps, "vae_decoder": 1}
    cost = {graph: count * _multiplications(bundle, graph, 256) for graph, count in calls.items()}
    assert cost["unet"] > 3e9  # what is counted is there
    assert sum(cost.values()) <= 6.5e9


def test_the_manifest_names_no_place_on_a_machine(bundle: Bundle) -> None:
    text = (bundle.path / "manifest.json").read_text(encoding="utf-8")
    assert "/home" not in text
    assert "runs/" not in text
    assert str(Path.cwd()) not in text


def test_torch_gives_the_same_picture(bundle: Bundle) -> None:
    from std_rt.evaluation.diffusers_baseline import DiffusersLoop

    frame, style = scenes(128)["lake"], styles(256)["swirls"]
    loop = DiffusersLoop(bundle, bundle.default_steps, (128, 128))
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
