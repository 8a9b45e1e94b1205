"""The stylist stage of std-tiny: a UNet that sees the content, taught by triplets.

Trajectories (``trajectories.py``) go from a photo's latents to those of its stylized form. The photo's clean
latents stand beside the noisy ones at the input, so that no drawing is lost to the noise and targets are
nearly determined: one or two steps are enough.

Losses: the squared error of v, each latent channel weighed by what the decoder makes of it; with a
``perceptual`` network, the decoded clean estimate against the decoded target (features, Gram matrices,
pixels). The second is what makes strokes: the first alone asks for the mean of all that is possible, which
has none. And for ``own_styles`` of the styles the samples are the network's own runs of one or two steps, as
the product makes them: their decoded estimates are also compared with the style picture itself (Gram
matrices, the mean over all photos of a style; colours), so they can become better than the teachers'.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from std_rt.core.errors import RecipeError, one_line
from std_rt.core.schedule import trajectory_timesteps
from std_rt.models.perceptual import (
    colour_distance,
    feature_distance,
    gram,
    gram_distance,
    load_perceptual,
    relative_l1,
)
from std_rt.pipeline.denoise import denoise
from std_rt.training.data.picture_set import Frame
from std_rt.training.run.muon import hidden_weights
from std_rt.training.run.precision import attention_kernels, precision_context
from std_rt.training.run.recipe import LOWEST_START_ETA, StylistConfig
from std_rt.training.run.training_run import ModuleRun, linear_rate
from std_rt.training.tiny.autoencoder_parts import (
    choose_device,
    latent_weights,
    load_autoencoder,
)
from std_rt.training.tiny.tiny_pipeline import (
    TinyPipeline,
    load_tiny,
    new_pipeline,
    random_time_ids,
    run_unet,
    save_tiny,
)
from std_rt.training.tiny.trajectories import (
    NoisyBatch,
    draw_levels,
    noisy_states,
    run_sheet,
    v_loss,
)
from std_rt.training.tiny.triplets import TripletSet, crop_pair, crop_style

Told = tuple[Tensor, Tensor, Tensor, Tensor]  # style tokens, pooled style, time ids, content latents


@dataclass(frozen=True)
class Sample:
    """States on trajectories, and what the UNet is told beside them; a row a sample."""

    states: NoisyBatch
    told: Told


def build_stylist(config: StylistConfig) -> TinyPipeline:
    """The recipe's pipeline, with the weights of the one that ``start_from`` names; RecipeError if unfit."""
    torch.manual_seed(config.seed)
    vae = load_autoencoder(config.autoencoder)
    pipeline = new_pipeline(config.model, vae, config.snr_ratio)
    if not config.start_from:
        return pipeline
    folder = Path(config.start_from)
    if not (folder / "model_index.json").exists():
        raise RecipeError(
            f"start_from = {config.start_from!r} is not a pipeline folder (it has no model_index.json)"
        )
    source = load_tiny(folder)
    try:
        pipeline.unet.load_state_dict(source.unet.state_dict())
        # The recipe's autoencoder stays; its encoder is the first part of the style encoder.
        own = {f"patchify.{key}": value for key, value in vae.encoder.state_dict().items()}
        pipeline.style_encoder.load_state_dict(source.style_encoder.state_dict() | own)
    except RuntimeError as error:
        raise RecipeError(
            f"start_from = {config.start_from!r} does not fit the recipe's model: {one_line(error, 200)}"
        ) from None
    return pipeline


def ema_update(average: TinyPipeline, live: TinyPipeline, step: int, decay: float) -> None:
    """Move ``average`` towards ``live``; faster in the first steps, whose weights are worth little."""
    decay = min(decay, (step + 1) / (step + 10))
    with torch.no_grad():
        for name in ("unet", "style_encoder"):
            ours, theirs = getattr(average, name).parameters(), getattr(live, name).parameters()
            for a, b in zip(ours, theirs, strict=True):
                a.lerp_(b, 1 - decay)


def pipeline_run(config: StylistConfig, live: TinyPipeline, average: TinyPipeline) -> ModuleRun:
    """A run that trains UNet and style encoder of ``live`` and keeps their moving average."""
    modules = {
        "live_unet": live.unet,
        "live_style": live.style_encoder,
        "average_unet": average.unet,
        "average_style": average.style_encoder,
    }
    parameters = [p for m in (live.unet, live.style_encoder) for p in m.parameters() if p.requires_grad]
    hidden = hidden_weights(live.unet) + hidden_weights(live.style_encoder)
    return ModuleRun(config, modules, parameters, 1e-2, hidden)


@dataclass(frozen=True)
class Pictures:
    """One step's crops, uint8 ``[B, H, W, 3]``; of the photos each few in a row belong to one style."""

    style: Tensor
    content: Tensor
    target: Tensor


