"""Every backend on a graph whose result NumPy knows, with parts that depend on steady inputs only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from std_rt.core.bundle import load_bundle
from std_rt.core.errors import BackendError
from std_rt.engines import GraphSpec, backends, open_engine
from std_rt.engines.protocol import Engine

Arrays = dict[str, np.ndarray]
NAMES = [info.name for info in backends() if info.available]
SHAPES = {
    "sample": ("batch", 3, "height", "width"),
    "timestep": ("batch",),
    "style_tokens": ("batch", 2, 3),
    "style_strength": ("batch",),
}


def wanted(
    sample: np.ndarray, timestep: np.ndarray, style_tokens: np.ndarray, style_strength: np.ndarray
) -> np.ndarray:
    """What the graph computes."""
    level = np.sin(timestep) + style_tokens.mean((1, 2)) * style_strength
    return sample * level[:, None, None, None] + sample


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of `wanted`."""
    ports = [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in SHAPES.items()]
    out = helper.make_tensor_value_info("noise_pred", TensorProto.FLOAT, SHAPES["sample"])
    nodes = [
        helper.make_node("Sin", ["timestep"], ["wave"]),
        helper.make_node("ReduceMean", ["style_tokens", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "style_strength"], ["styled"]),
        helper.make_node("Add", ["wave", "styled"], ["sum"]),
        # A shape read from the picture must not tie the steady part to it.
        helper.make_node("Shape", ["sample"], ["batch_size"], start=0, end=1),
        helper.make_node("Concat", ["batch_size", "ones"], ["column"], axis=0),
        helper.make_node("Reshape", ["sum", "column"], ["level"]),
        helper.make_node("Mul", ["sample", "level"], ["scaled"]),
        helper.make_node("Add", ["scaled", "sample"], ["noise_pred"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([1, 2]), "axes"),
        numpy_helper.from_array(np.array([1, 1, 1]), "ones"),
    ]
    made = helper.make_graph(nodes, "g", ports, [out], constants)
    path = tmp_path_factory.mktemp("graph") / "unet.onnx"
    path.write_bytes(
        helper.make_model(
            made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
        ).SerializeToString()
    )
    return path


@pytest.fixture
def make_spec(graph: Path) -> Callable[..., GraphSpec]:
    """``make_spec(batch, height, width)``."""

    def make(batch: int = 1, height: int = 4, width: int = 6) -> GraphSpec:
        sizes = {"batch": batch, "height": height, "width": width}
        shapes = {k: tuple(sizes[a] if isinstance(a, str) else a for a in v) for k, v in SHAPES.items()}
        return GraphSpec("unet", graph, shapes, key="testing")

    return make


def draw(spec: GraphSpec, seed: int = 0) -> Arrays:
    """Random inputs."""
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in spec.shapes.items()}


def agrees(engine: Engine, inputs: Arrays, atol: float = 1e-5) -> bool:
    """Engine and NumPy give the same."""
    return np.allclose(engine(**inputs)["noise_pred"], wanted(**inputs), atol=atol)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 4, 6), (2, 8, 8)])
def test_one_graph_runs_at_every_size(name: str, size: tuple[int, int, int], make_spec: Callable) -> None:
    spec = make_spec(*size)
    engine = open_engine(name, spec, "fp32")
    assert engine.inputs == {key: (shape, np.dtype(np.float32)) for key, shape in spec.shapes.items()}
    assert engine.outputs == {"noise_pred": ((size[0], 3, *size[1:]), np.dtype(np.float32))}
    assert engine.precision == "fp32"
    assert agrees(engine, draw(spec))


@pytest.mark.parametrize("name", NAMES)
def test_every_change_of_an_input_is_seen(name: str, make_spec: Callable) -> None:
    """What is kept for steady inputs must not outlive their values, not even when changed in place."""
    spec = make_spec()
    engine = open_engine(name, spec, "fp32")
    inputs = draw(spec)
    assert agrees(engine, inputs)
    for key in inputs:
        before = engine(**inputs)["noise_pred"].copy()
        inputs[key] += 0.5
        assert not np.allclose(engine(**inputs)["noise_pred"], before), key
        assert agrees(engine, inputs), key


