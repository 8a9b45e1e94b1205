"""Prompts: the common weighting syntax, chunks of tokens, and the encoding for SDXL's UNet.

    (words)  1.1 times the weight     (words:1.4)  1.4 times     \\( \\) \\[ \\] \\\\  the sign itself
    [words]  the weight / 1.1         BREAK  a new chunk         brackets nest, their factors multiply

This is the syntax of AUTOMATIC1111's web UI, unbalanced brackets included: a bracket that never closes acts
to the end, one that closes nothing is text, and so is ``:1.4)`` if no ``(`` is open. A backslash before
anything else is dropped. Two things differ: BREAK also works inside brackets, and a malformed number
(``:1.2.3)``) is text, not an error. Step-dependent ``[a:b:0.5]`` is not supported: it is text in brackets.

Text encoders read 77 tokens at a time: begin, 75 of text, end. Longer prompts are encoded in chunks whose
hidden states are concatenated. A weight multiplies the hidden states of its tokens; then the chunk is scaled
back to its original mean, separately for each encoder.

The same code runs at export (torch modules) and in the runtime (engines): NumPy only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from std_rt.core.arrays import Array
from std_rt.core.errors import UsageError

__all__ = [
    "Chunks",
    "Encoded",
    "Encoding",
    "Piece",
    "RunEncoder",
    "Tokenizer",
    "apply_weights",
    "chunk_prompts",
    "encode_chunks",
    "encode_pair",
    "encode_prompts",
    "join_encoders",
    "pair",
    "parse_prompt",
]

Ids = NDArray[np.int64]
# encoder_hidden_states [1, K L, D] and text_embeds [1, P]; a pair has them with negative_ before, too.
Encoding = dict[str, Array]
# One encoder's share: hidden states [1, K L, D], and [1, P] from the encoder that projects, else None.
Encoded = tuple[Array, Array | None]
# input_ids [1, L] -> hidden_states [1, L, D] and, from the encoder that projects, text_embeds [1, P].
RunEncoder = Callable[[Ids], Mapping[str, NDArray[Any]]]

_FACTORS = {"(": 1.1, "[": 1 / 1.1}
_CLOSES = {")": "(", "]": "["}
_LARGEST_WEIGHT = 1000.0
_SYNTAX = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>:|[^\\()\[\]:]+)"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True)
class Piece:
    """Words with one weight; 1 is plain."""

    text: str
    weight: float = 1.0


class Tokenizer(Protocol):
    """Turns text into the token ids of one text encoder."""

    @property
    def length(self) -> int:
        """Tokens the encoder takes at a time, begin and end included: 77."""

    @property
    def begin(self) -> int:
        """Id of the first token of every chunk."""

    @property
    def end(self) -> int:
        """Id of the token after the text."""

    @property
    def pad(self) -> int:
        """Id of the padding token."""

    def __call__(self, text: str) -> list[int]:
        """Ids of ``text`` alone: no begin, end or padding, however long it is."""


@dataclass(frozen=True, eq=False)
class Chunks:
    """``ids`` and ``weights`` [K, L]: a prompt as one encoder gets it, K chunks of L tokens."""

    ids: Ids
    weights: Array


class _Reader:
    """Collects runs of text (None: BREAK) and weighted spans of them, from left to right."""

    def __init__(self) -> None:
        self.runs: list[str | None] = []
        self.spans: list[tuple[int, int, float]] = []
        self.opened: dict[str, list[int]] = {"(": [], "[": []}

    def text(self, text: str) -> None:
        """Take plain text, split at BREAK."""
        for i, part in enumerate(_BREAK.split(text)):
            self.runs += [None, part] if i else [part]

    def close(self, bracket: str, factor: float) -> None:
        """Close the innermost open ``bracket``."""
        self.spans.append((self.opened[bracket].pop(), len(self.runs), factor))

    def read(self, found: re.Match[str]) -> None:
        """Take one element of the syntax."""
        bracket, weight = found["bracket"], found["weight"]
        if found["escaped"] is not None:
            self.runs.append(found["escaped"])
        elif bracket in self.opened:
            self.opened[bracket].append(len(self.runs))
        elif weight is not None and self.opened["("]:
            self.close("(", float(weight))
        elif bracket is not None and self.opened[_CLOSES[bracket]]:
            self.close(_CLOSES[bracket], _FACTORS[_CLOSES[bracket]])
        else:
            self.text(found[0])

    def weights(self) -> list[float]:
        """The weight of each run; brackets that are still open close at the end."""
        for bracket, starts in self.opened.items():
            self.spans += [(start, len(self.runs), _FACTORS[bracket]) for start in starts]
        weights = np.ones(len(self.runs))
        with np.errstate(over="ignore", invalid="ignore"):
            for start, stop, factor in self.spans:
                weights[start:stop] *= factor
        return [float(weight) for weight in weights]


def parse_prompt(text: str) -> list[list[Piece]]:
    """Sections (separated by BREAK), each a list of pieces; neighbours differ in weight.

    Plain text is one section of one piece, an empty prompt one empty section. Never raises.
    """
    reader = _Reader()
    for found in _SYNTAX.finditer(text):
        reader.read(found)
    sections: list[list[Piece]] = [[]]
    for run, weight in zip(reader.runs, reader.weights(), strict=True):
        section = sections[-1]
        if run is None:
            sections.append([])
        elif section and run and section[-1].weight == weight:
            section[-1] = Piece(section[-1].text + run, weight)
        elif run:
            section.append(Piece(run, weight))
    return sections


def chunk_prompts(texts: Sequence[str], tokenizers: Sequence[Tokenizer]) -> list[list[Chunks]]:
    """For every tokenizer the chunks of every text; all have the same number of chunks.

    Shorter texts are padded with empty chunks, as in the web UI. Raises UsageError for a weight beyond
    1000.
    """
    rows = [[_rows(text, tokenizer) for text in texts] for tokenizer in tokenizers]
    count = max((len(one) for row in rows for one in row), default=1)
    return [
        [_fill(one, count, tokenizer) for one in row] for row, tokenizer in zip(rows, tokenizers, strict=True)
    ]


def _rows(text: str, tokenizer: Tokenizer) -> list[list[tuple[int, float]]]:
    """(token, weight) of each chunk's text. A BREAK at the end begins no chunk."""
    room = tokenizer.length - 2
    rows: list[list[tuple[int, float]]] = []
    for section in parse_prompt(text):
        marked = [(token, _checked(piece)) for piece in section for token in tokenizer(piece.text)]
        rows += [marked[start : start + room] for start in range(0, max(len(marked), 1), room)]
    return rows[:-1] if len(rows) > 1 and not rows[-1] else rows


