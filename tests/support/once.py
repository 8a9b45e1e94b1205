"""What takes long to make is made once a run of the tests, also where several processes run them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

__all__ = ["made_once"]


def made_once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object], *, timeout_s: float = 900
) -> Path:
    """The folder ``name`` of this run: whoever asks first calls ``make(folder)``, others wait for it.

    It belongs to all workers of pytest-xdist together, so no test may change what is in it. What ``make``
    raises, it raises; the next who asks tries again.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # a worker's own folder lies in that of the run
    place, done = root / "once" / name, root / "once" / f"{name}.done"
    place.parent.mkdir(exist_ok=True)
    with FileLock(root / "once" / f"{name}.lock", timeout=timeout_s):
        if not done.is_file():
            make(place)
            done.touch()
    return place
