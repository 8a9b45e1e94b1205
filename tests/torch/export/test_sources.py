"""What a user names becomes local paths: folders, files, hub names and short names, and nothing by halves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import save_file
from support.checkpoints import write_checkpoint
from support.fake_hub import COMMIT, FakeHub, Repo, folder_files, serve
from support.pipelines import write_lora, write_tiny_vae

from std_rt.core.errors import ExportError
from std_rt.export.export_options import ExportOptions
from std_rt.export.source_pipeline import read_source
from std_rt.export.sources import resolve as sources_module
from std_rt.export.sources.resolve import BASE, IP_ADAPTERS, VAES, Sources, resolve_sources
from std_rt.models.weight_files import check_weights

STD = "SecondComming/Single-Trajectory-Distillation"
ADAPTERS = "h94/IP-Adapter"


@pytest.fixture
def hub(clip_source: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The published repositories in miniature, and a cache of its own."""
    base = folder_files(clip_source)
    encoder = {key: base.pop(key) for key in list(base) if key.startswith("image_encoder/")}
    adapter = base.pop("ip_adapter.safetensors")
    index = json.loads(base["model_index.json"])
    base["model_index.json"] = json.dumps(index | {"image_encoder": [None, None]}).encode()
    loras = {f"std_sdxl_i2i_eta{eta}.safetensors": lora.read_bytes() for eta in (0.65, 0.75, 0.85, 0.95)}
    faces = {f"models/{key}": value for key, value in encoder.items()}
    adapters = {name.partition(":")[2]: adapter for name, _ in IP_ADAPTERS.values()}
    tiny = folder_files(write_tiny_vae(tmp_path / "tiny"))
    repos = {
        BASE: Repo(base),
        STD: Repo(loras, commit="b" * 40),
        ADAPTERS: Repo(faces | adapters | {"models/ip-adapter_sd15.bin": b"not wanted"}),
        VAES["tiny"]: Repo(tiny | {"README.md": b"---\nlicense: mit\n---\n"}, commit="c" * 40),
        VAES["fp16-fix"]: Repo(tiny),
    }
    with serve(repos) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "cache"))
        yield served


def options(found: Sources, output: Path) -> ExportOptions:
    """As the command line makes them."""
    return ExportOptions(
        found.folder,
        output,
        found.lora,
        found.ip_adapter,
        found.image_encoder,
        found.vae,
        found.eta,
        profile=found.profile,
    )


def test_without_a_base_it_is_the_published_recipe(hub: FakeHub, tmp_path: Path) -> None:
    said: list[str] = []
    found = resolve_sources(None, say=said.append)
    assert found.folder.parts[-3:] == (f"models--{BASE.replace('/', '--')}", "snapshots", COMMIT)
    assert [(path.name, scale) for path, scale in found.lora] == [("std_sdxl_i2i_eta0.75.safetensors", 1.0)]
    assert found.profile == "std-0.75"
    assert found.ip_adapter is not None
    assert found.ip_adapter.name == "ip-adapter-plus_sdxl_vit-h.safetensors"
    assert found.image_encoder is not None
    assert found.image_encoder.parts[-2:] == ("models", "image_encoder")
    assert found.vae is not None
    assert (found.vae / "config.json").is_file()
    assert len([line for line in said if line.startswith("to fetch")]) == 1
    options(found, tmp_path / "out")  # everything is there
    assert not (found.folder / "vae" / "diffusion_pytorch_model.safetensors").exists()  # --vae replaces it
    assert not [name for name in hub.downloads() if name.endswith(".bin")]


