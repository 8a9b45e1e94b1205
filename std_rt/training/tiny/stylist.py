"""The stylist stage of std-tiny: a UNet that sees the content, taught by triplets.

Trajectories (``trajectories.py``) go from a photo's latents to those of its stylized form. The photo's clean
latents stand beside the noisy ones at the input, so that no drawing is lost to the noise and targets are
nearly determined: one or two steps are enough.

Losses on triplets: the squared error of v, and, with a ``perceptual`` network, features and Gram matrices of
the decoded clean estimate against those of the target, in a random window. The second is what makes strokes:
the first alone asks for the mean of all that is possible, which has none.

Losses without a target, with ``own_batch``: the network runs its own one or two steps from any photo under
any artwork, as the product does, and a decoded estimate is compared with the artwork (Gram matrices, colours)
and with the photo (features). So its pictures can become better than its teachers'.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
    content_distance,
    feature_distance,
    gram,
    gram_distance,
    load_perceptual,
    relative_l1,
)
from std_rt.pipeline.denoise import denoise
from std_rt.training.data.picture_set import Frame, load_pictures, random_crop
from std_rt.training.run.muon import hidden_weights
from std_rt.training.run.precision import attention_kernels, precision_context
from std_rt.training.run.recipe import LOWEST_START_ETA, StylistConfig
from std_rt.training.run.training_run import ModuleRun, cosine_rate
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
    watched_pairs,
)
from std_rt.training.tiny.triplets import TripletSet


@dataclass(frozen=True)
class Sample:
    """One batch on the training device: pictures in [-1, 1] and the latents made of them."""

    target: Tensor  # [B, 3, crop, crop]
    content: Tensor  # latents [B, C, crop / 8, crop / 8]
    noisy: NoisyBatch


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
        reason = one_line(error, 200)
        raise RecipeError(
            f"start_from = {config.start_from!r} does not fit the recipe's model: {reason}"
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
    muon = config.optimizer == "muon"
    hidden = hidden_weights(live.unet) + hidden_weights(live.style_encoder) if muon else []
    return ModuleRun(config, modules, parameters, 1e-2, hidden)


@dataclass(frozen=True)
class Pictures:
    """One step's crops, uint8 ``[B, H, W, 3]``.

    Each of ``art`` is for two of ``photos``: a style's features are a third of a sample's cost.
    """

    content: Tensor
    style: Tensor
    target: Tensor
    photos: Tensor | None = None  # without a target
    art: Tensor | None = None


class StylistData:
    """Triplets, and photos and artworks that have nothing to do with each other."""

    def __init__(self, config: StylistConfig) -> None:
        """Read everything into memory. Raises RecipeError."""
        self.config, data = config, config.data
        self.triplets = TripletSet(config.triplets, config.crop_px)
        if config.own_batch:
            self.photos = load_pictures(data.photos, data.sources)
            self.art = load_pictures(data.art, data.sources)

    def draw(self, step: int) -> Pictures:
        """The crops of a step, from random numbers of its own: so steps can be drawn in any order."""
        config, rng = self.config, np.random.default_rng([self.config.seed, step])
        rows = [self.triplets.draw(config.crop_px, config.style_px, rng) for _ in range(config.batch)]
        content, style, target = (_stacked(column) for column in zip(*rows, strict=True))
        if not config.own_batch:
            return Pictures(content, style, target)
        photos, art = (
            _stacked([random_crop(kind.frames[kind.draw(rng)], side, rng) for _ in range(n)])
            for kind, side, n in (
                (self.photos, config.own_px, config.own_batch),
                (self.art, config.style_px, -(-config.own_batch // 2)),
            )
        )
        return Pictures(content, style, target, photos, art)

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
        self.live, self.average = build_stylist(config), build_stylist(config)
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

    @torch.no_grad()
    def sample(self, pictures: Pictures, run: ModuleRun) -> Sample:
        """The triplets' latents, and states on trajectories between them."""
        content, style, target = map(self.images, (pictures.content, pictures.style, pictures.target))
        with self.precision():
            c, s, z = (self.live.vae.encode(x).latents.float() for x in (content, style, target))
        config = self.config
        etas, steps = (LOWEST_START_ETA, config.start_eta), config.run_steps
        levels = draw_levels(len(z), run.rng, eta=config.eta, etas=etas, run_steps=steps, on_runs=0.75)
        noisy = noisy_states(z, c, s, self.live.schedule, levels, run.rng, run.generator)
        return Sample(target, c, noisy)

    def precision(self) -> AbstractContextManager[None]:
        return precision_context("bf16" if self.config.bf16 else "fp32", self.device)

    def loss(self, sample: Sample, run: ModuleRun, step: int) -> Tensor:
        """v-loss plus, from ``look_from`` on, the weighted perceptual one."""
        config, batch = self.config, sample.noisy
        keep = torch.from_numpy(run.rng.random(config.batch) >= config.drop_style).float().to(self.device)
        ids = random_time_ids(config.batch, run.rng).to(self.device)
        with self.precision(), attention_kernels(self.device):
            tokens, pooled = self.live.style_encoder.encode_latents(batch.s)
            tokens, pooled = tokens * keep[:, None, None], pooled * keep[:, None]
            v = run_unet(self.live.unet, batch.x_t, batch.t, tokens, pooled, ids, sample.content).float()
        loss = v_loss(v, batch, self.weights, most=3.0)
        run.add(v=loss)
        loss = config.v_weight * loss
        if self.look is None or step < config.look_from:
            return loss
        return loss + config.look_weight * self._perceptual_loss(
            batch.alpha * batch.x_t - batch.sigma * v, sample, run
        )

    def _perceptual_loss(self, x_0: Tensor, sample: Sample, run: ModuleRun) -> Tensor:
        """Features and Grams of the decoded estimate against the target's, in one window for the batch."""
        assert self.look is not None
        side, room = self.config.look_px // 8, x_0.shape[-1] - self.config.look_px // 8
        y, x = (int(run.rng.integers(0, room + 1)) for _ in range(2))
        # A rim of two latents is decoded with it, so that the window's edge is not the decoder's.
        top, left = max(0, y - 2), max(0, x - 2)
        crop = x_0[:, :, top : y + side + 2, left : x + side + 2]
        rows, columns = (slice(8 * o, 8 * o + self.config.look_px) for o in (y, x))
        inner = tuple(slice(8 * (o - t), 8 * (o - t) + self.config.look_px) for o, t in ((y, top), (x, left)))
        with self.precision():
            picture = self.live.vae.decode(crop).sample[:, :, inner[0], inner[1]]
            with torch.no_grad():
                wanted = self.look(sample.target[:, :, rows, columns], 3)
            features = self.look(picture, 3)
        loss = feature_distance(features, wanted) + F.l1_loss(picture, sample.target[:, :, rows, columns])
        return loss + gram_distance([f.float() for f in features], [f.float() for f in wanted])

    def own_run_loss(self, photos: Tensor, art: Tensor, run: ModuleRun) -> Tensor:
        """Style, colours and content of a decoded estimate at a random step of the network's own run."""
        assert self.look is not None
        config, photo, style = self.config, self.images(photos), self.images(art)
        with self.precision(), attention_kernels(self.device):
            picture = self.live.vae.decode(self._own_estimate(photo, style, run)).sample.float()
            features = self.look(picture)
            with torch.no_grad():
                kept = self.look(photo)
            # The deepest level has too few positions in a crop for statistics: it stands for content alone.
            styled, wanted = features[:3], self.look(style, 3)
            if self.vgg is not None:
                styled, wanted = styled + self.vgg(picture, 3), wanted + self.vgg(style, 3)
        grams = [_twice(gram(f.float()), photo) for f in wanted]
        like = relative_l1([gram(f.float()) for f in styled], grams)
        deepest = zip(features[-2:], kept[-2:], strict=True)
        same = torch.stack([content_distance(f, k).mean() for f, k in deepest]).mean()
        colours = colour_distance(picture, _twice(style, photo), run.generator)
        run.add(style=like, content=same, colour=colours)
        return config.style_weight * like + config.content_weight * same + config.colour_weight * colours

    def _own_estimate(self, photo: Tensor, style: Tensor, run: ModuleRun) -> Tensor:
        """Clean latents as estimated at a random step of a run; gradients of that step only."""
        config, live = self.config, self.live
        timesteps = trajectory_timesteps(config.eta, int(run.rng.choice(config.own_steps)))
        coefficients = live.schedule.coefficients(timesteps)
        at = int(run.rng.integers(len(coefficients)))
        ids = random_time_ids(len(photo), run.rng).to(self.device)
        with torch.no_grad():
            content, s = (live.vae.encode(x).latents.float() for x in (photo, style))
        tokens, pooled = (_twice(x, photo) for x in live.style_encoder.encode_latents(s))
        noise = torch.randn(content.shape, generator=run.generator).to(self.device)

        def predict(x: Tensor, timestep: int, _: bool) -> Tensor:
            t = torch.full((len(x),), timestep, device=self.device)
            return run_unet(live.unet, x, t, tokens, pooled, ids, content).float()

        c = coefficients[at]
        x = c.alpha_t * content + c.sigma_t * noise
        if at:
            with torch.no_grad():
                x = denoise(
                    content, predict, noise=[noise], steps=coefficients[:at], prediction_type="v_prediction"
                )
        return c.alpha_t * x - c.sigma_t * predict(x, c.timestep, False)


