"""`std-rt bulk` from and to S3: a local server stands in for it (``pip install 'moto[server]>=5.2.5'``)."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cli_support import picture
from support.media_samples import ClipSpec, make_clip

from std_rt.core.bundle import Bundle

pytest.importorskip("ray")
fs = pytest.importorskip("pyarrow.fs")
parquet = pytest.importorskip("pyarrow.parquet")
# That of this environment: an older one found elsewhere does not complete multipart uploads.
MOTO = shutil.which("moto_server", path=str(Path(sys.executable).parent))
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(MOTO is None, reason="needs a local S3 server: pip install 'moto[server]>=5.2.5'"),
]

COUNT = 12
_PATIENCE_S = 900  # processes start slowly where others work too


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Arrow's file system on a server of this test's own, which the environment names to every process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen([str(MOTO), "-p", str(port)], stdout=log, stderr=log)
    try:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not answers(port):
            assert server.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.5)
        found, _ = fs.FileSystem.from_uri("s3://studio/?allow_bucket_creation=true")
        found.create_dir("studio")
        yield found
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


def names_in(s3: Any, folder: str) -> set[str]:
    """Every file below ``folder``, hidden ones too."""
    found = s3.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    return {info.path[len(folder) + 1 :] for info in found if info.type == fs.FileType.File}


def read(s3: Any, path: str) -> bytes:
    with s3.open_input_stream(path) as stream:
        data: bytes = stream.readall()
    return data


def test_a_bucket_becomes_another_and_a_killed_command_goes_on(
    s3: Any, tmp_path: Path, handmade: Bundle
) -> None:
    here = tmp_path / "photos"
    for index in range(COUNT):
        picture(here / f"{index:02}.png", *((60, 40), (40, 60))[index % 2], seed=index)
    groups = {"x264-params": "keyint=10:min-keyint=10:scenecut=0", "preset": "ultrafast"}
    make_clip(here / "clip.mp4", ClipSpec(pts=range(0, 40 * 512, 512), audio="aac", options=groups))
    art = picture(tmp_path / "art.png", 32, 32, seed=1)
    fs.copy_files(str(here), "studio/photos", destination_filesystem=s3)
    fs.copy_files(str(art), "studio/art.png", destination_filesystem=s3)
    addresses = "s3://studio/photos", "s3://studio/art.png", "s3://studio/styled"

    killed = start(handmade, *addresses)
    names = {f"{index:02}.png" for index in range(COUNT)} | {"clip.mp4"}
    while killed.poll() is None and not names & names_in(s3, "studio/styled"):
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    left = {name: read(s3, f"studio/styled/{name}") for name in names & names_in(s3, "studio/styled")}
    finish(start(handmade, *addresses))
    finish(start(handmade, str(here), str(art), str(tmp_path / "styled")))

    there = names_in(s3, "studio/styled")
    assert {name for name in there if not name.startswith("manifest/")} == names | {"failed.jsonl"}
    found = {name: read(s3, f"studio/styled/{name}") for name in names}
    assert found == {name: (tmp_path / "styled" / name).read_bytes() for name in names}
    assert left == {name: found[name] for name in left}, "half a file had its final name"
    recorded = parquet.read_table("studio/styled/manifest", filesystem=s3)["output"].to_pylist()
    assert Counter(recorded) == Counter(names)
    assert "13 of 13 are finished already" in finish(start(handmade, *addresses))
