"""Compiled OpenVINO graphs, and the engine files that keep them: a later start reads and compiles no graph.

An engine file holds a whole opened graph: one line of JSON (ports, names, sizes of what follows), the
compiled model, and the compiled model of the part that depends on steady inputs alone, if there is one. A
compiled model refers to no other file, so nothing is trusted but its bytes, which the engine cache has
checked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from std_rt.core.errors import BackendError, one_line
from std_rt.engines.cache import EngineKey
from std_rt.engines.openvino.graph import keep_half_weights, split_steady
from std_rt.engines.protocol import GraphSpec, Ports

__all__ = ["Compiled", "compile_graph", "engine_key"]

# The steady part runs once per style and step: fp32 costs nothing there and keeps time embeddings exact.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
_FORMAT = 2  # of the file; part of the key


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled graph: ``main``, and ``prepare`` (or None) with the names of its inputs in order."""

    inputs: Ports
    outputs: Ports
    main: ov.CompiledModel
    prepare: ov.CompiledModel | None = None
    steady: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        """Write an engine file."""
        blobs = [model.export_model().getbuffer() for model in (self.main, self.prepare) if model is not None]
        ports = {"inputs": _to_json(self.inputs), "outputs": _to_json(self.outputs)}
        header = {**ports, "steady": self.steady, "bytes": [blob.nbytes for blob in blobs]}
        with path.open("wb") as file:
            file.write(json.dumps(header).encode("utf-8") + b"\n")
            for blob in blobs:
                file.write(blob)

    @classmethod
    def read(cls, data: bytes, core: ov.Core, config: dict[str, str]) -> Compiled:
        """The graph of an engine file's bytes. Raises RuntimeError if OpenVINO does not take them."""
        at = data.index(b"\n") + 1
        header = json.loads(data[:at])
        models = []
        for size, settings in zip(header["bytes"], (config, config | _EXACT), strict=False):
            blob = ov.Tensor(ov.Type.u8, ov.Shape([size]))  # the model keeps it, so weights are not copied
            blob.data[:] = np.frombuffer(data, np.uint8, size, at)
            models.append(core.import_model(blob, "CPU", settings))
            at += size
        inputs, outputs = _from_json(header["inputs"]), _from_json(header["outputs"])
        prepare = models[1] if len(models) > 1 else None
        return cls(inputs, outputs, models[0], prepare, tuple(header["steady"]))


def compile_graph(core: ov.Core, spec: GraphSpec, config: dict[str, str]) -> tuple[Compiled, int]:
    """(the compiled graph, bytes of its weights). Raises BackendError."""
    try:
        return _compile(core, spec, config)
    except RuntimeError as error:
        reason = one_line(error, -300)
        raise BackendError(
            f"openvino cannot run graph '{spec.name}' at {spec.describe_shapes()}: {reason}; "
            "try another --size or --backend onnxruntime"
        ) from error


def _compile(core: ov.Core, spec: GraphSpec, config: dict[str, str]) -> tuple[Compiled, int]:
    model = core.read_model(spec.path)
    if spec.compute != "int8":  # whose weights are rounded once more, to a byte each
        keep_half_weights(model)
    names = {port.get_any_name() for port in model.inputs}
    if names != set(spec.shapes):
        raise BackendError(
            f"graph '{spec.name}' takes {', '.join(sorted(names))}; "
            f"shapes were given for {', '.join(spec.shapes)}"
        )
    model.reshape({name: list(shape) for name, shape in spec.shapes.items()})
    inputs, outputs = _ports(model.inputs), _ports(model.outputs)
    size = sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")
    parts = split_steady(model, spec.steady)
    if parts is None:
        return Compiled(inputs, outputs, core.compile_model(model, "CPU", config)), size
    prepare, main = parts
    steady = tuple(port.get_any_name() for port in prepare.inputs)
    compiled = (
        core.compile_model(main, "CPU", config),
        core.compile_model(prepare, "CPU", config | _EXACT),
    )
    return Compiled(inputs, outputs, *compiled, steady), size


def engine_key(core: ov.Core, spec: GraphSpec, config: dict[str, str]) -> EngineKey:
    """The cache key of ``spec``. The number of threads does not affect compilation."""
    formats = ",".join(sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")))
    flags = {"config": config, "steady": sorted(spec.steady), "format": _FORMAT, "compute": spec.compute}
    return EngineKey(
        bundle=spec.key,
        graph=spec.name,
        shapes=spec.shapes,
        product="openvino",
        version=str(ov.__version__),
        target=f"{str(core.get_property('CPU', 'FULL_DEVICE_NAME')).strip()} ({formats})",
        flags=json.dumps(flags, sort_keys=True),
    )


def _ports(ports: list[Any]) -> Ports:
    return {
        port.get_any_name(): (tuple(port.shape), np.dtype(port.element_type.to_dtype())) for port in ports
    }


def _to_json(ports: Ports) -> dict[str, Any]:
    return {name: [shape, dtype.name] for name, (shape, dtype) in ports.items()}


def _from_json(ports: dict[str, Any]) -> Ports:
    return {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in ports.items()}
