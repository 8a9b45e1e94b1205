"""The deck: crossfades on a clock of the test's own, loading beside the frames, exact ends."""

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

from std_rt.core.bundle import Bundle
from std_rt.core.errors import MediaError, UsageError
from std_rt.live.style_mixer import FADE_STEPS, Ramp, StyleMixer
from std_rt.pipeline.conditioning import EncodedStyle, blend
from std_rt.pipeline.style_file import read_style, save_style

WAIT_S = 30


def encode(frame: np.ndarray) -> EncodedStyle:
    """Tokens of a made-up encoder: random, but the same for the same picture."""
    rng = np.random.default_rng(int(frame[0, 0, 0]))
    return EncodedStyle(rng.standard_normal((1, 2, 4), np.float32), rng.standard_normal((1, 6), np.float32))


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _frame(value: int) -> np.ndarray:
    return np.full((12, 10, 3), value, np.uint8)


def _deck(bundle: Bundle, clock: Clock, count: int) -> StyleMixer:
    deck = StyleMixer(encode, bundle, now=clock)
    for i in range(count):
        deck.add(_frame(i), f"s{i}")
    return deck


@pytest.fixture
def deck(handmade: Bundle, clock: Clock) -> Iterator[StyleMixer]:
    """Four styles, s0 shown."""
    made = _deck(handmade, clock, 4)
    yield made
    made.close()


def _tokens(deck: StyleMixer, now: float) -> np.ndarray:
    return deck.at(now)[0].tokens


def _wait(deck: StyleMixer) -> None:
    """Until the background is done."""
    done = threading.Event()
    deck._pool.submit(done.set)
    assert done.wait(WAIT_S)


# Ramps


@given(st.floats(0.01, 100), st.booleans())
@settings(deadline=None)
def test_a_ramp_goes_from_0_to_1_and_never_back(seconds: float, from_rest: bool) -> None:
    ramp = Ramp(5.0, seconds, from_rest)
    levels = [ramp.level(5.0 + seconds * i / 500) for i in range(-10, 511)]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (0.0, 1.0)
    assert len(set(levels)) == FADE_STEPS + 1
    assert all((level * FADE_STEPS).is_integer() for level in levels)


def test_a_ramp_from_rest_is_slow_at_both_ends_and_one_in_motion_only_at_the_last() -> None:
    rest, moving = Ramp(0.0, 1.0), Ramp(0.0, 1.0, from_rest=False)
    assert rest.level(0.5) == 0.5
    assert rest.level(0.1) < 0.05 < 0.15 < moving.level(0.1)
    assert rest.level(0.9) > 0.95
    assert moving.level(0.9) > 0.95


# Exactness and identity


def test_the_first_style_is_shown_and_nothing_changes_by_itself(deck: StyleMixer) -> None:
    style, strength = deck.at(100.0)
    assert style is deck.cards[0].style
    assert strength == 1.0
    for later in (100.0, 101.0, 1e6):
        assert deck.at(later)[0] is style
        assert not deck.fading(later)
    assert deck.title(0.0) == "s0"


def test_a_crossfade_begins_with_one_style_itself_and_ends_with_the_other(
    deck: StyleMixer, clock: Clock
) -> None:
    deck.select(2, 2.0)
    assert deck.at(clock.s)[0] is deck.cards[0].style
    middle = deck.at(clock.s + 1.0)[0]
    expected = blend([(deck.cards[0].style, 0.5), (deck.cards[2].style, 0.5)])
    np.testing.assert_array_equal(middle.tokens, expected.tokens)
    assert deck.fading(clock.s + 1.0)
    assert deck.at(clock.s + 2.0)[0] is deck.cards[2].style
    assert not deck.fading(clock.s + 2.0)


def test_a_change_without_time_is_there_at_once(deck: StyleMixer, clock: Clock) -> None:
    deck.select(3)
    assert deck.at(clock.s)[0] is deck.cards[3].style
    assert deck.at(clock.s - 0.01)[0] is deck.cards[3].style  # a frame whose clock was read just before


