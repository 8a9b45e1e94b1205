"""The graphs of a bundle: their ports, how a module becomes ONNX, and torch's answers to seeded inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import config as fx_config

from std_rt.core.bundle import CONTENT, INPAINTING
from std_rt.export.modules import MotionUNet, UNet, VaeDecoder, VaeEncoder
from std_rt.export.source_pipeline import Source, Style
from std_rt.models.components import Network, plain_config, quiet

__all__ = [
    "Example",
    "Graph",
    "Port",
    "ReferenceRun",
    "Trace",
    "style_graph",
    "trace",
    "unet_graph",
    "vae_graphs",
]

Arrays = dict[str, NDArray[Any]]

# 23 has attention as an operator, for which GPU runtimes have kernels; OpenVINO executes the same fused
# operations for 20, 21 and 23.
OPSET, OPSET_OF_ATTENTION = 20, 23
_MAX_BATCH = 32  # 64 meets a limit of another axis, and torch then traces twice
_MAX_UNITS = 1024
_STACKS = "do_not_emit_stack_traces"


@dataclass(frozen=True)
class Port:
    """An input or output of a graph: float32 or int64. In ``shape`` a name stands for an open axis."""

    name: str
    shape: tuple[int | str, ...]
    meaning: str
    dtype: str = "float32"

    @property
    def open_axes(self) -> list[str]:
        """Names of the axes whose sizes are left open."""
        return [axis for axis in self.shape if isinstance(axis, str)]

    def entry(self) -> dict[str, Any]:
        """As the manifest lists it."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, "meaning": self.meaning}


@dataclass(frozen=True)
class Trace:
    """What to trace: a module whose arguments are ``inputs`` and whose results are ``outputs``, in order.

    ``multiples`` says of which number an open axis must be a multiple, ``opset`` which ONNX to write.
    """

    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    multiples: Mapping[str, int] = field(default_factory=dict)
    opset: int = OPSET


def trace(plan: Trace) -> ir.Model:
    """Export ``plan`` at a made-up size; every axis given by name stays open, under that name."""
    dims = {axis: _dim(axis, plan.multiples.get(axis, 1)) for port in plan.inputs for axis in port.open_axes}
    shapes = {port.name: {i: dims[a] for i, a in enumerate(port.shape) if a in dims} for port in plan.inputs}
    with quiet("torch.onnx", "torch.export", "onnxscript", "onnx_ir"), _without_stacks(), torch.no_grad():
        program = torch.onnx.export(
            plan.module.eval(),
            (),
            kwargs=_trace_inputs(plan),
            dynamo=True,
            opset_version=plan.opset,
            dynamic_shapes=shapes,
            output_names=[port.name for port in plan.outputs],
            verbose=False,
        )
    assert program is not None
    return _tidy(program.model, plan)


@contextmanager
def _without_stacks() -> Iterator[None]:
    """Tracing records the source line of each operation: a third of its time, and nobody reads it."""
    before = getattr(fx_config, _STACKS, None)
    if before is not None:
        setattr(fx_config, _STACKS, True)
    try:
        yield
    finally:
        if before is not None:
            setattr(fx_config, _STACKS, before)


def _dim(axis: str, multiple: int) -> Dim:
    if axis == "batch":
        return Dim(axis, min=1, max=_MAX_BATCH)
    unit = Dim(f"{axis}_units", min=1, max=_MAX_UNITS)
    return unit if multiple == 1 else multiple * unit


def _trace_inputs(plan: Trace) -> dict[str, Tensor]:
    """Inputs whose sizes differ from each other and from 1, so that tracing confuses no two axes."""
    sizes = {"batch": 2}
    for port in plan.inputs:
        for axis in port.open_axes:
            sizes.setdefault(axis, plan.multiples.get(axis, 1) * (2 + len(sizes)))
    shapes = {p.name: [sizes[a] if isinstance(a, str) else a for a in p.shape] for p in plan.inputs}
    # Integers are token ids, and every vocabulary has a token 1.
    fills = {"float32": 0.5, "int64": 1}
    return {
        port.name: torch.full(shapes[port.name], fills[port.dtype], dtype=getattr(torch, port.dtype))
        for port in plan.inputs
    }


def _tidy(model: ir.Model, plan: Trace) -> ir.Model:
    """Give open axes their plain names, drop what only a debugger reads."""
    for value, port in zip(
        [*model.graph.inputs, *model.graph.outputs], [*plan.inputs, *plan.outputs], strict=True
    ):
        value.shape = ir.Shape(port.shape)
    ends = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            if id(value) not in ends:
                value.shape = value.type = None
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    return model


