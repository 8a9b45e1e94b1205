"""The runner on TensorRT and TensorRT-RTX: every buffer on the GPU, and a frame as one CUDA graph.

The frame (uint8) is in page-locked memory; one launch copies it to the GPU, runs every graph and every
operation between them, and copies the picture (uint8) back. Nothing else is copied, and the host waits once.

Engines come only from this machine's cache (`engine_builder`). Programs share them and differ in their
contexts, so another number of steps reads nothing. Those of a program run one after the other on one stream
and share one piece of working memory, as large as the largest of them needs.

Untested on a real GPU. Tests run all of it on tests/support/fake_gpu.py, a GPU and a TensorRT in NumPy.
"""

from __future__ import annotations

import logging
import mmap
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from threading import Lock
from typing import Any

import numpy as np

from std_rt.core.errors import BackendError
from std_rt.engines.cache import EngineCache
from std_rt.engines.gpu.driver import CudaDevice, EmptyCaptureError, cuda_device, driver_problem
from std_rt.engines.program import (
    FRAME,
    STYLED,
    Frame,
    Mark,
    Program,
    check_carried,
    check_feeds,
    check_frame,
    launch_specs,
    no_mark,
)
from std_rt.engines.protocol import Array, GraphSpec, Ports, check_inputs
from std_rt.engines.shared import Shared
from std_rt.engines.tensorrt.engine_builder import EngineBuilder
from std_rt.engines.tensorrt.onnx_to_engine import (
    RTX,
    TENSORRT,
    Product,
    load_product,
    make_logger,
)

__all__ = ["RTX_BACKEND", "TENSORRT_BACKEND", "GpuBackend", "GpuEngine", "GpuRunner", "GpuSession"]

_SLOTS = 2  # frames on their way at once: one runs, and the next waits for it on the GPU
_WARM_UPS = 3  # the first runs load kernels and settle sizes, which must not happen inside a capture


@dataclass(frozen=True)
class GpuBackend:
    """The backend of one product, as `std_rt.engines.registry` opens it.

    Engines that the cache does not list are built first, which takes minutes for a large UNet.
    """

    product: Product

    def open_graph(self, spec: GraphSpec, precision: str) -> GpuEngine:
        """Open one graph on the GPU. Raises BackendError."""
        return self._session(precision).open_graph(spec)

    def open_runner(self, program: Program, specs: Mapping[str, GraphSpec], precision: str) -> GpuRunner:
        """Open a whole program on the GPU. Raises BackendError."""
        return self._session(precision).open_runner(program, specs, precision)

    def devices(self) -> str:
        """The GPU, or why none can be used, for `std-rt doctor`."""
        return driver_problem() or f"{cuda_device().gpu}, {cuda_device().driver}"

    def _session(self, precision: str) -> GpuSession:
        """``precision`` fp32 turns TF32 off; everything else about precision is in the graphs."""
        return _session(self.product, precision != "fp32")


@cache
def _session(product: Product, tf32: bool) -> GpuSession:
    """One for the process, so that whatever is opened shares its engines."""
    trt = load_product(product)
    device = cuda_device()  # before the runtime: without a driver that one crashes at exit
    target = f"sm{device.gpu.sm}"
    builder = EngineBuilder(
        trt, product, (target,), driver=device.driver, tf32=tf32, cache=EngineCache.open()
    )
    return GpuSession(trt, device, builder)


TENSORRT_BACKEND, RTX_BACKEND = GpuBackend(TENSORRT), GpuBackend(RTX)


