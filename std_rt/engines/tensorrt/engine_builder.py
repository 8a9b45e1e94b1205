"""Provides TensorRT and TensorRT-RTX engines: from the cache, or built if the cache does not have them.

builder = EngineBuilder(trt, RTX, ("sm89", "sm120"), cache=EngineCache.open())
with builder.data(spec) as data:
    engine = runtime.deserialize_cuda_engine(data)
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from std_rt.core.bundle import QUANTIZED
from std_rt.core.errors import BackendError
from std_rt.core.onnx_file import external_locations
from std_rt.engines.cache import EngineCache, EngineKey
from std_rt.engines.protocol import GraphSpec
from std_rt.engines.tensorrt.onnx_to_engine import (
    Product,
    Progress,
    build_engine,
    capability,
    capture_flag,
)

__all__ = ["EngineBuilder", "progress_to"]

_OLDEST_FP8 = 89  # compute capability of the first GPUs with FP8 units: RTX 40


class EngineBuilder:
    """Engines of one product for given GPUs, from the cache or built. Safe in several threads."""

    def __init__(
        self,
        trt: Any,
        product: Product,
        targets: Sequence[str],
        *,
        driver: str = "",
        tf32: bool = True,
        cache: EngineCache | None = None,
        progress: Progress | None = None,
    ) -> None:
        """``targets`` as ``sm89``: this machine's GPU or, if the product builds ahead, any it knows.

        Engines of TensorRT depend on the ``driver``, those of TensorRT-RTX do not. Without a cache, engines
        are built every time. ``tf32`` as in `build_engine`. Raises BackendError on a target that the product
        has no code for.
        """
        self.product, self.cache = product, cache
        self.targets = tuple(dict.fromkeys(targets))
        self._trt, self._tf32, self._progress = trt, tf32, progress
        self._driver = "" if product.ahead else driver
        if product.ahead:
            for target in self.targets:
                capability(trt, product, target)

    def key(self, spec: GraphSpec) -> EngineKey:
        """The cache key of ``spec``. A graph that belongs to no bundle is identified by its file's sha256."""
        capture = " user allocation" if capture_flag(self._trt) is not None else ""
        form = f" {spec.compute}" if spec.compute in QUANTIZED else ""
        baked = f" baked={spec.baked_digest}" if spec.baked else ""
        file = "" if spec.key else f" file={hashlib.sha256(spec.path.read_bytes()).hexdigest()}"
        return EngineKey(
            bundle=spec.key,
            graph=spec.name,
            shapes=spec.shapes,
            product=self.product.module,
            version=self._trt.__version__,
            target="+".join(self.targets),
            driver=self._driver,
            flags=f"tf32={self._tf32}{capture}{form}{baked}{file}",
        )

    def kernels_key(self, spec: GraphSpec, driver: str) -> EngineKey:
        """The cache key of the kernels that TensorRT-RTX compiles on this GPU for the engine of ``spec``."""
        return replace(self.key(spec), graph=f"{spec.name}.kernels", driver=driver)

    def find(self, spec: GraphSpec) -> Path | None:
        """The engine's file if it is in the cache already. Raises BackendError as `EngineCache.find` does."""
        return None if self.cache is None else self.cache.find(self.key(spec))

    def ensure(self, spec: GraphSpec) -> Path:
        """The engine's file, built if it is not in the cache. Raises BackendError; needs a cache."""
        if self.cache is None:
            raise BackendError("there is no writable folder for engines; set STD_RT_CACHE to one")
        return self.cache.build(
            self.key(spec), lambda path: self._make(spec, path), origin=spec.path.parent.resolve()
        )

    @contextmanager
    def data(self, spec: GraphSpec) -> Iterator[mmap.mmap | bytes]:
        """The engine's bytes while the block runs: mapped from the cache, checked, or just built.

        An engine of SDXL has 5 GB, which TensorRT copies: it is in no memory of ours. Raises BackendError.
        """
        if self.cache is None or (not spec.key and external_locations(spec.path)):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "engine"
                self._make(spec, path)
                yield path.read_bytes()
            return
        with self.cache.mapped(self.key(spec)) as data:  # gigabytes, so hashed only once
            if data is not None:
                yield data
                return
        self.ensure(spec)
        with self.cache.mapped(self.key(spec)) as data:
            if data is None:
                raise BackendError(f"the engine of '{spec.name}' was removed while it was built; run again")
            yield data

    def _make(self, spec: GraphSpec, path: Path) -> None:
        old = [target for target in self.targets if int(target.removeprefix("sm")) < _OLDEST_FP8]
        if spec.compute == "fp8" and old:
            raise BackendError(
                f"{', '.join(old)} has no FP8 units, which begin with SM{_OLDEST_FP8}; use --precision auto"
            )
        timings = self._timings_key()
        known = self.cache.read(timings) if self.cache is not None and timings is not None else None
        learned = build_engine(
            self._trt,
            self.product,
            spec,
            path,
            targets=self.targets if self.product.ahead else (),
            tf32=self._tf32,
            timings=None if timings is None else known or b"",
            progress=self._progress or next(reversed(_progress), None),
        )
        if learned and self.cache is not None and timings is not None:
            self.cache.build(timings, learned, replace=True)

    def _timings_key(self) -> EngineKey | None:
        """The cache key of kernel timings; None for TensorRT-RTX, which measures none when it builds."""
        if self.product.ahead:
            return None
        target = "+".join(self.targets)
        version = self._trt.__version__
        return EngineKey("", "kernel timings", {}, self.product.module, version, target, self._driver)


_progress: list[Progress] = []  # of `progress_to`, the innermost last


@contextmanager
def progress_to(progress: Progress) -> Iterator[None]:
    """While the block runs, builds that were given no ``progress`` report to this one, in any thread."""
    _progress.append(progress)
    try:
        yield
    finally:
        _progress.remove(progress)
