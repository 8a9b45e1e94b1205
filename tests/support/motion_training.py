"""Small motion pipelines for training: an SDXL in miniature, its motion adapter, clips and a DINOv2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import MotionAdapter
from support.media_samples import ClipSpec, make_clip
from support.pipelines import randomize, write_clip_pipeline
from transformers import Dinov2Config, Dinov2Model

from std_rt.training.run.recipe import (
    AdversarialConfig,
    BankConfig,
    DistilConfig,
    LoraConfig,
    MotionConfig,
    PicturesConfig,
)

__all__ = ["motion_recipe", "write_adapter", "write_clips", "write_dino", "write_motion_base"]


def write_motion_base(folder: Path) -> Path:
    """An SDXL in miniature with one level, and in it ``motion``, an adapter without a mid block."""
    write_clip_pipeline(folder, layers_per_block=1, levels=1)
    write_adapter(folder / "motion")
    return folder


def write_adapter(folder: Path, *, widths: tuple[int, ...] = (32,), positions: int = 8) -> Path:
    """A motion adapter of the kind that SDXL has, for a UNet of ``widths`` with one layer a block."""
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=widths,
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=positions,
        use_motion_mid_block=False,
    )
    randomize(adapter, 7).save_pretrained(folder)
    return folder


def write_clips(folder: Path, count: int = 4, frames: int = 12, size: tuple[int, int] = (48, 64)) -> Path:
    """Clips of moving textures, losslessly encoded; each with a caption. ``size``: height, width."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        small = rng.integers(0, 255, (8, 16, 3), dtype=np.uint8)
        texture = cv2.resize(small, (size[1] + 4 * frames, size[0]), interpolation=cv2.INTER_CUBIC)

        def picture(index: int, texture: np.ndarray = texture) -> np.ndarray:
            return np.ascontiguousarray(texture[:, 4 * index : 4 * index + size[1]])

        spec = ClipSpec(width=size[1], height=size[0], codec="ffv1", pix_fmt="bgr0", picture=picture)
        make_clip(folder / f"{number}.mkv", replace(spec, pts=tuple(range(0, 512 * frames, 512))))
        (folder / f"{number}.txt").write_text(f"clip {'abcdefgh'[number]}", encoding="utf-8")
    return folder


def write_dino(folder: Path) -> Path:
    """A DINOv2 of two blocks."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    randomize(Dinov2Model(config), 3).save_pretrained(folder)
    return folder


def motion_recipe(output: Path, base: Path, clips: Path, dino: Path | None = None) -> DistilConfig:
    """Four steps of two clips of four frames, in fp32, by the published recipe's choices."""
    game = AdversarialConfig() if dino is None else AdversarialConfig(
        weight=0.5, dino=str(dino), blocks=(0, 1), size_px=28, learning_rate=1e-2, r1=1e-2
    )  # fmt: skip
    return DistilConfig(
        output=str(output),
        base=str(base),
        steps=4,
        batch=2,
        accumulate=1,
        learning_rate=1e-2,
        warmup=1,
        eta=0.2,
        run_steps=(2, 4),
        window=0.3,
        guidance=(2.0, 3.0),
        precision="fp32",
        snapshot_every=2,
        log_every=1,
        lora=LoraConfig(rank=2, alpha=2.0),
        bank=BankConfig(capacity=4),
        adversarial=game,
        pictures=PicturesConfig(str(clips), resolution_px=32, buckets=False, workers=0),
        motion=MotionConfig(str(base / "motion"), frames=4, interval=2, representation="head"),
    )
