"""Cameras and files in their place: every fault of a device, and the clock of a clip."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from support.fake_camera import FakeDevice
from support.media_samples import ClipSpec, make_clip, moving_bar, rgb_frames

from std_rt.core.errors import MediaError
from std_rt.media.camera import camera as camera_module
from std_rt.media.camera import device as camera_device
from std_rt.media.camera import file_camera
from std_rt.media.camera.camera import Camera, open_source, to_frame
from std_rt.media.camera.device import CvDevice, Properties, list_cameras
from std_rt.media.camera.file_camera import FileCamera, PlaybackFrame
from std_rt.media.camera.frame_source import Captured, Pause, Source, after

LINUX = sys.platform == "linux"
GREY = np.full((48, 64, 3), 90, np.uint8)


class Clock:
    """Time that passes only when somebody sleeps, or a test says so."""

    def __init__(self) -> None:
        self.t = 100.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.t

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.t += seconds
        time.sleep(0)  # lets the other thread run


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait for another thread to get there; fails after ten seconds."""
    for _ in range(10_000):
        if is_so():
            return
        time.sleep(0.001)
    pytest.fail("did not happen")


def numbered(index: int, shape: tuple[int, ...] = (48, 64, 3)) -> Any:
    """A BGR frame that says which it is."""
    frame = np.full(shape, 40, np.uint8)
    frame[..., 0] = 50 + index
    return frame


class Rig:
    """A camera on a fake device with a clock of its own."""

    def __init__(self, *first: object) -> None:
        self.clock, self.device = Clock(), FakeDevice()
        self.device.give(*(first or (GREY,)))
        self.camera = Camera("camera 0", self.device, now=self.clock.now, sleep=self.clock.sleep)

    def give(self, raw: object, wait_s: float = 0.04) -> Captured:
        """Give one frame, so long after the one before, and read it."""
        self.clock.t += wait_s
        self.device.give(raw)
        return self.read()

    def read(self) -> Captured:
        captured = self.camera.read()
        assert captured is not None
        return captured


@pytest.fixture(autouse=True)
def _quick_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """`close()` waits less for a device whose read does not come back."""
    monkeypatch.setattr(camera_module, "_CLOSE_S", 0.01)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.device.unplug()
    made.camera.close()
    eventually(lambda: not made.camera._frames._thread.is_alive())


# --- A camera that works ---------------------------------------------------------------------------------


def test_frames_are_rgb_with_the_time_they_came_and_counted(rig: Rig) -> None:
    first = rig.read()
    assert (first.index, first.at_s) == (0, 100.0)
    bgr = np.zeros((48, 64, 3), np.uint8)
    bgr[...] = (10, 20, 30)
    second = rig.give(bgr, 0.5)
    assert (second.index, second.at_s) == (1, 100.5)
    assert second.frame[0, 0].tolist() == [30, 20, 10]
    assert second.frame.dtype == np.uint8
    assert second.frame.flags.c_contiguous
    assert not np.shares_memory(second.frame, bgr)
    assert (rig.camera.name, rig.camera.fps, rig.camera.status, rig.camera.faults) == (
        "camera 0",
        30.0,
        "",
        {},
    )


def test_the_newest_frame_wins_and_the_rest_is_counted(rig: Rig) -> None:
    rig.device.give(*(numbered(n) for n in range(5)))
    eventually(lambda: rig.camera.faults.get("unread") == 5)
    newest = rig.read()
    assert newest.frame[0, 0, 2] == 54
    assert newest.index == 0


def test_read_waits_for_a_frame_and_gives_each_once(rig: Rig) -> None:
    rig.read()
    threading.Timer(0.05, rig.device.give, [numbered(7)]).start()
    assert rig.read().frame[0, 0, 2] == 57


def test_close_ends_a_read_that_waits_and_frees_the_camera() -> None:
    rig = Rig()
    rig.read()
    ended: list[Captured | None] = []
    reader = threading.Thread(target=lambda: ended.append(rig.camera.read()))
    reader.start()
    rig.camera.close()
    reader.join(10)
    assert ended == [None]
    assert rig.camera.read() is None
    assert rig.camera.status == ""
    rig.camera.close()
    rig.device.give(GREY)  # the device's read comes back at last
    eventually(lambda: not rig.device.is_open)


