"""The autoencoder stage of std-tiny: pictures to latents and back.

Loss: L1 on three scales and L1 on image gradients (which keeps edges and fine texture that plain L1
blurs away). Latents carry a little noise, so that the decoder forgives what the UNet gets slightly
wrong, and on some steps the decoder is asked to turn half-size latents into the half-size picture
(scale equivariance, after EQ-VAE, arXiv 2502.09509), which makes latents smooth and easy to diffuse.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from std_rt.models.autoencoder import AutoencoderPixelShuffle
from std_rt.training.data.picture_set import (
    Frame,
    PictureSet,
    load_pictures,
    picture_files,
    random_crop,
    read_picture,
)
from std_rt.training.run.recipe import AutoencoderConfig
from std_rt.training.run.sheet import centre_crop, save_sheet, to_frames, to_tensor
from std_rt.training.run.training_run import ModuleRun, cosine_rate
from std_rt.training.tiny.generated_styles import draw_style


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


def draw_batch(
    photos: PictureSet,
    art: PictureSet,
    made: list[Frame],
    config: AutoencoderConfig,
    rng: np.random.Generator,
) -> Tensor:
    """``[B, 3, crop, crop]`` in [-1, 1]: generated styles, artworks and photos."""
    crops = []
    for _ in range(config.batch):
        if rng.random() < config.generated_share:
            frame = made[int(rng.integers(len(made)))]
        else:
            pictures = art if rng.random() < 0.55 else photos
            frame = pictures.frames[pictures.draw(rng)]
        crops.append(random_crop(frame, config.crop_px, rng))
    return to_tensor(crops)


@torch.no_grad()
def latent_statistics(model: AutoencoderPixelShuffle, frames: list[Frame]) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of the latents of the given frames (256 px crops)."""
    z = torch.cat([model.encode(to_tensor([centre_crop(f, 256)])).latents for f in frames])
    return z.mean((0, 2, 3)), z.std((0, 2, 3))


@torch.no_grad()
def _sheet(model: AutoencoderPixelShuffle, frames: list[Frame], path: Path) -> float:
    images = to_tensor([centre_crop(f, 256) for f in frames])
    output = model.decode(model.encode(images).latents).sample.clamp(-1, 1)
    save_sheet(path, [to_frames(images), to_frames(output)])
    return float(10 * torch.log10(4 / F.mse_loss(output, images)))


def train_autoencoder(config: AutoencoderConfig, stop_after: int | None = None) -> Path:
    """Train (or go on training) the autoencoder; returns the folder of the finished ``vae``.

    ``stop_after`` ends the call after that many steps, as a kill would.
    """
    torch.manual_seed(config.seed)
    photos = load_pictures(config.data.photos, config.data.sources, config.crop_px)
    art = load_pictures(config.data.art, config.data.sources, config.crop_px)
    made = _generated(
        photos, art, 300 if len(photos.frames) > 100 else 20, np.random.default_rng(config.seed + 1)
    )
    files = (
        picture_files(Path(config.data.held_out_content))[:5],
        picture_files(Path(config.data.held_out_style))[:5],
    )
    watched = [f for f in map(read_picture, [*files[0], *files[1]]) if f is not None]
    model = AutoencoderPixelShuffle(
        config.latent_channels,
        config.channels[:2],
        config.encoder_blocks,
        config.decoder_blocks,
    ).to(memory_format=torch.channels_last)
    run = ModuleRun(config, {"model": model}, list(model.parameters()), weight_decay=1e-4)

    for step in run.steps(lambda i: cosine_rate(config.learning_rate, i, config.steps, 200), stop_after):
        images = draw_batch(photos, art, made, config, run.rng).to(memory_format=torch.channels_last)
        half_size = run.rng.random() < config.scale_equivariance
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            z = model.encode(images).latents
            spread = config.latent_noise * z.detach().float().std()
            z, target = z + torch.randn(z.shape, generator=run.generator) * spread, images
            if half_size:
                z, target = F.avg_pool2d(z, 2), F.interpolate(images, scale_factor=0.5, mode="area")
            output = model.decode(z).sample
        # The small pull to zero keeps latents from drifting; standardize() sets their scale at the end.
        pull = 1e-4 * z.float().square().mean()
        run.update(reconstruction_loss(output.float(), target, config.high_pass) + pull, config.batch)
        if run.due(step):
            run.save(step, held_out_psnr_db=_sheet(model, watched, run.sheet(step)))

    if run.end == config.steps:
        model.standardize(*latent_statistics(model, photos.frames[:200] + art.frames[:200] + made[:80]))
        model.to(memory_format=torch.contiguous_format).save_pretrained(run.folder / "vae")
        _sheet(model, watched, run.folder / "sheets" / "final.png")
    return run.folder / "vae"
