"""The run-time text encoder: CLIP's tokenizer and the bundle's text encoders, without transformers.

    encoder = TextEncoder(bundle, open_graph)
    encoder.encode("ink on paper, (bold lines:1.2)", "photo")  # the UNet's text inputs

Needs the ``tokenizers`` package (extra ``[text]``). A bundle with a baked-in prompt does not need it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from std_rt.core.bundle import Bundle
from std_rt.core.errors import BundleError, UsageError
from std_rt.core.machine import install_hint
from std_rt.engines import Engine, GraphSpec
from std_rt.pipeline.prompt import Encoding, Ids, RunEncoder, encode_pair

__all__ = ["ClipTokenizer", "TextEncoder"]

Opener = Callable[[GraphSpec], Engine]


class ClipTokenizer:
    """Text -> ids, equal to transformers' ``CLIPTokenizer``, without begin, end and padding.

    ``length``: tokens per call of the encoder. ``begin``, ``end``, ``pad``: ids. On disk it is a folder
    with ``tokenizer.json`` (the format of the package ``tokenizers``) and these four in ``config.json``.
    """

    def __init__(self, rules: str, length: int, begin: int, end: int, pad: int) -> None:
        """``rules`` is the text of ``tokenizer.json``. Raises UsageError if the package is missing."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UsageError(
                f"prompts need the package tokenizers, which is not installed; run: {install_hint('text')}"
            ) from error
        self.rules, self.length, self.begin, self.end, self.pad = rules, length, begin, end, pad
        try:
            self._encode = Tokenizer.from_str(rules).encode
        except Exception as error:  # the package raises Exception itself
            raise ValueError(error) from error

    @classmethod
    def load(cls, folder: Path) -> ClipTokenizer:
        """A bundle's tokenizer. Raises BundleError if it is damaged, UsageError without the package."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            numbers = [int(config[key]) for key in ("length", "begin", "end", "pad")]
            return cls((folder / "tokenizer.json").read_text(encoding="utf-8"), *numbers)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"the tokenizer in {folder} cannot be read ({error}); export the bundle again"
            ) from error

    def save(self, folder: Path) -> None:
        """Write ``folder``, which must not exist."""
        folder.mkdir(parents=True)
        config = {key: getattr(self, key) for key in ("length", "begin", "end", "pad")}
        for name, text in (("tokenizer.json", self.rules), ("config.json", json.dumps(config) + "\n")):
            (folder / name).write_text(text, encoding="utf-8", newline="\n")

    def __call__(self, text: str) -> list[int]:
        """Ids of ``text``, however long. Raises UsageError on half a surrogate pair, which is not text."""
        try:
            return list(self._encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise UsageError(f"the prompt {text[:40]!a} is not valid Unicode; type it again") from error


class TextEncoder:
    """A bundle's text encoders: prompts in, the UNet's text inputs out, each pair of prompts once.

    Engines open at the first prompt and stay open until `release`. Threads take turns.
    """

    def __init__(self, bundle: Bundle, open_graph: Opener, remember: int = 32) -> None:
        """``open_graph`` opens one graph at static shapes. Raises UsageError if prompts are baked in."""
        text = bundle.manifest["text"]
        if not bundle.takes_prompts:
            if text["mode"] == "none":
                raise UsageError(f"bundle '{bundle.name}' has no text encoders; leave out --prompt")
            raise UsageError(
                f"bundle '{bundle.name}' has its prompt baked in ({text.get('prompt') or 'none'}) and "
                "takes no other; export it with --prompts encoder"
            )
        self._bundle, self._open_graph, self._remember = bundle, open_graph, remember
        self._zero_negative = bool(text.get("zero_negative", True))
        folders = {role: bundle.path / folder for role, folder in text["tokenizers"].items()}
        self._tokenizers = {role: ClipTokenizer.load(path) for role, path in folders.items()}
        self._lock = Lock()
        self._engines: dict[str, Engine] = {}
        self._known: OrderedDict[tuple[str, str | None], Encoding] = OrderedDict()

    def encode(self, prompt: str, negative: str | None = None) -> Encoding:
        """encoder_hidden_states [1, 77 K, D], text_embeds [1, P], and both with ``negative_`` before.

        K, the number of chunks, is the same for both. ``negative`` None is zeros if the model was trained
        so, "" the empty prompt. Raises UsageError on an absurd weight, BackendError if a graph
        does not open. The arrays are shared: do not write into them.
        """
        key = (prompt, negative)
        with self._lock:
            if key not in self._known:
                while len(self._known) >= self._remember:
                    self._known.popitem(last=False)
                runs = [self._run(role) for role in self._tokenizers]
                words, zero = list(self._tokenizers.values()), self._zero_negative
                self._known[key] = encode_pair(prompt, negative, words, runs, zero_negative=zero)
            self._known.move_to_end(key)
            return self._known[key]

    def release(self) -> None:
        """Close the engines, which are large and idle between prompts; the next new prompt opens them."""
        with self._lock, ExitStack() as stack:
            while self._engines:
                stack.callback(self._engines.popitem()[1].close)

    def _run(self, role: str) -> RunEncoder:
        def run(ids: Ids) -> Mapping[str, Any]:
            if role not in self._engines:
                shapes = {"input_ids": (1, self._tokenizers[role].length)}
                spec = GraphSpec(role, self._bundle.graph_path(role), shapes, self._bundle.digest)
                self._engines[role] = self._open_graph(spec)
            return self._engines[role](input_ids=np.ascontiguousarray(ids))

        return run
