"""The FP8 form of a bundle, and attention as ONNX's operator: what GPUs get, judged on a CPU."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.cli_support import Cli, picture
from support.once import made_once

from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import BackendError, ExportError
from std_rt.core.onnx_file import external_locations
from std_rt.engines import GraphSpec, open_engine
from std_rt.export import quantize
from std_rt.export.float8 import MARGIN, activation_ranges, float8_graph
from std_rt.export.parity import psnr_db
from std_rt.export.quantize import quantize_bundle

pytest.importorskip("onnxruntime")
_LARGEST = 448.0


@pytest.fixture(scope="module", autouse=True)
def _quick_renders() -> Iterator[None]:
    """Noise in place of the example pictures: smaller, so they are stylized sooner."""
    rng = np.random.default_rng(0)
    frames = {str(i): rng.integers(0, 256, (64, 64, 3), np.uint8) for i in range(4)}
    with pytest.MonkeyPatch.context() as patch:
        for group in ("scenes", "styles"):
            patch.setattr(quantize, group, lambda: frames)
        yield


@pytest.fixture(scope="module")
def eight(half_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`half_bundle` with an FP8 form; its random weights make noisy pictures, so the floors are lower."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "FLOOR_MEAN_DB", 20.0)
        patch.setattr(quantize, "FLOOR_WORST_DB", 15.0)

        def make(output: Path) -> None:
            quantize_bundle(half_bundle, output, form="fp8", pairs=2)

        return load_bundle(made_once(tmp_path_factory, "mini-fp8", make))


def _inputs(bundle: Bundle) -> dict[str, np.ndarray[Any, Any]]:
    start = "unet/in/"
    return {k.removeprefix(start): v for k, v in bundle.reference().items() if k.startswith(start)}


def _spec(path: Path, inputs: dict[str, Any], compute: str) -> GraphSpec:
    return GraphSpec("unet", path, {k: v.shape for k, v in inputs.items()}, "", compute=compute)


def _run(path: Path, inputs: dict[str, Any], compute: str) -> np.ndarray[Any, Any]:
    engine = open_engine("onnxruntime", _spec(path, inputs, compute))
    return engine(**inputs)["noise_pred"].copy()


def test_a_unet_in_fp16_has_attention_as_one_operator(half_bundle: Bundle, own_bundle: Bundle) -> None:
    """Except to the style, which shares its query with attention to the text."""
    model = onnx.load(half_bundle.graph_path("unet"), load_external_data=False)
    assert model.opset_import[0].version == 23
    found = Counter(node.op_type for node in model.graph.node)
    styled = len(half_bundle.style["layout"]["layers"])
    assert styled > 0
    assert (found["Softmax"], found["Attention"] > styled) == (styled, True)
    queries = [node.input[0] for node in model.graph.node if node.op_type == "Attention"]
    assert len(set(queries)) == len(queries)
    plain = onnx.load(own_bundle.graph_path("unet"), load_external_data=False)
    assert plain.opset_import[0].version == 20  # fp32: for processors


def test_the_form_shares_the_weights_and_says_how_near_it_comes(half_bundle: Bundle, eight: Bundle) -> None:
    assert (half_bundle.forms, eight.forms) == (("fp16",), ("fp16", "fp8"))
    added = eight.manifest["files"].keys() - half_bundle.manifest["files"].keys()
    assert added == {"unet.fp8.onnx"}
    path = eight.quantized_paths("unet")["fp8"]
    assert external_locations(path) == {half_bundle.weights_path("unet").name}
    [row] = eight.quantized("fp8").values()
    assert 100 > row["psnr_db"] >= row["worst_db"] >= 15
    assert eight.manifest["fp8"]["calibration"]["judged_on"] <= 2


def test_the_graph_computes_nearly_what_the_float_graph_does(eight: Bundle) -> None:
    inputs = _inputs(eight)
    wanted = _run(eight.graph_path("unet"), inputs, "fp16")
    found = _run(eight.quantized_paths("unet")["fp8"], inputs, "fp8")
    assert 25 < psnr_db(found, wanted) < 60  # and it is not the float graph


def test_scales_cover_what_was_seen(half_bundle: Bundle, tmp_path: Path) -> None:
    """Checked against the values themselves: weights row by row, activations with the margin."""
    weights = half_bundle.weights_path("unet")
    shutil.copyfile(weights, tmp_path / weights.name)
    inputs = _inputs(half_bundle)
    target = tmp_path / "unet.fp8.onnx"
    source = half_bundle.graph_path("unet")
    float8_graph(source, target, activation_ranges(source, tmp_path, "unet", [inputs]))
    assert {path.name for path in tmp_path.iterdir()} == {target.name, weights.name}
    model = onnx.load(target)
    constants = {t.name: t for t in model.graph.initializer}
    down = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    scales = {node.input[0]: numpy_helper.to_array(constants[node.input[1]]) for node in down}
    makers = {out: node for node in model.graph.node for out in node.output}
    rows = [name for name, scale in scales.items() if scale.ndim]
    assert rows
    for name in rows:
        transposed = name in makers
        stored = numpy_helper.to_array(constants[makers[name].input[0] if transposed else name])
        codes = stored.reshape(len(stored), -1).astype(np.float32) / scales[name].astype(np.float32)[:, None]
        assert np.all(np.abs(codes).max(1) == pytest.approx(_LARGEST, rel=2e-3))
        [node] = [node for node in down if node.input[0] == name]
        assert node.attribute[0].i == int(transposed)
    activations = [name for name, scale in scales.items() if not scale.ndim]
    plain = onnx.load(half_bundle.graph_path("unet"))
    plain.graph.output.extend(onnx.ValueInfoProto(name=name) for name in activations)
    import onnxruntime

    session = onnxruntime.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
    for name, value in zip(activations, session.run(activations, inputs), strict=True):
        largest = np.abs(value.astype(np.float32)).max()
        assert float(scales[name]) * _LARGEST == pytest.approx(MARGIN * largest, rel=5e-3), name


def test_what_was_not_seen_is_clipped_and_stays_a_number(eight: Bundle) -> None:
    inputs = _inputs(eight)
    inputs["sample"] = inputs["sample"] * 40
    assert np.isfinite(_run(eight.quantized_paths("unet")["fp8"], inputs, "fp8")).all()


def test_layers_that_see_style_text_or_time_stay_in_float(eight: Bundle) -> None:
    graph = onnx.load(eight.quantized_paths("unet")["fp8"], load_external_data=False).graph
    rounded = " ".join(node.input[0] for node in graph.node if node.op_type == "QuantizeLinear")
    ports = {port.name for port in graph.input}
    assert not ports & set(rounded.split())
    assert "time_emb" not in rounded
    assert "add_embedding" not in rounded
    assert "conv1.weight" in rounded


def test_rtx_builds_it_for_gpus_with_fp8_units_only(eight: Bundle, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from std_rt.engines.cache import EngineCache
    from std_rt.engines.tensorrt.engine_builder import EngineBuilder
    from std_rt.engines.tensorrt.onnx_to_engine import RTX

    cache = EngineCache(tmp_path / "cache", b"secret")
    inputs = _inputs(eight)
    spec = replace(_spec(eight.quantized_paths("unet")["fp8"], inputs, "fp8"), key=eight.digest)
    float_spec = replace(_spec(eight.graph_path("unet"), inputs, "fp16"), key=eight.digest)
    builder = EngineBuilder(trt, RTX, ("sm89", "sm120"), cache=cache)
    assert builder.key(spec) != builder.key(float_spec)
    assert builder.ensure(spec) != builder.ensure(float_spec)
    old = EngineBuilder(trt, RTX, ("sm86", "sm89"), cache=cache)
    with pytest.raises(BackendError, match=r"^sm86 has no FP8 units, .*; use --precision auto"):
        old.ensure(spec)


def test_fp8_is_made_from_fp16_alone(own_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"computes unet in fp32, and fp8 is made from fp16; export it with"
    ):
        quantize_bundle(own_bundle, tmp_path / "eight", form="fp8")
    assert not list(tmp_path.iterdir())


def test_bundles_fp8_adds_the_form(cli: Cli, half_bundle: Bundle, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(quantize, "FLOOR_MEAN_DB", 15.0)
    monkeypatch.setattr(quantize, "FLOOR_WORST_DB", 10.0)
    result = cli("bundles", "fp8", half_bundle.path, "-o", tmp_path / "both", "--pairs", "1")
    assert (result.code, "unet, fp8: pictures " in result.out) == (0, True), result.error
    assert "fp8 unet" in cli("bundles", "info", tmp_path / "both").out
    picture(tmp_path / "photo.png", 64, 64, seed=0)
    sides = (tmp_path / "photo.png", "--style", tmp_path / "photo.png", "-b", tmp_path / "both")
    refused = cli("stylize", *sides, "-o", tmp_path / "out.png", "--precision", "fp8")
    assert refused.code == 2
    assert "does not compute in FP8; use --precision auto, or --backend rtx or tensorrt" in refused.error
    assert not (tmp_path / "out.png").exists()
    compared = cli("bundles", "compare", tmp_path / "both", "--precision", "fp8")
    assert (compared.code, "layers in fp8 are not compared" in compared.error) == (2, True)
