"""The virtual camera against pyvirtualcam's own contract for what is behind it; no driver needed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest

from std_rt.core.errors import MediaError
from std_rt.media.camera.virtual_camera import VirtualCamera, letterbox

pyvirtualcam = pytest.importorskip("pyvirtualcam")

FULL = np.random.default_rng(3).integers(1, 255, (48, 64, 3), np.uint8)


class Recording:
    """A backend as pyvirtualcam describes it, which keeps what it gets."""

    opened: list[Recording] = []  # noqa: RUF012 the test empties it

    def __init__(self, *, width: int, height: int, fps: float, fourcc: int, device: str | None) -> None:
        if device == "/dev/video9":
            raise ValueError("Device /dev/video9 does not exist.")
        self.size, self.fps, self.fourcc = (height, width), fps, fourcc
        self.name = device or "loop 0"
        self.frames: list[Any] = []
        self.closed = 0
        self.failure: Exception | None = None
        self.opened.append(self)

    def close(self) -> None:
        self.closed += 1
        if self.failure is not None:
            raise RuntimeError("cannot close either")

    def send(self, frame: Any) -> None:
        if self.failure is not None:
            raise self.failure
        assert frame.dtype == np.uint8
        assert frame.ndim == 1
        assert frame.flags.c_contiguous
        self.frames.append(frame.reshape(*self.size, 3).copy())

    def device(self) -> str:
        return self.name

    def native_fourcc(self) -> int | None:
        return None


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Only the recording backend; the cameras that were opened on it."""
    monkeypatch.setattr(pyvirtualcam.camera, "BACKENDS", {})
    pyvirtualcam.camera.register_backend("recording", Recording)
    Recording.opened.clear()
    return Recording.opened


def test_frames_arrive_as_they_are(backends: list[Recording]) -> None:
    camera = VirtualCamera((48, 64), 29.97)
    camera.send(FULL)
    camera.send(FULL[:, ::-1])  # not contiguous
    [backend] = backends
    assert (backend.size, backend.fps, camera.device, camera.size) == ((48, 64), 29.97, "loop 0", (48, 64))
    assert backend.fourcc == pyvirtualcam.camera.encode_fourcc(pyvirtualcam.PixelFormat.RGB.value)
    np.testing.assert_array_equal(backend.frames, [FULL, FULL[:, ::-1]])
    assert camera.problem == ""
    camera.close()
    assert backend.closed == 1


def test_a_device_can_be_named(backends: list[Recording]) -> None:
    camera = VirtualCamera((48, 64), 30, "/dev/video3")
    assert camera.device == "/dev/video3"
    assert backends[0].name == "/dev/video3"
    camera.close()


def test_other_sizes_are_fitted_and_may_change(backends: list[Recording]) -> None:
    camera = VirtualCamera((48, 64), 30)
    for shape in ((96, 128, 3), (30, 30, 3), (480, 64, 3), (9, 640, 3)):
        camera.send(np.full(shape, 200, np.uint8))
    wide, square, tall, flat = backends[0].frames
    assert (wide == 200).all()
    assert (square[:, 8:56] == 200).all()
    assert (tall[:, 30:34] == 200).all()
    assert (flat[23] == 200).all()
    for frame, lit in ((square, 48 * 48), (tall, 48 * 6), (flat, 64)):
        assert (frame > 0).all(axis=2).sum() == pytest.approx(lit, rel=0.1)
        assert set(np.unique(frame)) == {0, 200}
    camera.close()


def test_odd_sides_are_made_even(backends: list[Recording]) -> None:
    camera = VirtualCamera((47, 63), 30)
    camera.send(FULL)
    assert backends[0].size == camera.size == (48, 64)
    camera.close()


