"""The autoencoder stage of std-tiny: pictures to latents and back.

Loss: L1 on three scales and L1 on image gradients (which keeps edges and fine texture that plain L1
blurs away). Latents carry a little noise, so that the decoder forgives what the UNet gets slightly
wrong, and on some steps the decoder is asked to turn half-size latents into the half-size picture
(scale equivariance, after EQ-VAE, arXiv 2502.09509), which makes latents smooth and easy to diffuse.

With a ``perceptual`` network, features and Gram matrices of the output are held against the picture's:
L1 alone lets strokes of a few pixels go, which are most of what VGG calls style.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from std_rt.models.autoencoder import AutoencoderPixelShuffle
from std_rt.models.perceptual import style_distance
from std_rt.training.data.picture_set import (
    Frame,
    PictureSet,
    load_pictures,
    picture_files,
    random_crop,
    read_picture,
)
from std_rt.training.run.precision import choose_device, precision_context
from std_rt.training.run.recipe import AutoencoderConfig
from std_rt.training.run.sheet import centre_crop, save_sheet, to_frames, to_tensor
from std_rt.training.run.training_run import ModuleRun, cosine_rate
from std_rt.training.tiny.autoencoder_parts import (
    ExtraLosses,
    build_autoencoder,
    fit_shortcut,
    load_autoencoder,
)
from std_rt.training.tiny.generated_styles import draw_style
from std_rt.training.tiny.triplets import find_triplets


def reconstruction_loss(output: Tensor, target: Tensor, high_pass: float) -> Tensor:
    """L1 on three scales plus ``high_pass`` times the L1 of horizontal and vertical differences."""
    loss = output.new_zeros(())
    for scale in range(3):
        loss = loss + (output - target).abs().mean()
        if scale < 2:
            for dim in (-1, -2):
                loss = loss + high_pass * (output.diff(dim=dim) - target.diff(dim=dim)).abs().mean()
            output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
    return loss


def _generated(photos: PictureSet, art: PictureSet, n: int, rng: np.random.Generator) -> list[Frame]:
    made = []
    for _ in range(n):
        source = art.frames[art.draw(rng)] if rng.random() < 0.6 else None
        _, style = draw_style(rng, source)
        made.append(style(photos.frames[photos.draw(rng)], rng))
    return made


def _stylized(config: AutoencoderConfig) -> list[Frame]:
    """The stylized pictures of the recipe's triplets."""
    if not config.triplets:
        return []
    frames = (read_picture(t.stylized) for t in find_triplets(config.triplets))
    return [f for f in frames if f is not None]


def draw_batch(
    photos: PictureSet,
    art: PictureSet,
    made: list[Frame],
    config: AutoencoderConfig,
    rng: np.random.Generator,
    stylized: list[Frame] | None = None,
) -> Tensor:
    """``[B, 3, crop, crop]`` in [-1, 1]: stylized pictures, generated styles, artworks and photos."""
    crops = []
    for _ in range(config.batch):
        if stylized and rng.random() < config.stylized_share:
            frame = stylized[int(rng.integers(len(stylized)))]
        elif rng.random() < config.generated_share:
            frame = made[int(rng.integers(len(made)))]
        else:
            pictures = art if rng.random() < 0.55 else photos
            frame = pictures.frames[pictures.draw(rng)]
        crops.append(random_crop(frame, config.crop_px, rng))
    return to_tensor(crops)


