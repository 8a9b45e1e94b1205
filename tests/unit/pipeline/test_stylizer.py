"""The loop on engines made of NumPy, and on real backends with the bundle made by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_backend import Backend
from support.fake_engine import FakeEngine
from support.handmade import write_handmade

from std_rt import State, Stylizer
from std_rt.core.bundle import Bundle
from std_rt.core.errors import BundleError, UsageError
from std_rt.core.schedule import add_noise, step, to_eps
from std_rt.engines import Engine, GraphSpec, open_runner
from std_rt.engines.host import HostRunner, open_on_host
from std_rt.engines.program import Program
from std_rt.pipeline import stylizer as stylizer_module
from std_rt.pipeline.conditioning import choose_guidance
from std_rt.pipeline.denoise import Guidance
from std_rt.pipeline.openers import Openers
from std_rt.pipeline.program_builder import CONDITIONING

GREY = np.full((64, 64, 3), 90, np.uint8)
STYLE = np.full((32, 32, 3), 200, np.uint8)


def _stylizer(bundle: Bundle, backend: Backend | Openers | None = None, **options: Any) -> Stylizer:
    stylizer = Stylizer(bundle, backend or Backend(), **options)
    stylizer.set_style(STYLE)
    return stylizer


def _changed(bundle: Bundle, **sections: dict[str, Any]) -> Bundle:
    manifest = copy.deepcopy(bundle.manifest)
    for section, values in sections.items():
        manifest[section].update(values)
    return Bundle(bundle.path, manifest)


def _by_hand(bundle: Bundle, frame: np.ndarray, state: State, unet: Any) -> np.ndarray:
    """The loop in float64 from the schedule's own functions; latents [1, 3, h, w]."""
    z = (frame / 127.5 - 1).transpose(2, 0, 1)[None]
    z = z.reshape(1, 3, 8, 8, 8, 8).mean((3, 5))
    cs = bundle.coefficients(4)
    x, drawn = add_noise(z, state.noise[:1], cs[0]), 1
    for c in cs:
        x = step(x, to_eps(unet(x), x, c, bundle.prediction_type), c, state.noise[drawn : drawn + 1])
        drawn += bool(c.noise)
    return x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loop_takes_the_steps_of_the_schedule(handmade: Bundle, kind: str) -> None:
    bundle = _changed(handmade, schedule={"prediction_type": kind})

    def unet(sample: np.ndarray, **_: Any) -> np.ndarray:
        return 0.6 * sample + 0.1

    with _stylizer(bundle, Backend(unet)) as stylizer:
        state = stylizer.state(64, 64, seed=3)
        frame, _ = stylizer.step(GREY, state)
    x = _by_hand(bundle, GREY, state, unet)
    expected = np.clip((x + 1) * 127.5, 0, 255).repeat(8, 2).repeat(8, 3)[0].transpose(1, 2, 0)
    assert np.abs(frame - expected).max() <= 0.51


def test_a_stochastic_schedule_draws_a_noise_for_every_such_step(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    bundle = write_handmade(tmp_path / "stochastic", gamma=0.5)

    def unet(sample: np.ndarray, **_: Any) -> np.ndarray:
        return 0.6 * sample

    with _stylizer(bundle, Backend(unet)) as stylizer:
        state = stylizer.state(64, 64, seed=3)
        assert state.noise.shape == (4, 3, 8, 8)  # the start and three steps; the last one has none
        frame, _ = stylizer.step(GREY, state)
    x = _by_hand(bundle, GREY, state, unet)
    expected = np.clip((x + 1) * 127.5, 0, 255).repeat(8, 2).repeat(8, 3)[0].transpose(1, 2, 0)
    assert np.abs(frame - expected).max() <= 0.51


def test_the_unet_is_told_timesteps_style_strength_and_size(handmade: Bundle) -> None:
    backend = Backend()
    with _stylizer(handmade, backend) as stylizer:
        stylizer.set_style([(STYLE, 3.0), (np.full((32, 32, 3), 40, np.uint8), 1.0)], strength=1.5)
        stylizer.step(GREY)
    calls = backend.engines("unet")[0].calls
    assert [float(call["timestep"][0]) for call in calls] == [c.timestep for c in handmade.coefficients(4)]
    expected = 0.75 * (200 / 127.5 - 1) + 0.25 * (40 / 127.5 - 1)
    np.testing.assert_allclose(calls[0]["style_tokens"], expected, rtol=1e-5)
    np.testing.assert_allclose(calls[0]["text_embeds"], 1.5 * expected, rtol=1e-5)
    assert calls[0]["style_strength"] == np.float32(1.5)
    assert calls[0]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]


