"""Files and names that are not what export takes: each message says what the thing is and what to do."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_checkpoint
from torch import Tensor

from std_rt.core.errors import ExportError
from std_rt.export.lora_fusion import check_lora
from std_rt.export.sources import resolve
from std_rt.export.sources.hub import HubFile, HubRef, Listing, parse_ref
from std_rt.export.sources.resolve import resolve_sources
from std_rt.export.sources.single_file import check_single_file, convert_single_file
from std_rt.models.weight_files import read_shapes

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
ONE = torch.zeros(1)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"edm_vpred.sigma_max": ONE},
            r"is a CosXL checkpoint \(an EDM schedule",
        ),
        ({"edm_vpred.sigma_min": ONE}, "is a CosXL checkpoint"),
        ({"edm_mean": ONE}, "is a Playground 2.5 checkpoint"),
        ({"scaled_fp8": ONE}, "has fp8 weights with scales; give the fp16 file"),
        ({FIRST.replace("weight", "scale_weight"): ONE}, "has fp8 weights with scales"),
        ({f"{FIRST}.absmax": ONE}, "has 4-bit weights"),
        ({"lora_te1_x.lora_down.weight": ONE}, r"is a LoRA \(give it with --lora\)"),
        ({"unet.mid_block.x.lora_A.weight": ONE}, r"is a LoRA \(give it with --lora\)"),
        ({"unet.mid_block.x_lora.down.weight": ONE}, r"is a LoRA \(give it with --lora\)"),
    ],
)
def test_a_checkpoint_of_another_kind_is_named(
    clip_source: Path, tmp_path: Path, extra: dict[str, Tensor], message: str
) -> None:
    path = write_checkpoint(tmp_path / "x.safetensors", clip_source)
    check_single_file(path)  # without it, there is nothing to refuse
    save_file(load_file(path) | extra, path)
    with pytest.raises(ExportError, match=message):
        check_single_file(path)


def test_a_prediction_that_the_metadata_names_is_not_taken_for_epsilon(
    clip_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "cache"))
    path = write_checkpoint(tmp_path / "x.safetensors", clip_source)
    save_file(load_file(path), path, {"modelspec.prediction_type": "flow"})
    with pytest.raises(ExportError, match="says that it predicts 'flow'"):
        convert_single_file(path, clip_source, lambda line: None)


@pytest.mark.parametrize("name", ["model.ckpt", "lora.bin", "old.pt"])
def test_a_pickle_is_named_and_what_to_type_converts_it(tmp_path: Path, name: str) -> None:
    state = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(2)}
    content = {"state_dict": state, "global_step": 7} if name == "model.ckpt" else state
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=name != "old.pt")
    with pytest.raises(ExportError, match=rf"{name} is a PyTorch pickle, which may run code") as caught:
        read_shapes(tmp_path / name, "LoRA")
    command = shlex.split(str(caught.value).partition("convert it: ")[2])
    assert command[:2] == ["python", "-c"]
    exec(command[2], {})
    found = load_file((tmp_path / name).with_suffix(".safetensors"))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "run: git lfs pull"),
        (b"GGUF" + bytes(64), "is a GGUF file"),
        (b"PK\x05\x06" + bytes(18), "is a zip archive"),
        (b"anything else at all", "is not a readable safetensors file"),
    ],
)
def test_what_is_no_weights_file_is_named_by_its_content(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ExportError, match=message):
        read_shapes(tmp_path / "x.safetensors")


def test_a_lora_of_an_older_text_encoder_alone_is_named(tmp_path: Path) -> None:
    stem = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    state = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}
    save_file(state, tmp_path / "te.safetensors")
    with pytest.raises(ExportError, match=r"only the text encoder of Stable Diffusion 1\.x or 2\.x"):
        check_lora({}, tmp_path / "te.safetensors", elsewhere=("text_encoder",))


@pytest.mark.parametrize(
    ("url", "ref"),
    [
        ("https://huggingface.co/me/xl", HubRef("me/xl")),
        ("https://huggingface.co/me/xl/tree/main", HubRef("me/xl")),
        ("https://huggingface.co/me/xl/blob/v2/a/x.safetensors", HubRef("me/xl", "v2", "a/x.safetensors")),
        (
            "https://hf.co/me/xl/resolve/main/x.safetensors?download=true",
            HubRef("me/xl", path="x.safetensors"),
        ),
        ("https://example.org/x.safetensors", None),
    ],
)
def test_a_page_of_the_hub_is_its_name(url: str, ref: HubRef | None) -> None:
    assert parse_ref(url) == ref


@pytest.mark.parametrize("role", ["base", "lora", "vae", "config"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://example.org/x.safetensors", r'web address.*: curl -LOJ "https://example\.org/x\.safe'),
        ("-", "is a pipe or a device"),
        ("PIPE", "is a pipe or a device"),
    ],
)
def test_addresses_and_pipes_are_named(
    clip_source: Path, tmp_path: Path, role: str, name: str, message: str
) -> None:
    if name == "PIPE":
        if sys.platform == "win32":
            pytest.skip("named pipes are POSIX")
        name = str(tmp_path / "pipe")
        os.mkfifo(name)
    options: dict[str, object] = {"ip_adapter": str(clip_source / "ip_adapter.safetensors")}
    base = str(clip_source)
    if role == "base":
        base = name
    elif role == "lora":
        options["loras"] = (name,)
    elif role == "config":
        base = str(write_checkpoint(tmp_path / "x.safetensors", clip_source))
        options["config"] = name
    else:
        options[role] = name
    with pytest.raises(ExportError, match=message):
        resolve_sources(base, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("flag", ["--lora", "BASE"])
def test_a_pickle_on_the_hub_is_refused_before_it_is_fetched(flag: str) -> None:
    files = {name: HubFile(name, 1) for name in ("x.bin", "x.safetensors")}
    listing = Listing(HubRef("me/xl"), "0" * 40, files)
    with pytest.raises(
        ExportError, match=re.escape("x.bin is not a .safetensors file; give me/xl:x.safetensors")
    ):
        resolve._check_suffix(listing, "x.bin", flag)
    resolve._check_suffix(listing, "x.bin", "--ip-adapter")
    resolve._check_suffix(listing, "x.safetensors", flag)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("me/xl@v2", "xl"),
        ("https://huggingface.co/me/xl/tree/main", "xl"),
        ("https://huggingface.co/me/xl/resolve/main/ink.safetensors?download=true", "ink"),
    ],
)
def test_a_bundle_is_named_after_its_source(source: str, name: str) -> None:
    from std_rt.cli.export import ExportRequest, _bundle_name

    assert _bundle_name(ExportRequest(source=source)) == name
