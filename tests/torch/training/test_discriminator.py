"""The adversarial loss: who gets gradients, exact numbers, real below fake (method.md, tests 5 and 8)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import NoiseSchedule
from std_rt.models.perceptual import load_perceptual
from std_rt.models.style_encoder import StyleEncoder
from std_rt.training.distil.discriminator import (
    Adversary,
    Heads,
    _squared_gradient,
    draw_real_index,
    has_pair,
    hinge_d,
    hinge_g,
    renoise,
)
from std_rt.training.distil.features import (
    DinoFeatures,
    PerceptualFeatures,
    StyleFeatures,
    fit_patches,
    load_dino,
)
from std_rt.training.distil.trajectory import Levels

transformers = pytest.importorskip("transformers")

CONDITION_DIM = 6


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_rng(seed))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _dino(**more: int) -> nn.Module:
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=12, num_attention_heads=2, patch_size=14, image_size=28, **more
    )
    return transformers.Dinov2Model(config)


class Decode(nn.Module):
    """4 latent channels -> an image 4x larger; ``calls`` counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.conv = nn.Conv2d(4, 3 * 16, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.pixel_shuffle(self.conv(z), 4).tanh()


def _dino_features(size_px: int = 28) -> DinoFeatures:
    return DinoFeatures(_dino(), Decode(), size_px=size_px)


def _style_features() -> StyleFeatures:
    encoder = StyleEncoder(16, 4, (8, 8), 1, (8, 12, 16), 4, 16, 6)
    return StyleFeatures(encoder)


def _adversary(kind: str) -> Adversary:
    features = _dino_features() if kind == "dinov2" else _style_features()
    return Adversary(features, CONDITION_DIM, width=16)


@pytest.fixture(params=["dinov2", "style"])
def adversary(request: pytest.FixtureRequest) -> Adversary:
    return _adversary(request.param)


def _gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


# --- features


@pytest.mark.parametrize(
    ("image", "size_px", "expected"),
    [
        ((512, 512), 224, (224, 224)),
        ((768, 512), 224, (336, 224)),
        ((512, 896), 224, (224, 392)),
        ((100, 103), 40, (42, 42)),
        ((64, 64), 3, (14, 14)),
    ],
)
def test_pictures_for_dino_keep_their_aspect_in_whole_patches(
    image: tuple[int, int], size_px: int, expected: tuple[int, int]
) -> None:
    assert fit_patches(*image, size_px, 14) == expected


def test_dino_maps_are_the_named_blocks_outputs_without_class_token() -> None:
    features = _dino_features()
    seen: dict[int, Tensor] = {}
    for i, layer in enumerate(features.model.encoder.layer):
        layer.register_forward_hook(lambda _m, _i, out, i=i: seen.__setitem__(i, out))
    maps = features(_noise(2, 4, 14, 7))
    assert [m.shape for m in maps] == [(2, 32, 4, 2)] * 4
    assert features.channels == [32] * 4
    for block, found in zip((2, 5, 8, 11), maps, strict=True):
        # Row-major patches: place (row, column) is token 1 + row * 2 + column.
        assert torch.equal(found[:, :, 3, 1], seen[block][:, 1 + 3 * 2 + 1])


def test_a_perceptual_networks_maps_are_those_of_the_decoded_picture(squeezenet_file: Path) -> None:
    network, decode = load_perceptual(squeezenet_file), Decode()
    features, latents = PerceptualFeatures(network, decode), _noise(2, 4, 16, 12).requires_grad_()
    maps = features(latents)
    assert [m.shape[1] for m in maps] == features.channels
    assert all(torch.equal(a, b) for a, b in zip(maps, network(decode(latents)), strict=True))
    sum(m.square().mean() for m in maps).backward()
    assert latents.grad is not None
    assert latents.grad.abs().min() > 0
    assert all(p.grad is None for p in network.parameters())


def test_dino_registers_are_dropped_too() -> None:
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, num_register_tokens=4
    )
    config.patch_size = 14
    features = DinoFeatures(transformers.Dinov2WithRegistersModel(config), Decode(), (0, 2), 28)
    assert [m.shape for m in features(_noise(1, 4, 7, 7))] == [(1, 32, 2, 2)] * 2


