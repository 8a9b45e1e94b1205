"""Distillation on a miniature std-tiny: the acceptance tests of the method, and the loop's promises."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.distil_runs import ADVERSARIAL, assert_same, read_checkpoint, small_recipe
from support.pipelines import write_clip_pipeline

from std_rt.core.errors import RecipeError, UsageError
from std_rt.core.schedule import NoiseSchedule, trajectory_timesteps
from std_rt.export.export_options import ExportOptions
from std_rt.export.source_pipeline import read_source
from std_rt.training.distil import distiller as distiller_module
from std_rt.training.distil import loop
from std_rt.training.distil.bank import States
from std_rt.training.distil.base import Base, Conditioning, load_base
from std_rt.training.distil.distiller import Distiller, StepBatch
from std_rt.training.distil.loop import train_distil
from std_rt.training.distil.lora import Average, add_lora, lora_parameters
from std_rt.training.distil.trajectory import Levels
from std_rt.training.run.checkpoint import load_state
from std_rt.training.run.precision import choose_device, precision_context, resolve_precision
from std_rt.training.run.recipe import (
    AdversarialConfig,
    BankConfig,
    DistilConfig,
    LoraConfig,
)
from std_rt.training.tiny.triplets import TripletSource

METHODS = ("std", "tcd", "lcm", "pcm")


@pytest.fixture
def config(base_folder: Path, triplets: Path, tmp_path: Path) -> DistilConfig:
    return small_recipe(tmp_path / "run", base_folder, triplets)


def _distiller(config: DistilConfig, base: Base | None = None, rank: int = 0) -> Distiller:
    base = base or load_base(config.base)
    add_lora(base.unet, config.lora, config.seed)
    source = TripletSource(config.triplets, base, config.seed, rank)
    return Distiller(config, base, source, Average(lora_parameters(base.unet)), rank=rank)


def _shake(distiller: Distiller) -> None:
    """A student that is not the teacher."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in lora_parameters(distiller.base.unet).values():
            value.add_(torch.randn(value.shape, generator=rng) * 0.1)


# --- acceptance tests of the method -------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_student_that_is_the_teacher_has_no_loss_one_grid_step_on(
    config: DistilConfig, method: str
) -> None:
    """Acceptance test 4: LoRA zero, no CFG gain, s = t - k."""
    distiller = _distiller(replace(config, method=method, guidance=(1.0, 1.0)))
    states, _, _ = distiller.draw_states()
    x_next = distiller.teacher_step(states)
    s = states.index - 1
    x_s = distiller.student_jump(distiller.base.unet, states, s)
    target = distiller.target_jump(states, x_next, s)
    assert torch.equal(target, x_next)
    assert (x_s - target).abs().max() < 1e-5
    _shake(distiller)
    changed = distiller.student_jump(distiller.base.unet, states, s)
    assert (changed - target).abs().max() > 1e-3


