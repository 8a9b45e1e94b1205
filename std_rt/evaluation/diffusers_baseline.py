"""The baseline of `std-rt bench --against`: the same bundle through diffusers. Needs the extra [export].

diffusers' own UNet with its IP-Adapter attention, and the VAE, rebuilt from the bundle's weights: one frame,
the trajectory of the bundle; eager, in fp32 or bf16 autocast (on a GPU: with weights in fp16), or compiled by
plain ``torch.compile``.
Guidance is always full, at batch 2: diffusers has no other. The loop around them is `denoise`, shorter than
that of a diffusers pipeline, which favours diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from std_rt.core.arrays import Frame
from std_rt.core.bundle import CONTENT, INPAINTING, Bundle
from std_rt.core.errors import UsageError
from std_rt.engines.glue import GLUE
from std_rt.export.modules import VaeDecoder, VaeEncoder, affine_inverse, latent_affine
from std_rt.export.restore import load_torch_components
from std_rt.pipeline.conditioning import (
    StyleEncoder,
    choose_guidance,
    conditioning_for,
    unet_inputs,
)
from std_rt.pipeline.denoise import denoise, noise_draws
from std_rt.pipeline.stylizer import draw_noise

__all__ = ["DiffusersLoop"]


class DiffusersLoop:
    """A `Stylizer` in torch, at one working size (H, W) and style strength 1."""

    def __init__(
        self,
        bundle: Bundle,
        steps: int,
        size: tuple[int, int],
        guidance: float | None = None,
        *,
        precision: str = "fp32",
        compiled: bool = False,
        device: str = "cpu",
    ) -> None:
        """``guidance`` is diffusers' scale (None: the bundle's own; 1: none).

        ``precision`` is fp32, bf16 (autocast) or fp16: UNet and VAE in fp16, but a VAE that overflows in it
        (``force_upcast``) in fp32, as in diffusers. Raises UsageError if ``device`` is cuda and torch finds
        none.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                f"diffusers beside a GPU backend needs torch on the GPU, and torch {torch.__version__} finds "
                "none; install a torch with CUDA (pytorch.org), or compare on the CPU: --backend cpu"
            )
        self._bundle, self._size, self._autocast = bundle, size, precision == "bf16"
        self._scale = choose_guidance(bundle, guidance).scale
        parts = load_torch_components(bundle)
        self._device, half = torch.device(device), torch.float16 if precision == "fp16" else torch.float32
        upcast = bool(getattr(parts["vae"].config, "force_upcast", False))
        self._dtype, vae_dtype = half, torch.float32 if upcast else half
        parts["unet"].to(self._device, self._dtype)
        parts["vae"].to(self._device, vae_dtype)
        self._style_encoder = parts["style_encoder"]
        networks: list[Any] = [
            parts["unet"],
            *(kind(parts["vae"], vae_dtype) for kind in (VaeEncoder, VaeDecoder)),
        ]
        if compiled:
            networks = [torch.compile(network) for network in networks]
        self._unet, self._encode, self._decode = networks
        self._coefficients = bundle.coefficients(steps)
        self._image = np.empty((1, 3, *size), np.float32)
        latent_size = (size[0] // bundle.vae_scale, size[1] // bundle.vae_scale)
        shape = (noise_draws(self._coefficients), bundle.latent_channels, *latent_size)
        self._noise = torch.from_numpy(draw_noise(0, shape)).to(self._device).split(1)
        self._timesteps = {c.timestep: self._on_device(c.timestep) for c in self._coefficients}
        self._content_affine = latent_affine(parts["vae"])
        self._text: dict[str, Any] = {}
        self._beside: list[Any] = []

    @torch.inference_mode()
    def set_style(self, frame: Frame) -> None:
        """Encode the style picture, uint8 [H, W, 3]."""
        style = StyleEncoder(self._run_style_encoder, self._bundle.style_px)(frame)
        text = self._bundle.conditioning()
        mode = "none" if self._scale == 1 else "full"
        inputs = conditioning_for(mode, text, unet_inputs(text, style, 1.0, self._size))
        sides = [side for side in (inputs.negative, inputs.positive) if side]
        given = {
            n: torch.cat([torch.from_numpy(side[n]) for side in sides]).to(self._device, self._dtype)
            for n in inputs.positive
        }
        self._text = {
            "encoder_hidden_states": given["encoder_hidden_states"],
            "added_cond_kwargs": {
                "text_embeds": given["text_embeds"],
                "time_ids": given["time_ids"],
                "image_embeds": [given["style_tokens"]],
            },
        }

    @torch.inference_mode()
    def step(self, frame: Frame, *, mark: Callable[[str], None] = lambda stage: None) -> Frame:
        """Stylize a frame uint8 [H, W, 3] of the working size; ``mark(stage)`` follows each stage.

        The work of a stage is done by then: a GPU is waited for.
        """

        def done(stage: str) -> None:
            self._wait()
            mark(stage)

        def predict(x: Any, timestep: int, negative: bool) -> Any:
            done("scheduler")
            output = self._predict(x, timestep)
            done("unet")
            return output

        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            GLUE["frame_in"].run(frame=frame[None], image=self._image)
            image = torch.from_numpy(self._image).to(self._device)
            done("convert")
            z = self._encode(image)
            self._beside = self._seen(z)
            done("vae_encoder")
            kind = self._bundle.prediction_type
            z = denoise(z, predict, noise=self._noise, steps=self._coefficients, prediction_type=kind)
            done("scheduler")
            image = self._decode(z)
            done("vae_decoder")
        styled = np.empty_like(frame[None])
        GLUE["frame_out"].run(image=image.cpu().numpy(), frame=styled)
        done("convert")
        return styled[0]

    def _seen(self, z: Any) -> list[Any]:
        """What the UNet sees of the frame beside its noisy latents; all of it is painted."""
        if self._bundle.unet_inputs == CONTENT:
            return [affine_inverse(z, *self._content_affine)]
        if self._bundle.unet_inputs == INPAINTING:
            grey = torch.zeros(1, 3, *self._size, device=self._device)
            return [torch.ones_like(z[:, :1]), self._encode(grey)]
        return []

    def _predict(self, x: Any, timestep: int) -> Any:
        """The guided output: both branches in one call, as diffusers does."""
        x = torch.cat([x, *self._beside], 1).to(self._dtype)
        t = self._timesteps[timestep]  # for an int, torch.compile would recompile at every value
        if self._scale == 1:
            return self._unet(x, t, **self._text, return_dict=False)[0].float()
        both = self._unet(torch.cat([x, x]), t, **self._text, return_dict=False)[0].float()
        negative, positive = both.chunk(2)
        return negative + self._scale * (positive - negative)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _on_device(self, timestep: int) -> Tensor:
        return torch.tensor(timestep, device=self._device)

    def _run_style_encoder(self, style_image: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        found: Tensor | tuple[Tensor, ...] = self._style_encoder(torch.from_numpy(style_image))
        outputs = (found,) if isinstance(found, Tensor) else found
        named = zip(("style_tokens", "text_embeds"), outputs, strict=False)
        return {name: value.numpy() for name, value in named}
