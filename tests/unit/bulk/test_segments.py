"""Clips cut into segments: the result is that of the whole clip, byte for byte, whatever the parts hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pytest
from support.cli_support import Cli, files_in
from support.media_samples import ClipSpec, make_clip

from std_rt.bulk import job, places, segments
from std_rt.bulk.cluster import Engines
from std_rt.bulk.job import Job, Report
from std_rt.bulk.manifest import Manifest
from std_rt.bulk.options import BulkOptions
from std_rt.bulk.plan import ITEM, items, wishes
from std_rt.bulk.segments import Segment
from std_rt.bulk.stages import PaintBlock, ReadBlock, WriteBlock
from std_rt.core.bundle import Bundle
from std_rt.media.video.base import DecodedFrame
from std_rt.media.video.clip import ContainerClip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")  # it warns of itself

COUNT, TICK = 60, 512  # 25 frames/s of 1/12,800 s
GROUPS = {  # of ten frames
    "closed": "keyint=10:min-keyint=10:scenecut=0:bframes=2",
    "open": "keyint=10:min-keyint=10:scenecut=0:bframes=3:open-gop=1",
}


def sample(folder: Path, name: str = "clip.mp4", groups: str = "closed", **changes: Any) -> Path:
    """A clip of 60 frames with sound and a key frame every ten."""
    folder.mkdir(exist_ok=True)
    options = {"x264-params": GROUPS[groups], "preset": "ultrafast", "crf": "10"}
    spec = ClipSpec(pts=range(0, COUNT * TICK, TICK), options=options, audio="aac")
    return make_clip(folder / name, replace(spec, **changes))


def contents(clip: Path) -> Any:
    """Its bytes; of Matroska, which has a random number in its header, every packet and its times."""
    if clip.suffix != ".mkv":
        return clip.read_bytes()
    with av.open(str(clip)) as container:
        packets = [(p.stream_index, p.pts, p.dts, p.duration, bytes(p)) for p in container.demux()]
        return dict(container.metadata), container.duration, packets


Run = Callable[..., Report]


@pytest.fixture
def run(
    handmade: Bundle, tmp_path: Path, art: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Report]:
    """Runs a job on the clips of ``in`` into ``out``, its stages one after the other in this process."""

    def make(*, stop: Callable[[], bool] = lambda: False, **options: Any) -> Report:
        chosen = BulkOptions(
            **{"bundle": str(handmade.path), "temporal": "off", "segment_seconds": 0.25} | options
        )
        out = str(tmp_path / "out")
        read = ReadBlock(job.fitter(Job(pa.table({}), chosen, handmade, out, Engines(1, 0, 1))))
        paint, write = PaintBlock(chosen, out), WriteBlock(out, chosen.upscale)

        def results(_: Job, plan: pa.Table, *, alone: bool) -> Iterator[list[Any]]:
            for block in job.blocks(plan, 4):
                yield write.run(paint(read.run(block))).to_pylist()

        monkeypatch.setattr(job, "_results", results)
        plan = items(wishes([str(tmp_path / "in")], [str(art)]), "", {})
        manifest = Manifest(out)
        todo = manifest.unfinished(plan, places.listed(out))
        manifest.begin()

        def take(rows: list[Any], report: Report) -> bool:
            manifest.add(rows)
            manifest.flush()
            return not stop()

        return job.run(Job(todo, chosen, handmade, out, Engines(1, 0, 1)), take)

    return make


@pytest.fixture
def whole(cli: Cli, handmade: Bundle, tmp_path: Path, art: Path) -> Callable[[Path], Any]:
    """`contents` of what `std-rt stylize` makes of a clip."""

    def make(clip: Path) -> Any:
        sink = tmp_path / "whole" / clip.name
        done = cli("stylize", clip, "-s", art, "-b", handmade.path, "--temporal", "off", "-o", sink)
        assert done.code == 0, done.err
        return contents(sink)

    return make


@pytest.fixture
def repainted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames each stream has that joins paint themselves."""
    found: list[int] = []
    look_up = segments._looked_up

    def counting(frames: Any, parts: Any, paint: Any) -> Any:
        def counted(some: Any) -> Any:
            found.append(0)
            for frame in paint(some):
                found[-1] += 1
                yield frame

        return look_up(frames, parts, counted)

    monkeypatch.setattr(segments, "_looked_up", counting)
    return found


def late(index: int) -> int:
    """Times at varying distances, the first not at 0."""
    return TICK * (50 + index) + (index % 3) * 100


@pytest.mark.parametrize(
    ("name", "groups", "changes"),
    [
        ("clip.mp4", "closed", {}),
        ("clip.mp4", "open", {}),
        ("clip.mov", "closed", {"pts": [late(index) for index in range(COUNT)]}),
        ("clip.mkv", "open", {"pts": [late(index) for index in range(COUNT)]}),
    ],
)
def test_joined_segments_are_the_whole_clip(
    run: Run,
    whole: Callable[[Path], Any],
    repainted: list[int],
    tmp_path: Path,
    name: str,
    groups: str,
    changes: dict[str, Any],
) -> None:
    clip = sample(tmp_path / "in", name, groups, **changes)
    report = run()
    assert (report.parts, report.done, report.failed, report.frames) == (6, 1, 0, COUNT)
    assert contents(tmp_path / "out" / name) == whole(clip)
    assert repainted == [], "segments were in vain"
    assert files_in(tmp_path / "out") == {name, "manifest", "failed.jsonl"}


