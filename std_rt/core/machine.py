"""Machine facts (processor, memory, disk) and checks for optional packages."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from std_rt.core.errors import UsageError

__all__ = [
    "Machine",
    "available_memory_gb",
    "describe_machine",
    "fastest_arithmetic",
    "free_disk_gb",
    "install_hint",
    "peak_memory_mb",
    "quoted",
    "require",
    "upgrade_hint",
]

# Vector units and number formats that decide how fast a network runs.
_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX bf16",
    "amx_int8": "AMX int8",
    "asimd": "NEON",
    "bf16": "bf16",
    "sve": "SVE",
}
_BF16_UNITS = ("AMX bf16", "AVX-512 bf16", "bf16")
_INT8_UNITS = ("AMX int8", "VNNI", "AVX-VNNI")


@dataclass(frozen=True)
class Machine:
    """``cores`` that this process may use; ``memory_gb`` is None if unknown."""

    processor: str
    cores: int
    features: tuple[str, ...]
    memory_gb: float | None
    system: str

    def __str__(self) -> str:
        features = f", {', '.join(self.features)}" if self.features else ""
        memory = f", {self.memory_gb:.0f} GB" if self.memory_gb else ""
        return f"{self.processor}, {self.cores} cores{features}{memory}, {self.system}"


def describe_machine() -> Machine:
    """Look at the machine; costs a few milliseconds."""
    info = _proc_cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return Machine(
        processor=info.get("model name") or _processor(),
        cores=_usable_cores(),
        features=tuple(name for flag, name in _FEATURES.items() if flag in flags),
        memory_gb=_memory_gb(),
        system=f"{platform.system()} {platform.machine()}",
    )


def fastest_arithmetic(machine: Machine, *, int8_at_hand: bool = False) -> tuple[str, str]:
    """(bf16, int8 or fp32; why): what this processor has units for, which decides how fast a network runs.

    bf16 comes first: it is as near to fp32 as pictures need, and costs no calibration. But where there are
    int8 graphs, VNNI does them a third faster than AVX-512 does bf16 (docs/results.md); not so beside AMX.
    """
    bf16, int8 = (
        [name for name in units if name in machine.features] for units in (_BF16_UNITS, _INT8_UNITS)
    )
    if int8_at_hand and bf16 == ["AVX-512 bf16"] and "VNNI" in int8:
        return "int8", "this processor's VNNI is faster than its AVX-512 bf16 units"
    if bf16:
        return "bf16", f"this processor has {bf16[0]} units"
    if int8:
        return "int8", f"this processor has {int8[0]} and no bf16 units"
    if not machine.features:
        return "fp32", "this system does not say what units the processor has"
    return "fp32", "this processor has neither bf16 units nor VNNI"


def available_memory_gb() -> float | None:
    """Memory (with swap) that a program may still take, in GB (2**30 bytes); None if unknown.

    In a container, at most what its memory limit leaves.
    """
    if sys.platform == "win32":
        status = _windows_memory()
        return None if status is None else status[1] / 2**30
    known = [room for room in (_linux_available(), _container_available()) if room is not None]
    return min(known) / 2**30 if known else _memory_gb()


def free_disk_gb(path: Path) -> float:
    """Free space on the disk that ``path`` is on, or would be, in GB (2**30 bytes)."""
    here = path.absolute()
    while not here.exists() and here != here.parent:
        here = here.parent
    return shutil.disk_usage(here).free / 2**30


def peak_memory_mb() -> float | None:
    """Largest resident size of this process so far in MB (2**20 bytes); None if unknown."""
    if sys.platform == "win32":
        return _peak_windows_mb()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux kilobytes


def require(what: str, extra: str, *modules: str) -> None:
    """Raise UsageError with the install command unless all ``modules`` are installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UsageError(f"{what} needs {', '.join(missing)}; run: {install_hint(extra)}")


