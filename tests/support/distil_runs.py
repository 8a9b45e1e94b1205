"""Distillations of a miniature std-tiny: triplets, recipe, and what a run leaves."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file

from std_rt.training.run.recipe import (
    AdversarialConfig,
    BankConfig,
    DistilConfig,
    LoraConfig,
    StylistConfig,
    TripletsConfig,
)

__all__ = ["ADVERSARIAL", "assert_same", "read_checkpoint", "small_recipe", "write_triplets"]

ADVERSARIAL = AdversarialConfig(weight=0.5, features="style", learning_rate=1e-2, r1=1e-2)


def write_triplets(folder: Path, count: int = 6, size: tuple[int, int] = (96, 80), styles: int = 0) -> Path:
    """``count`` triplets of noise, ``size`` (height, width), with a style each or ``styles`` in turn."""
    rng = np.random.default_rng(0)
    for kind in ("content", "style", "stylized"):
        (folder / kind).mkdir(parents=True)
        drawn = [rng.integers(0, 256, (*size, 3), np.uint8) for _ in range(count)]
        for i in range(count):
            frame = drawn[i % styles if styles and kind == "style" else i]
            cv2.imwrite(str(folder / kind / f"{i}.png"), frame)
    return folder


def small_recipe(output: Path, base: Path, triplets: Path) -> DistilConfig:
    """Six steps of two samples, in fp32."""
    return DistilConfig(
        output=str(output),
        base=str(base),
        steps=6,
        batch=2,
        accumulate=1,
        learning_rate=1e-2,
        warmup=1,
        eta=0.2,
        run_steps=(2, 4),
        guidance=(2.0, 3.0),
        precision="fp32",
        snapshot_every=2,
        log_every=1,
        lora=LoraConfig(rank=4, alpha=4.0),
        bank=BankConfig(capacity=6),
        triplets=TripletsConfig(str(triplets), side=8),
    )


def read_checkpoint(config: DistilConfig | StylistConfig) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, as FILE/NAME."""
    root = Path(config.output) / "checkpoints"
    folder = root / (root / "newest").read_text(encoding="utf-8")
    return {f"{f.name}/{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    different = [k for k in ours if not torch.equal(ours[k], theirs[k])]
    assert not different, different[:8]
