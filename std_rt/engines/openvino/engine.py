"""OpenVINO engines on the CPU, the default backend; in bf16 if the processor has bf16 hardware.

Compiled models are kept in the engine cache (`compiled`). The part of the UNet that does not depend on the
picture is computed once per style and step (`graph.split_steady`). A quantized graph runs its int8 layers in
int8 whatever precision is asked for, and the layers between them in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import openvino as ov

from std_rt.core.errors import BackendError
from std_rt.engines.cache import EngineCache
from std_rt.engines.openvino.compiled import Compiled, compile_graph, engine_key
from std_rt.engines.openvino.graph import STEADY
from std_rt.engines.protocol import Array, GraphSpec, check_inputs

__all__ = ["OpenVinoEngine", "devices", "open_graph"]

# The bindings build their table of dtypes at its first use. Two threads that do so at once deadlock (one
# holds a C++ guard and waits for the interpreter, the other the reverse), so it is built at import.
ov.Type.f32.to_dtype()

_HINTS = {"fp32": "f32", "bf16": "bf16"}
# Results of steady inputs to keep: one per style and step, 200 kB each for std-tiny, 60 MB for SDXL.
_KEEP_RESULTS = 32
_KEEP_BYTES = 256 * 2**20
# Graphs with more weights are not cached: the file is as large as the weights in fp32, reading and hashing it
# takes as long as compiling again, and a full-size model would fill 10 GB for every size in use.
_LARGEST_CACHED_BYTES = 2**30


def open_graph(spec: GraphSpec, precision: str) -> OpenVinoEngine:
    """Compile ``spec`` for the CPU, or take it from the engine cache. Raises BackendError."""
    core = ov.Core()
    chosen = _precision(core, precision)
    if spec.compute == "int8":
        # With bf16 beside it some int8 convolutions have "no suitable implementations" on AMX (2026.4), and
        # the others were no faster.
        return OpenVinoEngine(spec.name, _cached(core, spec, _config("fp32")), "int8")
    return OpenVinoEngine(spec.name, _cached(core, spec, _config(chosen)), chosen)


def _cached(core: ov.Core, spec: GraphSpec, config: dict[str, str]) -> Compiled:
    """The compiled graph, from the cache if it is there and is put there if not."""
    cache = EngineCache.open() if spec.key else None
    if cache is None:
        return compile_graph(core, spec, config)[0]
    key, broken = engine_key(core, spec, config), False
    try:
        data = cache.read(key)
        if data is not None:
            return Compiled.read(data, core, config)
    except (BackendError, RuntimeError):
        broken = True  # damaged, from another machine (so never imported), or refused by OpenVINO
    compiled, weight_bytes = compile_graph(core, spec, config)
    if weight_bytes <= _LARGEST_CACHED_BYTES:
        try:
            cache.build(key, compiled.write, replace=broken, origin=spec.path.parent.resolve())
        except BackendError as error:  # only the next start is slower
            logging.getLogger("std_rt").warning("%s", error)
    return compiled


class Prepared:
    """The part of a graph that depends on steady inputs alone, with its latest results."""

    def __init__(self, compiled: ov.CompiledModel, names: Sequence[str]) -> None:
        """``names`` are those of the inputs, in order: a compiled input may be named after its own cast."""
        sizes = {name: int(np.prod(port.shape)) for name, port in zip(names, compiled.inputs, strict=True)}
        self.names = sorted(sizes, key=sizes.__getitem__)
        self._request = compiled.create_infer_request()
        # A result has two names: its own, and that of its tensor in the graph.
        self._outputs = [
            next(name for name in port.get_names() if name.startswith(STEADY)) for port in compiled.outputs
        ]
        size = sum(int(np.prod(port.shape)) * port.element_type.size for port in compiled.outputs)
        self._room = max(1, min(_KEEP_RESULTS, _KEEP_BYTES // max(size, 1)))
        self._known: list[tuple[dict[str, Array], ov.InferRequest]] = []

    def request_for(self, compiled: ov.CompiledModel, inputs: dict[str, Array]) -> ov.InferRequest:
        """A request of ``compiled`` with this part's results for ``inputs`` already bound."""
        for i, (values, request) in enumerate(self._known):
            # Smallest input first, so that a different timestep is seen at once.
            if all(np.array_equal(values[name], inputs[name]) for name in self.names):
                if i:
                    self._known.insert(0, self._known.pop(i))
                return request
        full = len(self._known) >= self._room
        request = self._known.pop()[1] if full else compiled.create_infer_request()
        for name, value in self._run(inputs).items():
            request.set_tensor(name, value)
        self._known.insert(0, ({name: inputs[name].copy() for name in self.names}, request))
        return request

    def _run(self, inputs: dict[str, Array]) -> dict[str, ov.Tensor]:
        for name in self.names:
            self._request.set_tensor(name, _tensor(inputs[name]))
        self._request.infer()
        return {name: _copy(self._request.get_tensor(name)) for name in self._outputs}


class OpenVinoEngine:
    """One compiled graph. Use it from one thread at a time."""

    def __init__(self, name: str, compiled: Compiled, precision: str) -> None:
        self.inputs, self.outputs, self.precision = compiled.inputs, compiled.outputs, precision
        self._name = name
        self._prepared = None if compiled.prepare is None else Prepared(compiled.prepare, compiled.steady)
        self._moving = [key for key in self.inputs if key not in compiled.steady]
        self._compiled: ov.CompiledModel | None = compiled.main
        self._request = compiled.main.create_infer_request() if self._prepared is None else None

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        if self._compiled is None:
            raise BackendError(f"graph '{self._name}' was closed; open it again")
        check_inputs(self._name, self.inputs, inputs)
        request = self._request
        if request is None:
            assert self._prepared is not None
            request = self._prepared.request_for(self._compiled, inputs)
        # Kept by name until the run is over: a tensor without copy does not own its memory.
        tensors = {key: _tensor(inputs[key]) for key in self._moving}
        for key, tensor in tensors.items():
            request.set_tensor(key, tensor)
        request.infer()
        return {key: request.get_tensor(key).data for key in self.outputs}

    def close(self) -> None:
        """Free the model and its buffers."""
        self._compiled = self._request = self._prepared = None


def devices() -> str:
    """The devices OpenVINO sees, and the CPU's name and number formats, for `std-rt doctor`."""
    core = ov.Core()
    cpu = str(core.get_property("CPU", "FULL_DEVICE_NAME")).strip()
    formats = ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return f"devices {', '.join(core.available_devices)}; {cpu} ({formats})"


def _precision(core: ov.Core, asked: str) -> str:
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if asked == "bf16" and not has_bf16:
        raise BackendError("this processor does not compute bf16 in hardware; use --precision fp32 or auto")
    return ("bf16" if has_bf16 else "fp32") if asked == "auto" else asked


def _config(precision: str) -> dict[str, str]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "EXECUTION_MODE_HINT": "ACCURACY" if precision == "fp32" else "PERFORMANCE",
    }


def _tensor(array: Array) -> ov.Tensor:
    """No copy if the array is contiguous: the tensor shares its memory for the call."""
    return ov.Tensor(np.ascontiguousarray(array), shared_memory=True)


def _copy(tensor: ov.Tensor) -> ov.Tensor:
    """A copy made without NumPy, which has no bfloat16."""
    copy = ov.Tensor(tensor.element_type, tensor.shape)
    tensor.copy_to(copy)
    return copy
