"""A GPU and a TensorRT made of NumPy, which fail as a real GPU does where code is wrong.

Device memory is bytes at made-up addresses. Work that is put on a stream waits there until somebody waits for
the stream, or for an event on it, and is done with what memory holds *then*; between streams there is no
order. New memory, also page-locked memory of the host, is full of `POISON`, and so is what was freed; work
that touches freed memory is an error, as is allocating, freeing or waiting while a thread captures, and any
work in a thread that has not called ``bind``. What is put on a stream while it is captured is written down
with its addresses and not done; ``launch`` does it. So a missing wait, an early free, a wrong order, a stale
address or a forgotten capture gives a wrong picture or an error.

An engine here is the JSON of its graph's name and shapes; `FakeTrt.teach` says what it computes.
"""

from __future__ import annotations

import enum
import json
import mmap
import shutil
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from std_rt.core.errors import BackendError
from std_rt.engines import open_engine
from std_rt.engines.cache import EngineCache
from std_rt.engines.glue import GLUE
from std_rt.engines.gpu.probe import Gpu
from std_rt.engines.program import Program, launch_specs
from std_rt.engines.protocol import GraphSpec
from std_rt.engines.tensorrt.engine_builder import EngineBuilder
from std_rt.engines.tensorrt.gpu_runner import GpuEngine, GpuRunner, GpuSession
from std_rt.engines.tensorrt.onnx_to_engine import RTX

Function = Callable[..., Mapping[str, np.ndarray]]
Ports = dict[str, tuple[tuple[int, ...], "np.dtype[Any]"]]

POISON = 0xA5
Work = Callable[[], None]


