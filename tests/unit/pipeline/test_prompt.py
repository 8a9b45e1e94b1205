"""Prompt syntax, chunks and weights, with a tokenizer and an encoder made of arithmetic."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from std_rt.core.errors import UsageError
from std_rt.pipeline.prompt import (
    Piece,
    apply_weights,
    chunk_prompts,
    encode_pair,
    encode_prompts,
    parse_prompt,
)

WIDTH = 4
SYNTAX = st.text(st.sampled_from("ab (:)[]\\.1-2") | st.characters(codec="utf-8"), max_size=40)
PLAIN = st.text(st.sampled_from("abc ,:.15é東\n") | st.characters(codec="utf-8"), min_size=1).filter(
    lambda text: not re.search(r"[()\[\]\\]|BREAK", text)
)


@dataclass(frozen=True)
class Words:
    """One token a word: the sum of its letters' numbers. Room for 6 words."""

    length: int = 8
    begin: int = 1
    end: int = 2
    pad: int = 0

    def __call__(self, text: str) -> list[int]:
        return [100 + sum(map(ord, word)) for word in text.split()]


class Encoder:
    """Hidden states that tell id and position; the pooled text is the ids' sum."""

    def __init__(self, scale: float = 1.0, *, pools: bool = True) -> None:
        self.scale, self.pools, self.calls = scale, pools, 0
        self._hidden: NDArray[np.float32] = np.zeros(0, np.float32)

    def __call__(self, ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        assert ids.shape == (1, 8)
        assert ids.dtype == np.int64
        self.calls += 1
        if self.calls > 1:
            self._hidden[...] = np.nan  # as engines do: what was returned is overwritten
        columns = [ids[0], np.arange(8), np.full(8, 3), ids[0] % 7]
        self._hidden = (self.scale * np.stack(columns, -1)[None]).astype(np.float32)
        out = {"hidden_states": self._hidden}
        return out | {"text_embeds": np.array([[ids.sum(), self.scale]], np.float32)} if self.pools else out


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("()", []),
        ("a cat", [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a [red] cat", [("a ", 1), ("red", 1 / 1.1), (" cat", 1)]),
        ("((red))", [("red", 1.21)]),
        ("(red:1.4)", [("red", 1.4)]),
        ("(red: 0.5 )", [("red", 0.5)]),
        ("(red:.5)(blue:-1.)", [("red", 0.5), ("blue", -1)]),
        ("(a (b:2) c)", [("a ", 1.1), ("b", 2.2), (" c", 1.1)]),
        ("([red])", [("red", 1)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("(a:1.0) b", [("a b", 1)]),
        # escapes
        (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1)]),
        (r"(\(a\):1.5)", [("(a)", 1.5)]),
        (r"a\b", [("ab", 1)]),
        # unbalanced
        ("a (b c", [("a ", 1), ("b c", 1.1)]),
        ("a [b (c", [("a ", 1), ("b ", 1 / 1.1), ("c", 1)]),
        ("a) b]", [("a) b]", 1)]),
        ("a:1.4) b", [("a:1.4) b", 1)]),
        ("[a:1.4) b", [("a:1.4) b", 1 / 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("(a", [("a", 1.1)]),
        # numbers that are none: text, and the bracket closes as any other
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:.)", [("a:.", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("(time: 12:30)", [("time: 12", 30)]),
        ("(a:1.4b)", [("a:1.4b", 1.1)]),
    ],
)
def test_the_syntax(text: str, pieces: list[tuple[str, float]]) -> None:
    (section,) = parse_prompt(text)
    assert [piece.text for piece in section] == [text for text, _ in pieces]
    assert [piece.weight for piece in section] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("a BREAK b", [["a"], ["b"]]),
        ("a\nBREAK\n\nb", [["a"], ["b"]]),
        ("a (b BREAK c:2) d", [["a ", "b"], ["c", " d"]]),
        ("a BREAK BREAK b", [["a"], [], ["b"]]),
        ("BREAK a BREAK", [[], ["a"], []]),
        ("BREAKING aBREAK break", [["BREAKING aBREAK break"]]),
        (r"BR\EAK", [["BREAK"]]),
    ],
)
def test_break_begins_a_section(text: str, sections: list[list[str]]) -> None:
    assert [[piece.text for piece in section] for section in parse_prompt(text)] == sections
    assert {piece.weight for section in parse_prompt("(a BREAK b:2)") for piece in section} == {2.0}


@given(PLAIN)
def test_text_without_brackets_is_one_piece_of_weight_one(text: str) -> None:
    assert parse_prompt(text) == [[Piece(text)]]


def encode_prompt(text: str, tokenizers: list, encoders: list) -> dict[str, np.ndarray]:
    """`encode_prompts` of one text."""
    return encode_prompts([text], tokenizers, encoders)[0]


def format_prompt(sections: list[list[Piece]]) -> str:
    """The inverse of `parse_prompt`, for finite weights."""

    def write(piece: Piece) -> str:
        text = re.sub(r"[()\[\]\\]", r"\\\g<0>", piece.text).replace("BREAK", "BR\\EAK")
        if piece.weight == 1 and text == text.strip():
            return text
        return f"({text}:{np.format_float_positional(piece.weight, trim='-')})"

    return " BREAK ".join("".join(map(write, section)) for section in sections)


@given(SYNTAX)
def test_nothing_raises_and_what_is_read_can_be_written_and_read_again(text: str) -> None:
    sections = parse_prompt(text)
    assume(all(np.isfinite(piece.weight) for section in sections for piece in section))
    assert parse_prompt(format_prompt(sections)) == sections


@given(SYNTAX)
def test_a_bracket_that_never_closes_acts_to_the_end(text: str) -> None:
    inner = text.replace("(", "").replace(")", "")
    assume(not re.search(r"\\$|:\s*[-+]?[\d.]+\s*$", inner))
    assert parse_prompt("(" + inner) == parse_prompt(f"({inner})")


def render(tree: object) -> tuple[str, list[tuple[str, float]]]:
    """(prompt, [(character, weight)]) of nested (brackets, factor, children) and strings."""
    if isinstance(tree, str):
        return tree, [(sign, 1.0) for sign in tree]
    kind, weight, children = tree  # type: ignore[misc]
    done = [render(child) for child in children]
    inner = "".join(text for text, _ in done)
    factor = {"(": 1.1, "[": 1 / 1.1, ":": weight}[kind]
    shown = {"(": f"({inner})", "[": f"[{inner}]", ":": f"({inner}:{weight:.2f})"}[kind]
    return shown, [(sign, factor * share) for _, signs in done for sign, share in signs]


TREES = st.recursive(
    st.text("ab, é", max_size=5),
    lambda inner: st.tuples(
        st.sampled_from("([:"), st.integers(0, 300).map(lambda n: n / 100), st.lists(inner, max_size=3)
    ),
    max_leaves=12,
)


@given(TREES)
def test_nested_weights_multiply(tree: object) -> None:
    text, signs = render(tree)
    (section,) = parse_prompt(text)
    found = [(sign, piece.weight) for piece in section for sign in piece.text]
    assert [sign for sign, _ in found] == [sign for sign, _ in signs]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in signs])


