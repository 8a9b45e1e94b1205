"""Text in a bundle: prompts baked into constants, and for open prompts the encoders themselves.

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

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from std_rt.core.errors import ExportError, one_line
from std_rt.export.graphs import Example, Graph, Port, Trace
from std_rt.export.modules import ClipText
from std_rt.models.components import (
    TEXT_ROLES,
    Network,
    plain_config,
    quiet,
    read_config,
    read_json,
    text_roles,
)
from std_rt.pipeline.prompt import Encoded, Ids, chunk_prompts, encode_chunks, join_encoders, pair
from std_rt.pipeline.text_encoder import ClipTokenizer

__all__ = ["TextConstants", "TextParts", "read_tokenizer"]

Array = NDArray[np.float32]


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

    ``prompt`` is encoded; ``negative`` None means whatever the model uses without a negative prompt. Raises
    ExportError if a tokenizer is missing, or if prompts are given and there are no encoders.
    """

    source: Path
    prompt: str = ""
    negative: str | None = None
    _encoded: dict[str, list[Encoded]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.roles = text_roles(self.source)
        if not self.roles and (self.prompt or self.negative):
            raise ExportError(
                f"{self.source} has no text encoders, so it takes no --prompt and no --negative-prompt"
            )
        if self.roles and TEXT_ROLES[1] not in self.roles:
            raise ExportError(
                f"{self.source} has no {TEXT_ROLES[1]}, whose pooled text SDXL's UNet needs; "
                "download the whole pipeline"
            )
        index = read_json(self.source / "model_index.json")
        self.zero_negative = bool(index.get("force_zeros_for_empty_prompt", True))  # diffusers' default
        self.tokenizers = {role: read_tokenizer(self.source, role) for role in self.roles}
        zeros = self.negative is None and self.zero_negative
        texts = [self.prompt] if zeros else [self.prompt, self.negative or ""]
        chunks = chunk_prompts(texts, [*self.tokenizers.values()])
        self._chunks = dict(zip(self.roles, chunks, strict=True))

    @property
    def tokenizer_folders(self) -> dict[str, str]:
        """Role -> folder in the bundle; the manifest's ``text.tokenizers``."""
        return {role: _tokenizer_folder(role) for role in self.roles}

    def encode(self, role: str, encoder: Network) -> None:
        """Encode the prompts with one encoder (fp32, LoRAs fused)."""
        self._encoded[role] = [encode_chunks(chunks, _runner(encoder)) for chunks in self._chunks[role]]

    def constants(self, text_dims: tuple[int, int]) -> TextConstants:
        """All of it, once every role is encoded. ``text_dims``: widths the UNet takes (context, pooled)."""
        if not self.roles:  # one zero token and a zero pooled vector
            context, pooled = text_dims
            nothing = {
                "encoder_hidden_states": np.zeros((1, 1, context), np.float32),
                "text_embeds": np.zeros((1, pooled), np.float32),
            }
            return TextConstants(pair([nothing]), "none")
        encoded = zip(*(self._encoded[role] for role in self.roles), strict=True)
        arrays = pair([join_encoders(parts) for parts in encoded])
        chunks = len(self._chunks[self.roles[0]][0].ids)
        return TextConstants(arrays, "baked", chunks, self.zero_negative)

    def graph(self, role: str, encoder: Network) -> Graph:
        """The encoder as a graph. It may be in half precision; the boundary is float32 and int64."""
        length, config = self.tokenizers[role].length, encoder.config
        ids = Port("input_ids", ("batch", length), "token ids: begin, text, end, padding", "int64")
        outputs = [Port("hidden_states", ("batch", length, config.hidden_size), "before the last layer")]
        if hasattr(encoder, "text_projection"):
            outputs.append(Port("text_embeds", ("batch", config.projection_dim), "pooled text, projected"))
        plan = Trace(ClipText(encoder, length), (ids,), tuple(outputs))
        return Graph(role, plan, encoder.state_dict(), type(encoder).__name__, plain_config(encoder))

    def examples(self, role: str, encoder: Network) -> list[Example]:
        """transformers' answers (fp32) to seeded ids of several lengths, and to the prompt's first chunk."""
        words = self.tokenizers[role]
        rng = np.random.default_rng(0)
        vocabulary = int(encoder.config.vocab_size)
        rows = [_random_ids(words, vocabulary, stop, rng) for stop in (words.length - 1, words.length // 3)]
        rows.append(self._chunks[role][0].ids[:1])
        run = _runner(encoder)
        return [Example({"input_ids": ids}, run(ids)) for ids in rows]

    def write_tokenizers(self, bundle: Path) -> None:
        """Write ``tokenizer/`` and ``tokenizer_2/`` of a bundle, which the runtime reads."""
        for role, folder in self.tokenizer_folders.items():
            self.tokenizers[role].save(bundle / folder)


def _runner(encoder: Network) -> Callable[[Ids], dict[str, Array]]:
    """transformers' own forward: hidden_states[-2], and the pooled text if the encoder projects."""

    def run(ids: Ids) -> dict[str, Array]:
        with torch.no_grad():
            out = encoder(torch.from_numpy(ids), output_hidden_states=True)
        found = {"hidden_states": out.hidden_states[-2].float().numpy()}
        if "text_embeds" in out:
            found["text_embeds"] = out.text_embeds.float().numpy()
        return found

    return run


def _random_ids(words: ClipTokenizer, vocabulary: int, stop: int, rng: np.random.Generator) -> Ids:
    """A row [1, L] with its end at ``stop``, no begin or end before it."""
    ids = np.full((1, words.length), words.pad, np.int64)
    plain = np.setdiff1d(np.arange(vocabulary), [words.begin, words.end])
    ids[0, 1:stop] = rng.choice(plain, stop - 1)
    ids[0, 0], ids[0, stop] = words.begin, words.end
    return ids


def _tokenizer_folder(role: str) -> str:
    return role.replace("text_encoder", "tokenizer")


def read_tokenizer(source: Path, role: str) -> ClipTokenizer:
    """The tokenizer of a text encoder in ``source``, whatever files it is in. Raises ExportError."""
    from transformers import CLIPTokenizerFast

    folder = source / _tokenizer_folder(role)
    if not folder.is_dir():
        raise ExportError(f"{source} has a {role} but no {folder.name}; download the whole pipeline")
    try:
        with quiet("transformers"):
            theirs = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the package underneath raises Exception itself
        reason = one_line(error, 200)
        raise ExportError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    ids = {"begin": theirs.bos_token_id, "end": theirs.eos_token_id, "pad": theirs.pad_token_id}
    for name, number in ids.items():
        if number is None:
            raise ExportError(f"the tokenizer in {folder} names no {name} token")
    positions = int(read_config(role, source / role).get("max_position_embeddings", 77))
    length = min(int(theirs.model_max_length), positions)
    return ClipTokenizer(theirs.backend_tokenizer.to_str(), length, **ids)
