"""The triplet stage: it resumes bit for bit, sees the content, and its losses are those of plain torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch
from support.distil_runs import ADVERSARIAL, assert_same, read_checkpoint, small_recipe
from torch import Tensor

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import trajectory_timesteps
from std_rt.training.data.picture_source import PictureSource
from std_rt.training.distil.base import load_base
from std_rt.training.distil.loop import train_distil
from std_rt.training.distil.sampling import encode_scene, sample_latents
from std_rt.training.run.recipe import PicturesConfig, StyleConfig, StylistConfig, TripletsConfig
from std_rt.training.run.sheet import spread_pairs, to_tensor
from std_rt.training.run.training_run import ModuleRun
from std_rt.training.tiny import triplets as triplets_module
from std_rt.training.tiny.stylist import (
    Compared,
    Stylist,
    build_stylist,
    edge_distance,
    look_distance,
    train_stylist,
)
from std_rt.training.tiny.tiny_pipeline import load_tiny, run_unet, save_tiny
from std_rt.training.tiny.trajectories import sample
from std_rt.training.tiny.triplets import StylistData, TripletSource


def _run(seed: int = 0, noted: dict[str, Tensor] | None = None) -> ModuleRun:
    """Random numbers as a run has them; losses go to ``noted``."""
    note = {} if noted is None else noted
    run = SimpleNamespace(
        rng=np.random.default_rng(seed),
        generator=torch.Generator().manual_seed(seed),
        add=lambda **losses: note.update(losses),
    )
    return cast(ModuleRun, run)


@pytest.fixture
def own_config(stylist_config: StylistConfig, vgg_file: Path) -> StylistConfig:
    """One of the two styles on the network's own runs."""
    return replace(stylist_config, perceptual=str(vgg_file), own_styles=1)


@pytest.fixture
def stylist(own_config: StylistConfig) -> Stylist:
    return Stylist(own_config, StylistData(own_config).draw(0).content)


def test_stylist_resumes_bit_for_bit(
    stylist_config: StylistConfig, stylist_folder: Path, tmp_path: Path
) -> None:
    broken = replace(stylist_config, output=str(tmp_path))
    train_stylist(broken, stop_after=2)
    train_stylist(broken)
    assert_same(read_checkpoint(broken), read_checkpoint(stylist_config))


def test_every_weight_moves(stylist_config: StylistConfig, stylist_folder: Path) -> None:
    before, after = build_stylist(stylist_config), load_tiny(stylist_folder)
    for part in ("unet", "style_encoder"):
        for name, weight in getattr(before, part).named_parameters():
            moved = not torch.equal(weight, getattr(after, part).get_parameter(name))
            assert moved == weight.requires_grad, name


def test_a_run_goes_on_from_another_pipeline_with_its_own_autoencoder(
    stylist_config: StylistConfig, stylist_folder: Path
) -> None:
    started = build_stylist(replace(stylist_config, start_from=str(stylist_folder), seed=1))
    source = load_tiny(stylist_folder)
    with torch.no_grad():
        for value in source.vae.parameters():
            value.add_(1)
    for part in ("unet", "style_encoder"):
        theirs = getattr(source, part).state_dict()
        for name, value in getattr(started, part).state_dict().items():
            assert torch.equal(value, theirs[name]), name
    own = started.vae.encoder.state_dict()
    assert all(torch.equal(own[n], v) for n, v in started.style_encoder.patchify.state_dict().items())


def test_a_start_that_does_not_fit_is_refused(
    stylist_config: StylistConfig, stylist_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="is not a pipeline folder"):
        build_stylist(replace(stylist_config, start_from=str(tmp_path)))
    wider = replace(stylist_config.model, style_tokens=6)
    with pytest.raises(RecipeError, match="does not fit the recipe's model"):
        build_stylist(replace(stylist_config, start_from=str(stylist_folder), model=wider))