def _checked(piece: Piece) -> float:
    if abs(piece.weight) <= _LARGEST_WEIGHT:
        return piece.weight
    raise UsageError(
        f"the weight of '{piece.text.strip()[:40]}' is {piece.weight:g}; useful weights are about 0.5 to 2"
    )


def _fill(rows: list[list[tuple[int, float]]], count: int, tokenizer: Tokenizer) -> Chunks:
    ids = np.full((count, tokenizer.length), tokenizer.pad, np.int64)
    weights = np.ones(ids.shape, np.float32)
    ids[:, 0], ids[:, 1] = tokenizer.begin, tokenizer.end
    for i, row in enumerate(rows):
        stop = 1 + len(row)
        ids[i, 1:stop] = [token for token, _ in row]
        weights[i, 1:stop] = [weight for _, weight in row]
        ids[i, stop] = tokenizer.end
    return Chunks(ids, weights)


def apply_weights(hidden: NDArray[Any], weights: Array) -> NDArray[Any]:
    """Multiply ``hidden`` [1, L, D] by ``weights`` [L], then scale it to its original mean.

    With every weight 1 it is ``hidden`` itself, to the bit.
    """
    if np.all(weights == 1):
        return hidden
    weighted = hidden * weights[None, :, None]
    before, after = hidden.mean(dtype=np.float64), weighted.mean(dtype=np.float64)
    return weighted * np.float32(before / after) if after else weighted


def encode_chunks(chunks: Chunks, run: RunEncoder) -> Encoded:
    """One encoder's hidden states of every chunk, end to end, weighted; the pooled text of the first."""
    hidden, pooled = [], None
    for ids, weights in zip(chunks.ids, chunks.weights, strict=True):
        out = run(ids[None])
        # Copied: an engine may overwrite its outputs at the next call.
        hidden.append(np.array(apply_weights(out["hidden_states"], weights), np.float32))
        if pooled is None and "text_embeds" in out:
            pooled = np.array(out["text_embeds"], np.float32)
    return np.concatenate(hidden, axis=1), pooled


def join_encoders(parts: Sequence[Encoded]) -> Encoding:
    """The encoders' hidden states side by side, and the pooled text of the one that has it.

    Raises UsageError if none has.
    """
    pooled = [vector for _, vector in parts if vector is not None]
    if not pooled:
        raise UsageError(
            "no text encoder returns text_embeds, which SDXL's UNet needs; is text_encoder_2 missing?"
        )
    hidden = np.concatenate([states for states, _ in parts], axis=-1)
    return {"encoder_hidden_states": hidden, "text_embeds": pooled[0]}


def encode_prompts(
    texts: Sequence[str], tokenizers: Sequence[Tokenizer], run_encoders: Iterable[RunEncoder]
) -> list[Encoding]:
    """``encoder_hidden_states`` [1, 77 K, D] and ``text_embeds`` [1, P] of each text, with the same K.

    ``run_encoders`` has one per tokenizer."""
    plan = chunk_prompts(texts, tokenizers)
    parts = [
        [encode_chunks(chunks, run) for chunks in row] for row, run in zip(plan, run_encoders, strict=True)
    ]
    return [join_encoders(encoders) for encoders in zip(*parts, strict=True)]


def encode_pair(
    prompt: str,
    negative: str | None,
    tokenizers: Sequence[Tokenizer],
    run_encoders: Iterable[RunEncoder],
    *,
    zero_negative: bool = True,
) -> Encoding:
    """A prompt and its negative, the latter under the same names with the prefix ``negative_``.

    With ``zero_negative``, a ``negative`` of None is zeros, as in SDXL's base
    (force_zeros_for_empty_prompt); otherwise None and "" are the empty prompt.
    """
    texts = [prompt] if negative is None and zero_negative else [prompt, negative or ""]
    return pair(encode_prompts(texts, tokenizers, run_encoders))


def pair(encodings: Sequence[Encoding]) -> Encoding:
    """[positive, negative], or [positive] with zeros for its negative, in one."""
    positive = encodings[0]
    zeros = {name: np.zeros_like(value) for name, value in positive.items()}
    negative = encodings[1] if len(encodings) > 1 else zeros
    return positive | {f"negative_{name}": value for name, value in negative.items()}
