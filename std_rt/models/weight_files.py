"""Weight files: written tensor by tensor, and checked before anything loads them.

diffusers and transformers follow any path that an index names, and report a truncated file without its name.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from std_rt.core.errors import ExportError, one_line

__all__ = [
    "Slot",
    "check_weights",
    "open_weights",
    "read_places",
    "read_shapes",
    "weight_files",
    "write_weights",
]

_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
# A file's beginning (lower case) that gives another kind away, and what to do with it.
_KINDS = (
    (b"gguf", "a GGUF file, whose weights are quantized; give the .safetensors of the same model"),
    (b"<", "a web page, not weights: a download that needed a login or another link; download it again"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; run: git lfs pull"),
)
_PICKLE = (
    "a PyTorch pickle, which may run code and is not opened; give the .safetensors of the same model, or "
    'convert it: python -c "import torch, safetensors.torch as s; '
    "f = torch.load('{path}', 'cpu', weights_only=True); "
    "s.save_file({{k: v.clone().contiguous() for k, v in f.get('state_dict', f).items() "
    "if hasattr(v, 'clone')}}, '{stem}.safetensors')\""
)
_STEMS = ("diffusion_pytorch_model", "model")


def open_weights(path: Path, what: str = "") -> Any:
    """A `safe_open` of the whole file, tensors unread. Raises ExportError that names a damaged file.

    ``what`` it is ("LoRA") goes before the name in the message.
    """
    named = f"{what} {path}".lstrip()
    try:
        return safe_open(path, "pt")
    except FileNotFoundError as error:
        raise ExportError(f"{named} does not exist") from error
    except (OSError, SafetensorError, ValueError) as error:
        if kind := _other_kind(path):
            raise ExportError(f"{named} is {kind}") from error
        raise ExportError(f"{named} cannot be read: it {_damage(path, error)}; download it again") from error


def read_shapes(path: Path, what: str = "") -> dict[str, list[int]]:
    """Tensor names and shapes, from the header alone. Raises ExportError."""
    with open_weights(path, what) as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a mapping)


@dataclass(frozen=True)
class Slot:
    """A tensor to be written: its type as safetensors names it (F16, F32, ...), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return _WIDTHS[self.dtype] * math.prod(self.shape)


def write_weights(path: Path, slots: Mapping[str, Slot], values: Iterable[NDArray[Any]]) -> None:
    """A safetensors file, tensor by tensor: ``values`` come in the order of ``slots``, in their types.

    Not the library's ``save_file``: that wants all tensors in their final type at once, and makes files that
    only their owner may read, while a bundle is there to be shared.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, slot in slots.items():
        offsets = [at, at + slot.bytes]
        header[key] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in values:
            value.tofile(file)


def read_places(path: Path) -> dict[str, int]:
    """Tensor -> offset of its bytes in the file, from the header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items()}


def weight_files(folder: Path) -> list[Path]:
    """One file or its shards, as diffusers chooses; halves only if there is nothing else."""
    for stem in _STEMS:
        for variant in ("", ".fp16"):
            for pattern in (f"{stem}{variant}.safetensors", f"{stem}{variant}-*-of-*.safetensors"):
                if found := sorted(folder.glob(pattern)):
                    return found
    return []


def check_weights(folder: Path) -> None:
    """Raise ExportError if a weight file of a model's folder is damaged, missing or outside the folder."""
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        _check_index(index)
    for path in sorted(folder.glob("*.safetensors")):
        with open_weights(path):
            pass


def _other_kind(path: Path) -> str:
    """What else a file is by its first bytes, and what to do with it; "" if they say nothing."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        head = file.read(64)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            is_pickle = any(name.endswith("data.pkl") for name in archive.namelist())
        if not is_pickle:
            return "a zip archive; unpack it and give the .safetensors file in it"
        return _PICKLE.format(path=path.as_posix(), stem=path.with_suffix("").as_posix())
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _PICKLE.format(path=path.as_posix(), stem=path.with_suffix("").as_posix())
    return next((kind for start, kind in _KINDS if head.lstrip().lower().startswith(start)), "")


def _damage(path: Path, error: Exception) -> str:
    """What is wrong, in words for the person who has the file."""
    if path.is_dir():
        return "is a folder, not a .safetensors file"
    size = path.stat().st_size
    reason = one_line(error)
    if "not fully covered" in reason:
        return f"is incomplete or too long ({size} bytes do not match its header)"
    return f"is not a readable safetensors file ({size} bytes; {reason})"


def _check_index(index: Path) -> None:
    """Raise ExportError unless every shard lies beside the index and holds the tensors the index says."""
    places = _weight_map(index)
    for name in sorted(set(places.values())):
        if not _is_plain(name):
            raise ExportError(
                f"{index} names the weight file {name!r}, which is outside its folder; do not use this model"
            )
        if not (index.parent / name).is_file():
            raise ExportError(
                f"{index.parent / name} is missing, and {index.name} names it; download it again"
            )
        wanted = {key for key, place in places.items() if place == name}
        if lacking := sorted(wanted - read_shapes(index.parent / name).keys()):
            raise ExportError(f"{index.parent / name} lacks {lacking[0]}, which {index.name} places there")


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(name) for key, name in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{index} is not a readable index of weight files; download it again") from error


def _is_plain(name: str) -> bool:
    """A bare file name on every system: no folder, no drive, no ``..``."""
    return name not in ("", ".", "..") and PurePosixPath(name).name == PureWindowsPath(name).name == name