def test_dino_sees_imagenet_statistics() -> None:
    pixels = _dino_features().pixels(torch.full((1, 3, 56, 84), 0.5))
    assert pixels.shape == (1, 3, 28, 42)
    expected = [(0.75 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(expected), atol=1e-5)


def test_style_features_are_latents_and_the_encoders_own_stages() -> None:
    features = _style_features()
    z = _noise(2, 4, 9, 7)
    maps = features(z)
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 9, 7), (8, 9, 7), (12, 5, 4), (16, 3, 2)]
    assert features.channels == [4, 8, 12, 16]
    assert torch.equal(maps[0], z)
    logits = Heads(features.channels, CONDITION_DIM, 16)(maps, _noise(2, CONDITION_DIM))
    assert logits.shape == (2, 4 * 3 * 2), "every map is judged at as many places"


# --- heads and losses


def test_hinge_numbers_by_hand() -> None:
    real = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    fake = torch.tensor([[-3.0, 1.0], [-1.0, -2.0]])
    assert hinge_d(real, fake).tolist() == [0.5 + 1.0, 0.0]
    assert hinge_g(fake).tolist() == [1.0, 1.5]
    halves = hinge_d(real[:, [0, 0, 1]].bfloat16(), fake[:, [0, 0, 1]].bfloat16())
    assert halves.tolist() == pytest.approx([1 / 3 + 2 / 3, 0.0], abs=1e-6), "means are fp32's"
    assert hinge_g(fake.bfloat16()).dtype == torch.float32


