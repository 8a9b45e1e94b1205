"""A backend made of NumPy for the handmade bundle, at any size and batch."""

from __future__ import annotations

from typing import Any

import numpy as np
from support.fake_engine import FakeEngine, float_ports
from support.handmade import DIM, POOLED, TOKENS

from std_rt.engines import GraphSpec


class Backend:
    """Opens fakes and keeps them, so that a test can see what was opened, called and closed."""

    def __init__(self, unet: Any = None) -> None:
        self.opened: list[tuple[GraphSpec, FakeEngine]] = []
        self._unet = unet or (lambda sample, **_: 0.5 * sample)

    def __call__(self, spec: GraphSpec) -> FakeEngine:
        engine = getattr(self, f"_{spec.name}_engine")(spec)
        self.opened.append((spec, engine))
        return engine

    def engines(self, name: str) -> list[FakeEngine]:
        return [engine for spec, engine in self.opened if spec.name == name]

    def _style_encoder_engine(self, spec: GraphSpec) -> FakeEngine:
        def run(style_image: np.ndarray) -> dict[str, Any]:
            mean = style_image.mean()
            return {
                "style_tokens": np.full((1, TOKENS, DIM), mean),
                "text_embeds": np.full((1, POOLED), mean),
            }

        ports = float_ports(style_tokens=(1, TOKENS, DIM), text_embeds=(1, POOLED))
        return FakeEngine(run, float_ports(**spec.shapes), ports)

    def _vae_encoder_engine(self, spec: GraphSpec) -> FakeEngine:
        b, _, h, w = spec.shapes["image"]
        return FakeEngine(
            lambda image: {"latents": image.reshape(b, 3, h // 8, 8, w // 8, 8).mean((3, 5))},
            float_ports(**spec.shapes),
            float_ports(latents=(b, 3, h // 8, w // 8)),
        )

    def _unet_engine(self, spec: GraphSpec) -> FakeEngine:
        return FakeEngine(
            lambda **inputs: {"noise_pred": self._unet(**inputs)},
            float_ports(**spec.shapes),
            float_ports(noise_pred=spec.shapes["sample"]),
        )

    def _vae_decoder_engine(self, spec: GraphSpec) -> FakeEngine:
        b, _, h, w = spec.shapes["latents"]
        return FakeEngine(
            lambda latents: {"image": latents.repeat(8, 2).repeat(8, 3)},
            float_ports(**spec.shapes),
            float_ports(image=(b, 3, h * 8, w * 8)),
        )