def test_weights_1_and_0_are_the_style_itself(deck: StyleMixer, clock: Clock) -> None:
    deck.set_weights([0.0, 5.0])
    assert deck.at(clock.s)[0] is deck.cards[1].style


def test_a_blend_is_that_of_the_conditioning_and_stays_one_object(deck: StyleMixer, clock: Clock) -> None:
    deck.set_weights({0: 3.0, 2: 1.0, 3: 0.0}, 1.0)
    style = deck.at(clock.s + 1)[0]
    expected = blend([(deck.cards[0].style, 3.0), (deck.cards[2].style, 1.0)])
    np.testing.assert_array_equal(style.tokens, expected.tokens)
    assert style.text_embeds is not None
    assert expected.text_embeds is not None
    np.testing.assert_array_equal(style.text_embeds, expected.text_embeds)
    assert deck.at(clock.s + 50)[0] is style
    assert deck.weights_at(clock.s + 50) == {0: 0.75, 2: 0.25}


def test_a_crossfade_has_a_limited_number_of_styles(deck: StyleMixer, clock: Clock) -> None:
    deck.select(1, 10.0)
    seen = [deck.at(clock.s + 10 * i / 2000)[0] for i in range(2001)]
    changes = sum(a is not b for a, b in pairwise(seen))
    assert changes == FADE_STEPS


# Timing


def test_a_crossfade_moves_one_way_and_evenly(deck: StyleMixer, clock: Clock) -> None:
    deck.select(1, 1.0)
    a, b = deck.cards[0].style.tokens, deck.cards[1].style.tokens
    way = [float(((_tokens(deck, clock.s + i / 200) - a) / (b - a)).mean()) for i in range(201)]
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


def _apply(deck: StyleMixer, change: Change) -> None:
    kind, index, seconds, _ = change
    match kind:
        case "select":
            deck.select(index, seconds)
        case "next":
            deck.next(seconds)
        case "previous":
            deck.previous(seconds)
        case "adjust":
            deck.adjust(index, seconds - 1.5, seconds)
        case _:
            deck.set_weights([0.0] * index + [1.0, seconds], seconds) if index < 3 else None


@given(changes)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_whatever_changes_in_the_middle_of_whatever_nothing_jumps(
    handmade: Bundle, changes: list[Change]
) -> None:
    clock = Clock()
    deck = _deck(handmade, clock, 4)
    for change in changes:
        before, _ = deck.at(clock.s)
        _apply(deck, change)
        if change[2] > 0:
            assert deck.at(clock.s)[0] is before
        clock.s += change[3]
        weights = deck.weights_at(clock.s)
        assert sum(weights.values()) == pytest.approx(1)
        assert min(weights.values()) > 0
        shown = sum(share * deck.cards[i].style.tokens for i, share in weights.items())
        np.testing.assert_allclose(_tokens(deck, clock.s), shown, atol=5e-3)
    clock.s += 10
    assert not deck.fading(clock.s)
    assert deck.at(clock.s)[0] is deck.at(clock.s + 1)[0]


def test_a_key_that_repeats_keeps_the_picture_moving(deck: StyleMixer, clock: Clock) -> None:
    """Thirty changes a second, each of which begins a fade of a second."""
    deck.select(1, 1.0)
    clock.s += 1 / 30
    for _ in range(30):
        deck.set_weights([0.0, 0.0, 1.0 + clock.s, 1.0], 1.0)  # each one new
        clock.s += 1 / 30
    assert deck.weights_at(clock.s)[2] > 0.5


def test_a_change_to_where_a_fade_is_going_does_not_begin_it_anew_but_may_hasten_it(
    deck: StyleMixer, clock: Clock
) -> None:
    deck.select(1, 1.0)
    clock.s += 0.5
    deck.select(1, 1.0)
    assert deck.at(clock.s + 0.5)[0] is deck.cards[1].style
    deck.select(2, 10.0)
    clock.s += 1.0
    deck.select(2, 0.0)
    assert deck.at(clock.s)[0] is deck.cards[2].style