def _leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def test_logits_by_hand() -> None:
    """``v h + b + (E c) h / sqrt(width)`` at each place; h has a residual branch, normed in eight groups."""
    heads = Heads([3, 5], CONDITION_DIM, 16).double()
    for seed, value in enumerate(heads.parameters()):
        value.data = _noise(*value.shape, seed=seed).double()
    maps, c = [_noise(2, 3, 4, 6).double(), _noise(2, 5, 2, 3).double()], _noise(2, CONDITION_DIM).double()
    expected = []
    for head, x in zip(heads.heads, maps, strict=True):
        entered = torch.einsum("oc,bcij->boij", head.enter.weight[..., 0, 0], x)
        h = _leaky(entered + head.enter.bias[:, None, None])
        groups = nn.functional.conv2d(h, head.look.weight, head.look.bias, padding=1).view(2, 8, -1)
        normed = (groups - groups.mean(2, True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        h = h + _leaky(normed.view_as(h) * head.norm.weight[:, None, None] + head.norm.bias[:, None, None])
        h = h.view(2, 16, 2, x.shape[2] // 2, 3, x.shape[3] // 3).mean((3, 5)).flatten(2)
        told = c @ head.embed.weight.T / 4
        expected.append(((head.judge.weight[..., 0, 0] + told)[:, :, None] * h).sum(1) + head.judge.bias)
    assert torch.allclose(heads(maps, c), torch.cat(expected, 1))


def test_heads_take_maps_of_any_precision_in_their_own_one_each() -> None:
    heads = Heads([5, 5], CONDITION_DIM, 16)
    x, c = _noise(2, 5, 3, 3).bfloat16(), _noise(2, CONDITION_DIM).bfloat16()
    assert torch.equal(heads([x, x], c), heads([x.float(), x.float()], c.float()))
    with pytest.raises(ValueError, match="shorter"):
        heads([x], c)


def test_condition_matters_and_a_dropped_one_is_unconditional() -> None:
    heads = Heads([5], CONDITION_DIM, 16)
    x, c = [_noise(2, 5, 3, 3)], _noise(2, CONDITION_DIM)
    assert (heads(x, c) - heads(x, -c)).abs().max() > 1e-3
    middle = (heads(x, c) + heads(x, -c)) / 2
    assert torch.allclose(heads(x, torch.zeros_like(c)), middle, atol=1e-6)


def test_samples_do_not_meet_in_the_heads() -> None:
    heads = Heads([5], CONDITION_DIM, 16)
    x, c = _noise(3, 5, 4, 4), _noise(3, CONDITION_DIM)
    alone = torch.cat([heads([x[i : i + 1]], c[i : i + 1]) for i in range(3)])
    assert torch.allclose(heads([x], c), alone, atol=1e-6)


def test_heads_see_contrast() -> None:
    """A normalisation in front would hide that a picture is flatter than real ones."""
    heads = Heads([5], CONDITION_DIM, 16)
    x, c = _noise(1, 5, 4, 4), torch.zeros(1, CONDITION_DIM)
    assert (heads([x], c) - heads([x * 0.1], c)).abs().mean() > 0.02


class LinearHeads(nn.Module):
    """Logits ``a * sum(x)`` and ``b * sum(x)``; the gradient's square is ``(a + b)^2 * numel``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, -0.5]))

    def forward(self, features: list[Tensor], condition: Tensor) -> Tensor:
        total = torch.stack([f.flatten(1).sum(1) for f in features]).sum(0)
        return total[:, None] * self.weight


def r1_penalty(heads: nn.Module, features: list[Tensor], condition: Tensor) -> Tensor:
    """The penalty that the loss takes, on features of our choice: ``[B]``."""
    leaves = [f.detach().requires_grad_() for f in features]
    return _squared_gradient(heads(leaves, condition), leaves)


def test_penalty_of_a_linear_head_by_hand() -> None:
    heads = LinearHeads()
    features = [_noise(3, 2, 2, 2), _noise(3, 4, 1, 1)]
    penalty = r1_penalty(heads, features, torch.zeros(3, 1))
    assert torch.allclose(penalty, torch.full((3,), 1.5**2 * 12))
    penalty.mean().backward()
    assert heads.weight.grad is not None
    assert torch.allclose(heads.weight.grad, torch.full((2,), 2 * 1.5 * 12))


def test_penalty_and_its_gradient_agree_with_finite_differences() -> None:
    heads = Heads([2, 3], CONDITION_DIM, 8).double()
    x = [_noise(1, 2, 4, 4).double(), _noise(1, 3, 2, 2).double()]
    c = _noise(1, CONDITION_DIM).double()
    squares = 0.0
    for which, i in ((w, i) for w in (0, 1) for i in range(x[w].numel())):
        moved = []
        for h in (1e-6, -1e-6):
            y = [f.clone() for f in x]
            y[which].view(-1)[i] += h
            moved.append(heads(y, c).sum().item())
        squares += ((moved[0] - moved[1]) / 2e-6) ** 2
    assert r1_penalty(heads, x, c).item() == pytest.approx(squares, rel=1e-5)
    r1_penalty(heads, x, c).sum().backward()
    weight = heads.heads[1].look.weight
    moved = []
    for h in (1e-6, -2e-6):
        with torch.no_grad():
            weight[0, 0, 1, 1] += h
        moved.append(r1_penalty(heads, x, c).item())
    assert weight.grad[0, 0, 1, 1].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-4, abs=1e-8)


# --- the pair


def test_real_is_strictly_below_fake_and_uniform() -> None:
    """Acceptance test 8 of method.md."""
    rng = _rng()
    s = torch.arange(-1, 37).repeat(400)
    r = draw_real_index(s, rng, "below")
    pair = has_pair(s, "below")
    assert (r[pair] < s[pair]).all()
    assert (r >= -1).all()
    assert torch.equal(pair, s >= 0)
    counts = torch.bincount(draw_real_index(torch.full((6000,), 5), rng, "below") + 1, minlength=6)
    assert counts.numel() == 6
    assert (counts - 1000).abs().max() < 150


def test_symmetric_mode_and_unknown_mode() -> None:
    s = torch.tensor([-1, 0, 7])
    assert torch.equal(draw_real_index(s, _rng(), "same"), s)
    below = [draw_real_index(torch.full((99,), 30), _rng(5), "below") for _ in range(2)]
    assert torch.equal(*below), "drawn by the given generator alone"
    assert has_pair(s, "same").all()
    with pytest.raises(RecipeError, match="'above'"):
        draw_real_index(s, _rng(), "above")


def test_renoise_to_each_samples_own_level() -> None:
    schedule = NoiseSchedule.scaled_linear()
    levels = Levels.of(schedule, 739)
    z, noise = _noise(3, 4, 2, 2), _noise(3, 4, 2, 2, seed=1)
    x = renoise(z, torch.tensor([-1, 0, 20]), levels, noise)
    assert torch.equal(x[0], z[0])
    for row, t in ((1, 19), (2, 419)):
        alpha, sigma = schedule.alpha_sigma(t)
        assert torch.allclose(x[row], alpha * z[row] + sigma * noise[row])


# --- both sides of the game


def test_generator_loss_teaches_the_student_only(adversary: Adversary) -> None:
    fake = _noise(2, 4, 14, 10).requires_grad_()
    condition = _noise(2, CONDITION_DIM).requires_grad_()
    loss = adversary.generator_loss(fake, condition, torch.tensor([True, False]))
    loss.backward()
    assert condition.grad is None
    assert fake.grad is not None
    assert fake.grad[0].abs().sum() > 0
    assert fake.grad[1].abs().sum() == 0, "a masked sample teaches nothing"
    assert not _gradients(adversary.heads)
    assert all(p.requires_grad for p in adversary.heads.parameters())


def test_discriminator_loss_teaches_the_heads_only(adversary: Adversary) -> None:
    fake, real = (_noise(2, 4, 14, 10, seed=i).requires_grad_() for i in (0, 1))
    condition = _noise(2, CONDITION_DIM).requires_grad_()
    loss, logs = adversary.discriminator_loss(
        adversary.heads, fake, real, condition, torch.ones(2), r1_weight=1.0
    )
    loss.backward()
    assert fake.grad is None
    assert real.grad is None
    assert condition.grad is None
    assert len(_gradients(adversary.heads)) == len(list(adversary.heads.parameters()))
    # The last bias is pushed up by real and down by fake alike while both are within the hinge.
    named = dict(adversary.heads.named_parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in named.items() if name.endswith("weight"))
    assert sorted(logs) == ["d_fake", "d_real", "r1"]
    assert not any(v.requires_grad or v.ndim for v in logs.values())


def _frozen_of(adversary: Adversary) -> nn.Module:
    features = adversary.features
    return features.model if isinstance(features, DinoFeatures) else features.encoder


def test_features_are_frozen(adversary: Adversary) -> None:
    frozen = _frozen_of(adversary)
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("paired", [[0, 2], [1], []])
def test_discriminator_loss_is_its_parts(adversary: Adversary, paired: list[int]) -> None:
    """One forward over real and fake together is the same as the plain functions on each; the loss divides
    by the batch, what is logged is of the samples that have a pair."""
    fake, real, c = _noise(3, 4, 7, 7), _noise(3, 4, 7, 7, seed=1), _noise(3, CONDITION_DIM)
    mask = torch.zeros(3)
    mask[paired] = 1
    loss, logs = adversary.discriminator_loss(adversary.heads, fake, real, c, mask, 0.3)
    maps = adversary.features(real)
    trues, falses = adversary.heads(maps, c), adversary.heads(adversary.features(fake), c)
    per_sample = hinge_d(trues, falses)
    penalty = r1_penalty(adversary.heads, maps, c)
    assert torch.allclose(loss, (per_sample + 0.3 * penalty)[paired].sum() / 3, atol=1e-6)
    shown = {"d_real": trues.mean(1), "d_fake": falses.mean(1), "r1": penalty}
    for name, value in shown.items():
        expected = value[paired].mean() if paired else torch.tensor(0.0)
        assert torch.allclose(logs[name], expected, atol=1e-6), name
    without, logs = adversary.discriminator_loss(adversary.heads, fake, real, c, mask, 0.0)
    assert torch.allclose(without, per_sample[paired].sum() / 3, atol=1e-6)
    assert logs["r1"] == 0


def test_two_half_batches_are_one_batch_for_both_networks(adversary: Adversary) -> None:
    """Acceptance test 5 of method.md."""
    student = nn.Conv2d(4, 4, 1)
    x, real, c = _noise(4, 4, 7, 7), _noise(4, 4, 7, 7, seed=1), _noise(4, CONDITION_DIM)
    mask = torch.tensor([True, False, True, True])
    found = []
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        student.zero_grad()
        adversary.heads.zero_grad()
        for rows in parts:
            fake = student(x[rows])
            generator = adversary.generator_loss(fake, c[rows], mask[rows])
            judged, _ = adversary.discriminator_loss(
                adversary.heads, fake, real[rows], c[rows], mask[rows], 0.1
            )
            ((generator + judged) / len(parts)).backward()
        found.append(_gradients(student) + _gradients(adversary.heads))
    for whole, halves in zip(*found, strict=True):
        assert (whole - halves).abs().max() < 1e-6 * max(1.0, whole.abs().max().item())


def test_fakes_are_encoded_once_for_both_losses() -> None:
    adversary = _adversary("dinov2")
    assert isinstance(adversary.features, DinoFeatures)
    decode = adversary.features.decode
    assert isinstance(decode, Decode)
    fake, real, c = _noise(2, 4, 7, 7).requires_grad_(), _noise(2, 4, 7, 7, seed=1), _noise(2, CONDITION_DIM)
    mask = torch.ones(2)
    expected = adversary.generator_loss(fake, c, mask)
    judged, _ = adversary.discriminator_loss(adversary.heads, fake, real, c, mask, 0.1)
    decode.calls = 0
    maps = adversary.features(fake)
    assert torch.equal(adversary.generator_loss(fake, c, mask, maps), expected)
    again, _ = adversary.discriminator_loss(adversary.heads, fake, real, c, mask, 0.1, maps)
    assert torch.allclose(again, judged)
    assert decode.calls == 2, "one for the fakes, one for the reals"
    again.backward()
    assert fake.grad is None


def test_under_autocast_losses_and_penalty_stay_fp32() -> None:
    adversary = _adversary("dinov2")
    fake, real, c = _noise(2, 4, 7, 7).requires_grad_(), _noise(2, 4, 7, 7, seed=1), _noise(2, CONDITION_DIM)
    maps = [m.detach().requires_grad_() for m in adversary.features(real)]
    slopes = torch.autograd.grad(adversary.heads(maps, c).sum(), maps, create_graph=True)
    expected = torch.stack([g.square().flatten(1).sum(1) for g in slopes]).sum(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(r1_penalty(adversary.heads, maps, c), expected)
        loss = adversary.generator_loss(fake, c, torch.ones(2))
        judged, _ = adversary.discriminator_loss(adversary.heads, fake, real, c, torch.ones(2), 1.0)
    assert loss.dtype == judged.dtype == torch.float32
    (loss + judged).backward()
    assert fake.grad is not None
    assert torch.isfinite(fake.grad).all()
    assert all(torch.isfinite(g).all() for g in _gradients(adversary.heads))


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    store = f"file://{(tmp_path / 'store').as_posix()}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
def test_heads_wrapped_in_ddp_get_the_same_gradients() -> None:
    """Penalty and both hinge terms in one backward; the student's loss runs in between on bare heads."""
    adversary = _adversary("style")
    fake, real, c = _noise(2, 4, 8, 8).requires_grad_(), _noise(2, 4, 8, 8, seed=1), _noise(2, CONDITION_DIM)
    mask, found = torch.ones(2), []
    for heads in (adversary.heads, nn.parallel.DistributedDataParallel(adversary.heads)):
        for _ in range(2):
            adversary.heads.zero_grad()
            judged, _ = adversary.discriminator_loss(heads, fake, real, c, mask, 1.0)
            adversary.generator_loss(fake, c, mask).backward()
            judged.backward()
        found.append(_gradients(adversary.heads))
    for bare, wrapped in zip(*found, strict=True):
        assert torch.allclose(bare, wrapped, atol=1e-6)


def test_discriminator_learns_two_distributions_apart() -> None:
    adversary = _adversary("style")
    optimizer = torch.optim.Adam(adversary.heads.parameters(), 2e-3)
    mask, losses = torch.ones(4), []
    for step in range(40):
        real, fake = _noise(4, 4, 8, 8, seed=step), 0.5 * _noise(4, 4, 8, 8, seed=1000 + step)
        loss, logs = adversary.discriminator_loss(
            adversary.heads, fake, real, torch.zeros(4, CONDITION_DIM), mask, 1e-5
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert logs["d_real"] > logs["d_fake"]


def test_moving_an_adversary_moves_all_of_it(adversary: Adversary) -> None:
    """On the device that every torch has besides the CPU."""
    assert adversary.to("meta") is adversary
    for part in (adversary.heads, _frozen_of(adversary)):
        assert {p.device.type for p in part.parameters()} == {"meta"}
    if isinstance(adversary.features, DinoFeatures):
        assert adversary.features.pixels(torch.zeros(1, 3, 28, 28, device="meta")).device.type == "meta"


def test_heads_round_trip_through_a_state_dict(adversary: Adversary) -> None:
    again = Heads(adversary.features.channels, CONDITION_DIM, width=16)
    again.load_state_dict({k: v.clone() for k, v in adversary.heads.state_dict().items()})
    maps, c = adversary.features(_noise(2, 4, 7, 7)), _noise(2, CONDITION_DIM)
    assert torch.equal(adversary.heads(maps, c), again(maps, c))


# --- loading


def test_dino_round_trips_through_a_folder(tmp_path: Path) -> None:
    model = _dino().eval()
    model.save_pretrained(tmp_path)
    loaded = load_dino(str(tmp_path))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    pixels = _noise(1, 3, 28, 42)
    with torch.no_grad():
        expected, found = (m(pixels).last_hidden_state for m in (model, loaded))
    assert torch.allclose(expected, found, atol=1e-5)


def _refused(source: Path | str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_dino(source)
    message = str(caught.value)
    assert "\n" not in message
    assert "adversarial.dino=FOLDER" in message
    assert "adversarial.weight=0" in message
    return message


def test_a_folder_that_is_missing_broken_or_of_another_kind(tmp_path: Path) -> None:
    assert "nowhere" in _refused(tmp_path / "nowhere")
    _dino().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"not weights")
    _refused(tmp_path / "broken")
    transformers.ViTConfig(hidden_size=32).save_pretrained(tmp_path / "vit")
    assert "'vit'" in _refused(tmp_path / "vit")


def test_a_folder_that_lacks_weights(tmp_path: Path) -> None:
    """Transformers fills them with random ones; a discriminator on those would only look like one."""
    model = _dino()
    state = {k: v for k, v in model.state_dict().items() if "layer.7." not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    assert re.search(r"lacks \d+ weights, 'encoder.layer.7", _refused(tmp_path))


def test_dino_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "std-rt-tests/no-such-dino" in _refused("std-rt-tests/no-such-dino")


@pytest.mark.parametrize("blocks", [(2, 12), (-1,), ()])
def test_blocks_that_the_model_lacks(blocks: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match="blocks 0 to 11"):
        DinoFeatures(_dino(), Decode(), blocks)


def test_style_features_need_a_style_encoder() -> None:
    with pytest.raises(RecipeError, match="dinov2"):
        StyleFeatures(None)