# --- Faults ----------------------------------------------------------------------------------------------


def test_a_stall_shows_in_status_and_does_not_hold_up_close() -> None:
    rig = Rig()
    rig.read()
    rig.clock.t += 0.9
    assert rig.camera.status == ""
    rig.clock.t += 0.2
    assert rig.camera.status == "camera 0 has sent no frame for 1 s"
    rig.clock.t += 5
    assert rig.camera.status == "camera 0 has sent no frame for 6 s"
    rig.camera.close()  # comes back although the device's read does not
    assert rig.camera._frames._thread.is_alive()
    assert rig.camera._frames._thread.daemon
    rig.device.unplug()
    eventually(lambda: not rig.camera._frames._thread.is_alive())


def test_after_a_stall_frames_go_on(rig: Rig) -> None:
    rig.read()
    assert rig.give(GREY, 3.0).index == 1
    assert rig.camera.status == ""
    assert rig.camera.faults == {"stalls": 1}


def test_a_lost_camera_is_looked_for_with_growing_pauses_and_found(rig: Rig) -> None:
    assert rig.read().index == 0
    rig.device.unplug()
    eventually(lambda: rig.device.tries > 8)
    assert rig.camera.status == "camera 0 lost; reconnecting"
    rig.device.plug_in()
    assert rig.give(numbered(3)).index == 1
    assert rig.camera.status == ""
    assert rig.camera.faults["lost"] == 1
    assert "stalls" not in rig.camera.faults
    waits = [seconds for seconds in rig.clock.slept if seconds >= 0.1]
    assert waits[:6] == pytest.approx([0.2, 0.4, 0.8, 1.6, 2.0, 2.0])
    assert sum(seconds < 0.1 for seconds in rig.clock.slept) < 40  # half a second of reads that fail


def test_it_can_be_lost_again_and_the_pauses_start_anew(rig: Rig) -> None:
    rig.read()
    for losses in (1, 2):
        before, tries = len(rig.clock.slept), rig.device.tries
        rig.device.unplug()
        eventually(lambda tries=tries: rig.device.tries > tries + 3)  # type: ignore[misc]
        waits = [seconds for seconds in rig.clock.slept[before:] if seconds >= 0.1]
        assert waits[:3] == pytest.approx([0.2, 0.4, 0.8])
        rig.device.plug_in()
        assert rig.give(GREY).index == losses
    assert rig.camera.faults["lost"] == 2


def test_a_single_read_without_a_frame_is_no_loss(rig: Rig) -> None:
    rig.read()
    rig.device.give(None)
    assert rig.give(GREY).index == 1
    assert rig.camera.faults == {"empty": 1}
    assert rig.device.tries == 1


def test_another_size_just_comes(rig: Rig) -> None:
    rig.read()
    assert rig.give(np.full((30, 40, 3), 90, np.uint8)).frame.shape == (30, 40, 3)
    assert rig.give(GREY).frame.shape == (48, 64, 3)
    assert rig.camera.faults == {"resized": 2}


@pytest.mark.parametrize(
    "raw",
    [
        np.zeros((0, 0, 3), np.uint8),
        np.zeros((48, 0, 3), np.uint8),
        np.zeros((1, 9000), np.uint8),  # a compressed frame that was not decoded
        np.zeros((48, 64, 3), np.float32),
        np.zeros((48, 64), np.uint16),
        np.zeros((48, 64, 2), np.uint8),
        np.zeros((2, 48, 64, 3), np.uint8),
        "frame",
    ],
    ids=lambda raw: getattr(raw, "shape", raw).__repr__(),
)
def test_corrupt_frames_are_dropped_and_counted(rig: Rig, raw: object) -> None:
    rig.read()
    rig.device.give(raw)
    assert rig.give(GREY).index == 1
    assert rig.camera.faults == {"corrupt": 1}


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 1), (48, 64, 4)])
def test_grey_and_bgra_frames_are_converted(rig: Rig, shape: tuple[int, ...]) -> None:
    rig.read()
    raw = np.full(shape, 90, np.uint8)
    if len(shape) == 3 and shape[2] == 4:
        raw[...] = (10, 20, 30, 0)
    frame = rig.give(raw).frame
    assert frame.shape == (48, 64, 3)
    assert frame[0, 0].tolist() == ([30, 20, 10] if shape[-1] == 4 else [90, 90, 90])
    assert rig.camera.faults == {"converted": 1}


