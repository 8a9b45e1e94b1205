"""The runner of TensorRT and TensorRT-RTX on a GPU made of NumPy: order, addresses, capture, memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from support.fake_engine import FakeEngine, float_ports
from support.fake_gpu import FakeBuilder, FakeDevice, FakeTrt

from std_rt.core.bundle import CONTENT, INPAINTING
from std_rt.core.errors import BackendError
from std_rt.core.schedule import NoiseSchedule, trajectory_timesteps
from std_rt.engines.cache import EngineCache
from std_rt.engines.host import HostRunner
from std_rt.engines.hot_swap import HotSwapRunner
from std_rt.engines.program import Program, Runner, no_mark
from std_rt.engines.protocol import GraphSpec
from std_rt.engines.tensorrt.gpu_runner import GpuRunner, GpuSession, Kernels
from std_rt.engines.tensorrt.onnx_to_engine import RTX, TENSORRT
from std_rt.pipeline.denoise import Guidance
from std_rt.pipeline.program_builder import CONDITIONING, FrameNumbers, frame_program, graph_shapes
from std_rt.pipeline.stream_program import stream_program

CONDITION = {
    "encoder_hidden_states": (3, 5),
    "text_embeds": (6,),
    "time_ids": (6,),
    "style_tokens": (2, 4),
    "style_strength": (),
}
SIZE, CHANNELS = (16, 24), 3


def _encode(*, image: np.ndarray) -> dict[str, np.ndarray]:
    batch, channels, height, width = image.shape
    blocks = image.reshape(batch, channels, height // 8, 8, width // 8, 8)
    return {"latents": blocks.mean((3, 5), dtype=np.float32)}


def _decode(*, latents: np.ndarray) -> dict[str, np.ndarray]:
    return {"image": latents.repeat(8, 2).repeat(8, 3)}


def _unet(
    *, sample: np.ndarray, timestep: np.ndarray, style_strength: np.ndarray, **rest: np.ndarray
) -> dict[str, np.ndarray]:
    """Every input counts, each differently."""
    level = timestep * 1e-4 + style_strength * rest["style_tokens"].mean((1, 2))
    for i, name in enumerate(("encoder_hidden_states", "text_embeds", "time_ids")):
        level = level + (i + 1) * rest[name].reshape(len(sample), -1).mean(1)
    seen = sum((i + 1) * rest[name] / 9 for i, name in enumerate((*CONTENT, *INPAINTING)) if name in rest)
    return {"noise_pred": (sample / 2 + level[:, None, None, None] + seen).astype(np.float32)}


FUNCTIONS = {"vae_encoder": _encode, "unet": _unet, "vae_decoder": _decode}


def _program(
    mode: str = "none", batch: int = 1, seen: tuple[str, ...] = (), *, masked: bool = False
) -> Program:
    numbers = FrameNumbers(8, CHANNELS, CONDITION, seen)
    steps = NoiseSchedule.scaled_linear().coefficients(trajectory_timesteps(0.5, 2), 0.3)
    guidance = Guidance() if mode == "none" else Guidance(mode, 3.0)
    return frame_program(numbers, steps, "epsilon", SIZE, guidance, batch, masked=masked)


def _stream(mode: str = "none", steps: int = 4, seen: tuple[str, ...] = ()) -> Program:
    numbers = FrameNumbers(8, CHANNELS, CONDITION, seen)
    cs = NoiseSchedule.scaled_linear().coefficients(trajectory_timesteps(0.5, steps), 0.3)
    guidance = Guidance() if mode == "none" else Guidance(mode, 3.0)
    return stream_program(numbers, cs, "epsilon", SIZE, guidance)


def _feeds(program: Program, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {name: program.buffers[name][0] for name in program.feeds}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _frame(program: Program, seed: int = 0) -> np.ndarray:
    shape = program.buffers["frame"][0]
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _specs(program: Program, folder: Path) -> dict[str, GraphSpec]:
    path = folder / "graph.onnx"
    path.write_bytes(b"")
    return {name: GraphSpec(name, path, shapes, "b1") for name, shapes in graph_shapes(program).items()}


def _on_host(program: Program) -> HostRunner:
    engines = {}
    for launch in program.launches:
        if launch.graph in FUNCTIONS:
            inputs = float_ports(**{p: program.buffers[b][0] for p, b in launch.inputs.items()})
            outputs = float_ports(**{p: program.buffers[b][0] for p, b in launch.outputs.items()})
            engines[launch.graph] = FakeEngine(FUNCTIONS[launch.graph], inputs, outputs)
    return HostRunner(engines, program)


@dataclass
class Gpu:
    """Everything that stands in for hardware, over one cache."""

    device: FakeDevice
    trt: FakeTrt
    builder: FakeBuilder
    folder: Path
    sessions: list[GpuSession]

    def open(self, program: Program, precision: str = "auto") -> GpuRunner:
        specs = _specs(program, self.folder)
        self.trt.teach(program, specs, FUNCTIONS)
        self.device.bind()
        self.sessions.append(GpuSession(self.trt, self.device, self.builder))
        return self.sessions[-1].open_runner(program, specs, precision)


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    (tmp_path / "engines" / "locks").mkdir(parents=True)
    return EngineCache(tmp_path / "engines", b"s" * 32)


@pytest.fixture(params=["tensorrt", "rtx"])
def gpu(request: pytest.FixtureRequest, cache: EngineCache, tmp_path: Path) -> Gpu:
    product = RTX if request.param == "rtx" else TENSORRT
    device = FakeDevice()
    trt = FakeTrt(device, ahead=product.ahead)
    builder = FakeBuilder(trt, product, ("sm89",), driver=device.driver, cache=cache)
    return Gpu(device, trt, builder, tmp_path, [])


def _test_equal(runner: GpuRunner, program: Program, seed: int) -> None:
    feeds, frame = _feeds(program, seed), _frame(program, seed)
    host = _on_host(program)
    host.set(**feeds)
    runner.set(**feeds)
    np.testing.assert_array_equal(runner.run(frame), host.run(frame))


@pytest.mark.parametrize("mode", ["none", "full", "residual"])
@pytest.mark.parametrize("batch", [1, 2])
def test_frames_come_out_as_from_the_host(gpu: Gpu, mode: str, batch: int) -> None:
    program = _program(mode, batch)
    runner = gpu.open(program)
    for seed in range(3):
        _test_equal(runner, program, seed)


@pytest.mark.parametrize("seen", [(), CONTENT, INPAINTING])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_masks_and_what_a_unet_sees_reach_the_gpu(gpu: Gpu, seen: tuple[str, ...], mode: str) -> None:
    program = _program(mode, 2, seen, masked=True)
    assert "mask" in program.feeds
    runner = gpu.open(program)
    for seed in range(2):
        _test_equal(runner, program, seed)


@pytest.mark.parametrize("mode", ["none", "full", "residual"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_stream_comes_out_as_from_the_host_from_its_first_run_on(gpu: Gpu, mode: str, steps: int) -> None:
    """Device memory is no zeros by itself, and warm-ups are runs, of which none may leave anything."""
    program = _stream(mode, steps, CONTENT)
    runner, host = gpu.open(program), _on_host(program)
    assert not any(array.any() for array in runner.carried().values())
    for seed in range(6):
        feeds, frame = _feeds(program, seed), _frame(program, seed)
        runner.set(**feeds)
        host.set(**feeds)
        np.testing.assert_array_equal(runner.run(frame), host.run(frame))
        carried = runner.carried()
        assert carried.keys() == program.carried
        for name, array in host.carried().items():
            np.testing.assert_array_equal(carried[name], array)


def test_a_stream_goes_over_from_the_host_to_the_gpu(gpu: Gpu) -> None:
    program = _stream("residual")
    coming, said = Future[Runner](), list[str]()
    runner, host = HotSwapRunner(_on_host(program), coming, said.append), _on_host(program)
    for each in (runner, host):
        each.set(**_feeds(program))
    for seed in range(7):
        if seed == 3:
            coming.set_result(gpu.open(program))
        np.testing.assert_array_equal(runner.run(_frame(program, seed)), host.run(_frame(program, seed)))
    assert runner.switched
    assert len(said) == 1


def test_a_frame_is_one_launch_and_all_that_takes_long_is_done_before_the_runner_is_open(gpu: Gpu) -> None:
    program = _program()
    runner = gpu.open(program)
    order = [name for name in gpu.device.log if name in ("put", "drain", "capture", "launch")]
    pieces = len(program.launches) + 2  # with the frame's way in and out
    expected = [*["put"] * 3 * pieces, "drain", *["capture", *["put"] * pieces] * 2]  # a graph for each slot
    assert order[-len(expected) :] == expected
    runner.set(**_feeds(program))
    for seed in range(3):
        gpu.device.log.clear()
        runner.run(_frame(program, seed))
        assert gpu.device.log == ["launch", "record", "wait"]


def test_a_picture_returned_is_not_overwritten_by_the_next(gpu: Gpu) -> None:
    program = _program()
    runner = gpu.open(program)
    runner.set(**_feeds(program))
    first = runner.run(_frame(program))
    kept = first.copy()
    assert not np.array_equal(runner.run(_frame(program, 1)), kept)
    np.testing.assert_array_equal(first, kept)


def test_new_feeds_are_seen_without_a_new_capture_and_the_same_array_is_not_copied_again(gpu: Gpu) -> None:
    program = _program()
    runner = gpu.open(program)
    _test_equal(runner, program, 0)
    feeds = _feeds(program, 1)
    runner.set(**feeds)
    gpu.device.log.clear()
    runner.set(**feeds)
    assert "put" not in gpu.device.log
    _test_equal(runner, program, 1)
    assert "capture" not in gpu.device.log


def test_engines_of_equal_shapes_are_one_and_all_share_the_largest_working_memory(gpu: Gpu) -> None:
    program = _program("full")
    runner = gpu.open(program)
    kinds = {(x.graph, tuple(program.buffers[b][0] for b in x.inputs.values())) for x in program.launches}
    assert len(gpu.trt.contexts) == len(kinds) < len(program.launches)
    assert len({context.working for context in gpu.trt.contexts}) == 1
    runner.close()


def test_closing_gives_everything_back(gpu: Gpu) -> None:
    program = _program()
    runner = gpu.open(program)
    _test_equal(runner, program, 0)
    runner.close()
    runner.close()
    assert not gpu.device.memory
    assert not gpu.device.graphs
    assert not gpu.device.streams
    assert not gpu.device.pinned_arrays
    assert not gpu.device.events
    with pytest.raises(BackendError, match="was closed"):
        runner.run(_frame(program))


def test_too_little_memory_is_one_line_and_leaves_nothing_behind(gpu: Gpu) -> None:
    gpu.device = gpu.trt.device = FakeDevice(memory=9_000)
    with pytest.raises(BackendError, match="bytes free"):
        gpu.open(_program())
    assert not gpu.device.memory


def test_a_runner_opened_in_one_thread_runs_in_another(gpu: Gpu) -> None:
    program = _program()
    opened: list[GpuRunner] = []
    thread = threading.Thread(target=lambda: opened.append(gpu.open(program)))
    thread.start()
    thread.join()
    _test_equal(opened[0], program, 0)


def test_frames_go_piece_by_piece_with_a_warning_where_no_graph_can_hold_them(gpu: Gpu) -> None:
    program = _stream("residual")
    gpu.trt.capturable = False
    with pytest.warns(RuntimeWarning, match="'glue.frame_in' cannot be captured in a CUDA graph"):
        runner = gpu.open(program)
    host, feeds = _on_host(program), _feeds(program)
    runner.set(**feeds)
    host.set(**feeds)
    for seed in range(4):
        np.testing.assert_array_equal(runner.run(_frame(program, seed)), host.run(_frame(program, seed)))
    assert "capture" not in gpu.device.log


def test_a_capture_that_the_driver_refuses_leaves_a_slower_runner_not_none(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some products cannot say beforehand; here the second slot is refused."""
    program, capture, captured = _stream("residual"), FakeDevice.capture, []

    def second_fails(self: FakeDevice, stream: int, record: Callable[[], None]) -> int:
        if captured:
            raise BackendError("the GPU refused cuStreamEndCapture")
        captured.append(capture(self, stream, record))
        return captured[0]

    monkeypatch.setattr(FakeDevice, "capture", second_fails)
    with pytest.warns(
        RuntimeWarning, match=r"captured in a CUDA graph \(the GPU refused .*\), so frames run"
    ):
        runner = gpu.open(program)
    assert not runner.captured
    assert not gpu.device.graphs
    monkeypatch.undo()
    _test_equal(runner, program, 0)
    runner.close()