@torch.no_grad()
def latent_statistics(model: AutoencoderPixelShuffle, frames: list[Frame]) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of the latents of the given frames (256 px crops)."""
    z = torch.cat([model.encode(_images([f], model)).latents for f in frames])
    return z.mean((0, 2, 3)), z.std((0, 2, 3))


def _images(frames: list[Frame], model: AutoencoderPixelShuffle) -> Tensor:
    return to_tensor([centre_crop(f, 256) for f in frames]).to(model.device)


@torch.no_grad()
def _sheet(
    model: AutoencoderPixelShuffle, frames: list[Frame], path: Path, extra: ExtraLosses
) -> dict[str, float]:
    """Write pictures over their round trips; PSNR and, with a perceptual network, their style distance."""
    images = _images(frames, model)
    output = model.decode(model.encode(images).latents).sample.clamp(-1, 1)
    save_sheet(path, [to_frames(images), to_frames(output)])
    figures = {"held_out_psnr_db": float(10 * torch.log10(4 / F.mse_loss(output, images)))}
    if extra.network is not None:
        pairs = zip(images.split(1), output.split(1), strict=True)
        distances = [style_distance(extra.network(x), extra.network(y)) for y, x in pairs]
        figures["held_out_style"] = float(torch.cat(distances).mean())
    return figures


def start_shortcut(model: AutoencoderPixelShuffle, config: AutoencoderConfig, frames: list[Frame]) -> None:
    """Fit the shortcut of a new run, unless the weights it starts from have one."""
    if not load_autoencoder(config.start_from).config.shortcut:
        kept = load_autoencoder(config.latents_like).config.latent_channels if config.latents_like else 0
        fit_shortcut(model, [_images([f], model) for f in frames], kept)


def train_autoencoder(config: AutoencoderConfig, stop_after: int | None = None) -> Path:
    """Train (or go on training) the autoencoder; returns the folder of the finished ``vae``.

    ``stop_after`` ends the call after that many steps, as a kill would.
    """
    torch.manual_seed(config.seed)
    photos = load_pictures(config.data.photos, config.data.sources, config.crop_px)
    art = load_pictures(config.data.art, config.data.sources, config.crop_px)
    count = 300 if len(photos.frames) > 100 else 20
    made = _generated(
        photos, art, count if config.generated_share else 0, np.random.default_rng(config.seed + 1)
    )
    held_out = (Path(config.data.held_out_content), Path(config.data.held_out_style))
    files = [path for folder in held_out for path in picture_files(folder)[:5]]
    watched = [frame for frame in map(read_picture, files) if frame is not None]
    stylized, device = _stylized(config), choose_device(config.device)
    model = build_autoencoder(config).to(device, memory_format=torch.channels_last)
    extra = ExtraLosses(config, device)
    run = ModuleRun(config, {"model": model}, list(model.parameters()), weight_decay=1e-4)
    with closing(run):
        if config.shortcut and config.start_from and run.start == 0:
            start_shortcut(model, config, photos.frames[::20] + art.frames[::20] + stylized[:50])

        for step in run.steps(lambda i: cosine_rate(config.learning_rate, i, config.steps, 200), stop_after):
            images = draw_batch(photos, art, made, config, run.rng, stylized)
            images = images.to(device, memory_format=torch.channels_last)
            half_size = run.rng.random() < config.scale_equivariance
            with precision_context("bf16" if config.bf16 else "fp32", device):
                z = model.encode(images).latents
                kept = extra.latents(z, images)
                spread = config.latent_noise * z.detach().float().std()
                z, target = z + torch.randn(z.shape, generator=run.generator).to(device) * spread, images
                if half_size:
                    z, target = F.avg_pool2d(z, 2), F.interpolate(images, scale_factor=0.5, mode="area")
                output = model.decode(z).sample
                # Features of half-size crops say little and would cost more than the step itself.
                perceptual = extra.pictures(output, target) if not half_size else 0.0
            # The small pull to zero keeps latents from drifting; standardize() sets their scale at the end.
            pull = 1e-4 * z.float().square().mean()
            loss = reconstruction_loss(output.float(), target, config.high_pass) + pull
            run.update(loss + kept + perceptual, config.batch)
            if run.due(step):
                run.save(step, **_sheet(model, watched, run.sheet(step), extra))

        if run.end == config.steps:
            judged = photos.frames[:200] + art.frames[:200] + made[:80] + stylized[:200]
            model.standardize(*latent_statistics(model, judged))
            model.to(memory_format=torch.contiguous_format).save_pretrained(run.folder / "vae")
            _sheet(model, watched, run.folder / "sheets" / "final.png", extra)
    return run.folder / "vae"
