"""What an export takes, estimated from headers, and the refusal where a machine has less."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors")

from safetensors.numpy import save_file

from std_rt.core.errors import ExportError
from std_rt.export import resources as estimate
from std_rt.export.resources import Need, check_room, estimate_export

GB = 2**30
WEIGHTS = {"unet": 3000, "vae": 500, "image_encoder": 200, "text_encoder": 40, "text_encoder_2": 60}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder whose parts have as many numbers as `WEIGHTS` says, in files of several kinds."""
    for part, count in WEIGHTS.items():
        (tmp_path / part).mkdir()
        stem = "model" if part.endswith("encoder") or part[-1] == "2" else "diffusion_pytorch_model"
        values = {"a": np.zeros((count // 10, 5), np.float16), "b": np.zeros(count // 2, np.float16)}
        save_file(values, tmp_path / part / f"{stem}.fp16.safetensors")
    return tmp_path


def in_gb(numbers: int, width: float) -> float:
    return numbers * width / GB


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_the_disk_holds_every_part_once(source: Path, precision: str, width: int) -> None:
    need = estimate_export(source, precision)
    assert need.disk_gb == pytest.approx(1.05 * in_gb(sum(WEIGHTS.values()), width))
    assert need.memory_gb == pytest.approx(1 + in_gb(WEIGHTS["unet"], 4), rel=1e-9)


def test_text_encoders_that_are_not_stored_take_no_disk(source: Path) -> None:
    less = estimate_export(source, "fp16").disk_gb - estimate_export(source, "fp16", text=False).disk_gb
    assert less == pytest.approx(1.05 * in_gb(WEIGHTS["text_encoder"] + WEIGHTS["text_encoder_2"], 2))


def test_another_vae_takes_the_place_of_the_sources(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file({"a": np.zeros(100, np.float32)}, other / "diffusion_pytorch_model.safetensors")
    less = estimate_export(source).disk_gb - estimate_export(source, parts={"vae": other}).disk_gb
    assert less == pytest.approx(1.05 * in_gb(WEIGHTS["vae"] - 100, 2))


def test_a_video_unet_is_made_beside_what_it_is_made_of(source: Path, tmp_path: Path) -> None:
    motion = tmp_path / "motion"
    motion.mkdir()
    save_file({"a": np.zeros(700, np.float16)}, motion / "diffusion_pytorch_model.safetensors")
    before, after = (estimate_export(source, parts=parts) for parts in ({}, {"motion_adapter": motion}))
    assert after.disk_gb - before.disk_gb == pytest.approx(1.05 * in_gb(700, 2))
    assert after.memory_gb == pytest.approx(1 + in_gb(2 * (WEIGHTS["unet"] + 700), 4), rel=1e-9)


def test_an_adapter_in_the_folder_joins_the_unet(source: Path) -> None:
    before = estimate_export(source)
    save_file({"a": np.zeros(1000, np.float32)}, source / "ip_adapter.safetensors")
    after = estimate_export(source)
    assert after.memory_gb - before.memory_gb == pytest.approx(in_gb(1000, 4), rel=1e-6)
    assert after.disk_gb - before.disk_gb == pytest.approx(1.05 * in_gb(1000, 2))


def test_shards_count_together_and_a_second_variant_does_not(source: Path) -> None:
    for path in (source / "unet").iterdir():
        path.unlink()
    for i in (1, 2):
        save_file(
            {f"w{i}": np.zeros(700)}, source / f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        )
    save_file({"w": np.zeros(1400, np.float16)}, source / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert estimate_export(source).memory_gb == pytest.approx(1 + in_gb(1400, 4), rel=1e-9)


def test_sdxl_takes_about_fifteen_gigabytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parameters of the published parts; the file headers are not needed to know the sum."""
    sizes = {"unet": 2_567_463_684, "vae": 83_653_863, "image_encoder": 632_076_800}
    sizes |= {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840}
    monkeypatch.setattr(estimate, "_parameters", lambda folder: sizes[folder.name])
    need = estimate_export(tmp_path, "fp16")
    assert need.memory_gb == pytest.approx(5 + 4 * sizes["unet"] / GB)
    assert 14 < need.memory_gb < 15  # 14.5 were measured
    assert need.disk_gb == pytest.approx(8.0, abs=0.1)
    assert math.isclose(estimate_export(tmp_path, "fp32").disk_gb, 2 * need.disk_gb)


def test_a_damaged_file_is_one_line(source: Path) -> None:
    (source / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"\x10")
    with pytest.raises(ExportError, match=r"vae.*cannot be read") as caught:
        estimate_export(source)
    assert "\n" not in str(caught.value)


def test_room_that_is_there_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(estimate, "available_memory_gb", lambda: 12.0)
    monkeypatch.setattr(estimate, "free_disk_gb", lambda path: 8.0)
    check_room(Need(11.9, 7.9), tmp_path / "bundle")
    monkeypatch.setattr(estimate, "available_memory_gb", lambda: None)  # a system that does not say
    check_room(Need(99, 7.9), tmp_path / "bundle")


@pytest.mark.parametrize(
    ("need", "words"),
    [
        (Need(12.5, 1), r"about 12\.5 GB of memory and 12\.0 GB are free here; close other programs"),
        (Need(1, 8.5), r"about 8\.5 GB on disk and 8\.0 GB are free at .*--output on another disk"),
    ],
)
def test_room_that_is_missing_is_said_with_what_to_do(
    need: Need, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(estimate, "available_memory_gb", lambda: 12.0)
    monkeypatch.setattr(estimate, "free_disk_gb", lambda path: 8.0)
    with pytest.raises(ExportError, match=words) as caught:
        check_room(need, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
