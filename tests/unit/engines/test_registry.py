"""Choosing a backend, checking inputs, the cache folder, and the fake engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.fake_engine import FakeEngine, float_ports

from std_rt.core.errors import BackendError
from std_rt.core.files import cache_root
from std_rt.engines import GraphSpec, backends, choose_backend, open_engine
from std_rt.engines import registry as base
from std_rt.engines.gpu import libraries
from std_rt.engines.gpu import probe as cuda_probe
from std_rt.engines.gpu.probe import Gpu, Report
from std_rt.engines.protocol import check_inputs

Installs = Callable[..., None]
GPU_MODULES = ("tensorrt", "tensorrt_rtx")
ADA = Gpu("a GeForce", (8, 9), 24 * 2**30)
HOPPER = Gpu("a datacentre GPU", (9, 0), 80 * 2**30)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Installs:
    """``installed(*modules, cuda=False)``: as if these modules were here and no others."""

    def install(*modules: str, cuda: bool = False) -> None:
        capi = tmp_path / "package" / "capi"
        capi.mkdir(parents=True, exist_ok=True)
        if cuda:
            (capi / "libonnxruntime_providers_cuda.so").write_bytes(b"")
        spec = SimpleNamespace(origin=str(capi.parent / "__init__.py"))
        monkeypatch.setattr(base, "find_spec", lambda name: spec if name in modules else None)

    return install


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[Report], None]:
    """``driver(report)``: what the NVIDIA driver is made to answer."""
    return lambda report: monkeypatch.setattr(cuda_probe, "probe", lambda: report)


def _no_probe() -> Report:
    raise AssertionError("the driver was asked")


def test_backends_come_best_first_with_their_versions() -> None:
    found = backends()
    assert [info.name for info in found] == ["tensorrt", "rtx", "cuda", "openvino", "onnxruntime"]
    assert all(any(char.isdigit() for char in info.detail) for info in found if info.available)


def test_probing_names_devices() -> None:
    found = {info.name: info for info in backends(probe=True)}
    assert "CPU" in found["openvino"].detail


def test_auto_takes_the_first_and_says_why(installed: Installs) -> None:
    installed("openvino", "onnxruntime")
    assert choose_backend() == ("openvino", "the fastest that is installed")


def test_no_driver_is_asked_where_nothing_installed_needs_one(
    installed: Installs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_probe, "probe", _no_probe)
    installed("openvino", "onnxruntime")
    assert choose_backend()[0] == "openvino"
    assert [info.available for info in backends()] == [False, False, False, True, True]
    installed(*GPU_MODULES, "openvino")
    assert choose_backend("openvino") == ("openvino", "asked for")
    with pytest.raises(AssertionError, match="the driver was asked"):
        choose_backend()


def test_auto_goes_on_to_the_next_and_says_why(installed: Installs) -> None:
    installed("onnxruntime")
    assert choose_backend() == ("onnxruntime", "openvino not installed")


def test_auto_passes_a_gpu_backend_without_a_driver_and_says_so(
    installed: Installs, driver: Callable[[Report], None]
) -> None:
    driver(Report("no NVIDIA driver found"))
    installed("tensorrt_rtx", "openvino")
    assert choose_backend() == ("openvino", "rtx is installed, but no NVIDIA driver found")


@pytest.mark.parametrize(
    ("modules", "cuda", "chosen"),
    [
        ((*GPU_MODULES, "onnxruntime", "openvino"), True, "tensorrt"),
        (("tensorrt_rtx", "onnxruntime", "openvino"), True, "rtx"),
        (("onnxruntime", "openvino"), True, "cuda"),
        (("onnxruntime", "openvino"), False, "openvino"),
    ],
)
def test_auto_prefers_what_is_fastest_on_a_gpu(
    modules: tuple[str, ...], cuda: bool, chosen: str, installed: Installs, driver: Callable[[Report], None]
) -> None:
    driver(Report(None, "13.0", (ADA,)))
    installed(*modules, cuda=cuda)
    assert choose_backend() == (chosen, "the fastest that is installed")
    assert choose_backend(chosen) == (chosen, "asked for")


def test_rtx_is_passed_on_a_gpu_that_it_does_not_know(
    installed: Installs, driver: Callable[[Report], None]
) -> None:
    driver(Report(None, "13.0", (HOPPER,)))
    installed("tensorrt_rtx", "onnxruntime", "openvino", cuda=True)
    name, reason = choose_backend()
    assert name == "cuda"
    assert "rtx is installed, but a datacentre GPU (SM90, 80 GB) is not a GPU it supports" in reason
    with pytest.raises(BackendError, match=r"'rtx' is installed but cannot be used here: .*SM75, SM80"):
        choose_backend("rtx")


def test_another_gpu_that_would_do_is_named(installed: Installs, driver: Callable[[Report], None]) -> None:
    driver(Report(None, "13.0", (HOPPER, ADA)))
    installed("tensorrt_rtx", "openvino")
    with pytest.raises(BackendError, match=r"SM90, 80 GB.* is not a GPU it supports .*use --device cuda:1"):
        choose_backend("rtx")


@pytest.mark.parametrize("name", ["rtx", "cuda"])
def test_a_driver_older_than_the_cuda_of_a_backend_is_said(
    name: str, installed: Installs, driver: Callable[[Report], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("tensorrt_rtx", "onnxruntime", "openvino", cuda=True)
    monkeypatch.setattr(libraries, "cuda_version", lambda: "13.0")
    known = {"tensorrt-rtx-cu13": "1.7", "onnxruntime-gpu": "1.31"}
    monkeypatch.setattr(base, "_is_distributed", known.__contains__)
    monkeypatch.setattr(base.metadata, "version", known.__getitem__)
    driver(Report(None, "12.8", (ADA,)))
    with pytest.raises(BackendError, match=rf"'{name}' .* needs a driver for CUDA 13, and .* CUDA 12.8; ins"):
        choose_backend(name)
    driver(Report(None, "13.0", (ADA,)))
    assert choose_backend(name)[0] == name


def test_a_folder_that_has_a_packages_name_is_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SimpleNamespace(origin=None)
    monkeypatch.setattr(base, "find_spec", lambda name: folder)
    assert not any(info.available for info in backends())


def test_a_backend_asked_for_is_never_swapped(installed: Installs, driver: Callable[[Report], None]) -> None:
    installed("onnxruntime")
    with pytest.raises(BackendError, match=r"'openvino' is not installed; run: pip install -e \."):
        choose_backend("openvino")
    driver(Report(None, "13.0", (ADA,)))
    with pytest.raises(BackendError, match=r"'cuda' is not installed; run: pip install -e '\.\[cuda\]'"):
        choose_backend("cuda")
    driver(Report("no NVIDIA driver found"))
    needs = r"'cuda' needs an NVIDIA GPU \(no NVIDIA driver found\) and is not installed; run: pip install -e"
    with pytest.raises(BackendError, match=needs):
        choose_backend("cuda")


def test_no_backend_at_all_lists_the_commands(installed: Installs) -> None:
    installed()
    with pytest.raises(BackendError, match=r"pip install -e \.  or  pip install -e '\.\[onnx\]'"):
        choose_backend()


def test_an_unknown_backend_names_those_known() -> None:
    with pytest.raises(
        BackendError, match="unknown backend 'tpu'; use --backend with one of auto, tensorrt, rtx, cuda, open"
    ):
        choose_backend("tpu")


def test_an_unknown_precision_names_those_known(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="unknown precision 'int3'; use one of auto, fp32, bf16"):
        open_engine("auto", GraphSpec("g", tmp_path, {}, ""), "int3")
    with pytest.raises(BackendError, match="unknown precision 'int3'; use one of auto, fp32, bf16"):
        base.choose_form("openvino", "int3", ("fp32",))


def test_inputs_are_checked_by_name_shape_and_dtype() -> None:
    ports = float_ports(a=(1, 2), b=(3,))
    good = {"a": np.zeros((1, 2), np.float32), "b": np.zeros(3, np.float32)}
    check_inputs("g", ports, good)
    with pytest.raises(BackendError, match=r"takes a, b; got a$"):
        check_inputs("g", ports, {"a": good["a"]})
    with pytest.raises(BackendError, match=r"takes b as float32 \[3\]; got float32 \[4\]"):
        check_inputs("g", ports, {**good, "b": np.zeros(4, np.float32)})
    with pytest.raises(BackendError, match="got float64"):
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
