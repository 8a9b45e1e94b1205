"""What all tests share: a cache of their own, and a bundle made by hand."""

from __future__ import annotations

import pytest
from handmade import write_handmade

from std_rt.bundle import Bundle


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Compiled models of tests go to a temporary folder, shared by the whole session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STD_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("STD_RT_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def handmade(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of `handmade.py`; tests that change it make their own copy."""
    pytest.importorskip("onnx")
    return write_handmade(tmp_path_factory.mktemp("bundles") / "handmade")
