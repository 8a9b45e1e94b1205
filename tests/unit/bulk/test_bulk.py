"""`std-rt bulk` on Ray: what is made, skipped and failed; and the stage for pipelines of one's own."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from support.cli_support import Cli, Result, files_in, picture

from std_rt import Stylizer
from std_rt.bulk import cluster
from std_rt.bulk.stages import ReadBlock
from std_rt.core.bundle import Bundle
from std_rt.media import read_picture

pytestmark = [
    pytest.mark.usefixtures("ray_here"),
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),  # it warns of itself
]


@pytest.fixture
def bulk(cli: Cli, handmade: Bundle, tmp_path: Path, art: Path) -> Cli:
    """``std-rt bulk ARGUMENTS --style art.png --bundle HANDMADE -o out``."""

    def run(*arguments: object) -> Result:
        return cli("bulk", *arguments, "-s", art, "-b", handmade.path, "-o", tmp_path / "out")

    return run


def test_a_job_is_done_reported_and_continued(bulk: Cli, tmp_path: Path, photos: Path) -> None:
    (photos / "bad.png").write_bytes(b"no picture")
    first = bulk(photos)
    assert first.code == 1, first.err
    assert "5 made, 1 failed" in first.out
    out = tmp_path / "out"
    assert {"a.png", "b.jpg", "c.png", "more", "manifest", "failed.jsonl"} <= files_in(out)
    (failure,) = map(json.loads, (out / "failed.jsonl").read_text(encoding="utf-8").splitlines())
    assert failure["input"] == str(photos / "bad.png")
    assert "cannot be read as a picture" in failure["reason"]
    assert set(parquet.read_table(out / "manifest")["output"].to_pylist()) == {
        *("a.png", "b.jpg", "c.png", "more/a.png", "more/d.png")
    }
    before = (out / "a.png").stat().st_mtime_ns
    (out / "c.png").write_bytes(b"cut off")
    picture(photos / "bad.png", 40, 40)
    again = bulk(photos)
    assert again.code == 0, again.err
    assert "4 of 6 are finished already" in again.err
    assert "2 made, 0 failed" in again.out
    assert (out / "a.png").stat().st_mtime_ns == before
    assert not (out / "failed.jsonl").read_text(encoding="utf-8")
    assert read_picture(out / "c.png").frame.shape == (40, 60, 3)
    assert "2 made" not in bulk(photos).out  # nothing is left: no engine is opened


def test_a_job_ends_after_too_many_failures(bulk: Cli, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index in range(40):
        (tmp_path / "in" / f"{index}.png").write_bytes(b"no picture")
    done = bulk(tmp_path / "in", "--max-failures", 3)
    assert done.code == 1
    assert "stopped after" in done.err
    assert "items are left" in done.err


def test_a_stage_in_a_pipeline_gives_what_the_stylizer_gives(
    handmade: Bundle, photos: Path, art: Path
) -> None:
    import ray

    from std_rt.bulk import BulkOptions, stylize

    options = BulkOptions(bundle=str(handmade.path), keep_colours=True)
    pictures = ray.data.read_images(str(photos), mode="RGB", include_paths=True)
    found = {row["path"]: row for row in stylize(pictures, str(art), 0.7, options=options).take_all()}
    assert len(found) == 5
    with Stylizer.load(handmade) as stylizer:
        stylizer.set_style(art, 0.7, keep_colours=True)
        for row in found.values():
            expected = stylizer.stylize(np.ascontiguousarray(row["image"]))
            assert np.abs(row["styled"].astype(int) - expected).max() <= 1


def test_the_example_of_the_docs_runs(
    handmade: Bundle,
    photos: Path,
    art: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "bulk.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = code.replace("size=256", f"size=64, bundle={str(handmade.path)!r}")
    code = code.replace('"art.png"', repr(str(art))).replace('"photos"', repr(str(photos)))
    exec(compile(code, "bulk.md", "exec"), {"__name__": "__main__"})
    assert "structure" in capfd.readouterr().out


class _CrashingRead(ReadBlock):
    """A decoder that takes its process with it at one file."""

    def run(self, block: pa.Table) -> pa.Table:
        if any(name.endswith("c.png") for name in block["input"].to_pylist()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(block)


def test_a_file_that_kills_its_process_fails_alone(
    bulk: Cli, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr("std_rt.bulk.job.ReadBlock", _CrashingRead)
    done = bulk(photos)
    assert "4 made, 1 failed" in done.out, done.err
    (failure,) = map(json.loads, (tmp_path / "out" / "failed.jsonl").read_text(encoding="utf-8").splitlines())
    assert failure["input"] == str(photos / "c.png")
    assert "its worker ended without a result" in failure["reason"]


def test_an_engine_that_cannot_be_opened_is_said_in_one_line(bulk: Cli, photos: Path) -> None:
    done = bulk(photos, "--prompt", "a cat")  # the prompt of this bundle is baked in
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: ")
    assert "prompt" in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("nodes", "backend", "cores", "wanted"),
    [
        ([{"CPU": 2}], "auto", 0, (1, 0, 2)),
        ([{"CPU": 8}, {"CPU": 5}], "auto", 2, (6, 0, 2)),
        ([{"CPU": 32}, {"CPU": 16}], "openvino", 0, (6, 0, 8)),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 1}], "auto", 4, (5, 1, 0)),
        ([{"CPU": 16, "GPU": 4}], "openvino", 4, (4, 0, 4)),
    ],
)
def test_there_is_an_engine_for_each_gpu_or_for_every_few_cores(
    nodes: list[dict[str, int]],
    backend: str,
    cores: int,
    wanted: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dead = {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [dead, *alive])
    engines = cluster.engines_for(backend, cores)
    assert (engines.count, engines.gpus, engines.cores) == wanted
