"""Fetching from a hub that is a server in this process: what is chosen, resumed, cached and refused."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from huggingface_hub import constants, snapshot_download
from support.fake_hub import COMMIT, FakeHub, Repo, serve

from std_rt.core.errors import ExportError
from std_rt.export.sources import hub as hub_module
from std_rt.export.sources.hub import (
    Fetch,
    HubRef,
    Listing,
    choose_configs,
    choose_model,
    choose_weights,
    fetch_all,
    list_files,
    parse_ref,
)

ROLES = ("unet", "vae", "text_encoder", "text_encoder_2")
BIG = bytes(range(256)) * 400


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one model ``me/xl``, and a cache of its own."""
    with serve({"me/xl": Repo(_many_formats())}) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        yield served


def _many_formats() -> dict[str, bytes]:
    """A repository as stabilityai's: several formats and precisions of everything."""
    files = {"model_index.json": b"{}", "README.md": b"---\nlicense: openrail++\n---\n", "x.png": b"picture"}
    files |= {
        "scheduler/scheduler_config.json": b"{}",
        "tokenizer/vocab.json": b"{}",
        "tokenizer/merges.txt": b"",
    }
    files["sd_xl_base_1.0.safetensors"] = b"everything in one file"
    for role in ROLES:
        stem = "model" if role.startswith("text") else "diffusion_pytorch_model"
        files[f"{role}/config.json"] = f'{{"role": "{role}"}}'.encode()
        for name in (
            f"{stem}.safetensors",
            f"{stem}.fp16.safetensors",
            f"{stem}.bin",
            "model.onnx",
            "flax_model.msgpack",
        ):
            files[f"{role}/{name}"] = f"{role} {name}".encode() + BIG
    return files


def ignore(line: str) -> None:
    """Say nothing."""


def choose_pipeline(listing: Listing, roles: tuple[str, ...]) -> tuple[str, ...]:
    """As a base is chosen: configs, and the weights of ``roles``."""
    names = [*choose_configs(listing), *(name for role in roles for name in choose_model(listing, role))]
    return tuple(dict.fromkeys(names))


def everything(hub: FakeHub, names: tuple[str, ...] | None = None, say: object = ignore) -> Path:
    """Fetch the pipeline (or ``names`` of it)."""
    listing = list_files(HubRef("me/xl"), ignore)
    fetch_all([Fetch(listing, names or choose_pipeline(listing, ROLES))], say, lambda summary: True)
    return listing.folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubRef("owner/name")),
        ("owner/name@v1.0", HubRef("owner/name", "v1.0")),
        ("owner/name@refs/pr/3:a.safetensors", HubRef("owner/name", "refs/pr/3", "a.safetensors")),
        ("owner/na.me-x:deep/file.safetensors", HubRef("owner/na.me-x", path="deep/file.safetensors")),
        ("owner/name/deep/file.safetensors", HubRef("owner/name", path="deep/file.safetensors")),
        ("owner/name/file.bin", HubRef("owner/name", path="file.bin")),
        ("name", None),
        ("./owner/name", None),
        ("/owner/name", None),
        ("a/b/c", None),
        ("loras/ink.safetensors", None),
        ("C:/models/xl", None),
    ],
)
def test_names_on_the_hub(text: str, expected: HubRef | None) -> None:
    assert parse_ref(text) == expected
    if expected is not None:
        assert parse_ref(str(expected)) == expected


def test_a_name_does_not_leave_its_repository() -> None:
    with pytest.raises(ExportError, match="outside its repository"):
        parse_ref("owner/name:../../etc/passwd.safetensors")


def test_one_format_and_precision_is_chosen(hub: FakeHub) -> None:
    folder = everything(hub)
    kept = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert kept == sorted(
        ["README.md", "model_index.json", "scheduler/scheduler_config.json"]
        + ["tokenizer/merges.txt", "tokenizer/vocab.json"]
        + [f"{role}/config.json" for role in ROLES]
        + [f"{role}/diffusion_pytorch_model.fp16.safetensors" for role in ROLES[:2]]
        + [f"{role}/model.fp16.safetensors" for role in ROLES[2:]]
    )
    for name in kept:
        assert (folder / name).read_bytes() == hub.repos["me/xl"].files[name]


def test_what_is_left_out_is_not_fetched(hub: FakeHub) -> None:
    listing = list_files(HubRef("me/xl"), ignore)
    assert not [
        name for name in choose_pipeline(listing, ("unet",)) if name.endswith("vae/config.safetensors")
    ]
    weights = [name for name in choose_pipeline(listing, ("unet",)) if name.endswith(".safetensors")]
    assert weights == ["unet/diffusion_pytorch_model.fp16.safetensors"]
    assert not [name for name in choose_configs(listing) if name.endswith((".safetensors", ".png", ".bin"))]


def test_what_is_cached_is_taken_before_what_is_not(hub: FakeHub) -> None:
    single = "unet/diffusion_pytorch_model.safetensors"
    everything(hub, ("unet/config.json", single))
    listing = list_files(HubRef("me/xl"), ignore)
    assert choose_weights(listing, "unet") == (single,)
    assert choose_weights(listing, "vae") == ("vae/diffusion_pytorch_model.fp16.safetensors",)