def test_the_content_reaches_the_picture_beside_the_noise(stylist_folder: Path) -> None:
    pipeline = load_tiny(stylist_folder)
    assert pipeline.unet.config.in_channels == 32
    x, z = torch.randn(1, 16, 16, 16), torch.randn(2, 1, 16, 16, 16)
    tokens, pooled = pipeline.style_encoder.encode_latents(torch.randn(1, 16, 16, 16))
    with torch.no_grad():
        a, b = (
            run_unet(pipeline.unet, x, torch.tensor([699]), tokens, pooled, torch.zeros(1, 6), c) for c in z
        )
    assert not torch.equal(a, b)
    assert sample(pipeline, torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64), 2).shape == (1, 3, 64, 64)


def test_distillation_refuses_a_unet_that_sees_anything_else(stylist_folder: Path, tmp_path: Path) -> None:
    pipeline, folder = load_tiny(stylist_folder), tmp_path / "inpainting"
    pipeline.unet.conv_in = torch.nn.Conv2d(33, 32, 3, padding=1)
    pipeline.unet.register_to_config(in_channels=33)
    save_tiny(pipeline, folder)
    with pytest.raises(RecipeError, match="takes 33 channels for 16 latents; distillation trains those"):
        load_base(folder)


def test_a_run_with_all_losses_notes_them_and_resumes_bit_for_bit(
    own_config: StylistConfig, tmp_path: Path
) -> None:
    config = replace(
        own_config, output=str(tmp_path / "a"), styles=3, own_styles=2, generated_styles=1,
        reconstruction_weight=1.0,
    )  # fmt: skip
    train_stylist(config)
    rows = (tmp_path / "a" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = {"latents", "look", "style", "colour", "content", "reconstruction"}
    assert all(losses <= json.loads(row).keys() for row in rows)
    broken = replace(config, output=str(tmp_path / "b"))
    train_stylist(broken, stop_after=2)
    train_stylist(broken)
    assert_same(read_checkpoint(broken), read_checkpoint(config))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_decoder_moves_where_pictures_must_come_back_through_it(
    own_config: StylistConfig, tmp_path: Path, weight: float
) -> None:
    config = replace(own_config, output=str(tmp_path), own_styles=2, reconstruction_weight=weight)
    before, after = build_stylist(config).vae.state_dict(), load_tiny(train_stylist(config)).vae.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) != (weight > 0 and name.startswith("decoder")), name


