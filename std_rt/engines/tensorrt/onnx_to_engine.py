"""The build of TensorRT and TensorRT-RTX engines from ONNX graphs: one code base over both modules.

    trt = load_product(RTX)
    build_engine(trt, RTX, spec, Path("unet.engine"), targets=("sm89", "sm120"))

Networks are strongly typed (precision is as in the ONNX file) and every shape is fixed. Nothing
here touches the CUDA runtime: TensorRT-RTX builds for named GPUs on a machine without one. Tests build
with TensorRT-RTX; TensorRT itself, which is on another package index, is untested.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from std_rt.core.errors import BackendError, one_line
from std_rt.core.files import is_inside
from std_rt.core.machine import install_hint
from std_rt.core.onnx_file import external_locations
from std_rt.engines.baked_inputs import baked_graph
from std_rt.engines.protocol import GraphSpec

__all__ = [
    "PRODUCTS",
    "RTX",
    "TENSORRT",
    "Phases",
    "Product",
    "Progress",
    "build_engine",
    "capability",
    "capture_flag",
    "load_product",
    "make_logger",
]

Progress = Callable[[str, float], None]  # (graph, share done in 0..1)


@dataclass(frozen=True)
class Product:
    """TensorRT or TensorRT-RTX; ``ahead``: it builds for named GPUs without having one, and compiles the last
    stretch where the engine runs.
    """

    backend: str
    module: str
    label: str
    oldest: tuple[int, int]
    ahead: bool

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"{install_hint(self.backend)} --upgrade"


TENSORRT = Product("tensorrt", "tensorrt", "TensorRT", (10, 14), ahead=False)
RTX = Product("rtx", "tensorrt_rtx", "TensorRT-RTX", (1, 4), ahead=True)
PRODUCTS = {product.backend: product for product in (RTX, TENSORRT)}


def load_product(product: Product) -> Any:
    """Its Python module. Raises BackendError if it is missing, broken or too old."""
    if find_spec(product.module) is None:
        raise BackendError(f"{product.label} is not installed; run: {product.install}")
    try:
        trt = import_module(product.module)
    except (ImportError, OSError) as error:
        reason = one_line(error)
        raise BackendError(f"{product.label} does not load ({reason}); run: {product.install}") from error
    found = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if found < product.oldest:
        oldest = ".".join(map(str, product.oldest))
        raise BackendError(
            f"{product.label} {trt.__version__} is too old, {oldest} is needed; run: {product.install}"
        )
    return trt


def build_engine(
    trt: Any,
    product: Product,
    spec: GraphSpec,
    path: Path,
    *,
    targets: Sequence[str] = (),
    tf32: bool = True,
    timings: bytes | None = None,
    progress: Progress | None = None,
) -> bytes | None:
    """Build ``spec`` into the file ``path``; returns the timings learned if ``timings`` were given.

    ``targets`` are GPUs to build ahead for (none: the one in this machine). ``tf32`` lets matrix products of
    float32 round their inputs to 10 bits of mantissa, which is several times faster.

    Raises BackendError if the graph reads weights from outside its folder, cannot be parsed or cannot be
    built; OSError if ``path`` cannot be written.
    """
    _check_weights(spec)
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(_onnx(spec), str(spec.path)):
        raise BackendError(_refusal(product, spec, _parser_error(parser, logger)))
    _fix_shapes(product, spec, network, logger)
    _let_decompose(trt, network)
    config = _config(trt, product, builder, targets, tf32)
    if timings is not None:
        config.set_timing_cache(config.create_timing_cache(timings), ignore_mismatch=False)
    monitor = None
    if progress is not None and hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = monitor = _monitor(trt, spec.name, progress)  # must live as long as config
    try:
        done = _serialize(trt, builder, network, config, path)
    finally:
        if monitor is not None:
            monitor.raise_failure()
    if not done:
        raise BackendError(_refusal(product, spec, logger.reason()))
    return None if timings is None else bytes(config.get_timing_cache().serialize())


def _onnx(spec: GraphSpec) -> bytes:
    """The graph without its weights, which the parser reads from beside the file."""
    return baked_graph(spec) if spec.baked else spec.path.read_bytes()


def _config(trt: Any, product: Product, builder: Any, targets: Sequence[str], tf32: bool) -> Any:
    config = builder.create_builder_config()
    (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    capture = capture_flag(trt)
    if capture is not None:
        config.set_flag(capture)
    if targets:
        config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        config.set_compute_capability(capability(trt, product, target), i)
    return config


def make_logger(trt: Any) -> Any:
    """A logger that prints nothing; ``reason()`` returns the first error since its last call."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the module is not known before it runs
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self._errors.append(" ".join(message.split()))

        def reason(self) -> str:
            first = self._errors[0][-300:] if self._errors else "it gave no reason"
            self._errors.clear()
            return first

    return Log()


class Phases:
    """The nested phases of a build as one share done, which never falls. Safe in several threads."""

    def __init__(self) -> None:
        self._open: list[tuple[str, int, int]] = []  # (name, steps, steps done), outermost first
        self._lock = threading.Lock()
        self.share = 0.0

    def start(self, name: str, steps: int) -> float:
        """A phase inside the innermost open one begins."""
        with self._lock:
            self._open.append((name, max(steps, 1), 0))
            return self._update()

    def step(self, name: str, index: int) -> float:
        """Step ``index`` (from 0) of an open phase is done; phases inside it are over."""
        with self._lock:
            at = self._find(name)
            if at is not None:
                del self._open[at + 1 :]
                self._open[at] = (name, self._open[at][1], index + 1)
            return self._update()

    def finish(self, name: str) -> float:
        """A phase is over, complete or not."""
        with self._lock:
            at = self._find(name)
            if at is not None:
                del self._open[at:]
            if not self._open:
                self.share = 1.0
            return self._update()

    def _find(self, name: str) -> int | None:
        return next((i for i in reversed(range(len(self._open))) if self._open[i][0] == name), None)

    def _update(self) -> float:
        share, room = 0.0, 1.0
        for _, steps, done in self._open:
            share += room * min(done, steps) / steps
            room /= steps
        self.share = max(self.share, min(share, 1.0))
        return self.share


