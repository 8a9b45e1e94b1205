"""The first layer that differs: a fault put into one layer of two graphs is found there, and only there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.cli_support import Cli

pytest.importorskip("onnxruntime")

from std_rt.core.errors import ExportError
from std_rt.export import layer_comparison, parity
from std_rt.export.graphs import Example
from std_rt.export.layer_comparison import Side, first_difference

LAYERS = 100
INPUTS = {"x": np.random.default_rng(0).standard_normal((1, 8), np.float32)}


def _chain(path: Path, wrong: int | None = None) -> Path:
    """y = x + 1 + 1 + ...; layer ``wrong`` adds 1.5. The weight is in a file of its own."""
    nodes = [
        helper.make_node(
            "Add", [f"t{i}" if i else "x", "half" if i == wrong else "one"], [f"t{i + 1}"], f"layer{i}"
        )
        for i in range(LAYERS)
    ]
    values = {"one": 1.0, "half": 1.5}
    tensors = [numpy_helper.from_array(np.full(8, v, np.float32), k) for k, v in values.items()]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 8)) for n in ("x", f"t{LAYERS}")]
    graph = helper.make_graph(nodes, "chain", [ports[0]], [ports[1]], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.data", size_threshold=0)
    return path


@pytest.mark.parametrize("wrong", [0, 1, 57, LAYERS - 1])
def test_the_layer_at_fault_is_found(wrong: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_comparison, "_AT_A_TIME", 5)  # several rounds
    good, bad = (_chain(tmp_path / f"{name}.onnx", w) for name, w in (("good", None), ("bad", wrong)))
    found = first_difference(Side(good, "onnxruntime"), Side(bad, "onnxruntime"), INPUTS, 60)
    assert found is not None
    assert (found.layer, found.operator, found.tensor) == (f"layer{wrong}", "Add", f"t{wrong + 1}")
    assert found.before == (f"t{wrong}" if wrong else "")
    assert first_difference(Side(good, "onnxruntime"), Side(good, "onnxruntime"), INPUTS, 60) is None


def test_two_backends_agree_on_the_built_in_model(cli: Cli) -> None:
    pytest.importorskip("openvino")
    done = cli("bundles", "compare", "--graph", "vae_decoder", "--graph", "unet")
    assert (done.code, done.out) == (
        0,
        "vae_decoder: no layer below 60 dB\nunet: no layer below 60 dB\n",
    )
    done = cli("bundles", "compare", "--graph", "vae_decoder", "--floor", "199")
    assert done.code == 1
    assert done.out.startswith("vae_decoder: first differs in ")
    done = cli("bundles", "compare", "--graph", "nothing")
    assert done.code == 2
    assert "use --graph with one of" in done.err


def test_a_failed_gate_names_the_layer_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    good, bad = (_chain(tmp_path / f"{name}.onnx", w) for name, w in (("good", None), ("bad", 7)))
    open_engine = parity.open_engine

    def faulty(backend: str, spec: object, precision: str) -> object:
        from dataclasses import replace

        return open_engine(backend, replace(spec, path=bad) if backend == "openvino" else spec, precision)  # type: ignore[type-var]

    run = layer_comparison._run
    monkeypatch.setattr(parity, "open_engine", faulty)
    monkeypatch.setattr(
        layer_comparison,
        "_run",
        lambda side, *given: run(Side(bad, side.backend) if side.backend == "openvino" else side, *given),
    )
    example = Example(INPUTS, {f"t{LAYERS}": INPUTS["x"] + LAYERS})
    with pytest.raises(
        ExportError, match=r"differs from torch: .*first differs from onnxruntime in Add 'layer7'"
    ) as error:
        parity.check_graph("unet", good, [example], "fp32")
    assert "std-rt bundles compare NAME --backend onnxruntime --against openvino" in str(error.value)
