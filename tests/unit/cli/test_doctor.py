"""What `std-rt doctor` says of GPUs, libraries, compiled engines, memory and disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from support.handmade import write_handmade

from std_rt.cli import doctor
from std_rt.core import machine
from std_rt.engines import BackendInfo
from std_rt.engines import registry as base
from std_rt.engines.cache import EngineCache, EngineKey
from std_rt.engines.gpu import libraries as cuda_libraries
from std_rt.engines.gpu import probe as cuda_probe
from std_rt.engines.gpu.libraries import cuda_version, library_names, missing_libraries
from std_rt.engines.gpu.probe import Gpu, Report

ADA = Gpu("GeForce RTX 4090", (8, 9), 24 * 2**30)
HOPPER = Gpu("H100", (9, 0), 80 * 2**30)


def lines(rows: object) -> list[str]:
    """Rows as ``name: detail``, marked by ``!!`` where bad."""
    bad = {doctor._BAD: "!! ", doctor._GOOD: "", doctor._NOTE: "-- "}
    return [f"{bad[mark]}{name}: {detail}" for mark, name, detail in rows]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("report", "installed", "wanted"),
    [
        (Report("no NVIDIA driver found"), True, ["-- gpu: no NVIDIA driver found"]),
        (Report("the NVIDIA driver does not start"), True, ["!! gpu: the NVIDIA driver does not start"]),
        (Report("the NVIDIA driver does not start"), False, ["-- gpu: the NVIDIA driver does not start"]),
        (
            Report(None, "13.0", (ADA, HOPPER)),
            False,
            [
                "cuda:0: GeForce RTX 4090 (SM89, 24 GB); for tensorrt, rtx, cuda; "
                "the driver supports CUDA 13.0",
                "cuda:1: H100 (SM90, 80 GB); for tensorrt, cuda (not rtx); the driver supports CUDA 13.0",
            ],
        ),
    ],
)
def test_gpus_and_what_runs_on_them(
    report: Report, installed: bool, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_probe, "probe", lambda: report)
    monkeypatch.setattr(doctor, "find_spec", lambda name: object() if installed else None)
    assert lines(doctor._gpus()) == wanted


def test_a_backend_that_is_installed_and_not_usable_is_not_to_be_installed() -> None:
    found = [
        BackendInfo(
            "rtx", False, "tensorrt-rtx 1.7; no NVIDIA driver found", "pip", "no NVIDIA driver found"
        ),
        BackendInfo("cuda", False, "not installed", "pip install -e '.[cuda]'"),
        BackendInfo("openvino", True, "openvino 2026", "pip"),
    ]
    assert lines(doctor._backends(found)) == [
        "-- rtx: tensorrt-rtx 1.7; no NVIDIA driver found",
        "-- cuda: not installed; to add it: pip install -e '.[cuda]'",
        "openvino: openvino 2026",
    ]


@pytest.mark.parametrize(("memory", "disk"), [(1.0, 5.0), (9.0, 0.2)])
def test_too_little_memory_or_disk_is_marked(
    memory: float, disk: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "available_memory_gb", lambda: memory)
    monkeypatch.setattr(doctor, "free_disk_gb", lambda path: disk)
    found = lines(doctor._system())
    assert any(line.startswith(f"!! memory: {memory:.1f} GB free") for line in found) == (memory < 2)
    assert any(line.startswith(f"!! disk: {disk:.1f} GB free") for line in found) == (disk < 1)


@pytest.fixture
def cuda_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], None]:
    """``cuda_build("13.0", files)``: an onnxruntime for that CUDA, and files in pip's nvidia packages."""

    def install(cuda: str, files: list[str]) -> None:
        capi, lib = tmp_path / "onnxruntime" / "capi", tmp_path / "nvidia" / "cu13" / "lib"
        capi.mkdir(parents=True)
        lib.mkdir(parents=True)
        notes = f"package_name = 'onnxruntime-gpu'\n__version__ = '1.27.0'\ncuda_version = {cuda!r}\n"
        (capi / "build_and_package_info.py").write_text(notes if cuda else notes.rsplit("cuda", 1)[0])
        for name in files:
            (lib / name).write_bytes(b"")
        found = {
            "onnxruntime": SimpleNamespace(origin=str(capi.parent / "__init__.py")),
            "nvidia": SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")]),
        }
        monkeypatch.setattr(cuda_libraries, "find_spec", found.get)
        monkeypatch.setattr(cuda_libraries, "_loads", lambda name: False)

    return install


