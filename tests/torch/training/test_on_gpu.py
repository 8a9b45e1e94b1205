"""What would go wrong or wait on a GPU: the device ``meta`` stands for it, and fp16 runs on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.distil_runs import small_recipe
from support.motion_training import write_motion_base
from support.pipelines import write_clip_pipeline
from torch import Tensor
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from std_rt.core.errors import RecipeError
from std_rt.training.distil import bank, distiller, loop, trajectory
from std_rt.training.distil.base import Base, load_base
from std_rt.training.distil.distiller import Distiller
from std_rt.training.distil.features import load_dino
from std_rt.training.distil.lora import Average, add_lora, lora_parameters, tuner_layers
from std_rt.training.distil.sampling import sample_latents
from std_rt.training.run import cost
from std_rt.training.run.recipe import DistilConfig, LoraConfig, MotionConfig
from std_rt.training.tiny.triplets import TripletSource


@pytest.fixture
def config(base_folder: Path, triplets: Path, tmp_path: Path) -> DistilConfig:
    return small_recipe(tmp_path / "run", base_folder, triplets)


class _Waits(TorchDispatchMode):
    """Operations for which the host would wait for the device, but for what `send` copies."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.found, self.sending = device, [], False

    def send(self, x: Tensor, device: torch.device | str) -> Tensor:
        self.sending = True
        try:
            return x.to(device)
        finally:
            self.sending = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x.device.type for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        name, there = func.overloadpacket.__name__, self.device in given
        copied_to = torch.device(kwargs.get("device") or "cpu").type == self.device
        crosses = (there or copied_to) and set(given) != {self.device} and not self.sending
        if (
            (name == "_local_scalar_dense" and there)
            or (name == "_to_copy" and crosses)
            or (name in ("index", "index_put_", "copy_") and there and "cpu" in given)
        ):
            self.found.append(name)
        return func(*args, **kwargs)


def _on(device: str, config: DistilConfig) -> Distiller:
    """A distiller whose networks and bank are moved to a device once the bank is full."""
    base = load_base(config.base)
    add_lora(base.unet, config.lora, config.seed)
    source = TripletSource(config.triplets, base, config.seed, 0)
    made = Distiller(config, base, source, Average(lora_parameters(base.unet)))
    made.spread_bank()
    base.to(device)
    made.device, made.device_levels = device, made.levels.to(device)
    made.average = Average(lora_parameters(base.unet))
    made.bank.slots = {shape: [row.to(device) for row in rows] for shape, rows in made.bank.slots.items()}
    made.bank.device = device
    return made


@pytest.mark.parametrize("jumps", ["all", "last"])
def test_no_step_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch, config: DistilConfig, jumps: str) -> None:
    """The host is the bottleneck at a batch of one: while it waits, nothing is put on the GPU's stream."""
    given = replace(config.adversarial, jumps=jumps)
    made, waits = _on("meta", replace(config, adversarial=given)), _Waits("meta")
    for module in (trajectory, distiller, bank):
        monkeypatch.setattr(module, "send", waits.send)
    with waits:
        batch = made.draw()
        x = made.student_jump(made.base.unet, batch.states, batch.s)
        shown, real = batch.shown(x), batch.shown(batch.real)
        loss = made.consistency_loss(x, batch) + batch.judged_share * shown.mean()
        loss.backward()
    assert (shown.device.type, shown.shape) == ("meta", real.shape)
    assert not waits.found


def test_that_waits_are_seen() -> None:
    waits, x = _Waits("meta"), torch.zeros(3, device="meta")
    with waits:
        x[torch.tensor([1])]
        torch.ones(3).to("meta")
        with pytest.raises(RuntimeError, match="meta"):
            x.sum().item()
    assert waits.found == ["index", "_to_copy", "_local_scalar_dense"]


