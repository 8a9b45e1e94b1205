"""The pure parts of training: states, losses, styles, recipes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import NoiseSchedule, trajectory_timesteps
from std_rt.pipeline.denoise import denoise
from std_rt.training.run.recipe import describe_rates, learning_rates, load_recipe
from std_rt.training.run.training_run import linear_rate
from std_rt.training.tiny.generated_styles import STYLES, draw_style
from std_rt.training.tiny.trajectories import NoisyBatch, draw_levels, noisy_states, v_loss

SCHEDULE = NoiseSchedule(NoiseSchedule.scaled_linear().shifted(4.0).alphas_cumprod, "v_prediction")


def test_perfect_predictions_walk_the_stated_trajectory() -> None:
    """The state formula is what DDIM makes of a perfect clean estimate started from content."""
    generator = torch.Generator().manual_seed(0)
    z, c, noise = (torch.randn(1, 8, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    steps = SCHEDULE.coefficients(trajectory_timesteps(0.75, 4))
    start = steps[0].sigma_t / steps[0].alpha_t

    def perfect(x: torch.Tensor, timestep: int, _: bool) -> torch.Tensor:
        step = next(s for s in steps if s.timestep == timestep)
        k = step.sigma_t / step.alpha_t / start
        assert torch.allclose(x, step.alpha_t * ((1 - k) * z + k * c) + step.sigma_t * noise)
        return (step.alpha_t * x - z) / step.sigma_t

    x = denoise(c, perfect, noise=[noise], steps=steps, prediction_type="v_prediction")
    assert torch.allclose(x, z)


def test_loss_is_zero_at_the_target_only() -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    z, c = (torch.randn(16, 8, 4, 4, generator=generator) for _ in range(2))
    levels = draw_levels(16, rng, eta=0.75, etas=(0.4, 0.95), run_steps=(1, 2, 4), on_runs=0.75)
    batch = noisy_states(z, c, SCHEDULE, levels, rng, generator)
    target = (batch.alpha * batch.x_t - z) / batch.sigma
    assert isinstance(batch, NoisyBatch)
    assert v_loss(target, batch).item() < 1e-8
    assert v_loss(target + 0.1, batch).item() > 1e-3
    wrong = target.clone()
    wrong[:, 3] += 0.1
    weights = torch.zeros(1, 8, 1, 1)
    assert v_loss(wrong, batch, weights).item() == 0
    weights[:, 3] = 8
    assert v_loss(wrong, batch, weights).item() == pytest.approx(8 * v_loss(wrong, batch).item(), rel=1e-3)


def test_v_loss_is_the_clean_estimates_error_by_its_clamped_weight() -> None:
    """In plain torch: x_0 = alpha x - sigma v, weighted by SNR + 1 = 1 / sigma^2, at most 3."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    z, c, v = (torch.randn(16, 8, 4, 4, generator=generator) for _ in range(3))
    levels = draw_levels(16, rng, eta=0.75, etas=(0.4, 0.95), run_steps=(1, 2, 4), on_runs=0.5)
    batch = noisy_states(z, c, SCHEDULE, levels, rng, generator)
    weights = torch.rand(1, 8, 1, 1, generator=generator)
    total = 0.0
    for n in range(16):
        error = batch.alpha[n] * batch.x_t[n] - batch.sigma[n] * v[n] - z[n]
        total += float((min(3.0, float(batch.sigma[n]) ** -2) * weights[0] * error**2).mean()) / 16
    assert v_loss(v, batch, weights, most=3.0).item() == pytest.approx(total, rel=1e-4)


def test_states_at_tau_hold_content_only() -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    z, c = torch.full((64, 1, 2, 2), 100.0), torch.zeros(64, 1, 2, 2)
    levels = [739] * 64, [739, 19] * 32
    batch = noisy_states(z, c, SCHEDULE, levels, rng, generator)
    share = (batch.x_t / batch.alpha / 100).mean((1, 2, 3))
    assert (share[::2].abs() < 0.2).all()
    assert (share[1::2] > 0.8).all()


def test_levels_are_those_of_the_runs_and_starts_lie_between_both_ends() -> None:
    levels = draw_levels(
        400, np.random.default_rng(0), eta=0.75, etas=(0.4, 0.95), run_steps=(1, 2), on_runs=0.9
    )
    runs = {tau: {t for n in (1, 2) for t in trajectory_timesteps(1.0, n, start=tau)} for tau in levels[0]}
    on_runs = sum(t in runs[tau] for tau, t in zip(*levels, strict=True))
    assert 330 < on_runs < 390
    assert 150 < levels[0].count(739) < 260
    assert min(levels[0]) >= trajectory_timesteps(0.4, 1)[0]
    assert max(levels[0]) <= trajectory_timesteps(0.95, 1)[0]


def test_the_rate_falls_in_a_straight_line_at_the_end() -> None:
    rates = [linear_rate(2.0, step, 10, 2, 4) for step in range(10)]
    assert rates == pytest.approx([1, 2, 2, 2, 2, 2, 2, 1.5, 1, 0.5])


