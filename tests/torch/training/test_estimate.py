"""Estimates count exactly what can be counted, without numbers, and say what they assume about the rest."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from std_rt.training.run.meta_pass import Pass, add_meta_lora, build_unet, keeping, unet_pass
from support.pipelines import write_clip_pipeline, write_own_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from std_rt.core.errors import RecipeError
from std_rt.training.distil.bank import States
from std_rt.training.distil.base import Conditioning, load_base
from std_rt.training.distil.discriminator import Heads
from std_rt.training.distil.lora import add_lora, count
from std_rt.training.run.estimate import (
    GIB,
    Estimate,
    _activations,
    _bank_bytes,
    _evaluations,
    _heads,
    _latent_sizes,
    _optimizer_bytes,
    _weights,
    describe,
    estimate,
    measure_flops,
)
from std_rt.training.run.recipe import (
    AdversarialConfig,
    BankConfig,
    DistilConfig,
    LatentsConfig,
    LoraConfig,
    PicturesConfig,
    load_recipe,
)

SDXL: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
SDXL_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
FAST = {"device": "cpu", "flops_per_s": 1e12}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_pipeline(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_pipeline(tmp_path_factory.mktemp("own"))


def _config(folder: Path, part: str) -> dict[str, Any]:
    return dict(json.loads((folder / part / "config.json").read_text(encoding="utf-8")))


def _recipe(**changes: Any) -> DistilConfig:
    small = {"lora": LoraConfig(4, 4.0), "pictures": PicturesConfig("pictures", resolution_px=64)}
    return DistilConfig("out", "base", **{**small, **changes})


def _of(folder: Path, recipe: DistilConfig, **options: Any) -> Estimate:
    return estimate(recipe, _config(folder, "unet"), _config(folder, "vae"), **{**FAST, **options})


# --- what is counted exactly ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "own"])
def test_parameters_are_those_of_a_really_added_lora(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    base = load_base(folder)
    tokens = 6 if kind == "own" else 0
    found = _of(folder, _recipe(), style_tokens=tokens)
    assert found.unet_parameters == sum(p.numel() for p in base.unet.parameters())
    assert found.vae_parameters == sum(p.numel() for p in base.vae.parameters())
    assert found.lora_layers == len(add_lora(base.unet, _recipe().lora, seed=0))
    assert found.lora_parameters == count(base.unet)


def test_parameters_are_those_that_peft_adds_to_some_layers(clip: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(clip / "unet").requires_grad_(False)
    inject_adapter_in_model(PeftConfig(r=3, target_modules=["to_q", "conv_shortcut"]), unet)
    found = _of(clip, _recipe(lora=LoraConfig(3, 3.0, ("to_q", "conv_shortcut"))))
    assert found.lora_parameters == sum(p.numel() for p in unet.parameters() if p.requires_grad)


def test_heads_are_those_of_the_discriminator(clip: Path) -> None:
    unet = build_unet(_config(clip, "unet"))
    recipe = _recipe(adversarial=AdversarialConfig(0.5, dino="facebook/dinov2-base", blocks=(1, 2)))
    assert _heads(recipe, unet) == sum(p.numel() for p in Heads([768, 768], 20).parameters())
    assert _heads(_recipe(), unet) == 0


def _inputs(unet: Any, side: int) -> dict[str, Any]:
    added = {"text_embeds": torch.ones(1, 20), "time_ids": torch.ones(1, 6)}
    return {
        "sample": torch.ones(1, unet.config.in_channels, side, side),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.ones(1, 77, unet.config.cross_attention_dim),
        "added_cond_kwargs": added,
    }


def test_operations_and_kept_memory_are_those_of_a_real_pass(clip: Path) -> None:
    config = _config(clip, "unet")
    ghost = build_unet(config)
    add_meta_lora(ghost, _recipe().lora)
    counted = unet_pass(ghost, (4, 16, 16), torch.float32, 0)

    unet = UNet2DConditionModel.from_pretrained(clip / "unet").requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as bare, torch.no_grad():
        unet(**_inputs(unet, 16))
    add_lora(unet, _recipe().lora, seed=0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        with keeping(unet) as kept:
            out = unet(**_inputs(unet, 16)).sample
        forward = both.get_total_flops()
        out.sum().backward()
    assert counted.forward == forward
    assert counted.bare == bare.get_total_flops()
    assert counted.backward == pytest.approx(both.get_total_flops() - forward, rel=0.15)
    assert counted.kept == kept.bytes
    assert counted.kept_checkpointed == kept.bytes_checkpointed < 0.6 * counted.kept


def test_the_bank_is_as_large_as_a_real_one(own: Path) -> None:
    recipe = _recipe(bank=BankConfig(capacity=10), latents=LatentsConfig("latents", side=12))
    cond = Conditioning(torch.ones(1, 1, 24), torch.ones(1, 20), torch.ones(1, 6), torch.ones(1, 6, 24))
    z, number = torch.ones(1, 8, 12, 12), torch.ones(1, dtype=torch.long)
    row = States(z, z, number, torch.ones(1), number, cond).tensors().values()
    unet = build_unet(_config(own, "unet"), 6)
    item = 10 * sum(value.nbytes for value in row)
    assert _bank_bytes(recipe, unet, (8, 12, 12), 1, 6) == item
    assert _bank_bytes(recipe, unet, (8, 12, 12), 3, 6) == 3 * item
    assert _bank_bytes(replace(recipe, method="lcm"), unet, (8, 12, 12), 1, 6) == 0


def test_there_is_a_bank_for_every_latent_size(own: Path) -> None:
    unet = build_unet(_config(own, "unet"), 6)
    assert _latent_sizes(_recipe(latents=LatentsConfig("latents", side=12)), unet, 8) == [(12, 12)]
    sizes = _latent_sizes(_recipe(pictures=PicturesConfig("p", resolution_px=256)), unet, 8)
    assert sizes[len(sizes) // 2] == (32, 32)
    assert len(sizes) == len(set(sizes)) > 2


def test_adam_in_eight_bits_takes_a_quarter() -> None:
    assert _optimizer_bytes(10_000, "adamw") == 80_000
    # Two bytes a number, two fp32 scales for each of 40 blocks of 256.
    assert _optimizer_bytes(10_000, "adamw8bit") == 20_000 + 2 * 4 * 40
    assert _optimizer_bytes(4095, "adamw8bit") == 8 * 4095  # too small to be quantized


# --- what follows from the recipe -----------------------------------------------------------------------


STUDENT = Pass(forward=130, lora=30, attention=10, kept=4e9, kept_checkpointed=1e9)


def _units(judge: float = 0, **changes: Any) -> dict[str, float]:
    return _evaluations(_recipe(**changes), STUDENT, Pass(judge))


def test_evaluations_are_those_of_the_method() -> None:
    # Backward: 100 through frozen layers, 10 more in attention, two gradients of the LoRA.
    std = {"teacher": 2, "target": 1.3, "student": 1.3 + 1.7}
    assert _units() == std == _units(method="tcd") == _units(method="pcm", ema_target=False)
    assert _units(guidance=(1.0, 1.0))["teacher"] == 1
    assert _units(gradient_checkpointing=True)["student"] == pytest.approx(std["student"] + 1.3)
    # tau = 739 is grid point 36, run_steps end at 99, grid point 4: 16 steps on average, then one.
    assert _units(bank=BankConfig(enabled=False))["teacher"] == 2 * (1 + 16)
    assert _units(judge=50)["adversarial"] == 1.5


def test_work_and_activations_grow_with_the_batch(clip: Path) -> None:
    one, many = _of(clip, _recipe(batch=1, accumulate=2)), _of(clip, _recipe(batch=3, accumulate=4))
    assert (one.samples, many.samples) == (2, 12)
    assert many.step_flops == pytest.approx(6 * one.step_flops)
    assert many.step_s == pytest.approx(many.step_flops / (0.4 * 1e12))
    assert many.activations_gib == pytest.approx(3 * one.activations_gib)
    assert many.memory_gib["activations"] == many.activations_gib > many.checkpointed_gib
    assert many.total_gib == sum(many.memory_gib.values())
    less = _activations(_recipe(gradient_checkpointing=True, batch=2), STUDENT, Pass(1, kept=3 * GIB))
    assert less == {"activations": pytest.approx(1.5 * 2e9 / GIB), "judging": 6}


def test_precision_and_device_decide_what_weights_take() -> None:
    def base(precision: str, *, on_cpu: bool) -> float:
        return _weights(_recipe(precision=precision), 100, 10, [8, 8], 2, on_cpu=on_cpu)["base"] * GIB / 100

    assert base("fp32", on_cpu=False) == base("fp32", on_cpu=True) == 4
    assert base("bf16", on_cpu=False) == 2
    assert base("bf16", on_cpu=True) == 6  # and autocast's copy
    weights = _weights(_recipe(), 100, 10, [8, 8], 2, on_cpu=True)
    in_bytes = {name: gib * GIB for name, gib in weights.items() if name != "base"}
    assert in_bytes == {"encoders": 40, "lora": 72, "average": 64, "gradients": 72, "optimizer": 144}


# --- for people -----------------------------------------------------------------------------------------


def test_the_description_says_what_it_assumes(clip: Path) -> None:
    recipe = _recipe(
        adversarial=AdversarialConfig(0.5, features="style"),
        bank=BankConfig(capacity=4000),
        gradient_checkpointing=True,
    )
    found = _of(clip, recipe, heads=1234)
    text = "\n".join(describe(found))
    assert f"{found.lora_parameters:,} parameters in a LoRA of rank 4" in text
    assert "1,234 in the discriminator's heads" in text
    for part in ("(this recipe: with)", "trajectory bank 0.", "an estimate", "40%", "bf16 matmul"):
        assert part in text
    assert "the discriminator on the style encoder" in text
    assert not any("\n" in line for line in describe(found))


def test_a_bank_on_the_cpu_takes_none_of_the_gpus_memory(clip: Path) -> None:
    on_gpu = _of(clip, _recipe(bank=BankConfig(capacity=4000, device="cpu")), device="cuda:0")
    assert "bank" not in on_gpu.memory_gib
    beside = _of(clip, _recipe(bank=BankConfig(capacity=4000)), device="cuda:0")
    assert beside.memory_gib["bank"] == on_gpu.bank_gib
    assert f"{on_gpu.bank_gib:.2f} GiB of the CPU's memory" in "\n".join(describe(on_gpu))


def test_the_machine_is_measured() -> None:
    assert measure_flops("cpu", "fp32", seconds=0.02) > 1e8


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lora": LoraConfig(4, 4.0, ("to_x",))}, r"^lora\.targets do not fit the base: [^\n]*to_x"),
        (
            {"pictures": PicturesConfig("p", resolution_px=60)},
            r"^pictures\.resolution_px = 60 does not divide",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(clip: Path, changes: Any, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        _of(clip, _recipe(**changes))


def test_a_base_of_another_kind_is_one_line(clip: Path) -> None:
    unet = _config(clip, "unet")
    with pytest.raises(RecipeError, match="not of SDXL's kind"):
        estimate(_recipe(), {**unet, "addition_embed_type": None}, **FAST)
    with pytest.raises(RecipeError, match=r"unet/config\.json describes no UNet"):
        estimate(_recipe(), {**unet, "down_block_types": ["NoSuchBlock"] * 2}, **FAST)
    with pytest.raises(RecipeError, match="names NoSuchAutoencoder"):
        estimate(_recipe(), unet, {"_class_name": "NoSuchAutoencoder"}, **FAST)


def test_sdxl_is_estimated_in_seconds() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "training" / "std_sdxl_i2i.toml")
    began = time.process_time()
    found = estimate(
        recipe, SDXL, SDXL_VAE, encoder_parameters=817_000_000, device="cuda:0", flops_per_s=5e14
    )
    assert time.process_time() - began < 15
    assert found.unet_parameters == 2_567_463_684
    assert found.vae_parameters == 83_653_863
    assert found.lora_parameters == 196_751_360
    assert found.latent == (4, 64, 64)
    assert found.forward_flops == pytest.approx(1.59e12, rel=0.01)
    assert found.evaluations["teacher"] == 2
    # bf16 base 4.8, autoencoder, encoders and DINO 3.4, LoRA with all that belongs to it 2.6, decoder 5.7.
    assert 14 < found.total_gib < 20
