"""`std-rt bulk` from and to object stores, S3 and Google's: local servers stand in for them."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.cli_support import picture
from support.media_samples import ClipSpec, make_clip

from std_rt.core.bundle import Bundle

pytest.importorskip("ray")
fs = pytest.importorskip("pyarrow.fs")
parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.long

COUNT = 12
_PATIENCE_S = 900  # processes start slowly where others work too


@dataclass(frozen=True)
class Service:
    """A local server in place of an object store, and what leads Arrow to it (URL stands for its address)."""

    package: str
    command: str
    """Its program and arguments, before the number of its port."""
    environment: dict[str, str]
    root: str
    """The address of a bucket."""
    query: str
    """What lets Arrow make that bucket."""


S3 = Service(
    package="moto[server]>=5.2.5",
    command="moto_server -p",
    environment={
        "AWS_ENDPOINT_URL": "URL",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    },
    root="s3://studio",
    query="?allow_bucket_creation=true",
)
GOOGLE = Service(
    package="gcp-storage-emulator>=2026.7.19",
    command="gcp-storage-emulator start --in-memory --host 127.0.0.1 --port",
    # With a project Google's client may make buckets, which the command must not do.
    environment={"CLOUD_STORAGE_EMULATOR_ENDPOINT": "URL", "GOOGLE_CLOUD_PROJECT": "test"},
    root="gs://anonymous@studio",
    query="",
)


@dataclass(frozen=True)
class Store:
    """Arrow's file system on a server of this test's own, and the address of its bucket ``studio``."""

    files: Any
    root: str


@pytest.fixture(params=[S3, GOOGLE], ids=["s3", "gs"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    """A store that the environment names to every process."""
    service: Service = request.param
    program, *arguments = service.command.split()
    # That of this environment: an older moto found elsewhere does not complete multipart uploads.
    found = shutil.which(program, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"needs a local server: pip install '{service.package}'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in service.environment.items():
        monkeypatch.setenv(name, value.replace("URL", f"http://127.0.0.1:{port}"))
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen([found, *arguments, str(port)], stdout=log, stderr=log)
    try:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not answers(port):
            assert server.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.5)
        files, _ = fs.FileSystem.from_uri(f"{service.root}/{service.query}")
        files.create_dir("studio")
        yield Store(files, service.root)
    finally:
        server.kill()
        server.wait()


def answers(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def start(bundle: Bundle, source: str, art: str, out: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "std_rt", "bulk", source, "-s", art, "-o", out, "-b", str(bundle.path)]
    cut = ["--size", "64", "--temporal", "off", "--segment-seconds", "0.25"]
    return subprocess.Popen([*command, *cut], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(job: subprocess.Popen[str]) -> str:
    said = job.communicate(timeout=_PATIENCE_S)[0]
    assert job.returncode == 0, said
    return said


def names_in(store: Store, folder: str) -> set[str]:
    """Every file below ``folder``, hidden ones too."""
    found = store.files.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    return {info.path[len(folder) + 1 :] for info in found if info.type == fs.FileType.File}


def read(store: Store, path: str) -> bytes:
    with store.files.open_input_stream(path) as stream:
        data: bytes = stream.readall()
    return data


def test_a_bucket_becomes_another_and_a_killed_command_goes_on(
    store: Store, tmp_path: Path, handmade: Bundle
) -> None:
    here = tmp_path / "photos"
    for index in range(COUNT):
        picture(here / f"{index:02}.png", *((60, 40), (40, 60))[index % 2], seed=index)
    groups = {"x264-params": "keyint=10:min-keyint=10:scenecut=0", "preset": "ultrafast"}
    make_clip(here / "clip.mp4", ClipSpec(pts=range(0, 40 * 512, 512), audio="aac", options=groups))
    art = picture(tmp_path / "art.png", 32, 32, seed=1)
    fs.copy_files(str(here), "studio/photos", destination_filesystem=store.files)
    fs.copy_files(str(art), "studio/art.png", destination_filesystem=store.files)
    addresses = f"{store.root}/photos", f"{store.root}/art.png", f"{store.root}/styled"

    killed = start(handmade, *addresses)
    names = {f"{index:02}.png" for index in range(COUNT)} | {"clip.mp4"}
    while killed.poll() is None and not names & names_in(store, "studio/styled"):
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    left = {name: read(store, f"studio/styled/{name}") for name in names & names_in(store, "studio/styled")}
    finish(start(handmade, *addresses))
    finish(start(handmade, str(here), str(art), str(tmp_path / "styled")))

    there = names_in(store, "studio/styled")
    assert {name for name in there if not name.startswith("manifest/")} == names | {"failed.jsonl"}
    found = {name: read(store, f"studio/styled/{name}") for name in names}
    assert found == {name: (tmp_path / "styled" / name).read_bytes() for name in names}
    assert left == {name: found[name] for name in left}, "half a file had its final name"
    recorded = parquet.read_table("studio/styled/manifest", filesystem=store.files)["output"].to_pylist()
    assert Counter(recorded) == Counter(names)
    assert "13 of 13 are finished already" in finish(start(handmade, *addresses))


def test_a_bucket_that_does_not_exist_is_named_and_not_made(
    store: Store, tmp_path: Path, handmade: Bundle
) -> None:
    here, art = picture(tmp_path / "a.png", 32, 32), picture(tmp_path / "art.png", 32, 32, seed=1)
    nowhere = f"{store.root}-misspelt"
    for source, out, named in (
        (f"{nowhere}/photos", str(tmp_path / "out"), f"error: {nowhere}/photos is no file, and no folder"),
        (f"{nowhere}/a.png", f"{nowhere}/styled", f"error: {nowhere}/a.png is no file, and no folder"),
        (str(here), f"{nowhere}/styled", f"error: {nowhere}/styled/manifest/"),
    ):
        job = start(handmade, source, str(art), out)
        said = job.communicate(timeout=_PATIENCE_S)[0]
        assert (job.returncode, said.count("\n")) == (2, 1), said
        assert said.startswith(named)
    assert store.files.get_file_info("studio-misspelt").type == fs.FileType.NotFound
