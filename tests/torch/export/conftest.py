"""Two pipelines on disk and the bundles exported from them: the slow part, done once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch
from diffusers import UNet2DConditionModel
from support.once import made_once
from support.pipelines import write_clip_pipeline, write_lora, write_own_pipeline

from std_rt.core.bundle import Bundle, load_bundle
from std_rt.export.build import export_pipeline


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Networks this small are slower on many threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clip_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL in miniature, with one layer per block."""
    return write_clip_pipeline(tmp_path_factory.mktemp("clip") / "mini-xl", layers_per_block=1)


@pytest.fixture(scope="session")
def own_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """std-tiny in miniature, with one level."""
    return write_own_pipeline(tmp_path_factory.mktemp("own") / "mini-tiny", levels=1)


@pytest.fixture(scope="session")
def lora(clip_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for `clip_source` that notes its own eta and steps."""
    unet = UNet2DConditionModel.from_pretrained(clip_source / "unet")
    return write_lora(tmp_path_factory.mktemp("lora") / "ink.safetensors", unet, eta="0.5", steps="4 2")


@pytest.fixture(scope="session")
def one_level(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`clip_source` with one level, which is traced in a quarter of the time, and a LoRA for it."""
    source = write_clip_pipeline(tmp_path_factory.mktemp("one") / "mini-xl", layers_per_block=1, levels=1)
    unet = UNet2DConditionModel.from_pretrained(source / "unet")
    path = tmp_path_factory.mktemp("lora") / "ink.safetensors"
    return source, write_lora(path, unet, eta="0.5", steps="4 2")


@pytest.fixture(scope="session")
def clip_bundle(one_level: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`one_level` with the LoRA at 0.7, fp16 weights, published style layout, a prompt and its encoders."""

    source, lora = one_level

    def make(output: Path) -> None:
        export_pipeline(source, output, lora=[(lora, 0.7)], size=(64, 96), prompt="in ink", prompts="encoder")

    return load_bundle(made_once(tmp_path_factory, "mini-xl", make))


@pytest.fixture(scope="session")
def half_bundle(one_level: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`one_level` in fp16, its prompt baked."""

    def make(output: Path) -> None:
        export_pipeline(one_level[0], output, size=(64, 64), prompt="in ink", precision="fp16", steps=(2,))

    return load_bundle(made_once(tmp_path_factory, "mini-half", make))


@pytest.fixture(scope="session")
def own_bundle(own_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`own_source` with fp32 weights and the defaults of everything else."""

    def make(output: Path) -> None:
        export_pipeline(own_source, output, size=(64, 64), weights="fp32", steps=(4, 1))

    return load_bundle(made_once(tmp_path_factory, "mini-tiny", make))
