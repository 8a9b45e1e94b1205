"""Choosing a backend, checking inputs, the cache folder, and the fake engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from std_rt.engines import GraphSpec, backends, base, choose_backend, open_engine
from std_rt.engines.base import cache_root, check_inputs
from std_rt.engines.fake import FakeEngine, float_ports
from std_rt.errors import BackendError


@pytest.fixture
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without OpenVINO."""
    found = base.find_spec
    monkeypatch.setattr(base, "find_spec", lambda name: None if name == "openvino" else found(name))


def test_backends_come_best_first_with_their_versions() -> None:
    found = backends()
    assert [info.name for info in found] == ["openvino", "onnxruntime"]
    assert all(any(char.isdigit() for char in info.detail) for info in found if info.available)


def test_probing_names_devices() -> None:
    assert "CPU" in backends(probe=True)[0].detail


def test_auto_takes_the_first_and_says_why() -> None:
    assert choose_backend() == ("openvino", "the fastest that is installed")


@pytest.mark.usefixtures("no_openvino")
def test_auto_goes_on_to_the_next_and_says_why() -> None:
    assert choose_backend() == ("onnxruntime", "openvino not installed")


@pytest.mark.usefixtures("no_openvino")
def test_a_backend_asked_for_is_never_swapped() -> None:
    with pytest.raises(BackendError, match="'openvino' is not installed; run: pip install std-rt"):
        choose_backend("openvino")


def test_no_backend_at_all_lists_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"pip install std-rt  or  pip install 'std-rt\[onnx\]'"):
        choose_backend()


def test_an_unknown_backend_names_those_known() -> None:
    with pytest.raises(BackendError, match="no backend 'tpu'; use --backend with one of auto, openvino"):
        choose_backend("tpu")


def test_an_unknown_precision_names_those_known(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no precision 'int3'; use one of auto, fp32, bf16"):
        open_engine("auto", GraphSpec("g", tmp_path, {}, ""), "int3")


def test_inputs_are_checked_by_name_shape_and_dtype() -> None:
    ports = float_ports(a=(1, 2), b=(3,))
    good = {"a": np.zeros((1, 2), np.float32), "b": np.zeros(3, np.float32)}
    check_inputs("g", ports, good)
    with pytest.raises(BackendError, match=r"takes a, b; it was given a$"):
        check_inputs("g", ports, {"a": good["a"]})
    with pytest.raises(BackendError, match=r"takes b as float32 \[3\]; it was given float32 \[4\]"):
        check_inputs("g", ports, {**good, "b": np.zeros(4, np.float32)})
    with pytest.raises(BackendError, match="it was given float64"):
        check_inputs("g", ports, {**good, "b": np.zeros(3)})


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "a" / "b"))
    assert cache_root() == tmp_path / "a" / "b"
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "file" / "below"))
    assert cache_root() is None


def test_the_fake_engine_overwrites_its_outputs_as_real_ones_may() -> None:
    ports = float_ports(x=(2,)), float_ports(y=(2,))
    engine = FakeEngine(lambda x: {"y": x + 1}, *ports)
    first = engine(x=np.zeros(2, np.float32))["y"]
    second = engine(x=np.ones(2, np.float32))["y"]
    assert first is second
    assert second.tolist() == [2, 2]
    assert [call["x"].tolist() for call in engine.calls] == [[0, 0], [1, 1]]
    with pytest.raises(BackendError):
        engine(z=np.zeros(2, np.float32))
    engine.close()
    assert engine.closed
