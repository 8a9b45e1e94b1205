"""The cuda backend without a GPU: what it asks ONNX Runtime for, and what it says where that fails."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import onnxruntime as ort

from std_rt.core.errors import BackendError
from std_rt.engines import GraphSpec, open_engine
from std_rt.engines.glue import glue_path
from std_rt.engines.gpu import libraries
from std_rt.engines.gpu.probe import probe
from std_rt.engines.host import HostRunner
from std_rt.engines.onnxruntime import cuda
from std_rt.engines.onnxruntime.io_binding import OrtRunner
from std_rt.engines.onnxruntime.ort_session import CPU, open_session
from std_rt.engines.program import FRAME, STYLED, Launch, Program
from std_rt.engines.shared import Shared

NO_CUDA = "CUDAExecutionProvider" not in ort.get_available_providers()
SHAPE = (1, 8, 8, 3)


@pytest.fixture(autouse=True)
def _loaded_anew() -> Iterator[None]:
    cuda._load_libraries.cache_clear()
    yield
    cuda._load_libraries.cache_clear()


def spec(name: str = "unet", compute: str = "fp32") -> GraphSpec:
    """A graph that doubles a batch, under a model's name."""
    return GraphSpec(name, glue_path("double"), {"x": (1, 3, 8, 8)}, key="", compute=compute)


def program() -> Program:
    """In, through the "UNet", out; the UNet twice, so that it has two sets of addresses."""
    shapes = {FRAME: SHAPE, "image": (1, 3, 8, 8), "a": (2, 3, 8, 8), "b": (2, 3, 8, 8)}
    shapes |= {"c": (1, 3, 8, 8), "d": (1, 3, 8, 8), STYLED: SHAPE}
    kinds = {FRAME: np.uint8, STYLED: np.uint8}
    buffers = {k: (v, np.dtype(kinds.get(k, np.float32))) for k, v in shapes.items()}
    launches = (
        Launch("frame_in", {"frame": FRAME}, {"image": "image"}, "convert"),
        Launch("unet", {"x": "image"}, {"out": "a"}, "unet"),
        Launch("halves", {"x": "a"}, {"first": "c", "second": "d"}, "scheduler"),
        Launch("unet", {"x": "d"}, {"out": "b"}, "unet"),
        Launch("halves", {"x": "b"}, {"first": "c", "second": "d"}, "scheduler"),
        Launch("frame_out", {"image": "d"}, {"frame": STYLED}, "convert"),
    )
    return Program(launches, buffers)


@pytest.mark.skipif(not NO_CUDA, reason="this onnxruntime has CUDA")
def test_a_build_without_cuda_is_one_line_with_the_command() -> None:
    for call in (
        lambda: cuda.open_graph(spec(), "auto"),
        lambda: cuda.open_runner(program(), {"unet": spec()}, "auto"),
    ):
        with pytest.raises(BackendError, match=r"no CUDA provider; run: pip .*'\.\[cuda\]'"):
            call()


def test_a_provider_that_is_dropped_in_silence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime goes on with the CPU where CUDA's libraries are missing."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudnn.so.9"))
    on_cpu = lambda spec, *_: open_session(spec, CPU)  # noqa: E731
    monkeypatch.setattr(cuda, "open_session", on_cpu)
    with pytest.raises(
        BackendError, match=r"cannot load its CUDA provider: Failed to load libcudnn.so.9; run"
    ):
        cuda.open_graph(spec(), "auto")


