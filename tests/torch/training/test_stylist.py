"""The triplet stage: it resumes bit for bit, sees the content, and starts from a narrower model's weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import cv2
import numpy as np
import pytest
import torch
from support.distil_runs import ADVERSARIAL, assert_same, read_checkpoint, small_recipe

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import trajectory_timesteps
from std_rt.training.distil.base import load_base
from std_rt.training.distil.loop import train_distil
from std_rt.training.distil.sampling import encode_scene, sample_latents
from std_rt.training.run.recipe import AutoencoderConfig, LatentsConfig, StylistConfig, TeacherConfig
from std_rt.training.run.sheet import spread_pairs, to_tensor
from std_rt.training.run.training_run import ModuleRun
from std_rt.training.tiny.autoencoder_stage import train_autoencoder
from std_rt.training.tiny.stylist import Stylist, StylistData, build_stylist, train_stylist
from std_rt.training.tiny.teacher import sample
from std_rt.training.tiny.tiny_pipeline import load_tiny, run_unet, save_tiny
from std_rt.training.tiny.triplets import TripletSource


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


def test_a_run_with_muon_moves_every_weight_and_resumes_bit_for_bit(
    stylist_config: StylistConfig, tmp_path: Path
) -> None:
    whole, broken = (replace(stylist_config, output=str(tmp_path / n), optimizer="muon") for n in "ab")
    after = load_tiny(train_stylist(whole))
    train_stylist(broken, stop_after=2)
    train_stylist(broken)
    assert_same(read_checkpoint(broken), read_checkpoint(whole))
    before = build_stylist(whole)
    for name, weight in before.unet.named_parameters():
        assert not torch.equal(weight, after.unet.get_parameter(name)), name


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


def test_distillation_refuses_a_unet_that_sees_anything_else(stylist_folder: Path, tmp_path: Path) -> None:
    pipeline, folder = load_tiny(stylist_folder), tmp_path / "inpainting"
    pipeline.unet.conv_in = torch.nn.Conv2d(33, 32, 3, padding=1)
    pipeline.unet.register_to_config(in_channels=33)
    save_tiny(pipeline, folder)
    with pytest.raises(RecipeError, match="takes 33 channels for 16 latents; distillation trains those"):
        load_base(folder)


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


def test_own_runs_teach_without_a_target(
    stylist_config: StylistConfig, tmp_path: Path, vgg_file: Path
) -> None:
    config = replace(
        stylist_config,
        output=str(tmp_path / "a"),
        perceptual=str(vgg_file),
        look_px=64,
        own_batch=2,
        own_px=128,
    )
    train_stylist(config)
    row = json.loads((tmp_path / "a" / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert {"style", "content", "colour"} <= row.keys()
    broken = replace(config, output=str(tmp_path / "b"))
    train_stylist(broken, stop_after=2)
    train_stylist(broken)
    assert_same(read_checkpoint(broken), read_checkpoint(config))
    with pytest.raises(RecipeError, match="own_batch needs a perceptual network"):
        train_stylist(replace(config, output=str(tmp_path / "c"), perceptual=""))


def test_steps_drawn_ahead_are_those_drawn_one_by_one(stylist_config: StylistConfig) -> None:
    data = StylistData(replace(stylist_config, own_batch=3, own_px=64))
    for step, pictures in zip(range(5, 9), data.ahead(5), strict=False):
        again = data.draw(step)
        assert all(
            torch.equal(a, b) for a, b in zip(vars(pictures).values(), vars(again).values(), strict=True)
        )
        assert len(again.photos) == 3
        assert len(again.art) == 2


def test_the_own_run_loss_falls_along_its_gradient(
    stylist_config: StylistConfig, squeezenet_file: Path
) -> None:
    config = replace(stylist_config, perceptual=str(squeezenet_file), own_batch=2, own_px=64)
    pictures = StylistData(config).draw(0)
    stylist = Stylist(config, pictures.content)
    assert pictures.photos is not None
    assert pictures.art is not None
    photos, art = pictures.photos, pictures.art

    def loss() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        run = SimpleNamespace(rng=np.random.default_rng(3), generator=generator, add=lambda **_: None)
        return stylist.own_run_loss(photos, art, cast(ModuleRun, run))

    before = loss()
    before.backward()
    with torch.no_grad():
        for weight in stylist.live.unet.parameters():
            weight -= 0.01 * (0 if weight.grad is None else weight.grad)
    assert loss() < before


def test_the_distillers_teacher_draws_what_the_pipeline_does(
    stylist_config: StylistConfig, stylist_folder: Path
) -> None:
    pairs = spread_pairs(
        Path(stylist_config.data.held_out_content), Path(stylist_config.data.held_out_style), 2, 64
    )
    base, pipeline = load_base(stylist_folder), load_tiny(stylist_folder)
    scene = encode_scene(base, pairs)
    assert scene.cond.content is not None
    # `sample` draws one noise for all rows from this seed.
    noise = torch.randn(scene.z.shape[1:], generator=torch.Generator().manual_seed(0)).expand(scene.z.shape)
    z = sample_latents(base, scene.cond, scene.z, trajectory_timesteps(0.75, 2), 2.0, noise[None])
    images, side = to_tensor(scene.contents), base.style_px
    looks = to_tensor([cv2.resize(s, (side, side), interpolation=cv2.INTER_CUBIC) for s in scene.styles])
    wanted = sample(pipeline, images, looks, 2, guidance=2.0)
    assert torch.allclose(base.decode(z), wanted, atol=1e-4)


def test_a_base_that_sees_the_content_is_distilled_and_resumed(
    stylist_config: StylistConfig, stylist_folder: Path, tmp_path: Path
) -> None:
    data = LatentsConfig(triplets=stylist_config.triplets, side=8, paired=0.5)
    config = replace(
        small_recipe(tmp_path / "whole", stylist_folder, tmp_path), latents=data, adversarial=ADVERSARIAL
    )
    assert train_distil(config).is_file()
    broken = replace(config, output=str(tmp_path / "broken"))
    train_distil(broken, stop_after=3)
    train_distil(broken)
    assert_same(read_checkpoint(broken), read_checkpoint(config))


def test_each_trajectory_keeps_its_own_content(stylist_config: StylistConfig, stylist_folder: Path) -> None:
    base = load_base(stylist_folder)
    data = LatentsConfig(triplets=stylist_config.triplets, side=8, paired=0.5)
    new = TripletSource(data, base, 0).take(8, (8, 8))
    assert new.cond.content is not None
    assert torch.equal(new.cond.content, new.c)
    assert torch.equal(base.null(new.cond).content, new.c)
    unpaired = (new.z == new.c).flatten(1).all(1)
    assert 0 < unpaired.sum() < 8
    assert not (new.real == new.z).flatten(1).all(1)[unpaired].any()


def test_data_that_does_not_fit_the_base_is_refused(
    stylist_config: StylistConfig, stylist_folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    stored = small_recipe(tmp_path / "a", stylist_folder, tmp_path / "latents")
    with pytest.raises(RecipeError, match=r"sees the content; set latents\.triplets, not latents\.file"):
        train_distil(stored)
    data = LatentsConfig(triplets=stylist_config.triplets, side=8)
    with pytest.raises(RecipeError, match=r"does not see the content; set latents\.file"):
        train_distil(replace(stored, base=str(teacher_folder), output=str(tmp_path / "b"), latents=data))