def test_the_recipe_of_another_eta(hub: FakeHub) -> None:
    found = resolve_sources(None, eta=0.95)
    assert (found.lora[0][0].name, found.profile) == ("std_sdxl_i2i_eta0.95.safetensors", "std-0.95")
    found = resolve_sources(None, profile="std-0.65")
    assert (found.lora[0][0].name, found.profile) == ("std_sdxl_i2i_eta0.65.safetensors", "std-0.65")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"eta": 0.7},
            r"--eta 0\.7: the published STD LoRAs are for 0\.65, 0\.75, 0\.85, 0\.95; give one of",
        ),
        (
            {"eta": 0.65, "profile": "std-0.75"},
            r"--eta 0\.65 conflicts with --profile std-0\.75, which is for 0\.75",
        ),
        ({"profile": "sdt"}, "unknown --profile 'sdt'"),
    ],
)
def test_a_recipe_that_is_not_published(hub: FakeHub, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        resolve_sources(None, **flags)
    assert hub.requests == []


def test_flags_replace_their_part_of_the_recipe(hub: FakeHub, lora: Path) -> None:
    found = resolve_sources(None, loras=[f"{lora}:0.5"], vae="tiny", ip_adapter="base")
    assert (found.lora, found.profile) == (((lora, 0.5),), "")
    assert found.vae is not None
    assert "taesdxl" in found.vae.as_posix()
    assert found.ip_adapter is not None
    assert found.ip_adapter.name == "ip-adapter_sdxl_vit-h.safetensors"
    assert STD not in {path.removeprefix("/api/models/") for _, path, _ in hub.requests}


def test_a_folder_of_ones_own_needs_no_hub(hub: FakeHub, clip_source: Path, lora: Path) -> None:
    found = resolve_sources(str(clip_source), loras=[str(lora), f"{lora}:-0.3"])
    assert found.folder == clip_source
    assert found.lora == ((lora, 1.0), (lora, -0.3))
    assert (found.ip_adapter, found.image_encoder, found.vae) == (None, None, None)
    assert hub.requests == []


def test_where_things_came_from_is_noted(hub: FakeHub, lora: Path) -> None:
    found = resolve_sources(None, vae="tiny", loras=[str(lora), f"{STD}:std_sdxl_i2i_eta0.85.safetensors"])
    assert found.origins[found.folder].entry() == {"id": BASE, "revision": COMMIT, "licence": "openrail++"}
    assert found.origins[found.lora[0][0]].entry() == {"id": "ink.safetensors"}
    second = found.origins[found.lora[1][0]].entry()
    assert second == {"id": f"{STD}:std_sdxl_i2i_eta0.85.safetensors", "revision": "b" * 40}
    assert found.vae is not None
    assert found.origins[found.vae].entry() == {"id": VAES["tiny"], "revision": "c" * 40, "licence": "mit"}


def test_the_same_again_needs_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_sources(None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert resolve_sources(None) == first
    assert hub.requests == []


def test_a_lora_may_be_named_in_two_ways(hub: FakeHub, clip_source: Path) -> None:
    name = "std_sdxl_i2i_eta0.75.safetensors"
    found = resolve_sources(str(clip_source), loras=[f"{STD}:{name}:0.5", f"{STD}/{name}"])
    assert found.lora[0][0] == found.lora[1][0]
    assert [scale for _, scale in found.lora] == [0.5, 1.0]
    assert [name for name in hub.downloads() if name.endswith(".safetensors")] == [name]


def test_a_repository_with_one_file_is_that_file(hub: FakeHub, clip_source: Path, lora: Path) -> None:
    hub.repos["me/ink"] = Repo({"pytorch_lora_weights.safetensors": lora.read_bytes(), "x.png": b""})
    found = resolve_sources(str(clip_source), loras=["me/ink:0.5"])
    assert found.lora[0][0].name == "pytorch_lora_weights.safetensors"
    with pytest.raises(ExportError, match=rf"--lora {STD} has 4 files; give one as {STD}:std_sdxl"):
        resolve_sources(str(clip_source), loras=[STD])


def test_the_encoder_is_the_one_that_the_adapter_reads(
    hub: FakeHub, clip_source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file of one's own, and no encoder beside it: the published one of that width."""
    bare = Path(shutil.copytree(clip_source, tmp_path / "bare"))
    shutil.rmtree(bare / "image_encoder")
    adapter = Path(shutil.move(bare / "ip_adapter.safetensors", tmp_path / "mine.safetensors"))
    monkeypatch.setitem(sources_module._ENCODERS, ("hidden", 24), sources_module._VIT_H)
    said: list[str] = []
    found = resolve_sources(str(bare), ip_adapter=str(adapter), say=said.append)
    assert found.image_encoder is not None
    assert found.image_encoder.parts[-2:] == ("models", "image_encoder")
    assert "mine.safetensors was trained with the image encoder h94/IP-Adapter:models/image_encoder" in said


def test_an_encoder_of_another_width_is_named(hub: FakeHub, clip_source: Path, tmp_path: Path) -> None:
    other = tmp_path / "bigg"
    shutil.copytree(clip_source / "image_encoder", other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 1664}), encoding="utf-8")
    adapter = str(clip_source / "ip_adapter.safetensors")
    found = resolve_sources(str(clip_source), ip_adapter=adapter, image_encoder=str(other))
    with pytest.raises(
        ExportError,
        match=r"ip_adapter.* reads hidden vectors of 24, .*bigg gives 1664 \(ViT-bigG\); give --image-enc",
    ):
        read_source(options(found, tmp_path / "out"))


def test_a_checkpoint_takes_the_configs_of_the_base(hub: FakeHub, clip_source: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "mine.safetensors", clip_source)
    found = resolve_sources(str(path), ip_adapter="plus")
    assert found.folder.parent.name == "checkpoints"
    fetched = [name for name in hub.downloads() if name.startswith(("unet/", "vae/", "text_encoder"))]
    assert sorted(fetched) == [
        f"{role}/config.json" for role in ("text_encoder", "text_encoder_2", "unet", "vae")
    ]
    assert found.origins[found.folder].entry() == {"id": "mine.safetensors"}
    hub.requests.clear()
    again = resolve_sources(str(path), ip_adapter="plus", config=str(clip_source))
    assert again.folder != found.folder  # keyed by the configs too
    hub.repos["me/tune"] = Repo({"tune.safetensors": path.read_bytes()})
    assert resolve_sources("me/tune:tune.safetensors", ip_adapter="plus").folder == found.folder


@pytest.mark.parametrize(
    ("base", "flags", "message"),
    [
        ("nowhere", {}, r"nowhere is neither a folder or file here nor a hub id \(owner/name\); give"),
        (
            "me/none",
            {"ip_adapter": "plus"},
            "there is no me/none on the hub, and no such file or folder here",
        ),
        (BASE, {}, rf"{BASE} has no IP-Adapter in it.*; add --ip-adapter plus or base or base-bigg"),
        (BASE, {"ip_adapter": "plus", "config": "x"}, "--config is for single-file checkpoints"),
        (
            ADAPTERS,
            {"ip_adapter": "plus"},
            r"h94/IP-Adapter has no model_index\.json, so it is not a diffusers pip",
        ),
        (
            "me/sd15",
            {"ip_adapter": "plus"},
            "me/sd15 is a StableDiffusionPipeline; std-rt exports StableDiffusionXL",
        ),
        (BASE, {"ip_adapter": "plsu"}, "--ip-adapter plsu does not exist here, and is not a hub name"),
        (
            BASE,
            {"ip_adapter": "plus", "vae": "fix"},
            "--vae fix is neither a folder here nor a hub id .* or fp16-fix or tiny",
        ),
        (
            BASE,
            {"ip_adapter": "plus", "loras": ["x.safetensors"]},
            r"--lora x\.safetensors does not exist here",
        ),
        (
            BASE,
            {"ip_adapter": "plus", "loras": [f"{STD}:y.safetensors"]},
            r"has no file y\.safetensors; it has std_",
        ),
        (BASE, {"ip_adapter": "plus", "loras": ["x.safetensors:1e999"]}, "the scale must be a finite number"),
        (BASE, {"ip_adapter": "plus", "image_encoder": ADAPTERS}, r"h94/IP-Adapter has no file config\.json"),
    ],
)
def test_a_wrong_name_is_one_line_before_anything_large(
    hub: FakeHub, base: str, flags: dict[str, Any], message: str
) -> None:
    hub.repos["me/sd15"] = Repo({"model_index.json": b'{"_class_name": "StableDiffusionPipeline"}'})
    with pytest.raises(ExportError, match=message) as caught:
        resolve_sources(base, **flags)
    assert "\n" not in str(caught.value)
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]


