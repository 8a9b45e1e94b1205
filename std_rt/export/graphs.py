"""The four graphs of a bundle: their ports, what is traced, and torch's answers to seeded inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from std_rt.export.components import Network, plain_config
from std_rt.export.ip_adapter import attach_diffusers, detach_diffusers
from std_rt.export.modules import UNet, VaeDecoder, VaeEncoder, prepare_attention
from std_rt.export.onnx_graph import Port, Trace
from std_rt.export.pipeline import Pipeline

__all__ = ["Example", "Graph", "make_examples", "make_graphs"]

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Graph:
    """One graph to be written: what to trace, and what rebuilds the module in torch."""

    name: str
    plan: Trace
    state: Mapping[str, Tensor]
    class_name: str
    config: dict[str, Any]
    # Where the weights lie, and how the names there become the module's: {"patchify.": "encoder."}.
    weights_of: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> str:
        """Name of the weights file."""
        return f"{self.weights_of or self.name}.safetensors"


@dataclass(frozen=True, eq=False)
class Example:
    """Seeded inputs of one graph and torch's fp32 outputs."""

    inputs: Arrays
    outputs: Arrays


def make_graphs(pipeline: Pipeline) -> list[Graph]:
    """The plans of all graphs. Replaces the UNet's attention processors: make the examples first."""
    detach_diffusers(pipeline.unet)
    prepare_attention(pipeline.unet, pipeline.branches)
    style = _style_graph(pipeline)
    encoder, decoder = _vae_graphs(pipeline)
    return [style, _shared(encoder, style), decoder, _unet_graph(pipeline)]


def _shared(encoder: Graph, style: Graph) -> Graph:
    """The VAE encoder, out of the style encoder's weights file where that holds a copy of it (std-tiny)."""
    ours, theirs = "encoder.", "patchify."
    copies = {key: theirs + key.removeprefix(ours) for key in encoder.state if key.startswith(ours)}
    held = len(copies) == len(encoder.state) and all(
        copy in style.state and torch.equal(encoder.state[key], style.state[copy])
        for key, copy in copies.items()
    )
    if not held:
        return encoder
    return replace(encoder, state=style.state, weights_of=style.name, renamed={theirs: ours})


def _image(name: str, meaning: str) -> Port:
    return Port(name, ("batch", 3, "height", "width"), meaning)


def _latents(name: str, pipeline: Pipeline, meaning: str) -> Port:
    return Port(name, ("batch", pipeline.unet.config.in_channels, "latent_height", "latent_width"), meaning)


def _style_graph(pipeline: Pipeline) -> Graph:
    style = pipeline.style
    outputs = [Port("style_tokens", ("batch", style.tokens, style.dim), "style tokens, projected")]
    if style.text_dim is not None:
        outputs.append(
            Port("text_embeds", ("batch", style.text_dim), "pooled style; stands for the pooled text")
        )
    shape = ("batch", 3, style.image_px, style.image_px)
    plan = Trace(style.module, (Port("style_image", shape, "RGB in [-1, 1]"),), tuple(outputs))
    return Graph("style_encoder", plan, style.state_dict(), style.class_name, style.config)


def _vae_graphs(pipeline: Pipeline) -> list[Graph]:
    vae, scale = pipeline.vae, pipeline.vae_scale
    image = _image("image", "RGB in [-1, 1]")
    z = _latents("latents", pipeline, "clean latents, scaled for the UNet")
    encoder = Trace(VaeEncoder(vae), (image,), (z,), {"height": scale, "width": scale})
    decoder = Trace(VaeDecoder(vae), (z,), (_image("image", "RGB, about [-1, 1], not clamped"),))
    state, config = vae.state_dict(), plain_config(vae)
    halves = (
        ("vae_encoder", encoder, ("encoder.", "quant_conv.")),
        ("vae_decoder", decoder, ("decoder.", "post_quant")),
    )
    return [
        Graph(
            name, plan, {k: v for k, v in state.items() if k.startswith(prefixes)}, type(vae).__name__, config
        )
        for name, plan, prefixes in halves
    ]


