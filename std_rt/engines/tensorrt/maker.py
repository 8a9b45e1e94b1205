"""Engines of TensorRT and TensorRT-RTX out of the store, built where the store does not list them.

maker = EngineMaker(trt, RTX, ("sm89", "sm120"), store=EngineStore.open())
data = maker.data(spec)
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from std_rt.core.errors import BackendError
from std_rt.core.external_data import external_locations
from std_rt.engines.cache import EngineKey, EngineStore
from std_rt.engines.glue import glue_path
from std_rt.engines.program import GLUE, Program
from std_rt.engines.registry import GraphSpec
from std_rt.engines.tensorrt.build import BuildOptions, Product, Progress, build_engine, capability

__all__ = ["EngineMaker", "glue_spec", "launch_specs", "progress_to", "same_engine"]


def glue_spec(op: str, shapes: Mapping[str, tuple[int, ...]]) -> GraphSpec:
    """One operation of `program.GLUE` as a graph."""
    return GraphSpec(f"glue.{op}", glue_path(op), shapes, key="")


def launch_specs(program: Program, specs: Mapping[str, GraphSpec]) -> list[GraphSpec]:
    """What each launch of a program runs, at the shapes of its buffers; equal ones are one object."""
    known: dict[tuple[Any, ...], GraphSpec] = {}
    found = []
    for launch in program.launches:
        shapes = {port: program.buffers[buffer][0] for port, buffer in launch.inputs.items()}
        glue = launch.graph in GLUE
        spec = glue_spec(launch.graph, shapes) if glue else replace(specs[launch.graph], shapes=shapes)
        found.append(known.setdefault(same_engine(spec), spec))
    return found


def same_engine(spec: GraphSpec) -> tuple[Any, ...]:
    """Equal for specs that one engine serves."""
    return spec.name, str(spec.path), tuple(sorted(spec.shapes.items()))


class EngineMaker:
    """Engines of one product for given GPUs, out of the store or made. Safe in several threads."""

    def __init__(
        self,
        trt: Any,
        product: Product,
        targets: Sequence[str],
        *,
        driver: str = "",
        options: BuildOptions | None = None,
        store: EngineStore | None = None,
        progress: Progress | None = None,
    ) -> None:
        """``targets`` as ``sm89``: this machine's GPU or, where the product builds ahead, any it knows.

        ``driver`` is what TensorRT's engines are bound to; those of TensorRT-RTX are not. Without a store,
        engines are made anew every time. Raises BackendError on a target that the product has no code for.
        """
        self.product, self.store = product, store
        self.targets = tuple(dict.fromkeys(targets))
        self._trt, self._options, self._progress = trt, options or BuildOptions(), progress
        self._driver = "" if product.ahead else driver
        if product.ahead:
            for target in self.targets:
                capability(trt, product, target)

    def key(self, spec: GraphSpec) -> EngineKey:
        """What the engine of ``spec`` is listed under. A graph of no bundle goes by its file's sha256."""
        file = "" if spec.key else f" file={hashlib.sha256(spec.path.read_bytes()).hexdigest()}"
        return EngineKey(
            bundle=spec.key,
            graph=spec.name,
            shapes=spec.shapes,
            product=self.product.module,
            version=self._trt.__version__,
            target="+".join(self.targets),
            driver=self._driver,
            flags=f"{self._options}{file}",
        )

    def kernels_key(self, spec: GraphSpec, driver: str) -> EngineKey:
        """Where the kernels are kept that TensorRT-RTX compiles on this GPU for the engine of ``spec``."""
        key = self.key(spec)
        return replace(key, graph=f"{spec.name}.kernels", driver=driver)

    def find(self, spec: GraphSpec) -> Path | None:
        """The engine's file where it is in the store already. Raises BackendError as the store does."""
        return None if self.store is None else self.store.find(self.key(spec))

    def ensure(self, spec: GraphSpec) -> Path:
        """The engine's file, built where it is not there. Raises BackendError; needs a store."""
        if self.store is None:
            raise BackendError("there is no folder to keep engines in; set STD_RT_CACHE to one")
        return self.store.build(
            self.key(spec), lambda path: self._make(spec, path), origin=spec.path.parent.resolve()
        )

    def data(self, spec: GraphSpec) -> bytes:
        """The engine's bytes: checked ones out of the store, or this moment's own. Raises BackendError."""
        if self.store is None or (not spec.key and external_locations(spec.path)):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "engine"
                self._make(spec, path)
                return path.read_bytes()
        data = self.store.read(self.key(spec))
        if data is None:
            self.ensure(spec)
            data = self.store.read(self.key(spec))
        if data is None:
            raise BackendError(f"the engine of '{spec.name}' was removed while it was built; run again")
        return data

    def _make(self, spec: GraphSpec, path: Path) -> None:
        timings = self._timings_key()
        known = self.store.read(timings) if self.store is not None and timings is not None else None
        learned = build_engine(
            self._trt,
            self.product,
            spec,
            path,
            targets=self.targets if self.product.ahead else (),
            options=self._options,
            timings=None if timings is None else known or b"",
            progress=self._progress or _listener.progress,
        )
        if learned and self.store is not None and timings is not None:
            self.store.build(timings, learned, replace=True)

    def _timings_key(self) -> EngineKey | None:
        """Where kernels' timings are kept; TensorRT-RTX measures none at build time."""
        if self.product.ahead:
            return None
        target = "+".join(self.targets)
        version = self._trt.__version__
        return EngineKey("", "kernel timings", {}, self.product.module, version, target, self._driver)


class _Listener:
    """Whom builds report to that nobody asked for by name (`progress_to`)."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.progress: Progress | None = None


_listener = _Listener()


@contextmanager
def progress_to(progress: Progress) -> Iterator[None]:
    """Inside, every build in this process reports to ``progress``, from whatever thread."""
    with _listener.lock:
        before, _listener.progress = _listener.progress, progress
    try:
        yield
    finally:
        with _listener.lock:
            _listener.progress = before
