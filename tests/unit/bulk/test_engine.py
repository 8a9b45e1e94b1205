"""Engines of one machine share its cores without sharing one."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from std_rt.bulk.engine import BulkEngine, _own_cores
from std_rt.bulk.options import BulkOptions
from std_rt.core.bundle import Bundle
from std_rt.core.errors import BundleError


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds processes to cores")
def test_engines_take_cores_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[set[int]] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: taken.append(set(cores)))
    claims = [_own_cores(2) for _ in range(3)]
    assert taken == [{0, 1}, {2, 3}]
    assert claims[2] is None
    assert claims[0] is not None
    claims[0].release()  # as its process ends
    again = _own_cores(2)
    assert taken[2:] == [{0, 1}]
    for claim in (again, claims[1]):
        assert claim is not None
        claim.release()


def test_another_bundle_of_that_name_is_refused(handmade: Bundle) -> None:
    options = BulkOptions(bundle=str(handmade.path), digest="0" * 64)
    with pytest.raises(BundleError, match="is another one on this machine"):
        BulkEngine(options)
    BulkEngine(replace(options, digest=handmade.digest))
