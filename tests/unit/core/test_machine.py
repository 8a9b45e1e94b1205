"""Memory and disk of this machine, as far as the system tells."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from std_rt.core import machine
from std_rt.core.machine import available_memory_gb, describe_machine, fastest_arithmetic, free_disk_gb


def test_available_memory_is_a_part_of_all_memory() -> None:
    total, free = describe_machine().memory_gb, available_memory_gb()
    if total is None or free is None:
        pytest.skip("this system does not say")
    assert free > 0
    assert free <= total or sys.platform != "linux" or _swap_gb() > 0


def _swap_gb() -> float:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("SwapTotal"))) / 2**20


def test_available_memory_is_what_the_kernel_can_give_with_swap(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable: 5 kB\nSwapFree: 2 kB\nHugePages_Total: 0\n")
    assert machine._linux_available(path) == 7 * 1024
    path.write_text("MemTotal: 9 kB\n")
    assert machine._linux_available(path) is None
    assert machine._linux_available(tmp_path / "none") is None


def test_a_containers_limit_counts_and_its_page_cache_does_not(tmp_path: Path) -> None:
    for name, text in {"max": "1000\n", "current": "700\n", "stat": "anon 500\ninactive_file 150\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine._container_available(tmp_path) == 1000 - 700 + 150
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._container_available(tmp_path) is None
    assert machine._container_available(tmp_path / "none") is None


def test_the_smaller_of_machine_and_container_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":
        pytest.skip("there are no control groups")
    monkeypatch.setattr(machine, "_linux_available", lambda: 8 * 2**30)
    for limit, free in ((3 * 2**30, 3.0), (9 * 2**30, 8.0), (None, 8.0)):
        monkeypatch.setattr(machine, "_container_available", lambda limit=limit: limit)
        assert available_memory_gb() == free


def test_free_disk_of_a_folder_that_is_not_there_yet_is_that_of_its_parent(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 2**30
    assert free_disk_gb(tmp_path / "a" / "b" / "c") == pytest.approx(free, rel=0.1)
    assert free_disk_gb(Path("not-there-yet")) > 0


@pytest.mark.parametrize(
    ("flags", "arithmetic", "why"),
    [
        ("fma avx2 avx512f avx512_vnni amx_bf16 avx512_bf16 amx_int8", "bf16", "has AMX bf16 units"),
        ("fma avx2 avx512f avx512_bf16 avx512_vnni", "bf16", "has AVX-512 bf16 units"),  # EPYC
        ("fma avx2 avx512f avx512_vnni", "int8", "has VNNI and no bf16 units"),  # Xeon of 2019
        ("fma avx2 avx_vnni", "int8", "has AVX-VNNI and no bf16 units"),  # laptop
        ("fma avx2 avx512f amx_int8 amx_tile", "int8", "has AMX int8 and no bf16 units"),
        ("fma avx2", "fp32", "has neither bf16 units nor VNNI"),
    ],
)
def test_x86_flags_decide_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch, flags: str, arithmetic: str, why: str
) -> None:
    monkeypatch.setattr(machine, "_proc_cpuinfo", lambda: {"flags": flags})
    assert fastest_arithmetic(describe_machine()) == (arithmetic, f"this processor {why}")


def test_int8_graphs_at_hand_win_where_vnni_is_faster_than_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, arithmetic in (
        ("avx2 avx512f avx512_bf16 avx512_vnni", "int8"),
        ("avx2 avx512f avx512_bf16 avx512_vnni amx_bf16 amx_int8", "bf16"),
        ("avx2 avx512f avx512_bf16", "bf16"),
        ("avx2", "fp32"),
    ):
        monkeypatch.setattr(machine, "_proc_cpuinfo", lambda flags=flags: {"flags": flags})
        assert fastest_arithmetic(describe_machine(), int8_at_hand=True)[0] == arithmetic


@pytest.mark.parametrize(
    ("features", "arithmetic"), [("fp asimd asimddp", "fp32"), ("fp asimd asimddp i8mm bf16 sve", "bf16")]
)
def test_arm_flags_decide_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch, features: str, arithmetic: str
) -> None:
    monkeypatch.setattr(machine, "_proc_cpuinfo", lambda: {"Features": features})
    assert fastest_arithmetic(describe_machine())[0] == arithmetic


def test_where_the_system_names_no_flags_fp32_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_proc_cpuinfo", dict)
    assert fastest_arithmetic(describe_machine()) == (
        "fp32",
        "this system does not say what units the processor has",
    )