def _monitor(trt: Any, name: str, progress: Progress) -> Any:
    """Reports a build's progress; an error of ``progress`` ends the build, and `raise_failure` raises it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module is not known before it runs
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases = Phases()
            self._failure: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._report(self._phases.start(phase, steps))

        def step_complete(self, phase: str, step: int) -> bool:
            self._report(self._phases.step(phase, step))
            return self._failure is None

        def phase_finish(self, phase: str) -> None:
            self._report(self._phases.finish(phase))

        def raise_failure(self) -> None:
            if self._failure is not None:
                raise self._failure

        def _report(self, share: float) -> None:
            try:
                if self._failure is None:
                    progress(name, share)
            except BaseException as error:  # noqa: BLE001  # nothing may pass through C++; raised afterwards
                self._failure = error

    return Monitor()


def _serialize(trt: Any, builder: Any, network: Any, config: Any, path: Path) -> bool:
    """Build, if possible straight into the file, so that an engine of 5 GB is not in memory twice."""
    if not hasattr(builder, "build_serialized_network_to_stream"):
        data = builder.build_serialized_network(network, config)
        if data is not None:
            path.write_bytes(data)
        return data is not None
    with path.open("wb") as file:

        class Writer(trt.IStreamWriter):  # type: ignore[misc]  # the module is not known before it runs
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)
                self.failure: OSError | None = None

            def write(self, data: bytes) -> int:
                try:
                    return file.write(data)
                except OSError as error:  # must not pass through C++; raised below
                    self.failure = error
                    return 0

        writer = Writer()
        done = bool(builder.build_serialized_network_to_stream(network, config, writer))
        if writer.failure is not None:
            raise writer.failure
    return done


def _check_weights(spec: GraphSpec) -> None:
    """Refuse weights outside the graph's folder: the parser follows whatever path the graph names."""
    try:
        locations = external_locations(spec.path)
    except (OSError, ValueError) as error:
        raise BackendError(f"graph '{spec.name}' cannot be read: {error}; export it again") from error
    for location in sorted(locations):
        if not is_inside(location):
            raise BackendError(
                f"graph '{spec.name}' reads weights from {location!r}, outside its folder; do not use it"
            )


def _fix_shapes(product: Product, spec: GraphSpec, network: Any, logger: Any) -> None:
    """Give every input its one shape, from which all others must follow."""
    inputs = {port.name: port for port in (network.get_input(i) for i in range(network.num_inputs))}
    if inputs.keys() != spec.shapes.keys():
        raise BackendError(
            f"graph '{spec.name}' takes {', '.join(inputs)}; shapes were given for {', '.join(spec.shapes)}"
        )
    for name, port in inputs.items():
        port.shape = tuple(spec.shapes[name])
    try:
        shapes = {
            port.name: tuple(port.shape)
            for port in (network.get_output(i) for i in range(network.num_outputs))
        }
    except RuntimeError as error:
        raise BackendError(_refusal(product, spec, logger.reason())) from error
    for name, shape in shapes.items():
        if any(side < 0 for side in shape):
            reason = f"the shape of its output {name} depends on the data"
            raise BackendError(_refusal(product, spec, reason))


def _let_decompose(trt: Any, network: Any) -> None:
    """Attention of a shape without a kernel of its own is refused, unless it may be built from others."""
    kind = getattr(getattr(trt, "LayerType", None), "ATTENTION_OUTPUT", None)
    for layer in (network.get_layer(i) for i in range(network.num_layers)) if kind is not None else ():
        if layer.type == kind:
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True


def capability(trt: Any, product: Product, target: str) -> Any:
    """The module's constant for a target such as ``sm89``. Raises BackendError if it has no code for it."""
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items()}
    if target not in known or not target.startswith("sm"):
        names = ", ".join(name for name in known if name.startswith("sm"))
        raise BackendError(
            f"{product.label} {trt.__version__} has no code for {target}, only for {names}; "
            "use another --sm, or --backend tensorrt or cuda on that GPU"
        )
    return known[target]


def capture_flag(trt: Any) -> Any:
    """The flag without which an engine may allocate while it runs, which a CUDA graph does not allow.

    A network that has to is then refused when it is built, on any machine. None if the product has no such
    flag.
    """
    return getattr(getattr(trt, "BuilderFlag", None), "REQUIRE_USER_ALLOCATION", None)


def _parser_error(parser: Any, logger: Any) -> str:
    if not parser.num_errors:
        return str(logger.reason())
    error = parser.get_error(0)
    reason = one_line(error.desc(), -300)
    return f"at {error.node_operator()} {error.node_name()}: {reason}" if error.node_name() else reason


def _refusal(product: Product, spec: GraphSpec, reason: str) -> str:
    return (
        f"{product.label} cannot build graph '{spec.name}' at {spec.describe_shapes()}: {reason}; "
        "try another --size or --backend openvino"
    )
