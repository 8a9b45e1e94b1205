"""The text side of a bundle: prompts baked into constants, and for open prompts the encoders themselves.

    parts = TextParts(source, prompt, negative)
    for role in parts.roles:
        encoder = load(role)  # LoRAs fused
        parts.encode(role, encoder)
        graph, examples = parts.graph(role, encoder), parts.examples(role, encoder)  # mode encoder only
        del encoder
    constants = parts.constants(text_dims)

One text encoder is in memory at a time: SDXL's second is 2.8 GB in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from std_rt.core.errors import ExportError
from std_rt.export.components import Network, plain_config, read_config, read_json
from std_rt.export.graphs import Example, Graph
from std_rt.export.onnx_graph import Port, Trace
from std_rt.export.quiet import quiet
from std_rt.export.text_modules import ClipText
from std_rt.pipeline.prompt import Encoded, Ids, chunk_prompts, encode_chunks, join_encoders, pair
from std_rt.pipeline.text_encoder import ClipTokenizer, Vocabulary, read_merges

__all__ = ["TextConstants", "TextParts", "bake", "null_text", "read_tokenizer", "text_graphs"]

Array = NDArray[np.float32]
GetEncoder = Callable[[str], Network]
Words = tuple[dict[str, int], list[tuple[str, str]]]  # vocab.json, merges.txt

_ROLES = ("text_encoder", "text_encoder_2")
# Both tokenizers read these alike, or what is baked would not be what runs.
_SAMPLES = (
    "",
    "An oil painting of 12 boats, (highly detailed), 8k!",
    "it's naïve — don't  \n <|endoftext|> a_b/c 東京",
)


@dataclass(frozen=True, eq=False)
class TextConstants:
    """``arrays``: encoder_hidden_states [1, L K, D], text_embeds [1, P] and both with ``negative_`` before.

    ``mode``: ``none`` (a model without text) or ``baked``. ``zero_negative``: no negative means zeros.
    """

    arrays: dict[str, Array]
    mode: str
    chunks: int = 1
    zero_negative: bool = True


@dataclass(eq=False)
class TextParts:
    """What export needs of text, filled role by role. ``roles`` is empty for a model without text.

    ``prompt`` is encoded, ``negative`` None is what the model takes for no negative. Raises ExportError
    where a tokenizer is missing or does not fit, or prompts are given and there are no encoders.
    """

    source: Path
    prompt: str = ""
    negative: str | None = None
    _encoded: dict[str, list[Encoded]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.roles = tuple(role for role in _ROLES if (self.source / role / "config.json").is_file())
        if not self.roles and (self.prompt or self.negative):
            raise ExportError(
                f"{self.source} has no text encoders, so it takes no --prompt and no --negative"
            )
        if self.roles and _ROLES[1] not in self.roles:
            raise ExportError(
                f"{self.source} has no {_ROLES[1]}, which gives the pooled text SDXL's UNet needs"
            )
        index = read_json(self.source / "model_index.json")
        self.zero_negative = bool(index.get("force_zeros_for_empty_prompt", True))  # diffusers' default
        self.vocabularies = {role: read_tokenizer(self.source, role) for role in self.roles}
        zeros = self.negative is None and self.zero_negative
        texts = [self.prompt] if zeros else [self.prompt, self.negative or ""]
        plan = chunk_prompts(texts, [ClipTokenizer(words) for words in self.vocabularies.values()])
        self._plan = dict(zip(self.roles, plan, strict=True))

    @property
    def tokenizers(self) -> dict[str, str]:
        """Role -> folder in the bundle; the manifest's ``text.tokenizers``."""
        return {role: _tokenizer_folder(role) for role in self.roles}

    def encode(self, role: str, encoder: Network) -> None:
        """Encode the prompts with one encoder (fp32, LoRAs fused)."""
        self._encoded[role] = [encode_chunks(chunks, _runner(encoder)) for chunks in self._plan[role]]

    def constants(self, text_dims: tuple[int, int]) -> TextConstants:
        """All of it, once every role is encoded. ``text_dims``: what the UNet takes (context, pooled)."""
        if not self.roles:
            return TextConstants(pair([null_text(*text_dims)]), "none")
        encoded = zip(*(self._encoded[role] for role in self.roles), strict=True)
        arrays = pair([join_encoders(parts) for parts in encoded])
        chunks = len(self._plan[self.roles[0]][0].ids)
        return TextConstants(arrays, "baked", chunks, self.zero_negative)

    def graph(self, role: str, encoder: Network) -> Graph:
        """The encoder as a graph. It may be in half precision; the boundary is float32 and int64."""
        length, config = self.vocabularies[role].length, encoder.config
        ids = Port("input_ids", ("batch", length), "token ids: begin, text, end, padding", "int64")
        outputs = [Port("hidden_states", ("batch", length, config.hidden_size), "before the last layer")]
        if hasattr(encoder, "text_projection"):
            outputs.append(Port("text_embeds", ("batch", config.projection_dim), "pooled text, projected"))
        plan = Trace(ClipText(encoder, length), (ids,), tuple(outputs))
        return Graph(role, plan, encoder.state_dict(), type(encoder).__name__, plain_config(encoder))

    def examples(self, role: str, encoder: Network) -> list[Example]:
        """transformers' answers (fp32) to seeded ids of several lengths, and to the prompt's first chunk."""
        words = self.vocabularies[role]
        rng = np.random.default_rng(0)
        rows = [_random_ids(words, stop, rng) for stop in (words.length - 1, words.length // 3)]
        rows.append(self._plan[role][0].ids[:1])
        run = _runner(encoder)
        return [Example({"input_ids": ids}, dict(run(ids))) for ids in rows]

    def write_tokenizers(self, bundle: Path) -> None:
        """``tokenizer/`` and ``tokenizer_2/`` of a bundle: what `text_encoder.read_vocabulary` reads."""
        for role, folder in self.tokenizers.items():
            _write_vocabulary(self.vocabularies[role], bundle / folder)


def bake(
    source: Path,
    prompt: str,
    negative: str | None,
    get_encoder: GetEncoder,
    text_dims: tuple[int, int],
    progress: Callable[[str], None] = lambda note: None,
) -> TextConstants:
    """Encode a prompt and its negative; ``get_encoder(role)`` gives an encoder, LoRAs fused, to be freed."""
    parts = TextParts(source, prompt, negative)
    for role in parts.roles:
        progress(f"{role}: encoding the prompt")
        parts.encode(role, get_encoder(role))
    return parts.constants(text_dims)


def text_graphs(parts: TextParts, get_encoder: GetEncoder) -> Iterator[tuple[Graph, list[Example]]]:
    """Each text encoder's graph and examples; drop them before the next, and the encoder is freed."""
    for role in parts.roles:
        encoder = get_encoder(role)
        yield parts.graph(role, encoder), parts.examples(role, encoder)
        del encoder


def null_text(context_dim: int, pooled_dim: int) -> dict[str, Array]:
    """For a model without text: one zero token and a zero pooled vector."""
    return {
        "encoder_hidden_states": np.zeros((1, 1, context_dim), np.float32),
        "text_embeds": np.zeros((1, pooled_dim), np.float32),
    }


def _runner(encoder: Network) -> Callable[[Ids], dict[str, Array]]:
    """transformers' own forward: hidden_states[-2], and the pooled text where the encoder projects."""

    def run(ids: Ids) -> dict[str, Array]:
        with torch.no_grad():
            out = encoder(torch.from_numpy(ids), output_hidden_states=True)
        found = {"hidden_states": out.hidden_states[-2].float().numpy()}
        if "text_embeds" in out:
            found["text_embeds"] = out.text_embeds.float().numpy()
        return found

    return run


def _random_ids(words: Vocabulary, stop: int, rng: np.random.Generator) -> Ids:
    """A row [1, L] with its end at ``stop``, no special id before it."""
    ids = np.full((1, words.length), words.pad, np.int64)
    plain = np.setdiff1d(list(words.words.values()), [words.begin, words.end])
    ids[0, 1:stop] = rng.choice(plain, stop - 1)
    ids[0, 0], ids[0, stop] = words.begin, words.end
    return ids


def _tokenizer_folder(role: str) -> str:
    return role.replace("text_encoder", "tokenizer")


def read_tokenizer(source: Path, role: str) -> Vocabulary:
    """The tokenizer of a text encoder in ``source``, whatever files it is in. Raises ExportError."""
    from transformers import CLIPTokenizer

    folder = source / _tokenizer_folder(role)
    if not folder.is_dir():
        raise ExportError(f"{source} has a {role} but no {folder.name}")
    words = _read_words(folder)
    try:
        with quiet("transformers"):
            theirs = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what the package under it raises is Exception itself
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    positions = int(read_config(role, source / role).get("max_position_embeddings", 77))
    vocabulary = _vocabulary(theirs, words, folder, positions)
    _check_alike(theirs, vocabulary, folder)
    return vocabulary


def _vocabulary(theirs: Any, words: Words, folder: Path, positions: int) -> Vocabulary:
    numbers = {"begin": theirs.bos_token_id, "end": theirs.eos_token_id, "pad": theirs.pad_token_id}
    for name, number in numbers.items():
        if number is None:
            raise ExportError(f"the tokenizer in {folder} names no {name} token")
    names = ("content", "special", "normalized", "lstrip", "rstrip", "single_word")
    added = tuple(
        {"id": int(number), **{name: getattr(token, name) for name in names}}
        for number, token in sorted(theirs.added_tokens_decoder.items())
    )
    length = min(int(theirs.model_max_length), positions)
    return Vocabulary(*words, length, **numbers, unknown=str(theirs.unk_token), added=added)


def _read_words(folder: Path) -> Words:
    """vocab.json and merges.txt, or both out of tokenizer.json, as transformers 5 saves them."""
    try:
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return read_json(folder / "vocab.json"), read_merges(folder / "merges.txt")
        model = read_json(folder / "tokenizer.json")["model"]
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        return model["vocab"], [(first, second) for first, second in merges]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"the tokenizer in {folder} has no CLIP words and merges ({error})") from error


def _check_alike(theirs: Any, vocabulary: Vocabulary, folder: Path) -> None:
    ours = ClipTokenizer(vocabulary)
    for text in _SAMPLES:
        wanted = theirs(text, add_special_tokens=False, verbose=False).input_ids
        if ours(text) != list(wanted):
            raise ExportError(f"the tokenizer in {folder} is not CLIP's: it reads {text!r} as {wanted[:8]}")


def _write_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    folder.mkdir(parents=True)
    merges = "\n".join(["#version: 0.2", *(" ".join(each) for each in vocabulary.merges), ""])
    files = {
        "vocab.json": json.dumps(dict(vocabulary.words), ensure_ascii=False),
        "merges.txt": merges,
        "config.json": json.dumps(vocabulary.config(), ensure_ascii=False, indent=1) + "\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
