"""Distribution matching: both losses by hand, the states it trains at, and that a run moves the right way."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.distil_runs import assert_same, read_checkpoint, small_recipe
from support.pipelines import write_own_pipeline
from torch import Tensor
from torch.func import functional_call

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import trajectory_timesteps
from std_rt.training.distil.bank import States
from std_rt.training.distil.base import load_base
from std_rt.training.distil.distiller import Distiller
from std_rt.training.distil.loop import train_distil
from std_rt.training.distil.lora import Average, adapters_off, add_lora, lora_parameters, tuner_layers
from std_rt.training.distil.matching import Matching
from std_rt.training.run.recipe import AdversarialConfig, DistilConfig, load_recipe
from std_rt.training.tiny.triplets import TripletSource

RECIPE = Path(__file__).parents[3] / "training" / "std_tiny.toml"


@pytest.fixture
def config(base_folder: Path, triplets: Path, tmp_path: Path) -> DistilConfig:
    return replace(small_recipe(tmp_path / "run", base_folder, triplets), method="dmd")


def _shaken(config: DistilConfig) -> tuple[Distiller, Matching]:
    """With a student that is not the teacher, and a second LoRA that is neither."""
    base = load_base(config.base)
    add_lora(base.unet, config.lora, config.seed)
    source = TripletSource(config.triplets, base, config.seed, 0)
    distiller = Distiller(config, base, source, Average(lora_parameters(base.unet)))
    matching = distiller.matching
    assert matching is not None
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in (*lora_parameters(base.unet).values(), *matching.tensors.values()):
            value.add_(torch.randn(value.shape, generator=rng) * 0.1)
    return distiller, matching


def _clean(distiller: Distiller, output: Tensor, states: States) -> Tensor:
    """Of a v prediction: ``alpha x - sigma v``."""
    at = distiller.levels
    return at.alpha(states.index) * states.x - at.sigma(states.index) * output


def _by_hand(distiller: Distiller, clean: Tensor, states: States) -> tuple[States, Tensor, Tensor]:
    """The noised states of the next draw, the teacher's estimate and the second LoRA's."""
    again = torch.Generator()
    again.set_state(distiller.generator.get_state())
    top = distiller.levels.tau_index
    index = (torch.rand(len(clean), generator=again, dtype=torch.float64) * (top + 1)).long()
    noise = torch.randn(clean.shape, generator=again)
    at = distiller.levels
    ratio = at.sigma(index) / at.alpha(index)
    start = at.sigma(torch.tensor([top])) / at.alpha(torch.tensor([top]))
    k = ratio / start
    seen = states.cond.content
    mixed = clean if seen is None else (1 - k) * clean + k * seen
    noised = replace(states, x=at.alpha(index) * mixed + at.sigma(index) * noise, index=index)
    base, t = distiller.base, at.timestep(index)
    with torch.no_grad(), adapters_off(tuner_layers(base.unet)):
        styled = base.predict(base.unet, noised.x, t, states.cond)
        free = base.predict(base.unet, noised.x, t, base.null(states.cond))
    output = free + states.scale.view(-1, 1, 1, 1) * (styled - free)
    assert distiller.matching is not None
    named = dict(distiller.matching.tensors)
    with torch.no_grad():
        made = base.predict(
            lambda *args, **kwargs: functional_call(base.unet, named, args, kwargs), noised.x, t, states.cond
        )
    return noised, _clean(distiller, output, noised), _clean(distiller, made, noised)


@pytest.mark.parametrize("sees_content", [True, False])
def test_the_students_gradient_is_what_the_two_estimates_say(
    config: DistilConfig, sees_content: bool, tmp_path: Path
) -> None:
    if not sees_content:
        config = replace(config, base=str(write_own_pipeline(tmp_path / "blind", levels=1)))
    distiller, matching = _shaken(replace(config, batch=3))
    assert distiller.base.sees_content == sees_content
    batch = distiller.draw()
    clean = distiller.student_jump(distiller.base.unet, batch.states, batch.s).detach().requires_grad_()
    _, likely, made = _by_hand(distiller, clean.detach(), batch.states)
    distiller.consistency_loss(clean, batch).backward()
    size = (clean.detach() - likely).abs().mean((1, 2, 3), keepdim=True)
    assert clean.grad is not None
    assert torch.allclose(clean.grad * clean.numel(), (made - likely) / size, atol=1e-4)
    assert clean.grad.abs().max() * clean.numel() > 1e-2
    assert all(value.grad is None for value in matching.tensors.values())


def test_the_second_lora_learns_the_students_results_and_nothing_else_does(config: DistilConfig) -> None:
    distiller, matching = _shaken(config)
    batch = distiller.draw()
    clean = distiller.student_jump(distiller.base.unet, batch.states, batch.s)
    _, _, made = _by_hand(distiller, clean.detach(), batch.states)
    loss = matching.score_loss(clean, batch.states)
    assert torch.allclose(loss, (made - clean.detach()).square().mean(), atol=1e-5)
    loss.backward()
    assert all(value.grad is None for value in lora_parameters(distiller.base.unet).values())
    assert all(value.grad is not None for value in matching.tensors.values())


def test_a_second_lora_that_is_the_teacher_moves_nothing(config: DistilConfig) -> None:
    distiller, matching = _shaken(replace(config, guidance=(1.0, 1.0)))
    with torch.no_grad():
        for name, value in matching.tensors.items():
            if ".lora_B." in name:
                value.zero_()
    batch = distiller.draw()
    clean = distiller.student_jump(distiller.base.unet, batch.states, batch.s).detach().requires_grad_()
    distiller.consistency_loss(clean, batch).backward()
    assert clean.grad is not None
    assert clean.grad.abs().max() * clean.numel() < 1e-3


def test_it_trains_at_every_state_of_its_own_runs(config: DistilConfig) -> None:
    config = replace(config, batch=12, run_steps=(2, 4))
    distiller, _ = _shaken(config)
    started: list[States] = []
    fresh = distiller.fresh

    def noted(count: int, shape: tuple[int, int]) -> States:
        started.append(fresh(count, shape))
        return started[-1]

    distiller.fresh = noted  # type: ignore[method-assign, assignment]
    batch = distiller.draw()
    runs = [[(t + 1) // 20 - 1 for t in trajectory_timesteps(config.eta, n)] for n in (2, 4)]
    assert set(batch.states.index.tolist()) == {i for run in runs for i in run}
    assert (batch.s == -1).all()
    jump = partial(distiller.student_jump, distiller.base.unet)
    for row in range(12):
        here, arrived = started[0].rows(slice(row, row + 1)), batch.states.rows(slice(row, row + 1))
        found = []
        for run in runs:
            state = here
            for index in run[1:]:
                if int(state.index) > int(arrived.index):
                    to = torch.tensor([index])
                    state = replace(state, x=jump(state, to).detach(), index=to)
            found.append(bool(torch.allclose(state.x, arrived.x, atol=1e-4)))
        assert any(found), f"row {row} lies on neither run"


def test_a_resumed_run_equals_an_unbroken_one(config: DistilConfig, tmp_path: Path) -> None:
    whole = train_distil(replace(config, output=str(tmp_path / "whole")))
    broken = replace(config, output=str(tmp_path / "broken"))
    train_distil(broken, stop_after=3)
    train_distil(broken)
    ours = read_checkpoint(broken)
    assert_same(ours, read_checkpoint(replace(config, output=str(tmp_path / "whole"))))
    assert any("score" in name for name in ours)
    with safe_open(whole, "pt") as file:
        assert file.metadata()["method"] == "dmd"


def test_a_run_brings_the_students_pictures_nearer_to_the_teachers(config: DistilConfig) -> None:
    """From a student that is far off: its results come to where the teacher's lie."""
    config = replace(config, batch=8, guidance=(1.0, 1.0), run_steps=(2,), drop_conditioning=0.0)
    distiller, matching = _shaken(config)
    unet = distiller.base.unet
    student = [*lora_parameters(unet).values()]
    optimizers = [torch.optim.Adam(student, 1e-3), torch.optim.Adam([*matching.tensors.values()], 1e-2)]

    def distance() -> float:
        states = distiller.fresh(16, (8, 8))
        end = torch.full_like(states.index, -1)
        with torch.no_grad():
            apart = distiller.student_jump(unet, states, end) - distiller.teacher_step(states, end)
        return float(apart.square().mean())

    before = distance()
    for _ in range(60):
        batch = distiller.draw()
        clean = distiller.student_jump(unet, batch.states, batch.s)
        for optimizer, loss in zip(
            optimizers,
            (distiller.consistency_loss(clean, batch), matching.score_loss(clean, batch.states)),
            strict=True,
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert distance() < 0.6 * before


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (("adversarial.weight=1",), 'adversarial.jumps = "last"'),
        (("gradient_checkpointing=true",), "set it to false"),
        (("motion.adapter=somewhere",), "is for pictures"),
        (
            ("adversarial.weight=1", "adversarial.jumps=last", "adversarial.features=perceptual"),
            "perceptual=FILE",
        ),
    ],
)
def test_what_does_not_go_with_it_is_one_line(sets: tuple[str, ...], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(RECIPE, ("method=dmd", *sets))


def test_the_discriminator_sees_its_results_beside_clean_pictures(config: DistilConfig) -> None:
    judged = replace(config, adversarial=AdversarialConfig(weight=1.0, jumps="last", features="dinov2"))
    distiller, _ = _shaken(judged)
    batch = distiller.draw()
    assert batch.pair.all()
    assert torch.equal(batch.shown(batch.real), batch.states.z)