def test_views_of_a_device_are_taken_as_they_look() -> None:
    raw = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    frame = to_frame(raw[::2, ::-2])
    assert frame is not None
    np.testing.assert_array_equal(frame, raw[::2, ::-2, ::-1])


def test_black_frames_are_passed_on_and_told_after_two_seconds(rig: Rig) -> None:
    rig.read()
    black = np.random.default_rng(0).integers(0, 8, (48, 64, 3), np.uint8)  # a covered lens has noise
    for wait_s in (0.04, 0.95, 0.95):
        assert rig.give(black, wait_s).frame.max() < 8
    assert rig.camera.status == ""
    rig.give(black, 0.11)
    assert rig.camera.status == "camera 0 is sending black frames; is the lens covered?"
    rig.give(GREY)
    assert rig.camera.status == ""
    assert rig.camera.faults == {"black": 4}


def test_times_always_grow(rig: Rig) -> None:
    times = [rig.read().at_s]
    for step in (0.0, 0.0, -5.0, 0.04):
        times.append(rig.give(GREY, step).at_s)
    assert all(a < b for a, b in itertools.pairwise(times))
    assert times[3] == pytest.approx(100.0, abs=1e-9)
    assert rig.camera.faults == {"repeated": 4}


def test_a_second_source_on_a_camera_is_refused_and_the_first_goes_on(rig: Rig) -> None:
    rig.read()
    with pytest.raises(MediaError, match=r"busy; close"):
        Camera("camera 0", rig.device, now=rig.clock.now, sleep=rig.clock.sleep)
    assert rig.give(GREY).index == 1


# --- Opening ---------------------------------------------------------------------------------------------


def test_a_camera_that_warms_up_may_fail_at_first() -> None:
    rig = Rig(None, np.zeros((0, 0, 3), np.uint8), numbered(2))
    assert rig.read().frame[0, 0, 2] == 52
    assert rig.camera.faults == {"empty": 1, "corrupt": 1}
    rig.device.unplug()
    rig.camera.close()


class Silent(FakeDevice):
    """Opens, and then gives ``raw`` for ever."""

    def __init__(self, raw: object) -> None:
        super().__init__()
        self.raw = raw

    def read(self) -> object:
        return self.raw


@pytest.mark.parametrize("raw", [None, np.zeros((48, 64), np.uint16)], ids=["nothing", "nonsense"])
def test_a_camera_that_gives_no_usable_frame_is_refused(raw: object) -> None:
    clock, device = Clock(), Silent(raw)
    with pytest.raises(MediaError, match=r"^camera 0 opens but sends no frames; close other programs"):
        Camera("camera 0", device, now=clock.now, sleep=clock.sleep)
    assert not device.is_open


def test_a_camera_that_never_answers_is_refused_in_time() -> None:
    clock, device = Clock(), FakeDevice()

    def now() -> float:
        clock.t += 10.0
        return clock.t

    with pytest.raises(MediaError, match="camera 0 does not answer; unplug it and"):
        Camera("camera 0", device, now=now, sleep=clock.sleep)
    device.unplug()


def test_macos_opens_in_the_callers_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera_module, "_OPEN_HERE", True)
    opened_in: list[threading.Thread] = []

    class Asking(FakeDevice):
        def open(self) -> Properties:
            opened_in.append(threading.current_thread())
            return super().open()

    device = Asking()
    device.give(GREY)
    source = Camera("camera 0", device)
    assert opened_in == [threading.current_thread()]
    assert device.tries == 1
    device.unplug()
    source.close()
    with pytest.raises(MediaError, match="plug it in"):
        Camera("camera 0", device)