def test_a_clip_that_begins_in_the_middle_of_a_group(
    run: Run, whole: Callable[[Path], Any], repainted: list[int], tmp_path: Path
) -> None:
    """Its first frames lack their key frame, as in a recording that was cut without decoding it."""
    original = sample(tmp_path / "original", "clip.mkv", "open")
    (tmp_path / "in").mkdir()
    clip = tmp_path / "in" / "clip.mkv"
    with av.open(str(original)) as source, av.open(str(clip), "w") as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for packet in list(source.demux(source.streams.video[0]))[4:-1]:
            packet.stream = stream
            sink.mux(packet)
    report = run()
    assert report.parts == 5
    assert report.frames < COUNT - 4, "the first frames were decoded after all"
    assert contents(tmp_path / "out" / "clip.mkv") == whole(clip)
    assert repainted == []


def test_frames_that_parts_lack_repeat_or_falsify_are_painted_at_the_join(
    run: Run,
    whole: Callable[[Path], Any],
    repainted: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clip = sample(tmp_path / "in")
    read_between = ContainerClip.read_between

    def faulty(self: ContainerClip, begin: int | None, end: int | None) -> Iterator[DecodedFrame]:
        found = list(read_between(self, begin, end))
        damaged = replace(found[6], rgb=255 - found[6].rgb)
        yield from (*found[:2], *found[3:5], *found[4:6], damaged, *found[7:])

    monkeypatch.setattr(ContainerClip, "read_between", faulty)
    assert run().parts == 6
    assert contents(tmp_path / "out" / "clip.mp4") == whole(clip)
    assert repainted == [1] * 6 * 2  # the third and the seventh of each


def test_a_later_run_goes_on_with_the_parts_that_are_there(
    run: Run, whole: Callable[[Path], Any], repainted: list[int], tmp_path: Path
) -> None:
    clip = sample(tmp_path / "in")
    parts = tmp_path / "out" / segments.FOLDER
    first = run(stop=lambda: len([*parts.rglob("*.arrow")]) == 4)
    assert (first.parts, first.done) == (4, 0)
    damaged = min(parts.rglob("*.arrow"), key=lambda part: part.name)  # it has no beginning
    damaged.write_bytes(damaged.read_bytes()[:-3000])
    again = run()
    assert (again.parts, again.done) == (2, 1)
    assert contents(tmp_path / "out" / "clip.mp4") == whole(clip)
    (frames,) = repainted  # of one stream, whose frames share calls of the engine
    assert 1 < frames < 10
    assert not parts.exists()
    assert run().done == 0


def test_damaged_pictures_in_a_part_are_painted_at_the_join(
    run: Run, whole: Callable[[Path], Any], repainted: list[int], tmp_path: Path
) -> None:
    clip = sample(tmp_path / "in")
    parts = tmp_path / "out" / segments.FOLDER
    assert run(stop=lambda: len([*parts.rglob("*.arrow")]) == 6).done == 0
    part = min(parts.rglob("*.arrow"), key=lambda part: part.name)
    with pa.OSFile(str(part)) as file, pa.ipc.open_stream(file) as stream:
        rows = stream.read_all().to_pylist()
    for index, png in enumerate((rows[0]["png"][:-60], b"", b"no picture")):
        rows[2 * index]["png"] = png
    with pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, segments._PART) as stream:
        for row in rows:
            stream.write_batch(pa.RecordBatch.from_pylist([row], segments._PART))
    report = run()
    assert (report.parts, report.done, report.failed) == (0, 1, 0)
    assert contents(tmp_path / "out" / "clip.mp4") == whole(clip)
    assert repainted == [1, 1, 1]


def test_parts_of_another_cut_or_job_are_removed(run: Run, tmp_path: Path) -> None:
    sample(tmp_path / "in")
    assert run(stop=lambda: True).done == 0
    (before,) = (tmp_path / "out" / segments.FOLDER).rglob("*.arrow")
    report = run(segment_seconds=0.6, stop=lambda: True)
    assert (report.parts, report.all_parts) == (1, 3)
    assert not before.exists()


@pytest.mark.parametrize(
    "options", [{"temporal": "noise"}, {"segment_seconds": 0}, {"segment_seconds": None}]
)
def test_a_clip_stays_whole(run: Run, tmp_path: Path, options: dict[str, Any]) -> None:
    """As a temporal filter needs its frames in order, or one engine would gain nothing."""
    sample(tmp_path / "in")
    report = run(**options)
    assert (report.done, report.all_parts) == (1, 0)


def test_files_without_an_index_stay_whole(tmp_path: Path, art: Path) -> None:
    for name in ("a.mp4", "b.ts", "c.avi", "d.mkv"):
        sample(tmp_path / "in", name, **{} if name != "c.avi" else {"audio": None})
    (tmp_path / "in" / "e.mp4").write_bytes(b"no clip")
    plan = items(wishes([str(tmp_path / "in")], [str(art)]), "", {})
    cut = segments.segments_of(plan, 0.25)
    names = dict(zip(plan["key"].to_pylist(), plan["output"].to_pylist(), strict=True))
    assert {names[key]: len(some) for key, some in cut.items()} == {"a.mp4": 6, "d.mkv": 6}


def test_turns_bound_the_parts_and_join_each_clip_once() -> None:
    names = [f"{index}.mp4" for index in range(5)] + ["a.png"]
    plan = pa.table([names, names, names, [1.0] * 6, names], schema=ITEM)
    cut = {name: [Segment(name, None, 5), Segment(name, 5, None)] for name in names[:5]}
    missing = [segment for some in cut.values() for segment in some]
    turns = [turn["output"].to_pylist() for turn in segments.rounds(plan, missing, cut, 4)]
    assert [sum(map(segments.is_part, turn)) for turn in turns] == [4, 4, 2, 0]
    joins = [[name for name in turn if not segments.is_part(name)] for turn in turns]
    assert joins == [["a.png"], names[0:2], names[2:4], names[4:5]]
    assert [Segment.of(segment.output) for segment in missing] == missing
