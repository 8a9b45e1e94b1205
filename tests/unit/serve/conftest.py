"""One server on the handmade bundle for all tests of a file, which leave it as they found it.

Without the extra [serve] these tests are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import pytest

from std_rt.core.bundle import Bundle
from std_rt.pipeline.stylizer import Stylizer

if TYPE_CHECKING:
    from support.serve_support import Frame, Site

if not all(map(find_spec, ("starlette", "uvicorn", "websockets", "python_multipart"))):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="package")
def stylizer(handmade: Bundle) -> Iterator[Stylizer]:
    with Stylizer.load(handmade, backend="openvino", precision="fp32", steps=2) as stylizer:
        yield stylizer


@pytest.fixture(scope="package")
def art() -> dict[str, Frame]:
    return {name: np.full((32, 32, 3), value, np.uint8) for name, value in (("dark", 30), ("light", 220))}


@pytest.fixture(scope="module")
def site(stylizer: Stylizer, art: dict[str, Frame]) -> Iterator[Site]:
    from support.serve_support import own, running

    from std_rt.serve.app import Options, Server
    from std_rt.serve.limits import Limits

    limits = Limits(sessions=4, jobs=3, picture_bytes=2 << 20, picture_px=1_000_000, frame_px=1_000_000)
    with Server(stylizer, own(art), Options(limits=limits)) as server, running(server) as site:
        yield site
