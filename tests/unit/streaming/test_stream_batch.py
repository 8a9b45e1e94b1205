"""Stream batch against frames one by one: the same pictures, on real backends and real networks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.fake_backend import Backend
from support.handmade import write_handmade

from std_rt import State, Stylizer
from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import BackendError, UsageError
from std_rt.core.schedule import NoiseSchedule
from std_rt.engines import GraphSpec
from std_rt.engines.host import HostRunner
from std_rt.engines.program import Program
from std_rt.pipeline.openers import Openers
from std_rt.pipeline.runner_cache import Quality
from std_rt.streaming.stream_batch import StreamBatch

MODES = ("none", "full", "residual")
SIZE = (64, 96)


@pytest.fixture(scope="module")
def stochastic(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The handmade bundle with noise at every step but the last, and a negative."""
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("stochastic") / "stochastic"
    return write_handmade(folder, gamma=0.5, guidance=("full", 3.0), negative=-0.4)


def noisy(bundle: Bundle, gamma: float) -> Bundle:
    """The bundle with stochastic steps; its graphs stay as they are."""
    manifest = copy.deepcopy(bundle.manifest)
    betas = np.array(manifest["schedule"]["betas"])
    schedule = NoiseSchedule(np.cumprod(1 - betas))
    for entry in manifest["schedule"]["steps"].values():
        rows = schedule.coefficients(entry["timesteps"], gamma)
        entry["coefficients"] = [[c.alpha_t, c.sigma_t, c.alpha_s, c.sigma_s, c.noise] for c in rows]
    return Bundle(bundle.path, manifest)


