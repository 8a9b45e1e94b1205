"""The base (teacher) of a distillation: a UNet with its autoencoder and encoders, all frozen.

Two kinds of folders come in: SDXL in diffusers' layout (conditioned on text, and with an IP-Adapter also on
a style picture) and std-tiny's (on a style picture). The rest of the training code treats both alike.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor

from std_rt.core.base_model import licence, unet_digest
from std_rt.core.errors import ExportError, RecipeError, one_line
from std_rt.core.schedule import NoiseSchedule
from std_rt.models.clip_style import ClipStyleEncoder, find_encoder, open_adapter
from std_rt.models.components import TEXT_ROLES, check_part, has_fp16_only, motion_unet
from std_rt.models.ip_adapter import (
    Branches,
    adapter_digest,
    attach_diffusers,
    check_encoder,
    choose_layers,
)
from std_rt.models.style_encoder import StyleEncoder
from std_rt.training.run.recipe import MotionConfig, StyleConfig
from std_rt.training.tiny.tiny_pipeline import load_tiny

__all__ = [
    "Adapter",
    "Base",
    "Conditioning",
    "Fresh",
    "Motion",
    "Rows",
    "StyleCode",
    "TextEncoders",
    "cat",
    "check_source",
    "load_base",
    "open_style",
    "read_json",
    "style_adapter",
    "style_encoder_folder",
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

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Conditioning:
        return self.map(lambda x: x.to(device=device, dtype=dtype))


@dataclass(frozen=True)
class StyleCode(Rows):
    """What a style encoder says of style pictures, one row per picture."""

    tokens: Tensor  # [B, T, D]
    pooled: Tensor | None = None  # [B, P] in the place of the pooled text, std-tiny's alone


@dataclass(frozen=True)
class Adapter:
    """The IP-Adapter that a base was given, for the notes of its LoRAs."""

    name: str  # of the file
    digest: str  # std_rt.models.ip_adapter.adapter_digest
    layers: tuple[str, ...]  # cross-attention layers with an image branch


@dataclass(frozen=True)
class Motion:
    """The motion adapter that a base was given, and the clips that it is trained on, for the LoRAs' notes."""

    name: str  # of the folder, or the hub id
    frames: int
    interval: int  # frames of the clip from one to the next