@pytest.fixture
def shards(clip_source: Path, tmp_path: Path) -> Path:
    """A UNet in several files with an index."""
    unet = UNet2DConditionModel.from_pretrained(clip_source / "unet")
    unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
    check_weights(tmp_path / "unet")
    return tmp_path / "unet"


INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/evil.safetensors", "C:\\evil.safetensors", "a/b.safetensors", ".."]
)
def test_an_index_does_not_leave_its_folder(shards: Path, name: str) -> None:
    (shards.parent / "evil.safetensors").write_bytes(b"")
    index = json.loads((shards / INDEX).read_text(encoding="utf-8"))
    index["weight_map"]["conv_in.bias"] = name
    (shards / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(
        ExportError, match=r"index\.json names the weight file .* outside its folder; do not use"
    ):
        check_weights(shards)


def test_a_shard_that_is_missing_cut_or_swapped_is_named(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(ExportError, match=rf"{first.name} lacks .*, which {INDEX} places there"):
        check_weights(shards)
    first.write_bytes(data[:-1])
    with pytest.raises(ExportError, match=rf"{first.name} cannot be read: it is incomplete"):
        check_weights(shards)
    first.unlink()
    with pytest.raises(ExportError, match=rf"{first.name} is missing, and {INDEX} names it"):
        check_weights(shards)
    (shards / INDEX).write_text("[]", encoding="utf-8")
    with pytest.raises(ExportError, match=rf"{INDEX} is not a readable index"):
        check_weights(shards)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\xff\xff\xff\xff\0\0\0\0{}", b"\2\0\0\0\0\0\0\0[]"])
def test_a_wrong_header_is_named_before_anything_is_loaded(
    clip_source: Path, tmp_path: Path, data: bytes
) -> None:
    source = Path(shutil.copytree(clip_source, tmp_path / "xl"))
    (source / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(data)
    with pytest.raises(
        ExportError, match=r"vae/diffusion_pytorch_model\.safetensors cannot be read: it is no"
    ) as caught:
        read_source(options(resolve_sources(str(source)), tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_a_lora_for_another_checkpoint_is_not_mistaken_for_a_base(tmp_path: Path, clip_source: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(clip_source / "unet")
    lora = write_lora(tmp_path / "ink.safetensors", unet)
    with pytest.raises(ExportError, match=r"ink\.safetensors is a LoRA \(give it with --lora\)"):
        resolve_sources(str(lora), ip_adapter="plus")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ExportError, match="is not an SDXL checkpoint in the original layout"):
        resolve_sources(str(tmp_path / "a.safetensors"), ip_adapter="plus")
