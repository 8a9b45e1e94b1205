"""The style mixer: crossfades on a clock the test moves, loading in the background, exact ends."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cli_support import picture
from support.live_support import Clock

from std_rt.core.bundle import Bundle
from std_rt.core.errors import MediaError, UsageError
from std_rt.live.style_mixer import FADE_STEPS, NUDGE_S, Ramp, StyleMixer
from std_rt.pipeline.conditioning import EncodedStyle, StyleSquares, blend
from std_rt.pipeline.style_file import read_style, save_style

WAIT_S = 30


def _value(picture: np.ndarray | StyleSquares) -> int:
    """Which picture of `_frame` it is; the mixer keeps what the encoder needs of it."""
    return int((picture.whole if isinstance(picture, StyleSquares) else picture)[0, 0, 0])


def encode(picture: np.ndarray | StyleSquares, stroke_size: float = 1.0) -> EncodedStyle:
    """Tokens of a made-up encoder: random, but the same for the same picture."""
    rng = np.random.default_rng(_value(picture))
    return EncodedStyle(rng.standard_normal((1, 2, 4), np.float32), rng.standard_normal((1, 6), np.float32))


def at_size(picture: np.ndarray | StyleSquares, stroke_size: float) -> EncodedStyle:
    """Tokens that say which picture they are of, and at which stroke size."""
    tokens = np.full((1, 2, 4), _value(picture) + stroke_size / 10, np.float32)
    return EncodedStyle(tokens, np.zeros((1, 6), np.float32))


def _frame(value: int) -> np.ndarray:
    return np.full((12, 10, 3), value, np.uint8)


def _mixer(bundle: Bundle, clock: Clock, count: int) -> StyleMixer:
    mixer = StyleMixer(encode, bundle, now=clock)
    for i in range(count):
        mixer.add(_frame(i), f"s{i}")
    return mixer


@pytest.fixture
def mixer(handmade: Bundle, clock: Clock) -> Iterator[StyleMixer]:
    """Four styles, s0 shown."""
    made = _mixer(handmade, clock, 4)
    yield made
    made.close()


def _tokens(mixer: StyleMixer, now: float) -> np.ndarray:
    return mixer.at(now)[0].tokens


def _fading(mixer: StyleMixer, now: float) -> bool:
    """Whether style or strength are still on their way."""
    return mixer.weights_at(now) != mixer.weights_at(math.inf) or mixer.at(now)[1] != mixer.strength


def _names(mixer: StyleMixer) -> list[str]:
    return [card.name for card in mixer.cards]


def _wait(mixer: StyleMixer) -> None:
    """Until the background is done."""
    done = threading.Event()
    mixer._pool.submit(lambda: mixer._strokes.submit(done.set))
    assert done.wait(WAIT_S)


# Ramps


@given(st.floats(0.01, 100), st.booleans())
@settings(deadline=None, max_examples=25)
def test_a_ramp_goes_from_0_to_1_and_never_back(seconds: float, from_rest: bool) -> None:
    ramp = Ramp(5.0, seconds, from_rest)
    levels = [ramp.progress(5.0 + seconds * i / 500) for i in range(-10, 511)]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (0.0, 1.0)
    assert len(set(levels)) == FADE_STEPS + 1
    assert all((level * FADE_STEPS).is_integer() for level in levels)


def test_a_ramp_from_rest_is_slow_at_both_ends_and_one_in_motion_only_at_the_last() -> None:
    rest, moving = Ramp(0.0, 1.0), Ramp(0.0, 1.0, from_rest=False)
    assert rest.progress(0.5) == 0.5
    assert rest.progress(0.1) < 0.05 < 0.15 < moving.progress(0.1)
    assert rest.progress(0.9) > 0.95
    assert moving.progress(0.9) > 0.95


# Exactness and identity


def test_the_first_style_is_shown_and_nothing_changes_by_itself(mixer: StyleMixer) -> None:
    style, strength = mixer.at(100.0)
    assert style is mixer.cards[0].style
    assert strength == 1.0
    for later in (100.0, 101.0, 1e6):
        assert mixer.at(later)[0] is style
        assert not _fading(mixer, later)
    assert mixer.title(0.0) == "s0"


def test_a_crossfade_starts_and_ends_with_the_styles_themselves(mixer: StyleMixer, clock: Clock) -> None:
    mixer.select(2, 2.0)
    assert mixer.at(clock.at)[0] is mixer.cards[0].style
    middle = mixer.at(clock.at + 1.0)[0]
    expected = blend([(mixer.cards[0].style, 0.5), (mixer.cards[2].style, 0.5)])
    np.testing.assert_array_equal(middle.tokens, expected.tokens)
    assert _fading(mixer, clock.at + 1.0)
    assert mixer.at(clock.at + 2.0)[0] is mixer.cards[2].style
    assert not _fading(mixer, clock.at + 2.0)


def test_a_change_in_no_time_is_immediate(mixer: StyleMixer, clock: Clock) -> None:
    mixer.select(3)
    assert mixer.at(clock.at)[0] is mixer.cards[3].style
    assert mixer.at(clock.at - 0.01)[0] is mixer.cards[3].style  # a frame whose clock was read just before


def test_weights_1_and_0_are_the_style_itself(mixer: StyleMixer, clock: Clock) -> None:
    mixer.set_weights([0.0, 5.0])
    assert mixer.at(clock.at)[0] is mixer.cards[1].style


def test_a_blend_is_that_of_the_conditioning_and_stays_one_object(mixer: StyleMixer, clock: Clock) -> None:
    mixer.set_weights({0: 3.0, 2: 1.0, 3: 0.0}, 1.0)
    style = mixer.at(clock.at + 1)[0]
    expected = blend([(mixer.cards[0].style, 3.0), (mixer.cards[2].style, 1.0)])
    np.testing.assert_array_equal(style.tokens, expected.tokens)
    assert style.text_embeds is not None
    assert expected.text_embeds is not None
    np.testing.assert_array_equal(style.text_embeds, expected.text_embeds)
    assert mixer.at(clock.at + 50)[0] is style
    assert mixer.weights_at(clock.at + 50) == {0: 0.75, 2: 0.25}


def test_a_crossfade_has_a_limited_number_of_styles(mixer: StyleMixer, clock: Clock) -> None:
    mixer.select(1, 10.0)
    seen = [mixer.at(clock.at + 10 * i / 2000)[0] for i in range(2001)]
    changes = sum(a is not b for a, b in pairwise(seen))
    assert changes == FADE_STEPS


# Timing


def test_a_crossfade_moves_one_way_and_evenly(mixer: StyleMixer, clock: Clock) -> None:
    mixer.select(1, 1.0)
    a, b = mixer.cards[0].style.tokens, mixer.cards[1].style.tokens
    way = [float(((_tokens(mixer, clock.at + i / 200) - a) / (b - a)).mean()) for i in range(201)]
    steps = np.diff(way)
    assert steps.min() > -1e-5
    assert steps.max() < 2.1 / FADE_STEPS
    assert abs(way[100] - 0.5) < 0.01


Change = tuple[str, int, float, float]
changes = st.lists(
    st.tuples(
        st.sampled_from(["select", "next", "previous", "adjust", "weights"]),
        st.integers(0, 3),
        st.just(0.0) | st.floats(0.01, 3.0),
        st.floats(0.0, 2.0),
    ),
    min_size=1,
    max_size=12,
)


def _apply(mixer: StyleMixer, change: Change) -> None:
    kind, index, seconds, _ = change
    match kind:
        case "select":
            mixer.select(index, seconds)
        case "next":
            mixer.step(1, seconds)
        case "previous":
            mixer.step(-1, seconds)
        case "adjust":
            mixer.adjust(index, seconds - 1.5, seconds)
        case _:
            mixer.set_weights([0.0] * index + [1.0, seconds], seconds) if index < 3 else None


@given(changes)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_no_sequence_of_changes_makes_the_style_jump(handmade: Bundle, changes: list[Change]) -> None:
    clock = Clock()
    mixer = _mixer(handmade, clock, 4)
    for change in changes:
        before, _ = mixer.at(clock.at)
        _apply(mixer, change)
        if change[2] > 0:
            assert mixer.at(clock.at)[0] is before
        clock.at += change[3]
        weights = mixer.weights_at(clock.at)
        assert sum(weights.values()) == pytest.approx(1)
        assert min(weights.values()) > 0
        shown = sum(share * mixer.cards[i].style.tokens for i, share in weights.items())
        np.testing.assert_allclose(_tokens(mixer, clock.at), shown, atol=5e-3)
    clock.at += 10
    assert not _fading(mixer, clock.at)
    assert mixer.at(clock.at)[0] is mixer.at(clock.at + 1)[0]


def test_a_key_that_repeats_keeps_the_picture_moving(mixer: StyleMixer, clock: Clock) -> None:
    """Thirty changes a second, each of which begins a fade of a second."""
    mixer.select(1, 1.0)
    clock.at += 1 / 30
    for _ in range(30):
        mixer.set_weights([0.0, 0.0, 1.0 + clock.at, 1.0], 1.0)  # each one new
        clock.at += 1 / 30
    assert mixer.weights_at(clock.at)[2] > 0.5


def test_a_change_to_the_same_target_does_not_restart_the_fade_but_may_shorten_it(
    mixer: StyleMixer, clock: Clock
) -> None:
    mixer.select(1, 1.0)
    clock.at += 0.5
    mixer.select(1, 1.0)
    assert mixer.at(clock.at + 0.5)[0] is mixer.cards[1].style
    mixer.select(2, 10.0)
    clock.at += 1.0
    mixer.select(2, 0.0)
    assert mixer.at(clock.at)[0] is mixer.cards[2].style


def test_steps_wrap_around(mixer: StyleMixer, clock: Clock) -> None:
    names = []
    for _ in range(5):
        mixer.step(1)
        names.append(mixer.title(clock.at))
    assert names == ["s1", "s2", "s3", "s0", "s1"]
    mixer.step(-1)
    mixer.step(-1)
    assert mixer.title(clock.at) == "s3"
    mixer.step(1, 1.0)
    mixer.step(1, 1.0)  # from where the first was going
    assert mixer.title(clock.at + 2) == "s1"
    mixer.set_weights([0.1, 0.2, 0.7])
    mixer.step(1)
    assert mixer.title(clock.at) == "s3"


# Weights


def test_adjust_moves_a_share_and_leaves_the_proportions_of_the_others(
    mixer: StyleMixer, clock: Clock
) -> None:
    mixer.set_weights([2.0, 1.0, 1.0])
    mixer.adjust(3, 0.2)
    weights = mixer.weights_at(clock.at + 1)
    assert weights == pytest.approx({0: 0.4, 1: 0.2, 2: 0.2, 3: 0.2})
    mixer.adjust(3, -0.5)
    assert mixer.weights_at(clock.at + 1) == pytest.approx({0: 0.5, 1: 0.25, 2: 0.25})


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-0.5, 0.5)), max_size=20))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_shares_always_add_up_to_one(handmade: Bundle, moves: list[tuple[int, float]]) -> None:
    clock = Clock()
    mixer = _mixer(handmade, clock, 4)
    for index, delta in moves:
        before = mixer.weights_at(clock.at).get(index, 0.0)
        mixer.adjust(index, delta, 0)
        weights = mixer.weights_at(clock.at)
        assert sum(weights.values()) == pytest.approx(1)
        if len(weights) > 1:
            assert weights.get(index, 0.0) == pytest.approx(min(1, max(0, before + delta)), abs=1e-5)


def test_a_style_that_took_everything_returns_the_shares(mixer: StyleMixer, clock: Clock) -> None:
    mixer.set_weights([3.0, 1.0, 1.0])
    for _ in range(12):
        mixer.adjust(1, 0.1, 0)
    assert mixer.at(clock.at)[0] is mixer.cards[1].style
    mixer.adjust(1, -0.6, 0)
    assert mixer.weights_at(clock.at) == pytest.approx({0: 0.45, 1: 0.4, 2: 0.15})
    mixer.select(2)
    mixer.adjust(2, -0.5)  # alone: there is nobody to give to
    assert mixer.weights_at(clock.at + 1) == {2: 1.0}


def test_styles_without_weight_cost_nothing(
    handmade: Bundle, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = _mixer(handmade, clock, 250)
    blended: list[int] = []

    def counted(parts: list[tuple[EncodedStyle, float]]) -> EncodedStyle:
        blended.append(len(parts))
        return blend(parts)

    monkeypatch.setattr("std_rt.live.style_mixer.blend", counted)
    mixer.set_weights([1.0 if i in (17, 203) else 0.0 for i in range(250)], 1.0)
    for i in range(100):
        mixer.at(clock.at + i / 50)
    assert len(mixer.cards) == 250
    assert max(blended) == 2
    assert len(blended) <= FADE_STEPS
    for _ in range(240):  # a key held down: every fade is cut off by the next
        mixer.step(1, 2.0)
        clock.at += 1 / 30
        mixer.at(clock.at)
    assert max(blended) == 2
    mixer.close()


# Strength


def test_strength_fades_within_its_range(mixer: StyleMixer, clock: Clock) -> None:
    mixer.set_strength(2.0, 1.0)
    assert mixer.strength == 2.0
    assert mixer.at(clock.at)[1] == 1.0
    assert mixer.at(clock.at + 0.5)[1] == 1.5
    assert _fading(mixer, clock.at + 0.5)
    assert mixer.at(clock.at + 1)[1] == 2.0
    mixer.nudge(5.0, 0)
    assert mixer.strength == 2.0
    for _ in range(7):
        mixer.nudge(-0.3, 0)
    assert mixer.at(clock.at)[1] == 0.0
    for _ in range(10):
        mixer.nudge(0.1)
    assert mixer.at(clock.at + 1)[1] == 1.0


def test_strength_does_not_jump_in_the_middle_of_a_fade(mixer: StyleMixer, clock: Clock) -> None:
    mixer.set_strength(2.0, 1.0)
    clock.at += 0.4
    before = mixer.at(clock.at)[1]
    mixer.set_strength(0.0, 1.0)
    assert mixer.at(clock.at)[1] == before
    later = [mixer.at(clock.at + i / 100)[1] for i in range(101)]
    assert later == sorted(later, reverse=True)
    assert later[-1] == 0.0


@pytest.mark.parametrize("strength", [-0.1, 2.1, math.nan, math.inf])
def test_a_strength_out_of_range_is_refused(handmade: Bundle, mixer: StyleMixer, strength: float) -> None:
    with pytest.raises(UsageError, match=r"strength must be in 0\.\.2"):
        mixer.set_strength(strength)
    with pytest.raises(UsageError, match=r"strength must be in 0\.\.2"):
        StyleMixer(encode, handmade, strength=strength)


# Cycling


def test_a_cycle_advances_and_restarts_its_wait_after_a_change(mixer: StyleMixer, clock: Clock) -> None:
    mixer.cycle(10.0, 2.0)
    assert mixer.title(110 - 0.1) == "s0"
    mixer.at(109.9)
    assert not _fading(mixer, 109.9)
    mixer.at(110.0)
    assert _fading(mixer, 111.0)
    assert mixer.at(112.0)[0] is mixer.cards[1].style
    clock.at = 115.0
    mixer.select(3, 1.0)
    assert mixer.at(124.9)[0] is mixer.cards[3].style
    mixer.at(125.0)
    assert mixer.at(127.0)[0] is mixer.cards[0].style
    clock.at = 128.0
    mixer.cycle(0, 0)
    assert mixer.at(9999.0)[0] is mixer.cards[0].style


def test_a_cycle_after_a_pause_is_one_step_and_one_style_stays(
    handmade: Bundle, mixer: StyleMixer, clock: Clock
) -> None:
    mixer.cycle(1.0, 0.5)
    mixer.at(5000.25)
    assert mixer.at(5001.0)[0] is mixer.cards[1].style
    alone = _mixer(handmade, clock, 1)
    alone.cycle(1.0, 1.0)
    assert alone.at(200.0)[0] is alone.cards[0].style
    with pytest.raises(UsageError, match="does not fit into 1 s per style"):
        mixer.cycle(1.0, 2.0)


def test_a_long_session_does_not_grow(handmade: Bundle, clock: Clock) -> None:
    import tracemalloc

    mixer = _mixer(handmade, clock, 30)
    mixer.cycle(0.5, 0.4)

    def play(seconds: int) -> None:
        for _ in range(seconds * 20):
            clock.at += 0.05
            mixer.at(clock.at)
            if round(clock.at * 20) % 37 == 0:
                mixer.nudge(0.1 if clock.at % 7 < 3 else -0.1)
                mixer.adjust(round(clock.at) % 30, 0.2)

    play(30)
    tracemalloc.start()
    play(10)
    before, _ = tracemalloc.get_traced_memory()
    play(60)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 20_000
    mixer.close()


# Titles


def test_a_title_names_shares(mixer: StyleMixer, clock: Clock) -> None:
    mixer.set_weights([3.0, 7.0])
    assert mixer.title(clock.at) == "s1 70 % + s0 30 %"
    mixer.set_weights([1.0, 1.0, 1.0, 1.0])
    assert mixer.title(clock.at) == "s0 25 % + s1 25 % + s2 25 % + 1 more"
    mixer.set_weights([1000.0, 1.0])
    assert mixer.title(clock.at) == "s0"
    mixer.select(0)
    mixer.select(1, 1.0)
    assert mixer.title(clock.at + 0.5) == "s0 50 % + s1 50 %"


# Loading


def test_a_picture_that_is_deleted_changes_nothing(mixer: StyleMixer, clock: Clock, tmp_path: Path) -> None:
    path = picture(tmp_path / "ink.png", 200, 150)
    index = mixer.add(path)
    path.unlink()
    mixer.select(index)
    assert mixer.at(clock.at)[0] is mixer.cards[index].style
    assert _names(mixer)[index] == "ink"
    assert mixer.cards[index].thumbnail.shape == (64, 64, 3)  # twice the side of this bundle's encoder
    assert mixer.cards[0].thumbnail.shape == (10, 10, 3)  # never enlarged


def test_style_files_join_pictures(handmade: Bundle, mixer: StyleMixer, clock: Clock, tmp_path: Path) -> None:
    saved = read_style(_frame(77), handmade, encode, "mine")
    save_style(tmp_path / "mine.safetensors", saved)
    mixer.select(mixer.add(tmp_path / "mine.safetensors"))
    np.testing.assert_array_equal(_tokens(mixer, clock.at), saved.style.tokens)
    assert mixer.title(clock.at) == "mine"


def test_a_dropped_picture_is_shown_once_it_is_loaded(
    mixer: StyleMixer, clock: Clock, tmp_path: Path
) -> None:
    mixer.add_in_background(picture(tmp_path / "late.png", 20, 20), show_s=1.0)
    _wait(mixer)
    assert _names(mixer)[-1] == "late"
    assert _fading(mixer, clock.at + 0.5)
    assert mixer.title(clock.at + 1.0) == "late"


def test_a_dropped_folder_shows_its_first_readable_picture(
    mixer: StyleMixer, clock: Clock, tmp_path: Path
) -> None:
    for name in ("b", "c"):
        picture(tmp_path / f"{name}.png", 20, 20)
    (tmp_path / "a.png").write_bytes(b"no picture")
    mixer.add_in_background(tmp_path, show_s=0.0)
    _wait(mixer)
    assert _names(mixer)[4:] == ["b", "c"]
    assert mixer.title(clock.at) == "b"
    assert len(mixer.problems) == 1
    assert "a.png" in mixer.problems[0]


def test_failures_in_the_background_are_one_line_each(handmade: Bundle, clock: Clock, tmp_path: Path) -> None:
    def broken(frame: StyleSquares, stroke_size: float) -> EncodedStyle:
        if _value(frame) == 99:
            raise RuntimeError("engine\nfailed")
        return encode(frame)

    mixer = StyleMixer(broken, handmade, now=clock)
    mixer.add(_frame(0))
    (tmp_path / "empty").mkdir()
    from std_rt.media import write_picture

    write_picture(tmp_path / "bad.png", _frame(99))
    for path in ("nowhere.png", "empty", "bad.png"):
        mixer.add_in_background(tmp_path / path)
    _wait(mixer)
    assert len(mixer.cards) == 1
    assert [len(problem.splitlines()) for problem in mixer.problems] == [1, 1, 1]
    assert "nowhere.png" in mixer.problems[0]
    assert "empty" in mixer.problems[1]
    assert "bad.png cannot be used as a style: RuntimeError: engine failed" in mixer.problems[2]
    for _ in range(150):
        mixer.add_in_background(tmp_path / "nowhere.png")
    _wait(mixer)
    assert len(mixer.problems) == 100
    mixer.close()


def test_frames_do_not_wait_for_the_encoder(handmade: Bundle, clock: Clock, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(frame: StyleSquares, stroke_size: float) -> EncodedStyle:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(WAIT_S)
        return encode(frame)

    mixer = StyleMixer(slow, handmade, now=clock)
    mixer.add(_frame(0), "first")
    mixer.add(_frame(1), "second")
    for name in ("a", "b"):
        mixer.add_in_background(picture(tmp_path / f"{name}.png", 20, 20))
    assert begun.wait(WAIT_S)
    mixer.select(1, 1.0)
    assert mixer.at(clock.at + 1)[0] is mixer.cards[1].style
    assert len(mixer.cards) == 2
    threading.Timer(0.05, go_on.set).start()
    mixer.close()  # waits for the one in the encoder, drops the other
    assert _names(mixer) == ["first", "second", "a"]
    mixer.add_in_background(tmp_path / "b.png")
    assert len(mixer.cards) == 3


def test_a_command_line_without_weights_shows_its_first(
    handmade: Bundle, clock: Clock, tmp_path: Path
) -> None:
    paths = [picture(tmp_path / f"{name}.png", 20, 20, seed) for seed, name in enumerate("cab")]
    mixer = StyleMixer(encode, handmade, now=clock)
    mixer.fill([(path, None) for path in paths])
    assert mixer.title(clock.at) == "c"
    _wait(mixer)
    assert _names(mixer) == ["c", "a", "b"]
    mixer.close()


def test_a_command_line_with_weights_shows_their_blend(
    handmade: Bundle, clock: Clock, tmp_path: Path
) -> None:
    paths = [picture(tmp_path / f"{name}.png", 20, 20, seed) for seed, name in enumerate("abcd")]
    mixer = StyleMixer(encode, handmade, now=clock)
    mixer.fill(list(zip(paths, (None, 0.7, 0.0, 0.3), strict=True)))
    assert mixer.title(clock.at) == "b 70 % + d 30 %"
    _wait(mixer)
    assert _names(mixer) == ["b", "d", "a", "c"]
    mixer.close()


def test_a_first_style_that_cannot_be_read_is_an_error(handmade: Bundle, tmp_path: Path) -> None:
    mixer = StyleMixer(encode, handmade)
    with pytest.raises(UsageError, match="a style is needed"):
        mixer.fill([])
    with pytest.raises(MediaError, match=r"no\.png"):
        mixer.fill([(tmp_path / "no.png", None)])


# Refusals


def test_missing_styles_are_refused(handmade: Bundle, mixer: StyleMixer) -> None:
    for index in (-1, 4):
        with pytest.raises(UsageError, match="4 are loaded"):
            mixer.select(index)
        with pytest.raises(UsageError, match="4 are loaded"):
            mixer.adjust(index, 0.1)
        with pytest.raises(UsageError, match="4 are loaded"):
            mixer.set_weights({index: 1.0})
    empty = StyleMixer(encode, handmade)
    for asked in (lambda: empty.at(0.0), lambda: empty.step(1)):
        with pytest.raises(UsageError, match="no style is loaded"):
            asked()
    assert (empty.title(0.0), empty.weights_at(0.0)) == ("", {})


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_an_impossible_time_is_refused_and_changes_nothing(
    mixer: StyleMixer, clock: Clock, seconds: float
) -> None:
    for change in (
        lambda: mixer.select(1, seconds),
        lambda: mixer.step(1, seconds),
        lambda: mixer.set_weights([0.0, 1.0], seconds),
        lambda: mixer.set_strength(0.5, seconds),
        lambda: mixer.cycle(seconds, 1.0),
        lambda: mixer.add_in_background(Path("x.png"), seconds),
    ):
        with pytest.raises(UsageError, match="a time in seconds must be 0 or more"):
            change()
    assert mixer.at(clock.at) == (mixer.cards[0].style, 1.0)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [-1.0, 2.0], [math.nan], [math.inf]])
def test_impossible_weights_are_refused(mixer: StyleMixer, clock: Clock, weights: list[float]) -> None:
    with pytest.raises(UsageError, match="style weights"):
        mixer.set_weights(weights)
    assert mixer.title(clock.at) == "s0"


def test_huge_weights_do_not_overflow(mixer: StyleMixer, clock: Clock) -> None:
    mixer.set_weights([1e308, 1e308])
    assert mixer.weights_at(clock.at) == {0: 0.5, 1: 0.5}
    with pytest.raises(UsageError, match="finite number"):
        mixer.adjust(0, math.nan)


# Stroke size


def _level(mixer: StyleMixer, now: float) -> float:
    return round(float(_tokens(mixer, now)[0, 0, 0]), 4)


@pytest.fixture
def strokes(handmade: Bundle, clock: Clock) -> Iterator[StyleMixer]:
    """Pictures 0, 1 and 2, encoded by `at_size`."""
    mixer = StyleMixer(at_size, handmade, now=clock)
    for value in range(3):
        mixer.add(_frame(value))
    yield mixer
    mixer.close()


def test_a_stroke_size_fades_in_and_holds_for_every_style(strokes: StyleMixer, clock: Clock) -> None:
    strokes.set_stroke_size(2.0)
    _wait(strokes)
    assert strokes.stroke_size == 2
    assert _level(strokes, clock.at) == 0.1
    assert 0.1 < _level(strokes, clock.at + NUDGE_S / 2) < 0.2
    assert _level(strokes, clock.at + NUDGE_S) == 0.2
    strokes.select(2)
    assert _level(strokes, clock.at) == 2.2
    added = strokes.add(_frame(9))
    strokes.select(added)
    assert _level(strokes, clock.at) == 9.2


def test_a_crossfade_goes_on_while_the_stroke_size_changes(strokes: StyleMixer, clock: Clock) -> None:
    strokes.set_weights({0: 1, 1: 1}, 4.0)
    clock.at += 1
    before = _level(strokes, clock.at)
    strokes.set_stroke_size(0.5)
    _wait(strokes)
    assert _level(strokes, clock.at) == before
    assert strokes.weights_at(clock.at + 1)[1] < 0.5
    assert _level(strokes, clock.at + 3) == 0.55


def test_the_cycle_and_the_blend_do_not_notice_a_stroke_size(strokes: StyleMixer, clock: Clock) -> None:
    strokes.adjust(1, 1.0)  # everything; the others' shares are remembered
    strokes.cycle(10, 1)
    clock.at += 6
    strokes.set_stroke_size(1.5)
    _wait(strokes)
    assert strokes.weights_at(math.inf) == {1: 1.0}
    strokes.at(clock.at + 5)
    assert strokes.weights_at(math.inf) == {2: 1.0}


def test_shown_styles_are_encoded_first_and_frames_do_not_wait(handmade: Bundle, clock: Clock) -> None:
    asked, go_on, seen = threading.Event(), threading.Event(), []

    def slow(frame: StyleSquares, stroke_size: float) -> EncodedStyle:
        if stroke_size != 1:
            seen.append((_value(frame), stroke_size))
            asked.set()
            assert go_on.wait(WAIT_S)
        return at_size(frame, stroke_size)

    mixer = StyleMixer(slow, handmade, now=clock)
    for value in range(3):
        mixer.add(_frame(value))
    mixer.select(2)
    mixer.set_stroke_size(1.5)
    assert asked.wait(WAIT_S)
    assert _level(mixer, clock.at) == 2.1  # as before, at once
    mixer.set_stroke_size(0.5)
    mixer.set_stroke_size(2.0)
    go_on.set()
    _wait(mixer)
    assert _level(mixer, clock.at + 1) == 2.2
    assert seen == [(2, 1.5), (2, 2.0), (0, 2.0), (1, 2.0)]  # 0.5 was overtaken
    mixer.close()


def test_a_nudge_stays_in_range(strokes: StyleMixer) -> None:
    sizes = []
    for delta in (0.1, 5, 0.1, -0.1, -9):
        strokes.nudge_stroke_size(delta)
        sizes.append(strokes.stroke_size)
    assert sizes == [1.1, 2, 2, 1.9, 0.5]
    with pytest.raises(UsageError, match=r"must be in 0\.5\.\.2, got 3"):
        strokes.set_stroke_size(3)


def test_style_files_keep_their_stroke_size(handmade: Bundle, clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_style(path, read_style(_frame(7), handmade, at_size, "mine"))
    mixer = StyleMixer(at_size, handmade, now=clock)
    mixer.add(path)
    with pytest.raises(UsageError, match="style 'mine' is a style file without its picture"):
        mixer.set_stroke_size(2.0)
    mixer.select(mixer.add(_frame(1)))
    mixer.set_stroke_size(2.0)
    mixer.add(path)
    _wait(mixer)
    assert [round(float(card.style.tokens.max()), 4) for card in mixer.cards] == [7.1, 1.2, 7.1]
    mixer.close()


def test_a_stroke_size_that_was_asked_for_must_be_that_of_style_files(
    handmade: Bundle, clock: Clock, tmp_path: Path
) -> None:
    path = tmp_path / "mine.safetensors"
    save_style(path, read_style(_frame(7), handmade, at_size, "mine"))
    mixer = StyleMixer(at_size, handmade, stroke_size=1.5, now=clock)
    mixer.add(_frame(0))
    assert _level(mixer, clock.at) == 0.15
    with pytest.raises(
        MediaError, match=r"was saved at stroke size 1 without its picture, which stroke size 1\.5"
    ):
        mixer.add(path)
    with pytest.raises(UsageError, match="stroke size must be in"):
        StyleMixer(at_size, handmade, stroke_size=3)
    mixer.close()


def test_an_encoder_that_fails_leaves_the_styles_as_they_are(handmade: Bundle, clock: Clock) -> None:
    def broken(frame: StyleSquares, stroke_size: float) -> EncodedStyle:
        if stroke_size != 1:
            raise RuntimeError("engine\nfailed")
        return at_size(frame, stroke_size)

    mixer = StyleMixer(broken, handmade, now=clock)
    mixer.add(_frame(3))
    mixer.set_stroke_size(2.0)
    _wait(mixer)
    assert list(mixer.problems) == ["stroke size 2 cannot be set: RuntimeError: engine failed"]
    assert _level(mixer, clock.at + 1) == 3.1
    mixer.close()
