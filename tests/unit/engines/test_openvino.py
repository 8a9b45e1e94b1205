"""OpenVINO's own: what it keeps in the engine cache, and what precision means for a quantized graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper

from std_rt.core.errors import BackendError
from std_rt.engines import GraphSpec, open_engine
from std_rt.engines.cache import EngineCache
from std_rt.engines.openvino import compiled
from std_rt.engines.openvino import engine as backend

Arrays = dict[str, np.ndarray]
PORTS = {"sample": (1, 4), "timestep": (1,)}
WEIGHT = np.arange(16, dtype=np.float32).reshape(4, 4) / 16


@pytest.fixture
def spec(tmp_path: Path) -> GraphSpec:
    """``noise_pred = sample @ WEIGHT + cos(timestep)``, of a bundle of this test's own."""
    return _write(tmp_path / "unet.onnx", [helper.make_node("MatMul", ["sample", "weight"], ["product"])])


def _write(path: Path, product: list, **constants: np.ndarray) -> GraphSpec:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in PORTS.items()]
    out = helper.make_tensor_value_info("noise_pred", TensorProto.FLOAT, PORTS["sample"])
    nodes = [
        *product,
        helper.make_node("Cos", ["timestep"], ["wave"]),
        helper.make_node("Add", ["product", "wave"], ["noise_pred"]),
    ]
    values = {"weight": WEIGHT} | constants
    made = helper.make_graph(
        nodes, "g", ports, [out], [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()]
    )
    opset = [helper.make_opsetid("", 20)]
    path.write_bytes(helper.make_model(made, opset_imports=opset, ir_version=10).SerializeToString())
    return GraphSpec("unet", path, PORTS, key=f"bundle in {path.parent}")


def draw() -> Arrays:
    """Inputs of the graph."""
    return {"sample": np.array([[1, -2, 3, 0.5]], np.float32), "timestep": np.array([2], np.float32)}


