"""Memory and disk that an export takes, estimated from the headers of its weight files before work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from std_rt.core.errors import ExportError
from std_rt.core.machine import available_memory_gb, free_disk_gb
from std_rt.export.export_options import LARGE
from std_rt.models.weight_files import read_shapes, weight_files

__all__ = ["Need", "check_room", "estimate_export"]

_GB = 2**30
_PARTS = ("unet", "vae", "image_encoder", "text_encoder", "text_encoder_2")
_LOADED_BYTES = 4  # every part is read in fp32, one after the other
_STORED_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_BESIDE_GB, _BESIDE_LARGE_GB = 1.0, 5.0  # Python, torch, activations; of SDXL 14.5 GB were measured
_ON_DISK = 1.05  # graphs, reference pictures, the manifest


@dataclass(frozen=True)
class Need:
    """Peak memory and room on the output's disk, in GB (2**30 bytes)."""

    memory_gb: float
    disk_gb: float


def estimate_export(
    source: Path,
    precision: str = "fp16",
    *,
    parts: dict[str, Path] | None = None,
    adapter: Path | None = None,
    text: bool = True,
) -> Need:
    """What the export of a diffusers folder takes with weights stored in ``precision``.

    ``precision``: fp32, fp16 or bf16. ``parts`` are folders used instead of the source's own (as
    ``{"vae": Path(...)}``), and ``motion_adapter``; ``adapter`` is an IP-Adapter file. ``text`` is False if
    prompts are baked in, so that text encoders are loaded and not stored. Raises ExportError on an unreadable
    weight file.
    """
    folders = {part: source / part for part in _PARTS} | (parts or {})
    sizes = {part: _parameters(folder) for part, folder in folders.items()}
    adapter = adapter or source / "ip_adapter.safetensors"
    extra = _count(adapter) if adapter.suffix == ".safetensors" and adapter.is_file() else 0
    # The largest part in fp32; an adapter's weights join the UNet.
    video = sizes["unet"] + sizes.get("motion_adapter", 0)
    largest = max(video + extra, *sizes.values())
    beside = _BESIDE_LARGE_GB if largest >= LARGE else _BESIDE_GB
    memory_gb = _LOADED_BYTES * largest / _GB + beside
    if "motion_adapter" in sizes:  # the video UNet is made beside the two that it is made of
        memory_gb = max(memory_gb, _LOADED_BYTES * 2 * video / _GB + _BESIDE_GB)
    stored = extra + sum(size for part, size in sizes.items() if text or not part.startswith("text_"))
    stored_gb = _STORED_BYTES[precision] * stored / _GB
    return Need(memory_gb, _ON_DISK * stored_gb)


def check_room(need: Need, output: Path) -> None:
    """Raise ExportError, in one line, if memory or the disk of ``output`` is too small."""
    memory = available_memory_gb()
    if memory is not None and memory < need.memory_gb:
        raise ExportError(
            f"this export takes about {need.memory_gb:.1f} GB of memory and {memory:.1f} GB are free here; "
            "close other programs, add swap, or export on a machine that has it (a bundle runs anywhere)"
        )
    disk = free_disk_gb(output)
    if disk < need.disk_gb:
        raise ExportError(
            f"this export takes about {need.disk_gb:.1f} GB on disk and {disk:.1f} GB are free at {output}; "
            "delete something, give --output on another disk, or a smaller --precision"
        )


def _parameters(folder: Path) -> int:
    """Numbers in a model's weight files; 0 if there are none (the export itself says what is missing)."""
    return sum(_count(path) for path in weight_files(folder))


def _count(path: Path) -> int:
    return sum(math.prod(shape) for shape in read_shapes(path).values())