class StylistData:
    """Triplets, several of a style at a time."""

    def __init__(self, config: StylistConfig) -> None:
        """Read everything into memory. Raises RecipeError."""
        self.config = config
        self.groups = TripletSet(config.triplets, config.crop_px).by_style()

    def draw(self, step: int) -> Pictures:
        """The crops of a step, from random numbers of its own: so steps can be drawn in any order."""
        config, rng = self.config, np.random.default_rng([self.config.seed, step])
        styles, pairs = [], []
        for _ in range(config.styles):
            group = self.groups[int(rng.integers(len(self.groups)))]
            styles.append(crop_style(group[0][1], config.style_px, rng))
            chosen = rng.choice(len(group), config.photos, replace=len(group) < config.photos)
            pairs += [crop_pair(group[i], config.crop_px, rng) for i in chosen]
        return Pictures(_stacked(styles), *(_stacked(column) for column in zip(*pairs, strict=True)))

    def ahead(self, start: int) -> Iterator[Pictures]:
        """The crops of every step from ``start`` on, a few of them drawn ahead in threads."""
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        with ThreadPoolExecutor(workers, "std-rt-draw") as pool:
            waiting = deque(pool.submit(self.draw, start + i) for i in range(2 * workers))
            try:
                for step in count(start + len(waiting)):
                    yield waiting.popleft().result()
                    waiting.append(pool.submit(self.draw, step))
            finally:
                pool.shutdown(cancel_futures=True)


def _stacked(frames: Sequence[Frame]) -> Tensor:
    return torch.from_numpy(np.stack(frames))


class Stylist:
    """The networks of a run on their device, and its losses."""

    def __init__(self, config: StylistConfig, examples: Tensor) -> None:
        """``examples``: a few pictures as `images` takes them, on which latent channels are weighed."""
        self.config, self.device = config, choose_device(config.device)
        self.live = build_stylist(config)
        self.average = deepcopy(self.live)
        # GPUs convolve faster with the channels last; CPUs gained nothing.
        layout = torch.channels_last if self.device == "cuda" else torch.contiguous_format
        for p in (self.live, self.average):
            for part in (p.unet, p.style_encoder, p.vae):
                part.to(self.device, memory_format=layout)
        self.look = load_perceptual(config.perceptual).to(self.device) if config.perceptual else None
        self.vgg = load_perceptual(config.own_vgg).to(self.device) if config.own_vgg else None
        with torch.no_grad():
            latents = self.live.vae.encode(self.images(examples)).latents
        self.weights = latent_weights(self.live.vae, latents)

    def images(self, crops: Tensor) -> Tensor:
        """uint8 ``[B, H, W, 3]`` -> images ``[B, 3, H, W]`` in [-1, 1] on the device."""
        return crops.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1

    def precision(self) -> AbstractContextManager[None]:
        return precision_context("bf16" if self.config.bf16 else "fp32", self.device)

    def predict(self, x: Tensor, t: Tensor, told: Told) -> Tensor:
        """The live network's v, fp32."""
        tokens, pooled, ids, content = told
        return run_unet(self.live.unet, x, t, tokens, pooled, ids, content).float()

    def sample(self, pictures: Pictures, run: ModuleRun, own: int) -> Sample:
        """States on the triplets' trajectories; the last ``own`` at a random step of the network's own runs.

        Style is dropped for some of the others.
        """
        config = self.config
        with torch.no_grad():
            crops = pictures.style, pictures.content, pictures.target
            s, c, z = (self.live.vae.encode(self.images(x)).latents.float() for x in crops)
        etas = LOWEST_START_ETA, config.start_eta
        levels = draw_levels(
            len(z), run.rng, eta=config.eta, etas=etas, run_steps=config.run_steps, on_runs=0.9
        )
        states = noisy_states(z, c, self.live.schedule, levels, run.rng, run.generator)
        keep = torch.from_numpy(run.rng.random(len(z)) >= config.drop_style).float().to(self.device)
        keep[len(z) - own :] = 1
        tokens, pooled = (
            x.repeat_interleave(config.photos, 0) for x in self.live.style_encoder.encode_latents(s)
        )
        ids = random_time_ids(len(z), run.rng).to(self.device)
        told = tokens * keep[:, None, None], pooled * keep[:, None], ids, c
        return Sample(self.own_states(states, told, own, run) if own else states, told)

    def own_states(self, states: NoisyBatch, told: Told, own: int, run: ModuleRun) -> NoisyBatch:
        """``states`` with the last ``own`` at a random step of a run from the photo, by the live network."""
        tokens, pooled, ids, content = (x[-own:] for x in told)
        timesteps = trajectory_timesteps(self.config.eta, int(run.rng.choice(self.config.own_steps)))
        steps = self.live.schedule.coefficients(timesteps)
        at = int(run.rng.integers(len(steps)))
        noise = torch.randn(content.shape, generator=run.generator).to(self.device)

        def predict(x: Tensor, timestep: int, _: bool) -> Tensor:
            t = torch.full((own,), timestep, device=self.device)
            return self.predict(x, t, (tokens, pooled, ids, content))

        now = steps[at]
        x = now.alpha_t * content + now.sigma_t * noise
        if at:
            with torch.no_grad():
                x = denoise(content, predict, noise=[noise], steps=steps[:at], prediction_type="v_prediction")
        changed = {"x_t": x}
        for name, value in (("t", now.timestep), ("alpha", now.alpha_t), ("sigma", now.sigma_t)):
            changed[name] = torch.full_like(getattr(states, name)[-own:], value)
        return replace(states, **{k: torch.cat([getattr(states, k)[:-own], v]) for k, v in changed.items()})

    def loss(self, pictures: Pictures, run: ModuleRun, step: int) -> Tensor:
        """The weighted sum of the module docstring's losses."""
        config = self.config
        styles = config.own_styles if step >= config.own_from else 0
        own = styles * config.photos
        # In a context of its own: autocast would keep weights that it cast without gradients, of own runs.
        with self.precision(), attention_kernels(self.device):
            sample = self.sample(pictures, run, own)
        states = sample.states
        with self.precision(), attention_kernels(self.device):
            v = self.predict(states.x_t, states.t, sample.told)
        loss = v_loss(v, states, self.weights, most=3.0)
        run.add(latents=loss)
        if self.look is None:
            return loss
        with self.precision():
            picture = self.live.vae.decode(states.alpha * states.x_t - states.sigma * v).sample
            features = self.look(picture, 3)
            with torch.no_grad():
                target = self.live.vae.decode(states.z).sample
                wanted = self.look(target, 3)
        look = look_distance(picture.float(), features, target.float(), wanted)
        run.add(look=look)
        loss = loss + config.look_weight * look
        if own:
            style = self.images(pictures.style[-styles:])
            loss = loss + self.style_loss(picture[-own:], [f[-own:] for f in features], style, run)
        return loss

    def style_loss(self, picture: Tensor, features: list[Tensor], style: Tensor, run: ModuleRun) -> Tensor:
        """Gram matrices and colours of pictures against those of their styles, a scalar.

        ``picture [S P, 3, H, W]`` with its ``features``, ``style [S, 3, h, w]``: P pictures of each style.
        """
        assert self.look is not None
        config = self.config
        with self.precision():
            with torch.no_grad():
                wanted = self.look(style, 3)
            if self.vgg is not None:
                features = features + self.vgg(picture, 3)
                with torch.no_grad():
                    wanted = wanted + self.vgg(style, 3)
        like = relative_l1(mean_grams(features, config.photos), mean_grams(wanted, 1))
        beside = picture.float().unflatten(0, (-1, config.photos)).transpose(1, 2).flatten(2, 3)
        colour = colour_distance(beside, style, run.generator)
        run.add(style=like, colour=colour)
        return config.style_weight * like + config.colour_weight * colour


