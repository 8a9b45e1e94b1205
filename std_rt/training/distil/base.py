"""The base (teacher) of a distillation: a UNet with its autoencoder and encoders, all frozen.

Two kinds of folders come in: SDXL in diffusers' layout (conditioned on text) and std-tiny's (conditioned
on a style picture). The rest of the training code treats both alike.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from std_rt.core.base_model import licence, unet_digest
from std_rt.core.errors import RecipeError
from std_rt.core.schedule import NoiseSchedule
from std_rt.models.style_encoder import StyleEncoder
from std_rt.training.tiny.tiny_pipeline import load_tiny

__all__ = [
    "Base",
    "Conditioning",
    "Fresh",
    "Rows",
    "TextEncoders",
    "cat",
    "check_source",
    "load_base",
    "read_json",
]

# diffusers' modules carry no types.
Network = Any


class Rows:
    """Base of frozen dataclasses of tensors, one row per sample; a field may be None or nested rows."""

    def map(self, of: Callable[[Tensor], Tensor]) -> Self:
        """``of`` applied to each tensor."""

        def mapped(value: Any) -> Any:
            return value.map(of) if isinstance(value, Rows) else None if value is None else of(value)

        return type(self)(**{name: mapped(value) for name, value in vars(self).items()})

    def rows(self, index: Any) -> Self:
        """The rows of a slice or a LongTensor."""
        return self.map(lambda x: x[index])


R = TypeVar("R", bound=Rows)


def cat(parts: Sequence[R]) -> R:
    """Rows of several, in order; a field is None in all or in none."""

    def joined(values: list[Any]) -> Any:
        if values[0] is None:
            return None
        return cat(values) if isinstance(values[0], Rows) else torch.cat(values)

    return type(parts[0])(**{name: joined([getattr(p, name) for p in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class Conditioning(Rows):
    """The UNet's inputs besides x and t, one row per sample."""

    context: Tensor  # [B, L, D] text tokens; std-tiny: one zero token
    pooled: Tensor  # [B, P]
    time_ids: Tensor  # [B, 6] original H, W, crop top, left, target H, W
    tokens: Tensor | None = None  # [B, T, D] style tokens, None if the base takes none
    content: Tensor | None = None  # [B, C, h, w] clean content latents, for a UNet that sees them

    def __len__(self) -> int:
        return len(self.context)

    def masked(self, keep: Tensor) -> Conditioning:
        """Rows where ``keep [B]`` is 0 become the unconditional branch: zeros, as SDXL's pipelines do.

        Sizes stay, and so does the content: guidance is on the style alone. Tokens are std-tiny's, whose "no
        style" is zeros in the export too. IP-Adapters, whose "no style" is projected in diffusers, take no
        part in a distillation.
        """
        k = keep.to(self.context)
        zeroed = self.map(lambda x: x * k.view(-1, *[1] * (x.ndim - 1)))
        return replace(zeroed, time_ids=self.time_ids, content=self.content)

    def null(self) -> Conditioning:
        """The unconditional branch of every row."""
        return self.masked(torch.zeros(len(self)))

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Conditioning:
        return self.map(lambda x: x.to(device=device, dtype=dtype))


@dataclass(frozen=True)
class Fresh:
    """New samples, on the CPU; the three are one picture unless the base is std-tiny."""

    z: Tensor  # [n, C, h, w] where trajectories end, as far as that is known
    c: Tensor  # [n, C, h, w] the content that they start from
    real: Tensor  # [n, C, h, w] real pictures for the discriminator
    cond: Conditioning  # n rows
    names: list[str] = field(default_factory=list)  # of the files


class TextEncoders:
    """SDXL's two text encoders, through the pipeline's own ``encode_prompt``."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> ``(context [B, L, D], pooled [B, P])``; an empty caption is encoded, not zeroed."""
        context, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(captions),
            device=self.pipeline.text_encoder_2.device,  # the first may be missing, as in SDXL's refiner
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return context, pooled