@dataclass(frozen=True, eq=False)
class Graph:
    """One graph to be written: what to trace, and what rebuilds the module in torch."""

    name: str
    plan: Trace
    state: Mapping[str, Tensor]
    class_name: str
    config: dict[str, Any]
    # The graph whose weights file holds them, and how names there become the module's:
    # {"patchify.": "encoder."}.
    weights_of: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> str:
        """Name of the weights file."""
        return f"{self.weights_of or self.name}.safetensors"

    def entry(self) -> dict[str, Any]:
        """As the manifest lists it."""
        return {
            "file": f"{self.name}.onnx",
            "weights": self.weights,
            "renamed": dict(self.renamed),
            "class": self.class_name,
            "config": self.config,
            "inputs": [port.entry() for port in self.plan.inputs],
            "outputs": [port.entry() for port in self.plan.outputs],
        }


@dataclass(frozen=True, eq=False)
class Example:
    """Seeded inputs of one graph and torch's fp32 outputs."""

    inputs: Arrays
    outputs: Arrays


def style_graph(style: Style) -> Graph:
    """style_image -> style_tokens (and text_embeds)."""
    outputs = [Port("style_tokens", ("batch", style.tokens, style.dim), "style tokens, projected")]
    if style.text_dim is not None:
        outputs.append(
            Port("text_embeds", ("batch", style.text_dim), "pooled style; stands for the pooled text")
        )
    shape = ("batch", 3, style.image_px, style.image_px)
    plan = Trace(style.module, (Port("style_image", shape, "RGB in [-1, 1]"),), tuple(outputs))
    return Graph("style_encoder", plan, style.state_dict(), style.class_name, style.config)


def vae_graphs(source: Source, vae: Network, dtype: torch.dtype, style: Style) -> list[Graph]:
    """vae_encoder and vae_decoder of a VAE whose weights are of ``dtype``."""
    scale = source.vae_scale
    image, z = _image("RGB in [-1, 1]"), _latents("latents", source, "clean latents, scaled for the UNet")
    encoder = Trace(VaeEncoder(vae, dtype), (image,), (z,), {"height": scale, "width": scale})
    decoder = Trace(VaeDecoder(vae, dtype), (z,), (_image("RGB, about [-1, 1], not clamped"),))
    halves = (
        ("vae_encoder", encoder, ("encoder.", "quant_conv.")),
        ("vae_decoder", decoder, ("decoder.", "post_quant")),
    )
    state, config = vae.state_dict(), plain_config(vae)
    first, second = (
        Graph(
            name, plan, {k: v for k, v in state.items() if k.startswith(prefixes)}, type(vae).__name__, config
        )
        for name, plan, prefixes in halves
    )
    return [_shared(first, style), second]


def _shared(encoder: Graph, style: Style) -> Graph:
    """The VAE encoder, out of the style encoder's weights file if that holds a copy of it (std-tiny)."""
    ours, theirs = "encoder.", "patchify."
    held = style.state_dict()
    copies = {key: theirs + key.removeprefix(ours) for key in encoder.state if key.startswith(ours)}
    same = len(copies) == len(encoder.state) and all(
        copy in held and torch.equal(encoder.state[key], held[copy]) for key, copy in copies.items()
    )
    if not same:
        return encoder
    return replace(encoder, state=held, weights_of="style_encoder", renamed={theirs: ours})


def unet_graph(source: Source, unet: Network, dtype: torch.dtype, style: Style, tokens: int | str) -> Graph:
    """The UNet, prepared by `prepare_attention` and with weights of ``dtype``.

    ``tokens`` is the number of text tokens, or the name of that axis if prompts may have any length. With a
    motion adapter the latents are those of one window, and the rest, which they share, has a batch of 1.
    """
    context, pooled = source.text_dims
    window = source.options.window
    batch: int | str = "batch" if window is None else 1
    rows: int | str = "batch" if window is None else window[0]
    inputs = (
        _latents("sample", source, "noisy latents x_t", rows),
        Port("timestep", (batch,), "t in 0..999"),
        Port("encoder_hidden_states", (batch, tokens, context), "text tokens"),
        Port("text_embeds", (batch, pooled), "pooled text (or style)"),
        Port("time_ids", (batch, 6), "H, W, crop top, crop left, target H, target W in px"),
        Port("style_tokens", (batch, style.tokens, style.dim), "style tokens, projected"),
        Port("style_strength", (batch,), "factor of the style's attention, 1 as trained"),
        *_seen(source, rows),
    )
    output = _latents("noise_pred", source, f"network output ({source.schedule.prediction_type})", rows)
    multiple = source.latent_multiple
    module = (UNet if window is None else MotionUNet)(unet, dtype, source.content_affine)
    multiples = {"latent_height": multiple, "latent_width": multiple}
    opset = OPSET_OF_ATTENTION if dtype == torch.float16 else OPSET  # see `prepare_attention`
    plan = Trace(module, inputs, (output,), multiples, opset)
    return Graph("unet", plan, unet.state_dict(), type(unet).__name__, plain_config(unet))


def _seen(source: Source, rows: int | str) -> tuple[Port, ...]:
    """The inputs beside the noisy latents."""
    mask = Port(
        "mask", ("batch", 1, "latent_height", "latent_width"), "1 where to paint, 0 where the frame is kept"
    )
    known = {
        "content_latents": _latents(
            "content_latents", source, "clean latents of the frame, as from vae_encoder", rows
        ),
        "mask": mask,
        "masked_latents": _latents("masked_latents", source, "those of the frame, grey where to paint"),
    }
    return tuple(known[name] for name in source.unet_inputs)


