"""Each stage trains, resumes bit for bit, and hands the next one what it needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from std_rt.core.errors import RecipeError
from std_rt.models.autoencoder import AutoencoderPixelShuffle
from std_rt.training.run.recipe import AutoencoderConfig, StylistConfig
from std_rt.training.tiny.autoencoder_stage import train_autoencoder
from std_rt.training.tiny.stylist import train_stylist
from std_rt.training.tiny.tiny_pipeline import load_tiny, save_tiny
from std_rt.training.tiny.trajectories import sample


def _same(a: Path, b: Path) -> None:
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def _checkpoint(output: str | Path) -> Path:
    """The folder of a run's newest checkpoint."""
    root = Path(output) / "checkpoints"
    return root / (root / "newest").read_text(encoding="utf-8")


def _same_checkpoints(a: str | Path, b: str | Path) -> None:
    for name in ("shared", "rank0"):
        _same(_checkpoint(a) / f"{name}.safetensors", _checkpoint(b) / f"{name}.safetensors")


def test_autoencoder_resumes_bit_for_bit(
    autoencoder_config: AutoencoderConfig, vae_folder: Path, tmp_path: Path
) -> None:
    broken = replace(autoencoder_config, output=str(tmp_path))
    train_autoencoder(broken, stop_after=2)
    train_autoencoder(broken)
    _same_checkpoints(tmp_path, autoencoder_config.output)
    logs = [(Path(folder) / "log.jsonl").read_bytes() for folder in (tmp_path, autoencoder_config.output)]
    assert logs[0] == logs[1]
    assert (vae_folder / "config.json").exists()


@pytest.mark.long
def test_autoencoder_learns(autoencoder_config: AutoencoderConfig, tmp_path: Path) -> None:
    import json

    config = replace(
        autoencoder_config, output=str(tmp_path), steps=240, snapshot_every=40, learning_rate=5e-3
    )
    train_autoencoder(config)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1]["held_out_psnr_db"] > rows[0]["held_out_psnr_db"] + 1


def test_standardize_changes_latents_not_pictures() -> None:
    torch.manual_seed(0)
    vae = AutoencoderPixelShuffle(channels=(8, 16), encoder_blocks=1, decoder_blocks=1)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        z = vae.encode(images).latents
        before = vae.decode(z).sample
        vae.standardize(z.mean((0, 2, 3)), z.std((0, 2, 3)))
        scaled = vae.encode(images).latents
        after = vae.decode(scaled).sample
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(8), atol=1e-4)
    assert torch.allclose(scaled.std((0, 2, 3)), torch.ones(8), atol=1e-4)
    assert torch.allclose(before[..., 24:-24, 24:-24], after[..., 24:-24, 24:-24], atol=1e-4)


def test_saved_pipeline_gives_the_same_pictures(stylist_folder: Path, tmp_path: Path) -> None:
    pipeline = load_tiny(stylist_folder)
    save_tiny(pipeline, tmp_path)
    again = load_tiny(tmp_path)
    images, styles = torch.rand(1, 3, 64, 64) * 2 - 1, torch.rand(1, 3, 224, 224) * 2 - 1
    assert torch.equal(sample(pipeline, images, styles, 2), sample(again, images, styles, 2))


def test_style_and_guidance_reach_the_picture(stylist_folder: Path) -> None:
    pipeline = load_tiny(stylist_folder)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    light, dark = torch.full((1, 3, 224, 224), 0.8), torch.full((1, 3, 224, 224), -0.8)
    first = sample(pipeline, images, light, 2)
    assert not torch.allclose(first, sample(pipeline, images, dark, 2), atol=1e-4)
    assert not torch.allclose(first, sample(pipeline, images, light, 2, guidance=3.0), atol=1e-4)


def test_missing_stage_names_the_command(stylist_config: StylistConfig, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"std-rt train training/std_tiny_autoencoder\.toml"):
        train_stylist(replace(stylist_config, output=str(tmp_path), autoencoder=str(tmp_path / "none")))
