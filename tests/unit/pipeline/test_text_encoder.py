"""The tokenizer against transformers' own, and the bundle's text encoders with engines of a few lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from std_rt.core.bundle import Bundle
from std_rt.core.errors import BackendError, BundleError, UsageError
from std_rt.engines import GraphSpec
from std_rt.pipeline.text_encoder import ClipTokenizer, TextEncoder

LENGTH = 77
MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "i n", "in g</w>", "Ã ©", "l o", "lo n", "lon g</w>", "! !"]
PROMPTS = st.text(
    st.sampled_from("the cat going long'll'S123!?,_-É東🎨\u200d\u0301\n\t\u00a0ßİ")
    | st.characters(codec="utf-8")
)


def byte_letters() -> list[str]:
    """The 256 signs that stand for bytes, in CLIP's order: printable ones for themselves."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in kept] + [chr(256 + i) for i in range(256 - len(kept))]


# How CLIP cuts text into words (github.com/openai/CLIP, simple_tokenizer.py).
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def make_tokenizer(pad: str) -> ClipTokenizer:
    """CLIP's in small: every byte alone and as a word's end, some merges, two special words."""
    pytest.importorskip("tokenizers")
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    numbers = {word: i for i, word in enumerate(words)}
    merges = [(first, second) for first, second in (merge.split(" ") for merge in MERGES)]
    begin, end = len(words) - 2, len(words) - 1
    model = models.BPE(
        numbers, merges, unk_token=words[end], end_of_word_suffix="</w>", continuing_subword_prefix=""
    )
    made = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    cut = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    special = [words[begin], words[end]] + ([pad] if pad == "!" else [])
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return ClipTokenizer(made.to_str(), LENGTH, begin, end, numbers[pad])


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"])
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(ours, transformers') of the same words; SDXL's second tokenizer fills up with "!"."""
    transformers = pytest.importorskip("transformers")
    ours = make_tokenizer(request.param)
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    ours.save(folder)
    model = json.loads(ours.rules)["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *MERGES, ""])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    theirs = transformers.CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token=request.param,
        model_max_length=LENGTH,
    )
    return ClipTokenizer.load(folder), theirs


@given(PROMPTS)
@example("")
@example("   ")
@example("the cat " * 500)
@example("It's the CAT'S long-going, naïve café!!! 1234")
@example("e\u0301 \u00e9 ﬁ İI ß 東京タワー 👩‍🎨🏽 \x00\x7f")
@example("<|startoftext|> a <|ENDOFTEXT|> b <|endoftext|>")
@example("hi!there ! !! a!b")
def test_it_reads_as_transformers_does(tokenizers: tuple[Any, Any], text: str) -> None:
    ours, theirs = tokenizers
    assert ours(text) == theirs(text, add_special_tokens=False, verbose=False).input_ids


def test_padding_and_ends_are_those_of_transformers(tokenizers: tuple[Any, Any]) -> None:
    ours, theirs = tokenizers
    filled = theirs("the cat", padding="max_length", max_length=LENGTH).input_ids
    assert filled == [ours.begin, *ours("the cat"), ours.end] + [ours.pad] * (
        LENGTH - 2 - len(ours("the cat"))
    )
    assert ours.length == LENGTH


def test_text_that_is_none_is_refused(tokenizers: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match=r"'a \\udc80' is not valid Unicode"):
        tokenizers[0]("a \udc80")


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"run: pip install -e '\.\[text\]'"):
        ClipTokenizer("{}", LENGTH, 0, 1, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{", encoding="utf-8"),
        lambda folder: (folder / "tokenizer.json").write_text("{}", encoding="utf-8"),
        lambda folder: (folder / "config.json").write_text('{"length": 77}', encoding="utf-8"),
        lambda folder: (folder / "config.json").write_text("[]", encoding="utf-8"),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    make_tokenizer("!").save(tmp_path / "tokenizer")
    damage(tmp_path / "tokenizer")
    with pytest.raises(BundleError, match=r"cannot be read.*; export the bundle again") as caught:
        ClipTokenizer.load(tmp_path / "tokenizer")
    assert "\n" not in str(caught.value)


class Graph:
    """A text encoder that gives ids and positions back, in memory that the next call overwrites."""

    def __init__(self, spec: GraphSpec) -> None:
        assert spec.shapes == {"input_ids": (1, LENGTH)}
        self.name, self.closed = spec.name, False
        self._out = np.empty((1, LENGTH, 2), np.float32)

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        (ids,) = inputs.values()
        assert not self.closed
        assert ids.dtype == np.int64
        self._out[0, :, 0], self._out[0, :, 1] = ids[0], np.arange(LENGTH)
        pooled = {"text_embeds": self._out[:, :3, 0]} if self.name == "text_encoder_2" else {}
        return {"hidden_states": self._out, **pooled}

    def close(self) -> None:
        self.closed = True


class Opener:
    """Opens `Graph`, and keeps what it opened."""

    def __init__(self) -> None:
        self.opened: list[Graph] = []

    def __call__(self, spec: GraphSpec) -> Any:
        self.opened.append(Graph(spec))
        return self.opened[-1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Tokenizers and a manifest; the graphs are never read."""
    folder = tmp_path_factory.mktemp("bundle")
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        make_tokenizer(pad).save(folder / name)
    roles = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    text = {"mode": "encoder", "prompt": "", "zero_negative": True, "tokenizers": roles}
    graphs = {role: {"file": f"{role}.onnx"} for role in roles}
    return Bundle(folder, {"name": "made", "text": text, "graphs": graphs, "manifest_sha256": "0" * 64})


def test_a_prompt_is_encoded_by_both(bundle: Bundle) -> None:
    encoder = TextEncoder(bundle, Opener())
    found = encoder.encode("the cat", "long")
    ours = ClipTokenizer.load(bundle.path / "tokenizer")
    assert {name: value.shape for name, value in found.items()} == {
        "encoder_hidden_states": (1, 77, 4),
        "text_embeds": (1, 3),
        "negative_encoder_hidden_states": (1, 77, 4),
        "negative_text_embeds": (1, 3),
    }
    ids = [ours.begin, *ours("the cat"), ours.end]
    first, second = found["encoder_hidden_states"][0, :, 0], found["encoder_hidden_states"][0, :, 2]
    assert first[: len(ids)].tolist() == second[: len(ids)].tolist() == ids
    assert set(first[len(ids) :]) == {ours.end}
    assert set(second[len(ids) :]) == {0}  # "!"
    assert found["negative_text_embeds"][0, 1] == ours("long")[0]
    assert not encoder.encode("the cat")["negative_encoder_hidden_states"].any()


def test_long_prompts_get_more_chunks_and_the_negative_as_many(bundle: Bundle) -> None:
    found = TextEncoder(bundle, Opener()).encode("cat " * 76, "long")
    assert (
        found["encoder_hidden_states"].shape == found["negative_encoder_hidden_states"].shape == (1, 154, 4)
    )


def test_engines_open_once_and_a_known_prompt_runs_nothing(bundle: Bundle) -> None:
    opener = Opener()
    encoder = TextEncoder(bundle, opener, remember=2)
    first = encoder.encode("the cat")
    encoder.encode("long")
    assert [graph.name for graph in opener.opened] == ["text_encoder", "text_encoder_2"]
    encoder.release()
    assert all(graph.closed for graph in opener.opened)
    assert encoder.encode("the cat") is first
    assert len(opener.opened) == 2
    encoder.encode("a third")  # "long" was used least
    assert len(opener.opened) == 4
    assert encoder.encode("the cat") is first
    assert encoder.encode("the cat", "") is not first


def test_a_graph_that_does_not_open_leaves_the_encoder_usable(bundle: Bundle) -> None:
    works = False

    def open_graph(spec: GraphSpec) -> Any:
        if not works:
            raise BackendError("no memory")
        return Graph(spec)

    encoder = TextEncoder(bundle, open_graph)
    with pytest.raises(BackendError, match="no memory"):
        encoder.encode("the cat")
    works = True
    assert encoder.encode("the cat")["text_embeds"].shape == (1, 3)


def test_prompts_of_several_threads_are_those_of_one(bundle: Bundle) -> None:
    class Slow(Graph):
        def __call__(self, **inputs: Any) -> dict[str, Any]:
            found = super().__call__(**inputs)
            time.sleep(0.002)  # another call in between would overwrite it
            return found

    prompts = [f"prompt {'ink ' * i}" for i in range(12)]
    wanted = [TextEncoder(bundle, Opener()).encode(prompt) for prompt in prompts]
    shared = TextEncoder(bundle, Slow)

    def encode(prompt: str) -> Any:
        try:
            return shared.encode(prompt)
        finally:
            shared.release()

    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(encode, prompts), wanted, strict=True):
            for name, value in right.items():
                np.testing.assert_array_equal(found[name], value)


def test_a_bundle_with_its_prompt_baked_in_says_so(bundle: Bundle) -> None:
    baked = Bundle(bundle.path, bundle.manifest | {"text": {"mode": "baked", "prompt": "ink", "file": ""}})
    with pytest.raises(
        UsageError, match=r"'made' has its prompt baked in \(ink\) and takes no other; export"
    ):
        TextEncoder(baked, Opener())