def test_open_source_hands_the_wishes_to_the_device() -> None:
    asked: list[object] = []
    device = FakeDevice()
    device.give(GREY)

    def make(*wishes: object) -> FakeDevice:
        asked.extend(wishes)
        return device

    source = open_source(" 1 ", size=(720, 1280), fps=60, device=make)
    assert source.name == "camera 1"
    assert asked == ["1", (720, 1280), 60]
    device.unplug()
    source.close()


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("", "nothing is neither a camera nor a file"),
        ("no such.mp4", "no such.mp4 is neither a camera nor a file"),
        ("-1", "-1 is neither"),
        ("rtsp://host/stream", "is a network stream, which is not supported"),
        ("x\0y", "is neither a camera nor a file"),
    ],
)
def test_what_is_no_source_is_told_in_one_line(spec: str, line: str) -> None:
    with pytest.raises(MediaError, match=line) as raised:
        open_source(spec)
    assert "\n" not in str(raised.value)


def test_files_that_are_no_source(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "cut.mp4").write_bytes(make_clip(tmp_path / "whole.mp4").read_bytes()[:900])
    for name, line in (
        ("notes.txt", "cannot be read as a picture or video"),
        ("cut.mp4", "cannot be read as a video"),
        (".", "is a folder"),
    ):
        with pytest.raises(MediaError, match=line):
            open_source(str(tmp_path / name))


@pytest.mark.parametrize(("size", "fps"), [((0, 64), None), (None, 0.0), (None, float("nan"))])
def test_wishes_that_no_camera_can_meet(size: Any, fps: Any) -> None:
    with pytest.raises(MediaError, match=r"camera (size|rate) must be"):
        open_source("0", size=size, fps=fps)


# --- OpenCV ----------------------------------------------------------------------------------------------


def test_a_camera_that_is_not_there_gives_our_line_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MediaError, match=r"camera 99 (does not exist|cannot be opened); ") as raised:
        open_source("99")
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not LINUX, reason="device nodes of Linux")
def test_a_node_that_does_not_open_is_busy_or_no_camera(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        MediaError, match="camera /dev/null is busy or not a camera; close the program"
    ) as raised:
        open_source("/dev/null")
    assert "`fuser -v /dev/null`" in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not LINUX, reason="the nodes and groups of Linux")