def test_kernels_are_stored_once_however_often_an_engine_runs() -> None:
    asked: list[bool] = []
    cache = SimpleNamespace(serialize=lambda: asked.append(True) or b"kernels")
    stored: list[bytes] = []
    store = SimpleNamespace(build=lambda key, data, **_: stored.append(data))
    builder = SimpleNamespace(cache=store, kernels_key=lambda *_: "key")
    spec, device = SimpleNamespace(path=Path("unet.onnx")), SimpleNamespace(driver="")
    kernels = Kernels(*cast(Any, (builder, spec, cache, device, b"")))
    kernels.keep()
    kernels.keep()
    assert (asked, stored) == ([True], [b"kernels"])


@pytest.mark.parametrize("twice", [False, True])
def test_frames_on_their_way_keep_the_feeds_they_were_submitted_with(gpu: Gpu, twice: bool) -> None:
    """Two frames in flight, and feeds that change before each, also twice: what `run` gives one by one."""
    program = _stream("residual")
    runner, host = gpu.open(program), _on_host(program)
    given = [_feeds(program, seed) for seed in range(6)]
    expected = []
    for seed, feeds in enumerate(given):
        host.set(**feeds)
        expected.append(host.run(_frame(program, seed)))
    found = []
    for seed, feeds in enumerate(given):
        if twice:
            runner.set(**{name: array + 1 for name, array in feeds.items()})
        runner.set(**feeds)
        found.append(runner.submit(_frame(program, seed)))
    assert gpu.device.log.count("wait") == len(given) - 2  # the last two are still on their way
    runner.set(**given[0])
    np.testing.assert_array_equal(np.stack([collect(no_mark) for collect in found]), np.stack(expected))


