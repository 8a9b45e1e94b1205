"""What OpenVINO compiled, kept in the engine store: a start reads no graph, and compiles nothing.

One engine file holds a whole opened graph: a JSON header (ports, names, sizes of what follows), the compiled
model, and the compiled model of the part that depends on steady inputs alone, where there is one. A compiled
model names no file and needs none, so its bytes, which the store has checked, are all that is trusted.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from std_rt.core.errors import BackendError
from std_rt.engines.cache import EngineKey, EngineStore
from std_rt.engines.registry import GraphSpec, Ports

__all__ = ["EXACT", "Compiled", "engine_key", "keep", "recall"]

# The steady part runs once a style and step: fp32 costs nothing there and keeps time embeddings exact.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}

_FORMAT = 1  # of the file; part of the key
# Not kept above this: the file is as large as the weights in fp32, reading and hashing it takes as long as
# compiling the graph again, and a full-size model would put 10 GB in a user's cache for every size in use.
_LARGEST_BYTES = 2**30
_LENGTH_BYTES = 8  # little-endian, in front of the header


@dataclass(frozen=True, eq=False)
class Compiled:
    """A graph that is compiled: ``main``, and ``prepare`` with the names of its inputs in order, or None."""

    inputs: Ports
    outputs: Ports
    main: ov.CompiledModel
    prepare: ov.CompiledModel | None = None
    steady: tuple[str, ...] = ()


def engine_key(core: ov.Core, spec: GraphSpec, config: dict[str, str]) -> EngineKey | None:
    """The store's key; None where ``spec`` has none. The number of threads plays no part in what is kept."""
    if not spec.key:
        return None
    formats = ",".join(sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")))
    flags = {"config": config, "steady": sorted(spec.steady), "format": _FORMAT}
    return EngineKey(
        bundle=spec.key,
        graph=spec.name,
        shapes=dict(spec.shapes),
        product="openvino",
        version=str(ov.__version__),
        target=f"{str(core.get_property('CPU', 'FULL_DEVICE_NAME')).strip()} ({formats})",
        flags=json.dumps(flags, sort_keys=True),
    )


def recall(core: ov.Core, key: EngineKey | None, config: dict[str, str]) -> tuple[Compiled | None, bool]:
    """(what is kept under ``key`` or None, whether something is there that must be replaced)."""
    store = EngineStore.open() if key is not None else None
    if store is None or key is None:
        return None, False
    try:
        data = store.read(key)
    except BackendError:
        return None, True  # damaged or not of this machine: never imported
    if data is None:
        return None, False
    try:
        return _read(core, data, config), False
    except RuntimeError:
        return None, True  # of this version, and yet OpenVINO does not take it


def keep(
    key: EngineKey | None, compiled: Compiled, weight_bytes: int, *, replace: bool, origin: Path
) -> None:
    """Write ``compiled`` to the store. Where that fails, the next start is as slow as this one.

    ``origin`` is the bundle's folder, by which the store knows whether it is still there.
    """
    store = EngineStore.open() if key is not None and weight_bytes <= _LARGEST_BYTES else None
    if store is None or key is None:
        return
    try:
        store.build(key, lambda path: _write(path, compiled), replace=replace, origin=str(origin))
    except BackendError as error:
        logging.getLogger("std_rt").warning("%s", error)


def _write(path: Path, compiled: Compiled) -> None:
    blobs = [model.export_model() for model in (compiled.main, compiled.prepare) if model is not None]
    header = {
        "inputs": _plain(compiled.inputs),
        "outputs": _plain(compiled.outputs),
        "steady": list(compiled.steady),
        "bytes": [blob.getbuffer().nbytes for blob in blobs],
    }
    text = json.dumps(header).encode("utf-8")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for blob in blobs:
            file.write(blob.getbuffer())


def _read(core: ov.Core, data: bytes, config: dict[str, str]) -> Compiled:
    view = memoryview(data)
    at = _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES], "little")
    header = json.loads(bytes(view[_LENGTH_BYTES:at]))
    models = []
    for size, settings in zip(header["bytes"], (config, config | EXACT), strict=False):
        blob = ov.Tensor(ov.Type.u8, ov.Shape([size]))  # the model keeps it, so weights are not copied
        blob.data[:] = np.frombuffer(view[at : at + size], np.uint8)
        models.append(core.import_model(blob, "CPU", settings))
        at += size
    inputs, outputs = (_ports(header[name]) for name in ("inputs", "outputs"))
    return Compiled(
        inputs, outputs, models[0], models[1] if len(models) > 1 else None, tuple(header["steady"])
    )


def _plain(ports: Ports) -> dict[str, Any]:
    return {name: [list(shape), dtype.name] for name, (shape, dtype) in ports.items()}


def _ports(plain: dict[str, Any]) -> Ports:
    return {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in plain.items()}