def test_next_and_previous_go_round(deck: StyleMixer, clock: Clock) -> None:
    names = []
    for _ in range(5):
        deck.next()
        names.append(deck.title(clock.s))
    assert names == ["s1", "s2", "s3", "s0", "s1"]
    deck.previous()
    deck.previous()
    assert deck.title(clock.s) == "s3"
    deck.next(1.0)
    deck.next(1.0)  # from where the first was going
    assert deck.title(clock.s + 2) == "s1"
    deck.set_weights([0.1, 0.2, 0.7])
    deck.next()
    assert deck.title(clock.s) == "s3"


# Weights


def test_adjust_moves_a_share_and_leaves_the_proportions_of_the_others(
    deck: StyleMixer, clock: Clock
) -> None:
    deck.set_weights([2.0, 1.0, 1.0])
    deck.adjust(3, 0.2)
    weights = deck.weights_at(clock.s + 1)
    assert weights == pytest.approx({0: 0.4, 1: 0.2, 2: 0.2, 3: 0.2})
    deck.adjust(3, -0.5)
    assert deck.weights_at(clock.s + 1) == pytest.approx({0: 0.5, 1: 0.25, 2: 0.25})


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-0.5, 0.5)), max_size=20))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_shares_stay_shares_however_they_are_moved(handmade: Bundle, moves: list[tuple[int, float]]) -> None:
    clock = Clock()
    deck = _deck(handmade, clock, 4)
    for index, delta in moves:
        before = deck.weights_at(clock.s).get(index, 0.0)
        deck.adjust(index, delta, 0)
        weights = deck.weights_at(clock.s)
        assert sum(weights.values()) == pytest.approx(1)
        if len(weights) > 1:
            assert weights.get(index, 0.0) == pytest.approx(min(1, max(0, before + delta)), abs=1e-5)


def test_a_share_that_went_all_the_way_comes_back(deck: StyleMixer, clock: Clock) -> None:
    deck.set_weights([3.0, 1.0, 1.0])
    for _ in range(12):
        deck.adjust(1, 0.1, 0)
    assert deck.at(clock.s)[0] is deck.cards[1].style
    deck.adjust(1, -0.6, 0)
    assert deck.weights_at(clock.s) == pytest.approx({0: 0.45, 1: 0.4, 2: 0.15})
    deck.select(2)
    deck.adjust(2, -0.5)  # alone: there is nobody to give to
    assert deck.weights_at(clock.s + 1) == {2: 1.0}


