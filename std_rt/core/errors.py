"""Every error a user can cause, as one tree.

    StdRtError              exit code 2, one line, no traceback
    ├── UsageError          flags or arguments that do not fit together
    ├── MediaError          a picture, clip or folder that cannot be read or written
    ├── BundleError         a bundle that is missing, changed, incomplete or too new
    ├── BackendError        a backend that is not installed or cannot run the graph
    ├── ExportError         a pipeline folder that cannot be exported, or a parity gate that failed
    └── RecipeError         a recipe with a wrong key or value, or data it cannot find

Each message says what was asked, what was found and what to type instead.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BundleError",
    "ExportError",
    "MediaError",
    "RecipeError",
    "StdRtError",
    "UsageError",
    "one_line",
]


class StdRtError(Exception):
    """Base of all errors above; ``str(error)`` is the one line to print."""


class UsageError(StdRtError):
    """Flags or arguments that do not fit together."""


class MediaError(StdRtError):
    """A picture, clip or folder that cannot be read or written."""


class BundleError(StdRtError):
    """A bundle that is missing, changed, incomplete or too new."""


class BackendError(StdRtError):
    """A backend that is not installed or cannot run the graph."""


class ExportError(StdRtError):
    """A pipeline folder that cannot be exported, or a parity gate that failed."""


class RecipeError(StdRtError):
    """A recipe with a wrong key or value, or data it cannot find."""


def one_line(error: BaseException | str, limit: int | None = None) -> str:
    """The text of an error in one line: its first ``limit`` characters, or the last where negative.

    Libraries end long messages with the cause as often as they begin with it. An error without text
    gives the name of its class.
    """
    text = " ".join(str(error).split())
    if limit is not None:
        text = text[:limit] if limit >= 0 else text[limit:]
    return text if text or isinstance(error, str) else type(error).__name__
