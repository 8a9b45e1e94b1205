"""`std-rt engines`: list, build, verify, gc."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.cli_support import Cli

from std_rt.cli.engines import _targets, plan, why_unused
from std_rt.core.bundle import load_bundle
from std_rt.engines.cache import EngineCache, EngineKey, Entry
from std_rt.engines.gpu.driver import driver_problem


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STD_RT_DATA", str(tmp_path / "data"))


def _cache() -> EngineCache:
    cache = EngineCache.open()
    assert cache is not None
    return cache


Add = Callable[..., Path]


@pytest.fixture
def add(own_bundle: Path) -> Add:
    """``add("unet", version="1")`` lists an engine of `own_bundle`."""

    def build(graph: str, *, digest: str = "", version: str = "1.2", origin: str | Path = own_bundle) -> Path:
        bundle = digest or load_bundle(own_bundle).digest
        key = EngineKey(bundle, graph, {"sample": (1, 4, 8, 8)}, "made_up", version, "sm89", "", "")
        return _cache().build(key, graph.encode(), origin=origin)

    return build


def test_list_shows_what_is_there(cli: Cli, add: Add) -> None:
    assert "no engines in" in cli("engines", "list").out
    add("unet")
    add("vae_decoder")
    out = cli("engines", "list").out
    rows = [line for line in out.splitlines() if "made_up 1.2" in line]
    assert len(rows) == 2
    assert all(word in rows[0] for word in ("handmade", "unet", "1x4x8x8", "sm89"))
    assert "2 engines, 0.0 MB in" in out


def test_verify_names_what_has_changed_and_exits_2(cli: Cli, add: Add) -> None:
    add("unet").write_bytes(b"changed")
    add("vae_decoder")
    result = cli("engines", "verify")
    assert "1 of 2 engines and files are not as built" in result.error
    assert result.error.endswith("run: std-rt engines gc")
    assert "(unet) has changed since it was built" in result.out
    assert "unet" in cli("engines", "gc").out
    result = cli("engines", "verify")
    assert (result.code, result.out.split(" in ")[0]) == (0, "1 engines")


def test_gc_keeps_engines_of_bundles_in_folders_and_drops_those_of_bundles_that_are_gone(
    cli: Cli, add: Add, own_bundle: Path, tmp_path: Path
) -> None:
    add("unet")
    add("vae_decoder", digest="other", origin=tmp_path / "gone")
    add("vae_encoder", digest="exported since", origin=own_bundle)
    dry = cli("engines", "gc", "--dry-run").out
    assert "2 would be removed" in dry
    assert len(_cache().entries()) == 3
    out = cli("engines", "gc").out
    assert out.count("its bundle is no longer there") == 2
    assert [entry.key.graph for entry in _cache().entries()] == ["unet"]
    assert "nothing to remove" in cli("engines", "gc").out


def test_gc_drops_what_was_not_used_for_long_and_everything_when_asked(cli: Cli, add: Add) -> None:
    old = add("unet")
    add("vae_decoder")
    long_ago = time.time() - 10 * 86400
    os.utime(old, (long_ago, long_ago))
    assert "nothing to remove" in cli("engines", "gc", "--older-than", 11).out
    assert "not used for 10 days" in cli("engines", "gc", "--older-than", 9).out
    assert not old.exists()
    assert "1 removed" in cli("engines", "gc", "--all").out
    assert _cache().entries() == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"bundle": ""}, ""),
        ({"product": "other", "version": "0"}, ""),
        ({"driver": "cuda 13.0"}, ""),
        ({"bundle": "b9"}, "its bundle is no longer there"),
        ({"version": "1.6"}, "for tensorrt_rtx 1.6, installed is 1.7"),
        ({"driver": "cuda 12.9"}, "for driver cuda 12.9, installed is cuda 13.0"),
    ],
)
def test_engines_of_other_bundles_versions_and_drivers_are_unused(change: dict[str, str], why: str) -> None:
    key = replace(EngineKey("b1", "unet", {}, "tensorrt_rtx", "1.7", "sm89"), **change)  # type: ignore[arg-type]
    entry = Entry(key, "", 5, "")
    assert why_unused(entry, {"b1"}, {"tensorrt_rtx": "1.7"}, "cuda 13.0") == why
    if "driver" in change:
        assert why_unused(entry, {"b1"}, {}, "") == ""  # no GPU here to compare with


def test_an_unreadable_list_is_one_line_and_gc_mends_it(cli: Cli, add: Add) -> None:
    add("unet")
    (_cache().folder / "manifest.json").write_text("[]", encoding="utf-8")
    assert cli("engines", "list").error.endswith("run: std-rt engines gc")
    assert cli("engines", "gc").code == 0
    assert "no engines" in cli("engines", "list").out


def test_build_for_gpus_that_are_not_there(cli: Cli, bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = ("engines", "build", bundle, "--sm", "89,120", "--size", "32x16", "--steps", 2)
    lines = cli(*command).out.splitlines()
    assert {line.split(":")[0] for line in lines} >= {"unet", "vae_encoder", "style_encoder", "glue.frame_in"}
    assert all("sm89+sm120" in line and "built in" in line for line in lines)
    assert all("was there" in line for line in cli(*command).out.splitlines())
    shapes = {entry.key.graph: entry.key.shapes for entry in _cache().entries()}
    assert shapes["vae_encoder"]["image"] == (1, 3, 16, 32)
    assert cli("engines", "verify").code == 0
    assert "handmade" in cli("engines", "list").out
    assert cli("engines", "gc").out.startswith("nothing to remove")


def test_build_for_openvino_opens_every_graph_once(cli: Cli, bundle: Path) -> None:
    lines = cli("engines", "build", bundle, "--backend", "openvino", "--size", "32").out.splitlines()
    assert {line.split(":")[0] for line in lines} == {"unet", "vae_encoder", "vae_decoder", "style_encoder"}
    assert all("opened in" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sm", "90"], "has no code for sm90, only for sm75"),
        (["--backend", "onnxruntime"], "keeps no engines; use --backend rtx, tensorrt or openvino"),
        (["--backend", "abacus"], "there is no backend 'abacus'"),
        (["--backend", "openvino", "--sm", "89"], "only rtx builds engines for GPUs in other machines"),
        (["--steps", "3", "--sm", "89"], "has no 3-step schedule"),
    ],
)
def test_what_cannot_be_built_is_one_line(cli: Cli, bundle: Path, arguments: list[str], says: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert says in cli("engines", "build", bundle, *arguments).error


def test_without_a_gpu_targets_must_be_named(cli: Cli, bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    if not driver_problem():
        pytest.skip("there is a GPU here")
    assert "name the GPUs to build for, as in --sm 89,120" in cli("engines", "build", bundle).error


def test_the_plan_is_what_a_frame_of_the_given_size_needs(bundle: Path) -> None:
    made = plan(str(bundle), size=64, frame=(360, 640), steps=1)
    height, width = made.program.buffers["frame"][0][1:3]
    assert width > height
    assert made.specs["vae_encoder"].shapes["image"] == (1, 3, height, width)
    assert made.style.shapes["style_image"][0] == 1
    graphs = [spec.name for spec in made.engines(glue=True)]
    assert len(graphs) == len(set(graphs))
    assert set(graphs) - {spec.name for spec in made.engines(glue=False)} == {
        "glue.frame_in",
        "glue.combine2",
        "glue.frame_out",
    }


def test_targets_are_compute_capabilities_however_they_are_written() -> None:
    assert _targets("89, sm120,12.0") == ("sm89", "sm120")
    assert _targets("") == ()


def test_targets_that_are_none_are_refused(cli: Cli, bundle: Path) -> None:
    result = cli("engines", "build", bundle, "--sm", "ada")
    assert result.code == 2
    assert "names no GPUs" in result.err