def run(spec: GraphSpec, precision: str = "fp32") -> np.ndarray:
    """Open, run once, close; checked against NumPy."""
    engine = open_engine("openvino", spec, precision)
    inputs = draw()
    assert engine.inputs == {name: (shape, np.dtype(np.float32)) for name, shape in PORTS.items()}
    result = engine(**inputs)["noise_pred"].copy()
    np.testing.assert_allclose(result, inputs["sample"] @ WEIGHT + np.cos(inputs["timestep"]), atol=1e-5)
    engine.close()
    return result


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for every graph that is compiled from here on."""
    found: list[str] = []
    original = backend.compile_graph

    def counted(core: object, spec: GraphSpec, config: dict[str, str]) -> object:
        found.append(spec.name)
        return original(core, spec, config)

    monkeypatch.setattr(backend, "compile_graph", counted)
    return found


def engines() -> list[Path]:
    """Engine files in the cache."""
    cache = EngineCache.open()
    assert cache is not None
    return sorted(cache.folder.glob("*.engine"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STD_RT_DATA", str(tmp_path / "data"))


def test_a_second_start_reads_no_graph_and_gives_the_same(spec: GraphSpec, compiles: list[str]) -> None:
    before = run(spec)
    spec.path.unlink()
    assert (run(spec) == before).all()
    assert compiles == ["unet"]
    assert len(engines()) == 1


def test_without_a_key_or_a_writable_cache_nothing_is_kept(
    spec: GraphSpec, compiles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(replace(spec, key=""))
    assert not engines()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "file"))
    run(spec)
    assert len(compiles) == 2


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-7], lambda data: data[:-1] + b"!"])
def test_a_damaged_engine_is_not_loaded_but_built_again(
    damage: Callable[[bytes], bytes], spec: GraphSpec, compiles: list[str]
) -> None:
    run(spec)
    [path] = engines()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    run(spec)
    assert len(compiles) == 2
    run(spec)
    assert len(compiles) == 2  # the one built again is used


def test_an_engine_that_another_machine_listed_is_not_loaded(
    spec: GraphSpec, compiles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(spec)
    monkeypatch.setenv("STD_RT_DATA", str(tmp_path / "other machine"))
    run(spec)
    assert len(compiles) == 2


def test_one_thing_different_another_engine(spec: GraphSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    core = backend.ov.Core()
    config = backend._config("fp32")
    keys = [
        compiled.engine_key(core, spec, config),
        compiled.engine_key(core, replace(spec, key="other bundle"), config),
        compiled.engine_key(core, replace(spec, name="vae_encoder"), config),
        compiled.engine_key(core, replace(spec, shapes={**PORTS, "sample": (2, 4)}), config),
        compiled.engine_key(core, replace(spec, steady=frozenset()), config),
        compiled.engine_key(core, spec, backend._config("bf16")),
        compiled.engine_key(core, replace(spec, compute="int8"), config),
    ]
    monkeypatch.setattr(compiled.ov, "__version__", "2099.1")
    keys.append(compiled.engine_key(core, spec, config))
    monkeypatch.setattr(compiled.ov.Core, "get_property", lambda self, device, name: ["another processor"])
    keys.append(compiled.engine_key(core, spec, config))
    assert len({key.digest for key in keys}) == 9


def test_weights_too_large_to_keep_are_not(spec: GraphSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_LARGEST_CACHED_BYTES", WEIGHT.nbytes // 2)
    run(spec)
    assert not engines()


def test_a_cache_that_cannot_take_the_engine_is_said_and_costs_nothing_else(
    spec: GraphSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise BackendError("the disk is full; make room")

    monkeypatch.setattr(EngineCache, "build", full)
    run(spec)
    assert [record.getMessage() for record in caplog.records] == ["the disk is full; make room"]


@pytest.fixture
def quantized(tmp_path: Path) -> GraphSpec:
    nodes = [
        helper.make_node("QuantizeLinear", ["sample", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["near"]),
        helper.make_node("DequantizeLinear", ["q_weight", "fine"], ["w"]),
        helper.make_node("MatMul", ["near", "w"], ["product"]),
    ]
    spec = _write(
        tmp_path / "int8.onnx",
        nodes,
        scale=np.float32(0.5),
        zero=np.int8(0),
        fine=np.float32(1 / 16),
        q_weight=(WEIGHT * 16).astype(np.int8),
    )
    return replace(spec, compute="int8")


def test_a_quantized_graph_says_int8_whatever_is_asked(quantized: GraphSpec) -> None:
    for asked in ("auto", "fp32"):
        engine = open_engine("openvino", quantized, asked)
        assert engine.precision == "int8"
        found = engine(**draw())["noise_pred"]
        np.testing.assert_allclose(found, draw()["sample"] @ WEIGHT + np.cos(2), atol=0.02)


def test_a_quantized_graph_that_bf16_beside_it_breaks_runs_in_fp32(
    quantized: GraphSpec, spec: GraphSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_graph(
        core: ov.Core, spec: GraphSpec, config: dict[str, str]
    ) -> tuple[compiled.Compiled, int]:
        if config["INFERENCE_PRECISION_HINT"] == "bf16":
            raise BackendError("no suitable implementations")
        return compile_really(core, spec, config)

    compile_really = backend.compile_graph
    monkeypatch.setattr(backend, "compile_graph", compile_graph)
    monkeypatch.setattr(backend, "_precision", lambda core, asked: "bf16")
    assert open_engine("openvino", quantized, "auto").precision == "int8"
    with pytest.raises(BackendError, match="no suitable implementations"):
        open_engine("openvino", spec, "auto")


@pytest.mark.parametrize("compute", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_weights_stored_in_fp16_stay_so_until_they_are_packed(compute: int, tmp_path: Path) -> None:
    """Stored as `std_rt.export.weights` does: [out, in] behind a Transpose, and a Cast for fp32 graphs."""
    rng = np.random.default_rng(0)
    up, down = (rng.standard_normal(shape).astype(np.float16) for shape in ((9000, 4), (4, 9000)))
    nodes = [helper.make_node("Cast", ["sample"], ["x0"], to=compute)]
    for i, name in enumerate(("up", "down")):
        nodes += [
            helper.make_node("Transpose", [name], [f"turned_{i}"], perm=[1, 0]),
            helper.make_node("Cast", [f"turned_{i}"], [f"weight_{i}"], to=compute),
            helper.make_node("MatMul", [f"x{i}", f"weight_{i}"], [f"x{i + 1}"]),
        ]
    nodes.append(helper.make_node("Cast", ["x2"], ["product"], to=TensorProto.FLOAT))
    spec = _write(tmp_path / "half.onnx", nodes, up=up, down=down)
    found = open_engine("openvino", spec, "fp32")(**draw())["noise_pred"]
    wanted = draw()["sample"] @ up.T.astype(np.float32) @ down.T.astype(np.float32) + np.cos(2)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-2)
    [path] = engines()
    assert path.stat().st_size < 1.2 * (up.nbytes + down.nbytes)


def test_nobody_is_told_that_openvino_was_imported(tmp_path: Path) -> None:
    """Its own import keeps an id in the home folder and sends a line to its makers, from a thread."""
    pytest.importorskip("openvino_telemetry")
    code = (
        "import sys, threading; import std_rt.engines.openvino.engine as engine; "
        "assert engine.ov.Core().available_devices; assert 'openvino_telemetry' not in sys.modules; "
        "print(threading.active_count()); import openvino_telemetry"  # still there for others
    )
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "LOCALAPPDATA": str(tmp_path)}
    # Where it believes to be in a CI it is quiet by itself.
    quiet = {"CI", "TF_BUILD", "JENKINS_URL", "GITHUB_ACTIONS"}
    environment = {k: v for k, v in os.environ.items() if k not in quiet} | home
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1"]
    assert not list(tmp_path.iterdir())