def test_missing_cuda_libraries_are_named(cuda_build: Callable[[str, list[str]], None]) -> None:
    here = [name for name in library_names("13.0") if "cudnn" not in name]
    cuda_build("13.0", here)
    assert cuda_version() == "13.0"
    assert lines(doctor._packages()) == [
        f"!! cuda: onnxruntime-gpu does not find {library_names('13.0')[-1]}; run: pip install -e '.[cuda]'"
    ]


def test_nothing_is_missing_where_all_is_there_or_no_cuda_is_wanted(
    cuda_build: Callable[[str, list[str]], None],
) -> None:
    cuda_build("12.8", library_names("12.8"))
    assert missing_libraries() == []


def test_a_build_without_cuda_needs_no_libraries(cuda_build: Callable[[str, list[str]], None]) -> None:
    cuda_build("", [])
    assert cuda_version() is None
    assert list(doctor._packages()) == []


def test_library_names_follow_the_cuda_version_and_the_system() -> None:
    assert "libcufft.so.11" in library_names("12.8", "linux")
    assert "libcublas.so.13" in library_names("13.0", "linux")
    assert library_names("13.0", "win32")[-1] == "cudnn64_9.dll"


def test_compiled_engines_are_counted_and_damage_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STD_RT_DATA", str(tmp_path / "data"))
    assert [name for _, name, _ in doctor._cache()] == ["cache"]
    assert not (tmp_path / "data").exists()  # looking makes nothing
    store = EngineCache.open()
    assert store is not None
    key = EngineKey("b" * 64, "unet", {"sample": (1, 4, 8, 8)}, "tensorrt_rtx", "1.7", "sm89")
    store.build(key, bytes(3 * 2**20))
    assert (
        lines(doctor._cache())[1]
        == "engines: 1 compiled (3 MB) for tensorrt_rtx 1.7; check: std-rt engines verify"
    )
    (tmp_path / "cache" / "engines" / "manifest.json").write_text("{")
    assert lines(doctor._cache())[1].startswith("!! engines: the list of engines")


def test_the_report_has_it_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cuda_probe, "probe", lambda: Report("no NVIDIA driver found"))
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(typer.Exit) as ended:
        doctor.doctor()
    assert ended.value.exit_code == 1  # no backend
    said = capsys.readouterr().out
    for name in ("memory", "disk", "gpu", "tensorrt", "rtx", "cuda", "openvino", "backends", "cache"):
        assert f"  {name} " in said


@pytest.mark.parametrize(
    ("flags", "int8", "said"),
    [
        ("avx2 avx512_vnni", True, "int8: this processor has VNNI and no bf16 units"),
        ("avx2 avx512_vnni", False, "fp32: this processor has VNNI and no bf16 units, but the bundle has no"),
        ("avx2 avx512_bf16 avx512_vnni", True, "int8: this processor's VNNI is faster than its AVX-512 bf16"),
        ("avx2 avx512_bf16 avx512_vnni", False, "bf16: this processor has AVX-512 bf16 units"),
        ("avx2", True, "fp32: this processor has neither bf16 units nor VNNI"),
    ],
)
def test_the_form_that_auto_takes_and_why(
    flags: str, int8: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(machine, "_proc_cpuinfo", lambda: {"flags": flags})
    monkeypatch.setattr(base, "choose_backend", lambda: ("openvino", "asked for"))
    (line,) = lines(doctor._precision(write_handmade(tmp_path / "mine", int8=int8)))
    assert line.startswith(f"precision: {said}")
