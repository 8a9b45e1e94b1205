"""The student: what is trained, that it starts as the teacher, and that diffusers reads what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as XL
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from support.pipelines import TEXT_DIMS, randomize, write_clip_pipeline, write_own_pipeline
from torch import Tensor, nn

from std_rt.core.base_model import unet_digest
from std_rt.core.errors import RecipeError
from std_rt.core.schedule import trajectory_timesteps
from std_rt.export.lora_fusion import fuse_lora
from std_rt.training.distil import lora as module
from std_rt.training.distil.lora import (
    Average,
    adapters_off,
    add_lora,
    functional,
    lora_parameters,
    make_notes,
    save_lora,
    tuner_layers,
)
from std_rt.training.run.recipe import LORA_TARGETS, LoraConfig, UNetConfig
from std_rt.training.tiny.tiny_pipeline import build_unet

SMALL = LoraConfig(rank=4, alpha=6.0)
NOTES = {"method": "std", "eta": "0.75"}
Make = Callable[[], UNet2DConditionModel]


def read_lora(path: Path) -> dict[str, Tensor]:
    """A file's tensors by the names that they train under."""
    return {
        key.removeprefix("unet.").replace(".weight", ".default.weight"): v
        for key, v in load_file(path).items()
    }


def read_notes(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_pipeline(tmp_path_factory.mktemp("lora") / "clip", layers_per_block=1)


@pytest.fixture(scope="module")
def networks(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, UNet2DConditionModel]:
    """SDXL's kind of UNet, and std-tiny's without and with its image branch."""
    own = write_own_pipeline(tmp_path_factory.mktemp("lora") / "own")
    config = UNetConfig(
        (32, 48), cross_attention_dim=24, attention_head_dim=16, style_tokens=4, pooled_dim=20
    )
    found = {"clip": clip_folder, "own": own}
    unets = {name: UNet2DConditionModel.from_pretrained(f / "unet").eval() for name, f in found.items()}
    return unets | {"tiny": randomize(build_unet(config, 8), 0)}


@pytest.fixture(params=["clip", "own", "tiny"])
def make(request: pytest.FixtureRequest, networks: dict[str, UNet2DConditionModel]) -> Make:
    """A function that gives the same network again, to be changed at will."""
    return lambda: deepcopy(networks[request.param])


@pytest.fixture
def own(networks: dict[str, UNet2DConditionModel]) -> UNet2DConditionModel:
    """The smallest of them."""
    return deepcopy(networks["own"])


def inputs(unet: UNet2DConditionModel, batch: int = 2) -> dict[str, Any]:
    """Arguments of one evaluation, the same at every call."""
    rng = torch.Generator().manual_seed(3)
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added: dict[str, Any] = {
        "text_embeds": torch.randn(batch, pooled, generator=rng),
        "time_ids": torch.full((batch, 6), 64.0),
    }
    if unet.encoder_hid_proj is not None:
        added["image_embeds"] = [torch.randn(batch, 1, 4, config.cross_attention_dim, generator=rng)]
    return {
        "sample": torch.randn(batch, config.in_channels, 8, 8, generator=rng),
        "timestep": torch.tensor([739, 19][:batch]),
        "encoder_hidden_states": torch.randn(batch, 3, config.cross_attention_dim, generator=rng),
        "added_cond_kwargs": added,
    }


def run(unet: UNet2DConditionModel) -> Tensor:
    with torch.no_grad():
        return unet(**inputs(unet)).sample


def draw(unet: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Random weights in the live LoRA; returns copies."""
    rng = torch.Generator().manual_seed(seed)
    for value in lora_parameters(unet).values():
        value.data = torch.randn(value.shape, generator=rng) * value[0].numel() ** -0.5
    return {name: value.detach().clone() for name, value in lora_parameters(unet).items()}


def student(make: Make, config: LoraConfig = SMALL, seed: int = 0) -> UNet2DConditionModel:
    unet = make()
    add_lora(unet, config, seed)
    return unet


def test_the_student_starts_as_the_teacher(make: Make) -> None:
    teacher = run(make())
    unet = student(make)
    assert torch.equal(run(unet), teacher)
    draw(unet)
    assert (run(unet) - teacher).abs().max() > 0.01
    with adapters_off(tuner_layers(unet)):
        assert torch.equal(run(unet), teacher)


def test_the_layers_of_the_method_are_adapted_and_the_image_branch_is_not(make: Make) -> None:
    unet = make()
    layers = add_lora(unet, SMALL, 0)
    ends = {target for target in LORA_TARGETS for name in layers if name.endswith(f".{target}")}
    assert ends == set(LORA_TARGETS)
    assert not [name for name in lora_parameters(unet) if "processor" in name or "_ip" in name]
    assert {name.rsplit(".lora_", 1)[0] for name in lora_parameters(unet)} == set(layers)
    rows = sum(value.shape[0] for name, value in lora_parameters(unet).items() if ".lora_A." in name)
    assert rows == 4 * len(layers)


def test_every_layer_of_the_blocks_is_adapted(make: Make) -> None:
    """Attention, feed-forward, convolutions, shortcuts, samplers and time projections: all there are."""
    unet = make()
    weighted = {n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    blocks = {n for n in weighted if n.startswith(("down_blocks.", "mid_block.", "up_blocks."))}
    assert any(isinstance(unet.get_submodule(n), nn.Conv2d) for n in blocks)
    assert set(add_lora(unet, SMALL, 0)) == {n for n in blocks if ".processor." not in n}


def test_an_ip_adapters_projection_is_left_alone(make: Make) -> None:
    """IP-Adapter Plus has layers of the same names: proj_in, to_q, ff.net.2 of its resampler."""
    unet = make()
    unet.encoder_hid_proj = nn.ModuleDict({"proj_in": nn.Linear(2, 2), "to_q": nn.Linear(2, 2)})
    assert not [name for name in add_lora(unet, SMALL, 0) if name.startswith("encoder_hid_proj")]


def test_only_the_lora_learns(make: Make) -> None:
    unet = student(make)
    draw(unet)
    unet(**inputs(unet)).sample.square().sum().backward()
    learning = {name for name, value in unet.named_parameters() if value.requires_grad}
    with_gradient = {name for name, value in unet.named_parameters() if value.grad is not None}
    assert learning == with_gradient == set(lora_parameters(unet))
    assert all(value.grad.abs().max() > 0 for value in lora_parameters(unet).values())


def test_the_seed_alone_decides_the_start(own: UNet2DConditionModel) -> None:
    def start(seed: int) -> dict[str, Tensor]:
        unet = deepcopy(own)
        before = torch.get_rng_state()
        add_lora(unet, SMALL, seed)
        assert torch.equal(torch.get_rng_state(), before), "the global random state moved"
        return {name: value.detach().clone() for name, value in lora_parameters(unet).items()}

    one, torch_seeded, other = start(7), (torch.manual_seed(5), start(7))[1], start(8)
    assert list(one) == list(torch_seeded)
    assert all(torch.equal(one[name], torch_seeded[name]) for name in one)
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == [name for name in one if ".lora_A." in name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_lora_is_fp32_on_a_base_of_half_precision(own: UNet2DConditionModel, dtype: torch.dtype) -> None:
    unet = own.to(dtype)
    add_lora(unet, SMALL, 0)
    assert {value.dtype for value in lora_parameters(unet).values()} == {torch.float32}
    assert unet.conv_in.weight.dtype == dtype


def test_a_wrong_target_is_named(own: UNet2DConditionModel) -> None:
    unet = own
    with pytest.raises(RecipeError, match=r"'to_qq' fits no .*did you mean 'to_q'\? \(it has .*conv_in, "):
        add_lora(unet, replace(SMALL, targets=("to_v", "to_qq")), 0)
    with pytest.raises(RecipeError, match="nothing fits no"):
        add_lora(unet, replace(SMALL, targets=()), 0)
    assert not lora_parameters(unet)
    assert len(add_lora(unet, replace(SMALL, targets=("conv_in",)), 0)) == 1


def test_switching_off_nests_restores_and_leaves_gradients_alone(own: UNet2DConditionModel) -> None:
    unet, teacher = own, run(own)
    add_lora(unet, SMALL, 0)
    draw(unet)
    live = run(unet)
    with adapters_off(tuner_layers(unet)):
        with adapters_off(tuner_layers(unet)):
            assert torch.equal(run(unet), teacher)
        assert torch.equal(run(unet), teacher)
        assert all(value.requires_grad for value in lora_parameters(unet).values())
    assert torch.equal(run(unet), live)
    with pytest.raises(TypeError), adapters_off(tuner_layers(unet)):
        unet()
    assert torch.equal(run(unet), live)


def test_a_functional_run_equals_loading_the_weights(make: Make) -> None:
    unet, other = student(make), student(make)
    live, mine = draw(unet, 1), draw(other, 2)
    output = functional(unet, mine, **inputs(unet)).sample
    assert torch.equal(output, run(other))
    assert not output.requires_grad
    assert all(torch.equal(value, live[name]) for name, value in lora_parameters(unet).items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_functional_run_and_the_teacher_disturb_no_graph(
    own: UNet2DConditionModel, checkpointing: bool
) -> None:
    """In a training step, both run between the student's forward and its backward."""

    def gradients(between: Callable[[UNet2DConditionModel], Any]) -> list[Tensor]:
        unet = deepcopy(own).train()
        add_lora(unet, SMALL, 0)
        draw(unet)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        loss = unet(**inputs(unet)).sample.square().sum()
        between(unet)
        loss.backward()
        unet(**inputs(unet)).sample.sum().backward()
        return [value.grad for value in lora_parameters(unet).values()]

    def both(unet: UNet2DConditionModel) -> None:
        zeros = {name: torch.zeros_like(value) for name, value in lora_parameters(unet).items()}
        with adapters_off(tuner_layers(unet)), torch.no_grad():
            teacher = unet(**inputs(unet)).sample
        assert torch.equal(functional(unet, zeros, **inputs(unet)).sample, teacher)

    for plain, disturbed in zip(gradients(lambda unet: None), gradients(both), strict=True):
        assert torch.equal(plain, disturbed)


def test_the_average_by_hand() -> None:
    live = {"a": nn.Parameter(torch.tensor([1.0, 2.0])), "b": nn.Parameter(torch.tensor([[4.0]]))}
    average = Average(live)
    live["a"].data.add_(1)
    assert average.tensors["a"].tolist() == [1.0, 2.0]  # a copy
    average.update(0.75)
    torch.testing.assert_close(average.tensors["a"], torch.tensor([1.25, 2.25]))
    average.update(0.5)
    torch.testing.assert_close(average.tensors["a"], torch.tensor([1.625, 2.625]))
    assert average.tensors["b"].item() == 4.0
    assert not average.tensors["a"].requires_grad
    average.update(0.0)
    assert torch.equal(average.tensors["a"], live["a"])


@pytest.mark.parametrize("alpha", [4.0, 1.5])
def test_diffusers_reads_what_is_written(make: Make, tmp_path: Path, alpha: float) -> None:
    """Saved, loaded into a fresh network by diffusers, or fused by export: one output."""
    config = replace(SMALL, alpha=alpha)
    unet = student(make, config)
    expected, path = (draw(unet), run(unet))[1], tmp_path / "l.safetensors"
    save_lora(path, lora_parameters(unet), NOTES, config, torch.float32)
    loaded, fused = make(), make()
    state, alphas, metadata = XL.lora_state_dict(
        str(path), unet_config=loaded.config, return_lora_metadata=True
    )
    XL.load_lora_into_unet(state, alphas, loaded, metadata=metadata)
    torch.testing.assert_close(run(loaded), expected, atol=1e-5, rtol=0)
    fuse_lora({"unet": fused}, path, 1.0)
    torch.testing.assert_close(run(fused), expected, atol=1e-5, rtol=0)


def test_readers_that_take_alpha_for_the_rank_see_the_same_lora(
    own: UNet2DConditionModel, tmp_path: Path
) -> None:
    """Without the metadata, in diffusers, PEFT and our export."""
    unet, loaded, bare, fused = (deepcopy(own) for _ in range(4))
    add_lora(unet, SMALL, 0)
    draw(unet)
    save_lora(tmp_path / "l.safetensors", lora_parameters(unet), NOTES, SMALL, torch.float32)
    state = load_file(tmp_path / "l.safetensors")
    save_file(state, tmp_path / "bare.safetensors")
    XL.load_lora_into_unet(dict(state), None, loaded)
    fuse_lora({"unet": fused}, tmp_path / "bare.safetensors", 1.0)
    names = {name.removeprefix("unet."): value for name, value in state.items()}
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in names})
    bare.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=layers), "default")
    assert not peft.set_peft_model_state_dict(bare, names).unexpected_keys
    for network in (loaded, fused, bare):
        torch.testing.assert_close(run(network), run(unet), atol=1e-5, rtol=0)


