"""Frames in parts, several at once and at other levels; styles as values; what fails, and what is closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.fake_backend import Backend
from support.fake_engine import FakeEngine
from support.handmade import SEQUENCE, TEXT, write_handmade

from std_rt import Stylizer
from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import BackendError, BundleError, UsageError
from std_rt.engines import GraphSpec
from std_rt.engines.host import HostRunner, open_on_host
from std_rt.engines.program import Program
from std_rt.media.chroma import keep_colours
from std_rt.pipeline.conditioning import EncodedStyle, blend
from std_rt.pipeline.denoise import Guidance
from std_rt.pipeline.openers import Openers, program_for
from std_rt.pipeline.runner_cache import Quality, RunnerKey
from std_rt.streaming.stream_batch import StreamBatch

STYLE = np.full((32, 32, 3), 200, np.uint8)


def frames(count: int, height: int = 64, width: int = 64) -> list[np.ndarray]:
    """Blocks of 8 px, so that the handmade autoencoder loses nothing."""
    blocks = np.random.default_rng(0).integers(0, 256, (count, height // 8, width // 8, 3), np.uint8)
    return list(blocks.repeat(8, 1).repeat(8, 2))


def told_apart(sample: Any, style_tokens: Any, timestep: Any, **_: Any) -> Any:
    """A UNet to which style and timestep matter."""
    level = 0.1 * style_tokens.mean((1, 2)) + timestep / 3000
    return 0.5 * sample + level[:, None, None, None]


@pytest.fixture
def backend() -> Backend:
    return Backend(told_apart)


@pytest.fixture
def stylizer(handmade: Bundle, backend: Backend) -> Iterator[Stylizer]:
    with Stylizer(handmade, backend) as opened:
        opened.set_style(STYLE)
        yield opened


@pytest.mark.parametrize("shape", [(64, 64), (40, 80), (300, 200), (50, 33), (1, 1)])
def test_a_step_is_fit_run_and_unfit(stylizer: Stylizer, shape: tuple[int, int]) -> None:
    frame = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    expected, state = stylizer.step(frame, stylizer.state(*shape, seed=2))
    working = stylizer.fit(frame)
    assert working.shape[:2] == stylizer.working_size(*shape)
    found = stylizer.unfit(stylizer.run(working, state), shape)
    np.testing.assert_array_equal(found, expected)
    assert state.index == 1


def test_what_has_its_size_already_is_passed_on_as_it_is(stylizer: Stylizer) -> None:
    (frame,) = frames(1)
    assert stylizer.fit(frame) is frame
    assert stylizer.unfit(frame, (64, 64)) is frame
    with pytest.raises(UsageError, match=r"uint8 array \[H, W, 3\]"):
        stylizer.fit(frame[..., 0])


def test_frames_and_states_that_do_not_fit_are_refused(stylizer: Stylizer) -> None:
    (frame,), state = frames(1), stylizer.state_for((64, 64))
    with pytest.raises(
        UsageError, match=r"works at multiples of 8 px from 16 to 512, not at 60 x 64; use fit"
    ):
        stylizer.run(frame[:60], state)
    with pytest.raises(UsageError, match=r"noise \[1, 3, 8, 8\] instead of \[1, 3, 4, 8\]"):
        stylizer.run(frame[:32], state)
    with pytest.raises(UsageError, match="the frame is 64 x 64 px instead of 32 x 32"):
        stylizer.run(frame, state, quality=Quality((32, 32), 4))
    with pytest.raises(BundleError, match="one of 1, 2, 4"):
        stylizer.run(frame, state, quality=Quality((64, 64), 3))


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_many_are_one_by_one(stylizer: Stylizer, backend: Backend, count: int) -> None:
    """Of different noise each; a shorter last group goes through the same engines."""
    given, states = frames(count), [stylizer.state_for((64, 64), seed=i) for i in range(count)]
    found = stylizer.run_many(given, states, frames=4)
    assert [engine.inputs["sample"][0][0] for engine in backend.engines("unet")] == [4]
    wanted = [stylizer.run(frame, state) for frame, state in zip(given, states, strict=True)]
    assert len(found) == count
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("mode", ["none", "full", "residual"])
def test_many_are_one_by_one_in_every_guidance_with_stochastic_steps(
    tmp_path_factory: pytest.TempPathFactory, mode: str
) -> None:
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("ways") / "ways"
    bundle = write_handmade(folder, gamma=0.5, guidance=("full", 3.0), negative=-0.4)
    with Stylizer(bundle, Backend(told_apart), guidance_mode=mode) as stylizer:
        stylizer.set_style(STYLE)
        given, states = frames(5), [stylizer.state_for((64, 64), seed=i) for i in range(5)]
        found = stylizer.run_many(given, states, frames=3)
        wanted = [stylizer.run(frame, state) for frame, state in zip(given, states, strict=True)]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_many_are_one_by_one_on_the_built_in_model() -> None:
    """Up to the order in which a network of another batch adds."""
    with Stylizer.load(load_bundle(verify=False), size=(64, 64), precision="fp32") as stylizer:
        stylizer.set_style(STYLE // 2)
        given, states = frames(5), [stylizer.state_for((64, 64), seed=i) for i in range(5)]
        assert stylizer.frames_per_call((64, 64)) == 4
        found = stylizer.run_many(given, states)
        for frame, state, one in zip(given, states, found, strict=True):
            other = stylizer.run(frame, state)
            assert other.std() > 5
            assert np.abs(one.astype(int) - other).max() <= 1
            assert (one != other).mean() < 1e-3


def test_many_with_one_noise_are_fed_once(handmade: Bundle) -> None:
    fed: list[set[str]] = []

    class Recorder(HostRunner):
        def set(self, **feeds: Any) -> None:
            fed.append(set(feeds))
            super().set(**feeds)

    def opener(program: Program, specs: dict[str, GraphSpec]) -> Recorder:
        backend = Backend()
        return Recorder({name: backend(spec) for name, spec in specs.items()}, program)

    with Stylizer(handmade, Openers(Backend(), Backend(), opener)) as stylizer:
        stylizer.set_style(STYLE)
        state = stylizer.state_for((64, 64))
        for _ in range(3):
            stylizer.run_many(frames(8), [state] * 8, frames=4)
        assert len(fed) == 1
        stylizer.run_many(frames(4), [stylizer.state_for((64, 64))] * 4, frames=4)
    assert fed[1:] == [{"noise_0"}]


@pytest.mark.parametrize("guidance", ["none", "full", "residual"])
def test_text_that_engines_may_be_built_around_is_what_they_are_fed(
    guidance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One frame, several a call, and a stream batch. With guidance there are two texts, and none is baked."""
    bundle = write_handmade(tmp_path / "mine", negative=0.5)
    given = dict(bundle.conditioning())
    given["encoder_hidden_states"] = np.random.default_rng(0).random((1, SEQUENCE, TEXT), np.float32)
    monkeypatch.setattr(Bundle, "conditioning", lambda self: given)
    fed: list[Any] = []

    def opener(program: Program, specs: dict[str, GraphSpec]) -> HostRunner:
        baked, backend = specs["unet"].baked, Backend()
        assert [name for name, spec in specs.items() if spec.baked] == (["unet"] if baked else [])

        class Recorder(HostRunner):
            def set(self, **feeds: Any) -> None:
                if "encoder_hidden_states" in feeds:
                    fed.append((baked.get("encoder_hidden_states"), feeds["encoder_hidden_states"]))
                super().set(**feeds)

        return Recorder({name: backend(spec) for name, spec in specs.items()}, program)

    scale = 1.0 if guidance == "none" else 1.5
    with Stylizer(bundle, Openers(Backend(), Backend(), opener), guidance=scale, guidance_mode=guidance) as s:
        s.set_style(STYLE)
        s.run(frames(1)[0], s.state_for((64, 64)))
        s.run_many(frames(4), [s.state_for((64, 64))] * 4, frames=4)
    assert len(fed) == 2
    for baked, value in fed:
        if guidance == "none":
            np.testing.assert_array_equal(baked, value)
        else:
            assert baked is None


