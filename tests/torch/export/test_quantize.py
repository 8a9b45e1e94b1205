"""The int8 form of a bundle: what is quantized, what is not, and the gate in front of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nncf")

import onnx
import onnx_ir as ir
from support.cli_support import Cli
from support.handmade import write_handmade
from support.once import made_once

from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import ExportError
from std_rt.core.onnx_file import external_locations
from std_rt.engines import GraphSpec, backends, open_engine
from std_rt.export import quantize
from std_rt.export.parity import psnr_db
from std_rt.export.quantize import Quality, make_pairs, quantize_bundle
from std_rt.export.quantize_graph import RUNGS, kept_layers, quantize_graph, weighted_layers
from std_rt.pipeline.stylizer import Stylizer


@pytest.fixture(scope="module", autouse=True)
def _quick_renders() -> Iterator[None]:
    """Waves of several colours in place of the example pictures: smaller, so they are stylized sooner."""
    with pytest.MonkeyPatch.context() as patch:
        for group, count in (("scenes", 4), ("styles", 6)):
            waves = {f"{group}{i}": _waves(100 * count + i) for i in range(count)}
            patch.setattr(quantize, group, lambda waves=waves: waves)
        yield


def _change_form(patch: pytest.MonkeyPatch, form: str = "int8", **changes: Any) -> None:
    patch.setitem(quantize.FORMS, form, replace(quantize.FORMS[form], **changes))


def _waves(seed: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    parts = [np.sin(x / rng.uniform(2, 20)) * np.cos(y / rng.uniform(2, 20)) for _ in range(3)]
    return np.clip(np.stack(parts, -1) * 120 + rng.uniform(60, 200, 3), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def int8_bundle(own_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`own_bundle` with an int8 form; its random weights make noisy pictures, so the floors are lower.

    Made from files that have a second hard link, as installers make them.
    """
    folder = tmp_path_factory.mktemp("linked")
    copy = shutil.copytree(own_bundle.path, folder / "copy")
    linked = shutil.copytree(copy, folder / "bundle", copy_function=os.link)
    with pytest.MonkeyPatch.context() as patch:
        _change_form(patch, graphs=("unet", "vae_decoder"), pairs=4)
        patch.setattr(quantize, "_HELD_OUT", 2)
        patch.setattr(quantize, "FLOOR_MEAN_DB", 20.0)
        patch.setattr(quantize, "FLOOR_WORST_DB", 15.0)
        make = partial(quantize_bundle, load_bundle(linked))
        return load_bundle(made_once(tmp_path_factory, "mini-int8", make))


def _inputs(bundle: Bundle, graph: str) -> dict[str, np.ndarray[Any, Any]]:
    start = f"{graph}/in/"
    return {k.removeprefix(start): v for k, v in bundle.reference().items() if k.startswith(start)}


def _run(path: Path, graph: str, backend: str, inputs: dict[str, Any]) -> np.ndarray[Any, Any]:
    shapes = {k: v.shape for k, v in inputs.items()}
    engine = open_engine(backend, GraphSpec(graph, path, shapes, "", compute=_compute(path)), "auto")
    [result] = engine(**inputs).values()
    return result.copy()


def _compute(path: Path) -> str:
    return "int8" if ".int8." in path.name else "fp32"


def test_the_manifest_says_what_is_int8_and_how_near_it_comes(
    own_bundle: Bundle, int8_bundle: Bundle
) -> None:
    done = int8_bundle.quantized("int8")
    assert "unet" in done
    assert all(row["psnr_db"] >= row["worst_db"] >= 15 for row in done.values())
    assert int8_bundle.manifest["int8"]["calibration"]["judged_on"] == 2
    assert int8_bundle.forms == ("fp32", "int8")
    assert int8_bundle.name == "mini-int8"
    assert "nncf" in int8_bundle.manifest["created_with"]
    assert "int8" not in own_bundle.manifest


def test_both_forms_read_the_same_weights(own_bundle: Bundle, int8_bundle: Bundle) -> None:
    added = int8_bundle.manifest["files"].keys() - own_bundle.manifest["files"].keys()
    assert added == {entry["file"] for entry in int8_bundle.quantized("int8").values()}
    for name, entry in own_bundle.manifest["files"].items():
        assert int8_bundle.manifest["files"][name] == entry
    path = _int8(int8_bundle, "unet")
    weights = own_bundle.weights_path("unet")
    assert external_locations(path) == {weights.name}
    # More than the float graph has to say, and far less than its weights.
    assert path.stat().st_size < own_bundle.graph_path("unet").stat().st_size + 0.2 * weights.stat().st_size


