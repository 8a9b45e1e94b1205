"""The probe for an NVIDIA driver and its GPUs, in a separate process.

    python -I probe.py        prints one JSON object

A broken or half-installed driver can hang or kill its caller, so a subprocess queries it, once. If the
driver's library is missing (as on most machines without a GPU), none is started. The probe needs nothing but
Python itself. Tested on an H200.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

__all__ = ["Gpu", "Report", "probe"]

TIMEOUT_S = 20.0
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
# Error codes of cuInit: CUresult in the driver API's manual.
_ERRORS = {
    34: "the library found is a stub without a driver",
    46: "the GPU is busy or not available to this process",
    100: "the NVIDIA driver finds no GPU",
    101: "CUDA_VISIBLE_DEVICES names a GPU that does not exist",
    802: "the system is not ready yet",
    803: "the driver's components have mismatched versions; restart the computer",
    804: "the driver does not support this GPU in compatibility mode",
    999: "unknown error; restart the computer",
}
_NO_GPU = 100


@dataclass(frozen=True)
class Gpu:
    """One GPU; ``capability`` is its compute capability, (8, 9) for SM89."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int

    @property
    def sm(self) -> int:
        """Compute capability as one number: 89."""
        return 10 * self.capability[0] + self.capability[1]

    def __str__(self) -> str:
        return f"{self.name} (SM{self.sm}, {self.memory_bytes / 2**30:.0f} GB)"


@dataclass(frozen=True)
class Report:
    """``problem`` is None if the driver answers and has a GPU. ``cuda``: the newest it runs, as "13.0"."""

    problem: str | None
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()


@cache
def probe() -> Report:
    """Query the driver, once per process; takes at most `TIMEOUT_S`, and no time without a driver."""
    if not _has_library():
        return Report("no NVIDIA driver found")
    command = [sys.executable, "-I", __file__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Report(f"the NVIDIA driver does not answer within {TIMEOUT_S:.0f} s")
    except OSError as error:
        return Report(f"the NVIDIA driver cannot be queried: {error}")
    if done.returncode:
        return Report(f"the NVIDIA driver crashed the probe process (exit {done.returncode})")
    return parse(done.stdout)


def parse(answer: str) -> Report:
    """The report in the JSON that `ask` printed."""
    fields = json.loads(answer)
    code = int(fields["code"])
    if code:
        what = _ERRORS.get(code, "see the driver's documentation")
        return Report(
            what if code == _NO_GPU else f"the NVIDIA driver does not start: CUDA error {code}, {what}"
        )
    version = int(fields["version"])
    cuda = f"{version // 1000}.{version % 1000 // 10}"
    gpus = tuple(Gpu(str(n), (int(major), int(minor)), int(size)) for n, major, minor, size in fields["gpus"])
    return Report(None if gpus else _ERRORS[_NO_GPU], cuda, gpus)


def ask(driver: ctypes.CDLL) -> dict[str, object]:
    """Call the driver: ``{"code": cuInit's, "version": 13000, "gpus": [[name, 8, 9, bytes], ...]}``."""
    code = driver.cuInit(0)
    if code:
        return {"code": code}
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    version = number.value
    driver.cuDeviceGetCount(ctypes.byref(number))
    return {"code": 0, "version": version, "gpus": [_gpu(driver, i) for i in range(number.value)]}


def _gpu(driver: ctypes.CDLL, index: int) -> list[object]:
    device, number, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(number.value)
    driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return [name.value.decode("utf-8", "replace"), *capability, size.value]


def _library() -> str | None:
    return {"win32": "nvcuda.dll", "linux": "libcuda.so.1"}.get(sys.platform)


def _has_library() -> bool:
    name = _library()
    if name is None:
        return False
    try:
        ctypes.CDLL(name)  # loading it starts nothing; cuInit does
    except OSError:
        return False
    return True


if __name__ == "__main__":
    print(json.dumps(ask(ctypes.CDLL(str(_library())))))