def test_the_network_of_pictures_is_not_kept_beside_that_of_clips(tmp_path: Path) -> None:
    """In fp16 SDXL's is 5 GB, which would go to the GPU with the text encoders' pipeline."""
    folder = write_motion_base(tmp_path)
    pictures = load_base(folder)
    clips = load_base(folder, motion=MotionConfig(str(folder / "motion"), 4, 2))
    assert pictures.text is not None
    assert clips.text is not None
    moved = [p for p in vars(clips.text.pipeline).values() if isinstance(p, torch.nn.Module)]
    moved += [p for p in clips.text.pipeline.components.values() if isinstance(p, torch.nn.Module)]
    assert not any(hasattr(part, "down_blocks") for part in moved)
    for ours, theirs in zip(clips.text(["a cat"]), pictures.text(["a cat"]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_the_lora_are_cast_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """Under autocast PEFT's own cast changes nothing but the number of launches."""
    base = load_base(write_clip_pipeline(tmp_path / "base"), dtype)
    add_lora(base.unet, LoraConfig(rank=4, alpha=4.0), 0)
    found = []
    for enabled in (True, False):
        for layer in tuner_layers(base.unet):
            assert isinstance(layer, torch.nn.Module)
            assert enabled or not layer.cast_input_dtype_enabled
            if enabled:
                del layer.cast_input_dtype_enabled
        launches, output = _gradients(base, dtype)
        found.append((launches, output))
        for layer in tuner_layers(base.unet):
            layer.cast_input_dtype_enabled = False
    (more, theirs), (fewer, ours) = found
    assert fewer < more
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class _Casts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def _gradients(base: Base, dtype: torch.dtype) -> tuple[int, dict[str, Tensor]]:
    """Casts of one forward and backward, and the LoRA's gradients."""
    parameters = lora_parameters(base.unet)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    cond = base.condition(base.read_text(["a"]), None, torch.full((1, 6), 64.0))
    with _Casts() as casts, torch.autocast("cpu", dtype):
        base.predict(base.unet, x, torch.tensor([500]), cond).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    base.unet.zero_grad()
    return casts.count, gradients


def test_sheets_run_in_the_runs_precision(config: DistilConfig) -> None:
    """Weights in a half type and a LoRA in fp32 need autocast; a second one, switched off, would undo it."""
    base = load_base(config.base)
    seen: list[bool] = []

    class Unet(torch.nn.Module):
        def forward(self, x: Tensor, *given: Any, **more: Any) -> tuple[Tensor]:
            seen.append(torch.is_autocast_enabled("cpu"))
            return (x[:, :8],)

    z = torch.zeros(1, base.unet.config.out_channels, 8, 8)
    cond = base.condition(None, base.look(torch.zeros(1, 3, 64, 64)), torch.zeros(1, 6), z)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            sample_latents(base, cond, z, [500], 1.0, torch.zeros(1, *z.shape), unet=Unet())
    assert seen == [True, False]


# --- DMD's second LoRA ------------------------------------------------------------------------------------


class _Accelerator:
    """What `_Score` asks of one: of a run in fp16, with a step after each batch."""

    scaler, sync_gradients, device = object(), True, torch.device("cpu")

    def reduce(self, value: Tensor, how: str) -> Tensor:
        return value


def _score(config: DistilConfig, precision: str) -> tuple[loop._Score, list[Tensor], Distiller]:
    """The second LoRA's turn in a precision, and the gradients that its optimizer is given."""
    base = load_base(config.base)
    add_lora(base.unet, config.lora, config.seed)
    rng = torch.Generator().manual_seed(2)
    for value in lora_parameters(base.unet).values():
        value.data = 1e-3 * torch.randn(value.shape, generator=rng)
    source = TripletSource(config.triplets, base, config.seed, 0)
    asked = replace(config, method="dmd", precision=precision)
    made = Distiller(asked, base, source, Average(lora_parameters(base.unet)))
    assert made.matching is not None
    score = loop._Score(config, made.matching, _Accelerator(), 1e-3)
    given: list[Tensor] = []

    def step() -> None:
        assert made.matching is not None
        given.extend(value.grad.clone() for value in made.matching.tensors.values())

    score.optimizer.step = step
    return score, given, made


@pytest.fixture
def small_losses(config: DistilConfig) -> DistilConfig:
    """So many batches to a step that most gradients are below what fp16 tells from zero."""
    return replace(config, accumulate=64)


def test_dmds_second_lora_has_its_gradients_in_fp16_too(small_losses: DistilConfig) -> None:
    found = {}
    for precision, scale in (("fp32", 1.0), ("fp16", None), ("fp16", 1.0)):
        score, given, made = _score(small_losses, precision)
        if scale is not None:
            score.scaler = GradScaler("cpu", init_scale=scale)
        states = made.fresh(2, made.source.shapes[0])
        score.step(torch.zeros_like(states.z), SimpleNamespace(states=states))
        found[precision, scale] = torch.cat([value.flatten() for value in given])
    exact, half, unscaled = found.values()
    assert (half - exact).norm() < 0.02 * exact.norm()
    assert (unscaled - exact).norm() > 0.1 * exact.norm()


def test_a_step_that_overflows_is_skipped_and_the_scale_halved_for_a_while(
    config: DistilConfig,
) -> None:
    score, given, made = _score(config, "fp16")
    states = made.fresh(2, made.source.shapes[0])
    batch = SimpleNamespace(states=states)
    score.scaler = GradScaler("cpu", init_scale=2.0**100)
    score.step(torch.zeros_like(states.z), batch)
    assert (given, score.scaler.get_scale()) == ([], 2.0**99)
    score.scaler = GradScaler("cpu", init_scale=64, growth_interval=3)
    found = []
    for _ in range(4):
        score.step(torch.zeros_like(states.z), batch)
        found.append(score.scaler.get_scale())
    assert found == [64, 64, 128, 128]


# --- memory -----------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without room for a UNet."""

    def refuse(self: Any, *given: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr("std_rt.models.components.UNet2DConditionModel.to", refuse)
    monkeypatch.setattr("diffusers.UNet2DConditionModel.to", refuse)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", refuse)


@pytest.mark.usefixtures("full")
def test_a_full_gpu_is_not_a_bad_base(tmp_path: Path, config: DistilConfig) -> None:
    folder = write_clip_pipeline(tmp_path / "base")
    with pytest.raises(torch.OutOfMemoryError):
        load_base(folder)
    with pytest.raises(RecipeError) as told:
        loop.train_distil(replace(config, base=str(folder)))
    assert str(told.value).startswith("the GPU ran out of memory (CUDA out of memory. Tried to allocate")
    assert "; continue with --set gradient_checkpointing=true --set bank.device=cpu" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.usefixtures("full")
def test_a_full_gpu_is_not_a_bad_dino(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}', encoding="utf-8")
    with pytest.raises(torch.OutOfMemoryError):
        load_dino(str(tmp_path))


def test_the_first_product_on_a_device_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA loads its libraries then, for longer than the measurement takes."""
    now, products = [0.0], []
    multiply = torch.Tensor.__matmul__

    def slow_at_first(a: Tensor, b: Tensor) -> Tensor:
        now[0] += 0.001 if products else 5.0
        products.append(1)
        return multiply(a, b)

    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.Tensor, "__matmul__", slow_at_first)
    assert cost.measure_flops("cpu", "fp32") == pytest.approx(2 * 512**3 / 0.001)


def test_a_folder_with_fp16_files_only_is_a_base(tmp_path: Path) -> None:
    """As ``hf download`` leaves them with ``--include '*fp16*'``."""
    whole = load_base(write_clip_pipeline(tmp_path / "whole"))
    folder = write_clip_pipeline(tmp_path / "base")
    for path in [*folder.glob("*/diffusion_pytorch_model.safetensors"), *folder.glob("*/model.safetensors")]:
        path.rename(path.with_suffix(".fp16.safetensors"))
    half = load_base(folder)
    assert half.unet.state_dict().keys() == whole.unet.state_dict().keys()
    assert torch.equal(half.unet.conv_in.weight, whole.unet.conv_in.weight)
    assert half.text is not None
    assert whole.text is not None
    assert torch.equal(half.text(["a"])[0], whole.text(["a"])[0])


def test_parts_with_and_without_fp16_files_and_other_folders_are_told_apart(tmp_path: Path) -> None:
    folder = write_clip_pipeline(tmp_path / "base")
    for path in folder.glob("text_encoder*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    (folder / "text_encoder" / "LICENSE").touch()  # diffusers splits every name at its dots
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load_base(folder)
    (folder / "text_encoder" / "LICENSE").unlink()
    (folder / "motion").mkdir()
    (folder / "motion" / "a.fp16.safetensors").touch()
    load_base(folder)


def test_pickled_weights_are_named(tmp_path: Path) -> None:
    folder = write_clip_pipeline(tmp_path / "base")
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    said = (
        r"cannot be loaded \(no \.safetensors weights in .*unet; convert \.bin weights with save_pretrained"
    )
    with pytest.raises(RecipeError, match=said):
        load_base(folder)