def test_replaying_the_teacher_reproduces_the_stored_states(
    config: DistilConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acceptance test 2, second half; the student's training does not touch the trajectory."""
    distiller = _distiller(config)
    born: dict[int, States] = {}
    original = distiller.fresh

    def recorded(*args: object) -> States:
        states = original(*args)  # type: ignore[arg-type]
        born.update({int(i): states.rows(slice(n, n + 1)) for n, i in enumerate(states.id)})
        return states

    monkeypatch.setattr(distiller, "fresh", recorded)
    for _ in range(4):
        _shake(distiller)
        distiller.draw()
    stored = distiller.bank.get((8, 8), list(range(distiller.bank.filled((8, 8)))))
    moved = 0
    for n, number in enumerate(stored.id.tolist()):
        first, row = born[number], stored.rows(slice(n, n + 1))
        again = distiller.run_down(first, row.index)
        assert torch.allclose(again.x, row.x, atol=1e-4)
        for name in ("z", "scale"):
            assert torch.equal(getattr(first, name), getattr(row, name))
        assert torch.equal(first.cond.pooled, row.cond.pooled)
        moved += int(first.index - row.index)
    assert moved > 0


def test_fresh_trajectories_start_at_tau_for_std_and_anywhere_for_the_others(config: DistilConfig) -> None:
    config = replace(config, batch=24, bank=BankConfig(capacity=48))
    tau = trajectory_timesteps(config.eta, 4)[0]
    for method in METHODS:
        distiller = _distiller(replace(config, method=method))
        t = set(distiller.levels.timestep(distiller.fresh(24, (8, 8)).index).tolist())
        assert max(t) == tau
        assert (len(t) == 1) == (method == "std")


def test_real_and_fake_are_of_one_item_and_real_is_less_noisy(config: DistilConfig) -> None:
    """Acceptance test 8: what is left of ``real`` when its noise is taken off is its own item's z."""
    distiller = _distiller(replace(config, batch=3))
    for _ in range(3):
        batch = distiller.draw()
        clean = batch.real - batch.states.z
        for row in range(3):
            others = [(batch.real[row] - batch.states.z[o]).square().mean() for o in range(3) if o != row]
            assert clean[row].square().mean() < min(others)
        noise = distiller.levels.sigma(batch.s.clamp(min=0))
        assert (clean.flatten(1).std(1) <= noise[:, 0, 0, 0] * 1.5 + 1e-4).all()


def test_last_jumps_alone_are_judged_and_all_else_is_as_published(config: DistilConfig) -> None:
    """Same states and jumps for a seed; only samples that end clean are shown, with clean pictures."""
    config = replace(config, batch=3, window=1.0)
    last = replace(config, adversarial=AdversarialConfig(jumps="last"))
    published, judged = _distiller(config), _distiller(last)
    seen = []
    for _ in range(16):
        a, b = published.draw(), judged.draw()
        assert torch.equal(a.states.x, b.states.x)
        assert torch.equal(a.s, b.s)
        assert torch.equal(a.target, b.target)
        ends = b.s == -1
        assert torch.equal(b.pair, ends)
        assert torch.equal(b.real[ends], b.states.z[ends])
        assert a.judged == slice(None)
        assert a.judged_share == 1.0
        rows = ends.nonzero()[:, 0].tolist() or [0]
        assert torch.as_tensor(b.judged).tolist() == rows
        assert b.judged_share == len(rows) / 3
        seen.append(int(ends.sum()))
    assert min(seen) == 0, "a batch without any"
    assert max(seen) > 0


def test_guidance_and_conditioning_are_drawn_once_a_trajectory(config: DistilConfig) -> None:
    distiller = _distiller(replace(config, drop_conditioning=0.5))
    seen: dict[int, tuple[float, tuple[float, ...]]] = {}
    for _ in range(8):
        states = distiller.draw().states
        for n, number in enumerate(states.id.tolist()):
            what = float(states.scale[n]), tuple(states.cond.pooled[n].tolist())
            assert seen.setdefault(number, what) == what
    scales = {scale for scale, _ in seen.values()}
    assert len(scales) == len(seen)
    assert all(2 <= s <= 3 for s in scales)
    dropped = sum(not any(pooled) for _, pooled in seen.values())
    assert 0 < dropped < len(seen)


def test_dropped_conditioning_drops_style_tokens_too(config: DistilConfig) -> None:
    states = _distiller(replace(config, drop_conditioning=1.0)).fresh(2, (8, 8))
    assert states.cond.tokens is not None
    assert not states.cond.tokens.any()
    assert not states.cond.pooled.any()
    assert states.cond.time_ids.any()


def test_guidance_is_applied_per_sample(config: DistilConfig) -> None:
    distiller = _distiller(config)
    states = distiller.fresh(2, (8, 8))
    both = distiller.teacher_step(replace(states, scale=torch.tensor([2.0, 5.0])))
    for n, scale in enumerate((2.0, 5.0)):
        alone = distiller.teacher_step(replace(states, scale=torch.full((2,), scale)))
        assert torch.allclose(both[n], alone[n], atol=1e-5)
    assert not torch.allclose(both[1], distiller.teacher_step(replace(states, scale=torch.ones(2)))[1])


def test_without_the_bank_states_are_the_same_kind(config: DistilConfig) -> None:
    """The ablation solves every state from tau: indices over the whole trajectory, no bank."""
    distiller = _distiller(replace(config, batch=16, bank=BankConfig(enabled=False)))
    states, slots, _ = distiller.draw_states()
    assert not slots
    assert len(distiller.bank) == 0
    assert len(set(states.index.tolist())) > 3
    assert states.index.max() <= distiller.levels.tau_index
    assert states.index.min() >= distiller.last


def test_a_photo_under_an_unrelated_style_is_its_own_target_and_the_style_is_real(
    config: DistilConfig,
) -> None:
    base = load_base(config.base)
    source = TripletSource(replace(config.triplets, paired=0.0), base, 0)
    new = source.take(4, (8, 8))
    assert torch.equal(new.z, new.c)
    assert not torch.equal(new.real, new.c)
    paired = TripletSource(config.triplets, base, 0).take(4, (8, 8))
    assert torch.equal(paired.real, paired.z)
    assert not torch.equal(paired.z, paired.c)


@pytest.mark.parametrize(
    "method", ["std", "pcm", *(pytest.param(m, marks=pytest.mark.long) for m in ("tcd", "lcm"))]
)
def test_with_a_stride_the_teacher_stops_at_the_target_and_trajectories_spread(
    config: DistilConfig, method: str
) -> None:
    config = replace(config, method=method, stride=3, window=0.6, batch=4, bank=BankConfig(capacity=12))
    distiller = _distiller(config)
    seen: set[int] = set()
    for _ in range(8):
        batch = distiller.draw()
        seen |= set(batch.states.index.tolist())
        assert (batch.s < batch.states.index).all()
    rows = [row for slots in distiller.bank.slots.values() for row in slots]
    assert all(int(row.index) >= distiller.last for row in rows)
    assert len(seen) > 4  # not only every third grid point


# --- the loop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["std", *(pytest.param(m, marks=pytest.mark.long) for m in ("tcd", "lcm", "pcm"))]
)
def test_a_resumed_run_equals_an_unbroken_one(config: DistilConfig, method: str, tmp_path: Path) -> None:
    """Acceptance test 6: weights, average, discriminator, optimizers, bank, random states and log."""
    whole = replace(config, steps=4, method=method, adversarial=ADVERSARIAL)
    whole = replace(whole, output=str(tmp_path / "whole"))
    broken = replace(whole, output=str(tmp_path / "broken"))
    train_distil(whole)
    train_distil(broken, stop_after=3)  # the checkpoint is of step 2: step 3 is done again
    left = Path(broken.output) / "loras" / ".000003.01234567.part.safetensors"  # by a kill while writing
    left.parent.mkdir(exist_ok=True)
    left.touch()
    train_distil(broken)
    assert not left.exists()
    assert_same(read_checkpoint(whole), read_checkpoint(broken))
    logs = [(Path(c.output) / "log.jsonl").read_bytes() for c in (whole, broken)]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 4
    loras = [load_file(Path(c.output) / "lora.safetensors") for c in (whole, broken)]
    assert_same(*loras)


