"""What the command-line tests share: the result of a run, and pictures to run on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from std_rt.media import write_picture


@dataclass(frozen=True)
class Result:
    """Exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failing command must print."""
        assert self.code == 2, f"exit {self.code}: {self.out}{self.err}"
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert "Traceback" not in self.err
        assert len(lines) == 1, f"more than one line: {lines}"
        assert lines[0].startswith("error: ")
        return lines[0]


Cli = Callable[..., Result]


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """Write soft noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (height, width, 3), np.uint8)
    write_picture(path, frame // 2 + 64)
    return path


def files_in(folder: Path) -> set[str]:
    """Names of everything in a folder, hidden files too."""
    return set(os.listdir(folder))  # noqa: PTH208