def test_a_stream_keeps_its_noise_and_a_state_is_never_changed(handmade: Bundle) -> None:
    with _stylizer(handmade) as stylizer:
        first = stylizer.state(64, 64, seed=5)
        before = first.noise.copy()
        a, second = stylizer.step(GREY, first)
        b, third = stylizer.step(GREY, second)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.noise, before)
    assert third.noise is first.noise
    assert (first.index, second.index, third.index) == (0, 1, 2)


def test_frames_returned_are_not_overwritten_by_the_next(handmade: Bundle) -> None:
    with _stylizer(handmade) as stylizer:
        a, state = stylizer.step(GREY)
        kept = a.copy()
        stylizer.step(255 - GREY, state)
    np.testing.assert_array_equal(a, kept)


def test_the_seed_decides_the_noise(handmade: Bundle) -> None:
    with _stylizer(handmade) as stylizer:
        same = [stylizer.stylize(GREY, seed=7) for _ in range(2)]
        other = stylizer.stylize(GREY, seed=8)
    np.testing.assert_array_equal(*same)
    assert np.abs(same[0].astype(int) - other).max() > 0


def test_a_stream_that_changes_size_keeps_seed_and_count(handmade: Bundle) -> None:
    with _stylizer(handmade, size=(64, 64)) as stylizer:
        _, state = stylizer.step(GREY, stylizer.state(64, 64, seed=9))
        frame, state = stylizer.step(np.zeros((40, 80, 3), np.uint8), state)
        expected = stylizer.state(40, 80, seed=9)
    assert frame.shape == (40, 80, 3)
    assert (state.seed, state.index) == (9, 2)
    np.testing.assert_array_equal(state.noise, expected.noise)


@pytest.mark.parametrize(
    ("shape", "result"), [((640, 320), (88, 44)), ((50, 33), (50, 33)), ((1, 1), (1, 1))]
)
def test_a_frame_comes_back_in_its_aspect_and_never_larger(
    handmade: Bundle, shape: tuple[int, int], result: tuple[int, int]
) -> None:
    with _stylizer(handmade, size=64) as stylizer:
        frame = stylizer.stylize(np.zeros((*shape, 3), np.uint8))
    assert frame.shape[:2] == result


@pytest.mark.parametrize(
    ("small_bytes", "closed"),
    [(2**28, [False, True, False, False, False]), (0, [False, True, True, True, False])],
)
def test_engines_of_the_sizes_used_longest_ago_are_closed_those_of_a_large_bundle_sooner(
    handmade: Bundle, monkeypatch: pytest.MonkeyPatch, small_bytes: int, closed: list[bool]
) -> None:
    monkeypatch.setattr(stylizer_module, "_SMALL_BYTES", small_bytes)
    backend = Backend()
    with _stylizer(handmade, backend) as stylizer:
        for shape in ((64, 64), (40, 80), (64, 64), (80, 40), (64, 64), (48, 80), (64, 64), (80, 48)):
            stylizer.stylize(np.zeros((*shape, 3), np.uint8))
        assert [engine.closed for engine in backend.engines("unet")] == closed
    assert all(engine.closed for _, engine in backend.opened)


def test_a_new_style_needs_no_new_engines(handmade: Bundle) -> None:
    backend = Backend(lambda sample, style_tokens, **_: 0 * sample + style_tokens.mean())
    with _stylizer(handmade, backend) as stylizer:
        first = stylizer.stylize(GREY)
        stylizer.set_style(np.zeros((32, 32, 3), np.uint8))
        assert np.abs(first.astype(int) - stylizer.stylize(GREY)).max() > 0
    assert len(backend.opened) == 4