def test_generated_styles_come_last_with_exact_targets(
    stylist_config: StylistConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = StylistData(stylist_config).draw(3)
    data = StylistData(replace(stylist_config, own_styles=1, generated_styles=1))
    monkeypatch.setattr(
        triplets_module, "draw_style", lambda rng, art: ("negative", lambda frame, rng: 255 - frame)
    )
    pictures = data.draw(3)
    for drawn, before in zip(vars(pictures).values(), vars(plain).values(), strict=True):
        assert torch.equal(drawn[: len(drawn) // 2], before[: len(drawn) // 2])
    assert torch.equal(pictures.content, plain.content)
    assert torch.equal(pictures.target[2:], 255 - pictures.content[2:])
    assert not torch.equal(pictures.style[1], plain.style[1])


def test_the_photos_of_a_style_stay_together(stylist_config: StylistConfig, tmp_path: Path) -> None:
    """Three triplets of one style and two of another: a draw of two photos never shows one twice."""
    data = StylistData(replace(stylist_config, crop_px=144))
    assert sorted(map(len, data.groups)) == [2, 3]
    own = {id(item[0]): item[1] for group in data.groups for item in group}
    for step in range(8):
        pictures = data.draw(step)
        found = [_photo(data, p) for p in pictures.content]
        assert found[0] != found[1]
        assert found[2] != found[3]
        assert own[found[0]] is own[found[1]]
        assert own[found[2]] is own[found[3]]
    more = StylistData(replace(stylist_config, photos=4)).draw(0)  # than there are
    assert (len(more.style), len(more.content), len(more.target)) == (2, 8, 8)


def _photo(data: StylistData, crop: Tensor) -> int:
    """Which photo a crop of full height is of."""
    for item in (item for group in data.groups for item in group):
        for x in range(item[0].shape[1] - crop.shape[1] + 1):
            window = item[0][:, x : x + crop.shape[1]]
            if any(np.array_equal(crop.numpy(), w) for w in (window, window[:, ::-1])):
                return id(item[0])
    raise AssertionError("a crop of no photo")


def test_steps_drawn_ahead_are_those_drawn_one_by_one(stylist_config: StylistConfig) -> None:
    data = StylistData(stylist_config)
    for step, pictures in zip(range(5, 9), data.ahead(5), strict=False):
        again = data.draw(step)
        assert all(
            torch.equal(a, b) for a, b in zip(vars(pictures).values(), vars(again).values(), strict=True)
        )


def _grams(features: list[Tensor]) -> list[Tensor]:
    """Of one picture's layers ``[1, C, h, w]``: mean outer product over positions, by einsum."""
    return [torch.einsum("ahw,bhw->ab", f[0], f[0]) / f[0, 0].numel() for f in features]


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / max(a.abs().sum(), b.abs().sum()))


def _compared(stylist: Stylist, images: Tensor) -> Compared:
    network: Any = stylist.look
    return Compared(images, network(images))


def test_the_look_is_features_grams_and_twice_the_pixels(stylist: Stylist) -> None:
    torch.manual_seed(0)
    ours, theirs = (_compared(stylist, x) for x in torch.rand(2, 2, 3, 64, 64) * 2 - 1)
    wanted = 2 * (ours.images - theirs.images).abs().mean()
    for x, y in zip(ours.features, theirs.features, strict=True):
        wanted += (x - y).abs().mean() / y.abs().mean() / 4
        for n in range(2):
            wanted += _relative(_grams([x[n : n + 1]])[0], _grams([y[n : n + 1]])[0]) / 4 / 2
    assert torch.allclose(look_distance(ours, theirs), wanted, rtol=1e-4)


def test_own_runs_are_compared_with_style_and_photo_exact_ones_with_their_target(stylist: Stylist) -> None:
    torch.manual_seed(0)
    picture, target = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    pictures = StylistData(stylist.config).draw(0)
    style, photo = stylist.images(pictures.style[-1:]), stylist.images(pictures.content[-2:])
    noted: dict[str, Tensor] = {}
    total = stylist.own_loss(
        _compared(stylist, picture), _compared(stylist, target), torch.tensor([False, True]),
        style, photo, _run(5, noted),
    )  # fmt: skip
    look = cast(Any, stylist.look)
    gaps, apart = [], []
    generator, shares = torch.Generator().manual_seed(5), torch.linspace(0, 1, 256)
    for ours, theirs in zip(picture, (style[0], target[1]), strict=True):
        for a, b in zip(_grams(look(ours[None])), _grams(look(theirs[None])), strict=True):
            gaps += [_relative(a, b), float((a - b).norm() / max(a.norm(), b.norm()))]
        axes = torch.randn(16, 3, generator=generator)
        axes = axes / axes.norm(dim=1, keepdim=True)
        small = (torch.nn.functional.avg_pool2d(x, 4).flatten(1) for x in (ours, theirs))
        first, second = ((axes @ x).quantile(shares, 1) for x in small)
        apart.append((first - second).abs().mean())
    assert float(noted["style"]) == pytest.approx(np.mean(gaps), rel=1e-4)
    assert float(noted["colour"]) == pytest.approx(float(sum(apart) / 2), rel=1e-3)
    normal = [torch.nn.functional.instance_norm(look(x[:1])[-1]) for x in (picture, photo)]
    assert torch.allclose(noted["content"], (normal[0] - normal[1]).square().mean() / 2, rtol=1e-4)
    assert torch.allclose(total, 2.0 * noted["style"] + noted["colour"] + 0.25 * noted["content"])


def test_the_edges_are_judged_by_looks_in_half_of_the_steps(stylist: Stylist) -> None:
    pictures = StylistData(stylist.config).draw(0)
    picture = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    framed = torch.nn.functional.pad(picture[..., 16:-16, 16:-16], (16, 16, 16, 16))
    styled = torch.ones(4, dtype=torch.bool)
    same = [
        stylist.look_loss(framed, pictures, styled, _run(seed))
        == stylist.look_loss(picture, pictures, styled, _run(seed))
        for seed in range(8)
    ]
    assert 0 < sum(same) < 8


def test_the_distance_of_edges_leaves_out_the_inside() -> None:
    wanted = torch.zeros(2, 3, 64, 96)
    ours = torch.ones_like(wanted)
    ours[..., 16:-16, 16:-16] = 5
    assert edge_distance(ours, wanted) == pytest.approx(1)
    ours[..., :16, :] = 3
    rows = 16 * 96 / (64 * 96 - 32 * 64)
    assert edge_distance(ours, wanted) == pytest.approx(1 + 2 * rows)


def test_an_own_run_without_a_style_gives_the_photo_back(stylist: Stylist) -> None:
    """Its look is nothing where the picture is the photo, and styles no longer matter."""
    stylist.config = replace(stylist.config, own_styles=2)
    pictures = StylistData(stylist.config).draw(0)
    photo, noted = stylist.images(pictures.content), {}
    stylist.look_loss(photo, pictures, torch.zeros(4, dtype=torch.bool), _run(0, noted))
    assert all(float(value) < 1e-6 for name, value in noted.items() if name != "colour")
    stylist.look_loss(photo, pictures, torch.ones(4, dtype=torch.bool), _run(0, noted))
    assert min(map(float, (noted["look"], noted["style"], noted["colour"]))) > 0.01
    assert float(noted["content"]) < 1e-6


def test_a_destylizer_learns_the_way_back_and_is_told_no_style(stylist_config: StylistConfig) -> None:
    back = replace(stylist_config, reverse=True)
    there, here = StylistData(stylist_config).draw(3), StylistData(back).draw(3)
    assert torch.equal(there.content, here.target)
    assert torch.equal(there.target, here.content)
    assert torch.equal(there.style, here.style)
    stylist = Stylist(back, here.content)
    seen = stylist.sample(here, _run(), 0)
    tokens, pooled, _, content = seen.told
    assert not seen.styled.any()
    assert not tokens.any()
    assert not pooled.any()
    encode = stylist.live.vae.encode
    torch.testing.assert_close(content, encode(stylist.images(there.target)).latents)
    torch.testing.assert_close(seen.states.z, encode(stylist.images(there.content)).latents)


@pytest.mark.parametrize("seed", range(4))
def test_own_states_lie_on_the_networks_own_run(stylist: Stylist, seed: int) -> None:
    """Two steps from the photo, by hand; the triplets' states before them stay as they were."""
    pictures = StylistData(stylist.config).draw(seed)
    stylist.config = replace(stylist.config, own_steps=(2,))
    plain = stylist.sample(pictures, _run(seed), 0)
    run = _run(seed)
    drawn = stylist.sample(pictures, run, 2)
    states, (tokens, pooled, ids, content) = drawn.states, drawn.told
    for name in ("x_t", "t", "alpha", "sigma"):
        assert torch.equal(getattr(states, name)[:2], getattr(plain.states, name)[:2])
    first, second = stylist.live.schedule.coefficients(trajectory_timesteps(0.75, 2))
    at = [first.timestep, second.timestep].index(int(states.t[2]))
    noise = (states.x_t[2:] - first.alpha_t * content[2:]) / first.sigma_t
    if at:
        generator = torch.Generator().manual_seed(seed)
        torch.randn(content.shape, generator=generator)  # that of the triplets' states
        noise = torch.randn(content[2:].shape, generator=generator)
        x = first.alpha_t * content[2:] + first.sigma_t * noise
        with torch.no_grad():
            t = torch.full((2,), first.timestep)
            v = run_unet(stylist.live.unet, x, t, tokens[2:], pooled[2:], ids[2:], content[2:])
        clean, grain = first.alpha_t * x - first.sigma_t * v, first.sigma_t * x + first.alpha_t * v
        assert torch.allclose(states.x_t[2:], second.alpha_t * clean + second.sigma_t * grain, atol=1e-5)
    now = (first, second)[at]
    assert torch.allclose(states.sigma[2:], torch.full((2, 1, 1, 1), now.sigma_t))
    assert torch.allclose(states.alpha[2:], torch.full((2, 1, 1, 1), now.alpha_t))
    assert noise.std() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("steps", [1, 2])
def test_steadiness_by_hand(stylist: Stylist, steps: int) -> None:
    """The run of two steps, or one, once more on a part of the photo at (5, 18) px, from the same noise."""
    stylist.config = replace(
        stylist.config, own_steps=(steps,), steady_photos=1, steadiness_weight=2.0, edge_weight=3.0
    )
    pictures = StylistData(stylist.config).draw(0)
    run = _run(0)
    while len((sample := stylist.sample(pictures, run, 2)).course.steps) != steps:  # type: ignore[union-attr]
        pass
    course = cast(Any, sample.course)
    size = pictures.content.shape[1]
    picture = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    part = ..., slice(5, 5 + size - 32), slice(18, 18 + size - 32)
    # No other brightness and no grain.
    moves = SimpleNamespace(integers=lambda *_: np.array([5, 18]), uniform=lambda low, _: float(low == 0.97))
    noted: dict[str, Tensor] = {}
    run = cast(ModuleRun, SimpleNamespace(rng=moves, generator=run.generator, add=noted.update))
    loss = stylist.steadiness(picture, pictures, sample, run)
    with torch.no_grad():
        content = stylist.live.vae.encode(stylist.images(pictures.content[2:3])[part]).latents
        x, told = content, [value[2:3] for value in sample.told[:3]]
        for i, now in enumerate(course.steps):
            if i == 0:
                x = now.alpha_t * content + now.sigma_t * course.noise[:1, :, :-4, :-4]
            v = run_unet(stylist.live.unet, x, torch.tensor([now.timestep]), *told, content)
            clean, grain = now.alpha_t * x - now.sigma_t * v, now.sigma_t * x + now.alpha_t * v
            if i + 1 < steps:
                after = course.steps[i + 1]
                x = after.alpha_t * clean + after.sigma_t * grain
        again = stylist.live.vae.decode(clean).sample
    gap = float((again - picture[:1][part]).abs().mean())
    assert noted["unsteadiness"].item() == pytest.approx(gap, rel=1e-4)
    assert noted["edges"].item() == pytest.approx(gap, rel=1e-4)  # a part of 32 px is all edges
    assert loss.item() == pytest.approx(5 * gap, rel=1e-4)


def test_steadiness_counts_in_the_loss(stylist: Stylist) -> None:
    pictures, noted = StylistData(stylist.config).draw(0), {}
    plain = stylist.loss(pictures, _run(3))
    stylist.config = replace(stylist.config, steady_photos=2, steadiness_weight=0.7, edge_weight=0.4)
    more = stylist.loss(pictures, _run(3, noted))
    extra = 0.7 * noted["unsteadiness"].item() + 0.4 * noted["edges"].item()
    assert (more - plain).item() == pytest.approx(extra, rel=1e-3)
    more.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in stylist.live.unet.parameters())


def test_the_lattice_counts_in_the_loss(stylist: Stylist) -> None:
    pictures, noted = StylistData(stylist.config).draw(0), {}
    plain = stylist.loss(pictures, _run(3))
    stylist.config = replace(stylist.config, lattice_weight=0.7)
    more = stylist.loss(pictures, _run(3, noted))
    assert noted["lattice"] > 0.01
    assert (more - plain).item() == pytest.approx(0.7 * noted["lattice"].item(), rel=1e-3)


def test_all_losses_fall_along_their_gradient(stylist: Stylist) -> None:
    pictures = StylistData(stylist.config).draw(0)
    noted: dict[str, Tensor] = {}
    before = stylist.loss(pictures, _run(3, noted))
    before.backward()
    with torch.no_grad():
        for weight in stylist.live.unet.parameters():
            weight -= 0.003 * (0 if weight.grad is None else weight.grad)
    assert stylist.loss(pictures, _run(3)) < before
    assert noted.keys() == {"latents", "look", "style", "colour", "content"}


def test_own_runs_in_bf16_lose_no_gradient(stylist: Stylist) -> None:
    """Autocast keeps casts of weights: those of steps without gradients must not reach the last one."""
    pictures = StylistData(stylist.config).draw(0)
    stylist.config = replace(stylist.config, own_styles=2, own_steps=(2,))
    drawn = ((seed, stylist.sample(pictures, _run(seed), 4).states.t[0]) for seed in range(20))
    seed = next(seed for seed, t in drawn if t < 500)  # the second step of two
    stylist.config = replace(stylist.config, bf16=True)
    stylist.loss(pictures, _run(seed)).backward()
    lost = [n for n, p in stylist.live.unet.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost, lost[:5]


def test_the_distillers_teacher_draws_what_the_pipeline_does(
    stylist_config: StylistConfig, stylist_folder: Path
) -> None:
    pairs = spread_pairs(Path(stylist_config.sheet.contents), Path(stylist_config.sheet.styles), 2, 64)
    base, pipeline = load_base(stylist_folder), load_tiny(stylist_folder)
    scene = encode_scene(base, pairs)
    assert scene.cond.content is not None
    # `sample` draws one noise for all rows from this seed.
    noise = torch.randn(scene.z.shape[1:], generator=torch.Generator().manual_seed(0)).expand(scene.z.shape)
    z = sample_latents(base, scene.cond, scene.z, trajectory_timesteps(0.75, 2), 2.0, noise[None])
    images, side = to_tensor(scene.contents), base.style_px
    looks = to_tensor([cv2.resize(s, (side, side), interpolation=cv2.INTER_CUBIC) for s in scene.styles])
    wanted = sample(pipeline, images, looks, 2, guidance=2.0)
    assert torch.allclose(base.decode(z), wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["triplets", "pictures"])
def test_a_stylist_is_distilled_and_resumed(
    stylist_config: StylistConfig, stylist_folder: Path, tmp_path: Path, kind: str
) -> None:
    config = replace(
        small_recipe(tmp_path / "whole", stylist_folder, Path(stylist_config.triplets)),
        adversarial=ADVERSARIAL,
    )
    if kind == "pictures":
        pictures = PicturesConfig(stylist_config.sheet.contents, resolution_px=64, buckets=False, workers=0)
        style = StyleConfig(folder=stylist_config.sheet.styles, pairing="any")
        config = replace(config, triplets=TripletsConfig(), pictures=pictures, style=style)
    assert train_distil(config).is_file()
    broken = replace(config, output=str(tmp_path / "broken"))
    train_distil(broken, stop_after=3)
    train_distil(broken)
    assert_same(read_checkpoint(broken), read_checkpoint(config))


def test_each_trajectory_keeps_its_own_content(stylist_config: StylistConfig, stylist_folder: Path) -> None:
    base = load_base(stylist_folder)
    new = TripletSource(TripletsConfig(stylist_config.triplets, side=8, paired=0.5), base, 0).take(8, (8, 8))
    assert new.cond.content is not None
    assert torch.equal(new.cond.content, new.c)
    assert torch.equal(base.null(new.cond).content, new.c)
    unpaired = (new.z == new.c).flatten(1).all(1)
    assert 0 < unpaired.sum() < 8
    assert not (new.real == new.z).flatten(1).all(1)[unpaired].any()


def test_pictures_are_their_own_content(stylist_config: StylistConfig, stylist_folder: Path) -> None:
    base = load_base(stylist_folder)
    config = PicturesConfig(stylist_config.sheet.contents, resolution_px=64, buckets=False, workers=0)
    new = PictureSource(config, base, seed=0).take(2, (8, 8))
    assert torch.equal(new.cond.content, new.z)
    assert torch.equal(base.null(new.cond).content, new.z)
    assert not torch.equal(new.z[0], new.z[1])
