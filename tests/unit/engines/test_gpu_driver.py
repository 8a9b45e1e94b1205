"""The calls of the CUDA driver, through ctypes, into a library of C callbacks: types, order, 64-bit handles.

The library does what the driver's manual says, on host memory; whether the real one agrees only a GPU shows.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from std_rt.cli.app import app
from std_rt.core.errors import BackendError, UsageError
from std_rt.engines.gpu import driver as cuda_driver
from std_rt.engines.gpu.driver import _FUNCTIONS, CudaDevice, choose_gpu
from std_rt.engines.gpu.probe import Gpu, Report
from std_rt.pipeline import stylizer as stylizer_module
from std_rt.pipeline.stylizer import Stylizer

HANDLE = 0x7FFF_1234_5678_0000  # loses bits where an argument is passed as an int


# The parameters of the driver's functions as cuda.h of CUDA 13 declares them; all return a CUresult.
HEADER = {
    "cuInit": "unsigned int",
    "cuDriverGetVersion": "int*",
    "cuDeviceGet": "CUdevice*, int",
    "cuDeviceGetName": "char*, int, CUdevice",
    "cuDeviceGetAttribute": "int*, CUdevice_attribute, CUdevice",
    "cuDeviceTotalMem_v2": "size_t*, CUdevice",
    "cuDevicePrimaryCtxRetain": "CUcontext*, CUdevice",
    "cuCtxSetCurrent": "CUcontext",
    "cuMemGetInfo_v2": "size_t*, size_t*",
    "cuMemAlloc_v2": "CUdeviceptr*, size_t",
    "cuMemFree_v2": "CUdeviceptr",
    "cuMemAllocHost_v2": "void**, size_t",
    "cuMemFreeHost": "void*",
    "cuMemcpyHtoDAsync_v2": "CUdeviceptr, void*, size_t, CUstream",
    "cuMemcpyDtoHAsync_v2": "void*, CUdeviceptr, size_t, CUstream",
    "cuStreamCreate": "CUstream*, unsigned int",
    "cuStreamDestroy_v2": "CUstream",
    "cuStreamSynchronize": "CUstream",
    "cuEventCreate": "CUevent*, unsigned int",
    "cuEventRecord": "CUevent, CUstream",
    "cuEventSynchronize": "CUevent",
    "cuEventDestroy_v2": "CUevent",
    "cuStreamBeginCapture_v2": "CUstream, CUstreamCaptureMode",
    "cuStreamEndCapture": "CUstream, CUgraph*",
    "cuGraphGetNodes": "CUgraph, CUgraphNode*, size_t*",
    "cuGraphInstantiateWithFlags": "CUgraphExec*, CUgraph, unsigned long long",
    "cuGraphDestroy": "CUgraph",
    "cuGraphLaunch": "CUgraphExec, CUstream",
    "cuGraphExecDestroy": "CUgraphExec",
    "cuGetErrorString": "CUresult, char**",
}
KINDS = {  # handles are pointers to opaque structures, enumerations are ints
    **dict.fromkeys(("int", "CUdevice", "CUdevice_attribute", "CUstreamCaptureMode", "CUresult"), "int"),
    **dict.fromkeys(("CUcontext", "CUstream", "CUevent", "CUgraph", "CUgraphExec", "CUgraphNode"), "void*"),
    "CUdeviceptr": "unsigned long long",
}
TYPES = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "unsigned long long": ctypes.c_ulonglong,
    "size_t": ctypes.c_size_t,
    "void*": ctypes.c_void_p,
    "char": ctypes.c_char,
    "char*": ctypes.c_char_p,
}


def _ctype(declared: str) -> Any:
    kind = KINDS.get(declared, declared)
    if kind in TYPES and declared != "char*":
        return TYPES[kind]
    inner = declared.removesuffix("*")
    return ctypes.POINTER(TYPES[KINDS.get(inner, inner)])


@pytest.mark.parametrize("name", HEADER)
def test_a_function_has_the_types_of_the_header(name: str) -> None:
    declared = [_ctype(each) for each in HEADER[name].split(", ")]
    if name == "cuGraphGetNodes":  # only ever asked for the number: its array is NULL
        declared[1] = ctypes.c_void_p
    assert list(_FUNCTIONS[name]) == declared
    assert _FUNCTIONS.keys() == HEADER.keys()


class Library:
    """Functions with the types of the real ones; ``calls`` has their names and arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.memory: dict[int, Any] = {}
        self.capturing = False
        self.recorded: list[Callable[[], None]] = []
        self.nodes = 2
        self.fails: dict[str, int] = {}
        self._text = ctypes.c_char_p(b"out of luck")
        self._kept = []
        for name, types in _FUNCTIONS.items():
            kind = ctypes.CFUNCTYPE(ctypes.c_int, *types)
            function = kind(self._body(name))
            function.argtypes = types
            self._kept.append(function)
            setattr(self, name, function)

    def _body(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            plain = [a for a in arguments if a is None or isinstance(a, int)]
            self.calls.append((name, *plain))
            if name in self.fails:
                return self.fails[name]
            getattr(self, f"do_{name}", lambda *_: None)(*arguments)
            return 0

        return call

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def do_cuDriverGetVersion(self, out: Any) -> None:
        out[0] = 12090

    def do_cuDeviceGet(self, out: Any, index: int) -> None:
        out[0] = 40 + index

    def do_cuDeviceGetName(self, out: Any, size: int, device: int) -> None:
        for i, byte in enumerate(b"Fake 9000\0"):
            out[i] = byte

    def do_cuDeviceGetAttribute(self, out: Any, attribute: int, device: int) -> None:
        out[0] = {75: 12, 76: 0}[attribute]

    def do_cuDeviceTotalMem_v2(self, out: Any, device: int) -> None:
        out[0] = 24 * 2**30

    def do_cuDevicePrimaryCtxRetain(self, out: Any, device: int) -> None:
        out[0] = HANDLE + 1

    def do_cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        free[0], total[0] = 7 * 2**20, 24 * 2**30

    def do_cuMemAlloc_v2(self, out: Any, size: int) -> None:
        memory = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(memory)] = memory
        out[0] = ctypes.addressof(memory)

    do_cuMemAllocHost_v2 = do_cuMemAlloc_v2

    def do_cuMemFree_v2(self, address: int) -> None:
        del self.memory[address]

    do_cuMemFreeHost = do_cuMemFree_v2

    def do_cuMemcpyHtoDAsync_v2(self, to: int, source: int, size: int, stream: int) -> None:
        self._copy(to, source, size, stream)

    do_cuMemcpyDtoHAsync_v2 = do_cuMemcpyHtoDAsync_v2

    def _copy(self, to: int, source: int, size: int, stream: int) -> None:
        assert stream == HANDLE + 2
        if self.capturing:
            self.recorded.append(lambda: ctypes.memmove(to, source, size) and None)
        else:
            ctypes.memmove(to, source, size)

    def do_cuStreamCreate(self, out: Any, flags: int) -> None:
        assert flags == 1
        out[0] = HANDLE + 2

    def do_cuEventCreate(self, out: Any, flags: int) -> None:
        out[0] = HANDLE + 5

    def do_cuStreamBeginCapture_v2(self, stream: int, mode: int) -> None:
        assert (stream, mode) == (HANDLE + 2, 1)
        self.capturing = True

    def do_cuStreamEndCapture(self, stream: int, out: Any) -> None:
        self.capturing = False
        out[0] = HANDLE + 3

    def do_cuGraphGetNodes(self, graph: int, nodes: Any, count: Any) -> None:
        assert graph == HANDLE + 3
        assert nodes is None
        count[0] = self.nodes

    def do_cuGraphInstantiateWithFlags(self, out: Any, graph: int, flags: int) -> None:
        assert (graph, flags) == (HANDLE + 3, 0)
        out[0] = HANDLE + 4

    def do_cuGraphLaunch(self, graph: int, stream: int) -> None:
        assert (graph, stream) == (HANDLE + 4, HANDLE + 2)
        for work in self.recorded:
            work()

    def do_cuGetErrorString(self, code: int, out: Any) -> None:
        out[0] = self._text


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(cuda_driver, "_load", lambda: made)
    return made


