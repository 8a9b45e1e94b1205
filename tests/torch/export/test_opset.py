"""Opset 23: every attention is one operation, the pictures are the same, and TensorRT-RTX builds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from std_rt.core.bundle import Bundle
from std_rt.core.errors import ExportError
from std_rt.engines import GraphSpec, open_engine
from std_rt.export.build import export_pipeline
from std_rt.pipeline.openers import graph_spec


def _operations(bundle: Bundle) -> list[str]:
    return [
        node.op_type for node in onnx.load(bundle.graph_path("unet"), load_external_data=False).graph.node
    ]


def _specs(bundle: Bundle) -> GraphSpec:
    known = {"batch": 1, "latent_height": 8, "latent_width": 8, "text_tokens": 77}
    ports = bundle.manifest["graphs"]["unet"]["inputs"]
    shapes = {p["name"]: tuple(known.get(axis, axis) for axis in p["shape"]) for p in ports}
    return graph_spec(bundle, "unet", shapes)


def test_attention_is_one_operation_and_gives_the_same(
    own_source: Path, own_bundle: Bundle, tmp_path: Path
) -> None:
    fused = export_pipeline(own_source, tmp_path / "fused", size=(64, 64), weights="fp32", opset=23)
    assert "Attention" in _operations(fused)
    assert "Attention" not in _operations(own_bundle)
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in _specs(fused).shapes.items()}
    for backend in ("onnxruntime", "openvino"):
        found = [
            open_engine(backend, _specs(each), "fp32")(**inputs)["noise_pred"] for each in (fused, own_bundle)
        ]
        np.testing.assert_allclose(*found, atol=2e-4)


def test_tensorrt_rtx_builds_it(own_source: Path, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from std_rt.engines.tensorrt.onnx_to_engine import RTX, build_engine

    fused = export_pipeline(own_source, tmp_path / "fused", opset=23, precision="fp16")
    assert "Attention" in _operations(fused)
    build_engine(trt, RTX, _specs(fused), tmp_path / "unet.engine", targets=("sm89",))
    assert (tmp_path / "unet.engine").stat().st_size > 0


def test_another_opset_is_refused(own_source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--opset must be one of 20, 23, got 18"):
        export_pipeline(own_source, tmp_path / "x", opset=18)
