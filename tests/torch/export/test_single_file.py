"""A checkpoint in the original key layout becomes the pipeline it was made from."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import original_state, write_checkpoint
from torch import Tensor

from std_rt.core.errors import ExportError
from std_rt.export.sources import single_file
from std_rt.export.sources.single_file import check_single_file, convert_single_file
from std_rt.models.components import load_part

ROLES = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(clip_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "mini.safetensors", clip_source)


def quietly(line: str) -> None:
    """Say nothing."""


def test_every_tensor_is_the_pipelines_own_in_fp16(checkpoint: Path, clip_source: Path) -> None:
    found = convert_single_file(checkpoint, clip_source, quietly)
    for role in ROLES:
        wanted = load_part(role, clip_source / role).state_dict()
        given = load_part(role, found / role).state_dict()
        assert wanted.keys() == given.keys()
        for name, value in wanted.items():
            assert torch.equal(given[name], value.half().float()), f"{role} {name}"
    assert next(iter(load_file(next((found / "unet").glob("*.safetensors"))).values())).dtype == torch.float16
    for name in ("model_index.json", "tokenizer/vocab.json", "tokenizer_2/merges.txt"):
        assert (found / name).read_bytes() == (clip_source / name).read_bytes()


def test_a_weight_that_is_left_over_is_named(clip_source: Path, tmp_path: Path) -> None:
    """diffusers only logs it, and the picture would come out wrong."""
    extra = {"model.diffusion_model.output_blocks.99.0.in_layers.0.bias": torch.zeros(5)}
    path = write_checkpoint(tmp_path / "more.safetensors", clip_source, **extra)
    with pytest.raises(ExportError, match=r"more\.safetensors .*the configs in .* are not its own"):
        convert_single_file(path, clip_source, quietly)


def test_a_checkpoint_is_converted_once(checkpoint: Path, clip_source: Path, tmp_path: Path) -> None:
    first = convert_single_file(checkpoint, clip_source, quietly)
    said: list[str] = []
    renamed = Path(shutil.copy(checkpoint, tmp_path / "other-name.safetensors"))
    assert convert_single_file(renamed, clip_source, said.append) == first
    assert "other-name.safetensors was converted before" in said
    other = write_checkpoint(tmp_path / "o.safetensors", clip_source, extra_note=torch.zeros(1))
    assert convert_single_file(other, clip_source, quietly) != first


def test_nothing_half_written_has_the_final_name(checkpoint: Path, clip_source: Path, tmp_path: Path) -> None:
    """The last part lacks a weight: those before it were written, and are gone again."""
    state = load_file(checkpoint)
    del state["conditioner.embedders.1.model.ln_final.bias"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(
        ExportError, match=r"lacks 1 weights of the text_encoder_2, such as .*final_layer_norm"
    ):
        convert_single_file(tmp_path / "short.safetensors", clip_source, quietly)
    assert [path.suffix for path in (tmp_path / "cache" / "checkpoints").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("marks", "changes"),
    [
        (("v_pred",), {"prediction_type": "v_prediction"}),
        (("v_pred", "ztsnr"), {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ((), {"prediction_type": "epsilon"}),
    ],
)
def test_v_prediction_reaches_the_scheduler(
    marks: tuple[str, ...], changes: dict[str, object], clip_source: Path, tmp_path: Path
) -> None:
    extra = {mark: torch.zeros(0) for mark in marks}
    path = write_checkpoint(tmp_path / "v.safetensors", clip_source, **extra)
    found = convert_single_file(path, clip_source, quietly) / "scheduler" / "scheduler_config.json"
    config = json.loads(found.read_text(encoding="utf-8"))
    assert {key: config.get(key) for key in changes} == changes
    assert config.get("rescale_betas_zero_snr", False) == ("ztsnr" in marks)


def test_a_checkpoint_without_a_vae(clip_source: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "bare.safetensors", clip_source, vae=False)
    with pytest.raises(ExportError, match=r"bare\.safetensors has no VAE in it; add --vae fp16-fix"):
        convert_single_file(path, clip_source, quietly)
    found = convert_single_file(path, clip_source, quietly, own_vae=False)
    assert (found / "unet").is_dir()
    assert not (found / "vae").exists()


SD15 = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(1, 77)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (SD15, r"x\.safetensors is a Stable Diffusion 1\.x checkpoint; std-rt exports SDXL"),
        ({"cond_stage_model.model.ln_final.bias": torch.zeros(2)}, r"is a Stable Diffusion 2\.x checkpoint"),
        ({"conditioner.embedders.0.model.logit_scale": torch.zeros(1)}, "is an SDXL refiner"),
        ({"double_blocks.0.img_attn.proj.bias": torch.zeros(1)}, "is a FLUX checkpoint"),
        ({"lora_unet_x.lora_down.weight": torch.zeros(1)}, "is a LoRA .*--lora"),
        ({"down_blocks.0.resnets.0.conv1.bias": torch.zeros(1)}, "is one part of a diffusers pipeline"),
        ({"anything": torch.zeros(1)}, "is not an SDXL checkpoint in the original layout"),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
            r"takes 9 channels \(inpainting",
        ),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)},
            "has no text_encoder in it",
        ),
    ],
)
def test_what_is_no_sdxl_checkpoint_is_one_line(
    state: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ExportError, match=message) as caught:
        check_single_file(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_configs_of_another_architecture_are_named(
    checkpoint: Path, clip_source: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(clip_source, tmp_path / "other"))
    place = other / "unet" / "config.json"
    config = json.loads(place.read_text(encoding="utf-8"))
    place.write_text(json.dumps(config | {"block_out_channels": [16, 48]}), encoding="utf-8")
    with pytest.raises(
        ExportError, match=r"cannot be read as SDXL .*the configs in .*other are not its own; give --config"
    ):
        convert_single_file(checkpoint, other, quietly)


def test_a_value_beyond_fp16_is_refused(clip_source: Path, tmp_path: Path) -> None:
    state = original_state(clip_source)
    state["model.diffusion_model.out.2.bias"][0] = 1e6
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "big.safetensors")
    with pytest.raises(ExportError, match=r"big\.safetensors has values in conv_out\.bias that fp16 cannot"):
        convert_single_file(tmp_path / "big.safetensors", clip_source, quietly)


@pytest.mark.parametrize(
    ("keep", "message"), [(0.5, "is incomplete"), (0.0001, "is not a readable safetensors")]
)
def test_a_truncated_checkpoint_is_named(keep: float, message: str, checkpoint: Path, tmp_path: Path) -> None:
    data = checkpoint.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ExportError, match=rf"checkpoint .*cut\.safetensors cannot be read: it {message}"):
        check_single_file(tmp_path / "cut.safetensors")


def test_a_full_disk_is_said_before_the_work(
    checkpoint: Path, clip_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ExportError, match=r"GB and .* has 0\.0 GB free; make room, or set STD_RT_CACHE"):
        convert_single_file(checkpoint, clip_source, quietly)


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    checkpoint: Path, clip_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(single_file, "_convert", full)
    with pytest.raises(ExportError, match=r"mini\.safetensors cannot be converted into .*No space left"):
        convert_single_file(checkpoint, clip_source, quietly)
    assert [path.suffix for path in (tmp_path / "cache" / "checkpoints").iterdir()] == [".lock"]
