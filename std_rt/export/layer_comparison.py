"""The first layer of a graph that two backends, or two bundles, compute differently.

    found = first_difference(Side(path, "openvino"), Side(path, "onnxruntime"), inputs, floor_db=60)

Tensors between the layers become outputs of a copy of the graph, a few dozen at a time: spread over the
whole graph at first, then between the last that is equal and the first that is not. So a UNet of thousands of
layers takes three or four runs, and no more memory than those dozens need.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from std_rt.core.errors import BackendError
from std_rt.core.onnx_file import external_locations
from std_rt.engines.protocol import Array, GraphSpec
from std_rt.engines.registry import open_engine

__all__ = ["Difference", "Side", "first_difference", "psnr_db"]

_AT_A_TIME = 32  # tensors that one run returns
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}


@dataclass(frozen=True)
class Side:
    """A graph (an ONNX file) on a backend."""

    path: Path
    backend: str
    precision: str = "auto"
    compute: str = "fp32"


@dataclass(frozen=True)
class Difference:
    """The layer whose output ``tensor`` is the first below the floor; ``before``: the last tensor compared
    that is not (empty: there is none)."""

    layer: str
    operator: str
    tensor: str
    psnr_db: float
    before: str

    def __str__(self) -> str:
        after = f", the first after {self.before}" if self.before else ""
        return f"{self.operator} '{self.layer}' (output {self.tensor}, {self.psnr_db:.1f} dB{after})"


def psnr_db(found: Array, wanted: Array) -> float:
    """Peak signal-to-noise ratio; the peak is the range of ``wanted``. Equal arrays give 200 dB."""
    error = float(np.mean((found.astype(np.float64) - wanted) ** 2))
    span = float(wanted.max() - wanted.min())
    if not np.isfinite(error):
        return float("-inf")
    return 200.0 if error == 0 else min(200.0, 10 * np.log10(max(span, 1e-12) ** 2 / error))


def first_difference(
    one: Side, other: Side, inputs: Mapping[str, Array], floor_db: float
) -> Difference | None:
    """The first tensor, in the order of the graph, that is below ``floor_db`` of PSNR; None if none is.

    Only what both graphs name alike and compute in the same shape is compared, and only floats. A tensor
    that is further down and good again is not looked for: layers such as a softmax can hide a difference.
    Raises BackendError if a side cannot run its graph.
    """
    makers = {tensor: node for node in _read(one).graph.node for tensor in node.output}
    names = _floats(one)
    if other.path != one.path:
        known = set(_floats(other))
        names = [name for name in names if name in known]
    last_good, worst = "", None
    while names:
        step = max(1, -(-len(names) // _AT_A_TIME))
        asked = [*names[step - 1 :: step]]
        asked += [] if asked and asked[-1] == names[-1] else [names[-1]]
        mine, others = (_run(side, asked, inputs) for side in (one, other))
        begin, worst = 0, None
        for name in asked:
            if mine[name].shape == others[name].shape:
                level = psnr_db(others[name], mine[name])
                if level < floor_db:
                    worst = (name, level)
                    break
            begin, last_good = names.index(name) + 1, name
        if worst is None or step == 1:
            break
        names = names[begin : names.index(worst[0]) + 1]
    if worst is None:
        return None
    node = makers[worst[0]]
    return Difference(node.name, node.op_type, *worst, last_good)


def _read(side: Side) -> onnx.ModelProto:
    return onnx.load(side.path, load_external_data=False)


def _floats(side: Side) -> list[str]:
    """Names of all float tensors that a layer computes, in order."""
    model = onnx.shape_inference.infer_shapes(_read(side))
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    return [name for node in model.graph.node for name in node.output if kinds.get(name) in _FLOATS]


def _run(side: Side, wanted: Sequence[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The values of tensors, computed by a copy of the graph that returns them."""
    model = onnx.shape_inference.infer_shapes(_read(side))
    infos = {info.name: info for info in (*model.graph.value_info, *model.graph.output)}
    model = _read(side)
    returned = {port.name for port in model.graph.output}
    model.graph.output.extend(infos[name] for name in wanted if name not in returned)
    shapes = {name: array.shape for name, array in inputs.items()}
    with tempfile.TemporaryDirectory() as folder:
        for location in external_locations(side.path):
            _link(side.path.parent / location, Path(folder) / location)
        path = Path(folder) / side.path.name
        onnx.save(model, path)
        # Without steady inputs, which a backend may compute apart; without a key, so nothing is kept.
        spec = GraphSpec(side.path.stem, path, shapes, key="", steady=frozenset(), compute=side.compute)
        engine = open_engine(side.backend, spec, side.precision)
        try:
            results = engine(**{name: np.ascontiguousarray(array) for name, array in inputs.items()})
            return {name: np.array(results[name], np.float32) for name in wanted}
        except KeyError as error:
            raise BackendError(f"{side.backend} does not return {error} of graph '{spec.name}'") from error
        finally:
            engine.close()


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)