class GpuSession:
    """A TensorRT module, a GPU and a builder of engines: opens graphs and programs, which share engines."""

    def __init__(self, trt: Any, device: CudaDevice, builder: EngineBuilder) -> None:
        """Use a `GpuBackend` unless in a test."""
        device.bind()
        self._trt, self._device, self._builder = trt, device, builder
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engines = Shared[LoadedEngine](LoadedEngine.close)

    def open_graph(self, spec: GraphSpec) -> GpuEngine:
        """One graph on its own. Raises BackendError."""
        self._device.bind()
        with self._closing_if_refused() as graphs:
            graphs[0] = self._load(spec)
            self._share_memory(graphs.values())
            return GpuEngine(self._device, graphs[0], spec.compute)

    def open_runner(
        self, program: Program, specs: Mapping[str, GraphSpec], precision: str = "auto"
    ) -> GpuRunner:
        """A whole program, warmed up; ``specs`` has one entry per graph of the model. Raises BackendError."""
        compute = specs["unet" if "unet" in specs else next(iter(specs))].compute
        if precision not in ("auto", compute):
            raise BackendError(
                f"the bundle computes in {compute}, and {self._builder.product.label} runs it as exported; "
                f"export it again with --precision {precision}, or use --precision auto"
            )
        self._device.bind()
        wanted = launch_specs(program, specs)
        with self._closing_if_refused() as graphs:
            for spec in wanted:
                if id(spec) not in graphs:
                    graphs[id(spec)] = self._load(spec)
            self._share_memory(graphs.values())
            return GpuRunner(self._device, program, [graphs[id(spec)] for spec in wanted], compute)

    @contextmanager
    def _closing_if_refused(self) -> Iterator[dict[int, LoadedGraph]]:
        """Graphs that are opened one by one: if one is refused, or what needs them is, all are closed."""
        graphs: dict[int, LoadedGraph] = {}
        try:
            yield graphs
        except BackendError:
            for graph in graphs.values():
                graph.close()
            raise

    def _load(self, spec: GraphSpec) -> LoadedGraph:
        """A context of its own over the engine, which is read once for all programs of its shapes."""
        engine, release = self._engines.take((spec.key, spec.identity), lambda: self._load_engine(spec))
        context = engine.context()
        if context is None:
            release()
            raise BackendError(self._failed(spec, "does not start"))
        return LoadedGraph(engine, context, release)

    def _load_engine(self, spec: GraphSpec) -> LoadedEngine:
        with self._builder.data(spec) as data:
            self._check(spec, data)
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(self._failed(spec, "does not load"))
        how = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        kernels = None
        if self._builder.product.ahead:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(how)
            kernels = Kernels.open(self._builder, spec, config, self._device)
            how = config
        return LoadedEngine(spec.name, engine, how, self._trt, self._logger, kernels)

    def _check(self, spec: GraphSpec, data: mmap.mmap | bytes) -> None:
        """Refuse an engine that is not for this machine, if the product can tell."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, problems = self._runtime.get_engine_validity(data)
        if validity == self._trt.EngineValidity.INVALID:
            raise BackendError(self._failed(spec, f"is not for this machine ({problems})"))

    def _share_memory(self, graphs: Collection[LoadedGraph]) -> None:
        size = max(graph.engine.working_size for graph in graphs)
        memory = Memory(self._device)
        address = memory.take(size) if size else 0
        for graph in graphs:
            graph.use_memory(memory, address, size)

    def _failed(self, spec: GraphSpec, what: str) -> str:
        label = self._builder.product.label
        reason = self._logger.reason()
        return f"the {label} engine of '{spec.name}' {what}: {reason}; run: std-rt engines gc --all"


class Memory:
    """Device memory that is freed together, once."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._taken: list[int] = []

    def take(self, size: int) -> int:
        """Address of ``size`` more bytes."""
        try:
            self._taken.append(self._device.allocate(size))
        except BackendError:
            self.free()  # nothing will be opened that uses it
            raise
        return self._taken[-1]

    def free(self) -> None:
        """Free everything."""
        while self._taken:
            self._device.free(self._taken.pop())


@dataclass
class Kernels:
    """The kernels that TensorRT-RTX compiles where it runs; kept in the cache for the next start."""

    builder: EngineBuilder
    spec: GraphSpec
    cache: Any
    device: CudaDevice
    known: bytes
    kept: bool = False

    @classmethod
    def open(cls, builder: EngineBuilder, spec: GraphSpec, config: Any, device: CudaDevice) -> Kernels:
        """Give a runtime config its kernel cache, filled from the engine cache."""
        cache = config.create_runtime_cache()
        known = b""
        if builder.cache is not None:
            known = builder.cache.read(builder.kernels_key(spec, device.driver)) or b""
        if known and not cache.deserialize(known):
            known = b""  # made for something else, as after an update: compiled and kept again
        config.set_runtime_cache(cache)
        return cls(builder, spec, cache, device, known)

    def keep(self) -> None:
        """Store newly compiled kernels in the engine cache, once: the first run at a shape compiles all."""
        if self.kept:
            return
        self.kept = True
        blob = bytes(self.cache.serialize() or b"")
        if self.builder.cache is not None and blob and blob != self.known:
            key = self.builder.kernels_key(self.spec, self.device.driver)
            try:
                self.builder.cache.build(key, blob, replace=True, origin=self.spec.path.parent.resolve())
            except BackendError as error:  # the frame is good; only the next start is slower
                logging.getLogger("std_rt").warning("%s", error)


