"""Where ONNX Runtime would run the nodes of a bundle on an NVIDIA GPU. Needs none, but Linux, gcc and nm.

    pip download --no-deps -d runs/cuda onnxruntime-gpu          # 250 MB
    python -m tools.cuda_placement BUNDLE --wheel runs/cuda/onnxruntime_gpu-*.whl

The real CUDA provider is loaded over libraries that do nothing: every function that it imports from CUDA and
cuDNN reports success. That is enough to open a session, with all optimizations, as backend ``cuda`` opens it;
nothing is computed. Exits with 1 if a graph has a node on the CPU, or cannot be captured as a CUDA graph.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["main"]

_LIBRARY = re.compile(r"((?:__cuda|cu)\w+)@(lib\S+)")
_CUDNN, _ROOM = "libcudnn.so.9", 24 * 2**30
_COPY, _FREE = "(void *d, void *s, size_t n) {memcpy(d, s, n); return 0;}", "(void *p) {free(p); return 0;}"
_ALLOCATE = "(void **p, size_t n) {*p = aligned_alloc(256, (n + 255) & ~255UL); return *p ? 0 : 2;}"
# What a session asks about, as an RTX 4090 would say it (the offsets are those of cudaDeviceProp), and memory
# that weights can be copied to. Everything else returns 0.
_BODIES = {
    "__cudaRegisterFatBinary": "(void) {static long handle; return (long)&handle;}",
    "cudaDeviceGetAttribute": "(int *v, int which) {*v = which == 75 ? 8 : which == 76 ? 9 : 128; return 0;}",
    "cudaDriverGetVersion": "(int *v) {*v = 13000; return 0;}",
    "cudaGetDevice": "(int *v) {*v = 0; return 0;}",
    "cudaGetDeviceCount": "(int *v) {*v = 1; return 0;}",
    "cudaGetDeviceProperties": """(char *p) {
        memset(p, 0, 1000); strcpy(p, "none"); *(size_t *)(p + 288) = ROOM;
        *(size_t *)(p + 296) = 49152; *(int *)(p + 304) = 65536; *(int *)(p + 308) = 32;
        *(int *)(p + 320) = 1024; *(int *)(p + 360) = 8; *(int *)(p + 364) = 9; *(int *)(p + 384) = 128;
        return 0; }""",
    "cudaMemGetInfo": "(size_t *f, size_t *t) {*f = *t = ROOM; return 0;}",
    "cudaMemset": "(void *d, int v, size_t n) {memset(d, v, n); return 0;}",
    "cudaRuntimeGetVersion": "(int *v) {*v = 13000; return 0;}",
    "cudnnGetVersion": "(void) {return 91002;}",
    **dict.fromkeys(("cudaFree", "cudaFreeAsync", "cudaFreeHost"), _FREE),
    **dict.fromkeys(("cudaMalloc", "cudaMallocFromPoolAsync", "cudaMallocHost", "cudaHostAlloc"), _ALLOCATE),
    **dict.fromkeys(("cudaMemcpy", "cudaMemcpyAsync"), _COPY),
}
_HANDLE = "(void **p) {*p = malloc(64); return 0;}"


def main() -> int:
    """Unpack the wheel, make the libraries, and look at the bundle in a process that finds both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", help="a bundle's folder or name")
    parser.add_argument("--wheel", type=Path, required=True, help="of onnxruntime-gpu, for this Python")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(given.wheel) as wheel:
            wheel.extractall(folder / "wheel")
        _make_libraries(folder / "wheel/onnxruntime/capi/libonnxruntime_providers_cuda.so", folder)
        environment = {"LD_LIBRARY_PATH": name, "PYTHONPATH": str(folder / "wheel")}
        look = "import sys; from tools.cuda_placement import _look; sys.exit(_look(sys.argv[1]))"
        command = [sys.executable, "-c", look, given.bundle]
        return subprocess.run(command, env=os.environ | environment, check=False).returncode


def _make_libraries(provider: Path, folder: Path) -> None:
    """Shared libraries with every function of CUDA that ``provider`` imports, or looks up by name."""
    dynamic = subprocess.run(
        ["nm", "-D", "-u", str(provider)], capture_output=True, text=True, check=True
    ).stdout
    names: dict[str, set[str]] = {
        "libcuda.so.1": {"cuTensorMapEncodeTiled"},
        "libcurand.so.10": {"curandCreate"},
    }
    for name, library in _LIBRARY.findall(dynamic):
        names.setdefault(library, set()).add(name)
    names[_CUDNN] = {
        each.decode() for each in set(re.findall(rb"cudnn[A-Z]\w+(?=\0)", provider.read_bytes()))
    }
    for library, functions in names.items():
        source = "".join(f"long {name}{_body(name)}\n" for name in sorted(functions))
        head = "#include <stdlib.h>\n#include <string.h>\n"
        (folder / "x.c").write_text(head + source.replace("ROOM", f"{_ROOM}UL"), encoding="utf-8")
        (folder / "x.map").write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
        options = ["-shared", "-fPIC", "-w", "-Wl,--version-script=x.map", f"-Wl,-soname,{library}"]
        subprocess.run(["gcc", *options, "-o", library, "x.c"], cwd=folder, check=True)


def _body(name: str) -> str:
    if name in _BODIES:
        return _BODIES[name]
    if "String" in name or name.endswith("Name"):
        return '(void) {return (long)"none";}'
    return _HANDLE if "Create" in name else "(void) {return 0;}"


def _look(bundle: str) -> int | str:
    """What a process exits with."""
    import onnxruntime as ort

    from std_rt.cli.engines import plan
    from std_rt.core.errors import BackendError
    from std_rt.engines.onnxruntime import cuda
    from std_rt.engines.registry import in_form

    class Options(ort.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.add_session_config_entry("session.record_ep_graph_assignment_info", "1")

    ort.set_default_logger_severity(3)
    ort.SessionOptions = Options
    cuda._load_libraries = lambda: ""  # type: ignore[assignment]
    wrong = False
    for spec in plan(bundle).engines(glue=False):
        chosen, precision = in_form("cuda", spec, "auto")
        graph, captured = cuda._graph(chosen), True
        try:
            session: Any = cuda._open(chosen, precision, graph, capture=True)
        except BackendError as error:
            if "graph capture" not in str(error):
                return str(error)
            print(f"{spec.name}: {error}")
            session, captured = cuda._open(chosen, precision, graph, capture=False), False
        kinds: dict[str, Counter[str]] = {}
        for part in session.get_provider_graph_assignment_info():
            found = kinds.setdefault(part.ep_name, Counter())
            found.update(node.op_type for node in part.get_nodes())
        print(f"{spec.name}: {'captured' if captured else 'NOT captured'}")
        for provider, counts in kinds.items():
            listed = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
            print(f"  {provider}, {counts.total()} nodes: {listed}")
        wrong |= not captured or kinds.keys() != {"CUDAExecutionProvider"}
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