class FakeDevice:
    """Stands in for `CudaDevice`. ``log`` has the names of what was called, in order."""

    def __init__(self, memory: int = 2**30) -> None:
        self.gpu = Gpu("Fake 9000", (8, 9), memory)
        self.driver = "cuda 13.0"
        self.log: list[str] = []
        self.memory: dict[int, np.ndarray] = {}
        self.pinned_arrays: list[np.ndarray] = []
        self.streams: dict[int, deque[Work]] = {}
        self.events: dict[int, tuple[int, int]] = {}  # (stream, work that was on it before)
        self.graphs: dict[int, list[Work]] = {}
        self.legacy_busy = False
        self._done: dict[int, int] = {}  # work done, by stream
        self._freed_pinned: list[np.ndarray] = []
        self._next, self._left = 0x1000, memory
        self._capturing: dict[int, tuple[int, list[Work]]] = {}  # by thread
        self._bound: set[int] = set()
        self._lock = threading.RLock()

    def bind(self) -> None:
        self._bound.add(threading.get_ident())

    def allocate(self, size: int) -> int:
        self._enter("allocate", may_capture=False)
        if size > self._left:
            raise BackendError(f"{self.gpu.name} has {self._left} bytes free and {size} are needed")
        with self._lock:
            address = self._handle(0x100 * (size // 0x100 + 2))
            self._left -= size
            self.memory[address] = np.full(size, POISON, np.uint8)
        return address

    def memory_free(self) -> int:
        return self._left

    def free(self, address: int) -> None:
        self._enter("free", may_capture=False)
        self._left += len(self.memory.pop(address))

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        self._enter("pinned", may_capture=False)
        array = np.empty(shape, dtype)
        _bytes(array)[...] = POISON
        self.pinned_arrays.append(array)
        return array

    def free_pinned(self, array: np.ndarray) -> None:
        self._enter("free_pinned", may_capture=False)
        self.pinned_arrays = [held for held in self.pinned_arrays if held is not array]
        _bytes(array)[...] = POISON
        self._freed_pinned.append(array)  # and so no other array gets its place

    def stream(self) -> int:
        self._enter("stream", may_capture=False)
        stream = self._handle()
        self.streams[stream], self._done[stream] = deque(), 0
        return stream

    def drop_stream(self, stream: int) -> None:
        self._enter("drop_stream", may_capture=False)
        assert not self.streams.pop(stream), "a stream was dropped with work on it"

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        assert array.flags.c_contiguous
        self.put(stream, lambda: self.at(address, array.nbytes).__setitem__(slice(None), self._host(array)))

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        assert array.flags.c_contiguous
        self.put(stream, lambda: self._host(array).__setitem__(slice(None), self.at(address, array.nbytes)))

    def synchronize(self, stream: int) -> None:
        self._enter("synchronize", may_capture=False)
        self._run(stream, self._done[stream] + len(self.streams[stream]))

    def event(self) -> int:
        self._enter("event", may_capture=False)
        event = self._handle()
        self.events[event] = (0, 0)
        return event

    def record(self, event: int, stream: int) -> None:
        self._enter("record")
        assert event in self.events
        self.events[event] = (stream, self._done[stream] + len(self.streams[stream]))

    def wait(self, event: int) -> None:
        self._enter("wait", may_capture=False)
        stream, before = self.events[event]
        if stream in self.streams:  # else never recorded: nothing to wait for
            self._run(stream, before)

    def drop_event(self, event: int) -> None:
        self._enter("drop_event")
        del self.events[event]

    def drain(self) -> None:
        self._enter("drain", may_capture=False)
        self.legacy_busy = False

    def capture(self, stream: int, record: Callable[[], None]) -> int:
        self._enter("capture", may_capture=False)
        assert not self.legacy_busy, "work on the legacy stream breaks a capture"
        work: list[Work] = []
        self._capturing[threading.get_ident()] = (stream, work)
        try:
            record()
        finally:
            del self._capturing[threading.get_ident()]
        graph = self._handle()
        self.graphs[graph] = work
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self._enter("launch")
        self.streams[stream].extend(self.graphs[graph])

    def drop_graph(self, graph: int) -> None:
        self._enter("drop_graph")
        del self.graphs[graph]

    def put(self, stream: int, work: Work) -> None:
        """Queue ``work``, or write it down where this thread captures the stream."""
        self._enter("put")
        capturing = self._capturing.get(threading.get_ident())
        if capturing is not None and capturing[0] == stream:
            capturing[1].append(work)
        else:
            self.streams[stream].append(work)

    @property
    def capturing(self) -> bool:
        """Whether this thread captures a stream."""
        return threading.get_ident() in self._capturing

    def at(self, address: int, size: int) -> np.ndarray:
        """The bytes at an address, which must be allocated and of at least this size."""
        assert address in self.memory, f"nothing is allocated at {address:#x}"
        assert size <= len(self.memory[address])
        return self.memory[address][:size]

    def _host(self, array: np.ndarray) -> np.ndarray:
        """The bytes of an array of the host, when a copy reaches it."""
        assert not any(np.may_share_memory(array, freed) for freed in self._freed_pinned), "freed too early"
        return _bytes(array)

    def _run(self, stream: int, until: int) -> None:
        with self._lock:
            while self._done[stream] < until:
                self._done[stream] += 1
                self.streams[stream].popleft()()

    def _handle(self, size: int = 1) -> int:
        self._next += size
        return self._next - size

    def _enter(self, name: str, *, may_capture: bool = True) -> None:
        assert threading.get_ident() in self._bound, "this thread has not called bind"
        assert may_capture or not self.capturing, f"{name} breaks the capture of this thread"
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
        self.read: list[bytes] = []  # engines, each time one was
        trt = self

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, data: mmap.mmap) -> Any:
                trt.read.append(data[:])
                assert not isinstance(data, bytes), "an engine of 5 GB does not belong into memory"
                data = bytes(data)
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


class FakeBackend:
    """The backend ``rtx`` on a made-up GPU, for any bundle: ONNX Runtime computes what its engines do."""

    def __init__(self) -> None:
        folder = Path(mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        (folder / "locks").mkdir()
        self.device = FakeDevice(2**33)
        self.device.bind()
        self.trt = FakeTrt(self.device, ahead=True)
        cache = EngineCache(folder, b"s" * 32)
        self._session = GpuSession(
            self.trt, self.device, FakeBuilder(self.trt, RTX, ("sm89",), driver="cuda 13.0", cache=cache)
        )

    def open_graph(self, spec: GraphSpec, precision: str) -> GpuEngine:
        self._learn(spec)
        return self._session.open_graph(spec)

    def open_runner(self, program: Program, specs: Mapping[str, GraphSpec], precision: str) -> GpuRunner:
        for spec in launch_specs(program, specs):
            self._learn(spec)
        return self._session.open_runner(program, specs, precision)

    def devices(self) -> str:
        return str(self.device.gpu)

    def _learn(self, spec: GraphSpec) -> None:
        if engine_bytes(spec) not in self.trt.graphs:
            engine = open_engine("onnxruntime", spec)
            self.trt.know(spec, engine.__call__, engine.inputs, engine.outputs)


INSTALLED: FakeBackend | None = None


def install(put: Callable[[Any, str, Any], None] = setattr) -> FakeBackend:
    """Give this process a driver, a GPU and the backend ``rtx``; ``put`` sets an attribute of a module."""
    from std_rt.engines import registry
    from std_rt.engines.gpu import driver, probe
    from std_rt.evaluation import gpu_check

    backend = FakeBackend()
    fake = registry.Backend("numpy", ("numpy",), "", f"{__name__}:INSTALLED", gpus=())
    report = probe.Report(None, "13.0", (backend.device.gpu,))
    put(sys.modules[__name__], "INSTALLED", backend)
    put(registry, "BACKENDS", {**registry.BACKENDS, "rtx": fake})
    put(probe, "probe", lambda: report)
    put(driver, "cuda_device", lambda index=0: backend.device)
    put(gpu_check, "MATRIX_SIDE", 64)
    put(gpu_check, "FRAMES", 3)
    return backend


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
            assert not self.device.capturing, "kernels are loaded at the first run, which no capture allows"
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