@given(st.lists(st.text("xyz", min_size=1, max_size=3), max_size=30), st.integers(0, 3))
def test_chunks_hold_every_token_once_in_order(words: list[str], more: int) -> None:
    tokenizer = Words()
    first, second = chunk_prompts([" ".join(words), "w " * 6 * more], [tokenizer])[0]
    count = max(-(-len(words) // 6), more, 1)
    assert first.ids.shape == second.ids.shape == first.weights.shape == (count, 8)
    found = []
    for row in first.ids:
        stop = row.tolist().index(tokenizer.end)
        assert row[0] == tokenizer.begin
        assert (row[stop + 1 :] == tokenizer.pad).all()
        found += row[1:stop].tolist()
    assert found == tokenizer(" ".join(words))
    assert (first.weights == 1).all()


def test_weights_stand_at_their_tokens() -> None:
    ((chunks,),) = chunk_prompts(["a (b c:1.5) BREAK [d]"], [Words()])
    assert chunks.weights[0].tolist() == [1, 1, 1.5, 1.5, 1, 1, 1, 1]
    assert chunks.weights[1].tolist() == pytest.approx([1, 1 / 1.1, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("", [0]),
        ("BREAK", [0]),
        ("a BREAK", [1]),
        ("BREAK a", [0, 1]),
        ("a BREAK BREAK b", [1, 0, 1]),
        ("a a a a a a", [6]),
        ("a a a a a a BREAK b", [6, 1]),
        ("a a a a a a a BREAK b", [6, 1, 1]),
    ],
)
def test_break_ends_a_chunk(text: str, counts: list[int]) -> None:
    ((chunks,),) = chunk_prompts([text], [Words()])
    assert [row.tolist().index(2) - 1 for row in chunks.ids] == counts


def test_each_tokenizer_fills_with_its_own_padding() -> None:
    first, second = chunk_prompts(["a"], [Words(pad=2), Words(pad=0)])
    assert first[0].ids[0, 3:].tolist() == [2] * 5
    assert second[0].ids[0, 3:].tolist() == [0] * 5


def test_two_encoders_lie_side_by_side_and_chunks_end_to_end() -> None:
    encoders = [Encoder(pools=False), Encoder(10.0)]
    encoding = encode_prompt("a b c d e f g", [Words(), Words()], encoders)
    hidden, pooled = encoding["encoder_hidden_states"], encoding["text_embeds"]
    assert hidden.shape == (1, 16, 2 * WIDTH)
    assert hidden.dtype == pooled.dtype == np.float32
    np.testing.assert_array_equal(hidden[..., WIDTH:], 10 * hidden[..., :WIDTH])
    np.testing.assert_array_equal(hidden[0, 8:10, 0], [1, 100 + ord("g")])
    first = 1 + 2 + sum(100 + ord(sign) for sign in "abcdef")
    assert pooled.tolist() == [[first, 10.0]]
    with pytest.raises(UsageError, match="no text encoder returns text_embeds"):
        encode_prompt("a", [Words()], [Encoder(pools=False)])


def test_weight_one_changes_nothing_to_the_bit() -> None:
    plain = encode_prompt("a cat", [Words()], [Encoder(0.1)])
    for same in ("(a:1.0) cat", "a (cat:1)", "([a]) cat", "a  \n cat"):
        found = encode_prompt(same, [Words()], [Encoder(0.1)])
        for name, value in plain.items():
            np.testing.assert_array_equal(found[name], value)


@given(st.floats(0.2, 3.0), st.integers(0, 5))
def test_a_weight_scales_its_token_against_the_others_and_keeps_the_mean(weight: float, at: int) -> None:
    words = list("abcdef")
    plain = encode_prompt(" ".join(words), [Words()], [Encoder()])["encoder_hidden_states"][0]
    words[at] = f"({words[at]}:{weight:.3f})"
    heavy = encode_prompt(" ".join(words), [Words()], [Encoder()])["encoder_hidden_states"][0]
    ratio = np.linalg.norm(heavy, axis=1) / np.linalg.norm(plain, axis=1)
    others = np.delete(ratio, at + 1)
    np.testing.assert_allclose(others, others[0], rtol=1e-5)
    assert ratio[at + 1] / others[0] == pytest.approx(round(weight, 3), rel=1e-5)
    assert heavy.mean() == pytest.approx(plain.mean(), rel=1e-5)


def test_a_weight_stays_in_its_chunk() -> None:
    plain = encode_prompt("a BREAK b", [Words()], [Encoder()])["encoder_hidden_states"]
    heavy = encode_prompt("a BREAK (b:2)", [Words()], [Encoder()])["encoder_hidden_states"]
    np.testing.assert_array_equal(heavy[:, :8], plain[:, :8])
    assert np.abs(heavy[:, 8:] - plain[:, 8:]).max() > 1


def test_hidden_states_without_a_mean_are_multiplied_only() -> None:
    hidden = np.array([[[1.0], [-1.0]]], np.float32)
    np.testing.assert_array_equal(apply_weights(hidden, np.array([0, 0], np.float32)), 0 * hidden)


def test_a_negative_left_out_is_zeros_and_an_empty_one_is_not() -> None:
    given_ = ([Words()], [Encoder()])
    zeros = encode_pair("a b", None, *given_)
    assert not zeros["negative_encoder_hidden_states"].any()
    assert not zeros["negative_text_embeds"].any()
    empty = encode_prompt("", *given_)
    for found in (encode_pair("a b", "", *given_), encode_pair("a b", None, *given_, zero_negative=False)):
        for name, value in empty.items():
            np.testing.assert_array_equal(found[f"negative_{name}"], value)
    for name, value in encode_prompt("a b", *given_).items():
        np.testing.assert_array_equal(zeros[name], value)


@pytest.mark.parametrize(("prompt", "negative"), [("a", "b " * 13), ("b " * 13, "a"), ("b " * 13, None)])
def test_positive_and_negative_have_as_many_chunks(prompt: str, negative: str | None) -> None:
    found = encode_pair(prompt, negative, [Words()], [Encoder()])
    assert found["encoder_hidden_states"].shape == (1, 24, WIDTH)
    assert found["negative_encoder_hidden_states"].shape == (1, 24, WIDTH)


def test_what_is_filled_up_are_empty_prompts() -> None:
    short, _ = encode_prompts(["a", "b " * 7], [Words()], [Encoder()])
    empty = encode_prompt("", [Words()], [Encoder()])["encoder_hidden_states"]
    np.testing.assert_array_equal(short["encoder_hidden_states"][:, 8:], empty)


@pytest.mark.parametrize(
    "text", ["(a:9999)", "(a:" + "9" * 400 + ")", "(" * 100 + "a", "((a:" + "9" * 400 + "):0)"]
)
def test_a_weight_beyond_use_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"the weight of 'a' is .*; useful weights are about 0\.5 to 2"):
        encode_prompt(text, [Words()], [Encoder()])
