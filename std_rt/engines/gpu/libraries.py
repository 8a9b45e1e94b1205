"""Finds CUDA and cuDNN libraries that the installed onnxruntime-gpu needs and that are missing.

They come with ``pip install '.[cuda]'`` (in pip's ``nvidia`` packages) or with an installed CUDA
toolkit. If one is missing, ONNX Runtime says "failed to create provider" and continues on the CPU.
"""

from __future__ import annotations

import ctypes
import re
import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ["cuda_version", "library_names", "missing_libraries", "provider_problem"]

_VERSION = re.compile(r"^cuda_version\s*=\s*['\"]([\d.]+)['\"]", re.MULTILINE)


def cuda_version() -> str | None:
    """The CUDA that the installed onnxruntime was built with, as "13.0"; None for a build without it."""
    folder = _capi()
    info = None if folder is None else folder / "build_and_package_info.py"
    found = _VERSION.search(info.read_text(encoding="utf-8")) if info and info.is_file() else None
    return found[1] if found else None


def library_names(cuda: str, system: str = sys.platform) -> list[str]:
    """The libraries that a build for this CUDA loads, cuDNN 9 last."""
    major = int(cuda.split(".")[0])
    cufft = 12 if major >= 13 else 11  # numbered separately
    if system == "win32":
        names = [f"cublasLt64_{major}", f"cublas64_{major}", f"cufft64_{cufft}", f"cudart64_{major}"]
        return [f"{name}.dll" for name in (*names, "cudnn64_9")]
    names = [f"cublasLt.so.{major}", f"cublas.so.{major}", f"cufft.so.{cufft}", f"cudart.so.{major}"]
    return [f"lib{name}" for name in (*names, "curand.so.10", "cudnn.so.9")]


def missing_libraries() -> list[str]:
    """Libraries neither in pip's packages nor where this system looks; empty for a build without CUDA."""
    cuda = cuda_version()
    if cuda is None:
        return []
    packaged = _packaged()
    return [name for name in library_names(cuda) if name not in packaged and not _loads(name)]


def provider_problem() -> str:
    """Why the CUDA provider of the installed onnxruntime does not load, in the system's words; "" if it does.

    ONNX Runtime has the reason only in its log.
    """
    folder = _capi()
    for name in ("shared", "cuda"):  # the second takes symbols from the first
        paths = list(folder.glob(f"*onnxruntime_providers_{name}.*")) if folder else []
        if not paths:
            return f"onnxruntime has no file of its provider '{name}'"
        for path in paths:
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                return str(error)
    return ""


def _capi() -> Path | None:
    """The folder of the installed onnxruntime's libraries."""
    spec = find_spec("onnxruntime")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "capi"


def _packaged() -> set[str]:
    """Files of pip's ``nvidia`` packages."""
    spec = find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    files = (
        path
        for root in roots
        for path in Path(root).rglob("*")
        if ".so" in path.name or path.suffix == ".dll"
    )
    return {path.name for path in files}


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