def test_frames_on_their_way_are_not_lost_when_a_runner_is_closed(gpu: Gpu) -> None:
    program = _program()
    runner, host = gpu.open(program), _on_host(program)
    runner.set(**_feeds(program))
    host.set(**_feeds(program))
    collect = runner.submit(_frame(program))
    runner.close()
    np.testing.assert_array_equal(collect(no_mark), host.run(_frame(program)))


def _steps_program(steps: int) -> Program:
    numbers = FrameNumbers(8, CHANNELS, CONDITION)
    cs = NoiseSchedule.scaled_linear().coefficients(trajectory_timesteps(0.5, steps))
    return frame_program(numbers, cs, "epsilon", SIZE, Guidance())


def test_another_number_of_steps_reads_no_engine_again_and_has_addresses_of_its_own(gpu: Gpu) -> None:
    two, four = _steps_program(2), _steps_program(4)
    specs = _specs(two, gpu.folder)
    gpu.trt.teach(two, specs, FUNCTIONS)
    gpu.device.bind()
    session = GpuSession(gpu.trt, gpu.device, gpu.builder)
    first = session.open_runner(two, specs)
    engines = list(gpu.trt.read)
    second = session.open_runner(four, specs)
    assert gpu.trt.read == engines
    for seed in range(2):
        _test_equal(first, two, seed)
        _test_equal(second, four, seed)
    first.close()
    _test_equal(second, four, 5)  # its engines are still there
    second.close()
    assert not gpu.device.memory
    session.open_runner(two, specs).close()
    assert gpu.trt.read == engines * 2  # nobody had them any more