@dataclass
class Base:
    """The teacher and its surroundings; every module is frozen and in eval mode."""

    unet: Network
    vae: Network
    schedule: NoiseSchedule
    name: str
    digest: str  # std_rt.core.base_model.unet_digest: tells architectures apart
    style_encoder: StyleEncoder | None = None
    style_px: int = 0
    text: TextEncoders | None = None
    licence: str = ""  # as its README.md says in the front matter; empty if nothing does

    def to(self, device: torch.device | str) -> None:
        """Move every network."""
        for part in (self.unet, self.vae, self.style_encoder):
            if part is not None:
                part.to(device)
        if self.text is not None:
            self.text.pipeline.to(device)

    def checkpoint(self) -> None:
        """Gradient checkpointing in the UNet and, where it has that, in the decoder."""
        self.unet.enable_gradient_checkpointing()
        if self.vae._supports_gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()

    @property
    def sees_content(self) -> bool:
        """Whether the UNet takes the clean content latents beside the noisy ones."""
        return bool(self.unet.config.in_channels > self.unet.config.out_channels)

    @property
    def vae_scale(self) -> int:
        """Image pixels per latent pixel."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def multiple(self) -> int:
        """Image sides must divide by this, or skip connections would not meet."""
        return int(self.vae_scale * 2 ** (len(self.unet.config.block_out_channels) - 1))

    def predict(self, unet: Any, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Raw output ``[B, C, h, w]`` of ``unet`` (this base's, or the same one wrapped), fp32."""
        added: dict[str, Any] = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        if cond.tokens is not None:
            added["image_embeds"] = [cond.tokens[:, None]]
        if cond.content is not None:
            x = torch.cat([x, cond.content], 1)
        dtype = next(self.unet.parameters()).dtype
        out = unet(x.to(dtype), t, cond.context.to(dtype), added_cond_kwargs=added, return_dict=False)[0]
        return cast(Tensor, out.float())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1] -> scaled latents, fp32."""
        encoded = self.vae.encode(images.to(next(self.vae.parameters())))
        # A KL autoencoder's mode: the same picture gives the same latents, which caching relies on.
        z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return cast(Tensor, (z.float() - self._shift) * self.vae.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images ``[B, 3, H, W]``, not clamped; gradients flow."""
        z = latents / self.vae.config.scaling_factor + self._shift
        return cast(Tensor, self.vae.decode(z.to(next(self.vae.parameters()))).sample.float())

    @property
    def _shift(self) -> float:
        return float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def condition(self, captions: Sequence[str], styles: Tensor | None, time_ids: Tensor) -> Conditioning:
        """Conditioning from captions, style pictures ``[B, 3, S, S]`` in [-1, 1] and sizes."""
        if self.style_encoder is not None:
            assert styles is not None, "this base is conditioned on a style picture"
            tokens, pooled = self.style_encoder(styles)
            return self.styled(tokens, pooled, time_ids)
        assert self.text is not None, "this base has neither text encoders nor a style encoder"
        context, pooled = self.text(captions)
        return Conditioning(context.float(), pooled.float(), time_ids.float())

    def styled(self, tokens: Tensor, pooled: Tensor, time_ids: Tensor) -> Conditioning:
        """Conditioning of a base without text, from what its style encoder gives."""
        null = tokens.new_zeros(len(tokens), 1, self.unet.config.cross_attention_dim)
        return Conditioning(null, pooled, time_ids.float(), tokens)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table; RecipeError if it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None


def _is_tiny(folder: Path) -> bool:
    encoder = folder / "image_encoder" / "config.json"
    return encoder.is_file() and read_json(encoder).get("_class_name") == "StyleEncoder"


def _digest(unet: nn.Module) -> str:
    return unet_digest({name: tuple(value.shape) for name, value in unet.state_dict().items()})


def _tiny(folder: Path) -> Base:
    p = load_tiny(folder)
    style = p.style_encoder
    return Base(p.unet, p.vae, p.schedule, folder.resolve().name, "", style, int(style.config.image_px))


def _sdxl(source: str, dtype: torch.dtype, device: torch.device | str) -> Base:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    text = torch.float32 if dtype == torch.float32 else torch.float16
    with warnings.catch_warnings():
        # diffusers 0.35 has no other name for it.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        unet: Network = UNet2DConditionModel.from_pretrained(source, subfolder="unet", torch_dtype=dtype)
        p = StableDiffusionXLPipeline.from_pretrained(
            source,
            unet=unet.to(device),  # before the others are read
            # The picture encoder and the adapter belong to inference; the published recipe trains on text.
            image_encoder=None,
            feature_extractor=None,
            torch_dtype={"vae": torch.float32, "default": text},
        )
    if p.text_encoder_2 is None:
        raise RecipeError(f"base = {source!r} has neither text encoders nor std-tiny's style encoder")
    for part in (p.vae, p.text_encoder, p.text_encoder_2):
        if part is not None:
            part.requires_grad_(False).eval()
    schedule = NoiseSchedule.from_config(dict(p.scheduler.config))
    return Base(p.unet, p.vae, schedule, Path(source).name, "", text=TextEncoders(p))


def check_source(source: str | Path) -> Path:
    """The folder of a base, or its hub id as a path; RecipeError if it can be neither."""
    folder = Path(source)
    if not folder.exists() and len(folder.parts) != 2:  # a hub id has two parts
        raise RecipeError(
            f"base = {str(source)!r} does not exist; train that stage first, or get the built-in model's "
            f"weights: std-rt bundles unpack -o {source}"
        )
    return folder


def load_base(
    source: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Base:
    """A folder in SDXL's layout (or a hub id), or one of std-tiny; frozen, on ``device``.

    The UNet is in ``dtype``; with a half type, SDXL's text encoders are in fp16. All else is in fp32.
    Raises RecipeError if it is missing or another kind of pipeline.
    """
    folder = check_source(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise RecipeError(f"base = {str(source)!r} is not a diffusers folder (it has no model_index.json)")
    try:
        base = _tiny(folder) if _is_tiny(folder) else _sdxl(str(source), dtype, device)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"base = {str(source)!r} cannot be loaded ({reason}); give a pipeline folder"
        ) from None
    if base.unet.config.addition_embed_type != "text_time":
        raise RecipeError(f"base = {str(source)!r} is not an SDXL UNet (it has no text_time embedding)")
    taken, given = base.unet.config.in_channels, base.unet.config.out_channels
    if taken != given and not (taken == 2 * given and base.style_encoder is not None):
        raise RecipeError(
            f"base = {str(source)!r} has a UNet that takes {taken} channels for {given} latents; "
            "distillation trains those that see the noisy latents only"
        )
    base.digest, base.licence = _digest(base.unet), licence(folder)
    for part in (base.unet, base.vae, base.style_encoder):
        if part is not None:
            part.requires_grad_(False).eval()
    if base.unet.dtype != dtype:
        base.unet.to(dtype)
    base.to(device)
    return base
