"""The motion stage of std-tiny: motion modules for a trained pipeline, whose own weights stay as they are.

Clips are generated (`scenes`), so where everything moves is known exactly. The modules see the frames of a
window together (diffusers' UNetMotionModel) and learn, on the network's own runs, that decoded frames agree
along that flow (``steadiness_weight``), neighbours and frames further apart. Blur and paleness would win
that alone. So some frames are held to what the pipeline paints of them frame by frame (features, Gram
matrices, means, and detail that is not weaker), and to the style picture (Gram matrices).

Modules start as a temporal mean of what is alike: the first half of each attention head holds the principal
parts of the features, queries and keys are these themselves, and the second half receives the mean of the
values. What comes out of a module is zero at first and learned at the full rate, all else at a sixth of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import MotionAdapter
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import StepCoefficients, trajectory_timesteps
from std_rt.models.components import motion_unet, quiet
from std_rt.models.perceptual import (
    feature_distance,
    gram,
    gram_distance,
    load_perceptual,
    relative_norm,
)
from std_rt.pipeline.denoise import denoise
from std_rt.training.data.picture_set import Frame, load_pictures
from std_rt.training.distil.lora import Average
from std_rt.training.run.precision import attention_kernels, choose_device, precision_context
from std_rt.training.run.recipe import MotionStageConfig
from std_rt.training.run.sheet import save_sheet, to_frames, to_tensor
from std_rt.training.run.training_run import ModuleRun, cosine_rate
from std_rt.training.tiny.scenes import Scene, camera, draw_scene
from std_rt.training.tiny.tiny_pipeline import load_tiny, random_time_ids, run_unet
from std_rt.training.tiny.triplets import crop_style

_HELD = 2  # frames of a clip that are held to their looks
_FAR = 4  # pairs of frames further apart
_HEADS = 4


@dataclass(frozen=True)
class Sample:
    """One clip of T frames and what is told of it."""

    scene: Scene
    images: Tensor  # [T, 3, S, S] in [-1, 1], as the camera took them
    z: Tensor  # [T, C, h, w] their latents
    noise: Tensor  # [T, C, h, w]
    style: Tensor  # [1, 3, P, P]
    tokens: Tensor  # [1, N, D]
    pooled: Tensor  # [1, P]
    time_ids: Tensor  # [1, 6]


class MotionStage:
    """The networks of a run on their device, and its losses."""

    def __init__(self, config: MotionStageConfig) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, choose_device(config.device)
        self.tiny = load_tiny(_pipeline_folder(config.base))
        for part in (self.tiny.unet, self.tiny.vae, self.tiny.style_encoder):
            part.requires_grad_(False).to(self.device)
        self.look = load_perceptual(config.perceptual, reflect=False).to(self.device)
        if config.bf16:
            self.look.to(torch.bfloat16)  # once, not in every step: it is frozen
        self.photos = load_pictures(config.photos, min_px=config.crop_px)
        self.art = load_pictures(config.art)
        self.adapter = MotionAdapter(
            block_out_channels=self.tiny.unet.config.block_out_channels,
            motion_layers_per_block=self.tiny.unet.config.layers_per_block,
            motion_num_attention_heads=_HEADS,
            motion_norm_num_groups=self.tiny.unet.config.norm_num_groups,
            motion_max_seq_length=2 * max(config.frames),
            use_motion_mid_block=False,
        )
        self.motion: Any = motion_unet(self.tiny.unet, self.adapter).to(self.device)
        self.parameters = {n: p for n, p in self.motion.named_parameters() if "motion_modules" in n}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.average = Average(self.parameters)

    def run(self) -> ModuleRun:
        """A run that trains the modules and keeps the moving average of their weights."""
        out = [p for n, p in self.parameters.items() if ".proj_out." in n]
        rest = [p for n, p in self.parameters.items() if ".proj_out." not in n]
        parts = {"modules": self.parameters, "average": self.average.tensors}
        return ModuleRun(self.config, parts, [*out, *rest], 1e-2, slower=rest)

    def save(self, folder: Path) -> None:
        """The averaged modules as a diffusers MotionAdapter folder."""
        with quiet("diffusers"):
            self.adapter.load_state_dict(self.average.tensors, strict=False)  # positions are not trained
            self.adapter.save_pretrained(folder)

    # --- samples --------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, rng: np.random.Generator, generator: torch.Generator) -> Sample:
        """The next clip, in a random style."""
        config = self.config
        scene = draw_scene(self.photos.frames, int(rng.choice(config.frames)), config.crop_px, rng)
        images = to_tensor(list(camera(scene.frames, rng))).to(self.device)
        px = self.tiny.style_encoder.image_px
        style = to_tensor([crop_style(self.art.frames[self.art.draw(rng)], px, rng)]).to(self.device)
        z = self.tiny.vae.encode(images).latents.float()
        noise = torch.randn(z.shape[1:], generator=generator)
        scale = config.crop_px // z.shape[-1]
        noise = torch.stack(moved(noise, scene, scale) if rng.random() < 0.5 else [noise] * len(z))
        tokens, pooled = (x.float() for x in self.tiny.style_encoder(style))
        ids = random_time_ids(1, rng).to(self.device)
        return Sample(scene, images, z, noise.to(self.device), style, tokens, pooled, ids)

    def windowed(self, sample: Sample, x: Tensor, timestep: int) -> Tensor:
        """v of all frames, seen together."""
        added = {
            "text_embeds": sample.pooled,
            "time_ids": sample.time_ids,
            "image_embeds": [sample.tokens[:, None]],
        }
        null = x.new_zeros(len(x), 1, self.motion.config.cross_attention_dim)
        seen = torch.cat([x, sample.z], 1).transpose(0, 1)[None]
        t = torch.tensor([timestep], device=x.device)
        v = self.motion(seen, t, null, added_cond_kwargs=added, return_dict=False)[0]
        return v[0].transpose(0, 1).float()

    def frame_wise(self, sample: Sample, held: Sequence[int], steps: Sequence[StepCoefficients]) -> Tensor:
        """What the pipeline paints of some frames, each by itself [F, 3, S, S]."""
        z, n = sample.z[held], len(held)
        tokens, pooled, ids = (
            x.expand(n, *x.shape[1:]) for x in (sample.tokens, sample.pooled, sample.time_ids)
        )

        def predict(x: Tensor, timestep: int, _: bool) -> Tensor:
            t = torch.full((n,), timestep, device=x.device)
            return run_unet(self.tiny.unet, x, t, tokens, pooled, ids, z).float()

        done = denoise(z, predict, noise=[sample.noise[held]], steps=steps, prediction_type="v_prediction")
        return self.tiny.vae.decode(done).sample.float().clamp(-1, 1)

    # --- losses ---------------------------------------------------------------------------------------

    def loss(self, run: ModuleRun) -> Tensor:
        """The weighted sum of the module docstring's losses, at a random step of a run on a new clip."""
        config = self.config
        precision = partial(precision_context, "bf16" if config.bf16 else "fp32", self.device)
        timesteps = trajectory_timesteps(config.eta, int(run.rng.choice(config.own_steps)))
        steps = self.tiny.schedule.coefficients(timesteps)
        at = int(run.rng.integers(len(steps)))
        with attention_kernels(self.device):
            # In a context of its own: autocast would keep weights that it cast without gradients.
            with precision(), torch.no_grad():
                sample = self.sample(run.rng, run.generator)
                held = sorted(run.rng.choice(len(sample.z), _HELD, replace=False).tolist())
                wanted = self.frame_wise(sample, held, steps)
                theirs, style = self.features(wanted), self.features(sample.style)
                x = self.state_after(sample, steps, at)
            now = steps[at]
            with precision():
                v = self.windowed(sample, x, now.timestep)
                painted = self.tiny.vae.decode(now.alpha_t * x - now.sigma_t * v).sample.float()
                ours = self.features(painted[held])
        unsteady = unsteadiness(painted, sample.scene, run.rng)
        grams = [gram(f) for f in ours]
        like = relative_norm(grams, [gram(f).expand_as(g) for f, g in zip(style, grams, strict=True)])
        kept = gram_distance(ours, theirs) + 0.3 * feature_distance(ours, theirs)
        means = F.avg_pool2d(painted[held] - wanted, 8).abs().mean()
        softer = (detail(wanted).log() - detail(painted[held]).log()).clamp_min(0).mean()
        run.add(unsteadiness=unsteady, style=like.mean(), kept=kept, means=means, softer=softer)
        loss = config.steadiness_weight * unsteady + config.style_weight * like.mean()
        return loss + config.kept_weight * (kept + means + softer)

    def features(self, images: Tensor) -> list[Tensor]:
        """Perceptual features, fp32, a tensor a layer."""
        return [f.float() for f in self.look(images.to(next(self.look.parameters())), 3)]

    def state_after(self, sample: Sample, steps: Sequence[StepCoefficients], at: int) -> Tensor:
        """The latents of all frames after ``at`` steps of a run."""
        if not at:
            return steps[0].alpha_t * sample.z + steps[0].sigma_t * sample.noise

        def predict(x: Tensor, timestep: int, _: bool) -> Tensor:
            return self.windowed(sample, x, timestep)

        return denoise(
            sample.z, predict, noise=[sample.noise], steps=steps[:at], prediction_type="v_prediction"
        )

    @torch.no_grad()
    def start(self, run: ModuleRun, clips: int = 6) -> None:
        """Set up the modules as the module docstring says, by the features of some clips."""
        modules = {n: m for n, m in self.motion.named_modules() if isinstance(m, AnimateDiffTransformer3D)}
        seen: dict[str, list[Tensor]] = {name: [] for name in modules}

        def note(name: str, _: Any, __: Any, normed: Tensor) -> None:
            rows = normed.detach().float().movedim(1, -1)
            seen[name].append(rows.reshape(-1, normed.shape[1])[::7])

        hooks = [m.norm.register_forward_hook(partial(note, n)) for n, m in modules.items()]
        steps = self.tiny.schedule.coefficients(trajectory_timesteps(self.config.eta, 2))
        for _ in range(clips):
            self.state_after(self.sample(run.rng, run.generator), steps, len(steps))
        for hook in hooks:
            hook.remove()
        for name, module in modules.items():
            start_module(module, torch.cat(seen[name]))
        for name, value in self.parameters.items():
            self.average.tensors[name].copy_(value)

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        """Slices over time, downwards, of three clips, always the same: clip, frame by frame, windowed."""
        rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
        steps = self.tiny.schedule.coefficients(trajectory_timesteps(self.config.eta, 2))
        rows: list[list[Frame]] = []
        for _ in range(3):
            sample = self.sample(rng, generator)
            every = range(len(sample.z))
            painted = self.tiny.vae.decode(self.state_after(sample, steps, len(steps))).sample
            middle = sample.images.shape[2] // 2
            strips = (
                x[:, :, middle].transpose(0, 1)[None].repeat_interleave(6, 2)
                for x in (sample.images, self.frame_wise(sample, every, steps), painted)
            )
            rows.append([to_frames(strip)[0] for strip in strips])
        height = min(frame.shape[0] for row in rows for frame in row)
        names = ("clip", "frame by frame", "windows")
        save_sheet(path, [[frame[:height] for frame in row] for row in rows], names)


