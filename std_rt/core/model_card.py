"""What a model folder's README.md says of it, in the front matter that the hub writes."""

from __future__ import annotations

from pathlib import Path

__all__ = ["licence"]


def licence(folder: Path) -> str:
    """``license:`` (or ``licence:``) of a folder's README.md; empty where nothing says."""
    readme = folder / "README.md"
    if not readme.is_file():
        return ""
    for line in readme.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
        key, _, value = line.partition(":")
        if key.strip() in ("license", "licence") and value.strip():
            return value.strip()
    return ""