class Clip:
    """Frames, each with noise and style of its own; the style changes after every second frame."""

    def __init__(self, stylizer: Stylizer, level: Quality, count: int) -> None:
        rng = np.random.default_rng(level.steps)
        smooth = rng.integers(0, 256, (count, 4, 6, 3), np.uint8)
        self.frames = [one.repeat(level.size[0] // 4, 0).repeat(level.size[1] // 6, 1) for one in smooth]
        self.states = [stylizer.state_for(level, seed=i) for i in range(count)]
        pictures = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
        self.styles = [stylizer.encode_style(pictures[i // 2]) for i in range(count)]

    def one_by_one(self, stylizer: Stylizer, level: Quality) -> list[np.ndarray]:
        styled = []
        for frame, state, style in self:
            stylizer.use_style(style)
            styled.append(stylizer.run(frame, state, quality=level))
        return styled

    def batched(self, stylizer: Stylizer, level: Quality) -> list[np.ndarray]:
        batch, styled = StreamBatch(stylizer, level), []
        for i, (frame, state, style) in enumerate(self):
            stylizer.use_style(style)
            found = batch.push(frame, state)
            assert len(found) == (i >= len(stylizer.bundle.coefficients(level.steps)) - 1)
            styled += found
        styled += batch.flush()
        assert batch.inside == 0
        return styled

    def __iter__(self) -> Iterator[tuple[np.ndarray, State, Any]]:
        return zip(self.frames, self.states, self.styles, strict=True)


def assert_equal(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """A network of another batch may add in another order, so a few pixels may be off by 1."""
    assert len({frame.tobytes() for frame in wanted}) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
        assert (one != other).mean() < 1e-3


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("mode", MODES)
def test_on_the_handmade_bundle(stochastic: Bundle, backend: str, mode: str) -> None:
    pytest.importorskip(backend)
    with Stylizer.load(stochastic, backend=backend, precision="fp32", guidance_mode=mode) as stylizer:
        for steps in (1, 2, 4):
            level = Quality(SIZE, steps)
            clip = Clip(stylizer, level, steps + 3)
            assert_equal(clip.batched(stylizer, level), clip.one_by_one(stylizer, level))


@pytest.mark.parametrize(
    ("mode", "gamma", "steps", "backend"),
    [
        ("none", 0.0, (1, 2, 4), "onnxruntime"),
        ("full", 0.4, (4,), "onnxruntime"),
        ("residual", 0.4, (4,), "openvino"),
    ],
)
def test_on_the_built_in_model(mode: str, gamma: float, steps: tuple[int, ...], backend: str) -> None:
    """Real networks; every combination of mode, gamma and steps is in test_stream_program."""
    pytest.importorskip(backend)
    bundle = load_bundle(verify=False)
    guidance: dict[str, Any] = {"guidance": 2.0, "guidance_mode": mode} if mode != "none" else {}
    bundle = noisy(bundle, gamma) if gamma else bundle
    with Stylizer.load(bundle, backend=backend, precision="fp32", **guidance) as stylizer:
        for count in steps:
            level = Quality(SIZE, count)
            clip = Clip(stylizer, level, 3)
            assert_equal(clip.batched(stylizer, level), clip.one_by_one(stylizer, level))


class Recorder(HostRunner):
    """Remembers what it was fed, and fails when told."""

    def __init__(self, engines: Any, program: Program) -> None:
        super().__init__(engines, program)
        self.fed: list[set[str]] = []
        self.broken = False

    def set(self, **feeds: Any) -> None:
        self.fed.append(set(feeds))
        super().set(**feeds)

    def run(self, *args: Any) -> Any:
        if self.broken:
            raise BackendError("the engine gave up")
        return super().run(*args)


class Bench:
    """The stochastic bundle on NumPy, its runners, a few frames, and what they become one by one."""

    def __init__(self, bundle: Bundle) -> None:
        backend = Backend(lambda sample, style_tokens, **_: 0.5 * sample + 0.1 * mean(style_tokens))
        self.runners: list[Recorder] = []

        def opener(program: Program, specs: dict[str, GraphSpec]) -> Recorder:
            self.runners.append(Recorder({name: backend(spec) for name, spec in specs.items()}, program))
            return self.runners[-1]

        self.stylizer = Stylizer(bundle, Openers(backend, backend, opener), guidance_mode="none")
        self.stylizer.set_style(np.full((32, 32, 3), 200, np.uint8))
        self.frames = [np.full((64, 64, 3), level, np.uint8) for level in range(60, 180, 10)]
        self.state = self.stylizer.state_for((64, 64), seed=1)
        self.wanted = [self.stylizer.run(frame, self.state) for frame in self.frames]


def mean(style_tokens: np.ndarray) -> np.ndarray:
    return style_tokens.mean((1, 2))[:, None, None, None]


@pytest.fixture
def bench(stochastic: Bundle) -> Iterator[Bench]:
    made = Bench(stochastic)
    with made.stylizer:
        yield made


def assert_are(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_flushed_it_is_empty_and_can_be_used_again(bench: Bench, count: int) -> None:
    batch = StreamBatch(bench.stylizer, (64, 64))
    for _ in range(2):
        styled = [frame for pushed in bench.frames[:count] for frame in batch.push(pushed, bench.state)]
        assert batch.inside == min(count, 3)
        styled += batch.flush()
        assert_are(styled, bench.wanted[:count])
        assert batch.inside == 0
        assert list(batch.flush()) == []


def test_frames_pushed_in_the_middle_of_a_flush_come_out_in_order(bench: Bench) -> None:
    batch, styled = StreamBatch(bench.stylizer, (64, 64)), []
    for frame in bench.frames[:3]:
        batch.push(frame, bench.state)
    styled.append(next(batch.flush()))
    for frame in bench.frames[3:5]:
        styled += batch.push(frame, bench.state)
    styled += batch.flush()
    assert_are(styled, bench.wanted[:5])


def test_one_step_has_no_latency(bench: Bench) -> None:
    level = Quality((64, 64), 1)
    state = bench.stylizer.state_for(level, seed=1)
    batch = StreamBatch(bench.stylizer, level)
    (found,) = batch.push(bench.frames[0], state)
    np.testing.assert_array_equal(found, bench.stylizer.run(bench.frames[0], state, quality=level))
    assert (batch.inside, list(batch.flush())) == (0, [])


def test_nothing_is_fed_again_while_style_and_noise_stay(bench: Bench) -> None:
    batch = StreamBatch(bench.stylizer, (64, 64))
    for frame in bench.frames[:6]:
        batch.push(frame, bench.state)
    list(batch.flush())
    runner = bench.runners[-1]
    assert len(runner.fed) == 1
    bench.stylizer.set_style(np.full((32, 32, 3), 20, np.uint8))
    for frame in bench.frames[:9]:
        batch.push(frame, bench.state)
    assert len(runner.fed) == 2  # it was empty: no frame is left that was told the old style
    bench.stylizer.set_style(np.full((32, 32, 3), 200, np.uint8))
    for frame in bench.frames[:9]:
        batch.push(frame, bench.state)
    assert len(runner.fed) == 2 + 4  # one frame after the other leaves with the style it came with
    assert all("style_tokens" in fed and "encoder_hidden_states" not in fed for fed in runner.fed[2:])


def test_what_does_not_fit_is_refused_and_costs_no_frame_inside(bench: Bench) -> None:
    batch = StreamBatch(bench.stylizer, (64, 64))
    for frame in bench.frames[:3]:
        batch.push(frame, bench.state)
    with pytest.raises(
        UsageError, match=r"the frame is 32 x 64 px instead of 64 x 64; use fit\(frame\) first"
    ):
        batch.push(bench.frames[0][:32], bench.state)
    with pytest.raises(UsageError, match=r"noise \[4, 3, 4, 8\] instead of \[4, 3, 8, 8\]"):
        batch.push(bench.frames[0], bench.stylizer.state_for((32, 64)))
    with pytest.raises(UsageError, match=r"noise \[1, 3, 8, 8\] instead of \[4, 3, 8, 8\]; use state_for"):
        batch.push(bench.frames[0], bench.stylizer.state_for(Quality((64, 64), 1)))
    assert_are(list(batch.flush()), bench.wanted[:3])


def test_after_an_error_of_the_engines_it_fills_again(bench: Bench) -> None:
    batch = StreamBatch(bench.stylizer, (64, 64))
    batch.push(bench.frames[0], bench.state)
    bench.runners[-1].broken = True
    with pytest.raises(BackendError, match="gave up"):
        batch.push(bench.frames[1], bench.state)
    bench.runners[-1].broken = False
    assert batch.inside == 0
    found = [batch.push(frame, bench.state) for frame in bench.frames[2:7]]
    assert found[:3] == [[]] * 3
    assert_are([*(frame for (frame,) in found[3:]), *batch.flush()], bench.wanted[2:7])


def test_frames_that_are_lost_to_another_batch_of_the_level_are_reported(bench: Bench) -> None:
    first, second = (StreamBatch(bench.stylizer, (64, 64)) for _ in range(2))
    first.push(bench.frames[0], bench.state)
    for frame in bench.frames[:2]:
        second.push(frame, bench.state)
    with pytest.raises(UsageError, match=r"1 frames inside the stream batch are lost: .* call flush\(\)"):
        first.push(bench.frames[1], bench.state)
    assert_are(list(second.flush()), bench.wanted[:2])
    found = [first.push(frame, bench.state) for frame in bench.frames[:5]]
    assert_are([*(frame for (frame,) in found[3:]), *first.flush()], bench.wanted[:5])


def test_frames_inside_keep_their_runner_open_while_other_levels_are_used(bench: Bench) -> None:
    batch = StreamBatch(bench.stylizer, (64, 64))
    for frame in bench.frames[:3]:
        batch.push(frame, bench.state)
    for steps in (1, 2, 1):
        bench.stylizer.run(bench.frames[0], bench.state, quality=Quality((64, 64), steps))
    for side in (32, 48):
        bench.stylizer.stylize(np.zeros((side, side, 3), np.uint8))
    assert_are(list(batch.flush()), bench.wanted[:3])
    del batch  # and whoever is not there any more keeps nothing open
    for side in (24, 32, 40, 48):
        bench.stylizer.stylize(np.zeros((side, side, 3), np.uint8))
    assert not any(runner.key.stream for runner in bench.stylizer._cache.values())


def test_openvino_prepares_once_and_then_once_for_every_mixture(
    handmade: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("std_rt.engines.openvino.engine")
    runs: list[int] = []
    original = openvino.Prepared._run

    def counted(self: Any, inputs: Any) -> Any:
        runs.append(len(inputs["timestep"]))
        return original(self, inputs)

    monkeypatch.setattr(openvino.Prepared, "_run", counted)
    with Stylizer.load(handmade, backend="openvino", precision="fp32") as stylizer:
        dark, light = (stylizer.encode_style(np.full((32, 32, 3), v, np.uint8)) for v in (20, 200))
        batch, state = StreamBatch(stylizer, (64, 64)), stylizer.state(64, 64)
        found: list[np.ndarray] = []
        for style, expected in ((dark, [4]), (light, [4] * 5)):
            stylizer.use_style(style)
            for _ in range(8):
                found += batch.push(np.full((64, 64, 3), 90, np.uint8), state)
            assert runs == expected
        found += batch.flush()
        stylizer.use_style(dark)
        before = stylizer.stylize(np.full((64, 64, 3), 90, np.uint8))
        stylizer.use_style(light)
        after = stylizer.stylize(np.full((64, 64, 3), 90, np.uint8))
    assert not np.array_equal(before, after)
    assert len(found) == 16
    for i, frame in enumerate(found):
        np.testing.assert_array_equal(frame, before if i < 8 else after)