def install_hint(extra: str = "") -> str:
    """The command that installs std-rt with ``extra`` into this Python, typed in the current folder.

    std-rt is not on PyPI: a clone is named by its folder (and stays in use: without ``-e`` it is copied),
    and an installed package, whose extras pip finds in its own metadata, by its name, or by where it came
    from if it is to be installed itself.
    """
    clone = _clone()
    if clone is not None:
        place = "." if _is_here(clone) else str(clone)
    else:
        place = "std-rt" if extra else _origin()
    what = quoted(f"{place}[{extra}]" if extra else place)
    return f"{_pip_install()} {what if clone is None else f'-e {what}'}"


def upgrade_hint() -> str:
    """What to type for a newer std-rt."""
    if _clone() is not None:
        return f"git pull, then {install_hint()}"
    return f"{install_hint()} --upgrade --no-deps, from its newer release"


def _clone() -> Path | None:
    """The repository that this package lies in; None for one in site-packages."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").is_file() else None


def _is_here(folder: Path) -> bool:
    try:
        return folder.samefile(".")
    except OSError:  # the current folder is gone
        return False


def _origin() -> str:
    """Where pip had this package from: a wheel or a repository; its name if that is not known."""
    try:
        noted = json.loads(metadata.distribution("std-rt").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return "std-rt"
    url = str(noted.get("url", "std-rt"))
    return f"{noted['vcs_info']['vcs']}+{url}" if "vcs_info" in noted else url


def _pip_install() -> str:
    """``pip install`` of this Python: by its path if the pip on the search path is another's."""
    here = Path(sys.executable).parent
    pip = shutil.which("pip")
    if pip is not None and Path(pip).parent in (here, here / "Scripts"):
        return "pip install"
    if find_spec("pip") is None:
        return f"uv pip install --python {quoted(sys.executable)}"
    return f"{quoted(sys.executable)} -m pip install"


def quoted(text: str) -> str:
    """For the shell; cmd.exe knows double quotes only."""
    if os.name == "nt":
        return f'"{text}"' if re.search(r"[\s\[]", text) else text
    return shlex.quote(text)


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _proc_cpuinfo() -> dict[str, str]:
    """The first processor of Linux' ``/proc/cpuinfo``; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _processor() -> str:
    if sys.platform == "darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        named = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        if named:
            return named
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    if sys.platform == "win32":
        status = _windows_memory()
        return None if status is None else status[0] / 2**30
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _linux_available(path: Path = Path("/proc/meminfo")) -> int | None:
    """``MemAvailable`` and free swap, in bytes."""
    if not path.is_file():
        return None
    pairs = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
    found = {key: value.split()[0] for key, _, value in pairs if value.split()}
    if "MemAvailable" not in found:
        return None
    return 1024 * (int(found["MemAvailable"]) + int(found.get("SwapFree", "0")))


def _container_available(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left under the limit of this process's control group (version 2); None if there is none."""
    limit, used, stat = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit.is_file() and used.is_file()):
        return None
    text = limit.read_text(encoding="ascii").strip()
    if not text.isdigit():  # "max": no limit
        return None
    lines = stat.read_text(encoding="ascii").splitlines() if stat.is_file() else []
    # Cached file contents are dropped when memory is needed.
    cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return int(text) - int(used.read_text(encoding="ascii")) + cached


def _windows_memory() -> tuple[int, int] | None:
    """Total bytes, and bytes that may still be committed (page file included). Untested on Windows."""
    if sys.platform != "win32":
        return None
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "page_total", "page_free")),
            *((name, ctypes.c_ulonglong) for name in ("virtual", "virtual_free", "extended")),
        )

    status = Status()
    status.length = ctypes.sizeof(status)
    if not ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.total), int(status.page_free)


def _peak_windows_mb() -> float | None:
    """``PeakWorkingSetSize`` of GetProcessMemoryInfo."""
    if sys.platform != "win32":
        return None
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):
        _fields_ = (
            ("cb", wintypes.DWORD),
            ("PageFaultCount", wintypes.DWORD),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("Unused", ctypes.c_size_t * 7),
        )

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    call = kernel.K32GetProcessMemoryInfo
    call.argtypes = (wintypes.HANDLE, ctypes.POINTER(Counters), wintypes.DWORD)
    if not call(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
        return None
    return float(counters.PeakWorkingSetSize) / 2**20