def test_a_provider_that_does_not_load_is_told_in_the_systems_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All libraries are found, but the provider itself, here two bytes long, is refused by the loader."""
    (tmp_path / "capi").mkdir()
    for name in ("shared", "cuda"):
        (tmp_path / "capi" / f"libonnxruntime_providers_{name}.so").write_bytes(b"no")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(libraries, "find_spec", lambda name: found if name == "onnxruntime" else None)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(cuda, "open_session", lambda spec, *_: open_session(spec, CPU))
    with pytest.raises(BackendError, match=r"cannot load its CUDA provider: (?!it loads).+; run: "):
        cuda.open_graph(spec(), "auto")
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").unlink()
    monkeypatch.setattr(libraries.ctypes, "CDLL", lambda *_, **__: None)
    with pytest.raises(BackendError, match="onnxruntime has no file of its provider 'cuda'; run: "):
        cuda.open_graph(spec(), "auto")
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"")
    with pytest.raises(BackendError, match="it loads but does not start; std-rt doctor --gpu"):
        cuda.open_graph(spec(), "auto")


def test_what_onnx_runtime_prints_about_libraries_stays_off_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudnn.so.9"))
    assert cuda._load_libraries() == "Failed to load libcudnn.so.9"
    assert capsys.readouterr().out == ""


def test_opening_in_two_threads_at_once_leaves_stdout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a style encoder and a program are opened together: output was lost for good in half of the cases."""
    inside: list[object] = []
    second, first_left = Event(), Event()

    def preload() -> None:
        """The first to enter leaves first, with the second inside."""
        inside.append(sys.stdout)
        if len(inside) == 1:
            second.wait(0.5)  # in vain, where one enters at a time
            first_left.set()
        else:
            second.set()
            first_left.wait(0.5)
            time.sleep(0.2)  # until the first is out of its block too

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", preload)
    monkeypatch.setattr(cuda, "open_session", lambda spec, *_: open_session(spec, CPU))
    before = sys.stdout

    def fails(open_it: Callable[[], object]) -> None:
        with suppress(BackendError):
            open_it()

    ways = (
        lambda: cuda.open_graph(spec(), "auto"),
        lambda: cuda.open_runner(program(), {"unet": spec()}, "auto"),
    )
    threads = [Thread(target=fails, args=(way,)) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside
    assert sys.stdout is before


@pytest.mark.parametrize(
    ("compute", "precision", "words"),
    [
        ("bf16", "auto", "does not compute bf16: .*--precision fp16"),
        ("fp32", "bf16", "does not compute bf16"),
        ("fp16", "fp32", "was exported in fp16, onnxruntime cannot run it in fp32; use --precision auto"),
    ],
)
def test_a_precision_that_it_cannot_do_is_refused(compute: str, precision: str, words: str) -> None:
    for call in (
        lambda: cuda.open_graph(spec(compute=compute), precision),
        lambda: cuda.open_runner(program(), {"unet": spec(compute=compute)}, precision),
    ):
        with pytest.raises(BackendError, match=words):
            call()


def test_fp32_asked_for_by_name_is_fp32() -> None:
    assert cuda.provider_options("fp32", capture=False)["use_tf32"] == "0"
    assert cuda.provider_options("auto", capture=False)["use_tf32"] == "1"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Sessions and buffers are the CPU's; what was asked for is kept as (graph, with CUDA graph)."""
    asked: list[tuple[str, bool]] = []

    def on_cpu(spec: GraphSpec, precision: str, graph: object, *, capture: bool) -> object:
        asked.append((spec.name, capture))
        return open_session(spec, CPU)

    monkeypatch.setattr(cuda, "_open", on_cpu)
    monkeypatch.setattr(cuda, "_load_libraries", lambda: "")
    monkeypatch.setattr(cuda, "_SESSIONS", Shared[ort.InferenceSession](lambda session: None))

    class OnCpu(cuda.CudaRunner):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "device": "cpu"})

    monkeypatch.setattr(cuda, "CudaRunner", OnCpu)
    return asked


