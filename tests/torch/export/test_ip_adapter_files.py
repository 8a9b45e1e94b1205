"""IP-Adapter files: both formats and kinds, read lazily; no code in them runs; what does not fit is named."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.pipelines import write_plain_ip_adapter
from torch import Tensor

from std_rt.core.errors import ExportError
from std_rt.models.ip_adapter import (
    check_encoder,
    make_projection,
    pair_branches,
    projection_reads,
    read_ip_adapter,
)


@pytest.fixture(scope="module")
def unet(clip_source: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(clip_source / "unet")


@pytest.fixture(scope="module")
def state(clip_source: Path) -> dict[str, Tensor]:
    """IP-Adapter Plus, by full key names."""
    return load_file(clip_source / "ip_adapter.safetensors")


def nested(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As the published ``.bin`` files have it."""
    found: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in state.items():
        prefix, _, rest = key.partition(".")
        found[prefix][rest] = value
    return found


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_bin_is_read_as_the_safetensors(
    clip_source: Path, state: dict[str, Tensor], tmp_path: Path, legacy: bool, flat: bool
) -> None:
    path = tmp_path / "a.bin"
    torch.save(state if flat else nested(state), path, _use_new_zipfile_serialization=not legacy)
    wanted = read_ip_adapter(clip_source / "ip_adapter.safetensors")
    for found, expected in zip(read_ip_adapter(path), wanted, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


class Payload:
    """Unpickled by the usual reader, it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.place,))


@pytest.mark.parametrize("kind", ["pickle", "legacy", "zip"])
def test_code_in_a_bin_is_refused_and_does_not_run(
    state: dict[str, Tensor], tmp_path: Path, kind: str
) -> None:
    path, place = tmp_path / "evil.bin", tmp_path / "it-ran"
    content = {**nested(state), "more": Payload(place)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(
        ExportError, match=r"evil\.bin hold more than tensors, perhaps code, .*get the \.safe"
    ) as caught:
        read_ip_adapter(path)
    assert "\n" not in str(caught.value)
    assert not place.exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())  # noqa: S301
    assert place.exists()  # the payload was a live one


def _cut_zip(path: Path, state: dict[str, Tensor]) -> None:
    torch.save(nested(state), path)
    path.write_bytes(path.read_bytes()[:-500])


def _other_zip(path: Path, state: dict[str, Tensor]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


@pytest.mark.parametrize(
    "damage",
    [
        _cut_zip,
        _other_zip,
        lambda path, _: path.write_bytes(b""),
        lambda path, _: path.write_bytes(b"PK\3\4"),
    ],
)
def test_a_damaged_bin_is_named(damage: Any, state: dict[str, Tensor], tmp_path: Path) -> None:
    damage(tmp_path / "cut.bin", state)
    with pytest.raises(ExportError, match=r"IP-Adapter weights .*cut\.bin cannot be read") as caught:
        read_ip_adapter(tmp_path / "cut.bin")
    assert "\n" not in str(caught.value)


def test_a_damaged_safetensors_is_named(clip_source: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(clip_source / "ip_adapter.safetensors", tmp_path / "cut.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ExportError, match=r"IP-Adapter .*cut\.safetensors cannot be read: it is incomplete"):
        read_ip_adapter(path)
    with pytest.raises(ExportError, match=r"must be \.safetensors or \.bin, got .*x\.ckpt"):
        read_ip_adapter(tmp_path / "x.ckpt")


def test_both_kinds_say_what_they_read(clip_source: Path, unet: Any, tmp_path: Path) -> None:
    plus = clip_source / "ip_adapter.safetensors"
    plain = write_plain_ip_adapter(tmp_path / "plain.safetensors", unet)
    assert projection_reads(plus) == ("hidden", 24)
    assert projection_reads(plain) == ("pooled", 12)
    assert make_projection(unet, read_ip_adapter(plus)[0], plus)[1] is True
    assert make_projection(unet, read_ip_adapter(plain)[0], plain)[1] is False


@pytest.mark.parametrize(
    ("plus", "change", "message"),
    [
        (
            True,
            {"hidden_size": 1664},
            r"reads hidden vectors of 24, and .* gives 1664 \(ViT-bigG\); give --image-encoder",
        ),
        (False, {"projection_dim": 1024}, r"reads pooled vectors of 12, .* gives 1024 \(ViT-H\)"),
    ],
)
def test_an_encoder_of_another_width_is_named(
    plus: bool, change: dict[str, int], message: str, clip_source: Path, unet: Any, tmp_path: Path
) -> None:
    path = clip_source / "ip_adapter.safetensors"
    if not plus:
        path = write_plain_ip_adapter(tmp_path / "plain.safetensors", unet)
    check_encoder(path, clip_source / "image_encoder")
    config = json.loads((clip_source / "image_encoder" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(ExportError, match=message):
        check_encoder(path, tmp_path / "other")


def test_branches_are_read_when_they_are_taken(unet: Any, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "half.safetensors")
    _, weights = read_ip_adapter(tmp_path / "half.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}  # as it lies in the file
    branches = pair_branches(unet, weights)
    layer = next(iter(branches))
    key, value = branches[layer]
    assert key.dtype == value.dtype == torch.float32
    assert torch.equal(key, state["ip_adapter.1.to_k_ip.weight"].half().float())
    assert len(branches) == len(weights) // 2


def _wide(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    return {
        key: torch.zeros(value.shape[0], width) if key.endswith("_ip.weight") else value
        for key, value in state.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: _wide(s, 768),
            r"was made for Stable Diffusion 1\.x \(its tokens are 768 wide.*--ip-adapter plus",
        ),
        (
            lambda s: s | {"ip_adapter.1.to_q_lora.down.weight": torch.zeros(2, 2)},
            "is a FaceID or full-face adapter",
        ),
        (lambda s: s | {"image_proj.proj.0.weight": torch.zeros(2, 2)}, "is a FaceID or full-face adapter"),
        (
            lambda s: s | {"image_proj.perceiver_resampler.x": torch.zeros(2)},
            "is a FaceID or full-face adapter",
        ),
        (
            lambda s: s | {"conv.weight": torch.zeros(2)},
            r"is not an IP-Adapter file: it has a key 'conv\.weight'",
        ),
    ],
)
def test_other_adapters_are_one_line(
    change: Any, message: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(change(state), tmp_path / "x.safetensors")
    with pytest.raises(ExportError, match=message) as caught:
        read_ip_adapter(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_an_adapter_for_another_unet_is_refused(unet: Any, state: dict[str, Tensor]) -> None:
    _, weights = {}, {key.removeprefix("ip_adapter."): v for key, v in state.items() if key.startswith("ip_")}
    with pytest.raises(ExportError, match="it was made for another model"):
        pair_branches(unet, dict(list(weights.items())[2:]))
    first = "1.to_k_ip.weight"
    with pytest.raises(ExportError, match=r"\[8, 40\] for down_blocks.*, which is 32 wide; wrong model"):
        pair_branches(unet, weights | {first: weights[first][:8]})
