"""Opens a bundle's graphs and programs on a backend, on a CPU backend while GPU engines are being built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from importlib.util import find_spec
from threading import Thread

import numpy as np

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

__all__ = ["GraphOpener", "Openers", "RunnerOpener", "graph_spec", "openers", "program_for", "window_specs"]

GraphOpener = Callable[[GraphSpec], Engine]
RunnerOpener = Callable[[Program, dict[str, GraphSpec]], Runner]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Openers:
    """Functions that open one graph at static shapes, one text encoder, and a whole program.

    ``backend``: the one chosen; ``reason``: why. ``precision``: the one asked for.
    """

    graph: GraphOpener
    text: GraphOpener
    runner: RunnerOpener
    backend: str = ""
    reason: str = ""
    precision: str = "auto"

    @classmethod
    def on_host(cls, graph: GraphOpener) -> Openers:
        """Programs run from Python, graph by graph; programs of one size share their engines."""
        shared = SharedEngines(graph)
        return cls(graph, graph, lambda program, specs: open_on_host(program, specs, shared.open))


def openers(backend: str, precision: str, meanwhile: Callable[[str], None] | None = None) -> Openers:
    """Openers for a backend name, as in `Stylizer.load`. Raises BackendError if it cannot be used."""
    name, reason = choose_backend(backend)
    first = name if meanwhile is None or name not in GPU_BACKENDS else choose_backend("cpu")[0]

    # A CPU that stands in for a GPU computes as it does best.
    interim = precision if first == name else "auto"

    def open_graph(spec: GraphSpec) -> Engine:
        return open_engine(first, spec, interim)

    shared = SharedEngines(open_graph)

    def open_on(backend: str, program: Program, specs: dict[str, GraphSpec]) -> Runner:
        asked = precision if backend == name else interim
        return open_runner(backend, program, specs, asked, shared.open)

    def open_program(program: Program, specs: dict[str, GraphSpec]) -> Runner:
        if meanwhile is None or first == name:
            return open_on(name, program, specs)
        # The build takes minutes, so it starts first; the slow runner opens meanwhile.
        coming = _in_background(lambda: open_on(name, program, specs))
        return HotSwapRunner(open_on(first, program, specs), coming, meanwhile, (first, name))

    def open_text(spec: GraphSpec) -> Engine:
        return open_engine(first, spec, "fp32")  # runs once per prompt: exactness costs nothing

    return Openers(open_graph, open_text, open_program, name, reason, precision)


def _in_background(work: Callable[[], Runner]) -> Future[Runner]:
    """``work`` in a daemon thread, so that no exit waits for it: a build cannot be interrupted."""
    future: Future[Runner] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (raised when the future is read)
            future.set_exception(error)

    Thread(target=run, name="std-rt-build", daemon=True).start()
    return future


def program_for(
    bundle: Bundle, key: RunnerKey, guidance: Guidance, text: Mapping[str, Shape], vae: str = "full"
) -> tuple[Program, dict[str, GraphSpec]]:
    """The program of a runner key, and its graphs at their shapes; ``text``: shapes without the batch axis;
    ``vae`` of `core.bundle.VAES`.

    Raises UsageError if the bundle does not support the size, BundleError if it has no schedule for
    the steps.
    """
    size, style = key.quality.size, bundle.style
    _check_size(bundle, size)
    prompt = {name: text[name] for name in ("encoder_hidden_states", "text_embeds")}
    tokens = (int(style["tokens"]), int(style["dim"]))
    inputs = {**prompt, "time_ids": (6,), "style_tokens": tokens, "style_strength": ()}
    numbers = FrameNumbers(bundle.vae_scale, bundle.latent_channels, inputs, bundle.unet_inputs)
    common = (numbers, bundle.coefficients(key.quality.steps), bundle.prediction_type, size, guidance)
    program = stream_program(*common) if key.stream else frame_program(*common, key.frames, masked=key.masked)
    shapes = graph_shapes(program)
    specs = {name: graph_spec(bundle, bundle.vae_graph(name, vae), shapes[name]) for name in shapes}
    return program, _around_prompt(bundle, specs, guidance)


def window_specs(
    bundle: Bundle, size: tuple[int, int], guidance: Guidance, text: Mapping[str, Shape], vae: str = "full"
) -> dict[str, GraphSpec]:
    """The graphs of a video-to-video bundle at a size (H, W): the VAE frame by frame, the UNet by windows.

    ``text``: shapes, with a batch of 1. Raises UsageError if the bundle does not support the size.
    """
    assert bundle.window is not None
    _check_size(bundle, size)
    latents = (bundle.latent_channels, size[0] // bundle.vae_scale, size[1] // bundle.vae_scale)
    window = (bundle.window[0], *latents)
    shapes: dict[str, dict[str, Shape]] = {
        "vae_encoder": {"image": (1, 3, *size)},
        "unet": {
            "sample": window,
            "timestep": (1,),
            "encoder_hidden_states": text["encoder_hidden_states"],
            "text_embeds": text["text_embeds"],
            "time_ids": (1, 6),
            "style_tokens": (1, int(bundle.style["tokens"]), int(bundle.style["dim"])),
            "style_strength": (1,),
            **dict.fromkeys(bundle.unet_inputs, window),
        },
        "vae_decoder": {"latents": (1, *latents)},
    }
    specs = {name: graph_spec(bundle, bundle.vae_graph(name, vae), each) for name, each in shapes.items()}
    return _around_prompt(bundle, specs, guidance)


def _around_prompt(bundle: Bundle, specs: dict[str, GraphSpec], guidance: Guidance) -> dict[str, GraphSpec]:
    """``specs`` with the prompt baked in if it is the only text that the UNet will ever see.

    Backends compute what depends on it with the onnx package, which their extras bring. Without it they do so
    in every call, and ``cuda`` opens no graph of an opset after 20.
    """
    onnx = find_spec("onnx")
    if bundle.takes_prompts or guidance.mode != "none" or onnx is None or onnx.origin is None:
        return specs  # no origin: only a folder of that name
    hidden = bundle.conditioning()["encoder_hidden_states"].astype(np.float32)
    text = np.broadcast_to(hidden, specs["unet"].shapes["encoder_hidden_states"])
    return specs | {"unet": replace(specs["unet"], baked={"encoder_hidden_states": text})}


def graph_spec(bundle: Bundle, name: str, shapes: Mapping[str, Shape]) -> GraphSpec:
    """One of a bundle's graphs at these shapes."""
    compute = bundle.manifest.get("precision", {}).get(name, {}).get("compute", "fp32")
    path, quantized = bundle.graph_path(name), bundle.quantized_paths(name)
    return GraphSpec(name, path, shapes, bundle.digest, compute=compute, quantized=quantized)


def _check_size(bundle: Bundle, size: tuple[int, int]) -> None:
    multiple, (low, high) = bundle.size_multiple, bundle.size_range
    if any(side % multiple or not low <= side <= high for side in size):
        raise UsageError(
            f"bundle '{bundle.name}' works at multiples of {multiple} px from {low} to {high}, "
            f"not at {size[0]} x {size[1]}; use fit(frame) first"
        )