def test_the_models_graphs_are_captured_once_for_each_set_of_addresses(
    opened: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = []

    class Options(ort.RunOptions):  # type: ignore[misc]
        def add_run_config_entry(self, key: str, value: str) -> None:
            numbers.append(int(value))
            assert key == "gpu_graph_id"

    monkeypatch.setattr(ort, "RunOptions", Options)
    cuda.open_runner(program(), {"unet": spec()}, "auto")
    assert opened == [
        ("glue.frame_in", False),
        ("unet", True),
        ("glue.halves", False),
        ("glue.frame_out", False),
    ]
    assert numbers[0] == -1  # the warm-up, which must not be captured
    assert 0 < numbers[1] < numbers[2]
    before = list(opened)
    cuda.open_runner(program(), {"unet": spec()}, "auto")  # another program of these graphs
    assert opened == before
    assert len(set(numbers)) == len(numbers) == 5


def test_a_session_goes_with_its_last_program(opened: list[tuple[str, bool]]) -> None:
    runners = [cuda.open_runner(program(), {"unet": spec()}, "auto") for _ in range(2)]
    count = len(opened)
    for runner in runners:
        runner.close()
    cuda.open_runner(program(), {"unet": spec()}, "auto")
    assert len(opened) == 2 * count


def test_nothing_is_allocated_while_a_frame_is_captured_and_replays_do_not_wait(
    opened: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime captures in CUDA's global mode, which an allocation in any other thread spoils."""
    runner = cuda.open_runner(program(), {"unet": spec()}, "auto")
    frame = np.zeros(SHAPE, np.uint8)
    opening, allocated = Event(), Event()
    found = []

    def slow(self: OrtRunner, frame: np.ndarray, mark: Any) -> np.ndarray:
        opening.set()
        found.append(allocated.wait(30 if found else 0.3))  # the first time in vain
        return frame

    def allocating() -> None:
        opening.wait(30)
        cuda.open_graph(spec("style_encoder"), "auto")
        allocated.set()

    monkeypatch.setattr(OrtRunner, "run", slow)
    for _ in range(2):
        thread = Thread(target=allocating)
        thread.start()
        runner.run(frame)
        thread.join()
        opening.clear()
        allocated.clear()
    assert found == [False, True]

    def elsewhere() -> None:
        runner.run(frame)  # ONNX Runtime keeps a graph for each thread, but runs are in one

    threads = [Thread(target=allocating), Thread(target=elsewhere)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[2] is True


def fed_program() -> Program:
    """Its picture is that of a feed, doubled."""
    whole = program()
    launches = (
        whole.launches[0],
        Launch("unet", {"x": "given"}, {"out": "a"}, "unet"),
        whole.launches[2],
        whole.launches[5],
    )
    buffers = {name: port for name, port in whole.buffers.items() if name != "b"}
    return Program(launches, {**buffers, "given": buffers["image"]})


def test_the_host_goes_on_while_a_frame_runs_and_frames_keep_their_feeds(
    opened: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = cuda.open_runner(fed_program(), {"unet": spec()}, "auto")
    host = HostRunner({"unet": open_engine("onnxruntime", spec())}, fed_program())
    rng, go = np.random.default_rng(0), Event()
    run, frame, expected, collects, told = OrtRunner.run, np.zeros(SHAPE, np.uint8), [], [], []

    def slow(self: OrtRunner, frame: np.ndarray, mark: Any) -> np.ndarray:
        assert go.wait(10), "the host waits for the GPU"
        return run(self, frame, mark)

    monkeypatch.setattr(OrtRunner, "run", slow)
    with pytest.raises(BackendError, match="given"):
        runner.submit(frame)
    for _ in range(3):
        given = rng.uniform(-1, 1, (1, 3, 8, 8)).astype(np.float32)
        host.set(given=given)
        expected.append(host.run(frame))
        runner.set(given=given)
        collects.append(runner.submit(frame))
    go.set()
    for collect, wanted in zip(collects, expected, strict=True):
        np.testing.assert_array_equal(collect(told.append), wanted)
    assert told == ["frame"] * 3
    runner.close()
    for call in (lambda: runner.submit(frame), lambda: runner.run(frame), lambda: runner.set(given=given)):
        with pytest.raises(BackendError, match="was closed"):
            call()


def test_an_engine_beside_frames_waits_for_a_capture(opened: list[tuple[str, bool]]) -> None:
    engine = cuda.open_graph(spec("style_encoder"), "auto")
    done = Event()

    def call() -> None:
        engine(x=np.ones((1, 3, 8, 8), np.float32))
        done.set()

    with cuda._ALLOCATING:
        thread = Thread(target=call)
        thread.start()
        assert not done.wait(0.1)
    thread.join()
    assert done.is_set()


def test_libraries_that_are_missing_are_named_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(cuda, "missing_libraries", lambda: ["libcublas.so.13", "libcudnn.so.9"])
    for call in (
        lambda: cuda.open_graph(spec(), "auto"),
        lambda: cuda.open_runner(program(), {"unet": spec()}, "auto"),
    ):
        with pytest.raises(BackendError, match=r"does not find libcublas.so.13, libcudnn.so.9; run: pip"):
            call()


def test_the_runner_computes_and_names_the_unets_precision(opened: list[tuple[str, bool]]) -> None:
    unet = spec(compute="fp16")
    runner = cuda.open_runner(program(), {"unet": unet}, "auto")
    assert runner.precision == "fp16"
    frame = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    host = HostRunner({"unet": open_engine("onnxruntime", replace(unet, compute="fp32"))}, program())
    assert np.array_equal(runner.run(frame), host.run(frame))
    assert opened


def test_a_graph_that_cannot_be_captured_runs_as_it_is_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def choosy(spec: GraphSpec, precision: str, graph: object, *, capture: bool) -> object:
        if capture:
            raise BackendError(reason)
        return open_session(spec, CPU)

    reason = "this session cannot use the graph capture feature as nodes are left to the CPU"

    monkeypatch.setattr(cuda, "_open", choosy)
    with caplog.at_level(logging.WARNING):
        assert cuda._open_captured(spec(), "auto") is not None
    assert f"'unet' runs without a CUDA graph, so much slower: {reason}" in caplog.text
    reason = "out of memory"  # nor would it fit without
    with pytest.raises(BackendError, match="out of memory"):
        cuda._open_captured(spec(), "auto")


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA or probe().problem is not None, reason="needs onnxruntime-gpu and a GPU")
def test_on_a_gpu_a_program_gives_what_the_host_gives() -> None:
    runner = cuda.open_runner(program(), {"unet": spec()}, "fp32")
    host = HostRunner({"unet": open_engine("onnxruntime", spec())}, program())
    rng = np.random.default_rng(0)
    for _ in range(4):  # the second and later ones are replayed
        frame = rng.integers(0, 256, SHAPE, np.uint8)
        assert np.array_equal(runner.run(frame), host.run(frame))