class LoadedEngine:
    """An engine on the GPU. Every program that runs it does so in a context of its own."""

    def __init__(
        self, name: str, engine: Any, how: Any, trt: Any, logger: Any, kernels: Kernels | None = None
    ) -> None:
        """``how`` contexts are made: without working memory of their own."""
        self.name, self.logger, self.kernels = name, logger, kernels
        self.inputs: Ports = {}
        self.outputs: Ports = {}
        self._engine, self._how = engine, how
        self._lock = Lock()
        for i in range(engine.num_io_tensors):
            port = engine.get_tensor_name(i)
            side = self.inputs if engine.get_tensor_mode(port) == trt.TensorIOMode.INPUT else self.outputs
            kind = np.dtype(trt.nptype(engine.get_tensor_dtype(port)))
            side[port] = (tuple(engine.get_tensor_shape(port)), kind)

    @property
    def working_size(self) -> int:
        """Bytes of memory that a run needs besides inputs and outputs."""
        return int(self._engine.device_memory_size_v2)

    def context(self) -> Any:
        """A new context, or None if TensorRT refuses."""
        with self._lock:
            return self._engine.create_execution_context(self._how)

    def close(self) -> None:
        """Free the engine; its contexts are gone already."""
        self._how = self.kernels = self._engine = None


class LoadedGraph:
    """A context of an engine: ``enqueue`` puts one run of it on a stream."""

    def __init__(self, engine: LoadedEngine, context: Any, release: Callable[[], None]) -> None:
        self.engine, self._context, self._release = engine, context, release
        self._memory: Memory | None = None

    def use_memory(self, memory: Memory, address: int, size: int) -> None:
        """Where a run keeps intermediate results; ``memory`` lives as long as this graph."""
        self._memory = memory
        if self.engine.working_size:
            self._context.set_device_memory(address, size)

    def enqueue(self, addresses: Mapping[str, int], stream: int) -> None:
        """One run on ``stream`` with these addresses. Raises BackendError if TensorRT refuses."""
        for port, address in addresses.items():
            if not self._context.set_tensor_address(port, address):
                raise BackendError(self._refused(f"an address for {port}"))
        if not self._context.execute_async_v3(stream):
            raise BackendError(self._refused("a run"))

    def capturable(self, stream: int) -> bool:
        """False if TensorRT says that this engine cannot be captured in a CUDA graph."""
        asks = getattr(self._context, "is_stream_capturable", None)
        return asks is None or bool(asks(stream))

    def keep_kernels(self) -> None:
        """See `Kernels.keep`."""
        if self.engine.kernels is not None:
            self.engine.kernels.keep()

    def close(self) -> None:
        """Free the context, the memory that it shares, and the engine unless another program has it."""
        if self._context is None:
            return
        self._context = None
        if self._memory is not None:
            self._memory.free()
        self._release()

    def _refused(self, what: str) -> str:
        return (
            f"graph '{self.engine.name}' was refused {what}: {self.engine.logger.reason()}; see std-rt doctor"
        )


class GpuEngine:
    """An `Engine` on the GPU, such as the style encoder's. Use it from one thread at a time."""

    def __init__(self, device: CudaDevice, graph: LoadedGraph, precision: str) -> None:
        """Use `GpuSession.open_graph`."""
        self.inputs, self.outputs, self.precision = graph.engine.inputs, graph.engine.outputs, precision
        self._device, self._name = device, graph.engine.name
        self._graph: LoadedGraph | None = graph
        self._memory = Memory(device)
        self._stream = device.stream()
        ports = self.inputs | self.outputs
        self._addresses = {name: self._memory.take(_size(*port)) for name, port in ports.items()}

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """See `Engine`."""
        if self._graph is None:
            raise BackendError(f"graph '{self._name}' was closed; open it again")
        check_inputs(self._name, self.inputs, inputs)
        self._device.bind()
        given = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        for name, array in given.items():
            self._device.upload(self._addresses[name], array, self._stream)
        self._graph.enqueue(self._addresses, self._stream)
        results = {name: np.empty(*port) for name, port in self.outputs.items()}
        for name, array in results.items():
            self._device.download(array, self._addresses[name], self._stream)
        self._device.synchronize(self._stream)
        self._graph.keep_kernels()
        return results

    def close(self) -> None:
        """Free everything."""
        if self._graph is not None:
            self._device.bind()
            self._device.synchronize(self._stream)
            self._graph.close()
            self._graph = None
            self._memory.free()
            self._device.drop_stream(self._stream)