def _unet_graph(pipeline: Pipeline) -> Graph:
    unet, style = pipeline.unet, pipeline.style
    context, pooled = pipeline.text_dims
    tokens = pipeline.text["encoder_hidden_states"].shape[1]
    inputs = (
        _latents("sample", pipeline, "noisy latents x_t"),
        Port("timestep", ("batch",), "t in 0..999"),
        Port("encoder_hidden_states", ("batch", tokens, context), "text tokens"),
        Port("text_embeds", ("batch", pooled), "pooled text (or style)"),
        Port("time_ids", ("batch", 6), "H, W, crop top, crop left, target H, target W in px"),
        Port("style_tokens", ("batch", style.tokens, style.dim), "style tokens, projected"),
        Port("style_strength", ("batch",), "factor of the style's attention, 1 as trained"),
    )
    output = _latents("noise_pred", pipeline, f"network output ({pipeline.schedule.prediction_type})")
    multiple = pipeline.latent_multiple
    plan = Trace(UNet(unet), inputs, (output,), {"latent_height": multiple, "latent_width": multiple})
    return Graph("unet", plan, unet.state_dict(), type(unet).__name__, plain_config(unet))


def make_examples(
    pipeline: Pipeline, size: tuple[int, int], timestep: int, strength: float
) -> dict[str, Example]:
    """Run the source's own modules (diffusers' processors, not ours) once through, at ``size`` px.

    Inputs are what the graphs will see: a picture, its latents, their noisy version, its style.
    """
    rng = torch.Generator().manual_seed(0)
    attach_diffusers(pipeline.unet, pipeline.branches, pipeline.style.tokens)
    for processor in pipeline.unet.attn_processors.values():
        if getattr(processor, "scale", [0.0]) != [0.0]:
            processor.scale = [strength]
    with torch.no_grad():
        return _run(pipeline, size, timestep, strength, rng)


def _run(
    pipeline: Pipeline, size: tuple[int, int], timestep: int, strength: float, rng: torch.Generator
) -> dict[str, Example]:
    style_image = _picture((pipeline.style.image_px,) * 2, rng)
    tokens, pooled = _split(pipeline.style.module(style_image))
    image = _picture(size, rng)
    z = VaeEncoder(pipeline.vae)(image)
    alpha, sigma = pipeline.schedule.alpha_sigma(timestep)
    text = {key: torch.from_numpy(value) for key, value in pipeline.text.items()}
    inputs = {
        "sample": alpha * z + sigma * torch.randn(z.shape, generator=rng),
        "timestep": torch.full((1,), float(timestep)),
        "encoder_hidden_states": text["encoder_hidden_states"],
        "text_embeds": text["text_embeds"] if pooled is None else pooled,
        "time_ids": torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32),
        "style_tokens": tokens,
        "style_strength": torch.full((1,), strength),
    }
    noise_pred = _diffusers_unet(pipeline.unet, inputs)
    styled = {"style_tokens": tokens} | ({} if pooled is None else {"text_embeds": pooled})
    return {
        "style_encoder": _example({"style_image": style_image}, styled),
        "vae_encoder": _example({"image": image}, {"latents": z}),
        "unet": _example(inputs, {"noise_pred": noise_pred}),
        "vae_decoder": _example({"latents": z}, {"image": VaeDecoder(pipeline.vae)(z)}),
    }


def _diffusers_unet(unet: Network, inputs: Mapping[str, Tensor]) -> Tensor:
    added = {key: inputs[key] for key in ("text_embeds", "time_ids")}
    call: Callable[..., Any] = unet
    output: Tensor = call(
        inputs["sample"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        added_cond_kwargs={**added, "image_embeds": [inputs["style_tokens"]]},
        return_dict=False,
    )[0]
    return output


def _split(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    return result if isinstance(result, tuple) else (result, None)


def _picture(size: tuple[int, int], rng: torch.Generator) -> Tensor:
    """A picture with large and small structure, ``[1, 3, H, W]`` in [-1, 1]."""
    coarse = torch.randn(1, 3, 6, 6, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    return (0.5 * smooth + 0.1 * torch.randn(1, 3, *size, generator=rng)).clamp(-1, 1)


def _example(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Example:
    return Example({k: v.numpy() for k, v in inputs.items()}, {k: v.numpy() for k, v in outputs.items()})