@pytest.mark.parametrize("name", STYLES)
def test_every_style_is_one_style(name: str) -> None:
    """A drawn style changes a picture, keeps its size, and its palette is its own, not the picture's."""
    rng = np.random.default_rng(3)
    a, b = (rng.integers(0, 256, (72, 88, 3), dtype=np.uint8) for _ in range(2))
    _, style = draw_style(rng, None, name)
    first, second = style(a, np.random.default_rng(0)), style(b, np.random.default_rng(1))
    assert first.shape == a.shape
    assert first.dtype == np.uint8
    assert np.abs(first.astype(int) - a).mean() > 8
    _, other = draw_style(np.random.default_rng(11), None, name)
    different = other(b, np.random.default_rng(1))
    near = np.abs(first.mean((0, 1)) - second.mean((0, 1))).sum()
    assert near < np.abs(different.mean((0, 1)) - second.mean((0, 1))).sum()


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_recipes_in_the_repository_load() -> None:
    folder = Path(__file__).parents[3] / "training"
    stages = {load_recipe(path).stage for path in folder.glob("*.toml")}
    assert stages == {"autoencoder", "stylist", "motion", "distil"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage = 'stylist'\nstep = 3\n", "did you mean steps"),
        ("stage = 'stilist'\n", "known stages: autoencoder, stylist, motion, distil"),
        (
            "stage = 'stylist'\noutput = 'x'\nautoencoder = 'x'\nsteps = 'many'\n",
            "steps = 'many': expected int, got text",
        ),
        ("stage = 'stylist'\n", "lacks output"),
        ("stage = \n", "not a TOML recipe"),
        ("stage = [1]\n", "known stages"),
        ("stage = 'autoencoder'\noutput = 'x'\ndata = 3\n", "expected a table"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(_write(tmp_path, text))


def test_the_published_rates_are_those_of_eight_processes() -> None:
    """5e-6 and 1e-4 at 128 images per step; std-tiny's recipe means what it says."""
    recipes = Path(__file__).parents[3] / "training"
    published = load_recipe(recipes / "std_sdxl_i2i.toml")
    assert learning_rates(published, 8) == pytest.approx((5e-6, 1e-4))
    assert learning_rates(published) == pytest.approx((6.25e-7, 1.25e-5))
    line = describe_rates(published, 8)
    assert "at most 5e-06, 0.0001 of the discriminator: 128 images per step of 8 processes" in line
    assert learning_rates(load_recipe(recipes / "std_tiny.toml"), 8)[0] == 1e-3


def test_overrides_reach_nested_keys(tmp_path: Path) -> None:
    text = (
        "stage = 'autoencoder'\noutput = 'x'\n"
        "[data]\nphotos='p'\nart='a'\nheld_out_content='c'\nheld_out_style='s'\n"
    )
    recipe = load_recipe(_write(tmp_path, text), ("steps=7", "data.art=other", "learning_rate=1"))
    assert (recipe.steps, recipe.data.art, recipe.learning_rate) == (7, "other", 1.0)
    with pytest.raises(RecipeError, match=r"section\.key=value"):
        load_recipe(_write(tmp_path, text), ("steps",))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps=0", "steps = 0: expected int >= 1"),
        ("snapshot_every=0", "snapshot_every = 0: expected int >= 1"),
        ("own_steps=[0]", r"own_steps\[0\] = 0: expected int >= 1"),
        ("own_steps=[]", r"own_steps = \[\]: expected a list of length >= 1"),
        ("drop_style=1.5", "drop_style = 1.5: expected float <= 1.0"),
        ("learning_rate=nan", "learning_rate = nan: expected float > 0.0"),
        ("model.cross_attention_dim=32", "must be a multiple of 6"),
        ("steps.more=3", "is a value, not a table"),
    ],
)
def test_values_outside_their_range_are_refused(assignment: str, message: str) -> None:
    path = Path(__file__).parents[3] / "training" / "std_tiny_stylist.toml"
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, (assignment,))


def test_a_loss_of_the_lattice_without_a_network_to_decode_for_is_refused() -> None:
    path = Path(__file__).parents[3] / "training" / "std_tiny_own.toml"
    bare = ("perceptual=", "own_styles=0", "generated_styles=0", "steady_photos=0")
    with pytest.raises(RecipeError, match="lattice_weight needs a perceptual network"):
        load_recipe(path, bare)
    load_recipe(path, (*bare, "lattice_weight=0"))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("reverse=true", "reverse learns from triplets alone; set own_styles = 0"),
        ("own_styles=9", "own_styles = 9 is more than styles = 8"),
        ("perceptual=", "own_styles needs a perceptual network"),
        ("steady_photos=17", "steady_photos = 17 is more than the 16 own runs"),
        ("crop_px=32", "crop_px = 32: own runs are judged without 16 px at each edge; set it to 64"),
        ("generated_styles=9", "generated_styles = 9 is more than own_styles = 8"),
        ("sheet.styles=", r"set both sheet\.contents and sheet\.styles"),
        ("crop_px=100", "crop_px = 100: expected int that's a multiple of 8"),
        ("run_steps=[1, 40]", "eta, run_steps and own_steps do not fit together"),
        ("device=cud", "device = 'cud' must be one of auto, cpu, cuda; did you mean cuda"),
    ],
)
def test_wrong_values_of_the_stylist_stage_are_refused(assignment: str, message: str) -> None:
    path = Path(__file__).parents[3] / "training" / "std_tiny_own.toml"
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, (assignment,))


def test_a_pair_has_two_numbers() -> None:
    path = Path(__file__).parents[3] / "training" / "std_tiny_autoencoder.toml"
    with pytest.raises(RecipeError, match=r"quarter_blocks = \[1\]: expected a list of length 2"):
        load_recipe(path, ("quarter_blocks=[1]",))