def test_a_capture_in_the_middle_of_another_programs_stream_loses_nothing(gpu: Gpu) -> None:
    """As when a quality is opened, in a thread of its own, while frames run."""
    program, other = _stream("residual"), _steps_program(2)
    runner, host, feeds = gpu.open(program), _on_host(program), _feeds(program)
    runner.set(**feeds)
    host.set(**feeds)
    opened: list[GpuRunner] = []
    for seed in range(6):
        collect = runner.submit(_frame(program, seed))
        if seed in (1, 3):
            opening = threading.Thread(target=lambda: opened.append(gpu.open(other)))
            opening.start()
            opening.join()
            _test_equal(opened[-1], other, seed)
        if seed == 4:
            opened[0].close()
        np.testing.assert_array_equal(collect(no_mark), host.run(_frame(program, seed)))
    _test_equal(opened[1], other, 9)


def test_engines_are_built_once_and_then_come_from_the_store(gpu: Gpu) -> None:
    program = _program()
    gpu.open(program).close()
    assert sorted(set(gpu.builder.made)) == sorted(gpu.builder.made)
    assert {"unet", "vae_encoder", "vae_decoder", "glue.frame_in"} <= set(gpu.builder.made)
    gpu.builder.made = []
    gpu.open(program).close()
    assert gpu.builder.made == []


def test_a_changed_engine_is_not_loaded(gpu: Gpu, cache: EngineCache) -> None:
    program = _program()
    gpu.open(program).close()
    path = cache.find(gpu.builder.key(_specs(program, gpu.folder)["unet"]))
    assert path is not None
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BackendError, match=r"'unet' is not used: .* has changed .*; run: std-rt engines gc"):
        gpu.open(program)


def test_an_engine_that_does_not_load_is_one_line(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBuilder, "_make", lambda self, spec, path: path.write_bytes(b"?"))
    with pytest.raises(BackendError, match=r"'glue.frame_in' does not load: not an engine; run: std-rt"):
        gpu.open(_program())