def _image(meaning: str) -> Port:
    return Port("image", ("batch", 3, "height", "width"), meaning)


def _latents(name: str, source: Source, meaning: str, rows: int | str = "batch") -> Port:
    return Port(name, (rows, source.unet.config.out_channels, "latent_height", "latent_width"), meaning)


class ReferenceRun:
    """One seeded picture and style through the source's own modules, in fp32.

    Call the methods in the order below; each returns the inputs that its graph will get, and torch's outputs
    for them. ``size`` is (H, W) in px, ``strength`` the factor of the style's attention.
    """

    def __init__(self, size: tuple[int, int], strength: float) -> None:
        self.size, self.strength = size, strength
        self._rng = torch.Generator().manual_seed(0)

    def style(self, style: Style) -> Example:
        """A style picture through the style encoder."""
        picture = _picture((style.image_px,) * 2, self._rng)
        result = style.module(picture)
        self._tokens, self._pooled = result if isinstance(result, tuple) else (result, None)
        outputs = {"style_tokens": self._tokens}
        if self._pooled is not None:
            outputs["text_embeds"] = self._pooled
        return _example({"style_image": picture}, outputs)

    def vae(self, vae: Network) -> tuple[Example, Example]:
        """A picture to latents and back."""
        image = _picture(self.size, self._rng)
        self._z = VaeEncoder(vae)(image)
        decoded = VaeDecoder(vae)(self._z)
        return _example({"image": image}, {"latents": self._z}), _example(
            {"latents": self._z}, {"image": decoded}
        )

    def unet(self, unet: Network, source: Source, timestep: int, text: Arrays) -> Example:
        """The noisy latents through the UNet with diffusers' own IP-Adapter processors attached."""
        alpha, sigma = source.schedule.alpha_sigma(timestep)
        window = source.options.window
        z = self._z if window is None else _moving(self._z, window[0])
        pooled = torch.from_numpy(text["text_embeds"]) if self._pooled is None else self._pooled
        inputs = {
            "sample": alpha * z + sigma * torch.randn(z.shape, generator=self._rng),
            "timestep": torch.full((1,), float(timestep)),
            "encoder_hidden_states": torch.from_numpy(text["encoder_hidden_states"]),
            "text_embeds": pooled,
            "time_ids": torch.tensor([[*self.size, 0, 0, *self.size]], dtype=torch.float32),
            "style_tokens": self._tokens,
            "style_strength": torch.full((1,), self.strength),
        }
        seen = self._seen(source, z)
        for processor in unet.attn_processors.values():
            if getattr(processor, "scale", [0.0]) != [0.0]:
                processor.scale = [self.strength]
        added = {key: inputs[key] for key in ("text_embeds", "time_ids")}
        sample, context = torch.cat([inputs["sample"], *seen.values()], 1), inputs["encoder_hidden_states"]
        if window is not None:  # diffusers has frames on an axis of their own, and text repeated for each
            sample, context = sample.transpose(0, 1)[None], context.repeat_interleave(window[0], 0)
        output = unet(
            sample,
            inputs["timestep"],
            context,
            added_cond_kwargs={**added, "image_embeds": [inputs["style_tokens"]]},
            return_dict=False,
        )[0]
        output = output if window is None else output[0].transpose(0, 1)
        if "content_latents" in seen:
            seen["content_latents"] = z
        return _example(inputs | seen, {"noise_pred": output})

    def _seen(self, source: Source, z: Tensor) -> dict[str, Tensor]:
        """What stands beside the noisy latents, as the network itself takes it, in its order."""
        if source.unet_inputs == CONTENT:
            shift, scale = source.content_affine
            return {"content_latents": z / scale + shift}
        if source.unet_inputs == INPAINTING:
            mask = (torch.rand(self._z[:, :1].shape, generator=self._rng) > 0.5).float()
            return {"mask": mask, "masked_latents": (1 - mask) * self._z}
        return {}


def _moving(z: Tensor, frames: int) -> Tensor:
    """Latents [1, C, h, w] of a picture, shifted by a cell a frame: [T, C, h, w]."""
    return torch.cat([z.roll(i, -1) for i in range(frames)])


def _picture(size: tuple[int, int], rng: torch.Generator) -> Tensor:
    """A picture with large and small structure, ``[1, 3, H, W]`` in [-1, 1].

    In steps of 1/16: bundles carry the style picture, and so it compresses to a quarter.
    """
    coarse = torch.randn(1, 3, 6, 6, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    picture = (0.5 * smooth + 0.1 * torch.randn(1, 3, *size, generator=rng)).clamp(-1, 1)
    return (picture * 16).round() / 16


def _example(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Example:
    return Example({k: v.numpy() for k, v in inputs.items()}, {k: v.numpy() for k, v in outputs.items()})
