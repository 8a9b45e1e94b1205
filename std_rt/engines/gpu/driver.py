"""The CUDA driver through ctypes: memory, copies, streams and graphs of one GPU, with no package to install.

    device = cuda_device()        # BackendError if no driver answers
    address = device.allocate(1024)

The context is the device's primary one, which TensorRT's own CUDA runtime uses too. Memory, copies,
capture, replay and running out of memory ran on an H200 (driver for CUDA 13.0); its users are tested with
tests/support/fake_gpu.py.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from std_rt.core.errors import BackendError, UsageError
from std_rt.engines.gpu.probe import Gpu, probe

__all__ = ["CudaDevice", "EmptyCaptureError", "choose_gpu", "cuda_device", "driver_problem"]

Array = NDArray[Any]

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_OUT_OF_MEMORY = 2
_NON_BLOCKING = 1  # a stream that does not wait for the legacy stream
_NO_TIMING = 2  # an event that only marks a place is cheaper
_THREAD_LOCAL = 1  # capture mode: what other threads do on the GPU does not break it
_MAJOR, _MINOR = 75, 76  # device attributes: compute capability
_LEGACY = 0


class EmptyCaptureError(BackendError):
    """A capture in which nothing reached the stream that was captured."""


_ADDRESS = c_ulonglong
# name -> argument types; every function returns a code, 0 for success.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (POINTER(c_char), c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(_ADDRESS), c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemAllocHost_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, _ADDRESS, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphGetNodes": (c_void_p, c_void_p, POINTER(c_size_t)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}


def driver_problem() -> str:
    """Why no GPU can be used here, or "".

    Ask before touching the driver or TensorRT's runtime: without a driver that runtime crashes at exit.
    """
    return probe().problem or ""


_chosen: int | None = None


def choose_gpu(device: str) -> None:
    """Make one GPU, named as ``cuda:1``, the only one that this process and its children see.

    By ``CUDA_VISIBLE_DEVICES``, which every library obeys that has not touched the driver yet; so a process
    has one GPU, and the same name may be given again. Raises UsageError for another name, a second or
    missing GPU, or where none can be used.
    """
    global _chosen
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise UsageError(
            f"--device must be a GPU such as cuda:0 or cuda:1, got {device!r}; see std-rt doctor"
        )
    found, index = probe(), int(match[1] or 0)
    opened = 0 if cuda_device.cache_info().currsize else None
    in_use = opened if _chosen is None else _chosen
    if in_use is not None and in_use != index:
        raise UsageError(
            f"this process uses cuda:{in_use} already and cannot change to {device}; start another one for it"
        )
    if _chosen == index:
        return
    if found.problem:
        raise UsageError(f"--device {device} cannot be used: {found.problem}; use --backend cpu")
    if index >= len(found.gpus):
        known = ", ".join(f"cuda:{i} is {gpu}" for i, gpu in enumerate(found.gpus))
        raise UsageError(f"there is no GPU {device}: {known}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(index) if visible is None else visible.split(",")[index].strip()
    probe.cache_clear()
    _chosen = index


@cache
def cuda_device(index: int = 0) -> CudaDevice:
    """The GPU, opened once per process and kept until it ends. Raises BackendError if there is none."""
    problem = driver_problem()
    if problem:
        raise BackendError(f"no GPU can be used: {problem}; use --backend openvino")
    return CudaDevice(index)


class CudaDevice:
    """One GPU. Addresses, streams and graphs are plain numbers; every call may raise BackendError.

    Work on a stream is done in order, and only `synchronize` and `drain` make the host wait. ``driver`` is
    the newest CUDA that the driver serves, as ``cuda 13.0``.
    """

    def __init__(self, index: int = 0) -> None:
        """Use `cuda_device`, which first checks that the driver works."""
        self._lib = _load()
        self._call("cuInit", 0)
        handle, context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(handle), index)
        self._call("cuDevicePrimaryCtxRetain", byref(context), handle)
        self._context = context
        self.gpu = self._describe(handle.value)
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        self.driver = f"cuda {version.value // 1000}.{version.value % 1000 // 10}"
        self.bind()

    def bind(self) -> None:
        """Make this the GPU that the calling thread works on; call it first in every thread."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """Address of ``size`` new bytes on the device. BackendError says what is free if they do not fit."""
        address = _ADDRESS()
        code = self._lib.cuMemAlloc_v2(byref(address), max(size, 1))
        if code == _OUT_OF_MEMORY:
            free_mb = self.memory_free() // 2**20
            raise BackendError(
                f"{self.gpu.name} has {free_mb} MB free, {size / 2**20:.0f} MB more are needed; "
                "use a smaller --size, or close what else uses the GPU"
            )
        self._check("cuMemAlloc_v2", code)
        return int(address.value)

    def memory_free(self) -> int:
        """Bytes of the device's memory that no program has taken."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def free(self, address: int) -> None:
        """Free memory of `allocate`."""
        self._call("cuMemFree_v2", address)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array in page-locked memory of the host: copies of it do not wait for the host."""
        size = int(np.prod(shape)) * dtype.itemsize
        pointer = c_void_p()
        self._call("cuMemAllocHost_v2", byref(pointer), max(size, 1))
        memory = (ctypes.c_ubyte * size).from_address(int(pointer.value or 0))
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def free_pinned(self, array: Array) -> None:
        """Free an array of `pinned`; it must not be used afterwards."""
        self._call("cuMemFreeHost", array.ctypes.data)

    def stream(self) -> int:
        """A new stream, apart from the legacy one."""
        stream = c_void_p()
        self._call("cuStreamCreate", byref(stream), _NON_BLOCKING)
        return int(stream.value or 0)

    def drop_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cuStreamDestroy_v2", stream)

    def upload(self, address: int, array: Array, stream: int) -> None:
        """Copy a contiguous array to the device."""
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, stream)

    def download(self, array: Array, address: int, stream: int) -> None:
        """Copy from the device into a contiguous array."""
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, stream)

    def synchronize(self, stream: int) -> None:
        """Wait until everything on the stream is done."""
        self._call("cuStreamSynchronize", stream)

    def event(self) -> int:
        """A new event: a place in a stream, to wait for."""
        event = c_void_p()
        self._call("cuEventCreate", byref(event), _NO_TIMING)
        return int(event.value or 0)

    def record(self, event: int, stream: int) -> None:
        """Move an event behind all that is on the stream now."""
        self._call("cuEventRecord", event, stream)

    def wait(self, event: int) -> None:
        """Wait until everything before the event is done, and for nothing after it."""
        self._call("cuEventSynchronize", event)

    def drop_event(self, event: int) -> None:
        """Destroy an event."""
        self._call("cuEventDestroy_v2", event)

    def drain(self) -> None:
        """Wait for the legacy stream, where libraries put their work at first use."""
        self._call("cuStreamSynchronize", _LEGACY)

    def capture(self, stream: int, record: Callable[[], None]) -> int:
        """A graph of what ``record`` puts on the stream, none of which is done now.

        Capture ends whatever happens: a stream left in it spoils all later work.
        """
        graph = c_void_p()
        self._call("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
        try:
            record()
        finally:
            code = self._lib.cuStreamEndCapture(stream, byref(graph))
        self._check("cuStreamEndCapture", code)
        try:
            return self._instantiate(graph)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Do everything in a graph, with the addresses it was captured with."""
        self._call("cuGraphLaunch", graph, stream)

    def drop_graph(self, graph: int) -> None:
        """Destroy a graph."""
        self._call("cuGraphExecDestroy", graph)

    def _instantiate(self, graph: c_void_p) -> int:
        nodes, executable = c_size_t(), c_void_p()
        self._call("cuGraphGetNodes", graph, None, byref(nodes))
        if not nodes.value:  # nothing reached this stream; replaying it would repeat the last picture
            raise EmptyCaptureError(
                f"nothing was captured on {self.gpu.name}; use --backend cuda or openvino"
            )
        self._call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
        return int(executable.value or 0)

    def _describe(self, handle: int) -> Gpu:
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), handle)
        major, minor, memory = c_int(), c_int(), c_size_t()
        self._call("cuDeviceGetAttribute", byref(major), _MAJOR, handle)
        self._call("cuDeviceGetAttribute", byref(minor), _MINOR, handle)
        self._call("cuDeviceTotalMem_v2", byref(memory), handle)
        return Gpu(name.value.decode("utf-8", "replace"), (major.value, minor.value), memory.value)

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._lib, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code:
            text = c_char_p()
            self._lib.cuGetErrorString(code, byref(text))
            reason = text.value.decode("utf-8", "replace") if text.value else f"error {code}"
            raise BackendError(
                f"the GPU refused {name}: {reason}; use --backend openvino, or see std-rt doctor"
            )


def _load() -> Any:
    """The driver's library with the types of its functions. Raises BackendError on one that is too old."""
    try:
        library = ctypes.CDLL(_LIBRARY)
        for name, types in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, c_int
    except (OSError, AttributeError) as error:
        raise BackendError(
            f"the NVIDIA driver is missing or too old ({error}); install a newer one"
        ) from error
    return library
