"""A GPU and a TensorRT made of NumPy: they do what they are told, in order, at the addresses they are given.

Device memory is bytes at made-up addresses; reading or writing where nothing was allocated is an error, as
is any work in a thread that has not called ``bind``. What is put on a stream while it is captured is written
down with its addresses and not done; ``launch`` does it. So a wrong order, a stale address or a forgotten
capture gives a wrong picture or an error, as on a GPU.

An engine here is the JSON of its graph's name and shapes; `FakeTrt.teach` says what it computes.
"""

from __future__ import annotations

import enum
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from std_rt.core.errors import BackendError
from std_rt.engines.glue import GLUE
from std_rt.engines.gpu.probe import Gpu
from std_rt.engines.program import Program, launch_specs
from std_rt.engines.protocol import GraphSpec
from std_rt.engines.tensorrt.engine_builder import EngineBuilder

Function = Callable[..., Mapping[str, np.ndarray]]
Ports = dict[str, tuple[tuple[int, ...], "np.dtype[Any]"]]

LEGACY = 0


class FakeDevice:
    """Stands in for `CudaDevice`. ``log`` has the names of what was called, in order."""

    def __init__(self, memory: int = 2**30) -> None:
        self.gpu = Gpu("Fake 9000", (8, 9), memory)
        self.driver = "cuda 13.0"
        self.log: list[str] = []
        self.memory: dict[int, np.ndarray] = {}
        self.pinned_arrays: list[np.ndarray] = []
        self.streams: set[int] = set()
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self._next, self._left = 0x1000, memory
        self._capturing: tuple[int, list[Callable[[], None]]] | None = None
        self._bound: set[int] = set()
        self.legacy_busy = False

    def bind(self) -> None:
        self._bound.add(threading.get_ident())

    def allocate(self, size: int) -> int:
        self._enter("allocate")
        if size > self._left:
            raise BackendError(f"{self.gpu.name} has {self._left} bytes free and {size} are needed")
        address = self._next
        self._next += 0x100 * (size // 0x100 + 2)
        self._left -= size
        self.memory[address] = np.full(size, 0xA5, np.uint8)
        return address

    def free(self, address: int) -> None:
        self._enter("free")
        self._left += len(self.memory.pop(address))

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        self._enter("pinned")
        self.pinned_arrays.append(np.zeros(shape, dtype))
        return self.pinned_arrays[-1]

    def free_pinned(self, array: np.ndarray) -> None:
        self._enter("free_pinned")
        self.pinned_arrays = [held for held in self.pinned_arrays if held is not array]

    def stream(self) -> int:
        self._enter("stream")
        self._next += 1
        self.streams.add(self._next)
        return self._next

    def drop_stream(self, stream: int) -> None:
        self._enter("drop_stream")
        self.streams.remove(stream)

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        assert array.flags.c_contiguous
        self.put(stream, lambda: self.at(address, array.nbytes).__setitem__(slice(None), _bytes(array)))

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        assert array.flags.c_contiguous
        self.put(stream, lambda: _bytes(array).__setitem__(slice(None), self.at(address, array.nbytes)))

    def synchronize(self, stream: int) -> None:
        self._enter("synchronize")
        assert stream in self.streams
        assert self._capturing is None, "synchronizing breaks a capture"

    def drain(self) -> None:
        self._enter("drain")
        self.legacy_busy = False

    def capture(self, stream: int, record: Callable[[], None]) -> int:
        self._enter("capture")
        assert not self.legacy_busy, "work on the legacy stream breaks a capture"
        self._capturing = (stream, [])
        try:
            record()
            recorded = self._capturing[1]
        finally:
            self._capturing = None
        self._next += 1
        self.graphs[self._next] = recorded
        return self._next

    def launch(self, graph: int, stream: int) -> None:
        self._enter("launch")
        assert stream in self.streams
        for work in self.graphs[graph]:
            work()

    def drop_graph(self, graph: int) -> None:
        self._enter("drop_graph")
        del self.graphs[graph]

    def put(self, stream: int, work: Callable[[], None]) -> None:
        """Do ``work`` now, or write it down where the stream is being captured."""
        self._enter("put")
        assert stream in self.streams
        if self._capturing is None:
            work()
        else:
            assert self._capturing[0] == stream
            self._capturing[1].append(work)

    def at(self, address: int, size: int) -> np.ndarray:
        """The bytes at an address, which must be allocated and of at least this size."""
        assert address in self.memory, f"nothing is allocated at {address:#x}"
        assert size <= len(self.memory[address])
        return self.memory[address][:size]

    def _enter(self, name: str) -> None:
        assert threading.get_ident() in self._bound, "this thread has not called bind"
        self.log.append(name)


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


class FakeTrt:
    """The module ``tensorrt`` (or ``tensorrt_rtx`` where ``ahead``), as far as we use its runtime.

    ``graphs``: an engine's bytes -> (its name, function of named arrays, ports of inputs and outputs).
    """

    __version__ = "12.3.4"

    def __init__(self, device: FakeDevice, *, ahead: bool) -> None:
        self.device, self.ahead = device, ahead
        self.graphs: dict[bytes, tuple[str, Function, Ports, Ports]] = {}
        self.capturable = True
        self.workspace = 4096
        self.contexts: list[_Context] = []
        self.compiled = 0  # kernels that had to be compiled, for want of a cache
        self.invalid = False
        trt = self

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, data: bytes) -> Any:
                if data not in trt.graphs:
                    self.logger.log(FakeTrt.ILogger.ERROR, "not an\nengine")
                    return None
                return _Engine(trt, data)

        class RtxRuntime(Runtime):
            def get_engine_validity(self, data: bytes) -> Any:
                return (trt.EngineValidity.INVALID if trt.invalid else trt.EngineValidity.VALID), [
                    "WRONG_GPU"
                ]

        self.Runtime = RtxRuntime if ahead else Runtime

    class ILogger:
        ERROR, INTERNAL_ERROR = "error", "internal"

    class TensorIOMode(enum.Enum):
        INPUT = 1
        OUTPUT = 2

    class ExecutionContextAllocationStrategy(enum.Enum):
        STATIC = 0
        USER_MANAGED = 2

    class EngineValidity(enum.Enum):
        VALID = 0
        INVALID = 2

    class ComputeCapability(enum.Enum):
        SM89 = 89

    @staticmethod
    def nptype(kind: np.dtype[Any]) -> np.dtype[Any]:
        return kind

    def know(self, spec: GraphSpec, function: Function, inputs: Ports, outputs: Ports) -> None:
        """Know what the engine of a graph computes."""
        self.graphs[engine_bytes(spec)] = (spec.name, function, inputs, outputs)

    def teach(
        self, program: Program, specs: Mapping[str, GraphSpec], functions: Mapping[str, Function]
    ) -> None:
        """Know every graph of a program; ``functions`` has the model's."""
        for launch, spec in zip(program.launches, launch_specs(program, specs), strict=True):
            inputs = {port: program.buffers[buffer] for port, buffer in launch.inputs.items()}
            outputs = {port: program.buffers[buffer] for port, buffer in launch.outputs.items()}
            glue = launch.graph in GLUE
            function = _glue(launch.graph, outputs) if glue else functions[launch.graph]
            self.know(spec, function, inputs, outputs)


