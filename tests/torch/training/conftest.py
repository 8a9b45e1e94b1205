"""A small data folder rendered by code, and recipes that train on it in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from support.weights import write_squeezenet, write_vgg

from std_rt.training.run.recipe import AutoencoderConfig, DataConfig, FinishConfig, TeacherConfig, UNetConfig
from std_rt.training.run.sheet import spread_pairs


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


@pytest.fixture(scope="session", autouse=True)
def _small_sheets() -> Iterator[None]:
    """Two pairs of 64 px in the periodic sheets, which would take most of the time of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("std_rt.training.tiny.teacher.spread_pairs", partial(spread_pairs, count=2, size_px=64))
        yield


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
def teacher_config(
    data: DataConfig, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TeacherConfig:
    model = UNetConfig(
        (32, 32, 32), cross_attention_dim=48, attention_head_dim=16, style_tokens=4, pooled_dim=16
    )
    return TeacherConfig(
        str(tmp_path_factory.mktemp("teacher")), str(vae_folder), data, steps=2, batch=2, window=(16,),
        variants=1, warmup=2, bf16=False, snapshot_every=1, model=model,
    )  # fmt: skip


@pytest.fixture(scope="session")
def teacher_folder(teacher_config: TeacherConfig) -> Path:
    from std_rt.training.tiny.teacher import train_teacher

    return train_teacher(teacher_config)


@pytest.fixture
def finish_config(teacher_folder: Path, tmp_path: Path) -> FinishConfig:
    return FinishConfig(
        str(tmp_path), str(teacher_folder.parent), steps=2, batch=2, window=(16,),
        bf16=False, snapshot_every=1,
    )  # fmt: skip