def test_the_gpu_is_described_and_its_primary_context_taken(library: Library) -> None:
    device = CudaDevice(1)
    assert (device.gpu.name, device.gpu.sm, device.driver) == ("Fake 9000", 120, "cuda 12.9")
    assert device.gpu.memory_bytes == 24 * 2**30
    assert library.calls[-1] == ("cuCtxSetCurrent", HANDLE + 1)
    assert ("cuDeviceGetAttribute", 75, 41) in library.calls


def test_arrays_go_there_and_come_back(library: Library) -> None:
    device = CudaDevice()
    stream = device.stream()
    given = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    address = device.allocate(given.nbytes)
    device.upload(address, given, stream)
    back = device.pinned((2, 3, 4), np.dtype(np.float32))
    device.download(back, address, stream)
    device.synchronize(stream)
    np.testing.assert_array_equal(back, given)
    assert back.dtype == np.float32
    device.free_pinned(back)
    device.free(address)
    device.drop_stream(stream)
    device.drain()
    assert not library.memory
    assert library.calls[-2:] == [("cuStreamDestroy_v2", HANDLE + 2), ("cuStreamSynchronize", None)]


def test_what_is_captured_is_done_when_it_is_launched(library: Library) -> None:
    device = CudaDevice()
    stream = device.stream()
    given, back = np.arange(4, dtype=np.int32), np.zeros(4, np.int32)
    address = device.allocate(16)

    def record() -> None:
        device.upload(address, given, stream)
        device.download(back, address, stream)

    graph = device.capture(stream, record)
    assert graph == HANDLE + 4
    assert not back.any()
    assert library.names()[-3:] == ["cuGraphGetNodes", "cuGraphInstantiateWithFlags", "cuGraphDestroy"]
    given += 5
    device.launch(graph, stream)
    np.testing.assert_array_equal(back, np.arange(4) + 5)
    device.drop_graph(graph)
    assert library.calls[-1] == ("cuGraphExecDestroy", HANDLE + 4)


