"""A small data folder rendered by code, and recipes that train on it in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from support.distil_runs import write_triplets
from support.pipelines import write_own_pipeline
from support.weights import write_squeezenet, write_vgg

from std_rt.training.run.recipe import (
    AutoencoderConfig,
    DataConfig,
    SheetConfig,
    StylistConfig,
    UNetConfig,
)


def _picture(rng: np.random.Generator, size: int = 272) -> np.ndarray:
    small = rng.uniform(0, 255, (6, 6, 3)).astype(np.uint8)
    frame = cv2.resize(small, (size + 16, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(6):
        centre = tuple(int(v) for v in rng.integers(0, size, 2))
        cv2.circle(frame, centre, int(rng.integers(8, 60)), rng.uniform(0, 255, 3).tolist(), -1)
    return frame


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Networks this small are slower on many threads, and other processes that tests start have one too."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("photos", "art", "content", "style"):
        (root / name).mkdir()
        for i in range(3):
            cv2.imwrite(str(root / name / f"{i}.png"), _picture(rng))
    return DataConfig(*(str(root / n) for n in ("photos", "art", "content", "style")))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A std-tiny in miniature."""
    return write_own_pipeline(tmp_path_factory.mktemp("base") / "tiny", levels=1, sees_content=True)


@pytest.fixture(scope="session")
def triplets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_triplets(tmp_path_factory.mktemp("triplets"))


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_vgg(tmp_path_factory.mktemp("weights") / "vgg.safetensors")


@pytest.fixture(scope="session")
def squeezenet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_squeezenet(tmp_path_factory.mktemp("weights") / "squeezenet.safetensors")


@pytest.fixture(scope="session")
def autoencoder_config(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> AutoencoderConfig:
    output = str(tmp_path_factory.mktemp("autoencoder"))
    return AutoencoderConfig(
        output, data, steps=4, batch=2, crop_px=64, channels=(8, 16), encoder_blocks=1, decoder_blocks=1,
        bf16=False, snapshot_every=2,
    )  # fmt: skip


@pytest.fixture(scope="session")
def vae_folder(autoencoder_config: AutoencoderConfig) -> Path:
    from std_rt.training.tiny.autoencoder_stage import train_autoencoder

    return train_autoencoder(autoencoder_config)


@pytest.fixture(scope="session")
def stylist_config(
    autoencoder_config: AutoencoderConfig, tmp_path_factory: pytest.TempPathFactory
) -> StylistConfig:
    """Two photos under each of two styles, no perceptual network."""
    from std_rt.training.tiny.autoencoder_stage import train_autoencoder

    folder = tmp_path_factory.mktemp("stylist")
    vae = train_autoencoder(
        replace(autoencoder_config, output=str(folder / "vae"), steps=1, latent_channels=16)
    )
    data = autoencoder_config.data
    return StylistConfig(
        str(folder / "run"), str(vae), str(write_triplets(folder / "triplets", 5, (144, 160), styles=2)),
        steps=4, styles=2, photos=2, own_styles=0, crop_px=64, style_px=128, warmup=1, cooldown=1,
        snapshot_every=2,
        sheet=SheetConfig(data.held_out_content, data.held_out_style, 2, 64),
        model=UNetConfig(
            (32, 32, 32), cross_attention_dim=48, attention_head_dim=16, style_tokens=4, pooled_dim=16
        ),
    )  # fmt: skip


@pytest.fixture(scope="session")
def stylist_folder(stylist_config: StylistConfig) -> Path:
    from std_rt.training.tiny.stylist import train_stylist

    return train_stylist(stylist_config)