def test_a_pipeline_loads_it(clip_folder: Path, tmp_path: Path) -> None:
    """As a user does, with both ways to give a file, and halves as a snapshot has them."""
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(clip_folder)
    unet = deepcopy(pipe.unet).eval()
    config = replace(SMALL, alpha=8.0)  # twice the rank: halves stay what they are
    add_lora(unet, config, 0)
    halves = {name: value.half().float() for name, value in draw(unet).items()}
    save_lora(tmp_path / "std.safetensors", halves, NOTES, config)
    pipe.load_lora_weights(tmp_path, weight_name="std.safetensors")
    expected = functional(unet, halves, **inputs(unet)).sample
    torch.testing.assert_close(run(pipe.unet), expected, atol=1e-5, rtol=0)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(tmp_path / "std.safetensors"))
    torch.testing.assert_close(run(pipe.unet), expected, atol=1e-5, rtol=0)
    assert inputs(unet)["encoder_hidden_states"].shape[2] == sum(TEXT_DIMS)


def test_notes_and_weights_come_back(make: Make, tmp_path: Path) -> None:
    unet = student(make)
    written = draw(unet)
    path = tmp_path / "new" / "l.safetensors"
    save_lora(path, lora_parameters(unet), NOTES, SMALL, torch.float32)
    read = read_lora(path)
    assert read.keys() == written.keys()
    for name, value in written.items():
        assert torch.equal(read[name], value * 1.5 if ".lora_A." in name else value)  # alpha over rank
    notes = read_notes(path)
    assert notes | NOTES == notes
    assert (notes["rank"], notes["alpha"], notes["format"]) == ("4", "4", "pt")
    adapter = json.loads(notes["lora_adapter_metadata"])
    assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (4, 4)
    keys = load_file(path).keys()
    assert all(key.startswith("unet.") and ".default." not in key for key in keys)
    assert not list(path.parent.glob(".*.part*"))


