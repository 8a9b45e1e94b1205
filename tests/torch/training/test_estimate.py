"""Estimates count parameters and operations exactly, and say what they assume about the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pipelines import write_clip_pipeline, write_own_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from std_rt.core.errors import RecipeError
from std_rt.models.clip_style import ClipStyleEncoder
from std_rt.models.perceptual import load_perceptual
from std_rt.training.data.buckets import bucket_sizes
from std_rt.training.distil.bank import States
from std_rt.training.distil.base import Conditioning, load_base
from std_rt.training.distil.discriminator import Heads
from std_rt.training.distil.lora import add_lora, lora_parameters
from std_rt.training.run.cost import (
    GIB,
    Estimate,
    _evaluations,
    _weights,
    describe,
    estimate,
    measure_flops,
)
from std_rt.training.run.recipe import (
    AdversarialConfig,
    BankConfig,
    DistilConfig,
    LoraConfig,
    PicturesConfig,
    StyleConfig,
    TripletsConfig,
    load_recipe,
)

RECIPES = Path(__file__).parents[3] / "training"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_pipeline(tmp_path_factory.mktemp("clip"), layers_per_block=1)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_pipeline(tmp_path_factory.mktemp("own"))


def _recipe(base: Path | str = "base", **changes: Any) -> DistilConfig:
    small = {"lora": LoraConfig(4, 4.0), "pictures": PicturesConfig("pictures", resolution_px=64)}
    return DistilConfig("out", str(base), **{**small, **changes})


def _of(base: Path, device: str = "cpu", **changes: Any) -> Estimate:
    return estimate(_recipe(base, **changes), device, flops_per_s=1e12)


def _styled(clip: Path, **changes: Any) -> StyleConfig:
    return StyleConfig(adapter=str(clip / "ip_adapter.safetensors"), **changes)


def test_style_pictures_cost_image_branches_an_encoder_and_tokens(clip: Path) -> None:
    """As a base has them that is given the adapter."""
    style = _styled(clip)
    judged = AdversarialConfig(0.5, dino="facebook/dinov2-small", blocks=(1, 2))
    found, plain = (_of(clip, adversarial=judged, style=s) for s in (style, StyleConfig()))
    base = load_base(clip, style=style)
    assert isinstance(base.style_encoder, ClipStyleEncoder)
    assert found.parameters["unet"] == sum(p.numel() for p in base.unet.parameters())
    assert found.parameters["unet"] > plain.parameters["unet"]
    assert found.parameters["heads"] == sum(p.numel() for p in Heads([384, 384], base.heads_dim).parameters())
    assert found.parameters["lora"] == plain.parameters["lora"]
    more = found.memory_gib["autoencoder and encoders"] - plain.memory_gib["autoencoder and encoders"]
    encoder = 4 * sum(p.numel() for p in base.style_encoder.parameters()) / GIB
    assert encoder <= more < 1.3 * encoder  # the files' headers count too
    tokens = base.null_tokens
    assert tokens is not None
    sizes = plain.bank_gib * GIB, found.bank_gib * GIB
    buckets = len(bucket_sizes(64, base.multiple))
    assert sizes[1] - sizes[0] == pytest.approx(4 * tokens.numel() * 64 * buckets)
    ahead = _of(clip, adversarial=judged, style=_styled(clip, precompute=True))
    assert ahead.memory_gib["autoencoder and encoders"] == plain.memory_gib["autoencoder and encoders"]
    with pytest.raises(RecipeError, match=r"style\.adapter = 'no' does not exist"):
        _of(clip, style=StyleConfig(adapter="no"))


def test_jumps_that_end_clean_cost_the_discriminator_less() -> None:
    def judge(**changes: Any) -> float:
        return _evaluations(_recipe(**changes), 0.3, 1.0)["adversarial"]

    last = AdversarialConfig(0.5, jumps="last")
    assert judge(adversarial=AdversarialConfig(0.5)) == 3
    # From grid point i of 4..36, s is uniform over max(-1, i - 19)..i - 1: clean for one in i + 1 up to 18.
    share = sum(1 / (i + 1) for i in range(4, 19)) / 33
    assert judge(adversarial=last) == pytest.approx(3 * share, rel=0.1)
    assert judge(adversarial=last, method="lcm") == 3


@pytest.mark.parametrize("kind", ["clip", "own"])
def test_parameters_are_those_of_a_really_added_lora(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    found, base = _of(folder), load_base(folder)
    assert found.parameters["unet"] == sum(p.numel() for p in base.unet.parameters())
    assert found.parameters["vae"] == sum(p.numel() for p in base.vae.parameters())
    assert found.lora_layers == len(add_lora(base.unet, _recipe().lora, seed=0))
    assert found.parameters["lora"] == sum(p.numel() for p in lora_parameters(base.unet).values())


def test_heads_are_those_of_the_discriminator(clip: Path) -> None:
    judged = AdversarialConfig(0.5, dino="facebook/dinov2-base", blocks=(1, 2))
    expected = sum(p.numel() for p in Heads([768, 768], 20).parameters())
    assert _of(clip, adversarial=judged).parameters["heads"] == expected
    assert _of(clip).parameters["heads"] == 0


def test_operations_are_those_of_a_real_pass(clip: Path) -> None:
    base = load_base(clip)
    unet, side = base.unet, 64 // base.vae_scale
    found = _of(clip, batch=1, accumulate=1)
    inputs = {
        "sample": torch.ones(1, unet.config.in_channels, side, side),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.ones(1, 77, unet.config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.ones(1, 20), "time_ids": torch.ones(1, 6)},
    }
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**inputs)
    assert found.step_flops == pytest.approx(counter.get_total_flops() * sum(found.evaluations.values()))


def test_the_bank_is_as_large_as_a_real_one(own: Path) -> None:
    cond = Conditioning(torch.ones(1, 1, 24), torch.ones(1, 20), torch.ones(1, 6), torch.ones(1, 6, 24))
    z, number = torch.ones(1, 8, 12, 12), torch.ones(1, dtype=torch.long)
    row = States(z, z, number, torch.ones(1), number, cond).tensors().values()
    stored = {"triplets": TripletsConfig("triplets", side=12), "pictures": PicturesConfig()}
    stored |= {"bank": BankConfig(capacity=10)}
    assert _of(own, **stored).bank_gib * GIB == pytest.approx(10 * sum(value.nbytes for value in row))
    assert _of(own, method="lcm", **stored).bank_gib == 0


def test_there_is_a_bank_for_every_latent_size(own: Path) -> None:
    pictures = PicturesConfig("p", resolution_px=256)
    square = _of(own, pictures=replace(pictures, buckets=False))
    assert _of(own, pictures=pictures).bank_gib > 2 * square.bank_gib


def test_evaluations_are_those_of_the_method() -> None:
    def units(judge: float = 0, **changes: Any) -> dict[str, float]:
        return _evaluations(_recipe(**changes), 0.3, judge)

    std = {"teacher": 2, "target": 1.3, "student": 1.3 + 1 + 0.6}
    assert units() == pytest.approx(std)
    assert units(method="tcd") == units(method="pcm", ema_target=False) == units()
    assert units(guidance=(1.0, 1.0))["teacher"] == 1
    assert units(gradient_checkpointing=True)["student"] == pytest.approx(std["student"] + 1.3)
    # tau = 739 is grid point 36, run_steps end at 99, grid point 4: 16 steps on average, then one.
    assert units(bank=BankConfig(enabled=False))["teacher"] == 2 * (1 + 16)
    assert units(judge=0.5)["adversarial"] == 1.5
    # Its score: one estimate, another one, and the backward of that. Own runs of 2, 4, 6 and 8 steps, to a
    # random one of them.
    dmd = {"teacher": 2, "student": 2.9, "own runs": 1.3 * 2, "score": 1.3 + 2.9}
    assert units(method="dmd") == pytest.approx(dmd)


def test_a_perceptual_network_is_counted_as_it_is(clip: Path, squeezenet_file: Path) -> None:
    judge = AdversarialConfig(0.5, features="perceptual", perceptual=str(squeezenet_file))
    judged, plain = _of(clip, adversarial=judge), _of(clip)
    assert judged.parameters["heads"] == sum(p.numel() for p in Heads([64, 128, 256, 384], 20).parameters())
    assert judged.evaluations["adversarial"] > 0
    wide = "autoencoder and encoders"
    network = sum(p.numel() for p in load_perceptual(squeezenet_file).parameters())
    assert judged.memory_gib[wide] - plain.memory_gib[wide] == pytest.approx(4 * network / GIB)


def test_work_and_activations_grow_with_the_batch(clip: Path) -> None:
    one, many = _of(clip, batch=1, accumulate=2), _of(clip, batch=3, accumulate=4)
    assert many.step_flops == pytest.approx(6 * one.step_flops)
    assert many.step_s == pytest.approx(many.step_flops / (0.4 * 1e12))
    assert many.memory_gib["activations"] == pytest.approx(3 * one.memory_gib["activations"])
    checkpointed = _of(clip, batch=3, gradient_checkpointing=True).memory_gib["activations"]
    assert checkpointed < 0.5 * many.memory_gib["activations"]


def test_checkpointing_takes_its_share_of_the_decoder_where_it_has_that(clip: Path, own: Path) -> None:
    def kept(base: Path, **changes: Any) -> float:
        judged = AdversarialConfig(0.5, size_px=28)
        return _of(base, adversarial=judged, **changes).memory_gib["decoder and DINOv2 activations"]

    assert 0.6 < kept(clip, gradient_checkpointing=True) / kept(clip) < 1
    assert kept(own, gradient_checkpointing=True) == kept(own)


def test_text_encoders_are_in_half_precision_on_a_gpu(clip: Path, own: Path) -> None:
    def encoders(base: Path, device: str, **changes: Any) -> float:
        return _of(base, device, **changes).memory_gib["autoencoder and encoders"]

    narrow = encoders(clip, "cuda:0")
    assert narrow < encoders(clip, "cuda:0", precision="fp32") == encoders(clip, "cpu")
    assert encoders(own, "cuda:0") == encoders(own, "cpu")


def test_precision_device_and_optimizer_decide_what_weights_take() -> None:
    counts = {"unet": 100, "lora": 16, "heads": 2}

    def sizes(*, on_cpu: bool = True, **changes: Any) -> dict[str, float]:
        weights = _weights(_recipe(**changes), counts, 10, on_cpu=on_cpu)
        return {name: round(gib * GIB) for name, gib in weights.items()}

    assert sizes(precision="fp32")["base weights"] == 400
    assert sizes(precision="bf16", on_cpu=False)["base weights"] == 200
    assert sizes() == {
        "base weights": 600,  # and autocast's copy
        "autoencoder and encoders": 40,
        "LoRA and heads": 72,
        "moving average": 64,
        "gradients": 72,
        "optimizer states": 144,
    }
    assert sizes(optimizer="adamw8bit")["optimizer states"] == 2 * 16 + 8 * 2


def test_the_description_says_what_it_assumes(clip: Path) -> None:
    recipe = _recipe(clip, adversarial=AdversarialConfig(0.5), bank=BankConfig(capacity=4000))
    found = estimate(recipe, flops_per_s=1e12)
    lines = describe(recipe, found)
    text = "\n".join(lines)
    assert f"{found.parameters['lora']:,} parameters in a LoRA of rank 4" in text
    assert f"{found.parameters['heads']:,} in the discriminator's heads" in text
    for part in (
        "rate     learning rate at most",
        "GiB  trajectory bank",
        "UNet evaluations per sample",
        "40%",
        "bf16 matmul",
    ):
        assert part in text
    assert not any("\n" in line for line in lines)


def test_a_bank_on_the_cpu_takes_none_of_the_gpus_memory(clip: Path) -> None:
    apart = _of(clip, "cuda:0", bank=BankConfig(capacity=4000, device="cpu"))
    beside = _of(clip, "cuda:0", bank=BankConfig(capacity=4000))
    assert "trajectory bank" not in apart.memory_gib
    assert beside.memory_gib["trajectory bank"] == apart.bank_gib
    assert f"{apart.bank_gib:.2f} GiB of the CPU's memory" in "\n".join(describe(_recipe(clip), apart))


def test_the_machine_is_measured() -> None:
    assert measure_flops("cpu", "fp32", seconds=0.02) > 1e8


def test_a_recipe_that_does_not_fit_is_one_line(clip: Path) -> None:
    with pytest.raises(RecipeError, match=r"^lora\.targets: 'to_x' fits no [^\n]*$"):
        _of(clip, lora=LoraConfig(4, 4.0, ("to_x",)))
    with pytest.raises(RecipeError, match=r"^pictures\.resolution_px = 60 "):
        _of(clip, pictures=PicturesConfig("p", resolution_px=60))


@pytest.mark.parametrize(
    ("part", "changes", "match"),
    [
        ("unet", {"addition_embed_type": None}, "not an SDXL UNet"),
        ("unet", {"down_block_types": ["NoSuchBlock"] * 2}, r"unet/config\.json does not describe"),
        ("vae", {"_class_name": "NoSuchAutoencoder"}, "names NoSuchAutoencoder"),
    ],
)
def test_a_base_of_another_kind_is_one_line(
    clip: Path, tmp_path: Path, part: str, changes: dict[str, Any], match: str
) -> None:
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
        config = json.loads((clip / name / "config.json").read_text(encoding="utf-8"))
        config |= changes if name == part else {}
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RecipeError, match=match):
        _of(tmp_path)


@pytest.mark.long  # SDXL is built of meta tensors; the miniatures above hold every rule
def test_sdxl_is_estimated_without_a_download() -> None:
    recipe = load_recipe(RECIPES / "std_sdxl_i2i.toml", ("pictures.folder=x",))
    found = estimate(recipe, "cuda:0", flops_per_s=5e14)
    assert found.parameters["unet"] == 2_567_463_684
    assert found.parameters["vae"] == 83_653_863
    assert found.parameters["lora"] == 196_751_360
    assert found.step_flops / 16 / sum(found.evaluations.values()) == pytest.approx(1.59e12, rel=0.01)
    assert found.evaluations["teacher"] == 2
    # bf16 base 4.8, autoencoder, encoders and DINO 1.9, LoRA with all that belongs to it 2.6, decoder 4.1
    # (without checkpointing 5.7, within a fifth of the sums over every tensor that autograd keeps).
    assert found.memory_gib["decoder and DINOv2 activations"] == pytest.approx(4.1, rel=0.2)
    plain = estimate(replace(recipe, gradient_checkpointing=False), "cuda:0", flops_per_s=5e14)
    assert plain.memory_gib["decoder and DINOv2 activations"] == pytest.approx(5.7, rel=0.2)
    assert found.memory_gib["activations"] == pytest.approx(0.26, rel=0.2)
    assert 12 < sum(found.memory_gib.values()) < 20
