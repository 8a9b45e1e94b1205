"""What tests of commands run on: a bundle, a picture and a style."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.cli_support import Cli, Result, picture

from std_rt.core.bundle import Bundle


@pytest.fixture
def bundle(handmade: Bundle) -> Path:
    """Folder of the bundle made by hand; not to be changed."""
    return handmade.path


@pytest.fixture
def own_bundle(handmade: Bundle, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(handmade.path, tmp_path / "own" / "handmade"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of 60 x 40 px."""
    return picture(tmp_path / "photo.png", 60, 40)


@pytest.fixture
def art(tmp_path: Path) -> Path:
    """A style picture."""
    return picture(tmp_path / "art" / "art.png", 32, 32, seed=1)


@pytest.fixture
def stylize(cli: Cli, bundle: Path, art: Path) -> Cli:
    """``std-rt stylize ARGUMENTS --style art.png --bundle HANDMADE``."""

    def run(*arguments: object) -> Result:
        return cli("stylize", *arguments, "--style", art, "--bundle", bundle)

    return run
