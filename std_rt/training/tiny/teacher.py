"""The base (teacher) stage of std-tiny: UNet and style encoder together, on stored latents.

The network learns the very trajectory that std-rt runs: img2img from a photo. Along one deterministic
DDIM trajectory that starts at ``tau`` from content c and ends in the target z, the state at t is

    x_t = alpha_t ((1 - k) z + k c) + sigma_t n,      k = (sigma_t / alpha_t) / (sigma_tau / alpha_tau)

because the noise estimate of the first step carries ``(alpha_tau / sigma_tau) (c - z)`` along with n.
In ``y = x / alpha`` this is the straight line from ``c + (sigma_tau / alpha_tau) n`` to z: a rectified
flow from noised content to stylized picture. So the input is all content at tau and fades to the
target as the run proceeds, and the style can only come from the style tokens. Prediction type: v.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from std_rt.core.errors import RecipeError, one_line
from std_rt.core.schedule import (
    NoiseSchedule,
    grid_timestep,
    start_index,
    trajectory_timesteps,
)
from std_rt.models.autoencoder import AutoencoderPixelShuffle
from std_rt.pipeline.denoise import Guidance, denoise
from std_rt.training.data.picture_set import load_pictures
from std_rt.training.run.muon import hidden_weights
from std_rt.training.run.precision import mixed_precision
from std_rt.training.run.recipe import DataConfig, FinishConfig, StylistConfig, TeacherConfig
from std_rt.training.run.sheet import Pairs, save_sheet, spread_pairs, to_frames, to_tensor
from std_rt.training.run.training_run import ModuleRun, cosine_rate
from std_rt.training.tiny.autoencoder_parts import load_autoencoder
from std_rt.training.tiny.latents import (
    Triple,
    build_latents,
    draw_triples,
    latents_made_from,
    load_latents,
    save_latents,
)
from std_rt.training.tiny.tiny_pipeline import (
    TinyPipeline,
    load_tiny,
    new_pipeline,
    random_time_ids,
    run_unet,
    save_tiny,
)


@dataclass(frozen=True)
class NoisyBatch:
    """Everything one training step sees; ``alpha`` and ``sigma`` are ``[B, 1, 1, 1]``."""

    x_t: Tensor
    t: Tensor
    z: Tensor
    s: Tensor
    alpha: Tensor
    sigma: Tensor


def draw_levels(
    batch: int,
    rng: np.random.Generator,
    *,
    eta: float,
    etas: tuple[float, float],
    run_steps: tuple[int, ...],
    on_runs: float,
) -> tuple[list[int], list[int]]:
    """Per sample a start ``tau`` and a timestep ``t <= tau``.

    Half the starts are that of ``eta``, the others lie between both ``etas``. The share ``on_runs`` of the
    timesteps are those of a run of one of ``run_steps``, the others any grid point.
    """
    low, high = map(start_index, etas)
    taus, ts = [], []
    for _ in range(batch):
        main = rng.random() < 0.5
        index = start_index(eta) if main else int(rng.integers(low, high + 1))
        tau = grid_timestep(index)
        if rng.random() < on_runs:
            t = int(rng.choice(trajectory_timesteps(1.0, int(rng.choice(run_steps)), start=tau)))
        else:
            t = grid_timestep(int(rng.integers(0, index + 1)))
        taus.append(tau)
        ts.append(t)
    return taus, ts


def make_noisy(
    z: Tensor,
    c: Tensor,
    s: Tensor,
    schedule: NoiseSchedule,
    config: TeacherConfig,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> NoisyBatch:
    """States on trajectories from c to z at levels of the recipe."""
    eta, etas = config.content_from_eta, (0.5, config.start_eta)
    levels = draw_levels(len(z), rng, eta=eta, etas=etas, run_steps=(4,), on_runs=0.5)
    return noisy_states(z, c, s, schedule, levels, rng, generator)


def noisy_states(
    z: Tensor,
    c: Tensor,
    s: Tensor,
    schedule: NoiseSchedule,
    levels: tuple[list[int], list[int]],
    rng: np.random.Generator,
    generator: torch.Generator,
) -> NoisyBatch:
    """States on trajectories from c to z (module docstring), k jittered for robustness to own errors.

    ``levels``: each sample's start ``tau``, and its timestep ``t <= tau``.
    """
    taus, ts = levels
    alpha, sigma = (
        torch.tensor(v, dtype=torch.float32, device=z.device)[:, None, None, None]
        for v in zip(*(schedule.alpha_sigma(t) for t in ts), strict=True)
    )
    starts = [s_ / a for a, s_ in map(schedule.alpha_sigma, taus)]
    start = torch.tensor(starts, device=z.device)[:, None, None, None]
    jitter = torch.tensor(np.exp(rng.normal(0, 0.25, len(z))), dtype=torch.float32, device=z.device)
    k = (sigma / alpha / start).float().clamp(max=1.0) ** jitter[:, None, None, None]
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    x_t = alpha * ((1 - k) * z + k * c) + sigma * noise
    return NoisyBatch(x_t, torch.tensor(ts, device=z.device), z, s, alpha, sigma)


def v_loss(v: Tensor, batch: NoisyBatch, weights: Tensor | None = None, most: float = 10.0) -> Tensor:
    """Squared error of v, weighted so that the clean estimate counts with SNR + 1 clamped at ``most``.

    ``weights``: one for each latent channel (`latent_weights`).
    """
    target = (batch.alpha * batch.x_t - batch.z) / batch.sigma
    error = (most * batch.sigma**2).clamp(max=1.0) * (v - target).square()
    return (error if weights is None else weights * error).mean()


@torch.no_grad()
def sample(
    pipeline: TinyPipeline,
    images: Tensor,
    styles: Tensor,
    steps: int,
    guidance: float = 1.0,
    eta: float = 0.75,
    seed: int = 0,
) -> Tensor:
    """Stylize ``images [B, 3, H, W]`` in the looks of ``styles [B, 3, S, S]``, deterministically."""
    z = pipeline.vae.encode(images).latents
    tokens, pooled = pipeline.style_encoder(styles)
    ids = torch.tensor([[images.shape[2], images.shape[3], 0, 0, images.shape[2], images.shape[3]]]).float()
    ids = ids.expand(len(z), 6)
    noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(seed))

    def predict(x: Tensor, timestep: int, unstyled: bool) -> Tensor:
        t, styled = torch.full((len(z),), timestep), 0 if unstyled else 1
        return run_unet(pipeline.unet, x, t, styled * tokens, styled * pooled, ids, z)

    z_0 = denoise(
        z,
        predict,
        noise=[noise],
        steps=pipeline.schedule.coefficients(trajectory_timesteps(eta, steps)),
        prediction_type="v_prediction",
        guidance=Guidance("none" if guidance == 1 else "full", guidance),
    )
    return pipeline.vae.decode(z_0).sample


def watched_pairs(data: DataConfig) -> Pairs:
    """The same unseen (content, style) pairs in every sheet."""
    return spread_pairs(Path(data.held_out_content), Path(data.held_out_style))


def teacher_sheet(
    pipeline: TinyPipeline, pairs: Pairs, path: Path, settings: list[tuple[int, float]]
) -> None:
    """One row a pair: content, style, then one output per (steps, guidance)."""
    images, styles = to_tensor([a for a, _ in pairs]), to_tensor([b for _, b in pairs])
    columns = [to_frames(sample(pipeline, images, styles, n, g)) for n, g in settings]
    save_sheet(path, [[a, b, *outs] for (a, b), *outs in zip(pairs, *columns, strict=True)])


def _latents(config: TeacherConfig, vae: AutoencoderPixelShuffle, run: Path) -> dict[str, list[Triple]]:
    """Stored latents of the run, made on the first call and again whenever their sources change."""
    path = run / "latents.safetensors"
    made_from = _fingerprint(config, vae)
    if latents_made_from(path) != made_from:
        photos = load_pictures(config.data.photos, config.data.sources)
        art = load_pictures(config.data.art, config.data.sources)
        counts = {
            "art": len(art.frames) * config.variants if config.share_art else 0,
            "generated": len(photos.frames) * config.variants if config.share_generated else 0,
        }
        save_latents(build_latents(art, photos, vae, counts, config.seed, config.bf16), path, made_from)
    return load_latents(path)


def _fingerprint(config: TeacherConfig, vae: AutoencoderPixelShuffle) -> str:
    weights = hashlib.sha256()
    for value in vae.encoder.state_dict().values():
        weights.update(value.numpy().tobytes())
    kinds = [bool(config.share_art), bool(config.share_generated)]
    known = [weights.hexdigest(), asdict(config.data), config.seed, config.variants, kinds]
    return json.dumps(known, sort_keys=True)


def _build(config: TeacherConfig, vae: AutoencoderPixelShuffle) -> TinyPipeline:
    torch.manual_seed(config.seed)
    pipeline = new_pipeline(config.model, vae, config.snr_ratio)
    if config.start_from:
        _copy_weights(Path(config.start_from), pipeline)
    return pipeline


def load_start(folder: Path) -> TinyPipeline:
    """The pipeline that ``start_from`` names; RecipeError where there is none."""
    if not (folder / "model_index.json").exists():
        raise RecipeError(
            f"start_from = {str(folder)!r} is not a pipeline folder (it has no model_index.json)"
        )
    return load_tiny(folder)


def _copy_weights(folder: Path, pipeline: TinyPipeline) -> None:
    """UNet and style encoder of a pipeline folder; RecipeError where there is none or it does not fit."""
    source = load_start(folder)
    try:
        pipeline.unet.load_state_dict(source.unet.state_dict())
        pipeline.style_encoder.load_state_dict(source.style_encoder.state_dict())
    except RuntimeError as error:
        reason = one_line(error, 200)
        raise RecipeError(f"start_from = {str(folder)!r} does not fit the recipe's model: {reason}") from None


def ema_update(average: TinyPipeline, live: TinyPipeline, step: int, decay: float) -> None:
    decay = min(decay, (step + 1) / (step + 10))
    with torch.no_grad():
        for name in ("unet", "style_encoder"):
            ours, theirs = getattr(average, name).parameters(), getattr(live, name).parameters()
            for a, b in zip(ours, theirs, strict=True):
                a.lerp_(b, 1 - decay)


def pipeline_run(
    config: TeacherConfig | FinishConfig | StylistConfig, live: TinyPipeline, average: TinyPipeline
) -> ModuleRun:
    """A run that trains UNet and style encoder of ``live`` and keeps their moving average."""
    modules = {
        "live_unet": live.unet,
        "live_style": live.style_encoder,
        "average_unet": average.unet,
        "average_style": average.style_encoder,
    }
    parameters = [p for m in (live.unet, live.style_encoder) for p in m.parameters() if p.requires_grad]
    muon = isinstance(config, StylistConfig) and config.optimizer == "muon"
    hidden = hidden_weights(live.unet) + hidden_weights(live.style_encoder) if muon else []
    return ModuleRun(config, modules, parameters, 1e-2, hidden)


def denoising_loss(
    live: TinyPipeline,
    latents: dict[str, list[Triple]],
    config: TeacherConfig,
    run: ModuleRun,
    size: int,
    side: int,
) -> Tensor:
    """The teacher's loss on ``size`` fresh samples of ``side`` x ``side`` latents."""
    shares = {"art": config.share_art, "generated": config.share_generated}
    triples = draw_triples(latents, shares, size, side, run.rng)
    batch = make_noisy(*triples, live.schedule, config, run.rng, run.generator)
    keep = torch.from_numpy(run.rng.random(size) >= config.drop_style).float()
    with mixed_precision(config.bf16):
        tokens, pooled = live.style_encoder.encode_latents(batch.s)
        tokens, pooled = tokens * keep[:, None, None], pooled * keep[:, None]
        v = run_unet(live.unet, batch.x_t, batch.t, tokens, pooled, random_time_ids(size, run.rng))
    return v_loss(v.float(), batch)


def train_teacher(config: TeacherConfig, stop_after: int | None = None) -> Path:
    """Train (or go on training) the teacher; returns the diffusers folder of its averaged weights.

    ``stop_after`` ends the call after that many steps, as a kill would.
    """
    vae = load_autoencoder(config.autoencoder)
    live, average = _build(config, vae), _build(config, vae)
    run = pipeline_run(config, live, average)
    latents = _latents(config, vae, run.folder)
    pairs = watched_pairs(config.data)

    for step in run.steps(
        lambda i: cosine_rate(config.learning_rate, i, config.steps, config.warmup, 0.5), stop_after
    ):
        side = int(run.rng.choice(config.window))
        size = max(1, round(config.batch * (max(config.window) / side) ** 2))
        run.update(denoising_loss(live, latents, config, run, size, side), size)
        ema_update(average, live, step, config.ema_decay)
        if run.due(step):
            run.save(step)
            teacher_sheet(average, pairs, run.sheet(step), [(4, 1.0), (4, 2.0), (12, 1.0)])
    if run.end == config.steps:
        save_tiny(average, run.folder / "pipeline")
    return run.folder / "pipeline"