@dataclass(frozen=True)
class Fresh:
    """New samples, on the CPU; the three are one picture unless the base is std-tiny.

    Latents of clips are ``[n, C, T, h, w]``.
    """

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
    style_encoder: StyleEncoder | ClipStyleEncoder | None = None  # None too once `release_style_encoder` ran
    style_px: int = 0
    null_tokens: Tensor | None = None  # [1, T, D] of no style; None if the UNet takes no style
    adapter: Adapter | None = None
    text: TextEncoders | None = None
    licence: str = ""  # as its README.md says in the front matter; empty if nothing does
    motion: Motion | None = None  # None: a base for pictures

    def to(self, device: torch.device | str) -> None:
        """Move every network."""
        for part in (self.unet, self.vae, self.style_encoder):
            if part is not None:
                part.to(device)
        if self.text is not None:
            self.text.pipeline.to(device)
        if self.null_tokens is not None:
            self.null_tokens = self.null_tokens.to(device)

    def release_style_encoder(self) -> None:
        """Free its memory; from here on every style comes from a cache."""
        self.style_encoder = None

    def checkpoint(self) -> None:
        """Gradient checkpointing in the UNet and, where it has that, in the decoder."""
        self.unet.enable_gradient_checkpointing()
        if self.vae._supports_gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()

    def compile(self, backend: str = "inductor") -> None:
        """Compile the UNet's transformer blocks, most of its launches.

        One function for all of them, with a form for each width, batch and precision, with and without
        gradients and LoRA; each is compiled at its first call.
        """
        for module in self.unet.modules():
            if type(module).__name__ == "BasicTransformerBlock":  # diffusers', not to be imported for this
                module.compile(backend=backend)

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
        """Raw output, in the shape of ``x``, of ``unet`` (this base's, or the same one wrapped), fp32.

        ``x`` is ``[B, C, h, w]``, of clips ``[B, C, T, h, w]``; ``t [B]``.
        """
        added: dict[str, Any] = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        if cond.tokens is not None:
            added["image_embeds"] = [cond.tokens[:, None]]
        if cond.content is not None:
            x = torch.cat([x, cond.content], 1)
        dtype = next(self.unet.parameters()).dtype
        context = cond.context.to(dtype)
        if self.motion is not None:
            # UNetMotionModel repeats time, sizes and pooled text for each frame; this is its caller's part.
            context = context.repeat_interleave(x.shape[2], 0)
        out = unet(x.to(dtype), t, context, added_cond_kwargs=added, return_dict=False)[0]
        return cast(Tensor, out.float())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1] -> scaled latents, fp32."""
        encoded = self.vae.encode(images.to(next(self.vae.parameters())))
        # A KL autoencoder's mode: the same picture gives the same latents, which caching relies on.
        z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        # Contiguous, as they are after a checkpoint: other strides choose other kernels, whose sums differ.
        return cast(Tensor, (z.float() - self._shift) * self.vae.config.scaling_factor).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images ``[B, 3, H, W]``, not clamped; gradients flow."""
        z = latents / self.vae.config.scaling_factor + self._shift
        return cast(Tensor, self.vae.decode(z.to(next(self.vae.parameters()))).sample.float())

    @property
    def _shift(self) -> float:
        return float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    # --- conditioning -------------------------------------------------------------------------------

    @torch.no_grad()
    def read_text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """``(context [B, L, D], pooled [B, P])`` in fp32; None for a base without text encoders."""
        if self.text is None:
            return None
        context, pooled = self.text(captions)
        return context.float(), pooled.float()

    @torch.no_grad()
    def look(self, styles: Tensor) -> StyleCode:
        """Style pictures ``[B, 3, S, S]`` in [-1, 1] -> what the UNet is told of them, fp32."""
        if self.style_encoder is None:
            raise RecipeError(
                "a style picture is not in pictures.cache, and the image encoder is not loaded any more; "
                "run the same command again"
            )
        found = self.style_encoder(styles.to(next(self.style_encoder.parameters()).device))
        return StyleCode(*(x.float() for x in ((found,) if isinstance(found, Tensor) else found)))

    def condition(
        self,
        text: tuple[Tensor, Tensor] | None,
        style: StyleCode | None,
        time_ids: Tensor,
        content: Tensor | None = None,
    ) -> Conditioning:
        """Conditioning from what `read_text` and `look` gave, and sizes ``[B, 6]``.

        ``content``: clean latents, kept where the UNet sees them.
        """
        assert (style is None) == (self.null_tokens is None), "a style picture for each row, or for none"
        tokens = None if style is None else style.tokens
        if text is None:
            assert style is not None, "this base has neither text encoders nor a style encoder"
            null = style.tokens.new_zeros(len(style.tokens), 1, self.unet.config.cross_attention_dim)
            text = null, cast(Tensor, style.pooled)
        return Conditioning(*text, time_ids.float(), tokens, content if self.sees_content else None)

    def masked(self, cond: Conditioning, keep: Tensor) -> Conditioning:
        """Rows where ``keep [B]`` is 0 become the unconditional branch, as the runtime has it.

        The text is zeros, as in SDXL's pipelines; the style is ``null_tokens``, which the export stores too.
        Sizes stay, and so does the content: guidance is on text and style alone.
        """
        k = keep.to(cond.context)
        zeroed = cond.map(lambda x: x * k.view(-1, *[1] * (x.ndim - 1)))
        tokens = cond.tokens
        if tokens is not None:
            assert self.null_tokens is not None, "tokens need what stands for no style"
            tokens = torch.where(k.view(-1, 1, 1) > 0, tokens, self.null_tokens.to(tokens))
        return replace(zeroed, tokens=tokens, time_ids=cond.time_ids, content=cond.content)

    def null(self, cond: Conditioning) -> Conditioning:
        """The unconditional branch of every row."""
        return self.masked(cond, cond.context.new_zeros(len(cond)))

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text, or of what std-tiny has in its place."""
        config = self.unet.config
        return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)

    @property
    def heads_dim(self) -> int:
        """Width of `heads_condition`."""
        return self.pooled_dim + (0 if self.null_tokens is None else self.null_tokens.shape[2])

    def heads_condition(self, cond: Conditioning) -> Tensor:
        """What the discriminator's heads are told ``[B, heads_dim]``; zeros where all is dropped.

        The pooled vector, and the mean of the style tokens as they differ from no style.
        """
        if cond.tokens is None:
            return cond.pooled
        assert self.null_tokens is not None
        return torch.cat([cond.pooled, (cond.tokens - self.null_tokens.to(cond.tokens)).mean(1)], 1)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table; RecipeError if it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None


def _is_tiny(folder: Path) -> bool:
    encoder = folder / "image_encoder" / "config.json"
    return encoder.is_file() and read_json(encoder).get("_class_name") == "StyleEncoder"


def _tiny(folder: Path) -> Base:
    p = load_tiny(folder)
    style, name = p.style_encoder, folder.resolve().name
    return Base(p.unet, p.vae, p.schedule, name, "", style, style.image_px, style.negative())


def _sdxl(source: str, dtype: torch.dtype, device: torch.device | str) -> Base:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    text = torch.float32 if dtype == torch.float32 else torch.float16
    folder, others = Path(source), ("vae", *TEXT_ROLES)
    for role in ("unet", *others):
        if (folder / role).is_dir():
            check_part(role, folder / role)
    with warnings.catch_warnings():
        # diffusers 0.35 has no other name for it.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        unet: Network = UNet2DConditionModel.from_pretrained(
            source,
            subfolder="unet",
            torch_dtype=dtype,
            use_safetensors=True,  # the other format is pickle
            variant="fp16" if has_fp16_only(folder / "unet") else None,
        )
        p = StableDiffusionXLPipeline.from_pretrained(
            source,
            unet=unet.to(device),  # before the others are read
            # The published recipe trains on text; `_add_style` reads both where the recipe has a style.
            image_encoder=None,
            feature_extractor=None,
            torch_dtype={"vae": torch.float32, "default": text},
            use_safetensors=True,
            variant="fp16" if any(has_fp16_only(folder / part) for part in others) else None,
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
    # A hub id has two parts; the first may be a folder of what was downloaded from there.
    beside = folder.parent.is_dir() and not any(folder.parent.glob("*/model_index.json"))
    if not folder.exists() and (len(folder.parts) != 2 or beside):
        raise RecipeError(
            f"base = {str(source)!r} does not exist; train that stage first, or get the built-in model's "
            f"weights: std-rt bundles unpack -o {source}"
        )
    return folder


def _add_style(base: Base, folder: Path, config: StyleConfig, dtype: torch.dtype) -> None:
    """Give the base (in place) the recipe's IP-Adapter: image branches in the UNet, and their encoder."""
    if base.null_tokens is not None:
        raise RecipeError(f"base = {str(folder)!r} has its own style encoder; leave style.adapter empty")
    encoder, branches, layers = open_style(base.unet, folder, config)
    base.null_tokens, base.style_px = encoder.negative(), encoder.image_px
    pairs = ((layer, branches[layer]) for layer in layers)
    kept = {layer: (key.to(dtype), value.to(dtype)) for layer, (key, value) in pairs}
    attach_diffusers(base.unet, kept, base.null_tokens.shape[1])
    if isinstance(encoder, ClipStyleEncoder) and dtype != torch.float32:  # as the text encoders
        encoder.module.to(torch.float16)
        encoder.dtype = torch.float16
    path = Path(config.adapter)
    base.style_encoder, base.adapter = encoder, Adapter(path.name, adapter_digest(path), tuple(layers))