def test_without_the_onnx_package_nothing_is_baked(handmade: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def specs() -> dict[str, GraphSpec]:
        text = {name: value.shape[1:] for name, value in handmade.conditioning().items()}
        return program_for(handmade, RunnerKey(Quality((64, 64), 4)), Guidance(), text)[1]

    assert specs()["unet"].baked
    for found in (None, SimpleNamespace(origin=None)):  # or only a folder of that name
        monkeypatch.setattr("std_rt.pipeline.openers.find_spec", lambda name, found=found: found)
        assert not specs()["unet"].baked


def test_wrong_numbers_of_frames_are_refused(stylizer: Stylizer) -> None:
    state = stylizer.state_for((64, 64))
    assert stylizer.run_many([], []) == []
    with pytest.raises(UsageError, match="every frame needs a state: got 2 frames, 1 states"):
        stylizer.run_many(frames(2), [state])
    with pytest.raises(UsageError, match="a call takes at least one frame, got 0"):
        stylizer.run_many(frames(1), [state], frames=0)
    with pytest.raises(UsageError, match="the frame is 32 x 64 px instead of 64 x 64"):
        stylizer.run_many([*frames(1), *frames(1, 32)], [state] * 2)


def test_small_pictures_share_a_call_and_large_ones_do_not(handmade: Bundle) -> None:
    with Stylizer(handmade, replace(Openers.on_host(Backend()), backend="openvino")) as stylizer:
        sizes = [(64, 64), (256, 256), (256, 512), (384, 384), (512, 512), (1024, 1024)]
        assert [stylizer.frames_per_call(size) for size in sizes] == [4, 4, 2, 1, 1, 1]
    with Stylizer(handmade, replace(Openers.on_host(Backend()), backend="tensorrt")) as stylizer:
        assert [stylizer.frames_per_call(size) for size in sizes] == [4, 4, 4, 3, 2, 1]


def test_a_large_model_has_one_set_of_engines_on_a_gpu(
    handmade: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bundle, "total_bytes", 2**31)
    with Stylizer(handmade, replace(Openers.on_host(Backend()), backend="rtx")) as stylizer:
        assert stylizer.frames_per_call((64, 64)) == 1


def test_a_level_is_another_stylizer_of_that_size_and_steps(handmade: Bundle, stylizer: Stylizer) -> None:
    (frame,) = frames(1, 128, 96)
    level = stylizer.quality(128, 96, size=40, steps=2)
    assert level == Quality((48, 32), 2)
    found = stylizer.run(stylizer.fit(frame, level), stylizer.state_for(level, seed=3), quality=level)
    with Stylizer(handmade, Backend(told_apart), size=40, steps=2) as other:
        other.set_style(STYLE)
        expected, _ = other.step(frame, other.state(128, 96, seed=3))
    np.testing.assert_array_equal(stylizer.unfit(found, (128, 96)), expected)
    with pytest.raises(BundleError, match="one of 1, 2, 4"):
        stylizer.quality(128, 96, steps=3)


def test_another_number_of_steps_opens_no_engine(stylizer: Stylizer, backend: Backend) -> None:
    (frame,), state = frames(1), stylizer.state_for((64, 64))
    stylizer.run(frame, state)
    before, found = len(backend.opened), []
    for steps in (4, 2, 1, 4):
        found.append(stylizer.run(frame, state, quality=Quality((64, 64), steps)))
    assert len(backend.opened) == before
    assert len({one.tobytes() for one in found}) == 3
    stylizer.prepare_qualities([Quality((64, 64), 4)], stream_batch=True)
    StreamBatch(stylizer, (64, 64)).push(frame, state)
    assert [spec.name for spec, _ in backend.opened[before:]] == ["unet"]  # at a batch of four
    assert not any(engine.closed for _, engine in backend.opened)


def test_levels_that_were_asked_for_stay_open(stylizer: Stylizer, backend: Backend) -> None:
    levels = [stylizer.quality(64, 64, size=side, steps=steps) for side in (64, 56, 48) for steps in (4, 2)]
    stylizer.prepare_qualities(levels)
    for level in levels:
        stylizer.run(frames(1, *level.size)[0], stylizer.state_for(level), quality=level)
        assert stylizer.ready(level)
    assert len(backend.engines("unet")) == 3
    assert not stylizer.ready(levels[0], stream_batch=True)
    stylizer.prepare_qualities([])
    closed = {
        spec.shapes["sample"][2] * 8: engine.closed for spec, engine in backend.opened if spec.name == "unet"
    }
    assert closed == {64: True, 56: False, 48: False}, "four of them were used last"


def test_ready_says_whether_a_level_is_open_and_asks_for_nothing(handmade: Bundle) -> None:
    backend, go = Backend(), threading.Event()

    def opener(program: Program, specs: dict[str, GraphSpec]) -> HostRunner:
        assert go.wait(30)
        return open_on_host(program, specs, backend)

    with Stylizer(handmade, Openers(backend, backend, opener)) as stylizer:
        level = stylizer.quality(64, 64, steps=2)
        assert not stylizer.ready(level)
        stylizer.prepare_qualities([level])
        assert not stylizer.ready(level)
        go.set()
        stylizer.set_style(STYLE)
        stylizer.run(frames(1)[0], stylizer.state_for(level), quality=level)
        assert stylizer.ready(level)


def test_noise_belongs_to_seed_and_size_whatever_the_steps(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("onnx")
    bundle = write_handmade(tmp_path_factory.mktemp("gamma") / "gamma", gamma=0.5)
    with Stylizer(bundle, Backend(told_apart)) as stylizer:
        stylizer.set_style(STYLE)
        states = [stylizer.state_for(Quality((64, 64), steps), seed=5) for steps in (4, 2, 1)]
        assert [len(state.noise) for state in states] == [4, 2, 1]
        for state in states:
            np.testing.assert_array_equal(states[0].noise[: len(state.noise)], state.noise)
        # More draws than a level needs do no harm: a stream may keep its state from level to level.
        level = Quality((64, 64), 2)
        one, other = (stylizer.run(frames(1)[0], state, quality=level) for state in states[:2])
        np.testing.assert_array_equal(one, other)
        # Too few are drawn anew by step, which knows what it needs.
        _, state = stylizer.step(frames(1)[0], states[2])
        np.testing.assert_array_equal(state.noise, states[0].noise)
        smaller = stylizer.state_for((32, 64), seed=5)
    assert (smaller.noise.shape, smaller.seed, smaller.index) == ((4, 3, 4, 8), 5, 0)


def test_an_encoded_style_is_what_set_style_sets(stylizer: Stylizer, backend: Backend) -> None:
    expected = stylizer.stylize(frames(1)[0])
    style = stylizer.encode_style(STYLE)
    assert stylizer.encode_style(STYLE) is style
    assert len(backend.engines("style_encoder")[0].calls) == 1
    other = stylizer.encode_style(255 - STYLE)
    stylizer.use_style(other)
    assert not np.array_equal(stylizer.stylize(frames(1)[0]), expected)
    stylizer.use_style(style)
    np.testing.assert_array_equal(stylizer.stylize(frames(1)[0]), expected)


def test_stroke_size_2_is_the_blend_of_the_quarters(stylizer: Stylizer) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    picture[:32, :32] //= 4
    quarters = [picture[y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]
    stylizer.set_style([(quarter, 1.0) for quarter in quarters])
    expected = stylizer.stylize(frames(1)[0])
    stylizer.set_style(picture, stroke_size=2)
    np.testing.assert_array_equal(stylizer.stylize(frames(1)[0]), expected)
    with pytest.raises(UsageError, match=r"stroke size must be in 0\.5\.\.2, got 3"):
        stylizer.set_style(STYLE, stroke_size=3)


def test_kept_colours_are_set_with_the_style_and_stay(stylizer: Stylizer) -> None:
    (frame,) = frames(1)
    plain = stylizer.stylize(frame)
    stylizer.set_style(STYLE, keep_colours=True)
    np.testing.assert_array_equal(stylizer.stylize(frame), keep_colours(frame, plain))
    stylizer.use_style(stylizer.encode_style(STYLE))
    assert stylizer.keep_colours
    stylizer.use_style(stylizer.encode_style(STYLE), keep_colours=False)
    np.testing.assert_array_equal(stylizer.stylize(frame), plain)


def test_a_style_of_another_bundle_or_a_wrong_strength_is_refused(stylizer: Stylizer) -> None:
    expected = stylizer.stylize(frames(1)[0])
    with pytest.raises(UsageError, match=r"has tokens \[1, 2, 4\], got \[1, 16, 192\]; encode its picture"):
        stylizer.use_style(EncodedStyle(np.zeros((1, 16, 192), np.float32)))
    with pytest.raises(UsageError, match=r"must be in 0\.\.2, got 3"):
        stylizer.use_style(stylizer.encode_style(STYLE), 3.0)
    np.testing.assert_array_equal(stylizer.stylize(frames(1)[0]), expected)


def test_a_crossfade_feeds_what_changes_and_keeps_nothing(handmade: Bundle) -> None:
    fed: list[dict[str, Any]] = []

    class Recorder(HostRunner):
        def set(self, **feeds: Any) -> None:
            fed.append(feeds)
            super().set(**feeds)

    def opener(program: Program, specs: dict[str, GraphSpec]) -> Recorder:
        backend = Backend(told_apart)
        return Recorder({name: backend(spec) for name, spec in specs.items()}, program)

    with Stylizer(handmade, Openers(Backend(), Backend(), opener)) as stylizer:
        first, second = stylizer.encode_style(STYLE), stylizer.encode_style(255 - STYLE)
        (frame,), state = frames(1), stylizer.state_for((64, 64))
        for i in range(31):
            stylizer.use_style(blend([(first, 31 - i), (second, i + 1)]))
            for _ in range(2):
                stylizer.use_style(*stylizer._style)  # as a loop does that looks it up for every frame
                stylizer.run(frame, state)
        assert len(fed) == 31
        assert all("encoder_hidden_states" not in feeds and "noise_0" not in feeds for feeds in fed[1:])
        assert len(stylizer._conditioning) == 1
        assert sum(value.nbytes for value in fed[-1].values()) < 200


def test_a_style_is_encoded_beside_frames(handmade: Bundle) -> None:
    """The encoder waits in its thread until two frames are done in ours: no lock holds them up."""
    begun, go = threading.Event(), threading.Event()

    class Slow(Backend):
        def _style_encoder_engine(self, spec: GraphSpec) -> FakeEngine:
            engine = super()._style_encoder_engine(spec)
            run = engine._fn

            def slow(style_image: np.ndarray) -> Any:
                if style_image.mean() < 0:
                    begun.set()
                    assert go.wait(30)
                return run(style_image=style_image)

            engine._fn = slow
            return engine

    with Stylizer(handmade, Slow(told_apart)) as stylizer:
        stylizer.set_style(STYLE)
        before, found = stylizer.stylize(frames(1)[0]), []
        thread = threading.Thread(target=lambda: found.append(stylizer.encode_style(255 - STYLE)))
        thread.start()
        assert begun.wait(30)
        np.testing.assert_array_equal(stylizer.stylize(frames(1)[0]), before)
        go.set()
        thread.join(30)
        stylizer.use_style(found[0])
        assert not np.array_equal(stylizer.stylize(frames(1)[0]), before)


def test_what_did_not_open_is_opened_at_the_next_try(handmade: Bundle) -> None:
    failing = ["unet", "style_encoder"]

    class Flaky(Backend):
        def __call__(self, spec: GraphSpec) -> FakeEngine:
            if spec.name in failing:
                failing.remove(spec.name)
                raise BackendError(f"no {spec.name} today")
            return super().__call__(spec)

    with Stylizer(handmade, Flaky()) as stylizer:
        with pytest.raises(BackendError, match="no style_encoder today"):
            stylizer.set_style(STYLE)
        stylizer.set_style(STYLE)
        with pytest.raises(BackendError, match="no unet today"):
            stylizer.stylize(frames(1)[0])
        assert stylizer.stylize(frames(1)[0]).shape == (64, 64, 3)


def test_use_after_close_is_one_clear_line(handmade: Bundle) -> None:
    stylizer = Stylizer(handmade, Backend())
    stylizer.set_style(STYLE)
    (frame,), state = frames(1), stylizer.state_for((64, 64))
    batch = StreamBatch(stylizer, (64, 64))
    stylizer.close()
    stylizer.close()
    for use in (
        lambda: stylizer.stylize(frame),
        lambda: stylizer.run_many([frame], [state]),
        lambda: stylizer.set_style(255 - STYLE),
        lambda: stylizer.prepare(64, 64),
        lambda: stylizer.prepare_qualities([Quality((64, 64), 1)]),
        lambda: StreamBatch(stylizer, (64, 64)),
        lambda: batch.push(frame, state),
    ):
        with pytest.raises(
            UsageError, match=r"the stylizer was closed; load it again with Stylizer.load\(\)"
        ):
            use()