def test_stages_are_marked_in_order(handmade: Bundle) -> None:
    marks: list[str] = []
    with _stylizer(handmade, steps=2) as stylizer:
        stylizer.step(GREY, mark=marks.append)
    loop = ["unet", "scheduler"] * 2
    assert marks == ["convert", "convert", "vae_encoder", "scheduler", *loop, "vae_decoder", "convert"]


def test_no_style_is_refused(handmade: Bundle) -> None:
    with Stylizer(handmade, Backend()) as stylizer, pytest.raises(UsageError, match="set_style"):
        stylizer.stylize(GREY)


@pytest.mark.parametrize("strength", [-0.1, 2.1, float("nan")])
def test_a_strength_outside_the_bundles_range_is_refused(handmade: Bundle, strength: float) -> None:
    with _stylizer(handmade) as stylizer, pytest.raises(UsageError, match=r"must be in 0\.\.2"):
        stylizer.set_style(STYLE, strength)


@pytest.mark.parametrize(
    "frame", [GREY.astype(np.float32), GREY[..., 0], np.zeros((8, 8, 4), np.uint8), [1, 2], None]
)
def test_what_is_no_frame_is_refused(handmade: Bundle, frame: Any) -> None:
    with _stylizer(handmade) as stylizer, pytest.raises(UsageError, match=r"uint8 array \[H, W, 3\]"):
        stylizer.step(frame)


def test_steps_that_the_bundle_lacks_are_refused(handmade: Bundle) -> None:
    with pytest.raises(BundleError, match="one of 1, 2, 4"):
        Stylizer(handmade, Backend(), steps=3)


@pytest.mark.parametrize("size", [-1, 0, 8, 5000, (64, 5000)])
def test_a_size_that_the_bundle_does_not_support_is_refused(handmade: Bundle, size: Any) -> None:
    with pytest.raises(UsageError, match=r"'handmade' works at 16 to 512 px per side, not at .*; change the"):
        Stylizer(handmade, Backend(), size=size)