def _is_of_use(record: logging.LogRecord) -> bool:
    """Not diffusers' warning of layers to be kept in fp32, of which a motion UNet has none."""
    return "kept in float32: []" not in record.getMessage()


def _add_motion(base: Base, config: MotionConfig) -> None:
    """Put the recipe's motion adapter into the base's UNet (in place): it takes ``[B, C, T, h, w]`` then."""
    from diffusers import MotionAdapter

    plain = base.unet
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_is_of_use)
    try:
        adapter: Network = MotionAdapter.from_pretrained(config.adapter)
        unet: Network = motion_unet(plain, adapter)
    except torch.OutOfMemoryError:
        raise  # nothing is wrong with the files
    except (OSError, ValueError, RuntimeError, KeyError, IndexError) as error:
        reason = one_line(error, 200)
        raise RecipeError(
            f"motion.adapter = {config.adapter!r} cannot be put into {base.name} ({reason}); give a folder "
            "of diffusers' MotionAdapter for it, or guoyww/animatediff-motion-adapter-sdxl-beta"
        ) from None
    longest = int(adapter.config.motion_max_seq_length)
    if config.frames > longest:
        raise RecipeError(
            f"motion.frames = {config.frames}, but {config.adapter} has {longest} positions; "
            f"set it to {longest} or less"
        )
    base.unet = unet.to(plain.device)
    if base.text is not None:
        base.text.pipeline.unet = None  # the plain one shares nothing, and would go to the GPU beside it
    name = Path(config.adapter).name if Path(config.adapter).is_dir() else config.adapter
    base.motion = Motion(name, config.frames, config.interval)