def test_hundreds_of_styles_cost_only_those_with_weight(
    handmade: Bundle, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    deck = _deck(handmade, clock, 250)
    blended: list[int] = []

    def counted(parts: list[tuple[EncodedStyle, float]]) -> EncodedStyle:
        blended.append(len(parts))
        return blend(parts)

    monkeypatch.setattr("std_rt.live.style_mixer.blend", counted)
    deck.set_weights([1.0 if i in (17, 203) else 0.0 for i in range(250)], 1.0)
    for i in range(100):
        deck.at(clock.s + i / 50)
    assert len(deck) == 250
    assert max(blended) == 2
    assert len(blended) <= FADE_STEPS
    for _ in range(240):  # a key held down: every fade is cut off by the next
        deck.next(2.0)
        clock.s += 1 / 30
        deck.at(clock.s)
    assert max(blended) == 2
    deck.close()


# Strength


def test_strength_fades_and_keeps_to_its_bounds(deck: StyleMixer, clock: Clock) -> None:
    assert deck.strength_range == (0.0, 2.0)
    deck.set_strength(2.0, 1.0)
    assert deck.strength == 2.0
    assert deck.at(clock.s)[1] == 1.0
    assert deck.at(clock.s + 0.5)[1] == 1.5
    assert deck.fading(clock.s + 0.5)
    assert deck.at(clock.s + 1)[1] == 2.0
    deck.nudge(5.0, 0)
    assert deck.strength == 2.0
    for _ in range(7):
        deck.nudge(-0.3, 0)
    assert deck.at(clock.s)[1] == 0.0
    for _ in range(10):
        deck.nudge(0.1)
    assert deck.at(clock.s + 1)[1] == 1.0


def test_strength_does_not_jump_in_the_middle_of_a_fade(deck: StyleMixer, clock: Clock) -> None:
    deck.set_strength(2.0, 1.0)
    clock.s += 0.4
    before = deck.at(clock.s)[1]
    deck.set_strength(0.0, 1.0)
    assert deck.at(clock.s)[1] == before
    later = [deck.at(clock.s + i / 100)[1] for i in range(101)]
    assert later == sorted(later, reverse=True)
    assert later[-1] == 0.0


@pytest.mark.parametrize("strength", [-0.1, 2.1, math.nan, math.inf])
def test_a_strength_out_of_range_is_refused(handmade: Bundle, deck: StyleMixer, strength: float) -> None:
    with pytest.raises(UsageError, match=r"strength must be in 0\.\.2"):
        deck.set_strength(strength)
    with pytest.raises(UsageError, match=r"strength must be in 0\.\.2"):
        StyleMixer(encode, handmade, strength=strength)


# Cycling


def test_a_cycle_goes_on_by_itself_and_begins_anew_after_a_change(deck: StyleMixer, clock: Clock) -> None:
    deck.cycle(10.0, 2.0)
    assert deck.title(110 - 0.1) == "s0"
    deck.at(109.9)
    assert not deck.fading(109.9)
    deck.at(110.0)
    assert deck.fading(111.0)
    assert deck.at(112.0)[0] is deck.cards[1].style
    clock.s = 115.0
    deck.select(3, 1.0)
    assert deck.at(124.9)[0] is deck.cards[3].style
    deck.at(125.0)
    assert deck.at(127.0)[0] is deck.cards[0].style
    clock.s = 128.0
    deck.cycle(0, 0)
    assert deck.at(9999.0)[0] is deck.cards[0].style


def test_a_cycle_after_a_pause_is_one_step_and_one_style_stays(
    handmade: Bundle, deck: StyleMixer, clock: Clock
) -> None:
    deck.cycle(1.0, 0.5)
    deck.at(5000.25)
    assert deck.at(5001.0)[0] is deck.cards[1].style
    alone = _deck(handmade, clock, 1)
    alone.cycle(1.0, 1.0)
    assert alone.at(200.0)[0] is alone.cards[0].style
    with pytest.raises(UsageError, match="does not fit into 1 s a style"):
        deck.cycle(1.0, 2.0)


def test_a_long_session_grows_by_nothing(handmade: Bundle, clock: Clock) -> None:
    import tracemalloc

    deck = _deck(handmade, clock, 30)
    deck.cycle(0.5, 0.4)

    def play(seconds: int) -> None:
        for _ in range(seconds * 20):
            clock.s += 0.05
            deck.at(clock.s)
            if round(clock.s * 20) % 37 == 0:
                deck.nudge(0.1 if clock.s % 7 < 3 else -0.1)
                deck.adjust(round(clock.s) % 30, 0.2)

    play(60)
    tracemalloc.start()
    play(20)
    before, _ = tracemalloc.get_traced_memory()
    play(200)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 20_000
    deck.close()


# Titles


def test_a_title_names_shares(deck: StyleMixer, clock: Clock) -> None:
    deck.set_weights([3.0, 7.0])
    assert deck.title(clock.s) == "s1 70 % + s0 30 %"
    deck.set_weights([1.0, 1.0, 1.0, 1.0])
    assert deck.title(clock.s, most=2) == "s0 25 % + s1 25 % + 2 more"
    deck.set_weights([1000.0, 1.0])
    assert deck.title(clock.s) == "s0"
    deck.select(0)
    deck.select(1, 1.0)
    assert deck.title(clock.s + 0.5) == "s0 50 % + s1 50 %"


# Loading


def test_a_picture_that_is_deleted_changes_nothing(deck: StyleMixer, clock: Clock, tmp_path: Path) -> None:
    path = picture(tmp_path / "ink.png", 200, 150)
    index = deck.add(path)
    path.unlink()
    deck.select(index)
    assert deck.at(clock.s)[0] is deck.cards[index].style
    assert deck.names[index] == "ink"
    assert deck.cards[index].thumbnail.shape == (96, 96, 3)
    assert deck.cards[0].thumbnail.shape == (10, 10, 3)  # never enlarged


def test_style_files_join_pictures(handmade: Bundle, deck: StyleMixer, clock: Clock, tmp_path: Path) -> None:
    saved = read_style(_frame(77), handmade, encode, "mine")
    save_style(tmp_path / "mine.safetensors", saved)
    deck.select(deck.add(tmp_path / "mine.safetensors"))
    np.testing.assert_array_equal(_tokens(deck, clock.s), saved.style.tokens)
    assert deck.title(clock.s) == "mine"


def test_what_is_dropped_in_comes_when_it_is_ready(deck: StyleMixer, clock: Clock, tmp_path: Path) -> None:
    deck.add_in_background(picture(tmp_path / "late.png", 20, 20), show_s=1.0)
    _wait(deck)
    assert (deck.names[-1], deck.waiting) == ("late", 0)
    assert deck.fading(clock.s + 0.5)
    assert deck.title(clock.s + 1.0) == "late"


def test_a_folder_dropped_in_shows_its_first_that_can_be_read(
    deck: StyleMixer, clock: Clock, tmp_path: Path
) -> None:
    for name in ("b", "c"):
        picture(tmp_path / f"{name}.png", 20, 20)
    (tmp_path / "a.png").write_bytes(b"no picture")
    deck.add_in_background(tmp_path, show_s=0.0)
    _wait(deck)
    assert deck.names[4:] == ["b", "c"]
    assert deck.title(clock.s) == "b"
    assert len(deck.problems) == 1
    assert "a.png is not a picture" in deck.problems[0]


def test_failures_in_the_background_are_lines_and_nothing_else(
    handmade: Bundle, clock: Clock, tmp_path: Path
) -> None:
    def broken(frame: np.ndarray) -> EncodedStyle:
        if frame[0, 0, 0] == 99:
            raise RuntimeError("engine\nfailed")
        return encode(frame)

    deck = StyleMixer(broken, handmade, now=clock)
    deck.add(_frame(0))
    (tmp_path / "empty").mkdir()
    from std_rt.media import write_picture

    write_picture(tmp_path / "bad.png", _frame(99))
    for path in ("nowhere.png", "empty", "bad.png"):
        deck.add_in_background(tmp_path / path)
    _wait(deck)
    assert len(deck) == 1
    assert deck.waiting == 0
    assert [len(problem.splitlines()) for problem in deck.problems] == [1, 1, 1]
    assert "does not exist" in deck.problems[0]
    assert "holds no picture" in deck.problems[1]
    assert "cannot be a style: RuntimeError: engine failed" in deck.problems[2]
    for _ in range(150):
        deck.add_in_background(tmp_path / "nowhere.png")
    _wait(deck)
    assert len(deck.problems) == 100
    deck.close()


def test_frames_do_not_wait_for_what_is_being_encoded(handmade: Bundle, clock: Clock, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(frame: np.ndarray) -> EncodedStyle:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(WAIT_S)
        return encode(frame)

    deck = StyleMixer(slow, handmade, now=clock)
    deck.add(_frame(0), "first")
    deck.add(_frame(1), "second")
    for name in ("a", "b"):
        deck.add_in_background(picture(tmp_path / f"{name}.png", 20, 20))
    assert begun.wait(WAIT_S)
    assert deck.waiting == 2
    deck.select(1, 1.0)
    assert deck.at(clock.s + 1)[0] is deck.cards[1].style
    assert len(deck) == 2
    threading.Timer(0.05, go_on.set).start()
    deck.close()  # waits for the one in the encoder, drops the other
    assert deck.names == ["first", "second", "a"]
    assert deck.waiting == 0
    deck.add_in_background(tmp_path / "b.png")
    assert len(deck) == 3


def test_a_command_line_without_weights_shows_its_first(
    handmade: Bundle, clock: Clock, tmp_path: Path
) -> None:
    paths = [picture(tmp_path / f"{name}.png", 20, 20, seed) for seed, name in enumerate("cab")]
    deck = StyleMixer(encode, handmade, now=clock)
    deck.fill([(path, None) for path in paths])
    assert deck.title(clock.s) == "c"
    _wait(deck)
    assert deck.names == ["c", "a", "b"]
    deck.close()


def test_a_command_line_with_weights_shows_their_blend(
    handmade: Bundle, clock: Clock, tmp_path: Path
) -> None:
    paths = [picture(tmp_path / f"{name}.png", 20, 20, seed) for seed, name in enumerate("abcd")]
    deck = StyleMixer(encode, handmade, now=clock)
    deck.fill(list(zip(paths, (None, 0.7, 0.0, 0.3), strict=True)))
    assert deck.title(clock.s) == "b 70 % + d 30 %"
    _wait(deck)
    assert deck.names == ["b", "d", "a", "c"]
    deck.close()


def test_a_first_style_that_cannot_be_read_is_an_error(handmade: Bundle, tmp_path: Path) -> None:
    deck = StyleMixer(encode, handmade)
    with pytest.raises(UsageError, match="a style is needed"):
        deck.fill([])
    with pytest.raises(MediaError, match="does not exist"):
        deck.fill([(tmp_path / "no.png", None)])


# Refusals


def test_what_is_not_there_is_refused(handmade: Bundle, deck: StyleMixer) -> None:
    for index in (-1, 4):
        with pytest.raises(UsageError, match="4 are loaded"):
            deck.select(index)
        with pytest.raises(UsageError, match="4 are loaded"):
            deck.adjust(index, 0.1)
        with pytest.raises(UsageError, match="4 are loaded"):
            deck.set_weights({index: 1.0})
    empty = StyleMixer(encode, handmade)
    for asked in (lambda: empty.at(0.0), empty.next, empty.previous):
        with pytest.raises(UsageError, match="no style is loaded"):
            asked()
    assert (empty.title(0.0), empty.weights_at(0.0), empty.fading(0.0)) == ("", {}, False)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_a_time_that_is_none_is_refused_and_changes_nothing(
    deck: StyleMixer, clock: Clock, seconds: float
) -> None:
    for change in (
        lambda: deck.select(1, seconds),
        lambda: deck.next(seconds),
        lambda: deck.set_weights([0.0, 1.0], seconds),
        lambda: deck.set_strength(0.5, seconds),
        lambda: deck.cycle(seconds, 1.0),
        lambda: deck.add_in_background(Path("x.png"), seconds),
    ):
        with pytest.raises(UsageError, match="a time in seconds must be 0 or more"):
            change()
    assert deck.at(clock.s) == (deck.cards[0].style, 1.0)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [-1.0, 2.0], [math.nan], [math.inf]])
def test_weights_that_are_none_are_refused(deck: StyleMixer, clock: Clock, weights: list[float]) -> None:
    with pytest.raises(UsageError, match="style weights"):
        deck.set_weights(weights)
    assert deck.title(clock.s) == "s0"


def test_weights_beyond_all_measure_are_weights(deck: StyleMixer, clock: Clock) -> None:
    deck.set_weights([1e308, 1e308])
    assert deck.weights_at(clock.s) == {0: 0.5, 1: 0.5}
    with pytest.raises(UsageError, match="finite number"):
        deck.adjust(0, math.nan)
