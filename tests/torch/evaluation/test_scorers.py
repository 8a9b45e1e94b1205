"""Scores that need weights, on tiny random models in the layouts of the published files."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from support.artfid import inception_features, random_inception, random_lpips, write_artfid
from support.clip_weights import PX, csd_state, write_clip, write_csd, write_predictor
from support.pipelines import randomize
from support.weights import write_vgg
from torch import Tensor
from transformers import (
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from std_rt.core.errors import UsageError
from std_rt.evaluation.scorers import load_features, load_scorers
from std_rt.models.artfid import ArtInception, Lpips
from std_rt.models.perceptual import load_perceptual

Frame = NDArray[np.uint8]


def _frames(count: int) -> list[Frame]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (48, 48, 3), np.uint8) for _ in range(count)]


def _small(frame: Frame, mean: list[float], std: list[float], side: int) -> Tensor:
    """What the published preprocessing does, in one line of its own."""
    x = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
    x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def _clip_images(frame: Frame) -> Tensor:
    return _small(frame, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711], PX)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def vision(clip: Path) -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection.from_pretrained(clip).eval()


def test_nothing_asked_is_nothing_loaded() -> None:
    assert load_scorers() == []


@torch.no_grad()
def test_clip_compares_with_content_and_style(clip: Path, vision: CLIPVisionModelWithProjection) -> None:
    frames = _frames(3)
    (scorer,) = load_scorers(clip=clip)
    ours, content, style = (vision(_clip_images(f)).image_embeds for f in frames)
    expected = {"clip_content": _cosine(ours, content), "clip_style": _cosine(ours, style)}
    assert scorer(*frames) == pytest.approx(expected, abs=1e-5)
    assert scorer(frames[0], frames[0], frames[1])["clip_content"] == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_dino_compares_class_tokens_with_the_content(tmp_path: Path) -> None:
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=8, mlp_ratio=2
    )
    model = randomize(Dinov2Model(config), 1)
    model.save_pretrained(tmp_path)
    (scorer,) = load_scorers(dino=tmp_path)
    frames = _frames(3)
    tokens = [
        model(_small(f, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 40)).last_hidden_state[:, 0]
        for f in frames
    ]
    assert scorer(*frames) == pytest.approx({"dino_content": _cosine(tokens[0], tokens[1])}, abs=1e-5)


@pytest.mark.parametrize("layout", ["published", "weights only", "safetensors"])
@torch.no_grad()
def test_csd_reads_every_layout(vision: CLIPVisionModelWithProjection, tmp_path: Path, layout: str) -> None:
    path = tmp_path / "csd.bin"
    if layout == "published":
        write_csd(path, vision)
    elif layout == "weights only":
        torch.save(csd_state(vision), path)
    else:
        path = tmp_path / "csd.safetensors"
        plain = {k.removeprefix("module."): v.contiguous() for k, v in csd_state(vision).items()}
        save_file(plain, path)
    (scorer,) = load_scorers(csd=path)
    frames = _frames(3)
    ours, style = (vision(_clip_images(f)).image_embeds for f in (frames[0], frames[2]))
    assert scorer(*frames) == pytest.approx({"csd": _cosine(ours, style)}, abs=1e-5)


@torch.no_grad()
def test_the_aesthetic_predictor_sees_unit_vectors(
    clip: Path, vision: CLIPVisionModelWithProjection, tmp_path: Path
) -> None:
    layers = write_predictor(tmp_path / "linearMSE.pth")
    frames = _frames(3)
    scorers = load_scorers(clip=clip, aesthetic=tmp_path / "linearMSE.pth")
    expected = float(layers(F.normalize(vision(_clip_images(frames[0])).image_embeds)))
    assert scorers[1](*frames) == pytest.approx({"aesthetic": expected}, abs=1e-5)


class _Payload:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return copy.copy(open), (str(self.path), "w")


@pytest.mark.parametrize("option", ["csd", "aesthetic"])
def test_a_file_that_wants_to_run_code_is_refused(clip: Path, tmp_path: Path, option: str) -> None:
    path, touched = tmp_path / "evil.pth", tmp_path / "touched"
    torch.save({"model_state_dict": _Payload(touched)}, path)
    with pytest.raises(UsageError, match=f"--{option} .* cannot be read as weights"):
        load_scorers(clip=clip, **{option: path})
    path.write_bytes(pickle.dumps(_Payload(touched)))
    with pytest.raises(UsageError, match=f"--{option} .* cannot be read as weights"):
        load_scorers(clip=clip, **{option: path})
    assert not touched.exists()


def test_what_does_not_hold_the_weights_is_one_clear_line(clip: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    other, no_weights = tmp_path / "other.safetensors", tmp_path
    cases = [
        ({"clip": tmp_path / "none"}, "--clip .* is not a transformers folder"),
        ({"clip": no_weights}, "--clip .* cannot be loaded"),
        ({"dino": clip}, "--dino .* (does not hold a Dinov2Model|cannot be loaded)"),
        ({"csd": tmp_path / "none.bin"}, "--csd .* cannot be read"),
        ({"csd": other}, "is not a CSD checkpoint"),
        ({"csd": tmp_path / "list.pth"}, "holds a list"),
        ({"clip": clip, "aesthetic": other}, "is not an aesthetic predictor"),
        ({"clip": clip, "aesthetic": tmp_path / "reluMSE.pth"}, "variant with ReLU"),
        ({"aesthetic": other}, "add --clip"),
    ]
    for options, reason in cases:
        with pytest.raises(UsageError, match=reason) as caught:
            load_scorers(**options)
        assert "\n" not in str(caught.value)


def test_a_csd_file_of_another_shape_is_refused(
    vision: CLIPVisionModelWithProjection, tmp_path: Path
) -> None:
    state = csd_state(vision)
    del state["module.backbone.ln_post.bias"]
    torch.save({"model_state_dict": state}, tmp_path / "csd.bin")
    with pytest.raises(UsageError, match=r"post_layernorm\.bias"):
        load_scorers(csd=tmp_path / "csd.bin")


def test_a_predictor_for_another_clip_is_refused(clip: Path, tmp_path: Path) -> None:
    write_predictor(tmp_path / "big.pth", 768)
    scorer = load_scorers(clip=clip, aesthetic=tmp_path / "big.pth")[1]
    with pytest.raises(UsageError, match="vectors of 768 numbers, --clip gives 12"):
        scorer(*_frames(3))


def test_fixtures_are_the_published_layout(clip: Path) -> None:
    names = load_file(clip / "model.safetensors")
    assert "visual_projection.weight" in names
    assert "vision_model.post_layernorm.weight" in names


def test_vgg_compares_grams_with_the_style_and_relu4_1_with_the_content(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = write_vgg(tmp_path / "vgg.safetensors")
    output, content, style = _frames(3)
    style = style[:40, :32] // 2  # any size
    (scorer,) = load_scorers(vgg=path)
    network = load_perceptual(path)

    def taps(frame: Frame) -> list[NDArray[np.float32]]:
        x = torch.from_numpy(frame).permute(2, 0, 1)[None] / 127.5 - 1
        return [tap[0].flatten(1).numpy() for tap in network(x)]

    ours, theirs, photo = taps(output), taps(style), taps(content)[-1]
    grams = [[t @ t.T / t.shape[1] for t in one] for one in (ours, theirs)]
    norm = np.linalg.norm
    parts = [norm(a - b) / max(norm(a), norm(b)) for a, b in zip(*grams, strict=True)]
    unit = [
        (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) for x in (ours[-1], photo)
    ]
    found = scorer(output, content, style)
    assert found["vgg_style"] == pytest.approx(np.mean(parts), rel=1e-3)
    assert found["vgg_content"] == pytest.approx(np.square(unit[0] - unit[1]).mean(), rel=1e-3)
    same = scorer(content, content, content)
    assert (same["vgg_style"], same["vgg_content"]) == (0, 0)


def test_vgg_takes_nothing_else(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("other", "missing"):
        with pytest.raises(UsageError, match=r"--vgg .* does not hold VGG-19"):
            load_scorers(vgg=tmp_path / f"{name}.safetensors")


@torch.no_grad()
def test_inception_folded_is_inception_with_batch_norm() -> None:
    state = random_inception()
    # 94 convolutions; Keras counts 21,802,784 numbers without the heads, of which 3 x 17,216 are batch norm.
    assert len(state) == 6 * 94
    assert sum(v.numel() for k, v in state.items() if k.endswith("conv.weight")) == 21_802_784 - 3 * 17_216
    images = torch.rand(2, 3, 90, 80)
    found, expected = ArtInception(state)(images * 2 - 1), inception_features(state, images)
    assert found.shape == (2, 2048)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_lpips_is_its_definition() -> None:
    """Layer by layer, position by position, in double precision."""
    alexnet, linear = random_lpips()
    pair = torch.rand(2, 3, 70, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x, total = ((pair - mean) / std).double(), 0.0
    layers = zip((0, 3, 6, 8, 10), ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1)), linear.values(), strict=True)
    for n, (stride, padding), weight in layers:
        conv = (alexnet[f"features.{n}.{key}"].double() for key in ("weight", "bias"))
        x = F.conv2d(x, *conv, stride=stride, padding=padding).clamp(min=0)
        unit = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
        off = ((unit[0] - unit[1]) ** 2).flatten(1).numpy()
        total += float(np.mean(weight.flatten().double().numpy() @ off))
        x = F.max_pool2d(x, 3, 2) if n in (0, 3) else x
    network, images = Lpips(alexnet, linear), pair * 2 - 1
    assert float(network(images[:1], images[1:])) == pytest.approx(total, rel=2e-3)
    assert float(network(images[:1], images[:1])) == 0


def test_artfid_gives_a_distance_a_pair_and_features_a_picture(tmp_path: Path) -> None:
    folder = write_artfid(tmp_path / "artfid")
    rng = np.random.default_rng(1)
    output, content = (rng.integers(0, 256, (80, 80, 3), np.uint8) for _ in range(2))
    (scorer,) = load_scorers(artfid=folder)
    assert scorer(output, content, content)["lpips"] > 0
    assert scorer(content, content, output) == {"lpips": 0}
    describe = load_features(side_px=80, artfid=folder)["artfid"]
    images = torch.from_numpy(output).permute(2, 0, 1)[None] / 255
    expected = inception_features(random_inception(), images)[0].numpy()
    assert describe(output) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    with pytest.raises(UsageError, match="at least 75 px, got 74"):
        load_features(side_px=74, artfid=folder)
    (folder / "alex.pth").unlink()
    with pytest.raises(UsageError, match=r"lacks alex\.pth; it is to hold art_inception\.pth"):
        load_scorers(artfid=folder)
    torch.save({"a": torch.zeros(1)}, folder / "alex.pth")
    with pytest.raises(UsageError, match="does not hold AlexNet and LPIPS"):
        load_scorers(artfid=folder)
    torch.save({"a": torch.zeros(1)}, folder / "art_inception.pth")
    with pytest.raises(UsageError, match="does not hold an Inception v3"):
        load_features(side_px=80, artfid=folder)


@torch.no_grad()
def test_csds_features_are_the_vectors_of_its_cosine(
    vision: CLIPVisionModelWithProjection, tmp_path: Path
) -> None:
    path = write_csd(tmp_path / "csd.bin", vision)
    frames = _frames(2)
    (scorer,), describe = load_scorers(csd=path), load_features(side_px=48, csd=path)["csd_csls"]
    ours, style = (describe(frame) for frame in frames)
    assert float(np.linalg.norm(ours)) == pytest.approx(1, abs=1e-5)
    assert scorer(frames[0], frames[0], frames[1])["csd"] == pytest.approx(float(ours @ style), abs=1e-5)
