"""What of a bundle is opened, and how: on a backend at once, or on a slower one in the meantime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread

from std_rt.core.bundle import Bundle
from std_rt.core.errors import UsageError
from std_rt.engines import Engine, GraphSpec, choose_backend, open_engine, open_runner
from std_rt.engines.host import SharedEngines, open_on_host
from std_rt.engines.hot_swap import HotSwapRunner
from std_rt.engines.program import Program, Runner
from std_rt.engines.registry import GPU_BACKENDS
from std_rt.pipeline.denoise import Guidance
from std_rt.pipeline.program_builder import FrameNumbers, frame_program, graph_shapes
from std_rt.pipeline.runner_cache import RunnerKey
from std_rt.pipeline.stream_program import stream_program

__all__ = [
    "Opener",
    "Openers",
    "RunnerOpener",
    "graph_spec",
    "in_background",
    "layout_program",
    "on_host",
    "openers",
]

Opener = Callable[[GraphSpec], Engine]
RunnerOpener = Callable[[Program, dict[str, GraphSpec]], Runner]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Openers:
    """What opens one graph, one text encoder, a whole program; on ``backend``, chosen for ``reason``."""

    graph: Opener
    text: Opener
    runner: RunnerOpener
    backend: str
    reason: str


def openers(backend: str, precision: str, meanwhile: Callable[[str], None] | None = None) -> Openers:
    """Those of a backend's name, as `Stylizer.load` has it. Raises BackendError where it cannot be used."""
    name, reason = choose_backend(backend)
    first = name if meanwhile is None or name not in GPU_BACKENDS else choose_backend("cpu")[0]

    def open_graph(spec: GraphSpec) -> Engine:
        return open_engine(first, spec, precision)

    shared = SharedEngines(open_graph)

    def open_on(backend: str, program: Program, specs: dict[str, GraphSpec]) -> Runner:
        return open_runner(backend, program, specs, precision, shared.open)

    def open_both(program: Program, specs: dict[str, GraphSpec]) -> Runner:
        if meanwhile is None or first == name:
            return open_on(name, program, specs)
        # Asked for first: the building takes minutes, the slow runner is opened beside it.
        coming = in_background(lambda: open_on(name, program, specs))
        return HotSwapRunner(open_on(first, program, specs), coming, meanwhile, (first, name))

    def open_text(spec: GraphSpec) -> Engine:
        return open_engine(first, spec, "fp32")  # once a prompt: exact costs nothing

    return Openers(open_graph, open_text, open_both, name, reason)


def on_host(open_graph: Opener) -> RunnerOpener:
    """Programs run from here, graph by graph; those of one size share their engines."""
    shared = SharedEngines(open_graph)
    return lambda program, specs: open_on_host(program, specs, shared.open)


def in_background(work: Callable[[], Runner]) -> Future[Runner]:
    """``work`` in a thread of its own that no exit waits for: a build cannot be stopped half-way."""
    future: Future[Runner] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (whoever asks the future gets it)
            future.set_exception(error)

    Thread(target=run, name="std-rt-build", daemon=True).start()
    return future


def layout_program(
    bundle: Bundle, layout: RunnerKey, guidance: Guidance, text: Mapping[str, Shape]
) -> tuple[Program, dict[str, GraphSpec]]:
    """The program of a layout, and what to open for it; ``text`` gives shapes without the batch.

    Raises UsageError where the bundle does not work at the layout's size, BundleError where it has no
    schedule for its steps.
    """
    size, style = layout.level.size, bundle.style
    _check_working(bundle, size)
    own = {name: text[name] for name in ("encoder_hidden_states", "text_embeds")}
    shapes = {"time_ids": (6,), "style_tokens": (int(style["tokens"]), int(style["dim"]))}
    numbers = FrameNumbers(bundle.vae_scale, bundle.latent_channels, {**own, **shapes, "style_strength": ()})
    about = (numbers, bundle.coefficients(layout.level.steps), bundle.prediction_type, size, guidance)
    program = stream_program(*about) if layout.stream else frame_program(*about, layout.frames)
    return program, {name: graph_spec(bundle, name, found) for name, found in graph_shapes(program).items()}


def graph_spec(bundle: Bundle, name: str, shapes: Mapping[str, Shape]) -> GraphSpec:
    """What to open for one of a bundle's graphs at these shapes."""
    compute = bundle.manifest.get("precision", {}).get(name, {}).get("compute", "fp32")
    return GraphSpec(name, bundle.graph_path(name), shapes, bundle.digest, compute=compute)


def _check_working(bundle: Bundle, size: tuple[int, int]) -> None:
    multiple, (low, high) = bundle.size_multiple, bundle.size_range
    if any(side % multiple or not low <= side <= high for side in size):
        raise UsageError(
            f"bundle '{bundle.name}' works at multiples of {multiple} px from {low} to {high}, "
            f"not at {size[0]} x {size[1]}; use fit(frame) first"
        )
