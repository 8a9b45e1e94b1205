"""Items to make in bulk: pictures, a style, and Ray on two of this machine's cores."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.cli_support import picture

# The modules here import them, which only the extra [bulk] installs.
collect_ignore_glob = [] if find_spec("pyarrow") and find_spec("ray") else ["test_*.py"]


@pytest.fixture
def art(tmp_path: Path) -> Path:
    """A style picture."""
    return picture(tmp_path / "art" / "art.png", 32, 32, seed=1)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five pictures in two shapes, two of them in a folder of their own."""
    for index, name in enumerate(("a.png", "b.jpg", "c.png", "more/a.png", "more/d.png")):
        picture(tmp_path / "photos" / name, *((60, 40), (40, 60))[index % 2], seed=index)
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """Ray in this process, for all tests of a session."""
    from std_rt.bulk.cluster import connected

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("std_rt.bulk.cluster._STORE_GB", (0.1, 0.1))
        with connected():
            yield
