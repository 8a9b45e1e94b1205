"""What docs/serve.md prints works as it stands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.serve_support import Site, decoded, encoded, jpeg

DOC = Path(__file__).parents[3] / "docs" / "serve.md"


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)


LINES = [
    line
    for path in (DOC, DOC.parents[1] / "README.md")
    for line in path.read_text(encoding="utf-8").splitlines()
]
TO_A_FILE = [line.strip() for line in LINES if line.startswith("    curl") and " -o " in line]


def text(site: Site) -> str:
    return DOC.read_text(encoding="utf-8").replace("127.0.0.1:8765", site.host)


def test_the_client_in_python_runs(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", text(site), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "frames").mkdir()
    for index in range(3):
        (tmp_path / "frames" / f"{index}.jpg").write_bytes(jpeg(noise(index)))
    exec(compile(code, str(DOC), "exec"), {})
    painted = [decoded((tmp_path / "frames" / f"{index}_styled.jpg").read_bytes()) for index in range(3)]
    assert len({frame.tobytes() for frame in painted}) == 3


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_lines_of_curl_run(site: Site, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(jpeg(noise(1)))
    (tmp_path / "art.png").write_bytes(encoded(noise(2)))
    line = next(each for each in text(site).splitlines() if "/v1/stylize -o" in each)
    command = shlex.split(line, comments=True)
    subprocess.run([*command, "--silent"], cwd=tmp_path, check=True, timeout=60)
    assert decoded((tmp_path / "styled.png").read_bytes()).shape == (64, 64, 3)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", TO_A_FILE)
def test_a_refusal_is_not_written_to_the_file(site: Site, tmp_path: Path, line: str) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"no picture")
    (tmp_path / "art.png").write_bytes(encoded(noise(2)))
    command = shlex.split(line.replace("127.0.0.1:8765", site.host), comments=True)
    done = subprocess.run([*command, "--silent"], cwd=tmp_path, check=False, timeout=60)
    assert done.returncode == 22  # of an answer that is a refusal
    assert not (tmp_path / command[command.index("-o") + 1]).exists()
