"""Prompts at run time: CLIP's tokenizer and the bundle's text encoders, without transformers.

    encoder = TextEncoder(bundle, open_graph)
    encoder.encode("ink on paper, (bold lines:1.2)", "photo")  # the UNet's text inputs

Needs the ``tokenizers`` package (``pip install '.[text]'``). A bundle whose prompt is baked in needs
none of this.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from std_rt.core.bundle import Bundle
from std_rt.core.errors import BundleError, UsageError
from std_rt.core.machine import install_hint
from std_rt.engines import Engine, GraphSpec
from std_rt.pipeline.prompt import Encoding, Ids, RunEncoder, encode_pair

if TYPE_CHECKING:
    import tokenizers

__all__ = ["ClipTokenizer", "TextEncoder", "Vocabulary", "read_vocabulary"]

Opener = Callable[[GraphSpec], Engine]

INSTALL = install_hint("text")
# How CLIP cuts text into words (github.com/openai/CLIP, simple_tokenizer.py).
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_END_OF_WORD = "</w>"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a CLIP tokenizer knows. ``words`` and ``merges`` are vocab.json and merges.txt.

    ``length``: tokens the encoder takes at once. ``begin``, ``end``, ``pad``: ids. ``unknown``: the word
    that stands for bytes that are not in ``words``. ``added``: words that are found in a text before it is
    cut up, each as ``{"id", "content", "special", "normalized", "lstrip", "rstrip", "single_word"}``.
    """

    words: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    length: int
    begin: int
    end: int
    pad: int
    unknown: str
    added: tuple[dict[str, Any], ...]

    def config(self) -> dict[str, Any]:
        """Everything but words and merges: what the bundle keeps in ``config.json``."""
        names = ("length", "begin", "end", "pad", "unknown")
        return {name: getattr(self, name) for name in names} | {"added": list(self.added)}


def read_vocabulary(folder: Path) -> Vocabulary:
    """A bundle's tokenizer: ``vocab.json``, ``merges.txt`` and ``config.json``. Raises BundleError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        merges = read_merges(folder / "merges.txt")
        numbers = {key: int(config[key]) for key in ("length", "begin", "end", "pad")}
        return Vocabulary(words, merges, **numbers, unknown=config["unknown"], added=(*config["added"],))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"the tokenizer in {folder} cannot be read ({error}); export it again") from error


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of ``merges.txt``, best first. Raises ValueError on a line that is no pair."""
    pairs = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip() and not line.startswith("#version"):
            first, second = line.split()
            pairs.append((first, second))
    return pairs


class ClipTokenizer:
    """Text -> ids as transformers' ``CLIPTokenizer`` gives them, without begin, end and padding."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Raises UsageError where the package is missing, BundleError where words and merges do not fit."""
        self.length, self.begin = vocabulary.length, vocabulary.begin
        self.end, self.pad = vocabulary.end, vocabulary.pad
        self._encode = _build(vocabulary).encode

    def __call__(self, text: str) -> list[int]:
        """Ids of ``text``, however long. Raises UsageError on half a surrogate pair, which is no text."""
        try:
            return list(self._encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise UsageError(f"the prompt {text[:40]!a} is not valid Unicode; type it again") from error


def _build(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """Byte-level BPE over lower-case NFC text."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    except ImportError as error:
        raise UsageError(
            f"prompts need the package tokenizers, which is not installed; run: {INSTALL}"
        ) from error
    try:
        model = models.BPE(
            dict(vocabulary.words),
            list(vocabulary.merges),
            unk_token=vocabulary.unknown,
            end_of_word_suffix=_END_OF_WORD,
            continuing_subword_prefix="",
            fuse_unk=False,
        )
    except Exception as error:  # the package raises Exception itself
        raise BundleError(f"the tokenizer's words and merges do not fit: {error}; export it again") from error
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    cut = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for entry in sorted(vocabulary.added, key=lambda entry: int(entry["id"])):
        options = {key: value for key, value in entry.items() if key not in ("id", "content")}
        tokenizer.add_tokens([AddedToken(entry["content"], **options)])
        if tokenizer.token_to_id(entry["content"]) != entry["id"]:
            raise BundleError(
                f"the tokenizer's word {entry['content']!r} has another number; export it again"
            )
    return tokenizer


class TextEncoder:
    """A bundle's text encoders: prompts in, the UNet's text inputs out, each pair of prompts once.

    Engines open at the first prompt and stay open until `release`. Not for two threads at once.
    """

    def __init__(self, bundle: Bundle, open_graph: Opener, remember: int = 32) -> None:
        """``open_graph`` opens one graph at static shapes. Raises UsageError where prompts are baked in."""
        text = bundle.manifest["text"]
        if text["mode"] != "encoder":
            if text["mode"] == "none":
                raise UsageError(f"bundle '{bundle.name}' has no text encoders, so it takes no --prompt")
            raise UsageError(
                f"bundle '{bundle.name}' has its prompt baked in ({text.get('prompt') or 'none'}) and "
                "takes no other; export it with --prompts encoder"
            )
        self._bundle, self._open_graph, self._remember = bundle, open_graph, remember
        self._zero_negative = bool(text.get("zero_negative", True))
        folders = {role: bundle.path / folder for role, folder in text["tokenizers"].items()}
        self._tokenizers = {role: ClipTokenizer(read_vocabulary(path)) for role, path in folders.items()}
        self._engines: dict[str, Engine] = {}
        self._known: OrderedDict[tuple[str, str | None], Encoding] = OrderedDict()

    def encode(self, prompt: str, negative: str | None = None) -> Encoding:
        """encoder_hidden_states [1, 77 K, D], text_embeds [1, P], and both with ``negative_`` before.

        K, the number of chunks, is the same for both. ``negative`` None is zeros where the model has it
        so, "" the empty prompt. Raises UsageError on a weight beyond use, BackendError where a graph
        does not open. The arrays are shared: do not write into them.
        """
        key = (prompt, negative)
        if key not in self._known:
            while len(self._known) >= self._remember:
                self._known.popitem(last=False)
            runs = [self._run(role) for role in self._tokenizers]
            words = list(self._tokenizers.values())
            self._known[key] = encode_pair(prompt, negative, words, runs, zero_negative=self._zero_negative)
        self._known.move_to_end(key)
        return self._known[key]

    def release(self) -> None:
        """Close the engines, which are large and idle between prompts; the next new prompt opens them."""
        with ExitStack() as stack:
            while self._engines:
                stack.callback(self._engines.popitem()[1].close)

    def _run(self, role: str) -> RunEncoder:
        def run(ids: Ids) -> Mapping[str, Any]:
            if role not in self._engines:
                self._engines[role] = self._open_graph(self._spec(role))
            return self._engines[role](input_ids=np.ascontiguousarray(ids))

        return run

    def _spec(self, role: str) -> GraphSpec:
        shape = (1, self._tokenizers[role].length)
        return GraphSpec(role, self._bundle.graph_path(role), {"input_ids": shape}, self._bundle.digest)
