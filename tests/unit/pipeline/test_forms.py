"""A bundle in fp32 and int8: which form runs, on which processor, and what is said of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.handmade import write_handmade

from std_rt.core import machine
from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import BackendError, BundleError
from std_rt.engines import GraphSpec
from std_rt.engines.registry import choose_form, in_form
from std_rt.evaluation.bench import Settings, run
from std_rt.pipeline.openers import openers
from std_rt.pipeline.stylizer import Stylizer

openvino = pytest.importorskip("std_rt.engines.openvino.engine")

AVX2, VNNI = "fma avx2", "fma avx2 avx512f avx512_vnni"
EPYC, AMX = f"{VNNI} avx512_bf16", f"{VNNI} avx512_bf16 amx_bf16 amx_int8"
GREY = np.full((64, 64, 3), 100, np.uint8)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_handmade(tmp_path_factory.mktemp("both") / "both", int8=True)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the machine that tests one with these flags; OpenVINO computes fp32, whatever it has."""
    monkeypatch.setattr(openvino, "_precision", lambda core, asked: "fp32")
    return lambda flags: monkeypatch.setattr(machine, "_proc_cpuinfo", lambda: {"flags": flags})


def picture(bundle: Bundle, precision: str, backend: str = "openvino") -> tuple[np.ndarray[Any, Any], str]:
    """(a stylized frame, `Stylizer.precision_reason`)."""
    with Stylizer.load(bundle, backend=backend, precision=precision, steps=2) as stylizer:
        stylizer.set_style(GREY)
        return stylizer.stylize(GREY), stylizer.precision_reason


def test_on_every_processor_the_form_that_is_said_runs(both: Bundle, processor: Any) -> None:
    exact, int8 = picture(both, "fp32")[0], picture(both, "int8")[0]
    assert not np.array_equal(exact, int8)
    for flags, precision, wanted, said in (
        (AVX2, "auto", exact, "fp32: this processor has neither bf16 units nor VNNI"),
        (VNNI, "auto", int8, "int8: this processor has VNNI and no bf16 units"),
        (EPYC, "auto", int8, "int8: this processor's VNNI is faster than its AVX-512 bf16 units"),
        (AMX, "auto", exact, "this processor has AMX bf16 units"),
        (VNNI, "fp32", exact, "fp32: asked for"),
        (AVX2, "int8", int8, "int8: asked for"),
    ):
        processor(flags)
        found, reason = picture(both, precision)
        # bf16 units of the machine that tests may have rounded the first two; the forms differ by far more.
        assert np.abs(found.astype(int) - wanted).max() <= 3, (flags, precision)
        assert said in reason


def test_onnxruntime_takes_int8_when_asked_and_not_by_itself(both: Bundle, processor: Any) -> None:
    pytest.importorskip("onnxruntime")
    processor(VNNI)
    exact, int8 = picture(both, "fp32")[0], picture(both, "int8")[0]
    found, reason = picture(both, "auto", "onnxruntime")
    assert np.abs(found.astype(int) - exact).max() <= 1
    assert reason == "fp32: onnxruntime runs graphs as they were exported"
    assert np.abs(picture(both, "int8", "onnxruntime")[0].astype(int) - int8).max() <= 1


def test_a_bundle_without_an_int8_form_says_how_to_make_one(handmade: Bundle, processor: Any) -> None:
    processor(VNNI)
    command = re.escape(f"std-rt bundles int8 {handmade.path} -o engines/handmade-int8")
    with pytest.raises(BundleError, match=f"'handmade' has no int8 form; make one: {command}"):
        Stylizer.load(handmade, precision="int8")
    wanted = "fp32: this processor has VNNI and no bf16 units, but the bundle has no int8 form"
    assert picture(handmade, "auto")[1] == wanted


def test_gpus_run_the_float_form_and_refuse_int8() -> None:
    spec = GraphSpec("unet", Path("unet.onnx"), {}, "", quantized={"int8": Path("unet.int8.onnx")})
    for backend in ("rtx", "tensorrt", "cuda"):
        assert in_form(backend, spec, "auto")[0].path == Path("unet.onnx")
        with pytest.raises(BackendError, match=rf"'{backend}' runs no int8 graphs.*use --precision auto"):
            in_form(backend, spec, "int8")
        # A bundle of before, which has int8 graphs alone.
        with pytest.raises(BackendError, match=r"uint8 with a zero point.*use --backend cpu"):
            choose_form(backend, "auto", ("int8",))


