"""The finishing stage of std-tiny: few steps, guidance 1, with the style's texture.

Squared error makes the teacher predict the mean of all plausible pictures, so its few-step results have
the right palette and soft strokes. Here the network runs its own 4-step trajectory from photos under
unrelated artworks (the very use of the product, for which no target exists) and, at one random step
of it, its clean estimate is trained on two objectives:

* texture: the distribution of its latent patches should be the style's. That is compared with no feature
  network: project all patches on random directions, sort, and compare the sorted values (sliced
  Wasserstein distance; for textures: Heitz et al., arXiv 2006.07229),
* anchor: blurred, it should equal the frozen, guided teacher's, which keeps the content and the layout
  of colours.

The other half of every batch is the teacher's own loss, so that nothing learned is lost.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import StepCoefficients, trajectory_timesteps
from std_rt.models.perceptual import quantile_gaps
from std_rt.pipeline.denoise import denoise
from std_rt.training.run.precision import mixed_precision
from std_rt.training.run.recipe import FinishConfig, TeacherConfig, load_run_recipe
from std_rt.training.run.training_run import cosine_rate
from std_rt.training.tiny.latents import STYLE_LATENTS, Triple, load_latents, random_crop_of
from std_rt.training.tiny.teacher import (
    denoising_loss,
    ema_update,
    pipeline_run,
    teacher_sheet,
    watched_pairs,
)
from std_rt.training.tiny.tiny_pipeline import (
    TinyPipeline,
    load_tiny,
    random_time_ids,
    run_unet,
    save_tiny,
)


def draw_unpaired(
    latents: dict[str, list[Triple]], batch: int, side: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Photos ``[B, C, side, side]`` and unrelated styles ``[B, C, 28, 28]``, three in four artworks."""
    rows = []
    for _ in range(batch):
        photo = latents["generated"][int(rng.integers(len(latents["generated"])))].c
        kind = "art" if rng.random() < 0.75 else "generated"
        other = latents[kind][int(rng.integers(len(latents[kind])))].s[0]
        rows.append((random_crop_of(photo, side, rng), random_crop_of(other, STYLE_LATENTS, rng)))
    contents, styles = zip(*rows, strict=True)
    return torch.stack(contents), torch.stack(styles)


def anchor_loss(x_0: Tensor, teacher_x_0: Tensor) -> Tensor:
    """Squared difference of what 4x4 and 2x2 blurs leave, the finer one at a quarter of the weight."""
    coarse = (F.avg_pool2d(x_0, 4) - F.avg_pool2d(teacher_x_0, 4)).square().mean()
    return coarse + 0.25 * (F.avg_pool2d(x_0, 2) - F.avg_pool2d(teacher_x_0, 2)).square().mean()


def finish_pipeline(config: FinishConfig, stop_after: int | None = None) -> Path:
    """Finish (or go on finishing) a teacher; returns the diffusers folder of the averaged weights."""
    source = Path(config.teacher)
    base: TeacherConfig = load_run_recipe(source)
    if not (source / "pipeline" / "model_index.json").exists():
        raise RecipeError(
            f"the teacher in {source} is not finished; std-rt train training/std_tiny_teacher.toml"
        )
    torch.manual_seed(config.seed)
    teacher, live, average = (load_tiny(source / "pipeline") for _ in range(3))
    teacher.unet.requires_grad_(False)
    live.style_encoder.patchify.requires_grad_(False)
    run = pipeline_run(config, live, average)
    latents = load_latents(source / "latents.safetensors")
    if latents.keys() != {"art", "generated"}:
        raise RecipeError(
            f"the teacher in {source} had no art or no generated styles; both shares must be above 0"
        )
    pairs = watched_pairs(base.data)
    coefficients = live.schedule.coefficients(trajectory_timesteps(config.eta, config.run_steps))

    def own_run(n: int, side: int) -> Tensor:
        """Texture and anchor losses at a random step of the network's own run on unpaired samples."""
        photo, style = draw_unpaired(latents, n, side, run.rng)
        at = int(run.rng.integers(len(coefficients)))
        ids = random_time_ids(n, run.rng)
        noise = torch.randn(photo.shape, generator=run.generator)
        c = coefficients[at]
        with torch.no_grad():
            x = c.alpha_t * photo + c.sigma_t * noise
            if at:
                x = denoise(
                    photo,
                    lambda x, t, _: _predict(average, x, t, style, ids),
                    noise=[noise],
                    steps=coefficients[:at],
                    prediction_type="v_prediction",
                )
            guided = _guided(teacher, x, c, style, ids, config.guidance)
        anchor = c.alpha_t * x - c.sigma_t * guided
        x_0 = c.alpha_t * x - c.sigma_t * _predict(live, x, c.timestep, style, ids).float()
        with torch.autocast("cpu", enabled=False):
            texture = texture_distance(x_0, style, run.generator).mean()
            detail = detail_distance(x_0, style, run.generator).mean()
        kept = anchor_loss(x_0, anchor)
        return config.anchor_weight * kept + config.texture_weight * texture + config.detail_weight * detail

    for step in run.steps(
        lambda i: cosine_rate(config.learning_rate, i, config.steps, config.warmup, 0.3), stop_after
    ):
        side = int(run.rng.choice(config.window))
        n = max(1, round(config.batch * (max(config.window) / side) ** 2 / 2))
        learned = denoising_loss(live, latents, base, run, n, side)
        with mixed_precision(config.bf16):
            own = own_run(n, side)
        run.update(config.base_weight * learned + own, 2 * n)
        ema_update(average, live, step, config.ema_decay)
        if run.due(step):
            run.save(step)
            teacher_sheet(average, pairs, run.sheet(step), [(4, 1.0), (2, 1.0), (4, 1.5)])
    if run.end == config.steps:
        save_tiny(average, run.folder / "pipeline")
    return run.folder / "pipeline"