class FakeBuilder(EngineBuilder):
    """Writes `engine_bytes` for an engine. ``made`` has the names of what was not in the cache."""

    made: list[str]

    def _make(self, spec: GraphSpec, path: Path) -> None:
        self.made = [*getattr(self, "made", []), spec.name]
        path.write_bytes(engine_bytes(spec))


def engine_bytes(spec: GraphSpec) -> bytes:
    """The engine of a graph at its shapes."""
    return json.dumps([spec.name, sorted(spec.shapes.items())]).encode()


def _glue(op: str, ports: Ports) -> Function:
    def function(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        results = {name: np.empty(*port) for name, port in ports.items()}
        GLUE[op].run(**inputs, **results)
        return results

    return function


class _Engine:
    def __init__(self, trt: FakeTrt, data: bytes) -> None:
        self.trt = trt
        self.name, self.function, self.inputs, self.outputs = trt.graphs[data]
        self.ports = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.ports)
        self.device_memory_size_v2 = trt.workspace

    def get_tensor_name(self, i: int) -> str:
        return self.ports[i]

    def get_tensor_mode(self, name: str) -> FakeTrt.TensorIOMode:
        return FakeTrt.TensorIOMode.INPUT if name in self.inputs else FakeTrt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> np.dtype[Any]:
        return (self.inputs | self.outputs)[name][1]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.inputs | self.outputs)[name][0]

    def create_runtime_config(self) -> _RuntimeConfig:
        return _RuntimeConfig(self)

    def create_execution_context(self, how: Any) -> _Context:
        if self.trt.ahead:
            assert isinstance(how, _RuntimeConfig)
            assert how.strategy is FakeTrt.ExecutionContextAllocationStrategy.USER_MANAGED
            how.cache.compile(self)
        else:
            assert how is FakeTrt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.trt.contexts.append(_Context(self))
        return self.trt.contexts[-1]


class _RuntimeConfig:
    def __init__(self, engine: _Engine) -> None:
        self.cache = _RuntimeCache()
        self.strategy = FakeTrt.ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> _RuntimeCache:
        return _RuntimeCache()

    def set_runtime_cache(self, cache: _RuntimeCache) -> None:
        self.cache = cache


class _RuntimeCache:
    def __init__(self) -> None:
        self.names: set[str] = set()

    def compile(self, engine: _Engine) -> None:
        if engine.name not in self.names:
            engine.trt.compiled += 1
            self.names.add(engine.name)

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.names)).encode()

    def deserialize(self, blob: bytes) -> bool:
        self.names = set(json.loads(blob))
        return True


class _Context:
    """``capturing`` an engine for the first time fails: its kernels are not loaded yet."""

    def __init__(self, engine: _Engine) -> None:
        self.engine, self.device = engine, engine.trt.device
        self.addresses: dict[str, int] = {}
        self.working: tuple[int, int] | None = None
        self.runs = 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.working = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.ports

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        engine, addresses = self.engine, dict(self.addresses)
        assert addresses.keys() == set(engine.ports), "an address is missing"
        assert self.working is not None or not engine.device_memory_size_v2
        if not self.runs:
            self.device.legacy_busy = True  # first uses do things on the legacy stream
        self.runs += 1

        def work() -> None:
            if self.working is not None:
                self.device.at(*self.working)[...] = 0x5A
            given = {name: self._array(addresses[name], *port) for name, port in engine.inputs.items()}
            for name, result in engine.function(**given).items():
                self._array(addresses[name], *engine.outputs[name])[...] = result

        self.device.put(stream, work)
        return True

    def _array(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.device.at(address, size).view(dtype).reshape(shape)
