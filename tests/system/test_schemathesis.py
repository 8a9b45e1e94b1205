"""Schemathesis over every operation of the API: what openapi.json says of it holds, whatever is sent.

It goes through the examples, the edges of each schema, random requests of both kinds, valid and not, and
sequences of requests that use what others made. ``STD_RT_FUZZ=500`` sends more than 40 random ones each.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for _package in ("starlette", "uvicorn", "websockets"):
    pytest.importorskip(_package)

from support.media_samples import ClipSpec, make_clip  # noqa: E402
from support.serve_support import encoded, jpeg, own, running, streaming  # noqa: E402

from std_rt.core.bundle import Bundle  # noqa: E402
from std_rt.pipeline.stylizer import Stylizer  # noqa: E402
from std_rt.serve.app import Options, Server  # noqa: E402
from std_rt.serve.security import Rules  # noqa: E402

_PLACES = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
PROGRAM = shutil.which("schemathesis", path=os.pathsep.join(_PLACES))
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(PROGRAM is None, reason="needs schemathesis: pip install 'schemathesis>=4.32'"),
]

_TOKEN = "a-token-of-this-test"

# Not all that is wrong can be said in a schema: which bytes are a picture or a clip, that as many weights
# are needed as styles, and what an offer is. Nor that the server is busy.
_CONFIG = f"""
hooks = {str(Path(__file__).parents[1] / "support" / "schemathesis_hooks.py")!r}
headers = {{ Authorization = "Bearer {_TOKEN}" }}
[[operations]]
include-path = ["/v1/styles", "/v1/stylize", "/v1/jobs", "/v1/style-file", "/v1/webrtc/{{key}}"]
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 409, 503]
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", 503]
"""


def test_every_operation_is_as_openapi_describes_it(
    handmade: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert PROGRAM is not None
    art = {name: np.full((32, 32, 3), value, np.uint8) for name, value in (("dark", 30), ("light", 220))}
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    samples = tmp_path / "samples"
    samples.mkdir()
    (samples / "image_png").write_bytes(encoded(frame))
    (samples / "image_jpeg").write_bytes(jpeg(frame))
    make_clip(tmp_path / "clip.mp4", ClipSpec()).rename(samples / "video_mp4")
    config = tmp_path / "schemathesis.toml"
    config.write_text(_CONFIG, encoding="utf-8")
    with (
        Stylizer.load(handmade, backend="openvino", precision="fp32", steps=2) as stylizer,
        Server(stylizer, own(art), Options(Rules(_TOKEN))) as server,
        running(server) as site,
        streaming(site, f"/v1/stream?token={_TOKEN}") as session,
    ):
        known = {
            "styles": [style.id for style in server.library.all()],
            "key": (session.invitation or "0" * 32).rpartition("/")[2],  # null without the extra [webrtc]
        }
        (samples / "known.json").write_text(json.dumps(known), encoding="utf-8")
        command = [PROGRAM, "--config-file", str(config), "run", f"http://{site.host}/v1/openapi.json"]
        command += ["--phases", "examples,coverage,fuzzing,stateful", "--seed", "1", "--no-color"]
        command += ["--max-examples", os.environ.get("STD_RT_FUZZ", "40"), "--generation-database", "none"]
        environment = {**os.environ, "SAMPLES": str(samples)}
        with session.undisturbed():
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        described = site.get("/v1/openapi.json", Authorization=f"Bearer {_TOKEN}").json
        tested = re.search(r"Selected: (\d+)/(\d+)\s+Tested: (\d+)", done.stdout)
        assert tested is not None
        count = sum(map(len, described["paths"].values())) - 1  # it has openapi.json already
        assert set(tested.groups()) == {str(count)}
        # Nor has a clip failed, which no answer would show.
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