@pytest.mark.parametrize("size", ["256", (64, "64"), (64, 64, 3), 64.0])
def test_a_size_that_is_none_is_one_line(handmade: Bundle, size: Any) -> None:
    with pytest.raises(UsageError, match=r"a size must be a side in px, as 512, or \(H, W\), not "):
        Stylizer(handmade, Backend(), size=size)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: s.step(STYLE, mask=STYLE), "a mask must be a Mask, as Mask.read"),
        (lambda s: s.step(STYLE, mask="mask.png"), "a mask must be a Mask, as Mask.read"),
        (lambda s: s.set_style(None), "several must be a list of pairs"),
        (lambda s: s.set_style(7), "several must be a list of pairs"),
        (lambda s: s.set_style([STYLE]), "several must be a list of pairs"),
        (lambda s: s.set_style(STYLE, strength="1"), "style strength must be a number, got '1'"),
        (lambda s: s.set_style(STYLE, stroke_size=None), "stroke size must be a number, got None"),
    ],
)
def test_what_is_of_another_type_is_one_line(
    handmade: Bundle, call: Callable[[Any], None], said: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        call(_stylizer(handmade))


def test_a_guidance_that_is_not_known_is_refused(handmade: Bundle) -> None:
    bundle = _changed(handmade, guidance={"mode": "cfg"})
    with pytest.raises(BundleError, match="'cfg'"):
        Stylizer(bundle, Backend())


def test_an_engine_that_does_not_open_fails_the_step_and_not_the_close(handmade: Bundle) -> None:
    class Broken(Backend):
        def __call__(self, spec: GraphSpec) -> FakeEngine:
            if spec.name == "unet":
                raise BundleError("no unet today")
            return super().__call__(spec)

    with _stylizer(handmade, Broken()) as stylizer, pytest.raises(BundleError, match="no unet today"):
        stylizer.stylize(GREY)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_real_backends_do_what_the_graphs_say(handmade: Bundle, backend: str) -> None:
    pytest.importorskip(backend)
    with Stylizer.load(handmade, backend=backend, precision="fp32") as stylizer:
        stylizer.set_style(STYLE)
        state = stylizer.state(64, 64, seed=2)
        frame, _ = stylizer.step(GREY, state)
        assert stylizer.precision == "fp32"
    eps = 200 / 127.5 - 1
    x = _by_hand(handmade, GREY, state, lambda sample, **_: 0.5 * sample + eps)
    expected = np.clip((x + 1) * 127.5, 0, 255).repeat(8, 2).repeat(8, 3)[0].transpose(1, 2, 0)
    assert np.abs(frame - expected).max() <= 0.6


class Recorder(HostRunner):
    """Remembers what it was fed."""

    def __init__(self, engines: Any, program: Program) -> None:
        super().__init__(engines, program)
        self.fed: list[set[str]] = []

    def set(self, **feeds: Any) -> None:
        self.fed.append(set(feeds))
        super().set(**feeds)


def test_a_runner_is_fed_only_what_has_changed(handmade: Bundle) -> None:
    backend, runners = Backend(lambda sample, style_tokens, **_: 0.5 * sample + style_tokens.mean()), []

    def opener(program: Program, specs: dict[str, GraphSpec]) -> Recorder:
        runners.append(Recorder({name: backend(spec) for name, spec in specs.items()}, program))
        return runners[-1]

    with _stylizer(handmade, Openers(backend, backend, opener)) as stylizer:
        first = stylizer.state(64, 64, seed=1)
        a, state = stylizer.step(GREY, first)
        stylizer.step(GREY, state)
        (fed,) = (runner.fed for runner in runners)
        assert fed == [{"noise_0", *CONDITIONING}]
        stylizer.step(GREY, stylizer.state(64, 64, seed=2))
        assert fed[1:] == [{"noise_0"}]
        stylizer.set_style(255 - STYLE)
        b, _ = stylizer.step(GREY, first)
        # The text is the array that is there already; sizes and strength are made anew, of a few bytes.
        assert fed[2:] == [{"noise_0", *CONDITIONING} - {"encoder_hidden_states"}]
        stylizer.set_style(STYLE)
        c, _ = stylizer.step(GREY, first)
    np.testing.assert_array_equal(a, c)
    assert len(fed) == 4
    assert np.abs(b.astype(int) - a).max() > 0


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose own guidance is full at 3, and whose negatives are all -0.4."""
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("guided") / "guided"
    return write_handmade(folder, guidance=("full", 3.0), negative=-0.4)


def _guided_by_hand(bundle: Bundle, state: State, mode: str, scale: float) -> np.ndarray:
    """The loop in float64 for the handmade UNet: half the sample and the level of the style tokens."""
    z = (GREY / 127.5 - 1).transpose(2, 0, 1)[None].reshape(1, 3, 8, 8, 8, 8).mean((3, 5))
    cs = bundle.coefficients(4)
    x, gap = add_noise(z, state.noise[:1], cs[0]), None
    for c in cs:
        positive, negative = 0.5 * x + 200 / 127.5 - 1, 0.5 * x - 0.4
        if mode == "full" or gap is None:
            gap = positive - negative
        fade = 1.0 if mode == "full" else (c.sigma_t / cs[0].sigma_t) ** 4
        x = step(x, positive + (scale - 1) * fade * gap, c)
    return np.clip((x + 1) * 127.5, 0, 255).repeat(8, 2).repeat(8, 3)[0].transpose(1, 2, 0)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("mode", ["full", "residual"])
def test_guidance_on_real_backends_is_its_loop_by_hand(guided: Bundle, backend: str, mode: str) -> None:
    pytest.importorskip(backend)
    with Stylizer.load(guided, backend=backend, precision="fp32", guidance_mode=mode) as stylizer:
        stylizer.set_style(STYLE)
        state = stylizer.state(64, 64, seed=4)
        frame, _ = stylizer.step(GREY, state)
        assert stylizer.guidance == Guidance(mode, 3.0)
    assert np.abs(frame - _guided_by_hand(guided, state, mode, 3.0)).max() <= 0.6


def test_full_guidance_asks_for_both_halves_at_once_and_residual_once_more(guided: Bundle) -> None:
    for mode, batch, calls in (("full", 2, 4), ("residual", 1, 5), ("none", 1, 4)):
        backend = Backend()
        with _stylizer(guided, backend, guidance_mode=mode) as stylizer:
            stylizer.set_style(STYLE, strength=0.5)
            stylizer.step(GREY)
        found = backend.engines("unet")[0].calls
        assert (len(found), len(found[0]["sample"])) == (calls, batch)
        first = found[0]
        assert first["style_strength"].tolist() == [0.5] * batch
        assert first["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * batch
        if mode != "none":  # the negative comes first, as stored, whatever the style and its strength
            assert first["style_tokens"][0].max() == np.float32(-0.4)
            assert first["text_embeds"][0].max() == np.float32(-0.4)
        assert found[-1]["text_embeds"][-1].max() == pytest.approx(0.5 * (200 / 127.5 - 1), rel=1e-5)


def test_guidance_is_the_bundles_unless_asked(guided: Bundle, handmade: Bundle) -> None:
    assert choose_guidance(guided) == Guidance("full", 3.0)
    assert choose_guidance(guided, 5.0) == Guidance("full", 5.0)
    assert choose_guidance(guided, None, "residual") == Guidance("residual", 3.0)
    assert choose_guidance(guided, 1.0) == choose_guidance(guided, 1.0, "full") == Guidance()
    assert choose_guidance(guided, None, "none") == Guidance()
    assert choose_guidance(handmade) == Guidance()
    assert choose_guidance(handmade, 2.0) == Guidance("full", 2.0)


@pytest.mark.parametrize(
    ("scale", "mode", "message"),
    [
        (0.5, None, r"guidance must be 1 \(none\) or more, got 0\.5"),
        (float("nan"), None, "guidance must be 1"),
        (2.0, "none", "guidance 2 does not fit mode 'none'"),
        (2.0, "cfg", "unknown guidance mode 'cfg'; use one of none, full, residual"),
        (None, "residual", "mode 'residual' needs a scale above 1; give --guidance"),
    ],
)
def test_guidance_that_does_not_fit_together_is_refused(
    handmade: Bundle, scale: float | None, mode: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Stylizer(handmade, Backend(), guidance=scale, guidance_mode=mode)


def test_guidance_without_a_negative_is_refused(handmade: Bundle) -> None:
    with pytest.raises(
        BundleError, match=r"no negative prompt, which guidance 4 needs; use --guidance 1, or export it again"
    ):
        Stylizer(handmade, Backend(), guidance=4.0)


def test_engines_that_opened_are_closed_where_one_did_not(handmade: Bundle) -> None:
    class Broken(Backend):
        def __call__(self, spec: GraphSpec) -> FakeEngine:
            if spec.name == "unet":
                raise BundleError("no unet today")
            return super().__call__(spec)

    backend = Broken()
    with _stylizer(handmade, backend) as stylizer, pytest.raises(BundleError):
        stylizer.stylize(GREY)
    assert sorted(spec.name for spec, _ in backend.opened) == ["style_encoder", "vae_decoder", "vae_encoder"]
    assert all(engine.closed for _, engine in backend.opened)


def test_a_backend_with_a_runner_of_its_own_is_given_the_program(
    handmade: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    backend, asked = Backend(), []

    def own(program: Program, specs: dict[str, GraphSpec], precision: str) -> HostRunner:
        asked.append((sorted(specs), precision))
        return open_on_host(program, specs, backend)

    def never(spec: GraphSpec) -> Engine:
        raise AssertionError("the backend has its own runner")

    monkeypatch.setattr("std_rt.engines.openvino.engine.open_runner", own, raising=False)

    def opener(program: Program, specs: dict[str, GraphSpec]) -> Any:
        return open_runner("openvino", program, specs, "fp32", never)

    with _stylizer(handmade, Openers(backend, backend, opener)) as stylizer:
        stylizer.stylize(GREY)
        assert stylizer.precision == "fp32"
    assert asked == [(["unet", "vae_decoder", "vae_encoder"], "fp32")]