def test_sending_never_waits(backends: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("send waited")

    camera = VirtualCamera((48, 64), 1)
    monkeypatch.setattr("time.sleep", sleep)
    for _ in range(5):
        camera.send(FULL)
    assert len(backends[0].frames) == 5
    camera.close()


@pytest.mark.parametrize("failure", [RuntimeError("driver\n is gone"), OSError(5, "driver is gone")])
def test_a_driver_that_fails_ends_the_output_with_one_line(
    backends: list[Recording], failure: Exception
) -> None:
    camera = VirtualCamera((48, 64), 30)
    camera.send(FULL)
    backends[0].failure = failure
    camera.send(FULL)
    line = "the virtual camera loop 0 has stopped (driver is gone); the live session continues"
    assert camera.problem == line
    backends[0].failure = None
    camera.send(FULL)
    camera.close()
    assert (len(backends[0].frames), backends[0].closed, camera.problem) == (1, 1, line)


def test_close_may_be_called_again_and_frames_after_it_are_dropped(backends: list[Recording]) -> None:
    camera = VirtualCamera((48, 64), 30)
    camera.close()
    camera.close()
    camera.send(FULL)
    assert (backends[0].closed, backends[0].frames, camera.problem) == (1, [], "")


def test_two_at_once_where_the_driver_allows_one(backends: list[Recording]) -> None:
    class Single(Recording):
        def __init__(self, **wishes: Any) -> None:
            if any(not camera.closed for camera in self.opened):
                raise RuntimeError("Device or resource busy")
            super().__init__(**wishes)

    pyvirtualcam.camera.register_backend("recording", Single)
    first = VirtualCamera((48, 64), 30)
    with pytest.raises(MediaError, match="Device or resource busy") as raised:
        VirtualCamera((48, 64), 30)
    assert "close the program that sends to it" in str(raised.value) or sys.platform != "linux"
    first.close()
    VirtualCamera((48, 64), 30).close()


# --- What is missing -------------------------------------------------------------------------------------


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvirtualcam", None)
    with pytest.raises(MediaError) as raised:
        VirtualCamera((48, 64), 30)
    assert str(raised.value) == "the virtual camera needs pyvirtualcam; run: pip install -e '.[live]'"


def test_a_package_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "pyvirtualcam":
                raise ImportError("a library\nis missing")

    monkeypatch.delitem(sys.modules, "pyvirtualcam")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(MediaError, match=r"cannot be loaded \(a library is missing\); reinstall it"):
        VirtualCamera((48, 64), 30)


def _refusing(message: str) -> Callable[..., None]:
    def camera(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    return camera


@pytest.mark.parametrize(
    ("platform", "cause", "line"),
    [
        (
            "linux",
            "'v4l2loopback' backend: No v4l2 loopback device found at /dev/video[0-99].",
            "no virtual camera: its driver is not loaded; run: sudo modprobe v4l2loopback devices=1",
        ),
        (
            "linux",
            "'v4l2loopback' backend: Device or resource busy",
            "the virtual camera cannot be opened ('v4l2loopback' backend: Device or resource busy);"
            " close the program that sends to it, or name another",
        ),
        (
            "win32",
            "'obs' backend: not found!\n'unitycapture' backend: not found!",
            "no virtual camera ('obs' backend: not found! 'unitycapture' backend: not found!);"
            " install OBS Studio, start its virtual camera once, then close OBS",
        ),
        (
            "darwin",
            "'obs' backend: not installed.",
            "no virtual camera ('obs' backend: not installed.);"
            " install OBS Studio, start its virtual camera once, then close OBS",
        ),
    ],
)
def test_a_missing_driver_is_one_line_for_each_system(
    platform: str, cause: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = types.SimpleNamespace(Camera=_refusing(cause), PixelFormat=pyvirtualcam.PixelFormat)
    monkeypatch.setitem(sys.modules, "pyvirtualcam", fake)
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(MediaError) as raised:
        VirtualCamera((48, 64), 30)
    assert str(raised.value) == line


def test_the_real_package_without_its_device() -> None:
    with pytest.raises(MediaError, match="virtual camera /no/such/device cannot be opened"):
        VirtualCamera((48, 64), 30, "/no/such/device")


def test_a_named_device_that_is_not_there(backends: list[Recording]) -> None:
    with pytest.raises(MediaError, match=r"virtual camera /dev/video9 cannot be opened .*; name another"):
        VirtualCamera((48, 64), 30, "/dev/video9")
    assert backends == []


# --- Fitting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (50, 50), (7, 500), (500, 7), (1, 1), (361, 640)])
@pytest.mark.parametrize("size", [(48, 64), (720, 1280), (64, 64)])
def test_letterboxing_keeps_the_aspect_and_fills_one_side(
    shape: tuple[int, int], size: tuple[int, int]
) -> None:
    boxed: Any = letterbox(np.full((*shape, 3), 255, np.uint8), size)
    assert boxed.shape == (*size, 3)
    assert boxed.flags.c_contiguous
    lit = boxed.all(axis=2)
    rows, columns = lit.any(axis=1), lit.any(axis=0)
    h, w = int(rows.sum()), int(columns.sum())
    assert lit.sum() == h * w  # one rectangle
    assert h == size[0] or w == size[1]
    wanted = min(size[0] / shape[0], size[1] / shape[1])
    assert h == pytest.approx(max(1, shape[0] * wanted), rel=0.01, abs=1)
    assert w == pytest.approx(max(1, shape[1] * wanted), rel=0.01, abs=1)
    for side in (rows, columns):  # centred
        assert abs(int(side.argmax()) - int(side[::-1].argmax())) <= 1


def test_a_fitting_frame_is_the_resized_one_without_bars() -> None:
    frame: Any = cv2.resize(FULL, (127, 96))
    assert letterbox(frame, (48, 64)).all()  # 1.323 by 1.333: less than one column is missing
