"""Distillations of a miniature std-tiny: base, stored latents, recipe, and what a run leaves."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from std_rt.training.run.recipe import (
    AdversarialConfig,
    BankConfig,
    DistilConfig,
    LatentsConfig,
    LoraConfig,
    StylistConfig,
)
from std_rt.training.tiny.latents import Triple, save_latents

__all__ = ["ADVERSARIAL", "assert_same", "read_checkpoint", "small_recipe", "write_latents"]

ADVERSARIAL = AdversarialConfig(weight=0.5, features="style", learning_rate=1e-2, r1=1e-2)


def write_latents(path: Path) -> Path:
    """Six triples of each kind, 32 x 32."""
    rng = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randn(8, 32, 32, generator=rng).half()

    triples = {k: [Triple(draw(), draw(), (draw(),)) for _ in range(6)] for k in ("art", "generated")}
    save_latents(triples, path)
    return path


def small_recipe(output: Path, base: Path, latents: Path) -> DistilConfig:
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
        latents=LatentsConfig(file=str(latents), side=8),
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