def start_module(module: Any, features: Tensor) -> None:
    """Set up one motion module in place; ``features [N, C]`` as its projection gets them."""
    channels = features.shape[1]
    spread = torch.linalg.eigh(torch.cov(features.T)).eigenvectors.flip(1).T[: channels // 2]
    width = channels // module.transformer_blocks[0].attn1.heads
    own = torch.arange(channels).unflatten(0, (-1, width))[:, : width // 2].flatten()
    block, same = module.transformer_blocks[0], torch.eye(channels)
    # Strong ones in every head.
    order = torch.arange(channels // 2).unflatten(0, (width // 2, -1)).T.flatten()
    ends = (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2])
    for layer in (module.proj_in, *ends, module.proj_out):
        layer.weight.zero_()
        layer.bias.zero_()
    module.proj_in.weight[own] = spread[order].to(module.proj_in.weight)
    for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
        layer.weight.copy_(same)
    block.attn1.to_out[0].weight[own + width // 2, own] = 1


def moved(noise: Tensor, scene: Scene, scale: int) -> list[Tensor]:
    """``noise [C, h, w]`` of every frame, rolled by whole cells of ``scale`` px along with the ground."""
    centre = np.array([scene.frames.shape[2] / 2, scene.frames.shape[1] / 2, 1])
    poses = scene.poses[0]
    rolled = []
    for pose in poses:
        across, down = np.rint((np.linalg.solve(pose, poses[0] @ centre) - centre)[:2] / scale)
        rolled.append(noise.roll((int(down), int(across)), (1, 2)))
    return rolled


def unsteadiness(painted: Tensor, scene: Scene, rng: np.random.Generator) -> Tensor:
    """Mean absolute difference, 0..1, of painted frames ``[T, 3, S, S]`` from others carried along the flow.

    Of neighbours, and with half the weight of some pairs further apart.
    """
    count = len(painted)
    near = [(t, t - 1) for t in range(1, count)]
    later = rng.choice(np.arange(2, count), min(_FAR, count - 2), replace=False)
    far = [(int(t), int(rng.integers(t - 1))) for t in later]
    total = painted.new_zeros(())
    for pairs, weight in ((near, 1.0), (far, 0.5)):
        flows = [scene.flow(*pair) for pair in pairs]
        source = torch.from_numpy(np.stack([flow for flow, _ in flows])).to(painted)
        known = torch.from_numpy(np.stack([known for _, known in flows]))[:, None].to(painted)
        after, before = (list(frames) for frames in zip(*pairs, strict=True))
        # Cubic: bilinear sampling would ask for blur.
        grid = source * (2 / (painted.shape[-1] - 1)) - 1
        carried = F.grid_sample(painted[before], grid, "bicubic", "border", align_corners=True)
        gap = (carried - painted[after]).abs() * known
        total = total + weight * gap.sum() / (2 * 3 * known.sum() + 1)
    return total


def detail(images: Tensor) -> Tensor:
    """Mean square ``[B]`` of what a blur of 7 px takes away in grey; 1e-5 more."""
    grey = images.mean(1, keepdim=True)
    fine = grey - F.avg_pool2d(F.pad(grey, (3,) * 4, mode="reflect"), 7, 1)
    return fine.square().mean((1, 2, 3)) + 1e-5


def _pipeline_folder(base: str) -> Path:
    folder = Path(base)
    if not (folder / "ip_adapter.safetensors").is_file():
        raise RecipeError(
            f"base = {base!r} is not a std-tiny pipeline; get the built-in one: "
            f"std-rt bundles unpack std-tiny -o {base}"
        )
    return folder


def train_motion(config: MotionStageConfig, stop_after: int | None = None) -> Path:
    """Train (or go on training) the modules; returns the folder of the averaged ones, a MotionAdapter.

    ``stop_after`` ends the call at that step with a checkpoint written, as a kill would.
    """
    stage = MotionStage(config)
    run = stage.run()
    folder = run.folder / "adapter"
    with closing(run):
        if run.start == 0:
            stage.start(run)
        for step in run.steps(lambda i: cosine_rate(config.learning_rate, i, config.steps, 30), stop_after):
            run.update(stage.loss(run), 1)
            stage.average.update(min(config.ema_decay, (step + 1) / (step + 10)))
            if run.due(step):
                run.save(step)
                stage.save(folder)
                stage.sheet(run.sheet(step))
    return folder
