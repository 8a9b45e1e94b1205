"""Our bundle against diffusers' StableDiffusionXLImg2ImgPipeline with TCDScheduler, as in the published demo.

Everything on: IP-Adapter Plus in the published layout, a LoRA whose alpha is not its rank, guidance 6, a
negative prompt, 8 steps, strength 0.75. diffusers loads all of it its own way from the same files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, TCDScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as img2img
from PIL import Image
from support.pipelines import write_clip_pipeline, write_lora
from transformers import CLIPImageProcessor

from std_rt import Stylizer
from std_rt.core.bundle import Bundle
from std_rt.export.build import export_pipeline
from std_rt.pipeline.stylizer import State

Frame = np.ndarray
SIZE = (64, 96)  # (H, W)
STEPS, STRENGTH, SCALE, LORA_SCALE = 8, 0.75, 6.0, 0.7
PROMPT, NEGATIVE = "in ink", "dull grey"


def picture(height: int, width: int, seed: int) -> Frame:
    """Soft colours with some grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


CONTENT, STYLE = picture(*SIZE, seed=1), picture(32, 32, seed=2)


def peak_db(found: Frame, wanted: Frame) -> float:
    """PSNR of 8-bit pictures."""
    error = np.mean((found.astype(np.float64) - wanted) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """The start noise both are given."""
    return np.random.default_rng(5).standard_normal((1, 4, SIZE[0] // 4, SIZE[1] // 4)).astype(np.float32)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.long)])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL in miniature, with one layer per block; one level is traced in a quarter of the time of two."""
    folder = tmp_path_factory.mktemp("parity") / "mini-xl"
    return write_clip_pipeline(folder, layers_per_block=1, levels=request.param)


@pytest.fixture(scope="module")
def lora(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 4, alpha 8; it says nothing of a schedule, as LoRAs of others."""
    unet = UNet2DConditionModel.from_pretrained(source / "unet")
    return write_lora(tmp_path_factory.mktemp("lora") / "ink.safetensors", unet)


@pytest.fixture(scope="module")
def diffusers_frame(source: Path, lora: Path, noise: np.ndarray) -> Frame:
    """What diffusers paints, in fp32."""
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
    pipe.feature_extractor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    pipe.set_adapters(pipe.get_active_adapters(), [LORA_SCALE])
    pipe.load_ip_adapter(
        str(source), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale({"up": {"block_0": [0.0, 1.0]}})
    with pytest.MonkeyPatch.context() as patch:
        # The only two things that are drawn: latents around their mean, and the start noise.
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        patch.setattr(img2img, "randn_tensor", lambda *args, **options: torch.from_numpy(noise))
        out = pipe(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            image=Image.fromarray(CONTENT),
            ip_adapter_image=Image.fromarray(STYLE),
            strength=STRENGTH,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            eta=0.0,
            output_type="np",
        )
    return np.round(out.images[0] * 255).astype(np.uint8)


def exported(source: Path, lora: Path, output: Path, **choices: Any) -> Bundle:
    """The same settings as a bundle."""
    return export_pipeline(
        source,
        output,
        lora=[(lora, LORA_SCALE)],
        eta=STRENGTH,
        steps=(STEPS,),
        schedule="diffusers",
        guidance=SCALE,
        prompt=PROMPT,
        negative=NEGATIVE,
        size=SIZE,
        **choices,
    )


def stylized(bundle: Bundle, noise: np.ndarray) -> Frame:
    """Our frame from the same noise."""
    with Stylizer.load(bundle, backend="openvino", precision="fp32", size=SIZE) as stylizer:
        stylizer.set_style(STYLE)
        return stylizer.step(CONTENT, State(0, 0, noise))[0]


@pytest.mark.parametrize(
    ("compute", "floor_db"),
    [
        ("fp32", 60),
        pytest.param("fp16", 35, marks=pytest.mark.long),
        pytest.param("bf16", 28, marks=pytest.mark.long),
    ],
)
def test_a_bundle_paints_what_diffusers_paints(
    compute: str,
    floor_db: float,
    source: Path,
    lora: Path,
    diffusers_frame: Frame,
    noise: np.ndarray,
    tmp_path: Path,
) -> None:
    weights = "fp32" if compute == "fp32" else "fp16"
    bundle = exported(source, lora, tmp_path / "b", precision=compute, weights=weights)
    found = stylized(bundle, noise)
    assert diffusers_frame.std() > 10  # there is something to compare
    assert peak_db(found, diffusers_frame) >= floor_db