@pytest.mark.parametrize("changes", [{"adversarial": ADVERSARIAL}, {"method": "dmd"}])
def test_a_run_that_ctrl_c_ended_equals_an_unbroken_one(
    config: DistilConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """In the middle of a step's batches, between two lines of the log and two checkpoints."""
    whole = replace(config, steps=5, accumulate=2, log_every=3, snapshot_every=4, **changes)
    broken = replace(whole, output=str(tmp_path / "broken"))
    train_distil(whole)
    draw, drawn = Distiller.draw, []

    def interrupted(distiller: Distiller) -> StepBatch:
        drawn.append(1)
        if len(drawn) == 3:  # the first batch of step 2
            signal.raise_signal(signal.SIGTERM)
        return draw(distiller)

    monkeypatch.setattr(Distiller, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_distil(broken)
    assert (Path(broken.output) / "checkpoints" / "newest").read_text(encoding="utf-8") == "000002"
    train_distil(broken)
    assert_same(read_checkpoint(whole), read_checkpoint(broken))
    logs = [(Path(c.output) / "log.jsonl").read_bytes() for c in (whole, broken)]
    assert logs[0] == logs[1]


def test_both_rates_grow_with_the_images_of_a_step_and_follow_one_schedule(config: DistilConfig) -> None:
    judge = replace(ADVERSARIAL, learning_rate=4e-2)
    config = replace(config, learning_rate=1e-2, rate_per_images=1, adversarial=judge, warmup=2, steps=4)
    config = replace(config, snapshot_every=1)
    for stop_after in (1, 4):  # half of the warm-up; after a resume, half of the cosine
        train_distil(config, stop_after=stop_after)
        checkpoints = Path(config.output) / "checkpoints"
        _, notes = load_state(checkpoints / f"{stop_after:06d}" / "shared.safetensors")
        found = {name: groups[0]["lr"] for name, groups in notes["groups"].items()}
        assert found == {"student": pytest.approx(1e-2), "heads": pytest.approx(4e-2)}


def _distance(config: DistilConfig, tensors: dict[str, torch.Tensor] | None) -> float:
    """Of a 2-step run at guidance 1 to the guided teacher's over all grid points, from the same noise."""
    distiller = _distiller(replace(config, drop_conditioning=0.0, bank=BankConfig(enabled=False)))
    states = distiller.fresh(4, (8, 8))
    teacher = distiller.run_down(states, torch.full((4,), -1)).x
    if tensors is not None:
        with torch.no_grad():
            for name, value in lora_parameters(distiller.base.unet).items():
                value.copy_(tensors[f"unet.{name.replace('.default.', '.')}"].float())
    middle = (trajectory_timesteps(config.eta, 2)[1] + 1) // 20 - 1
    for s in (middle, -1):
        with torch.no_grad():
            x = distiller.student_jump(distiller.base.unet, states, torch.full((4,), s))
        states = replace(states, x=x, index=torch.full((4,), s))
    return float((states.x - teacher).square().mean().sqrt())


@pytest.mark.parametrize(("steps", "share"), [(6, 0.99), pytest.param(30, 0.92, marks=pytest.mark.long)])
def test_training_brings_the_student_to_the_teacher(config: DistilConfig, steps: int, share: float) -> None:
    config = replace(config, steps=steps, batch=4, snapshot_every=30, log_every=20, drop_conditioning=0.0)
    config = replace(config, guidance=(3.0, 3.0), bank=BankConfig(capacity=8), learning_rate=1e-2)
    trained = load_file(train_distil(config))
    assert _distance(config, trained) < share * _distance(config, None)


@pytest.mark.parametrize(
    "adversarial", [ADVERSARIAL, pytest.param(AdversarialConfig(), marks=pytest.mark.long)]
)
def test_two_half_batches_accumulated_are_one_whole_batch(
    config: DistilConfig, adversarial: AdversarialConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Acceptance test 5, accumulation: exact for the student and for the discriminator."""
    # Adam divides by the gradient's own size, which would blow up rounding where it is near zero.
    monkeypatch.setattr(
        "std_rt.training.distil.loop._optimizer", lambda c, p, rate: torch.optim.SGD(p, lr=rate)
    )
    drawn = _distiller(replace(config, batch=4, bank=BankConfig(capacity=12)))
    batches = [drawn.draw() for _ in range(2)]
    results = []
    start = lora_parameters(drawn.base.unet)
    for parts, size in ((1, 4), (2, 2)):
        halves = _slices(batches, parts, size)
        monkeypatch.setattr(Distiller, "draw", lambda self, halves=halves: next(halves))
        c = replace(config, batch=size, accumulate=parts, steps=2, adversarial=adversarial)
        # Steps large enough for A to move too, whose gradient is zero as long as B is.
        c = replace(c, output=str(tmp_path / f"{parts}"), learning_rate=2.0, rate_schedule="constant")
        c = replace(c, bank=BankConfig(capacity=12, spread=False), max_grad_norm=1e9)
        train_distil(c)
        results.append(read_checkpoint(c))
    names = [k for k in results[0] if k.startswith(("shared.safetensors/lora", "shared.safetensors/heads"))]
    assert any("heads" in k for k in names) == bool(adversarial.weight)
    for kind in ("lora_A", "lora_B", "heads"):
        moved, apart = 0.0, 0.0
        for name in (n for n in names if kind in n):
            before = start.get(name.removeprefix("shared.safetensors/lora/"), torch.zeros(())).detach()
            moved += float((results[0][name] - before).square().sum())
            apart += float((results[0][name] - results[1][name]).square().sum())
        assert kind == "heads" or moved > 0
        assert apart <= 1e-6 * moved, kind


def _slices(batches: list[StepBatch], parts: int, size: int) -> Iterator[StepBatch]:
    for b in batches:
        for i in range(parts):
            rows = slice(i * size, (i + 1) * size)
            tensors = {n: getattr(b, n)[rows] for n in ("s", "target", "real", "pair")}
            yield replace(b, states=b.states.rows(rows), **tensors)


def test_a_loss_that_is_no_number_stops_with_the_step(
    config: DistilConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, snapshot_every=1)
    train_distil(config, stop_after=1)
    kept = read_checkpoint(config)
    monkeypatch.setattr(Distiller, "consistency_loss", lambda self, x_s, *_: x_s.sum() * float("nan"))
    with pytest.raises(RecipeError, match=r"not a number at step 2; lower learning_rate"):
        train_distil(config)
    assert_same(kept, read_checkpoint(config))


def test_the_loss_that_is_no_number_is_found_within_a_log_window(
    config: DistilConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([1.0, 1.0, float("nan"), 1.0, 1.0, 1.0])
    monkeypatch.setattr(Distiller, "consistency_loss", lambda self, x_s, *_: x_s.mean() * 1e-3 * next(calls))
    config = replace(config, steps=3, accumulate=2, log_every=3, snapshot_every=3)
    with pytest.raises(RecipeError, match="not a number at step 2"):
        train_distil(config)


def test_another_recipe_does_not_go_on_with_a_run(config: DistilConfig) -> None:
    config = replace(config, snapshot_every=1)
    train_distil(config, stop_after=1)
    with pytest.raises(RecipeError, match="another method"):
        train_distil(replace(config, method="lcm"))
    with pytest.raises(RecipeError, match=r"another lora\.rank"):
        train_distil(replace(config, lora=LoraConfig(rank=2, alpha=4.0)))
    train_distil(replace(config, steps=2, precision="bf16", gradient_checkpointing=True))  # the same run
    assert json.loads((Path(config.output) / "log.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_the_lora_says_what_it_is(config: DistilConfig) -> None:
    with safe_open(train_distil(replace(config, steps=1)), "pt") as file:
        notes = file.metadata()
    assert notes["method"] == "std"
    assert notes["tau"] == str(trajectory_timesteps(0.2, 4)[0])
    assert json.loads(notes["timesteps"])["4"] == trajectory_timesteps(0.2, 4)
    assert notes["base"] == "tiny"
    assert len(notes["base_digest"]) == 64
    card = (Path(config.output) / "README.md").read_text(encoding="utf-8")
    assert "base_model: tiny" in card
    assert "license" not in card  # this base says nothing of one
    (Path(config.base) / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    try:
        assert load_base(config.base).licence == "mit"
    finally:
        (Path(config.base) / "README.md").unlink()


def test_gradient_checkpointing_and_online_target_and_mixed_conditioning_run(
    config: DistilConfig, tmp_path: Path
) -> None:
    calls: list[int] = []

    def trained(name: str, **changes: object) -> dict[str, torch.Tensor]:
        changed = replace(config, steps=2, output=str(tmp_path / name), **changes)  # type: ignore[arg-type]
        base = load_base(config.base)
        calls.append(0)

        def count(*_: object) -> None:
            calls[-1] += 1

        base.unet.down_blocks[0].resnets[0].register_forward_pre_hook(count)
        return load_file(train_distil(changed, base=base))

    plain, checkpointed = trained("a"), trained("b", gradient_checkpointing=True)
    for name, value in plain.items():
        assert torch.allclose(value, checkpointed[name], atol=1e-3)
    assert calls[1] == calls[0] + 2, "the student runs again in the backward of each step"
    for name, change in (
        ("c", {"ema_target": False}),
        ("d", {"bank": BankConfig(capacity=6, stored_conditioning=False)}),
    ):
        other = trained(name, **change)
        assert any(not torch.equal(other[k], v) for k, v in plain.items())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, while it traces
@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"method": "dmd"}])
def test_a_compiled_run_learns_the_same(
    config: DistilConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """A compiler must not take the LoRA's switch, the average's weights or shapes for constant."""

    def trained(name: str, **more: Any) -> dict[str, torch.Tensor]:
        changed = replace(config, steps=3, output=str(tmp_path / name), **changes, **more)
        return load_file(train_distil(changed))

    compile_ = Base.compile
    # It records and replays the blocks as the real one does, without a C++ compiler.
    monkeypatch.setattr(Base, "compile", lambda base: compile_(base, "aot_eager"))
    plain = trained("plain")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = trained("compiled", compile=True)
    assert counters["stats"]["unique_graphs"] >= 4
    assert not counters["graph_break"]
    for name, value in plain.items():
        assert torch.allclose(value, compiled[name], atol=1e-3)


def test_a_compiler_that_is_missing_is_one_line(
    config: DistilConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("no working C++ compiler found\nas CXX says")

    compile_ = Base.compile
    monkeypatch.setattr(Base, "compile", lambda base: compile_(base, missing))  # type: ignore[arg-type]
    with pytest.raises(RecipeError) as told:
        train_distil(replace(config, compile=True, output=str(tmp_path / "run")))
    assert "no working C++ compiler" in str(told.value)
    assert "continue with --set compile=false" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_base_without_signal_at_the_start_is_one_line(config: DistilConfig) -> None:
    """Zero terminal SNR: content over content there would be zero over zero."""
    schedule = NoiseSchedule.from_config({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})

    def start(eta: float) -> States:
        base = load_base(config.base)
        base.schedule = schedule
        return _distiller(replace(config, eta=eta), base).fresh(2, (8, 8))

    with pytest.raises(RecipeError, match=r"tiny has zero terminal SNR: at eta 1 nothing .* set eta = 0\.98"):
        start(1.0)
    assert start(0.98).x.isfinite().all()


def test_the_bank_is_pinned_where_networks_are_on_cuda(
    config: DistilConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Levels, "to", lambda self, device: self)
    made: list[bool] = []
    monkeypatch.setattr(distiller_module, "TrajectoryBank", lambda *args: made.append(args[-1]))
    base = load_base(config.base)
    for where, device in (("cpu", "cuda:1"), ("auto", "cuda"), ("cpu", "cpu")):
        source = TripletSource(config.triplets, base, 0, 0)
        changed = replace(config, bank=BankConfig(device=where))
        Distiller(changed, base, source, Average({}), device=device)
    assert made == [True, False, False]


def test_the_base_is_loaded_onto_the_device_in_its_final_type(
    config: DistilConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def refuse(*args: object) -> Base:
        asked.append(args)
        raise RecipeError("enough")

    monkeypatch.setattr(loop, "load_base", refuse)
    for device in (torch.device("meta"), torch.device("cpu")):
        monkeypatch.setattr(loop, "_accelerator", lambda _, d=device: nullcontext(SimpleNamespace(device=d)))
        with pytest.raises(RecipeError, match="enough"):
            train_distil(replace(config, precision="bf16"))
    types = [args[1:3] for args in asked]
    assert types == [(torch.bfloat16, torch.device("meta")), (torch.float32, torch.device("cpu"))]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_pipeline(tmp_path_factory.mktemp("base") / "clip", layers_per_block=1, levels=1)


def test_an_sdxl_in_half_precision_keeps_its_autoencoder_in_fp32(clip_folder: Path) -> None:
    base = load_base(clip_folder, torch.bfloat16)
    assert base.text is not None
    parts = (base.unet, base.vae, base.text.pipeline.text_encoder, base.text.pipeline.text_encoder_2)
    assert [part.dtype for part in parts] == [torch.bfloat16, torch.float32, torch.float16, torch.float16]


def test_auto_is_fp16_on_cuda_which_loses_less_of_a_guided_step_than_bf16(config: DistilConfig) -> None:
    assert DistilConfig("out", "base").precision == "auto"
    assert [resolve_precision("auto", device) for device in ("cuda", "cpu", "mps")] == [
        "fp16",
        "bf16",
        "bf16",
    ]
    distiller = _distiller(config)
    states = replace(distiller.fresh(4, (8, 8)), scale=torch.full((4,), 16.0))
    exact = distiller.teacher_step(states)

    def lost(precision: str) -> float:
        distiller._precision = partial(precision_context, precision, "cpu")
        return float((distiller.teacher_step(states) - exact).abs().mean())

    assert 0 < 4 * lost("fp16") < lost("bf16")


def test_a_device_that_torch_cannot_use_is_one_line() -> None:
    assert choose_device("cpu") == "cpu"
    with pytest.raises(UsageError, match=r"torch cannot use device 'cuda:99' \(.+\); use --set device=cpu$"):
        choose_device("cuda:99")


def test_fp16_without_a_gpu_is_one_line(config: DistilConfig) -> None:
    with pytest.raises(RecipeError, match="precision = 'fp16' needs a GPU, and there is none; set precision"):
        train_distil(replace(config, precision="fp16"))


def test_no_style_is_the_same_in_training_and_in_export(base_folder: Path, tmp_path: Path) -> None:
    base = load_base(base_folder)
    styles = torch.zeros(2, 3, base.style_px, base.style_px)
    free = base.null(base.condition(None, base.look(styles), torch.ones(2, 6)))
    exported = read_source(ExportOptions(base_folder, tmp_path)).load_style()[0]
    assert free.tokens is not None
    assert torch.equal(free.tokens[:1], exported.negative)


def test_an_sdxl_is_distilled_without_its_ip_adapter(clip_folder: Path) -> None:
    """Unless the recipe names one in [style]."""
    assert (clip_folder / "ip_adapter.safetensors").is_file()
    base = load_base(clip_folder)
    assert base.unet.encoder_hid_proj is None
    assert base.condition(base.read_text(["ink"]), None, torch.ones(1, 6)).tokens is None


def test_one_text_encoder_is_enough(clip_folder: Path) -> None:
    """As in SDXL's refiner."""
    base = load_base(clip_folder)
    assert base.text is not None
    both, _ = base.text(["ink"])
    base.text.pipeline.text_encoder = base.text.pipeline.tokenizer = None
    second, pooled = base.text(["ink"])
    assert torch.equal(second, both[..., -second.shape[2] :])
    assert second.shape[2] < both.shape[2]
    assert pooled.shape[0] == 1


def test_the_decoder_is_checkpointed_too(clip_folder: Path) -> None:
    """Same gradient, and less kept for the backward pass."""

    def run(base: Base) -> tuple[torch.Tensor, int]:
        kept: list[int] = []
        z = torch.linspace(-1, 1, 4 * 8 * 8).view(1, 4, 8, 8).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
            loss = base.decode(z).square().sum()
        loss.backward()
        assert z.grad is not None
        return z.grad, sum(kept)

    plain, checkpointed = load_base(clip_folder), load_base(clip_folder)
    checkpointed.checkpoint()
    (gradient, much), (again, little) = run(plain), run(checkpointed)
    assert torch.allclose(gradient, again, rtol=1e-5)
    assert little < much / 2


def test_conditioning_masks_rows(base_folder: Path) -> None:
    base = replace(load_base(base_folder), null_tokens=torch.full((1, 2, 4), 3.0))
    cond = Conditioning(torch.ones(3, 2, 4), torch.ones(3, 5), torch.ones(3, 6), torch.ones(3, 2, 4))
    masked = base.masked(cond, torch.tensor([1.0, 0.0, 1.0]))
    assert masked.tokens is not None
    assert masked.context.sum((1, 2)).tolist() == [8, 0, 8]
    assert masked.tokens.sum((1, 2)).tolist() == [8, 24, 8]
    assert masked.time_ids.sum() == 18
    assert not base.null(cond).pooled.any()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_sharded_student_is_refused_with_its_reason(
    config: DistilConfig, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(
        loop.Accelerator, "distributed_type", property(lambda self: f"DistributedType.{kind}")
    )
    with pytest.raises(RecipeError, match="shard the LoRA, whose average and file need it whole; use plain"):
        train_distil(config)