def test_openvino_keeps_several_steps_and_forgets_the_oldest(
    make_spec: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from std_rt.engines.openvino import engine as openvino

    monkeypatch.setattr(openvino, "_KEEP_BYTES", 3 * 4)  # three results of one float32
    spec = make_spec()
    engine = open_engine("openvino", spec, "fp32")
    runs = []
    original = engine._prepared._run
    engine._prepared._run = lambda inputs: runs.append(1) or original(inputs)
    inputs = draw(spec)
    for timestep in (1, 2, 3, 1, 2, 3):
        inputs["timestep"] = np.array([timestep], np.float32)
        assert agrees(engine, inputs)
    assert len(runs) == 3
    for timestep in (4, 3, 2, 1):
        inputs["timestep"] = np.array([timestep], np.float32)
        assert agrees(engine, inputs)
    assert len(runs) == 5  # 4 pushed out 1, which is computed again


def test_openvino_gives_the_same_with_and_without_a_steady_part(make_spec: Callable) -> None:
    spec = make_spec(2)
    whole = open_engine("openvino", replace(spec, steady=frozenset()), "fp32")
    parts = open_engine("openvino", spec, "fp32")
    assert (whole._prepared, parts._prepared is None) == (None, False)
    np.testing.assert_allclose(
        whole(**draw(spec))["noise_pred"], parts(**draw(spec))["noise_pred"], atol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_arrays_in_any_memory_order_are_taken(name: str, make_spec: Callable) -> None:
    spec = make_spec()
    inputs = draw(spec)
    inputs["sample"] = np.asfortranarray(inputs["sample"])
    inputs["style_tokens"] = np.repeat(inputs["style_tokens"], 2, axis=2)[:, :, ::2]
    assert agrees(open_engine(name, spec, "fp32"), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs_are_named(name: str, make_spec: Callable) -> None:
    spec = make_spec()
    engine = open_engine(name, spec, "fp32")
    inputs = draw(spec)
    with pytest.raises(BackendError, match="takes sample, timestep"):
        engine(sample=inputs["sample"])
    with pytest.raises(BackendError, match=r"takes sample as float32 \[1, 3, 4, 6\]"):
        engine(**{**inputs, "sample": np.zeros((1, 3, 6, 4), np.float32)})


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_engine_says_so(name: str, make_spec: Callable) -> None:
    engine = open_engine(name, make_spec(), "fp32")
    engine.close()
    with pytest.raises(BackendError, match="was closed"):
        engine(**draw(make_spec()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [b"", b"not onnx"])
def test_a_broken_graph_is_one_line(name: str, content: bytes, make_spec: Callable, tmp_path: Path) -> None:
    path = tmp_path / "unet.onnx"
    path.write_bytes(content)
    with pytest.raises(BackendError, match="cannot run graph 'unet'") as caught:
        open_engine(name, replace(make_spec(), path=path, key=""))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_for_other_inputs_are_refused(name: str, make_spec: Callable) -> None:
    with pytest.raises(BackendError, match=r"shapes were given for sample$"):
        open_engine(name, replace(make_spec(), shapes={"sample": (1, 3, 4, 6)}))


@pytest.mark.parametrize("name", NAMES)
def test_impossible_shapes_are_one_line(name: str, make_spec: Callable) -> None:
    spec = make_spec()
    with pytest.raises(BackendError, match=rf"{name} cannot run graph .unet. at sample") as caught:
        open_engine(name, replace(spec, shapes={**spec.shapes, "style_tokens": (1, 2, 5, 7)}))
    assert "\n" not in str(caught.value)


def test_bf16_is_refused_where_the_hardware_lacks_it(
    make_spec: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from std_rt.engines.openvino import engine as openvino

    with pytest.raises(BackendError, match="--backend openvino"):
        open_engine("onnxruntime", make_spec(), "bf16")
    monkeypatch.setattr(openvino.ov.Core, "get_property", lambda *_: ["FP32"])
    with pytest.raises(BackendError, match="does not compute bf16 in hardware"):
        open_engine("openvino", make_spec(), "bf16")


def _write(path: Path, nodes: list, constants: dict[str, np.ndarray]) -> GraphSpec:
    """A graph of one input x and one output y, [batch, 4], float32."""
    port = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "g", port[:1], port[1:], values)
    opsets = [helper.make_opsetid("", 20)]
    path.write_bytes(helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString())
    return GraphSpec("unet", path, {"x": (2, 4)}, key="")


@pytest.fixture
def half_spec(tmp_path: Path) -> GraphSpec:
    """``y = x / 3`` in fp16, float32 at the border."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["half", "third"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    return replace(_write(tmp_path / "half.onnx", nodes, {"third": np.float16(1 / 3)}), compute="fp16")


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_in_fp16_runs_with_float32_at_its_border(name: str, half_spec: GraphSpec) -> None:
    engine = open_engine(name, half_spec)
    x = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)
    assert engine.outputs == {"y": ((2, 4), np.dtype(np.float32))}
    np.testing.assert_allclose(engine(x=x)["y"], x / 3, rtol=2e-3)


def test_onnxruntime_names_a_graphs_own_precision_and_takes_no_other(half_spec: GraphSpec) -> None:
    assert open_engine("onnxruntime", half_spec).precision == "fp16"
    with pytest.raises(BackendError, match=r"exported in fp16, onnxruntime cannot run it in fp32; use --pre"):
        open_engine("onnxruntime", half_spec, "fp32")
    with pytest.raises(BackendError, match="exported in bf16, which onnxruntime does not compute on a CPU"):
        open_engine("onnxruntime", replace(half_spec, compute="bf16"))


@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_graph_runs(name: str, tmp_path: Path) -> None:
    """u8 activations and s8 weights between QuantizeLinear and DequantizeLinear, as NNCF writes them."""
    weights = np.array([[64, -32, 0, 16], [0, 127, -127, 8], [5, 6, 7, 8], [-1, 1, -1, 1]], np.int8)
    constants = {"w": weights, "s": np.float32(1 / 64), "a": np.float32(1 / 32), "zero": np.uint8(128)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "a", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "a", "zero"], ["x8"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["w8"]),
        helper.make_node("MatMul", ["x8", "w8"], ["y"]),
    ]
    spec = replace(_write(tmp_path / "int8.onnx", nodes, constants), compute="int8")
    x = np.random.default_rng(0).uniform(-3, 3, (2, 4)).astype(np.float32)
    rounded = np.clip(np.rint(x * 32), -128, 127) / 32
    np.testing.assert_allclose(
        open_engine(name, spec)(x=x)["y"], rounded @ (weights / 64), rtol=0.02, atol=0.02
    )


def test_onnxruntime_measures_outputs_without_running_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros through SDXL's UNet are minutes on a CPU."""
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort.InferenceSession, "run", lambda *_: pytest.fail("a graph was run"))
    bundle = load_bundle(None, verify=False)
    shapes = {"vae_encoder": {"image": (1, 3, 64, 96)}}
    given = {port["name"]: port["shape"] for port in bundle.manifest["graphs"]["unet"]["inputs"]}
    sizes = {"batch": 2, "latent_height": 8, "latent_width": 12}
    shapes["unet"] = {k: tuple(sizes.get(axis, axis) for axis in axes) for k, axes in given.items()}
    channels = bundle.latent_channels
    shapes["vae_decoder"] = {"latents": (2, channels, 8, 12)}
    found = {
        name: open_engine("onnxruntime", GraphSpec(name, bundle.graph_path(name), shape, "")).outputs
        for name, shape in shapes.items()
    }
    assert {name: next(iter(outputs.values()))[0] for name, outputs in found.items()} == {
        "vae_encoder": (1, channels, 8, 12),
        "vae_decoder": (2, 3, 64, 96),
        "unet": (2, channels, 8, 12),
    }


def test_onnxruntime_is_told_to_report_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")
    told: list[bool] = []
    package = importlib.import_module("std_rt.engines.onnxruntime")
    monkeypatch.setattr(ort, "disable_telemetry_events", lambda: told.append(True))
    importlib.reload(package)
    assert told == [True]