def test_fp8_runs_where_it_is_asked_for_and_computed() -> None:
    files = {"fp8": Path("unet.fp8.onnx")}
    spec = GraphSpec("unet", Path("unet.onnx"), {}, "", compute="fp16", quantized=files)
    for backend in ("rtx", "tensorrt"):
        assert in_form(backend, spec, "auto")[0].path == Path("unet.onnx")
        wanted = GraphSpec("unet", Path("unet.fp8.onnx"), {}, "", compute="fp8")
        assert in_form(backend, spec, "fp8") == (wanted, "auto")
        # The VAE has no such form and runs as it was exported.
        assert in_form(backend, replace(spec, quantized={}), "fp8")[0].compute == "fp16"
    for backend in ("cuda", "openvino", "onnxruntime"):
        with pytest.raises(BackendError, match=f"'{backend}' does not compute in FP8; .*--backend rtx"):
            choose_form(backend, "fp8", ("fp16", "fp8"))
    assert choose_form("openvino", "auto", ("fp16", "fp8"))[0] == "fp16"


def test_a_bundle_without_an_fp8_form_says_how_to_make_one(handmade: Bundle) -> None:
    with pytest.raises(BundleError, match="made from fp16, and it is in fp32; export it again with --prec"):
        handmade.check_precision("fp8")
    half = {"precision": {"unet": {"compute": "fp16"}}}
    with pytest.raises(BundleError, match="'handmade' has no fp8 form; make one: std-rt bundles fp8 "):
        replace(handmade, manifest=handmade.manifest | half).check_precision("fp8")


def test_a_cpu_that_stands_in_for_a_gpu_is_not_asked_for_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def opened(backend: str, *given: Any) -> Any:
        asked.append((backend, next(value for value in given if isinstance(value, str))))
        raise BackendError("enough is known")

    for function in ("open_engine", "open_runner"):
        monkeypatch.setattr(f"std_rt.pipeline.openers.{function}", opened)
    monkeypatch.setattr(
        "std_rt.pipeline.openers.choose_backend", lambda name: ("openvino" if name == "cpu" else name, "")
    )
    found = openers("rtx", "fp8", meanwhile=print)
    program: Any = None
    for call in (lambda: found.graph(None), lambda: found.runner(program, {})):  # type: ignore[arg-type]
        with pytest.raises(BackendError):
            call()
    for backend, precision in asked:
        assert precision == {"openvino": "auto", "rtx": "fp8"}[backend]
    assert {backend for backend, _ in asked} == {"openvino", "rtx"}


def test_a_bundle_in_int8_alone_runs_as_it_is(processor: Any) -> None:
    processor(AVX2)
    assert choose_form("openvino", "auto", ("int8",)) == ("int8", "the bundle has no other form")
    spec = GraphSpec("unet", Path("unet.onnx"), {}, "", compute="int8")
    assert in_form("openvino", spec, "int8") == (spec, "auto")
    assert in_form("openvino", spec, "fp32") == (spec, "fp32")


def test_bench_says_the_form_and_why(
    both: Bundle, processor: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    processor(VNNI)
    run(Settings(bundle=str(both.path), backend="openvino", frames=1, warmup=0, steps=1))
    lines = capsys.readouterr().out.splitlines()
    assert "int8: this processor has VNNI and no bf16 units" in lines
    assert json.loads(lines[-1])["precision"] == "int8"


def test_the_int8_form_is_checked_like_the_other(tmp_path: Path) -> None:
    made = write_handmade(tmp_path / "mine", int8=True)
    assert (made.forms, made.quantized_paths("unet")) == (
        ("fp32", "int8"),
        {"int8": made.path / "unet.int8.onnx"},
    )
    assert made.quantized_paths("vae_decoder") == {}
    (made.path / "unet.int8.onnx").unlink()
    with pytest.raises(BundleError, match=r"incomplete: unet\.int8\.onnx is missing"):
        load_bundle(made.path)
