"""The graphs of a bundle: their ports, what is traced, and torch's answers to seeded inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from std_rt.core.schedule import NoiseSchedule
from std_rt.export.components import Network, plain_config
from std_rt.export.modules import UNet, VaeDecoder, VaeEncoder
from std_rt.export.onnx_graph import Port, Trace
from std_rt.export.pipeline import Source, Style

__all__ = ["Example", "Graph", "Walk", "style_graph", "unet_graph", "vae_graphs"]

Arrays = dict[str, NDArray[Any]]
_CLEAN = "clean latents, scaled for the UNet"


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
    image, z = _image("image", "RGB in [-1, 1]"), _latents("latents", source, _CLEAN)
    encoder = Trace(VaeEncoder(vae, dtype), (image,), (z,), {"height": scale, "width": scale})
    decoder = Trace(VaeDecoder(vae, dtype), (z,), (_image("image", "RGB, about [-1, 1], not clamped"),))
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
    """The VAE encoder, out of the style encoder's weights file where that holds a copy of it (std-tiny)."""
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

    ``tokens`` is the number of text tokens, or the name of that axis where prompts may have any length.
    """
    context, pooled = source.text_dims
    inputs = (
        _latents("sample", source, "noisy latents x_t"),
        Port("timestep", ("batch",), "t in 0..999"),
        Port("encoder_hidden_states", ("batch", tokens, context), "text tokens"),
        Port("text_embeds", ("batch", pooled), "pooled text (or style)"),
        Port("time_ids", ("batch", 6), "H, W, crop top, crop left, target H, target W in px"),
        Port("style_tokens", ("batch", style.tokens, style.dim), "style tokens, projected"),
        Port("style_strength", ("batch",), "factor of the style's attention, 1 as trained"),
    )
    output = _latents("noise_pred", source, f"network output ({source.schedule.prediction_type})")
    multiple = source.latent_multiple
    plan = Trace(UNet(unet, dtype), inputs, (output,), {"latent_height": multiple, "latent_width": multiple})
    return Graph("unet", plan, unet.state_dict(), type(unet).__name__, plain_config(unet))


def _image(name: str, meaning: str) -> Port:
    return Port(name, ("batch", 3, "height", "width"), meaning)


def _latents(name: str, source: Source, meaning: str) -> Port:
    return Port(name, ("batch", source.unet.config.in_channels, "latent_height", "latent_width"), meaning)


class Walk:
    """One seeded picture and style on their way through the source's own modules, in fp32.

    Called part by part, in the order below; each answers with the inputs that its graph will see and
    torch's outputs. ``size`` is (H, W) in px.
    """

    def __init__(self, size: tuple[int, int], strength: float) -> None:
        self.size, self.strength = size, strength
        self._rng = torch.Generator().manual_seed(0)

    def style(self, style: Style) -> Example:
        """A style picture through the style encoder."""
        picture = _picture((style.image_px,) * 2, self._rng)
        self._tokens, self._pooled = _split(style.module(picture))
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

    def unet(self, unet: Network, schedule: NoiseSchedule, timestep: int, text: Arrays) -> Example:
        """The noisy latents through the UNet with diffusers' own IP-Adapter processors attached."""
        alpha, sigma = schedule.alpha_sigma(timestep)
        pooled = torch.from_numpy(text["text_embeds"]) if self._pooled is None else self._pooled
        inputs = {
            "sample": alpha * self._z + sigma * torch.randn(self._z.shape, generator=self._rng),
            "timestep": torch.full((1,), float(timestep)),
            "encoder_hidden_states": torch.from_numpy(text["encoder_hidden_states"]),
            "text_embeds": pooled,
            "time_ids": torch.tensor([[*self.size, 0, 0, *self.size]], dtype=torch.float32),
            "style_tokens": self._tokens,
            "style_strength": torch.full((1,), self.strength),
        }
        for processor in unet.attn_processors.values():
            if getattr(processor, "scale", [0.0]) != [0.0]:
                processor.scale = [self.strength]
        return _example(inputs, {"noise_pred": _diffusers_unet(unet, inputs)})


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