@pytest.mark.parametrize(
    "backend", [info.name for info in backends() if info.name in ("openvino", "onnxruntime")]
)
def test_every_cpu_runtime_gives_nearly_the_float_graph(
    backend: str, own_bundle: Bundle, int8_bundle: Bundle
) -> None:
    inputs = _inputs(own_bundle, "unet")
    wanted = _run(int8_bundle.graph_path("unet"), "unet", backend, inputs)
    found = _run(_int8(int8_bundle, "unet"), "unet", backend, inputs)
    assert 25 < psnr_db(found, wanted) < 100  # and it is not the float graph


def _int8(bundle: Bundle, graph: str) -> Path:
    return bundle.quantized_paths(graph)["int8"]


def test_sizes_stay_open(int8_bundle: Bundle) -> None:
    frame = np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8)
    results = []
    for precision in ("fp32", "int8"):
        with Stylizer.load(int8_bundle, size=(64, 128), precision=precision) as stylizer:
            stylizer.set_style(frame)
            results.append(stylizer.stylize(frame).astype(np.float64))
    assert psnr_db(results[1], results[0]) > 15


def test_whatever_is_rounded_depends_on_the_picture(int8_bundle: Bundle) -> None:
    """With style, text and time held, another sample changes every rounded value."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = onnx.load(_int8(int8_bundle, "unet"))
    rounded = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    names = sorted(rounded - {port.name for port in model.graph.input} - _constants(model.graph))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = _inputs(int8_bundle, "unet")
    other = inputs | {"sample": inputs["sample"][..., ::-1].copy()}
    pairs = zip(names, session.run(names, inputs), session.run(names, other), strict=True)
    assert len(names) > 10
    assert not [name for name, before, after in pairs if np.array_equal(before, after)]


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Names of weights, and of what follows from them."""
    found = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.input and found.issuperset(node.input):
            found.update(node.output)
    return found


def test_what_follows_from_style_and_time_alone_stays_in_float(int8_bundle: Bundle) -> None:
    graph = onnx.load(_int8(int8_bundle, "unet"), load_external_data=False).graph
    rounded = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    weights = _constants(graph)
    steady = ("time_embedding.linear_1.weight", "time_emb_proj.weight", "add_embedding.linear_1.weight")
    for part in steady:
        assert any(part in name for name in weights), part
        assert not any(part in name for name in rounded), part
    assert any("resnets.0.conv1.weight" in name for name in rounded & weights)