def test_shards_are_taken_only_where_none_is_missing(hub: FakeHub) -> None:
    stem = "t/diffusion_pytorch_model"
    index = f"{stem}.safetensors.index.json"
    files = {"t/config.json": b"{}", index: b"{}", f"{stem}-00001-of-00002.safetensors": b"1"}
    hub.repos["me/parts"] = Repo(files)
    with pytest.raises(
        ExportError, match=r"me/parts has no \.safetensors weights in t; .* not read \.bin or \.ckpt"
    ):
        choose_weights(list_files(HubRef("me/parts"), ignore), "t")
    hub.repos["me/parts"] = Repo(files | {f"{stem}-00002-of-00002.safetensors": b"2"})
    names = choose_model(list_files(HubRef("me/parts"), ignore), "t")
    assert names == (
        "t/config.json",
        index,
        f"{stem}-00001-of-00002.safetensors",
        f"{stem}-00002-of-00002.safetensors",
    )


def test_size_and_cache_are_said_before_anything_is_fetched(hub: FakeHub) -> None:
    everything(hub, ("unet/config.json", "vae/config.json"))
    hub.requests.clear()
    said: list[str] = []

    def look(line: str) -> None:
        said.append(line)
        if line.startswith("to fetch"):
            assert hub.downloads() == []

    everything(hub, ("unet/config.json", "unet/diffusion_pytorch_model.safetensors"), look)
    size = len(hub.repos["me/xl"].files["unet/diffusion_pytorch_model.safetensors"])
    assert (
        said[0] == f"me/xl ({COMMIT[:12]}): 2 files, {(size + 16) / 1e3:.2f} kB, {size / 1e3:.2f} kB to fetch"
    )
    assert said[1] == f"to fetch: 1 file, {size / 1e3:.2f} kB, into {constants.HF_HUB_CACHE}"
    assert hub.downloads() == ["unet/diffusion_pytorch_model.safetensors"]


def test_no_is_an_answer(hub: FakeHub) -> None:
    listing = list_files(HubRef("me/xl"), ignore)
    with pytest.raises(ExportError, match="nothing was fetched"):
        fetch_all([Fetch(listing, ("x.png",))], ignore, lambda summary: False)
    assert hub.downloads() == []


def test_the_second_time_nothing_is_fetched(hub: FakeHub) -> None:
    first = everything(hub)
    hub.requests.clear()
    said: list[str] = []
    assert everything(hub, say=said.append) == first
    assert hub.downloads() == []
    assert said[0].endswith("cached")
    assert len(said) == 1


