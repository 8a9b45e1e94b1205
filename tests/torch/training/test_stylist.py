"""The triplet stage: it resumes bit for bit, sees the content, and starts from a narrower model's weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from support.distil_runs import assert_same, read_checkpoint

from std_rt.core.errors import RecipeError
from std_rt.training.distil.base import load_base
from std_rt.training.run.recipe import AutoencoderConfig, StylistConfig, TeacherConfig
from std_rt.training.tiny.autoencoder_stage import train_autoencoder
from std_rt.training.tiny.stylist import build_stylist, train_stylist
from std_rt.training.tiny.teacher import sample
from std_rt.training.tiny.tiny_pipeline import load_tiny, run_unet


@pytest.fixture(scope="module")
def stylist_config(
    autoencoder_config: AutoencoderConfig,
    teacher_config: TeacherConfig,
    teacher_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> StylistConfig:
    folder, rng = tmp_path_factory.mktemp("stylist"), np.random.default_rng(0)
    for kind in ("content", "style", "stylized"):
        (folder / "triplets" / kind).mkdir(parents=True)
        cv2.imwrite(str(folder / "triplets" / kind / "a.png"), rng.integers(0, 256, (144, 160, 3), np.uint8))
    vae = train_autoencoder(
        replace(autoencoder_config, output=str(folder / "vae"), steps=1, latent_channels=16)
    )
    return StylistConfig(
        str(folder / "run"), str(vae), str(folder / "triplets"), autoencoder_config.data,
        start_from=str(teacher_folder), steps=4, batch=2, crop_px=128, style_px=128, warmup=1, bf16=False,
        snapshot_every=2, model=teacher_config.model,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stylist_folder(stylist_config: StylistConfig) -> Path:
    return train_stylist(stylist_config)


def test_stylist_resumes_bit_for_bit(
    stylist_config: StylistConfig, stylist_folder: Path, tmp_path: Path
) -> None:
    broken = replace(stylist_config, output=str(tmp_path))
    train_stylist(broken, stop_after=2)
    train_stylist(broken)
    assert_same(read_checkpoint(broken), read_checkpoint(stylist_config))


def test_a_new_model_predicts_what_the_old_one_did(
    stylist_config: StylistConfig, teacher_folder: Path
) -> None:
    new, old = build_stylist(stylist_config), load_tiny(teacher_folder)
    x, t, ids = torch.randn(1, 16, 16, 16), torch.tensor([699]), torch.zeros(1, 6)
    tokens, pooled = old.style_encoder.encode_latents(torch.randn(1, 8, 28, 28))
    with torch.no_grad():
        before = run_unet(old.unet, x[:, :8], t, tokens, pooled, ids)
        after = run_unet(new.unet, x, t, tokens, pooled, ids, torch.randn_like(x))
    assert torch.allclose(after[:, :8], before, atol=1e-5)


def test_a_start_that_does_not_fit_is_refused(stylist_config: StylistConfig, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a pipeline folder"):
        build_stylist(replace(stylist_config, start_from=str(tmp_path)))
    narrower = replace(stylist_config.model, block_out_channels=(16, 32, 32))
    with pytest.raises(RecipeError, match="does not fit the recipe's model"):
        build_stylist(replace(stylist_config, model=narrower))


def test_the_content_reaches_the_picture_beside_the_noise(stylist_folder: Path) -> None:
    pipeline = load_tiny(stylist_folder)
    assert pipeline.unet.config.in_channels == 32
    x, z = torch.randn(1, 16, 16, 16), torch.randn(2, 1, 16, 16, 16)
    tokens, pooled = pipeline.style_encoder.encode_latents(torch.randn(1, 16, 16, 16))
    with torch.no_grad():
        a, b = (
            run_unet(pipeline.unet, x, torch.tensor([699]), tokens, pooled, torch.zeros(1, 6), c) for c in z
        )
    assert not torch.equal(a, b)
    assert sample(pipeline, torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64), 2).shape == (1, 3, 64, 64)


def test_distillation_refuses_a_unet_that_sees_more(stylist_folder: Path) -> None:
    with pytest.raises(RecipeError, match="takes 32 channels for 16 latents; distillation trains those"):
        load_base(stylist_folder)


def test_decoded_estimates_are_looked_at(
    stylist_config: StylistConfig, tmp_path: Path, vgg_file: Path
) -> None:
    config = replace(
        stylist_config, output=str(tmp_path), steps=1, perceptual=str(vgg_file), look_px=64, look_weight=1.0
    )
    train_stylist(config)
    plain = replace(config, output=str(tmp_path / "plain"), perceptual="")
    train_stylist(plain)
    folders = (tmp_path, tmp_path / "plain")
    looked, unlooked = (json.loads((f / "log.jsonl").read_text(encoding="utf-8")) for f in folders)
    assert looked["loss"] > unlooked["loss"]
