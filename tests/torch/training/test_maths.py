"""The pure parts of training: states, losses, styles, content versions, recipes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import NoiseSchedule, trajectory_timesteps
from std_rt.pipeline.denoise import denoise
from std_rt.training.run.recipe import TeacherConfig, describe_rates, learning_rates, load_recipe
from std_rt.training.tiny.finish import sliced_wasserstein, texture_distance
from std_rt.training.tiny.generated_styles import STYLES, content_version, draw_style, transfer_colours
from std_rt.training.tiny.teacher import NoisyBatch, make_noisy, v_loss

SCHEDULE = NoiseSchedule(NoiseSchedule.scaled_linear().shifted(4.0).alphas_cumprod, "v_prediction")


def test_perfect_predictions_walk_the_stated_trajectory() -> None:
    """The state formula of teacher.py is what DDIM makes of a perfect clean estimate started from content."""
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


def test_loss_is_zero_at_the_target_only(teacher_config: TeacherConfig) -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    z, c, s = (torch.randn(16, 8, 4, 4, generator=generator) for _ in range(3))
    batch = make_noisy(z, c, s, SCHEDULE, teacher_config, rng, generator)
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


def test_states_at_tau_hold_content_only(teacher_config: TeacherConfig) -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    z, c = torch.full((64, 1, 2, 2), 100.0), torch.zeros(64, 1, 2, 2)
    batch = make_noisy(z, c, z, SCHEDULE, teacher_config, rng, generator)
    high, low = batch.t >= 939, batch.t <= 19
    assert high.any() or low.any()
    share = (batch.x_t / batch.alpha / 100).mean((1, 2, 3))
    assert (share[high].abs() < 0.2).all()
    assert (share[low] > 0.8).all()


def test_sliced_wasserstein_sees_patches_not_places() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 24, 24, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(x, 3, 1, 1) * 3

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return texture_distance(a, b, torch.Generator().manual_seed(1)).mean().item()

    assert distance(x, x) == 0
    assert distance(x, x.roll((5, 7), (2, 3))) < 0.1 * distance(x, smooth)
    assert sliced_wasserstein(x, x[..., :12], torch.Generator().manual_seed(1), 1).shape == (2,)


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


def test_content_version_forgets_the_palette() -> None:
    rng = np.random.default_rng(0)
    art = np.zeros((64, 64, 3), np.uint8)
    art[..., 0] = np.linspace(0, 255, 64)  # red ramp
    photo = np.zeros((64, 64, 3), np.uint8)
    photo[..., 2] = rng.integers(100, 255, (64, 64))
    moved = transfer_colours(art, photo)
    assert abs(moved[..., 2].mean() - photo[..., 2].mean()) < 5
    assert content_version(art, photo, rng).shape == art.shape


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_recipes_in_the_repository_load() -> None:
    folder = Path(__file__).parents[3] / "training"
    stages = {load_recipe(path).stage for path in folder.glob("*.toml")}
    assert stages == {"autoencoder", "teacher", "finish", "stylist", "distil"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage = 'teacher'\nstep = 3\n", "did you mean steps"),
        ("stage = 'teecher'\n", "known stages: autoencoder, teacher, finish, stylist, distil"),
        (
            "stage = 'teacher'\noutput = 'x'\nautoencoder = 'x'\nsteps = 'many'\n",
            "steps = 'many': expected int, got text",
        ),
        ("stage = 'teacher'\n", "lacks output"),
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
    assert learning_rates(load_recipe(recipes / "std_tiny.toml"), 8)[0] == 2e-3


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
        ("window=[60]", r"window\[0\] = 60: expected int <= 32"),
        ("window=[]", r"window = \[\]: expected a list of length >= 1"),
        ("drop_style=1.5", "drop_style = 1.5: expected float <= 1.0"),
        ("learning_rate=nan", "learning_rate = nan: expected float > 0.0"),
        ("model.cross_attention_dim=32", "must be a multiple of 6"),
        ("steps.more=3", "is a value, not a table"),
    ],
)
def test_values_outside_their_range_are_refused(assignment: str, message: str) -> None:
    path = Path(__file__).parents[3] / "training" / "std_tiny_teacher.toml"
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, (assignment,))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("look_px=256", "look_px = 256 is more than crop_px = 128"),
        ("crop_px=100", "crop_px = 100: expected int that's a multiple of 8"),
        ("run_steps=[1, 40]", "eta and run_steps do not fit together"),
        ("device=cud", "device = 'cud' must be one of auto, cpu, cuda; did you mean cuda"),
    ],
)
def test_wrong_values_of_the_stylist_stage_are_refused(assignment: str, message: str) -> None:
    path = Path(__file__).parents[3] / "training" / "std_tiny_stylist.toml"
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, (assignment,))


def test_a_pair_has_two_numbers() -> None:
    path = Path(__file__).parents[3] / "training" / "std_tiny_autoencoder.toml"
    with pytest.raises(RecipeError, match=r"quarter_blocks = \[1\]: expected a list of length 2"):
        load_recipe(path, ("quarter_blocks=[1]",))