def look_distance(picture: Tensor, features: list[Tensor], target: Tensor, wanted: list[Tensor]) -> Tensor:
    """Features, Gram matrices and pixels of pictures against those of their targets, a scalar."""
    ours, theirs = ([f.float() for f in each] for each in (features, wanted))
    return feature_distance(ours, theirs) + gram_distance(ours, theirs) + 2 * F.l1_loss(picture, target)


def mean_grams(features: list[Tensor], photos: int) -> list[Tensor]:
    """Gram matrices ``[S, C, C]`` of each layer ``[S photos, C, h, w]``: the mean over each style's photos.

    What photos show comes and goes in the mean, as it does not in the Gram matrix of one.
    """
    return [gram(f.float()).unflatten(0, (-1, photos)).mean(1) for f in features]


def train_stylist(config: StylistConfig, stop_after: int | None = None) -> Path:
    """Train (or go on training); returns the diffusers folder of the averaged weights.

    ``stop_after`` ends the call at that step with a checkpoint written, as a kill would. The folder is also
    written at every snapshot, so that it can be looked at while the run goes on.
    """
    data = StylistData(config)
    stylist = Stylist(config, data.draw(0).content)
    run = pipeline_run(config, stylist.live, stylist.average)

    def rate(step: int) -> float:
        return linear_rate(config.learning_rate, step, config.steps, config.warmup, config.cooldown)

    for step, pictures in zip(run.steps(rate, stop_after), data.ahead(run.start), strict=False):
        run.update(stylist.loss(pictures, run, step), len(pictures.content))
        ema_update(stylist.average, stylist.live, step, config.ema_decay)
        if run.due(step):
            run.save(step)
            save_tiny(stylist.average, run.folder / "pipeline")
            if config.sheet.contents:
                copy = load_tiny(run.folder / "pipeline")
                run_sheet(copy, config.sheet, run.sheet(step), [(1, 1.0), (2, 1.0), (4, 1.0)])
    return run.folder / "pipeline"
