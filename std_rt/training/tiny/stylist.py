"""The stylist stage of std-tiny: a UNet that sees the content, taught by triplets, then by style pictures.

Trajectories (``trajectories.py``) go from a photo's latents to those of its stylized form. The photo's clean
latents stand beside the noisy ones at the input, so that no drawing is lost to the noise and targets are
nearly determined: one or two steps are enough.

Losses: on the triplets' trajectories the squared error of v, each latent channel weighed by what the decoder
makes of it; with a ``perceptual`` network, the decoded clean estimate against the target (features, Gram
matrices, pixels). The second is what makes strokes: the first alone asks for the mean of all that is
possible, which has none. And for ``own_styles`` of the styles the samples are the network's own runs, as the
product makes them: their decoded estimates are compared with the style picture itself (Gram matrices,
colours) and with the photo (content), so they can become better than the teachers'. There the decoder may
learn too (``reconstruction_weight``): held to what an autoencoder can return, strokes would stay soft.
More losses hold what Gram matrices do not forbid: a pattern of the decoder's period (``lattice_weight``), and
own runs that change when a part of the photo is run alone (``steadiness_weight``; ``edge_weight`` along that
part's edges).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, closing
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from std_rt.core.errors import RecipeError, one_line
from std_rt.core.schedule import StepCoefficients, trajectory_timesteps
from std_rt.models.perceptual import (
    colour_distance,
    content_distance,
    feature_distance,
    gram,
    gram_distance,
    lattice,
    load_perceptual,
    relative_l1,
    relative_norm,
)
from std_rt.pipeline.denoise import denoise
from std_rt.training.run.muon import hidden_weights
from std_rt.training.run.precision import attention_kernels, choose_device, precision_context
from std_rt.training.run.recipe import LOWEST_START_ETA, StylistConfig
from std_rt.training.run.training_run import ModuleRun, linear_rate
from std_rt.training.tiny.autoencoder_parts import (
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
from std_rt.training.tiny.triplets import Pictures, StylistData

_CUT_PX = 32
_EDGE_PX = 16
Told = tuple[Tensor, Tensor, Tensor, Tensor]  # style tokens, pooled style, time ids, content latents


@dataclass(frozen=True)
class Sample:
    """States on trajectories, and what the UNet is told beside them; a row a sample.

    ``styled [B]``: false where no style was told; ``style [S, C, h, w]``: the style pictures' latents.
    ``course``: that of the own runs.
    """

    states: NoisyBatch
    told: Told
    styled: Tensor
    style: Tensor
    course: Course | None


@dataclass(frozen=True)
class Course:
    """Own runs from ``noise [B, C, h, w]`` as far as the state before the last of ``steps``."""

    noise: Tensor
    steps: tuple[StepCoefficients, ...]

    def corner(self, n: int, side: int) -> Course:
        """Its first ``n`` samples, as far as ``side`` latents from the top left."""
        return replace(self, noise=self.noise[:n, :, :side, :side])


def _last(told: Told, n: int) -> Told:
    tokens, pooled, ids, content = (x[-n:] for x in told)
    return tokens, pooled, ids, content


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
        for ours, theirs in zip(_trained(average).values(), _trained(live).values(), strict=True):
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                a.lerp_(b, 1 - decay)


def _trained(pipeline: TinyPipeline) -> dict[str, nn.Module]:
    """What a run trains; the decoder only where its weights are not frozen."""
    return {"unet": pipeline.unet, "style": pipeline.style_encoder, "decoder": pipeline.vae.decoder}


def pipeline_run(config: StylistConfig, live: TinyPipeline, average: TinyPipeline) -> ModuleRun:
    """A run that trains ``live`` and keeps the moving average of its weights."""
    both = {"live": live, "average": average}
    modules = {f"{kind}_{k}": m for kind, pipeline in both.items() for k, m in _trained(pipeline).items()}
    parameters = [p for m in _trained(live).values() for p in m.parameters() if p.requires_grad]
    hidden = hidden_weights(live.unet) + hidden_weights(live.style_encoder)
    return ModuleRun(config, modules, parameters, 1e-2, hidden)


@dataclass(frozen=True)
class Compared:
    """Pictures ``[B, 3, H, W]`` in [-1, 1] with their perceptual features, a tensor a layer."""

    images: Tensor
    features: list[Tensor]

    def rows(self, start: int, stop: int) -> Compared:
        """Some of the samples."""
        return Compared(self.images[start:stop], [f[start:stop] for f in self.features])


class Stylist:
    """The networks of a run on their device, and its losses."""

    def __init__(self, config: StylistConfig, examples: Tensor) -> None:
        """``examples``: a few pictures as `images` takes them, on which latent channels are weighed."""
        self.config, self.device = config, choose_device(config.device)
        # In 16 bits channels last is faster; CPUs gain nothing from it in fp32.
        wide = self.device == "cuda" or config.bf16
        self.layout = torch.channels_last if wide else torch.contiguous_format
        self.live = build_stylist(config)
        self.live.vae.decoder.requires_grad_(config.reconstruction_weight > 0)
        self.average = deepcopy(self.live)
        self.look = load_perceptual(config.perceptual, reflect=False) if config.perceptual else None
        if self.look is not None and config.bf16:
            self.look.to(torch.bfloat16)  # once, not in every step: it is frozen
        networks: list[Any] = [n for p in (self.live, self.average) for n in (p.unet, p.style_encoder, p.vae)]
        for network in [*networks, *([self.look] if self.look else [])]:
            network.to(self.device, memory_format=self.layout)
        with torch.no_grad():
            latents = self.live.vae.encode(self.images(examples)).latents
        self.weights = latent_weights(self.live.vae, latents)

    def images(self, crops: Tensor) -> Tensor:
        """uint8 ``[B, H, W, 3]`` -> images ``[B, 3, H, W]`` in [-1, 1] on the device."""
        images = crops.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images.contiguous(memory_format=self.layout)

    def precision(self) -> AbstractContextManager[None]:
        return precision_context("bf16" if self.config.bf16 else "fp32", self.device)

    def predict(self, x: Tensor, t: Tensor, told: Told) -> Tensor:
        """The live network's v, fp32."""
        tokens, pooled, ids, content = told
        return run_unet(self.live.unet, x, t, tokens, pooled, ids, content).float()

    def decoded(self, x: Tensor, v: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """The picture of the clean estimate ``[B, 3, H, W]``, not clamped."""
        with self.precision():
            return self.live.vae.decode(alpha * x - sigma * v).sample.float()

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
        dropped = 1.0 if config.reverse else config.drop_style
        styled = torch.from_numpy(run.rng.random(len(z)) >= dropped).to(self.device)
        with self.precision():
            tokens, pooled = (
                x.float().repeat_interleave(config.photos, 0)
                for x in self.live.style_encoder.encode_latents(s)
            )
        ids = random_time_ids(len(z), run.rng).to(self.device)
        told = tokens * styled[:, None, None], pooled * styled[:, None], ids, c
        if not own:
            return Sample(states, told, styled, s, None)
        course = self.course(c[-own:].shape, run)
        states = self.own_states(states, _last(told, own), course)
        return Sample(states, told, styled, s, course)

    def course(self, shape: torch.Size, run: ModuleRun) -> Course:
        """Noise, and a random number of the first steps of a run."""
        timesteps = trajectory_timesteps(self.config.eta, int(run.rng.choice(self.config.own_steps)))
        steps = self.live.schedule.coefficients(timesteps)
        at = int(run.rng.integers(len(steps)))
        return Course(torch.randn(shape, generator=run.generator).to(self.device), tuple(steps[: at + 1]))

    def own_states(self, states: NoisyBatch, told: Told, course: Course) -> NoisyBatch:
        """``states`` with the last ones on a run of the live network from the photo; ``told``: their rows."""
        own, now = len(course.noise), course.steps[-1]
        changed = {"x_t": self.state_on(course, told)}
        for name, value in (("t", now.timestep), ("alpha", now.alpha_t), ("sigma", now.sigma_t)):
            changed[name] = torch.full_like(getattr(states, name)[-own:], value)
        return replace(states, **{k: torch.cat([getattr(states, k)[:-own], v]) for k, v in changed.items()})

    def state_on(self, course: Course, told: Told) -> Tensor:
        """The latents before the last step of ``course``, without gradients."""
        content, now = told[3], course.steps[-1]

        def predict(x: Tensor, timestep: int, _: bool) -> Tensor:
            return self.predict(x, torch.full((len(x),), timestep, device=self.device), told)

        if len(course.steps) == 1:
            return now.alpha_t * content + now.sigma_t * course.noise
        before = course.steps[:-1]
        with torch.no_grad():
            return denoise(
                content, predict, noise=[course.noise], steps=before, prediction_type="v_prediction"
            )

    def loss(self, pictures: Pictures, run: ModuleRun) -> Tensor:
        """The weighted sum of the module docstring's losses."""
        config = self.config
        own = config.own_styles * config.photos
        others = len(pictures.content) - own
        # In a context of its own: autocast would keep weights that it cast without gradients, of own runs.
        with self.precision(), attention_kernels(self.device):
            sample = self.sample(pictures, run, own)
        states = sample.states
        with self.precision(), attention_kernels(self.device):
            v = self.predict(states.x_t, states.t, sample.told)
        loss = v.new_zeros(())
        if others:
            loss = v_loss(v[:others], states.first(others), self.weights, most=3.0)
            run.add(latents=loss)
        if config.reconstruction_weight:
            loss = loss + config.reconstruction_weight * self.reconstruction(sample, pictures, run)
        if self.look is None:
            return loss
        picture = self.decoded(states.x_t, v, states.alpha, states.sigma)
        loss = loss + self.look_loss(picture, pictures, sample.styled, run)
        if config.lattice_weight:
            pattern = lattice(picture).mean()
            run.add(lattice=pattern)
            loss = loss + config.lattice_weight * pattern
        if config.steady_photos:
            loss = loss + self.steadiness(picture[others:], pictures, sample, run)
        return loss

    def steadiness(self, picture: Tensor, pictures: Pictures, sample: Sample, run: ModuleRun) -> Tensor:
        """L1 of a few own runs against the same on a part of their photos, noisier and brighter, weighted.

        The part is 32 px smaller, at any whole pixel (resampling would ask for blur), and the noise that the
        run starts from stays in its place, as it does in a clip. So nothing may hang on the decoder's grid.
        The edges of the part lie inside the whole, whose picture they must follow: scribbles along the edges
        would win style and cost no content. ``picture``: the own runs' decoded estimates.
        """
        assert sample.course is not None
        n, own = self.config.steady_photos, len(picture)
        y, x = (int(shift) for shift in run.rng.integers(0, _CUT_PX + 1, 2))
        side = picture.shape[-1] - _CUT_PX
        part = ..., slice(y, y + side), slice(x, x + side)
        photo = self.images(pictures.content[-own:][:n])[part]
        gain, grain = run.rng.uniform(0.97, 1.03), run.rng.uniform(0, 0.04)
        noise = torch.randn(photo.shape, generator=run.generator).to(self.device)
        course = sample.course.corner(n, side // (picture.shape[-1] // sample.course.noise.shape[-1]))
        with self.precision(), attention_kernels(self.device), torch.no_grad():
            again = self.live.vae.encode((gain * photo + grain * noise).clamp(-1, 1)).latents.float()
            tokens, pooled, ids = (value[-own:][:n] for value in sample.told[:3])
            told = tokens, pooled, ids, again
            state = self.state_on(course, told)
        now = course.steps[-1]
        with self.precision(), attention_kernels(self.device):
            v = self.predict(state, torch.full((n,), now.timestep, device=self.device), told)
        ours = self.decoded(state, v, now.alpha_t, now.sigma_t)
        wanted = picture[:n][part]
        loss, edges = F.l1_loss(ours, wanted), edge_distance(ours, wanted.detach())
        run.add(unsteadiness=loss, edges=edges)
        return self.config.steadiness_weight * loss + self.config.edge_weight * edges

    def reconstruction(self, sample: Sample, pictures: Pictures, run: ModuleRun) -> Tensor:
        """L1 of a few photos and a style picture that went through the autoencoder, a scalar."""
        few = len(pictures.content) // 4 + 1
        pairs = (
            (sample.told[3][:few], self.images(pictures.content[:few])),
            (sample.style[:1], self.images(pictures.style[:1])),
        )
        with self.precision():
            losses = [F.l1_loss(self.live.vae.decode(z).sample.float(), image) for z, image in pairs]
        loss = (losses[0] + losses[1]) / 2
        run.add(reconstruction=loss)
        return loss

    def look_loss(self, picture: Tensor, pictures: Pictures, styled: Tensor, run: ModuleRun) -> Tensor:
        """Decoded estimates ``[B, 3, H, W]`` against their targets; own runs also against style and photo."""
        assert self.look is not None
        config = self.config
        own, generated = (n * config.photos for n in (config.own_styles, config.generated_styles))
        # In half of the steps scribbles along the edges win nothing. Never judged, edges would go astray.
        edge_px = int(run.rng.integers(2)) * _EDGE_PX if own else 0
        picture, content, target = (
            inside(x, edge_px) for x in (picture, self.images(pictures.content), self.images(pictures.target))
        )
        # Without a style an own run gives the photo back.
        plain = ~styled
        plain[: len(picture) - own] = False
        target = torch.where(plain[:, None, None, None], content, target)
        with self.precision():
            features = self.look(picture)
            with torch.no_grad():
                wanted = self.look(target)
        # Own runs have the style picture's Gram matrices to follow. The marks of a generated style have no
        # given places: only their means are asked for.
        ours, theirs, count = Compared(picture, features), Compared(target, wanted), len(picture)
        parts = (0, count - own, look_distance), (count - own, count - generated, place_distance)
        look = picture.new_zeros(())
        for start, stop, distance in (*parts, (count - generated, count, means_distance)):
            if stop > start:
                part = distance(ours.rows(start, stop), theirs.rows(start, stop))
                look = look + part * (stop - start) / count
        run.add(look=look)
        loss = config.look_weight * look
        if own:
            exact = plain | (torch.arange(count, device=self.device) >= count - generated)
            ours, theirs = (x.rows(count - own, count) for x in (ours, theirs))
            style = self.images(pictures.style[-config.own_styles :])
            loss = loss + self.own_loss(ours, theirs, exact[-own:], style, content[-own:], run)
        return loss

    def own_loss(
        self,
        ours: Compared,
        target: Compared,
        exact: Tensor,
        style: Tensor,
        photo: Tensor,
        run: ModuleRun,
    ) -> Tensor:
        """Gram matrices and colours of own runs against those of their styles, content against the photo's.

        ``exact [B]``: samples whose targets are known, and stand in the place of ``style [S, 3, H, W]`` and
        ``photo [B, 3, H, W]``.
        """
        assert self.look is not None
        config = self.config
        with torch.no_grad(), self.precision():
            of_style = [gram(f).float().repeat_interleave(config.photos, 0) for f in self.look(style)]
            drawing = self.look(photo)[-1]
        wanted = [
            torch.where(exact[:, None, None], gram(a).float(), b)
            for a, b in zip(target.features, of_style, strict=True)
        ]
        grams = [gram(f).float() for f in ours.features]
        like = (relative_l1(grams, wanted) + relative_norm(grams, wanted).mean()) / 2
        styles = style.repeat_interleave(config.photos, 0)
        colour = like.new_zeros(())
        for rows, others in ((~exact, styles), (exact, target.images)):
            if rows.any():
                apart = colour_distance(ours.images[rows], others[rows], run.generator)
                colour = colour + apart * rows.float().mean()
        content = (content_distance(ours.features[-1], drawing) * ~exact).mean()
        run.add(style=like, colour=colour, content=content)
        return config.style_weight * like + config.colour_weight * colour + config.content_weight * content


def inside(images: Tensor, edge_px: int) -> Tensor:
    """``[B, C, H, W]`` without ``edge_px`` pixels at each side."""
    return images[..., edge_px : images.shape[-2] - edge_px, edge_px : images.shape[-1] - edge_px]


def edge_distance(ours: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of two batches of pictures along their edges, 16 px wide, a scalar."""
    gap = (ours - wanted).abs()
    inner = inside(gap, _EDGE_PX)
    return (gap.sum() - inner.sum()) / (gap.numel() - inner.numel())


def look_distance(ours: Compared, target: Compared) -> Tensor:
    """Features, Gram matrices and pixels of pictures against those of their targets, a scalar."""
    return place_distance(ours, target) + gram_distance(
        *([f.float() for f in x.features] for x in (ours, target))
    )


def place_distance(ours: Compared, target: Compared) -> Tensor:
    """Features and pixels of pictures against those of their targets, a scalar."""
    features = feature_distance(ours.features, target.features)
    return features + 2 * F.l1_loss(ours.images, target.images)


def means_distance(ours: Compared, target: Compared) -> Tensor:
    """Means over 8x8 pixels of pictures against those of their targets, a scalar."""
    return 2 * F.avg_pool2d(ours.images - target.images, 8).abs().mean()


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

    with closing(run):
        for step, pictures in zip(run.steps(rate, stop_after), data.ahead(run.start), strict=False):
            run.update(stylist.loss(pictures, run), len(pictures.content))
            ema_update(stylist.average, stylist.live, step, config.ema_decay)
            if run.due(step):
                run.save(step)
                save_tiny(stylist.average, run.folder / "pipeline")
                if config.sheet.contents:
                    copy = load_tiny(run.folder / "pipeline")
                    settings = [(1, 1.0), (2, 1.0), (4, 1.0)]
                    run_sheet(copy, config.sheet, run.sheet(step), settings, styled=not config.reverse)
    return run.folder / "pipeline"