@dataclass(eq=False)
class _Slot:
    """The page-locked memory of one frame on its way; ``graph``: the captured run that uses it."""

    frame: Array
    styled: Array
    staged: dict[str, Array]  # feeds
    event: int
    graph: int | None = None
    fresh: set[str] = field(default_factory=set)  # staged since the slot's last frame
    pending: _Pending | None = None


@dataclass(eq=False)
class _Pending:
    """A frame that was submitted; ``styled`` once somebody has waited for it."""

    slot: _Slot
    styled: Frame | None = None


class GpuRunner:
    """A `Runner` on a GPU. Use it from one thread at a time.

    `submit` is the first half of `run`: the next frame can be submitted before this one is collected, so that
    the GPU goes on while the host works. Frames run in the order in which they were submitted.
    """

    def __init__(
        self, device: CudaDevice, program: Program, graphs: Sequence[LoadedGraph], precision: str
    ) -> None:
        """Use `GpuSession.open_runner`. ``graphs`` has the graph of each launch, in order.

        Everything that takes long at first use is done here: kernels are loaded and the frame is captured.
        """
        self.precision = precision
        self._device, self._program, self._graphs = device, program, list(graphs)
        self._check_ports()
        self._fed: dict[str, Array] = {}
        self._slots: list[_Slot] = []
        self._pinned: list[Array] = []
        self._open = True
        self._memory = Memory(device)
        self._stream = device.stream()
        try:
            self._allocate()
            self._warm_up()
        except BackendError:
            self.close()
            raise

    @property
    def captured(self) -> bool:
        """Whether a frame is replayed as one CUDA graph."""
        return all(slot.graph is not None for slot in self._slots)

    def set(self, **feeds: Array) -> None:
        """See `Runner`. The same array as before is not copied again; frames on their way keep theirs."""
        check_feeds(self._program, feeds)
        self._begin()
        slot = self._slots[0]
        for name, array in feeds.items():
            if self._fed.get(name) is array:
                continue
            if name in slot.fresh or slot.pending is not None:  # its last copy may still be on its way
                self._device.synchronize(self._stream)
            np.copyto(slot.staged[name], array)
            slot.fresh.add(name)
            self._device.upload(self._addresses[name], slot.staged[name], self._stream)
            self._fed[name] = array

    def carried(self) -> dict[str, Array]:
        """See `Runner`."""
        self._begin()
        found = {name: np.empty(*self._program.buffers[name]) for name in self._program.carried}
        for name, array in found.items():
            self._device.download(array, self._addresses[name], self._stream)
        if found:
            self._device.synchronize(self._stream)
        return found

    def carry(self, **buffers: Array) -> None:
        """See `Runner`."""
        check_carried(self._program, buffers)
        self._begin()
        self._upload(buffers)

    def run(self, frame: Frame, mark: Mark = no_mark) -> Frame:
        """See `Runner`. The whole frame is one stage for ``mark``: "frame"."""
        return self.submit(frame)(mark)

    def submit(self, frame: Frame) -> Callable[[Mark], Frame]:
        """Start a frame and return at once: call the result, once, to wait for it.

        Raises BackendError as `run` does. Two frames are on their way at most: for a third, the first is
        waited for here.
        """
        check_frame(self._program, frame, self._fed)
        self._begin()
        slot = self._slots.pop(0)
        self._slots.append(slot)
        self._finish(slot)
        np.copyto(slot.frame, frame)
        if slot.graph is None:
            self._enqueue(slot)
        else:
            self._device.launch(slot.graph, self._stream)
        self._device.record(slot.event, self._stream)
        slot.fresh.clear()
        slot.pending = _Pending(slot)
        return partial(self._collect, slot.pending)

    def _collect(self, pending: _Pending, mark: Mark = no_mark) -> Frame:
        if pending.styled is None:
            self._begin()
            self._finish(pending.slot)
        mark("frame")
        assert pending.styled is not None
        return pending.styled

    def _finish(self, slot: _Slot) -> None:
        """Wait for the slot's frame, if there is one, and take it out of page-locked memory."""
        if slot.pending is not None:
            self._device.wait(slot.event)
            slot.pending.styled = slot.styled.copy()
            slot.pending = None

    def close(self) -> None:
        """Free everything; the runner must not be used afterwards."""
        if not self._open:
            return
        self._open = False
        self._device.bind()
        self._device.synchronize(self._stream)
        for slot in self._slots:
            self._finish(slot)
        self._drop_graphs()
        for slot in self._slots:
            self._device.drop_event(slot.event)
        for graph in self._graphs:
            graph.close()
        self._graphs.clear()
        self._memory.free()
        for array in self._pinned:
            self._device.free_pinned(array)
        self._device.drop_stream(self._stream)

    def _drop_graphs(self) -> None:
        for slot in self._slots:
            if slot.graph is not None:
                self._device.drop_graph(slot.graph)
                slot.graph = None

    def _begin(self) -> None:
        if not self._open:
            raise BackendError("the runner was closed; open it again")
        self._device.bind()

    def _allocate(self) -> None:
        buffers, take = self._program.buffers, self._memory.take
        self._addresses = {name: take(_size(*port)) for name, port in buffers.items()}
        # Outputs that a launch does not name: the engine writes them all the same.
        self._unread = [
            {p: take(_size(*kind)) for p, kind in graph.engine.outputs.items() if p not in launch.outputs}
            for launch, graph in zip(self._program.launches, self._graphs, strict=True)
        ]
        for _ in range(_SLOTS):
            staged = {name: self._pin(buffers[name]) for name in self._program.feeds}
            frames = self._pin(buffers[FRAME]), self._pin(buffers[STYLED])
            self._slots.append(_Slot(*frames, staged, self._device.event()))
        self._upload(self._program.constants)
        self._upload(
            {name: np.zeros(*buffers[name]) for name in (*self._program.feeds, *self._program.carried)}
        )

    def _pin(self, port: tuple[tuple[int, ...], np.dtype[Any]]) -> Array:
        self._pinned.append(self._device.pinned(*port))
        return self._pinned[-1]

    def _warm_up(self) -> None:
        """Runs without effect, then the capture of a frame as a CUDA graph: the buffers never move.

        If an engine cannot be captured, a warning says so. Carried buffers are restored.
        """
        carried = self.carried()
        for slot in self._slots:
            slot.frame[...] = 0
        for _ in range(_WARM_UPS):
            self._enqueue(self._slots[0])
        self._device.synchronize(self._stream)
        self._upload(carried)
        for graph in dict.fromkeys(self._graphs):
            graph.keep_kernels()
        refused = [graph.engine.name for graph in self._graphs if not graph.capturable(self._stream)]
        why = f"'{refused[0]}' cannot be captured in a CUDA graph" if refused else self._capture()
        if why:
            slower = f"{why}, so frames run launch by launch: slower"
            warnings.warn(slower, RuntimeWarning, stacklevel=2)

    def _capture(self) -> str:
        """Capture the frame of every slot; why it cannot be, or nothing."""
        self._device.drain()
        try:
            for slot in self._slots:
                slot.graph = self._device.capture(self._stream, partial(self._enqueue, slot))
        except EmptyCaptureError:  # launches would go where nobody waits for them, too
            raise
        except BackendError as error:
            self._drop_graphs()
            self._device.synchronize(self._stream)  # a GPU that is broken refuses this too: an error
            return f"a frame cannot be captured in a CUDA graph ({str(error).partition(';')[0]})"
        return ""

    def _enqueue(self, slot: _Slot) -> None:
        """Put a whole frame on the stream."""
        self._device.upload(self._addresses[FRAME], slot.frame, self._stream)
        for launch, graph, unread in zip(self._program.launches, self._graphs, self._unread, strict=True):
            ports = {**launch.inputs, **launch.outputs}
            addresses = {port: self._addresses[buffer] for port, buffer in ports.items()}
            graph.enqueue(addresses | unread, self._stream)
        self._device.download(slot.styled, self._addresses[STYLED], self._stream)

    def _upload(self, arrays: Mapping[str, Array]) -> None:
        if not arrays:
            return
        given = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        for name, array in given.items():
            self._device.upload(self._addresses[name], array, self._stream)
        self._device.synchronize(self._stream)  # the arrays may go away now

    def _check_ports(self) -> None:
        """Raise BackendError unless engines have the launches' ports, with the buffers' shapes and types."""
        for launch, graph in zip(self._program.launches, self._graphs, strict=True):
            engine = graph.engine
            inputs = {port: self._program.buffers[buffer] for port, buffer in launch.inputs.items()}
            outputs = {port: self._program.buffers[buffer] for port, buffer in launch.outputs.items()}
            if engine.inputs != inputs or not outputs.items() <= engine.outputs.items():
                raise BackendError(
                    f"the engine of '{engine.name}' takes {_describe(engine.inputs)} and returns "
                    f"{_describe(engine.outputs)}, but the program has {_describe(inputs)} and "
                    f"{_describe(outputs)}; export the bundle again"
                )


def _size(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape)) * dtype.itemsize


def _describe(ports: Ports) -> str:
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, (shape, dtype) in ports.items())
