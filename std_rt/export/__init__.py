"""Export: an SDXL-layout diffusers folder (and a LoRA) -> a bundle. Needs ``pip install '.[export]'``.

Importing this costs nothing; torch is loaded by the first call.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from std_rt.core.bundle import Bundle

__all__ = ["export_pipeline", "load_torch_components"]


def export_pipeline(source: Path, output: Path, **options: Any) -> Bundle:
    """See `std_rt.export.build.export_pipeline`."""
    from std_rt.export import build

    return build.export_pipeline(source, output, **options)


def load_torch_components(bundle: Bundle) -> dict[str, nn.Module]:
    """See `std_rt.export.restore.load_torch_components`."""
    from std_rt.export import restore

    return restore.load_torch_components(bundle)
