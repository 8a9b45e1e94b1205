"""UNets that see more than the noisy latents, against diffusers' own pipelines and the training's sampler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_inpaint as xl_inpaint
from PIL import Image
from support.pipelines import randomize, write_clip_pipeline

from std_rt import Stylizer
from std_rt.core.bundle import CONTENT, Bundle
from std_rt.core.errors import ExportError
from std_rt.core.schedule import NoiseSchedule
from std_rt.evaluation.bench import sample_frame
from std_rt.export.build import export_pipeline
from std_rt.models.autoencoder import AutoencoderPixelShuffle
from std_rt.pipeline.mask import Mask
from std_rt.pipeline.stylizer import State
from std_rt.streaming.frame_stream import ONE_BY_ONE, STREAM_BATCH, FrameStream
from std_rt.training.run.recipe import UNetConfig
from std_rt.training.tiny.tiny_pipeline import TinyPipeline, new_pipeline, save_tiny
from std_rt.training.tiny.trajectories import sample

Frame = np.ndarray
SIZE = (64, 96)  # (H, W)
PROMPT, NEGATIVE = "in ink", "dull grey"
CONTENT_FRAME, STYLE = sample_frame(*SIZE), sample_frame(32, 32, seed=1)


def peak_db(found: Frame, wanted: Frame) -> float:
    """PSNR of 8-bit pictures."""
    error = np.mean((found.astype(np.float64) - wanted) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def image(frame: Frame) -> torch.Tensor:
    """[1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(frame.transpose(2, 0, 1)[None].astype(np.float32)) / 127.5 - 1


def noise(channels: int, scale: int) -> np.ndarray:
    """[1, C, h, w]."""
    shape = (1, channels, SIZE[0] // scale, SIZE[1] // scale)
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def diffusers_pipeline(kind: Any, source: Path, **more: Any) -> Any:
    """A pipeline of the class ``kind`` from the parts in ``source``, with TCD, without the style's."""
    parts = StableDiffusionXLPipeline.from_pretrained(source).components
    parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    parts["scheduler"] = TCDScheduler.from_config(parts["scheduler"].config)
    pipe = kind(**parts, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stylized(bundle: Bundle, strength: float = 1.0, mask: Mask | None = None, **choices: Any) -> Frame:
    """Our frame, from the noise of `noise`."""
    with Stylizer.load(bundle, backend="openvino", precision="fp32", size=SIZE, **choices) as stylizer:
        stylizer.set_style(STYLE, strength)
        drawn = noise(bundle.latent_channels, bundle.vae_scale)
        return stylizer.step(CONTENT_FRAME, State(0, 0, drawn), mask=mask)[0]


@pytest.fixture(scope="module")
def edit_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InstructPix2Pix SDXL in miniature."""
    folder = tmp_path_factory.mktemp("edit") / "mini-edit"
    name = "StableDiffusionXLInstructPix2PixPipeline"
    return write_clip_pipeline(folder, layers_per_block=1, levels=1, in_channels=8, class_name=name)


@pytest.fixture(scope="module")
def edit_bundle(edit_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_edit(edit_source, tmp_path_factory.mktemp("bundle") / "edit")


def export_edit(source: Path, output: Path) -> Bundle:
    choices: dict[str, Any] = {"eta": 1.0, "steps": (4,), "schedule": "diffusers", "weights": "fp32"}
    return export_pipeline(
        source, output, prompt=PROMPT, negative=NEGATIVE, guidance=3.0, size=SIZE, **choices
    )


@torch.no_grad()
def diffusers_edit(source: Path, guidance: float, **more: Any) -> Frame:
    """InstructPix2Pix in fp32, which begins at the noise that `stylized` reaches first."""
    pipe = diffusers_pipeline(StableDiffusionXLInstructPix2PixPipeline, source, **more)
    z = pipe.vae.encode(image(CONTENT_FRAME)).latent_dist.mode() * pipe.vae.config.scaling_factor
    alpha, sigma = NoiseSchedule.from_config(dict(pipe.scheduler.config)).alpha_sigma(999)
    out = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        image=Image.fromarray(CONTENT_FRAME),
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=4,
        guidance_scale=guidance,
        image_guidance_scale=1.0,
        latents=alpha * z + sigma * torch.from_numpy(noise(4, 4)),
        output_type="np",
    )
    return np.round(out.images[0] * 255).astype(np.uint8)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_paints_what_instruct_pix2pix_paints(
    edit_source: Path, edit_bundle: Bundle, guidance: float
) -> None:
    """Guided by the text alone, as diffusers at image_guidance_scale 1."""
    wanted = diffusers_edit(edit_source, guidance)
    assert edit_bundle.unet_inputs == CONTENT
    assert edit_bundle.latent_channels == 4
    assert wanted.std() > 10  # there is something to compare
    assert peak_db(stylized(edit_bundle, strength=0.0, guidance=guidance), wanted) > 55


@pytest.mark.long
def test_cosxl_sees_scaled_latents(edit_source: Path, edit_bundle: Bundle, tmp_path: Path) -> None:
    index = edit_source / "model_index.json"
    before = index.read_text(encoding="utf-8")
    index.write_text(json.dumps(json.loads(before) | {"is_cosxl_edit": True}), encoding="utf-8")
    try:
        bundle = export_edit(edit_source, tmp_path / "cosxl")
    finally:
        index.write_text(before, encoding="utf-8")
    wanted = diffusers_edit(edit_source, 1.0, is_cosxl_edit=True)
    assert peak_db(stylized(bundle, strength=0.0, guidance=1.0), wanted) > 55
    assert peak_db(stylized(edit_bundle, strength=0.0, guidance=1.0), wanted) < 40


@pytest.fixture(scope="module")
def stylist() -> TinyPipeline:
    """std-tiny's stylist in miniature."""
    torch.manual_seed(0)
    vae = AutoencoderPixelShuffle(16, (8, 16), 1, 1)
    config = UNetConfig(
        (32, 32), cross_attention_dim=48, attention_head_dim=16, style_tokens=4, pooled_dim=16
    )
    pipeline = new_pipeline(config, randomize(vae, 1), 4.0)
    randomize(pipeline.unet, 2)
    pipeline.style_encoder.eval()
    return pipeline


@pytest.fixture(scope="module")
def stylist_bundle(stylist: TinyPipeline, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("stylist")
    save_tiny(stylist, folder / "pipeline")
    return export_pipeline(
        folder / "pipeline", folder / "bundle", weights="fp32", steps=(4, 2, 1), size=(64, 64)
    )


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4])
def test_a_stylist_paints_what_it_was_trained_to(
    stylist: TinyPipeline, stylist_bundle: Bundle, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.from_numpy(noise(16, 8)[0]))
    side = stylist_bundle.style_px
    style = np.asarray(Image.fromarray(STYLE).resize((side, side)))
    wanted = sample(stylist, image(CONTENT_FRAME), image(style), steps)
    pixels = np.clip((wanted[0].numpy() + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    with Stylizer.load(stylist_bundle, precision="fp32", size=SIZE, steps=steps) as stylizer:
        stylizer.set_style(style)
        found = stylizer.step(CONTENT_FRAME, State(0, 0, noise(16, 8)))[0]
    assert pixels.std() > 10
    assert peak_db(found, pixels) > 50


def test_a_stream_shows_each_frame_its_own_content(stylist_bundle: Bundle) -> None:
    """Another frame at every call, and in a stream batch several inside at a time."""
    frames = [sample_frame(*SIZE, seed=seed) for seed in range(5)]
    with Stylizer.load(stylist_bundle, precision="fp32", size=SIZE) as stylizer:
        stylizer.set_style(STYLE)
        alone = [stylizer.stylize(frame) for frame in frames]
        for batching in (ONE_BY_ONE, STREAM_BATCH):
            stream = FrameStream(stylizer, batching=batching)
            for found, wanted in zip(stream.frames(frames), alone, strict=True):
                assert peak_db(found, wanted) > 50


# Cut between latents: of each, diffusers takes the nearest pixel, and we the brightest.
MASK = np.zeros(SIZE, np.uint8)
MASK[16:48, 24:72] = 255


@pytest.fixture(scope="module", params=[9, pytest.param(4, marks=pytest.mark.long)])
def inpainting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Bundle]:
    """With a UNet that inpaints, and with one that does not."""
    folder = tmp_path_factory.mktemp("inpainting")
    name = "StableDiffusionXLInpaintPipeline"
    source = write_clip_pipeline(
        folder / "source", layers_per_block=1, levels=1, in_channels=request.param, class_name=name
    )
    choices: dict[str, Any] = {"eta": 0.75, "steps": (4,), "schedule": "diffusers", "weights": "fp32"}
    return source, export_pipeline(source, folder / "bundle", prompt=PROMPT, size=SIZE, **choices)


@torch.no_grad()
def test_it_paints_inside_a_mask_what_diffusers_inpaints(inpainting: tuple[Path, Bundle]) -> None:
    source, bundle = inpainting
    pipe = diffusers_pipeline(StableDiffusionXLInpaintPipeline, source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        patch.setattr(xl_inpaint, "randn_tensor", lambda *_, **__: torch.from_numpy(noise(4, 4)))
        out = pipe(
            prompt=PROMPT,
            image=Image.fromarray(CONTENT_FRAME),
            mask_image=Image.fromarray(MASK),
            height=SIZE[0],
            width=SIZE[1],
            strength=0.75,
            num_inference_steps=4,
            guidance_scale=1.0,
            output_type="np",
        )
    wanted = np.round(out.images[0] * 255).astype(np.uint8)
    found = stylized(bundle, strength=0.0, mask=Mask(MASK))
    inside = np.s_[18:46, 26:70]  # within the edge that fades
    assert wanted[inside].std() > 10
    assert peak_db(found[inside], wanted[inside]) > 45
    np.testing.assert_array_equal(found[MASK == 0], CONTENT_FRAME[MASK == 0])
    assert peak_db(stylized(bundle, strength=0.0)[inside], wanted[inside]) < 40


def test_other_numbers_of_channels_are_refused(tmp_path: Path) -> None:
    source = write_clip_pipeline(tmp_path / "upscaler", layers_per_block=1, levels=1, in_channels=7)
    with pytest.raises(ExportError, match="takes 7 channels and gives 4; std-rt exports"):
        export_pipeline(source, tmp_path / "bundle", size=(64, 64))
