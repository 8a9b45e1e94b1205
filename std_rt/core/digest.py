"""Names made of content: of a file, and of an architecture, by which a LoRA and its base are compared."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from std_rt.core.files import file_digest

__all__ = ["file_digest", "unet_digest"]

# What stands beside the UNet's own weights: the image branch of an IP-Adapter, and LoRAs.
_BESIDE = re.compile(r"(^|\.)(encoder_hid_proj|processor|to_[kv]_ip|lora_\w+)(\.|$)")


def unet_digest(state: Mapping[str, Sequence[int]]) -> str:
    """sha256 over ``name shape`` of a UNet's plain weights, in order of the names.

    ``state`` maps the names of a state dict to shapes, so that a file's header is enough. Image branches
    and LoRAs do not count: the same UNet with and without them has one digest. Two trainings of one
    architecture have the same digest too.
    """
    plain = {
        name.replace(".base_layer.", "."): shape for name, shape in state.items() if not _BESIDE.search(name)
    }
    lines = [f"{name} {'x'.join(str(side) for side in plain[name])}" for name in sorted(plain)]
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()
