"""The base model of a LoRA or bundle: its licence, and a digest of its architecture."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["licence", "unet_digest"]

# Weights that are not the UNet's own: the image branch of an IP-Adapter, a motion adapter, and LoRAs.
_BESIDE = re.compile(r"(^|\.)(encoder_hid_proj|processor|to_[kv]_ip|motion_modules|lora_\w+)(\.|$)")


def licence(folder: Path) -> str:
    """``license:`` (or ``licence:``) in the front matter of a folder's README.md; empty if there is none."""
    readme = folder / "README.md"
    if not readme.is_file():
        return ""
    for line in readme.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
        key, _, value = line.partition(":")
        if key.strip() in ("license", "licence") and value.strip():
            return value.strip()
    return ""


def unet_digest(state: Mapping[str, Sequence[int]]) -> str:
    """sha256 over ``name shape`` of a UNet's plain weights, in order of the names.

    ``state`` maps the names of a state dict to shapes, so that a file's header is enough. Image branches,
    motion modules and LoRAs do not count: the same UNet with and without them has one digest. Two
    trainings of one architecture have the same digest too.
    """
    plain = {
        name.replace(".base_layer.", "."): shape for name, shape in state.items() if not _BESIDE.search(name)
    }
    lines = [f"{name} {'x'.join(str(side) for side in plain[name])}" for name in sorted(plain)]
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()