def test_a_bundle_that_differs_too_much_is_not_written(
    own_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rungs, makers = [], []

    def maker(source: Path, folder: Path, name: str, samples: Any) -> Any:
        makers.append(name)

        def make(target: Path, kept: Any) -> None:
            rungs.append(kept)
            shutil.copyfile(source, target)

        return make

    _change_form(monkeypatch, maker=maker)
    monkeypatch.setattr(quantize.Gate, "judge", lambda self, graph, path: Quality(33.9, 30.0))
    with pytest.raises(ExportError, match=r"33\.9 dB \(worst 30\.0 dB\).*34 dB.*--calibrate"):
        quantize_bundle(own_bundle, tmp_path / "bad")
    layers = weighted_layers(ir.load(own_bundle.graph_path("unet")))
    assert rungs == [kept_layers(layers, keep) for keep in RUNGS]
    assert len(rungs[0]) < len(rungs[1]) < len(rungs[2])
    assert makers == ["unet"]  # calibrated once
    assert not list(tmp_path.iterdir())


def test_a_vae_that_does_not_pass_stays_in_float(
    own_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def maker(source: Path, folder: Path, name: str, samples: Any) -> Any:
        return lambda target, kept: shutil.copyfile(source, target)

    good, bad = Quality(50, 50), Quality(50, 27)
    judged: list[str] = []

    def judge(gate: Any, graph: str, path: Path) -> Quality:
        judged.append(graph)
        return bad if "vae" in graph else good

    _change_form(monkeypatch, maker=maker)
    monkeypatch.setattr(quantize.Gate, "judge", judge)
    notes: list[str] = []
    made = quantize_bundle(own_bundle, tmp_path / "half", progress=notes.append)
    assert list(made.quantized("int8")) == ["unet"]
    assert not list(made.path.glob("vae_*.int8.onnx"))
    assert any("vae_encoder stays in float: 50.0 dB (worst 27.0 dB)" in note for note in notes)
    assert judged.count("vae_encoder") == 2  # the last rung names none of its layers
    # Once more, in place: the form is replaced.
    _change_form(monkeypatch, graphs=("unet", "vae_decoder"))
    monkeypatch.setattr(quantize.Gate, "judge", lambda self, graph, path: good)
    again = quantize_bundle(made, made.path, overwrite=True)
    assert list(again.quantized("int8")) == ["unet", "vae_decoder"]
    assert again.name == made.name


def test_the_ends_of_a_graph_can_stay_in_float(own_bundle: Bundle, tmp_path: Path) -> None:
    samples = [_inputs(own_bundle, "vae_decoder")]
    target = tmp_path / "vae_decoder.onnx"
    source = own_bundle.graph_path("vae_decoder")
    kept = kept_layers(weighted_layers(ir.load(source)), ("ends",))
    assert len(kept) == 2
    quantize_graph(source, target, "vae_decoder", samples, kept)
    model = onnx.load(target, load_external_data=False)
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    fed = [makers.get(node.input[0]) == "DequantizeLinear" for node in convs]
    assert fed == [False, *[True] * (len(convs) - 2), False]


def test_int8_is_made_from_fp32_alone(own_bundle: Bundle, tmp_path: Path) -> None:
    halves = {"precision": {"unet": {"compute": "fp16", "weights": "fp16"}}}
    half = replace(own_bundle, manifest=own_bundle.manifest | halves)
    with pytest.raises(ExportError, match="computes unet in fp16, and int8 is made from fp32"):
        quantize_bundle(half, tmp_path / "again")


@pytest.mark.parametrize("count", [0, 1, 4, 9, 40])
def test_what_is_judged_on_was_not_calibrated_on(count: int) -> None:
    pictures = [np.full((2, 2, 3), i, np.uint8) for i in range(count)]
    seen, unseen = make_pairs(pictures, 18)
    calibrated = {frame.tobytes() for pair in seen for frame in pair}
    judged = {frame.tobytes() for pair in unseen for frame in pair}
    assert not calibrated & judged
    assert len(seen) >= 18
    assert len(unseen) >= quantize._HELD_OUT
    assert len({tuple(map(bytes, pair)) for pair in seen}) == len(seen)
    assert {p.tobytes() for p in pictures} <= calibrated | judged


def test_quality_needs_both_floors() -> None:
    passing = Quality(quantize.FLOOR_MEAN_DB, quantize.FLOOR_WORST_DB)
    assert passing.passes
    assert not replace(passing, mean_db=33.99).passes
    assert not replace(passing, worst_db=27.99).passes


def test_bundles_int8_adds_the_form_and_says_its_numbers(
    cli: Cli, handmade: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def made(bundle: Bundle, output: Path, pictures: Any, progress: Any, **options: Any) -> Bundle:
        asked.append((bundle.name, len(pictures), options))
        return write_handmade(output, int8=True)

    monkeypatch.setattr(quantize, "quantize_bundle", made)
    result = cli("bundles", "int8", handmade.path, "-o", tmp_path / "both")
    assert asked == [("handmade", 0, {"overwrite": False, "form": "int8", "pairs": None})]
    assert "unet, int8: pictures 40.0 dB (worst 35.0 dB) against fp32" in result.out
    again = cli("bundles", "int8", handmade.path, "-o", tmp_path / "both")
    assert (again.code, len(asked)) == (2, 1)
    assert "exists already; add --overwrite" in again.error


def test_an_export_in_int8_adds_the_form_to_the_bundle_that_it_wrote(
    handmade: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from std_rt.cli.export import _export

    asked: list[Any] = []
    monkeypatch.setattr("std_rt.export.build.export_pipeline", lambda *_, **__: handmade)
    monkeypatch.setattr(
        quantize, "quantize_bundle", lambda *given, **options: asked.append((given, options)) or "both"
    )
    pictures, say = [np.zeros((4, 4, 3), np.uint8)], print
    for precision, made in (("fp32", handmade), ("int8", "both")):
        assert _export(tmp_path, tmp_path / "out", {"precision": precision}, pictures, say) == made
    wanted = {"overwrite": True, "name": "handmade", "form": "int8"}
    assert asked == [((handmade, tmp_path / "out", pictures, say), wanted)]


def test_an_export_whose_int8_form_fails_is_a_bundle_with_a_line(
    handmade: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from std_rt.cli.export import _export

    def fails(*_: Any, **options: Any) -> Bundle:
        raise ExportError("int8 changes the pictures of 'x' too much")

    said: list[str] = []
    options = {"precision": "int8", "remark": said.append}
    monkeypatch.setattr("std_rt.export.build.export_pipeline", lambda *_, **__: handmade)
    monkeypatch.setattr(quantize, "quantize_bundle", fails)
    assert _export(tmp_path, tmp_path / "out", options, [], said.append) is handmade
    assert said == ["the bundle has no int8 form: int8 changes the pictures of 'x' too much"]
