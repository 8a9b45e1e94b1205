"""The finishing stage: few steps, guidance 1, with the style's texture. Read top to bottom.

The teacher's squared error asks for the mean of all plausible pictures, so its few-step results have
the right palette and soft strokes. Here the network runs its own 4-step trajectory from photos under
unrelated artworks (the very use of the product, for which no target exists) and, at one random step
of it, its clean estimate is asked for two things:

* texture: the distribution of its latent patches should be the style's (``texture.py``),
* anchor: what a blur leaves of it should be what the frozen, guided teacher says, which keeps the
  content and the layout of colours.

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
from std_rt.training.distil.precision import mixed_precision
from std_rt.training.run.recipe import FinishConfig, TeacherConfig, load_run_recipe
from std_rt.training.run.stage_run import cosine_rate
from std_rt.training.tiny.latents import STYLE_LATENTS, Triple, load_latents, random_crop_of
from std_rt.training.tiny.pipeline import TinyPipeline, load_tiny, run_unet, save_tiny
from std_rt.training.tiny.teacher import (
    ddim,
    denoising_loss,
    ema_update,
    pipeline_run,
    random_time_ids,
    teacher_sheet,
    watched_pairs,
)
from std_rt.training.tiny.texture import detail_distance, texture_distance


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
        first = coefficients[0]
        x = first.alpha_t * photo + first.sigma_t * torch.randn(photo.shape, generator=run.generator)
        with torch.no_grad():
            for c in coefficients[:at]:
                x, _ = ddim(x, _predict(average, x, c, style, ids), c)
            guided = _guided(teacher, x, coefficients[at], style, ids, config.guidance)
        _, anchor = ddim(x, guided, coefficients[at])
        _, x_0 = ddim(x, _predict(live, x, coefficients[at], style, ids).float(), coefficients[at])
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


def _predict(pipeline: TinyPipeline, x: Tensor, c: StepCoefficients, style: Tensor, ids: Tensor) -> Tensor:
    tokens, pooled = pipeline.style_encoder.encode_latents(style)
    return run_unet(pipeline.unet, x, torch.full((len(x),), c.timestep), tokens, pooled, ids)


def _guided(
    pipeline: TinyPipeline, x: Tensor, c: StepCoefficients, style: Tensor, ids: Tensor, guidance: float
) -> Tensor:
    """The teacher's v with guidance on the style, in one batch of two."""
    tokens, pooled = pipeline.style_encoder.encode_latents(style)
    t = torch.full((2 * len(x),), c.timestep)
    both = torch.cat([tokens, torch.zeros_like(tokens)]), torch.cat([pooled, torch.zeros_like(pooled)])
    styled, free = run_unet(pipeline.unet, x.repeat(2, 1, 1, 1), t, *both, ids.repeat(2, 1)).float().chunk(2)
    return free + guidance * (styled - free)
