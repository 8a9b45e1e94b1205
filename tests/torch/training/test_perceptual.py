"""Perceptual networks from files in the published layout (random weights), distances, triplet folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from std_rt.core.errors import RecipeError
from std_rt.evaluation import measures
from std_rt.models.autoencoder import AutoencoderPixelShuffle, body_of
from std_rt.models.perceptual import (
    SqueezeNet,
    Vgg,
    content_distance,
    gram,
    lattice,
    load_perceptual,
    style_distance,
)
from std_rt.training.run.recipe import AutoencoderConfig
from std_rt.training.run.sheet import to_tensor
from std_rt.training.tiny.autoencoder_parts import copy_overlap, fit_shortcut, latent_weights
from std_rt.training.tiny.autoencoder_stage import train_autoencoder
from std_rt.training.tiny.triplets import find_triplets


def _picture(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand((1, 3, 8, 8), generator=generator) * 2 - 1
    return F.interpolate(small, (height, width), mode="bicubic").clamp(-1, 1)


def test_a_lattice_of_the_period_is_seen_and_no_other() -> None:
    picture = _picture(128, 128) + 0.05 * torch.randn(
        1, 3, 128, 128, generator=torch.Generator().manual_seed(1)
    )
    rows, columns = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")

    def with_dots(period: int) -> Tensor:
        return picture + 0.3 * ((rows % period == 0) & (columns % period == 0))

    plain = float(lattice(picture))
    assert plain < 0.15
    assert float(lattice(with_dots(8))) > plain + 0.1
    assert float(lattice(with_dots(7))) < plain + 0.02
    assert float(lattice(with_dots(7), 7)) > float(lattice(picture, 7)) + 0.1
    # Louder fine detail in one place of the period, of random sign.
    louder = picture + 0.3 * (picture - F.avg_pool2d(picture, 9, 1, 4)) * (columns % 8 < 2)
    assert float(lattice(louder)) > plain + 0.05
    assert torch.allclose(lattice(torch.cat([picture, with_dots(8)]))[:1], lattice(picture))


def test_the_lattice_in_the_loss_is_that_of_the_evaluation() -> None:
    frame = np.random.default_rng(3).integers(0, 256, (64, 80, 3)).astype(np.uint8)
    frame[2::8] = 200
    image = to_tensor([frame])
    assert float(lattice(image)) == pytest.approx(measures.lattice(frame), rel=1e-3)


def test_padding_with_zeros_changes_the_edge_alone(vgg_file: Path) -> None:
    x = _picture()
    ours, zeros = (load_perceptual(vgg_file, reflect)(x)[1] for reflect in (True, False))
    assert torch.allclose(ours[..., 3:-3, 3:-3], zeros[..., 3:-3, 3:-3], atol=1e-5)
    assert not torch.allclose(ours[..., :1, :], zeros[..., :1, :], atol=1e-3)


def test_vgg_sees_what_the_published_convention_says(vgg_file: Path) -> None:
    """RGB in [-1, 1] must reach the first layer as BGR in 0..255 less the ImageNet mean, the edges too."""
    network, x = load_perceptual(vgg_file), _picture()
    assert isinstance(network, Vgg)
    state = load_file(vgg_file)
    bgr = (x.flip(1) + 1) * 127.5 - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    weight, bias = (state[f"vgg.00.block1_conv1.{k}"].float() for k in ("weight", "bias"))
    expected = F.relu(F.conv2d(F.pad(bgr, (1,) * 4, mode="reflect"), weight, bias))
    taps = network(x)
    assert torch.allclose(taps[0], expected, rtol=1e-3, atol=1e-2)
    assert [tuple(t.shape[1:]) for t in taps] == [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8)]
    assert len(network(x, 3)) == 3


def test_squeezenet_gives_four_levels_and_gradients(squeezenet_file: Path) -> None:
    network, x = load_perceptual(squeezenet_file), _picture().requires_grad_(True)
    assert isinstance(network, SqueezeNet)
    taps = network(x)
    assert [t.shape[1] for t in taps] == [64, 128, 256, 384]
    taps[-1].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in network.parameters())


def test_style_distance_ignores_place_and_size_but_not_texture(vgg_file: Path) -> None:
    network, style = load_perceptual(vgg_file), _picture()
    features = network(style)
    wider = torch.cat([style, style.flip(3)], 3)
    noisy = (style + 0.5 * torch.randn(style.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    assert float(style_distance(features, features)) == 0
    near, far = (float(style_distance(network(x), features)) for x in (wider, noisy))
    assert near < 0.5 * far


def test_content_distance_forgives_gain_and_offset_per_channel() -> None:
    x = torch.randn(2, 4, 8, 8)
    assert torch.allclose(content_distance(3 * x + 1, x), torch.zeros(2), atol=1e-4)
    assert (content_distance(torch.randn(2, 4, 8, 8), x) > 0.5).all()


def test_gram_does_not_grow_with_the_picture() -> None:
    x = torch.rand(1, 4, 8, 8)
    assert torch.allclose(gram(x), gram(x.repeat(1, 1, 2, 2)), atol=1e-5)


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    for name in ("other", "broken", "none"):
        with pytest.raises(RecipeError, match=r"does not hold VGG-19 or SqueezeNet"):
            load_perceptual(tmp_path / f"{name}.safetensors")


def test_a_config_of_version_1_gives_the_network_it_gave() -> None:
    config = {"latent_channels": 8, "channels": [64, 128], "encoder_blocks": 2, "decoder_blocks": 3}
    vae = AutoencoderPixelShuffle.from_config(config)
    shapes = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    assert {name.split(".")[1] for name in shapes} <= {str(i) for i in range(12)}  # no shortcut
    assert shapes["encoder.1.weight"] == (64, 48, 3, 3)
    assert shapes["encoder.8.weight"] == (8, 128, 3, 3)
    assert shapes["decoder.10.weight"] == (48, 64, 3, 3)


def test_a_wider_latent_keeps_the_old_one_in_front() -> None:
    torch.manual_seed(0)
    old = AutoencoderPixelShuffle(4, (8, 16), 1, 1)
    new = AutoencoderPixelShuffle(6, (8, 16), 1, 1)
    copy_overlap(new.encoder, old.encoder)
    x = _picture()
    with torch.no_grad():
        assert torch.allclose(new.encode(x).latents[:, :4], old.encode(x).latents, atol=1e-6)


def test_a_fitted_shortcut_adds_detail_and_keeps_the_old_channels() -> None:
    torch.manual_seed(0)
    vae = AutoencoderPixelShuffle(6, (8, 16), 1, 1, shortcut=True)
    images = [_picture(seed=i) for i in range(4)]
    x = torch.cat(images)
    with torch.no_grad():
        before = vae.encode(x).latents
        error = (vae.decode(before).sample - x).square().mean()
        fit_shortcut(vae, images, first=2)
        after = vae.encode(x).latents
        assert torch.equal(before[:, :2], after[:, :2])
        assert after[:, 2:].std() == pytest.approx(1, abs=0.3)
        assert (vae.decode(after).sample - x).square().mean() < 0.5 * error
        picture = vae.decode(after).sample
        vae.standardize(after.mean((0, 2, 3)), after.std((0, 2, 3)))
        scaled = vae.encode(x).latents
        assert torch.allclose(scaled.std((0, 2, 3)), torch.ones(6), atol=1e-4)
        inside = slice(24, -24)
        again = vae.decode(scaled).sample
    assert torch.allclose(picture[..., inside, inside], again[..., inside, inside], atol=1e-3)


def test_latent_channels_weigh_what_the_picture_loses_with_them() -> None:
    torch.manual_seed(0)
    vae = AutoencoderPixelShuffle(3, (8, 16), 1, 1)
    with torch.no_grad():
        body_of(vae.decoder)[0].weight[:, 2] *= 0.1
        z = torch.randn(2, 3, 8, 8)
        picture, lost = vae.decode(z).sample, []
        for channel in range(3):
            moved = z.expand(64, -1, -1, -1, -1).flatten(0, 1).clone()
            moved[:, channel] += 1e-2 * torch.randn(128, 8, 8)
            error = vae.decode(moved).sample - picture.repeat(64, 1, 1, 1)
            lost.append(error.square().mean() ** 0.75)
    weights = latent_weights(vae, z)
    assert weights.shape == (1, 3, 1, 1)
    assert torch.allclose(weights.flatten(), torch.stack(lost) / torch.stack(lost).mean(), rtol=0.25)
    assert weights[0, 2] < 0.2 * weights[0, 0]


def _write_triplets(folder: Path, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    for kind, suffix in (("content", ".jpg"), ("style", ".webp"), ("stylized", ".png")):
        (folder / kind).mkdir(parents=True)
        for name in names:
            cv2.imwrite(str(folder / kind / f"{name}{suffix}"), rng.integers(0, 256, (96, 80, 3), np.uint8))


def test_triplets_are_matched_by_name_and_half_written_ones_left_out(tmp_path: Path) -> None:
    _write_triplets(tmp_path, ["b", "a", "broken"])
    (tmp_path / "style" / "broken.webp").unlink()
    (tmp_path / "stylized" / ".c.png").write_bytes(b"")
    assert [t.name for t in find_triplets(tmp_path)] == ["a", "b"]
    with pytest.raises(RecipeError, match="must hold pictures of equal names"):
        find_triplets(tmp_path / "none")


def test_autoencoder_trains_with_every_extra(
    autoencoder_config: AutoencoderConfig, vae_folder: Path, squeezenet_file: Path, tmp_path: Path
) -> None:
    _write_triplets(tmp_path / "triplets", ["a"])
    config = replace(
        autoencoder_config, output=str(tmp_path / "run"), steps=2, snapshot_every=2, latent_channels=16,
        encoder_channels=(4, 16), quarter_blocks=(1, 2), start_from=str(vae_folder),
        perceptual=str(squeezenet_file), latents_like=str(vae_folder), triplets=str(tmp_path / "triplets"),
        device="auto", shortcut=True,
    )  # fmt: skip
    folder = train_autoencoder(config)
    vae = AutoencoderPixelShuffle.from_pretrained(folder)
    assert vae.encode(torch.zeros(1, 3, 64, 64)).latents.shape == (1, 16, 8, 8)
    assert vae.encoder.linear[1].weight[8:].abs().sum() > 0
    assert "held_out_style" in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8")