def test_notes_say_where_the_trajectory_runs() -> None:
    notes = make_notes(
        method="std", eta=0.75, tau=679, run_steps=(4, 2), guidance=(6, 16), base="xl", base_digest="ab",
        step=10, seed=3,
    )  # fmt: skip
    assert (notes["eta"], notes["tau"], notes["grid"], notes["steps"]) == ("0.75", "679", "50", "4 2")
    assert json.loads(notes["timesteps"])["4"] == trajectory_timesteps(0.75, 4, 679)
    assert json.loads(notes["guidance"]) == [6.0, 16.0]
    assert all(isinstance(value, str) for value in notes.values())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_a_full_disk_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "l.safetensors"
    tensors = {"a.lora_A.default.weight": torch.ones(2, 2)}
    save_lora(path, tensors, NOTES, SMALL)

    def full(state: dict[str, Tensor], filename: Path, metadata: dict[str, str]) -> None:
        filename.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        RecipeError, match=r"could not be written: .*disk may be full.*previous file is intact"
    ):
        save_lora(path, {"a.lora_A.default.weight": torch.zeros(2, 2)}, NOTES, SMALL)
    assert read_lora(path)["a.lora_A.default.weight"].sum() == 6
    assert [found.name for found in tmp_path.iterdir()] == ["l.safetensors"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"cannot be written: .*; choose another output") as caught:
        save_lora(tmp_path / "file" / "l.safetensors", {}, NOTES, SMALL)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    for value in (float("nan"), 1e6):
        with pytest.raises(RecipeError, match="not finite as float16, so no LoRA is written"):
            save_lora(
                tmp_path / "l.safetensors", {"a.lora_A.default.weight": torch.tensor([value])}, {}, SMALL
            )
    assert not list(tmp_path.iterdir())


def test_the_digest_tells_architectures_apart_and_nothing_else(
    make: Make, networks: dict[str, UNet2DConditionModel]
) -> None:
    def digest(unet: nn.Module) -> str:
        return unet_digest({name: tuple(value.shape) for name, value in unet.state_dict().items()})

    plain = digest(make())
    assert digest(student(make)) == plain
    assert digest(randomize(make(), 9)) == plain
    assert len({digest(unet) for unet in networks.values()}) == 3