def open_style(
    unet: Network, folder: Path, config: StyleConfig
) -> tuple[StyleEncoder | ClipStyleEncoder, Branches, list[str]]:
    """(encoder, image branches of all layers, the layers that the recipe keeps) of the recipe's IP-Adapter.

    ``folder`` is the base's. Raises RecipeError.
    """
    path = style_adapter(config)
    try:
        beside = style_encoder_folder(folder, config)
        check_encoder(path, beside)
        _, layers = choose_layers(unet, config.layers, own_encoder=False)
        return (*open_adapter(unet, path, beside), layers)
    except ExportError as error:
        raise RecipeError(_in_recipe_words(error)) from None


def style_adapter(config: StyleConfig) -> Path:
    """The recipe's IP-Adapter file; RecipeError if it is not there."""
    path = Path(config.adapter)
    if not path.is_file():
        raise RecipeError(
            f"style.adapter = {config.adapter!r} does not exist; hf download h94/IP-Adapter "
            "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors --local-dir ip-adapter gets the published one"
        )
    return path


def style_encoder_folder(folder: Path, config: StyleConfig) -> Path:
    """Where the adapter's image encoder lies: as the recipe says, in the base, or beside the adapter."""
    given = Path(config.encoder) if config.encoder else None
    try:
        return find_encoder(Path(config.adapter), given, None if given else folder / "image_encoder")
    except ExportError as error:
        raise RecipeError(f"{_in_recipe_words(error)}: set style.encoder to its folder") from None


def _in_recipe_words(error: ExportError) -> str:
    """The message of an export, with the recipe's keys for its flags."""
    text = str(error)
    for flag, key in (("ip-adapter", "adapter"), ("image-encoder", "encoder"), ("style-layers", "layers")):
        text = text.replace(f"--{flag}", f"style.{key}")
    return text


def _load(source: str | Path, folder: Path, dtype: torch.dtype, device: torch.device | str) -> Base:
    try:
        return _tiny(folder) if _is_tiny(folder) else _sdxl(str(source), dtype, device)
    except torch.OutOfMemoryError:
        raise  # nothing is wrong with the files
    except (OSError, ValueError, RuntimeError, LookupError, ExportError) as error:
        what = "cannot be loaded" if folder.exists() else "is no folder here, and cannot be had from the hub"
        raise RecipeError(
            f"base = {str(source)!r} {what} ({one_line(error, 200)}); give a pipeline folder"
        ) from None


def load_base(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    style: StyleConfig | None = None,
    motion: MotionConfig | None = None,
) -> Base:
    """A folder in SDXL's layout (or a hub id), or one of std-tiny; frozen, on ``device``.

    ``style`` names the IP-Adapter of an SDXL, if it is to have one; std-tiny has its own. ``motion`` names
    its motion adapter, with which it is a base for clips. The UNet is in
    ``dtype``; with a half type, SDXL's text and image encoders are in fp16. All else is in fp32.
    Raises RecipeError if it is missing or another kind of pipeline.
    """
    folder = check_source(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise RecipeError(f"base = {str(source)!r} is not a diffusers folder (it has no model_index.json)")
    base = _load(source, folder, dtype, device)
    if base.unet.config.addition_embed_type != "text_time":
        raise RecipeError(f"base = {str(source)!r} is not an SDXL UNet (it has no text_time embedding)")
    taken, given = base.unet.config.in_channels, base.unet.config.out_channels
    if taken != given and not (taken == 2 * given and base.style_encoder is not None):
        raise RecipeError(
            f"base = {str(source)!r} has a UNet that takes {taken} channels for {given} latents; "
            "distillation trains those that see the noisy latents only"
        )
    if style is not None and style.adapter:
        _add_style(base, folder, style, dtype)
    if motion is not None and motion.adapter:
        _add_motion(base, motion)
    base.digest = unet_digest({name: value.shape for name, value in base.unet.state_dict().items()})
    base.licence = licence(folder)
    for part in (base.unet, base.vae, base.style_encoder):
        if part is not None:
            part.requires_grad_(False).eval()
    if base.unet.dtype != dtype:
        base.unet.to(dtype)
    base.to(device)
    return base