def test_a_capture_that_fails_is_ended_all_the_same(library: Library) -> None:
    device = CudaDevice()
    stream = device.stream()

    def fail() -> None:
        raise BackendError("no")

    with pytest.raises(BackendError, match=r"^no$"):
        device.capture(stream, fail)
    assert library.names()[-1] == "cuStreamEndCapture"
    assert not library.capturing


def test_an_empty_capture_is_refused(library: Library) -> None:
    device = CudaDevice()
    library.nodes = 0
    with pytest.raises(BackendError, match="nothing was captured on Fake 9000"):
        device.capture(device.stream(), lambda: None)
    assert library.names()[-1] == "cuGraphDestroy"


def test_refusals_are_one_line(library: Library) -> None:
    device = CudaDevice()
    library.fails = {"cuMemAlloc_v2": 2, "cuStreamSynchronize": 700}
    with pytest.raises(BackendError, match="Fake 9000 has 7 MB free, 30 MB more are needed; use a smaller"):
        device.allocate(30 * 2**20)
    with pytest.raises(
        BackendError, match="refused cuStreamSynchronize: out of luck; use --backend openvino"
    ):
        device.drain()


def test_a_driver_without_a_function_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        cuInit = Library().cuInit  # type: ignore[attr-defined]

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Old())
    with pytest.raises(BackendError, match=r"missing or too old .*cuDriverGetVersion"):
        CudaDevice()


def test_without_a_driver_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "driver_problem", lambda: "no NVIDIA driver found")
    with pytest.raises(
        BackendError, match="no GPU can be used: no NVIDIA driver found; use --backend openvino"
    ):
        cuda_driver.cuda_device.__wrapped__(0)


@pytest.mark.parametrize(
    ("before", "device", "after"),
    [(None, "cuda:1", "1"), (None, "cuda", "0"), ("3,GPU-5a", "cuda:1", "GPU-5a")],
)
def test_a_gpu_chosen_is_the_only_one_that_is_seen(
    before: str | None, device: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Mock(return_value=Report(None, "13.0", (Gpu("A", (8, 9), 1), Gpu("B", (12, 0), 1))))
    monkeypatch.setattr(cuda_driver, "probe", probe)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")  # undone after the test
    if before is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    monkeypatch.setattr(cuda_driver, "_chosen", None)
    for wrong, words in (("gpu1", "must be a GPU such as cuda:0"), ("cuda:2", "cuda:0 is A .*, cuda:1 is B")):
        with pytest.raises(UsageError, match=words):
            choose_gpu(wrong)
    for _ in range(2):  # the same name again is the same GPU, although only one is seen by now
        choose_gpu(device)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == after
    probe.cache_clear.assert_called_once()
    with pytest.raises(UsageError, match=r"uses cuda:[01] already and cannot change to cuda:7"):
        choose_gpu("cuda:7")
    monkeypatch.setattr(cuda_driver, "_chosen", None)
    probe.return_value = Report("no NVIDIA driver found")
    with pytest.raises(UsageError, match="cannot be used: no NVIDIA driver found; use --backend cpu"):
        choose_gpu(device)


def test_a_gpu_that_is_open_cannot_be_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA reads CUDA_VISIBLE_DEVICES once: another choice would be without effect, and without a word."""
    monkeypatch.setattr(cuda_driver, "_chosen", None)
    monkeypatch.setattr(cuda_driver, "cuda_device", Mock(cache_info=lambda: Mock(currsize=1)))
    with pytest.raises(UsageError, match="uses cuda:0 already and cannot change to cuda:1; start another"):
        choose_gpu("cuda:1")


@pytest.mark.parametrize(
    "command",
    [
        ["stylize", "a.png", "--style", "b.png"],
        ["demo"],
        ["styles", "save", "a.png", "-o", "a.safetensors"],
        ["evaluate", "photos", "paintings"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_takes_the_same_device(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(device: str) -> None:
        asked.append(device)
        raise UsageError("no such GPU")

    monkeypatch.setattr(cuda_driver, "choose_gpu", refuse)
    with pytest.raises(UsageError, match="no such GPU"):
        app([*command, "--device", "cuda:5"], standalone_mode=False)
    assert asked == ["cuda:5"]
    monkeypatch.setattr(stylizer_module, "choose_gpu", refuse)
    with pytest.raises(UsageError, match="no such GPU"):
        Stylizer.load(device="cuda:6")


def test_events_mark_a_place_in_a_stream(library: Library) -> None:
    device = CudaDevice()
    event = device.event()
    device.record(event, device.stream())
    device.wait(event)
    device.drop_event(event)
    assert library.calls[-5:] == [
        ("cuEventCreate", 2),
        ("cuStreamCreate", 1),
        ("cuEventRecord", HANDLE + 5, HANDLE + 2),
        ("cuEventSynchronize", HANDLE + 5),
        ("cuEventDestroy_v2", HANDLE + 5),
    ]