def _predict(pipeline: TinyPipeline, x: Tensor, timestep: int, style: Tensor, ids: Tensor) -> Tensor:
    tokens, pooled = pipeline.style_encoder.encode_latents(style)
    return run_unet(pipeline.unet, x, torch.full((len(x),), timestep), tokens, pooled, ids)


def _guided(
    pipeline: TinyPipeline, x: Tensor, c: StepCoefficients, style: Tensor, ids: Tensor, guidance: float
) -> Tensor:
    """The teacher's v with guidance on the style, in one batch of two."""
    tokens, pooled = pipeline.style_encoder.encode_latents(style)
    t = torch.full((2 * len(x),), c.timestep)
    both = torch.cat([tokens, torch.zeros_like(tokens)]), torch.cat([pooled, torch.zeros_like(pooled)])
    styled, free = run_unet(pipeline.unet, x.repeat(2, 1, 1, 1), t, *both, ids.repeat(2, 1)).float().chunk(2)
    return free + guidance * (styled - free)


# --- texture ----------------------------------------------------------------------------------------------


def sliced_wasserstein(
    x: Tensor, y: Tensor, generator: torch.Generator, side: int, directions: int = 48
) -> Tensor:
    """Per-sample squared distance ``[B]`` of the ``side`` x ``side`` patch distributions of x and y.

    ``x [B, C, h, w]`` and ``y [B, C, H, W]`` may differ in size. Directions have unit length, so the
    value is in squared latent units.
    """
    filters = torch.randn((directions, x.shape[1], side, side), generator=generator)
    filters = filters / filters.flatten(1).norm(dim=1)[:, None, None, None]
    count = min((h - side + 1) * (w - side + 1) for h, w in (x.shape[2:], y.shape[2:]))
    return quantile_gaps(x, y, filters, count).square().mean((1, 2))


def texture_distance(x: Tensor, style: Tensor, generator: torch.Generator) -> Tensor:
    """Per-sample distance ``[B]``: single latent pixels, 3x3 patches, and 3x3 patches at half size."""
    total = sliced_wasserstein(x, style, generator, 1) + sliced_wasserstein(x, style, generator, 3)
    return total + sliced_wasserstein(F.avg_pool2d(x, 2), F.avg_pool2d(style, 2), generator, 3)


def detail_distance(x: Tensor, style: Tensor, generator: torch.Generator) -> Tensor:
    """As ``texture_distance`` but of what a 5x5 blur removes, so that large areas of colour do not count."""

    def detail(z: Tensor) -> Tensor:
        return z - F.avg_pool2d(z, 5, 1, 2, count_include_pad=False)

    return sliced_wasserstein(detail(x), detail(style), generator, 1) + sliced_wasserstein(
        detail(x), detail(style), generator, 3
    )