def _twice(rows: Tensor, photos: Tensor) -> Tensor:
    """Each row for two photos, as `StylistData` draws them."""
    return rows.repeat_interleave(2, 0)[: len(photos)]


def train_stylist(config: StylistConfig, stop_after: int | None = None) -> Path:
    """Train (or go on training); returns the diffusers folder of the averaged weights.

    ``stop_after`` ends the call at that step with a checkpoint written, as a kill would. The folder is also
    written at every snapshot, so that it can be looked at while the run goes on.
    """
    if config.own_batch and not config.perceptual:
        raise RecipeError(
            "own_batch needs a perceptual network; set perceptual to its weights, or own_batch = 0"
        )
    data = StylistData(config)
    stylist = Stylist(config, data.draw(0).content)
    run = pipeline_run(config, stylist.live, stylist.average)
    pairs = watched_pairs(config.data)

    def rate(step: int) -> float:
        return cosine_rate(config.learning_rate, step, config.steps, config.warmup, 0.5)

    for step, pictures in zip(run.steps(rate, stop_after), data.ahead(run.start), strict=False):
        loss = stylist.loss(stylist.sample(pictures, run), run, step)
        if pictures.photos is not None and pictures.art is not None:
            loss = loss + stylist.own_run_loss(pictures.photos, pictures.art, run)
        run.update(loss, config.batch + config.own_batch)
        ema_update(stylist.average, stylist.live, step, config.ema_decay)
        if run.due(step):
            run.save(step)
            save_tiny(stylist.average, run.folder / "pipeline")
            copy = load_tiny(run.folder / "pipeline")
            run_sheet(copy, pairs, run.sheet(step), [(1, 1.0), (2, 1.0), (4, 1.0)])
    return run.folder / "pipeline"
