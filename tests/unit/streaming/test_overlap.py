"""Frames that a GPU runs while the next is made ready: the same results, in order, and none too late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support import fake_gpu
from support.handmade import write_handmade

pytest.importorskip("onnxruntime")

from std_rt.core.bundle import Bundle
from std_rt.evaluation.bench import sample_frame
from std_rt.pipeline.stylizer import Stylizer
from std_rt.streaming.frame_stream import GROUPED, ONE_BY_ONE, STREAM_BATCH, FramePacket, FrameStream
from std_rt.streaming.similarity import SimilarityFilter
from std_rt.streaming.temporal import TemporalFilter

SIZE = (32, 48)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    pytest.importorskip("onnx")
    return write_handmade(tmp_path_factory.mktemp("bundle") / "handmade")


@pytest.fixture
def gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stylizer, fake_gpu.FakeBackend]]:
    installed = fake_gpu.install(monkeypatch.setattr)
    with _stylizer(bundle, "rtx") as stylizer:
        yield stylizer, installed


def _stylizer(bundle: Bundle, backend: str) -> Stylizer:
    stylizer = Stylizer.load(bundle, backend=backend, size=SIZE, steps=2)
    stylizer.set_style(sample_frame(64, 64, seed=1))
    return stylizer


def _packets(count: int) -> list[FramePacket]:
    return [FramePacket(sample_frame(*SIZE, seed=seed), index=seed) for seed in range(count)]


@pytest.mark.parametrize("batching", [ONE_BY_ONE, GROUPED, STREAM_BATCH])
@pytest.mark.parametrize("temporal", ["off", "noise", "full"])
def test_results_are_those_of_a_processor(
    batching: str, temporal: str, bundle: Bundle, gpu: tuple[Stylizer, fake_gpu.FakeBackend]
) -> None:
    results = []
    with _stylizer(bundle, "onnxruntime") as on_cpu:
        for stylizer in (on_cpu, gpu[0]):
            stream = FrameStream(stylizer, batching=batching, temporal=TemporalFilter(temporal))
            packets = list(stream.run(_packets(7)))
            assert [packet.index for packet in packets] == list(range(7))
            results.append(np.stack([packet.styled for packet in packets if packet.styled is not None]))
    assert np.abs(results[0].astype(int) - results[1]).max() <= 1


def test_the_next_frame_is_submitted_before_the_last_is_waited_for(
    gpu: tuple[Stylizer, fake_gpu.FakeBackend],
) -> None:
    stylizer, installed = gpu
    list(FrameStream(stylizer).run(_packets(1)))
    log = installed.device.log
    log.clear()
    list(FrameStream(stylizer).run(_packets(4)))
    order = [name for name in log if name in ("launch", "wait")]
    assert order == ["launch", *["launch", "wait"] * 3, "wait"]


@pytest.mark.parametrize("batching", [ONE_BY_ONE, STREAM_BATCH])
def test_motion_is_followed_and_results_are_settled_while_the_gpu_runs(
    batching: str, gpu: tuple[Stylizer, fake_gpu.FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    stylizer, installed = gpu
    log = installed.device.log
    for name in ("follow", "settle"):
        monkeypatch.setattr(TemporalFilter, name, _logged(getattr(TemporalFilter, name), name, log))
    for _ in range(2):  # the first time engines are opened
        log.clear()
        list(FrameStream(stylizer, batching=batching, temporal=TemporalFilter("full")).run(_packets(6)))
    running, beside = 0, []
    for name in log:
        running = 0 if name == "synchronize" else running + (name == "launch") - (name == "wait")
        if name in ("follow", "settle"):
            beside.append((name, running))
    assert len(beside) == 12
    assert [name for name, running in beside if not running] == ["follow", "settle"]  # the first, the last


def _logged(method: Callable[..., Any], name: str, log: list[str]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        log.append(name)
        return method(*given, **named)

    return call


@pytest.mark.parametrize(("batching", "late"), [(ONE_BY_ONE, 0), (STREAM_BATCH, 1)])
def test_a_frame_is_not_held_back_for_one_that_is_not_there(
    batching: str, late: int, gpu: tuple[Stylizer, fake_gpu.FakeBackend]
) -> None:
    """A camera slower than the engines: every frame comes out before the next one is waited for."""
    entered = 0

    def camera() -> Iterator[FramePacket]:
        nonlocal entered
        for packet in _packets(4):
            entered += 1
            yield packet

    stream = FrameStream(gpu[0], batching=batching)
    found = [(entered, packet) for packet in stream.run(camera(), lambda: False)]
    assert [packet.index for _, packet in found] == [0, 1, 2, 3]
    assert [count for count, _ in found] == [min(i + 1 + late, 4) for i in range(4)]
    assert all(packet.stages_ms["frame"] > 0 for _, packet in found[: 4 - late])


def test_skipped_frames_stay_in_order(gpu: tuple[Stylizer, fake_gpu.FakeBackend]) -> None:
    stream = FrameStream(gpu[0], similarity=SimilarityFilter(0.98))
    first, second = _packets(2)
    packets = [FramePacket(each.frame, index=i) for i, each in enumerate([first, first, second, second])]
    found = list(stream.run(packets))
    assert [packet.index for packet in found] == [0, 1, 2, 3]
    for one, other in ((0, 1), (2, 3)):
        assert found[other].skipped
        np.testing.assert_array_equal(found[one].styled, found[other].styled)  # type: ignore[arg-type]


def test_two_streams_of_one_stylizer_get_their_own_frames(
    gpu: tuple[Stylizer, fake_gpu.FakeBackend],
) -> None:
    stylizer = gpu[0]
    expected = [packet.styled for packet in FrameStream(stylizer).run(_packets(6))]
    one, two = (FrameStream(stylizer).run(iter(_packets(6)[start:])) for start in (0, 3))
    for i in range(3):
        np.testing.assert_array_equal(next(one).styled, expected[i])  # type: ignore[arg-type]
        np.testing.assert_array_equal(next(two).styled, expected[i + 3])  # type: ignore[arg-type]