def test_kernels_compiled_here_are_kept_for_the_next_start(gpu: Gpu) -> None:
    program = _program()
    runner = gpu.open(program)
    _test_equal(runner, program, 0)
    runner.close()
    assert (gpu.trt.compiled > 0) is gpu.builder.product.ahead
    gpu.trt.compiled = 0
    gpu.open(program).close()
    assert gpu.trt.compiled == 0


def test_an_engine_for_another_gpu_is_refused_where_the_product_can_tell(gpu: Gpu) -> None:
    gpu.trt.invalid = True
    if not gpu.builder.product.ahead:
        pytest.skip("TensorRT does not say")
    with pytest.raises(BackendError, match=r"is not for this machine \(\['WRONG_GPU'\]\)"):
        gpu.open(_program())


def test_engines_whose_ports_are_not_the_frames_are_refused(gpu: Gpu) -> None:
    program = _program()
    specs = _specs(program, gpu.folder)
    gpu.trt.teach(program, specs, FUNCTIONS)
    ports = float_ports(latents=(1, CHANNELS, 9, 9))
    gpu.trt.know(specs["vae_decoder"], _decode, ports, float_ports(image=(1, CHANNELS, *SIZE)))
    gpu.device.bind()
    with pytest.raises(BackendError, match=r"engine of 'vae_decoder' takes latents float32 \[1, 3, 9, 9\]"):
        GpuSession(gpu.trt, gpu.device, gpu.builder).open_runner(program, specs)


def test_wrong_frames_and_feeds_are_refused(gpu: Gpu) -> None:
    program = _program()
    runner = gpu.open(program)
    with pytest.raises(BackendError, match=r"set .* before the first frame"):
        runner.run(_frame(program))
    runner.set(**_feeds(program))
    with pytest.raises(BackendError, match=r"the program takes frames uint8 \[1, 16, 24, 3\]"):
        runner.run(_frame(program)[:, :8])
    with pytest.raises(BackendError, match="there is no buffer 'image' to set"):
        runner.set(image=np.zeros((1, 3, *SIZE), np.float32))


def test_a_precision_that_the_graphs_are_not_written_in_is_refused(gpu: Gpu) -> None:
    assert gpu.open(_program(), "fp32").precision == "fp32"
    with pytest.raises(BackendError, match=r"computes in fp32.*export it again with --precision bf16"):
        gpu.open(_program(), "bf16")


def test_one_graph_alone_gives_what_its_function_gives(gpu: Gpu, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"")
    spec = replace(GraphSpec("vae_decoder", path, {"latents": (1, 3, 2, 3)}, "b1"), compute="fp16")
    gpu.trt.know(spec, _decode, float_ports(latents=(1, 3, 2, 3)), float_ports(image=(1, 3, 16, 24)))
    gpu.device.bind()
    engine = GpuSession(gpu.trt, gpu.device, gpu.builder).open_graph(spec)
    assert engine.precision == "fp16"
    latents = np.random.default_rng(0).standard_normal((1, 3, 2, 3), np.float32)
    transposed = np.ascontiguousarray(latents.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    for given in (latents, transposed):  # memory in another order is another matter than other values
        np.testing.assert_array_equal(engine(latents=given)["image"], _decode(latents=latents)["image"])
    with pytest.raises(BackendError, match="takes latents as float32"):
        engine(latents=latents[:, :, :1])
    engine.close()
    assert not gpu.device.memory
    with pytest.raises(BackendError, match="was closed"):
        engine(latents=latents)


def test_outputs_that_nobody_reads_have_a_place_all_the_same(gpu: Gpu) -> None:
    program = _program()
    specs = _specs(program, gpu.folder)
    gpu.trt.teach(program, specs, FUNCTIONS)

    def with_extra(*, image: np.ndarray) -> Mapping[str, Any]:
        return {**_encode(image=image), "extra": np.ones((1, 7), np.float32)}

    inputs = float_ports(image=(1, CHANNELS, *SIZE))
    gpu.trt.know(specs["vae_encoder"], with_extra, inputs, float_ports(latents=(1, 3, 2, 3), extra=(1, 7)))
    gpu.device.bind()
    runner = GpuSession(gpu.trt, gpu.device, gpu.builder).open_runner(program, specs)
    _test_equal(runner, program, 0)


def test_the_fake_sees_every_conditioning() -> None:
    """Guards the tests above: a feed that the made-up UNet ignored could go wrong unseen."""
    program = _program()
    frame, feeds = _frame(program), _feeds(program)
    runner = _on_host(program)
    runner.set(**feeds)
    before = runner.run(frame)
    for name in CONDITIONING:
        runner.set(**feeds | {name: feeds[name] + 1})
        assert not np.array_equal(runner.run(frame), before), name