def test_a_camera_without_permission_names_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "video0").touch()
    monkeypatch.setattr(camera_device, "_DEV", tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    with pytest.raises(MediaError, match=r"not allowed to open camera 0; .* usermod -aG video"):
        open_source("0")


@pytest.mark.parametrize(
    ("platform", "line"),
    [
        ("darwin", "Privacy & Security > Camera"),
        ("win32", "close the program that is using it, allow desktop"),
    ],
)
def test_other_systems_say_where_to_allow_it(
    platform: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(MediaError, match=f"camera 3 cannot be opened; .*{line}.* or give another index"):
        CvDevice("3", backends=[]).open()
    assert list_cameras() == []


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/dev with three video nodes, two of which have a name, and something else."""
    dev, sysfs = tmp_path / "dev", tmp_path / "sys"
    dev.mkdir()
    for name in ("video0", "video10", "video2", "videodrome", "null"):
        (dev / name).touch()
    for name, text in (("video0", "HD Webcam\n"), ("video10", "Capture  Card\n")):
        (sysfs / name).mkdir(parents=True)
        (sysfs / name / "name").write_text(text, encoding="utf-8")
    monkeypatch.setattr(camera_device, "_DEV", dev)
    monkeypatch.setattr(camera_device, "_SYSFS", sysfs)
    return dev


@pytest.mark.skipif(not LINUX, reason="the nodes of Linux")
def test_cameras_are_listed_with_their_names_and_in_errors(nodes: Path) -> None:
    found = ["0 (HD Webcam)", "2 (no name)", "10 (Capture Card)"]
    assert list_cameras() == found
    line = f"camera 7 does not exist; give one of the cameras found: {', '.join(found)}, or a video file"
    with pytest.raises(MediaError) as raised:
        open_source("7")
    assert str(raised.value) == line


@pytest.mark.skipif(not LINUX, reason="the nodes of Linux")
def test_nodes_that_give_no_pictures_are_not_listed(nodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def ioctl(handle: int, request: int, answer: bytearray) -> int:
        assert request == 0x80685600  # VIDIOC_QUERYCAP of 104 bytes
        number = Path(f"/proc/self/fd/{handle}").readlink().name.removeprefix("video")
        device_caps = {"0": 0x04200001, "2": 0x04A00000, "10": 0x04201000}[
            number
        ]  # capture, metadata, planes
        answer[84:92] = (0x84A00001).to_bytes(4, sys.byteorder) + device_caps.to_bytes(4, sys.byteorder)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert list_cameras() == ["0 (HD Webcam)", "10 (Capture Card)"]


class _Capture:
    """Stands for cv2.VideoCapture: notes what is asked for."""

    def __init__(self, source: object, backend: int) -> None:
        self.source, self.backend = source, backend
        self.asked: dict[int, float] = {}
        self.released = False
        made.append(self)

    def isOpened(self) -> bool:
        return self.backend == 2

    def set(self, key: int, value: float) -> bool:
        self.asked[key] = value
        return True

    def get(self, key: int) -> float:
        return {cv2.CAP_PROP_FRAME_WIDTH: 1280.0, cv2.CAP_PROP_FRAME_HEIGHT: 720.0}.get(key, -1.0)

    def read(self) -> tuple[bool, object]:
        raise cv2.error("the driver is unhappy")

    def release(self) -> None:
        self.released = True


made: list[_Capture] = []


def test_opencv_is_asked_for_format_size_rate_and_few_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    monkeypatch.setattr(cv2, "VideoCapture", _Capture)
    monkeypatch.setattr(CvDevice, "_check_node", lambda self: None)
    device = CvDevice("4", (720, 1280), 60.0, backends=[1, 2, 3])
    properties = device.open()
    refused, taken = made
    assert (refused.released, taken.source, taken.backend) == (True, 4, 2)
    assert taken.asked == {
        cv2.CAP_PROP_FOURCC: cv2.VideoWriter.fourcc(*"MJPG"),
        cv2.CAP_PROP_FRAME_WIDTH: 1280,
        cv2.CAP_PROP_FRAME_HEIGHT: 720,
        cv2.CAP_PROP_FPS: 60.0,
        cv2.CAP_PROP_BUFFERSIZE: 2,
    }
    assert next(iter(taken.asked)) == cv2.CAP_PROP_FOURCC
    assert properties == Properties((720, 1280), None)
    assert device.read() is None  # its exception does not come out
    device.close()
    device.close()
    assert taken.released
    assert device.read() is None


def test_without_wishes_the_camera_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    monkeypatch.setattr(cv2, "VideoCapture", _Capture)
    monkeypatch.setattr(CvDevice, "_check_node", lambda self: None)
    CvDevice("4", backends=[2]).open()
    assert list(made[0].asked) == [cv2.CAP_PROP_BUFFERSIZE]


def test_opencv_itself_behind_a_camera_that_ends_and_comes_back(tmp_path: Path) -> None:
    clip = make_clip(
        tmp_path / "two.avi", ClipSpec(pts=(0, 512), codec="mjpeg", pix_fmt="yuvj420p", options={})
    )
    clock = Clock()
    device = CvDevice(str(clip), backends=[cv2.CAP_ANY])  # a file plays the camera
    source = Camera("camera 0", device, now=clock.now, sleep=clock.sleep)
    first = source.read()
    assert first is not None
    assert source.properties.size == (48, 64)
    red, green, blue = first.frame.mean(axis=(0, 1))
    assert min(red, green) > blue + 50  # as the bar's picture is, and not BGR
    eventually(lambda: source.faults.get("lost", 0) > 1)
    again = source.read()
    assert again is not None
    assert again.index == 1
    source.close()
    eventually(lambda: not source._frames._thread.is_alive())


# --- Clips in a camera's place ---------------------------------------------------------------------------


def played(source: Source, count: int) -> list[Captured]:
    frames = [source.read() for _ in range(count)]
    assert None not in frames
    return [frame for frame in frames if frame is not None]


VARIABLE = (1024, 1536, 3072, 3584, 7168)  # of 12800 a second, not from 0


def test_a_clip_plays_by_its_own_times_round_after_round(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mkv", ClipSpec(pts=VARIABLE))
    clock = Clock()
    source = open_source(str(clip), now=clock.now, sleep=clock.sleep)
    frames = played(source, 13)
    source.close()
    within = [float(Fraction(pts - VARIABLE[0], 12_800)) for pts in VARIABLE]
    length = frames[5].at_s - frames[0].at_s
    # Matroska has times in ms; the last frame lasts as long as the file says, or the average.
    assert within[-1] + 0.02 < length < within[-1] + 0.2
    wanted = [100 + n // 5 * length + within[n % 5] for n in range(13)]
    assert [frame.at_s for frame in frames] == pytest.approx(wanted, abs=2e-3)
    assert [frame.index for frame in frames] == list(range(13))
    for n, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.frame, frames[n % 5].frame)
    assert (source.name, source.status, source.faults) == ("clip.mkv", "", {})
    assert clock.t == frames[-1].at_s  # no frame before its time


@pytest.mark.parametrize("suffix", [".mp4", ".ts"])  # the latter has no durations
def test_a_round_of_a_steady_clip_joins_the_next_without_a_jump(tmp_path: Path, suffix: str) -> None:
    clock = Clock()
    clip = make_clip(tmp_path / f"clip{suffix}")
    source = open_source(str(clip), now=clock.now, sleep=clock.sleep)
    times = [frame.at_s for frame in played(source, 40)]
    source.close()
    assert source.fps == 25.0
    assert np.diff(times) == pytest.approx(0.04, abs=1e-6)


@pytest.mark.parametrize(
    ("aspect", "degrees", "shape"),
    [
        (Fraction(16, 9), 0, (240, 320)),  # 180x240 of video discs and anamorphic cameras
        (Fraction(3, 4), 0, (320, 180)),
        (Fraction(16, 9), 90, (320, 240)),
        (None, 0, (240, 180)),
    ],
)
def test_oblong_pixels_are_shown_square(
    tmp_path: Path, aspect: Fraction | None, degrees: int, shape: tuple[int, int]
) -> None:
    spec = ClipSpec(width=180, height=240, aspect=aspect, rotate=(degrees, False, False), pts=(0, 512))
    source = open_source(str(make_clip(tmp_path / "a.mp4", spec)))
    with closing(source):
        first, taken = source.first_frame(), source.read()
    assert first is not None
    assert taken is not None
    assert first.shape[:2] == taken.frame.shape[:2] == shape


def test_frames_are_those_of_the_file(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4")
    clock = Clock()
    source = open_source(str(path), now=clock.now, sleep=clock.sleep)
    for captured, wanted in zip(played(source, 12), rgb_frames(path), strict=True):
        assert np.abs(captured.frame.astype(int) - wanted).mean() < 3
    source.close()


def test_the_first_frame_of_a_file_starts_no_playback(tmp_path: Path) -> None:
    clock = Clock()
    source = open_source(str(make_clip(tmp_path / "clip.mp4")), loop=False, now=clock.now, sleep=clock.sleep)
    first = source.first_frame()
    assert first is not None
    first_copy = first.copy()
    first[:] = 0  # the caller's own
    clock.t += 5  # engines open meanwhile
    frames = played(source, 12)
    np.testing.assert_array_equal(frames[0].frame, first_copy)
    assert (frames[0].at_s, source.faults, source.is_camera) == (clock.t - 11 * 0.04, {}, False)
    source.close()


def test_a_clip_that_does_not_loop_ends(tmp_path: Path) -> None:
    clock = Clock()
    source = open_source(str(make_clip(tmp_path / "clip.mp4")), loop=False, now=clock.now, sleep=clock.sleep)
    assert len(played(source, 12)) == 12
    assert source.read() is None
    assert source.read() is None
    assert source.status == ""
    source.close()


def test_a_turned_clip_stands_upright(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "turned.mp4", ClipSpec(rotate=(90.0, False, False)))
    source = open_source(str(clip))
    [captured] = played(source, 1)
    source.close()
    assert captured.frame.shape == (64, 48, 3)
    assert captured.frame.flags.c_contiguous


def test_close_cuts_a_long_wait_short(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "slow.mkv", ClipSpec(pts=(0, 9 * 12_800, 18 * 12_800)))
    source = open_source(str(clip))  # in real time: nine seconds between frames
    played(source, 1)
    ended: list[Captured | None] = []
    reader = threading.Thread(target=lambda: ended.append(source.read()))
    began = time.perf_counter()
    reader.start()
    source.close()
    reader.join(8)
    assert ended == [None]
    assert time.perf_counter() - began < 8


def test_a_file_that_goes_away_is_looked_for_and_found(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4")
    whole = clip.read_bytes()
    clock = Clock()
    source = open_source(str(clip), now=clock.now, sleep=clock.sleep)
    played(source, 1)
    clip.write_bytes(b"")
    reader = threading.Thread(target=lambda: [source.read() for _ in range(40)])
    reader.start()
    eventually(lambda: source.status == "clip.mp4 lost; reconnecting")
    eventually(lambda: [wait for wait in clock.slept if wait > 0.1][:5] == [0.2, 0.4, 0.8, 1.6, 2.0])
    clip.write_bytes(whole)
    reader.join(10)
    assert not reader.is_alive()
    assert (source.status, source.faults["lost"]) == ("", 1)
    source.close()


def rounds(count: int, step_s: float, spend: Callable[[], None] = lambda: None) -> Any:
    """Rounds of numbered frames, each of which takes what ``spend`` does."""

    def play(_: Callable[[], bool]) -> Generator[PlaybackFrame, None, None]:
        for index in range(count):
            spend()
            yield PlaybackFrame(numbered(index), index * step_s, step_s)

    return play


def test_a_clip_that_decodes_too_slowly_never_falls_far_behind() -> None:
    clock = Clock()

    def spend() -> None:
        clock.t += 0.1  # for a frame of 40 ms

    source = FileCamera("clip", 25.0, rounds(10, 0.04, spend), now=clock.now, sleep=clock.sleep)
    for _ in range(200):
        [captured] = played(source, 1)
        # Read ahead by some frames, decoded at 100 ms each, and never older than the limit.
        assert clock.t - captured.at_s < 1.0
    source.close()
    assert source.faults["late"] > 100


def test_a_frame_that_is_ready_late_says_when_it_was_there() -> None:
    clock, may_decode = Clock(), threading.Event()

    def play(_: Callable[[], bool]) -> Generator[PlaybackFrame, None, None]:
        yield PlaybackFrame(GREY, 0.0, 0.04)
        may_decode.wait(10)
        clock.t += 0.3
        yield PlaybackFrame(GREY, 0.04, 0.04)

    source = FileCamera("clip", 25.0, play, loop=False, now=clock.now, sleep=clock.sleep)
    [first] = played(source, 1)
    may_decode.set()
    [second] = played(source, 1)
    assert (first.at_s, second.at_s) == (100.0, 100.3)
    source.close()


def test_a_slow_reader_gets_the_present_and_the_rest_is_late() -> None:
    clock = Clock()
    source = FileCamera("clip", 25.0, rounds(50, 0.04), now=clock.now, sleep=clock.sleep)
    [first] = played(source, 1)
    eventually(lambda: len(source._frames._queue) == 3)
    clock.t += 0.09  # frames 1 and 2 are due, and 3 is not yet
    [second] = played(source, 1)
    assert second.at_s == pytest.approx(first.at_s + 0.08)
    assert (second.index, second.frame[0, 0, 0]) == (1, 52)
    assert source.faults == {"late": 1}
    source.close()


def test_a_reader_that_paused_goes_on_at_once_and_in_step() -> None:
    clock = Clock()
    source = FileCamera("clip", 25.0, rounds(50, 0.04), now=clock.now, sleep=clock.sleep)
    played(source, 1)
    clock.t += 60
    times = [frame.at_s for frame in played(source, 5)]
    source.close()
    assert times[0] == pytest.approx(160.0)
    assert np.diff(times) == pytest.approx(0.04)
    assert source.faults == {"late": 1500 - 1}


def test_behind_time_frames_that_no_other_needs_are_left_out(tmp_path: Path) -> None:
    options = {"crf": "20", "preset": "medium", "x264-params": "bframes=3:b-adapt=0:scenecut=0"}
    clip = make_clip(tmp_path / "b.mp4", ClipSpec(pts=tuple(range(0, 60 * 512, 512)), options=options))
    on_time = list(file_camera._play_clip(clip, lambda: False))
    behind = list(file_camera._play_clip(clip, lambda: True))
    assert len(on_time) == 60
    assert 10 < len(behind) < 45
    assert sum(frame.skipped for frame in on_time) == 0
    whole = {round(frame.at_s, 3): frame.frame for frame in on_time}
    for frame in behind:  # what is left is whole
        np.testing.assert_array_equal(frame.frame, whole[round(frame.at_s, 3)])
    assert len(behind) + sum(frame.skipped for frame in behind) == pytest.approx(60, abs=3)


def test_absurd_times_hold_nothing_up(tmp_path: Path) -> None:
    hours = 3600 * 12_800
    clip = make_clip(tmp_path / "jump.mkv", ClipSpec(pts=(0, 512, 26 * hours, 26 * hours + 512)))
    at_s = [frame.at_s for frame in file_camera._play_clip(clip, lambda: False)]
    assert at_s == pytest.approx([0, 0.04, 10.04, 10.08], abs=2e-3)


def test_a_broken_round_ends_a_clip_that_does_not_loop() -> None:
    clock = Clock()

    def play(_: Callable[[], bool]) -> Generator[PlaybackFrame, None, None]:
        yield PlaybackFrame(GREY, 0.0, 0.04)
        raise MediaError("gone")

    source = FileCamera("clip", 25.0, play, loop=False, now=clock.now, sleep=clock.sleep)
    assert len(played(source, 1)) == 1
    assert source.read() is None
    source.close()


# --- Pictures in a camera's place ------------------------------------------------------------------------


def test_a_picture_is_a_camera_of_30_frames_a_second(tmp_path: Path) -> None:
    picture = moving_bar(3)
    Image.fromarray(picture).save(tmp_path / "still.png")
    clock = Clock()
    source = open_source(str(tmp_path / "still.png"), now=clock.now, sleep=clock.sleep)
    frames = played(source, 31)
    source.close()
    assert (source.name, source.fps) == ("still.png", 30.0)
    assert np.diff([frame.at_s for frame in frames]) == pytest.approx(1 / 30)
    frames[0].frame[...] = 0  # the reader's own
    np.testing.assert_array_equal(frames[30].frame, picture)


def test_transparent_pictures_lie_on_white_and_huge_ones_are_scaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rgba = np.zeros((40, 80, 4), np.uint8)
    rgba[:, 40:] = (200, 0, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    monkeypatch.setattr(file_camera, "_CAMERA_PX", 20 * 40)
    source = open_source(str(tmp_path / "a.png"), fps=10, loop=False)
    [captured] = played(source, 1)
    assert captured.frame.shape == (20, 40, 3)
    assert captured.frame[0, 0].tolist() == [255, 255, 255]
    assert captured.frame[0, -1].tolist() == [200, 0, 0]
    assert source.read() is None
    source.close()


# --- Small parts -----------------------------------------------------------------------------------------


def test_after_gives_a_later_time() -> None:
    assert after(2.0, 1.0) == 2.0
    assert after(1.0, 1.0) > 1.0
    assert after(0.0, 1.0) == after(1.0, 1.0)


def test_a_pause_waits_in_full_unless_it_is_ended() -> None:
    pause = Pause()
    began = time.perf_counter()
    assert pause.wait(0.05)
    assert time.perf_counter() - began >= 0.045
    pause.end()
    assert not pause.wait(60)
    assert not pause.wait(0.001)
