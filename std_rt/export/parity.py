"""The parity gate: an exported graph must give what torch gave, on every CPU backend installed here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from std_rt.core.errors import BackendError, ExportError
from std_rt.core.machine import install_hint
from std_rt.engines import GraphSpec, backends, open_engine
from std_rt.export.graphs import Example
from std_rt.export.layer_comparison import Side, first_difference, psnr_db

__all__ = ["FLOOR_DB", "check_graph", "lint", "psnr_db"]

# fp16 weights are rounded by up to one part in 2048; a wrong layer or input shows far below either line.
FLOOR_DB = {"fp32": 60.0, "fp16": 35.0, "bf16": 28.0}
# Backends to compare on, if installed. The last takes the least memory for a large graph in fp32.
_CPU = ("openvino", "onnxruntime")


def check_graph(
    name: str, path: Path, examples: Sequence[Example], precision: str, *, lean: bool = False
) -> dict[str, Any]:
    """Compare one graph with torch at every example's size; returns the manifest's ``parity`` entry.

    On every CPU backend installed, or with ``lean`` on the one that takes least memory. Raises ExportError
    below the floor of ``precision``, or if no backend is installed to compare on.
    """
    found = [info.name for info in backends() if info.available and info.name in _CPU]
    if precision == "bf16":
        found = [backend for backend in found if backend != "onnxruntime"]  # has no bf16 on a CPU
    found = found[-1:] if lean else found
    if not found:
        raise ExportError(f"no backend is installed to check the export with; run: {install_hint('onnx')}")
    rows = [_compare(name, path, example, backend) for backend in found for example in examples]
    worst = min(rows, key=lambda row: float(row["psnr_db"]))
    floor = FLOOR_DB[precision]
    if worst["psnr_db"] < floor:
        good = [b for b in found if all(r["psnr_db"] >= floor for r in rows if r["runtime"] == b)]
        raise ExportError(
            f"graph '{name}' differs from torch: {worst['psnr_db']:.1f} dB on {worst['runtime']}, below the "
            f"{floor:.0f} dB required, so nothing was written; try --precision fp32 or --weights fp32"
            + (_where(path, examples[0], good[0], worst["runtime"], floor) if good else "")
        )
    return {
        **worst,
        "runtime": ", ".join(found),
        "against": "torch fp32",
        "max_abs": max(r["max_abs"] for r in rows),
    }


def _where(path: Path, example: Example, good: str, bad: str, floor: float) -> str:
    """For the error: the layer in which ``bad`` leaves what ``good`` computes."""
    sides = Side(path, good, "fp32"), Side(path, bad, "fp32")
    try:
        found = first_difference(*sides, example.inputs, floor)
    except BackendError:
        return ""
    what = "" if found is None else f" {bad} first differs from {good} in {found};"
    return (
        f".{what} a bundle that passes is compared like that by: "
        f"std-rt bundles compare NAME --backend {good} --against {bad}"
    )


def _compare(name: str, path: Path, example: Example, backend: str) -> dict[str, Any]:
    shapes = {key: value.shape for key, value in example.inputs.items()}
    try:
        # No cache key: what is compiled here is opened once.
        engine = open_engine(backend, GraphSpec(name, path, shapes, key=""), "fp32")
    except BackendError as error:
        raise ExportError(f"the exported graph does not open: {error}") from error
    results = engine(**{key: np.ascontiguousarray(value) for key, value in example.inputs.items()})
    pairs = [(results[key], wanted) for key, wanted in example.outputs.items()]
    row = {
        "psnr_db": round(min(psnr_db(*pair) for pair in pairs), 2),
        "max_abs": max(float(np.abs(found - wanted).max()) for found, wanted in pairs),
        "runtime": backend,
    }
    engine.close()
    return row


_FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}
_ONE_TYPE = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Concat",
    "MatMul",
    "Gemm",
    "Conv",
    "Where",
    "Pow",
    "LayerNormalization",
}


def lint(path: Path) -> None:
    """ONNX's own checker, then: no operator mixes float types. Raises ExportError.

    TensorRT refuses such graphs, and other runtimes cast without a word. The checker's own type inference
    (``full_check``) is of no use here: at this opset it refuses convolutions in bf16.
    """
    try:
        onnx.checker.check_model(str(path))
        model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not valid ONNX: {' '.join(str(error).split())[:300]}") from error
    graph = model.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        used = {kinds[name] for name in node.input if kinds.get(name) in _FLOATS}
        if node.op_type in _ONE_TYPE and len(used) > 1:
            names = ", ".join(onnx.TensorProto.DataType.Name(kind) for kind in sorted(used))
            raise ExportError(f"{path.name}: {node.op_type} '{node.name}' mixes {names}")
