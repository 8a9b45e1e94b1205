"""Two hundred clips drawn by chance: every frame at its time, every sound packet as it was, no crash.

Forty of them, which have every value of the draw among them, always run; the others are marked ``long``.
``STD_RT_CLIPS=2000`` draws that many more, with other seeds (from ``STD_RT_CLIPS_SEED`` on, 1 if not given).
What these clips have found is below them, by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from support.clip_cases import (
    CODECS,
    CONTAINERS,
    DAMAGES,
    EDITS,
    MP4S,
    RATES,
    SINKS,
    SOUNDS,
    STYLES,
    SUITE,
    TURNS,
    Case,
    draw,
)
from support.media_samples import Array, ClipSpec, Sound, frame_times, make_clip, sound_packets, transcode

from std_rt.core.errors import MediaError
from std_rt.media import VideoReport

HOMELESS = {"wma"}  # sound that no container written here holds
MORE = int(os.environ.get("STD_RT_CLIPS", "0"))
SEED = int(os.environ.get("STD_RT_CLIPS_SEED", "1"))
SUITE_CASES = [draw(0, index) for index in range(SUITE)]
CASES = SUITE_CASES + [draw(SEED + index // 1000, index % 1000) for index in range(MORE)]
# By number: every container twice at least, and every value that `test_the_draw_covers_every_value` names.
SPREAD = {
    *(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 24, 25, 32, 36, 37, 42, 43, 46),
    *(51, 57, 58, 60, 71, 76, 88, 99, 127, 141, 144, 147),
}
CUT_SHORT = "the input is damaged or truncated; everything decodable was processed"
MS = Fraction(1, 1000)


@dataclass(frozen=True)
class Heard:
    """What FFmpeg finds in a file: seconds of each frame, (seconds, sha256) of each sound packet of a stream.

    ticks: seconds per unit of the video's and of each sound's times.
    """

    frames: list[Fraction]
    sounds: list[list[tuple[Fraction, str]]]
    video_tick: Fraction
    sound_ticks: list[Fraction]


def look(path: Path) -> Heard:
    """Decode and demux ``path`` as far as it goes, with nothing of the package."""
    with av.open(str(path), metadata_errors="replace") as container:
        video = container.streams.video[0]
        sounds: dict[int, list[tuple[Fraction, str]]] = {s.index: [] for s in container.streams.audio}
        times: list[int] = []
        step = max(1, round(1 / ((video.average_rate or video.guessed_rate or 25) * video.time_base)))
        for packet in _packets(container):
            if packet.stream.index in sounds and packet.size:
                digest = hashlib.sha256(_payload(packet)).hexdigest()
                heard = sounds[packet.stream.index]
                heard.append((_sound_time(packet, heard), digest))
            elif packet.stream.index == video.index:
                times += _times(packet, by_dts=container.format.name == "avi")
        rising = _rising(times, step)
        ticks = [stream.time_base for stream in container.streams.audio]
        return Heard([t * video.time_base for t in rising], list(sounds.values()), video.time_base, ticks)


def _packets(container: Any) -> Any:
    try:
        yield from container.demux(container.streams.video[0], *container.streams.audio)
    except av.FFmpegError:
        return


def _sound_time(packet: Any, heard: list[tuple[Fraction, str]]) -> Fraction:
    """Seconds; where the file does not say, as long after the last packet as that was after its own last."""
    if packet.pts is not None:
        return packet.pts * packet.time_base
    return 2 * heard[-1][0] - heard[-2][0] if len(heard) > 1 else Fraction(0)


def _payload(packet: Any) -> bytes:
    """The packet without the ADTS header that AAC has in MPEG-TS only."""
    data = bytes(packet)
    is_adts = packet.stream.codec_context.name == "aac" and data[0] == 0xFF and data[1] & 0xF6 == 0xF0
    return data[7 if data[1] & 1 else 9 :] if is_adts else data


def _times(packet: Any, by_dts: bool) -> list[Any]:
    """As stored: AVI has no pts, and FFmpeg makes up some that do not rise."""
    try:
        pairs = [(frame.dts, frame.pts) if by_dts else (frame.pts, frame.dts) for frame in packet.decode()]
        return [first if first is not None else second for first, second in pairs]
    except av.FFmpegError:
        return []


def _rising(times: list[Any], step: int) -> list[int]:
    """Times that a container can hold: where one is missing or does not rise, the next that fits."""
    last: int | None = None
    rising = []
    for at in times:
        if last is None:
            last = at or 0
        else:
            last = last + step if at is None else max(at, last + 1)
        rising.append(last)
    return rising


def convert(case: Case, source: Path, folder: Path) -> VideoReport | None:
    """Transcode as drawn, copying sound; if it does not fit, into what the error says; None if nowhere."""
    sink = folder / f"out{case.sink}"
    try:
        return transcode(source, sink, case.stylize, sound="copy")
    except MediaError as error:
        other = re.search(r"sound cannot be copied into \.\w+; use -o (out\.\w+) or", str(error))
        if other is None and "sound cannot be copied at all; use --sound convert" not in str(error):
            raise
    return transcode(source, folder / other[1], case.stylize, sound="copy") if other else None


def check(case: Case, folder: Path) -> None:
    """A clip of the draw, made, transcoded and compared; raises AssertionError with what differs."""
    source = case.make(folder)
    before = look(source)
    if case.suffix not in MP4S:
        before = from_zero(before)
    report = convert(case, source, folder)
    if report is None:
        assert set(case.sounds) & HOMELESS
        assert left_over(folder) == [source.name]
        return
    after = look(report.output)
    assert report.frames == len(before.frames) == len(after.frames)
    assert len(before.sounds) == len(after.sounds)
    shift = in_ticks(after.frames, after.video_tick)[0] - in_ticks(before.frames, after.video_tick)[0]
    assert 0 <= shift <= _most_shift(before, report.output.suffix)
    assert in_ticks(after.frames, after.video_tick) == in_ticks(before.frames, after.video_tick, shift)
    for index, (one, other) in enumerate(zip(before.sounds, after.sounds, strict=True)):
        assert [packet[1] for packet in one] == [packet[1] for packet in other]
        tick = after.sound_ticks[index]
        got, due = (in_ticks([at for at, _ in packets], tick, n) for packets, n in ((other, 0), (one, shift)))
        # MP4 counts the samples of PCM, which are finer than the ticks of the source.
        slack = before.sound_ticks[index] / tick if case.sounds[index].startswith("pcm") else 0
        assert max((abs(a - b) for a, b in zip(got, due, strict=True)), default=0) <= slack
    assert report.notes == ()
    assert left_over(folder) == sorted([source.name, report.output.name])


def in_ticks(times: list[Fraction], tick: Fraction, shift: int = 0) -> list[int]:
    """Seconds in whole ticks, half ones away from zero, ``shift`` ticks later, and rising."""
    whole = [int(abs(at / tick) + Fraction(1, 2)) * (1 if at >= 0 else -1) + shift for at in times]
    return _rising(whole, 1)


def _starts(before: Heard) -> list[Fraction]:
    return [before.frames[0], *(sound[0][0] for sound in before.sounds if sound)]


def from_zero(before: Heard) -> Heard:
    """With a clock that starts later set to zero, all streams alike; an MP4 means it, by its edit list."""
    start = max(Fraction(0), min(_starts(before)))

    def moved(at: Fraction, tick: Fraction) -> Fraction:
        return at - round(start / tick) * tick

    sounds = [
        [(moved(at, tick), digest) for at, digest in sound]
        for sound, tick in zip(before.sounds, before.sound_ticks, strict=True)
    ]
    frames = [moved(at, before.video_tick) for at in before.frames]
    return dataclasses.replace(before, frames=frames, sounds=sounds)


def _most_shift(before: Heard, suffix: str) -> int:
    """Matroska has no time before zero: sound that starts there may move everything, in milliseconds."""
    if suffix not in (".mkv", ".webm"):
        return 0
    return max(0, -min(in_ticks([start], Fraction(1, 1000))[0] for start in _starts(before)))


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_whole(case: Case) -> bool:
    return case.damage == "none"


def parameters(whole: bool) -> list[Any]:
    """The cases that are whole or damaged; those outside the spread run only with ``-m long``."""
    return [
        pytest.param(
            case, id=case.id, marks=() if case.seed == 0 and case.index in SPREAD else pytest.mark.long
        )
        for case in CASES
        if is_whole(case) == whole
    ]


@pytest.mark.parametrize("case", parameters(whole=True))
def test_a_clip_keeps_every_frame_and_every_sound(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("case", parameters(whole=False))
def test_a_damaged_clip_is_done_as_far_as_it_goes(case: Case, tmp_path: Path) -> None:
    source = case.make(tmp_path)
    before = look_at_damaged(source)
    try:
        report = convert(case, source, tmp_path)
    except MediaError as error:
        report, refusal = None, str(error)
    else:
        refusal = ""
    if report is None:
        # Nothing to see, no container for its sound, or what describes the sound is hit.
        hopeless = not refusal or "its sound is damaged and cannot be copied" in refusal
        assert before is None or not before.frames or hopeless
        assert "\n" not in refusal
        assert left_over(tmp_path) == [source.name]
        return
    assert before is not None
    after = look(report.output)
    assert report.frames == len(before.frames) == len(after.frames)
    # A stream that has lost all its packets is not in an MP4.
    sounds = zip(filter(None, before.sounds), filter(None, after.sounds), strict=True)
    lost = 0
    for packets, kept in sounds:
        assert kept_of(packets, kept)
        lost += len(packets) - len(kept)
    reported = [int(note.split()[0]) for note in report.notes if "sound packets were dropped" in note]
    assert lost == sum(reported)


def look_at_damaged(path: Path) -> Heard | None:
    """None where FFmpeg finds no video at all."""
    try:
        return look(path)
    except (av.FFmpegError, IndexError):
        return None


def kept_of(before: list[tuple[Fraction, str]], after: list[tuple[Fraction, str]]) -> bool:
    """The packets are those of before, in order, some left out; the last may be cut."""
    rest = iter(digest for _, digest in before)
    return all(digest in rest for _, digest in after[:-1])


@pytest.mark.parametrize("spread", [False, True])
def test_the_draw_covers_every_value(spread: bool) -> None:
    cases = [case for case in SUITE_CASES if case.index in SPREAD or not spread]
    kinds = {(suffix, video) for suffix, (videos, _) in CONTAINERS.items() for video in videos.split()}
    found = {(case.suffix, case.video) for case in cases}
    assert {suffix for suffix, _ in found} == set(CONTAINERS) if spread else found == kinds
    assert {case.video for case in cases} == set(CODECS)
    assert {name for case in cases for name in case.sounds} == set(SOUNDS)
    assert {case.rate for case in cases} == set(RATES)
    assert {case.turn for case in cases} == set(TURNS)
    assert {case.edit for case in cases} == set(EDITS)
    assert {case.sink for case in cases} == set(SINKS)
    assert {case.style for case in cases} == set(STYLES)
    assert {case.damage for case in cases} == set(DAMAGES)
    assert {len(case.sounds) for case in cases} == {0, 1, 2}
    assert {sound.channels for case in cases for sound in case.spec.sounds} == {1, 2}
    assert {case.spec.options.get("bf") for case in cases} == {None, "0", "1", "2", "3"}
    assert {case.fragmented for case in cases} == {False, True}
    assert sum(case.spec.width % 2 or case.spec.height % 2 for case in cases) > len(cases) // 10
    assert sum(not is_whole(case) for case in cases) > len(cases) // 10


def test_a_case_is_made_again_by_its_number() -> None:
    case, again = draw(3, 77), draw(3, 77)
    assert case.id == again.id
    plain = [dataclasses.replace(one.spec, picture=None) for one in (case, again)]
    assert plain[0] == plain[1]
    assert draw(3, 78).id != case.id


# --- what they have found --------------------------------------------------------------------------------


def same(frame: Array) -> Array:
    return frame


def clip_of(path: Path, codec: str, count: int = 12, **options: Any) -> Path:
    """``count`` frames of this codec at 25 a second."""
    given: dict[str, Any] = {"options": {}, "pts": range(count), "time_base": Fraction(1, 25)} | options
    return make_clip(path, ClipSpec(codec=codec, **given))


@pytest.mark.parametrize("codec", ["flac", "libopus"])
def test_sound_refused_only_with_the_head_of_the_file_is_refused_before_any_work(
    tmp_path: Path, codec: str
) -> None:
    source = clip_of(tmp_path / "a.mkv", "mpeg4", sounds=[Sound(codec)])
    with pytest.raises(MediaError, match=r"sound cannot be copied into \.mov; use -o out\.mkv"):
        transcode(source, tmp_path / "out.mov", _never, sound="copy")


def _never(frame: Array) -> Array:
    raise AssertionError("work was done before the sound was checked")


def test_the_way_out_is_one_for_all_sounds(tmp_path: Path) -> None:
    wma = Sound("wmav2", 2, options={"b": "128k"})
    source = clip_of(tmp_path / "a.wmv", "msmpeg4", sounds=[Sound("libmp3lame"), wma])
    with pytest.raises(MediaError, match=r"cannot be copied at all; use --sound convert"):
        transcode(source, tmp_path / "out.webm", _never, sound="copy")


@pytest.mark.parametrize("channels", [1, 2])
def test_pcm_of_matroska_fits_mp4(tmp_path: Path, channels: int) -> None:
    source = clip_of(tmp_path / "a.mkv", "mpeg4", sounds=[Sound("pcm_s16le", channels)])
    transcode(source, tmp_path / "out.mp4", same, sound="copy")
    assert digests(tmp_path / "out.mp4") == digests(source)


def digests(path: Path) -> list[str]:
    return [digest for _, digest in sound_packets(path)]


@pytest.mark.parametrize("codec", ["alac", "flac"])
def test_the_last_packet_is_not_hidden_where_its_duration_is_unknown(tmp_path: Path, codec: str) -> None:
    source = clip_of(tmp_path / ("a.nut" if codec == "flac" else "a.mkv"), "mpeg4", sounds=[Sound(codec)])
    transcode(source, tmp_path / "out.mp4", same)
    assert len(digests(source)) > 3
    assert digests(tmp_path / "out.mp4") == digests(source)


@pytest.mark.parametrize("frames", [8, 15, 16])
def test_ogg_vorbis_whose_last_packet_is_cut_or_has_no_time(tmp_path: Path, frames: int) -> None:
    vorbis = Sound("vorbis", 2, options={"strict": "-2"})
    source = clip_of(tmp_path / "a.ogv", "libvpx", frames, sounds=[vorbis], options={"cpu-used": "8"})
    report = transcode(source, tmp_path / "out.mp4", same, sound="copy")
    assert report.notes == ()
    assert len(digests(tmp_path / "out.mp4")) == len(raw_digests(source))


def raw_digests(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def test_sound_that_starts_between_two_milliseconds_starts_there(tmp_path: Path) -> None:
    # 44.1 kHz and a clip counted in milliseconds: an MP4 that counts its starts in these rounds them down.
    mp3 = Sound("libmp3lame", start=4800, rate=44_100)
    source = clip_of(tmp_path / "a.flv", "flv", sounds=[mp3])
    transcode(source, tmp_path / "out.mp4", same)
    before, after = sound_packets(source), sound_packets(tmp_path / "out.mp4")
    assert len(before) > 5
    assert max(abs(a[0] - b[0]) for a, b in zip(after, before, strict=True)) <= Fraction(1, 2 * 44_100)


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg", "libx264"])
def test_whole_groups_hidden_by_an_edit_list_are_no_damage(tmp_path: Path, codec: str) -> None:
    options = {"g": "1"} | ({"preset": "ultrafast"} if codec == "libx264" else {})
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    source = clip_of(tmp_path / "a.mp4", codec, pix_fmt=pix_fmt, options=options, pts=range(-3, 9))
    report = transcode(source, tmp_path / "out.mp4", same)
    assert (report.frames, report.notes) == (9, ())
    assert frame_times(report.output) == frame_times(source)


def test_an_empty_place_of_avi_is_no_damage(tmp_path: Path) -> None:
    source = clip_of(tmp_path / "a.avi", "mjpeg", pix_fmt="yuvj420p", pts=(0, 1, 2, 5, 6, 7))
    report = transcode(source, tmp_path / "out.mp4", same)
    assert (report.frames, report.notes) == (6, ())
    assert frame_times(report.output) == [Fraction(n, 25) for n in (0, 1, 2, 5, 6, 7)]


@pytest.mark.parametrize("audio", [None, "aac"])
@pytest.mark.parametrize("name", ["a.flv", "a.avi"])
def test_flv_and_avi_without_their_end_are_told(tmp_path: Path, name: str, audio: str | None) -> None:
    if name == "a.avi" and audio:
        audio = "libmp3lame"
    codec = "flv" if name == "a.flv" else "mpeg4"
    source = clip_of(tmp_path / name, codec, 50, options={"g": "3"}, audio=audio)
    assert transcode(source, tmp_path / "whole.mkv", same).notes == ()
    data = source.read_bytes()
    source.write_bytes(data[: len(data) * 7 // 10])
    report = transcode(source, tmp_path / "out.mkv", same)
    assert 1 < report.frames < 45
    [told] = report.notes
    # What an AVI says of its length may be a frame off.
    assert re.fullmatch(
        re.escape(CUT_SHORT) + (rf" \({report.frames} of 5[01] frames\)" if name == "a.avi" else ""), told
    )


def test_gaps_in_pcm_are_told_where_they_cannot_be_kept(tmp_path: Path) -> None:
    source = _without_packets(clip_of(tmp_path / "a.mkv", "mpeg4", audio="pcm_s16le"), range(5, 9))
    kept = transcode(source, tmp_path / "out.mkv", same)
    assert kept.notes == ()
    assert sound_packets(kept.output) == sound_packets(source)
    (note,) = transcode(source, tmp_path / "out.mov", same).notes
    assert "gaps (0.09 s)" in note
    assert note.endswith("use -o out.mkv")


def test_stopped_early_the_sound_stops_too(tmp_path: Path) -> None:
    source = clip_of(tmp_path / "a.mkv", "mpeg4", 50, audio="aac")
    done: list[int] = []
    report = transcode(
        source,
        tmp_path / "out.mkv",
        same,
        progress=lambda frames, _: done.append(frames),
        should_stop=lambda: len(done) == 10,
    )
    assert report.frames == 10
    times = [at for at, _ in sound_packets(report.output)]
    assert Fraction(35, 100) < max(times) < Fraction(45, 100)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "libsvtav1"])
def test_crf_counts_for_every_encoder_that_has_it(tmp_path: Path, codec: str) -> None:
    source = clip_of(tmp_path / "a.mkv", "mpeg4", 8, options={"b": "4M"}, width=128, height=96)
    sizes = []
    for crf in (8, 45):
        report = transcode(source, tmp_path / f"{crf}.mkv", same, codec=codec, crf=crf)
        assert frame_times(report.output) == frame_times(source)
        sizes.append(report.output.stat().st_size)
    assert sizes[1] < 0.7 * sizes[0]


def _without_packets(path: Path, missing: range) -> Path:
    """A copy of a clip without these packets of its sound."""
    copy = path.with_name("gaps.mkv")
    with av.open(str(path)) as source, av.open(str(copy), "w") as target:
        streams: dict[int, Any] = {
            s.index: target.add_stream_from_template(s, opaque=True) for s in source.streams
        }
        sounds = 0
        for packet in source.demux():
            is_sound = packet.stream.type == "audio"
            sounds += is_sound
            if packet.size and not (is_sound and sounds - 1 in missing):
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    return copy
