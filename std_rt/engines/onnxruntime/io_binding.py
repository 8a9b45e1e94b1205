"""The runner on ONNX Runtime with every buffer on one device: a frame goes in, a frame comes out.

Buffers are allocated once, and constants copied there once. Launches are bound to the buffers that they read
and write (IO binding): once, or before every run where a session on a GPU has no CUDA graph. So graphs pass
their results on without a copy, and addresses never change, which CUDA graphs need. The same code runs on the
CPU, where tests compare it with `HostRunner`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from std_rt.core.errors import BackendError, one_line
from std_rt.engines.glue import GLUE
from std_rt.engines.onnxruntime.ort_session import failures, run_error
from std_rt.engines.program import (
    FRAME,
    STYLED,
    Frame,
    Launch,
    Mark,
    Program,
    check_carried,
    check_feeds,
    check_frame,
    launch_specs,
    no_mark,
)
from std_rt.engines.protocol import Array, GraphSpec, Ports

__all__ = ["OrtRunner"]

Opener = Callable[[GraphSpec], tuple[ort.InferenceSession, Callable[[], None]]]
Options = Callable[[int, Launch], ort.RunOptions | None]


@dataclass(frozen=True, eq=False)
class _Call:
    """One launch, ready to run."""

    spec: GraphSpec
    session: ort.InferenceSession
    binding: ort.IOBinding
    inputs: Mapping[str, ort.OrtValue]  # to bind anew for every run
    options: ort.RunOptions | None
    stage: str


class OrtRunner:
    """A `Runner` over sessions that share one device. Use it from one thread at a time."""

    def __init__(
        self,
        program: Program,
        specs: Mapping[str, GraphSpec],
        open_session: Opener,
        *,
        device: str = "cpu",
        device_id: int = 0,
        precision: str = "fp32",
        options: Options = lambda index, launch: None,
    ) -> None:
        """``open_session`` opens a graph on that device and says how to let go of it; ``options`` gives a
        launch its run options.

        Raises BackendError if a graph does not open, or its ports are not those of a launch.
        """
        self.precision = precision
        self._program, self._device = program, device
        self._values = _allocate(program.buffers, device, device_id)
        for name, array in program.constants.items():
            self._fill(name, array)
        for name in program.carried:
            self._fill(name, np.zeros(*program.buffers[name]))
        self._fed: dict[str, Array] = {}
        self._releases: list[Callable[[], None]] = []
        try:
            self._calls = self._bind(specs, open_session, options)
        except BackendError:
            self._release()
            raise

    def set(self, **feeds: Array) -> None:
        """Copy to the device; the same array as before is not copied again."""
        self._check_open()
        check_feeds(self._program, feeds)
        for name, array in feeds.items():
            if self._fed.get(name) is not array:
                self._fill(name, array)
        self._fed.update(feeds)

    def run(self, frame: Frame, mark: Mark = no_mark) -> Frame:
        """See `Runner`; each launch is complete when ``mark(stage)`` follows it."""
        self._check_open()
        check_frame(self._program, frame, self._fed)
        self._fill(FRAME, frame)
        for call in self._calls:
            try:
                for port, value in call.inputs.items():
                    call.binding.bind_ortvalue_input(port, value)
                call.session.run_with_iobinding(call.binding, call.options)
            except failures() as error:
                raise BackendError(run_error(call.spec, error)) from error
            mark(call.stage)
        styled: Frame = self._values[STYLED].numpy()
        return styled.copy() if self._device == "cpu" else styled  # there it is the buffer itself

    def carried(self) -> dict[str, Array]:
        """See `Runner`."""
        self._check_open()
        return {name: self._values[name].numpy().copy() for name in self._program.carried}

    def carry(self, **buffers: Array) -> None:
        """See `Runner`."""
        self._check_open()
        check_carried(self._program, buffers)
        for name, array in buffers.items():
            self._fill(name, array)

    def close(self) -> None:
        """Free buffers, and sessions that no other program has."""
        self._calls.clear()
        self._release()
        self._values.clear()
        self._fed.clear()

    def _release(self) -> None:
        while self._releases:
            self._releases.pop()()

    def _fill(self, name: str, array: Array) -> None:
        self._values[name].update_inplace(np.ascontiguousarray(array))

    def _bind(self, specs: Mapping[str, GraphSpec], open_session: Opener, options: Options) -> list[_Call]:
        sessions: dict[int, ort.InferenceSession] = {}
        wanted = launch_specs(self._program, specs)
        calls = []
        for index, (launch, spec) in enumerate(zip(self._program.launches, wanted, strict=True)):
            if id(spec) not in sessions:
                sessions[id(spec)], release = open_session(spec)
                self._releases.append(release)
            session = sessions[id(spec)]
            _check_ports(launch, session)
            binding = session.io_binding()
            inputs = {port: self._values[buffer] for port, buffer in launch.inputs.items()}
            for port, value in inputs.items():
                binding.bind_ortvalue_input(port, value)
            for port, buffer in launch.outputs.items():
                binding.bind_ortvalue_output(port, self._values[buffer])
            # What a node on the CPU reads is copied there when it is bound. All nodes of a CUDA graph, and of
            # glue, are on the GPU, and a CUDA graph's addresses have to stay.
            bound_once = self._device == "cpu" or launch.graph in GLUE or _is_captured(session)
            again = {} if bound_once else inputs
            calls.append(_Call(spec, session, binding, again, options(index, launch), launch.stage))
        return calls

    def _check_open(self) -> None:
        if not self._values:
            raise BackendError("the runner was closed; open it again")


def _allocate(buffers: Ports, device: str, device_id: int) -> dict[str, ort.OrtValue]:
    make = ort.OrtValue.ortvalue_from_shape_and_type
    try:
        return {name: make(shape, dtype.type, device, device_id) for name, (shape, dtype) in buffers.items()}
    except failures() as error:
        size_mb = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in buffers.values()) / 2**20
        reason = one_line(error, -200)
        raise BackendError(
            f"onnxruntime cannot allocate {size_mb:.0f} MB for a frame's buffers on {device}: {reason}"
        ) from error


def _is_captured(session: ort.InferenceSession) -> bool:
    return any(given.get("enable_cuda_graph") == "1" for given in session.get_provider_options().values())


def _check_ports(launch: Launch, session: ort.InferenceSession) -> None:
    takes = [port.name for port in session.get_inputs()]
    returns = [port.name for port in session.get_outputs()]
    if set(takes) != set(launch.inputs) or not set(returns).issuperset(launch.outputs):
        raise BackendError(
            f"graph '{launch.graph}' takes {', '.join(takes)} and returns {', '.join(returns)}; "
            f"the program has {', '.join(launch.inputs)} and {', '.join(launch.outputs)}"
        )