def test_the_hubs_own_client_finds_the_files(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is theirs: another program needs to fetch nothing of it again."""
    folder = everything(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Path(snapshot_download("me/xl", local_files_only=True)) == folder


def test_a_broken_transfer_goes_on_where_it_stopped(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    name = "unet/diffusion_pytorch_model.safetensors"
    data = hub.repos["me/xl"].files[name]
    hub.cuts[name] = 99
    with pytest.raises(
        ExportError, match=rf"the transfer of {name} broke off after .* run the same command again"
    ) as caught:
        everything(hub, (name,))
    assert "\n" not in str(caught.value)
    had = sum(path.stat().st_size for path in Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
    assert 0 < had < len(data)
    hub.cuts[name] = 0
    hub.requests.clear()
    said: list[str] = []
    folder = everything(hub, (name,), said.append)
    assert (folder / name).read_bytes() == data
    assert hub.asked(name) == [f"bytes={had}-"]
    assert any(line.startswith(f"{name}: resuming after") for line in said)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_one_cut_is_mended_without_a_word(hub: FakeHub) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    hub.cuts[name] = 1
    assert (everything(hub, (name,)) / name).read_bytes() == hub.repos["me/xl"].files[name]


def test_an_interrupted_transfer_is_kept(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"

    def interrupted(url: str, stream: object, **options: object) -> None:
        stream.write(b"some")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(hub_module, "http_get", interrupted)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        everything(hub, (name,), said.append)
    assert said[-1].startswith("interrupted; 4 bytes of unet/")
    assert next(Path(constants.HF_HUB_CACHE).rglob("*.incomplete")).read_bytes() == b"some"


def test_a_damaged_file_gets_no_name(hub: FakeHub) -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    hub.corrupt = name
    with pytest.raises(ExportError, match=rf"{name} is damaged .*sha256"):
        everything(hub, (name,))
    assert not [path for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if path.is_file()]
    hub.corrupt = ""
    assert (everything(hub, (name,)) / name).is_file()


def test_systems_without_links_hold_one_copy(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "are_symlinks_supported", lambda folder: False)
    name = "vae/diffusion_pytorch_model.safetensors"
    folder = everything(hub, (name,))
    assert not (folder / name).is_symlink()
    assert (folder / name).read_bytes() == hub.repos["me/xl"].files[name]
    assert not list(folder.parent.parent.glob("blobs/*"))


def test_offline_the_cache_will_do(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = everything(hub)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert everything(hub) == folder
    assert hub.requests == []
    with pytest.raises(
        ExportError, match=r"me/other is not in the cache, and HF_HUB_OFFLINE .*: hf download me/other"
    ):
        list_files(HubRef("me/other"), ignore)
    listing = list_files(HubRef("me/xl"), ignore)
    with pytest.raises(
        ExportError, match=r"has no file image_encoder/config\.json in the cache, and the hub cannot be"
    ):
        choose_pipeline(listing, ("image_encoder",))


def test_with_the_network_down_the_cache_is_used_and_said(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = everything(hub)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said: list[str] = []
    assert list_files(HubRef("me/xl"), said.append).folder == folder
    assert said[0].startswith("cannot reach http://127.0.0.1:9 (")
    assert said[0].endswith(f"using me/xl as cached ({COMMIT[:12]})")
    with pytest.raises(
        ExportError, match=r"cannot reach http://127\.0\.0\.1:9 .*type: hf download me/new --revision v2"
    ):
        list_files(HubRef("me/new", "v2"), ignore)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (
            HubRef("me/none"),
            r"there is no me/none on the hub, and no such file or folder here; check the name",
        ),
        (HubRef("me/xl", "v9"), r"me/xl has no revision 'v9'; its revisions are at http.*/me/xl/commits"),
    ],
)
def test_what_the_hub_does_not_have(hub: FakeHub, ref: HubRef, message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        list_files(ref, ignore)
    assert "\n" not in str(caught.value)


def test_a_gated_model_says_where_to_ask(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["me/gated"] = Repo({"model_index.json": b"{}"}, gated=True)
    listing = list_files(HubRef("me/gated"), ignore)
    wanted = [Fetch(listing, ("model_index.json",))]
    with pytest.raises(
        ExportError, match=r"me/gated is gated: accept .* at http.*/me/gated, then type: hf auth login"
    ):
        fetch_all(wanted, ignore, lambda summary: True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    fetch_all(wanted, ignore, lambda summary: True)
    assert (listing.folder / "model_index.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "refuses access|there is no"),
        (403, r"refuses access \(403\); type: hf auth login"),
        (503, "answers 503; try again"),
    ],
)
def test_a_hub_that_refuses(hub: FakeHub, status: int, message: str) -> None:
    hub.status = status
    with pytest.raises(ExportError, match=message) as caught:
        list_files(HubRef("me/xl"), ignore)
    assert "\n" not in str(caught.value)


def test_too_small_a_disk_is_said_before_anything_is_fetched(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)
    )
    with pytest.raises(ExportError, match=r"download is .* kB and .* has 5\.00 kB free; .*set HF_HOME"):
        everything(hub)
    assert hub.downloads() == []


@pytest.mark.parametrize("then_offline", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_environment_means_what_it_means_elsewhere(
    hub: FakeHub, tmp_path: Path, then_offline: bool
) -> None:
    """HF_ENDPOINT and HF_HOME are read when the hub's client is imported: by a new interpreter."""
    script = (
        "from std_rt.export.sources.hub import *\n"
        "listing = list_files(HubRef('me/xl'), print)\n"
        "fetch_all([Fetch(listing, ('x.png',))], print, lambda summary: True)\n"
    )
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    env.pop("HF_HUB_CACHE", None)
    run = [sys.executable, "-c", script]
    subprocess.run(run, env=env, check=True, capture_output=True)
    found = tmp_path / "home" / "hub" / "models--me--xl" / "snapshots" / COMMIT / "x.png"
    assert found.read_bytes() == b"picture"
    if then_offline:
        hub.requests.clear()
        subprocess.run(run, env=env | {"HF_HUB_OFFLINE": "1"}, check=True, capture_output=True)
        assert hub.requests == []


@pytest.mark.parametrize(
    ("ref", "wanted"),
    [
        (HubRef("me/xl"), {"repo_id": "me/xl"}),
        (HubRef("me/xl", "v2"), {"repo_id": "me/xl", "revision": "v2"}),
        (HubRef("me/xl", path="a/x.safetensors"), {"repo_id": "me/xl", "filename": "a/x.safetensors"}),
        (
            HubRef("me/xl", path="models/encoder"),
            {"repo_id": "me/xl", "allow_patterns": ["models/encoder/*"]},
        ),
    ],
)
def test_the_hubs_own_tool_takes_what_is_to_be_typed(
    ref: HubRef, wanted: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run by ``hf`` itself, up to the transfer."""
    from huggingface_hub.cli import download
    from huggingface_hub.cli.hf import app

    asked: dict[str, object] = {}

    def fetch(**options: object) -> str:
        asked.update(options)
        return "."

    monkeypatch.setattr(download, "snapshot_download", fetch)
    monkeypatch.setattr(download, "hf_hub_download", fetch)
    line = re.search(r"type: (hf download .*), or give", hub_module._by_hand(ref))
    assert line is not None
    app.main(args=shlex.split(line[1])[1:], prog_name="hf", standalone_mode=False)
    assert {key: asked[key] for key in wanted} == wanted
