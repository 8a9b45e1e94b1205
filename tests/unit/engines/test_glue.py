"""The ONNX files between graphs: as their maker makes them, and equal to the NumPy functions."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from std_rt.core.errors import BackendError
from std_rt.engines import GraphSpec, open_engine
from std_rt.engines.glue import GLUE, glue_folder, glue_path

Arrays = dict[str, np.ndarray]
C, H, W = 4, 8, 16


def inputs_of(op: str, batch: int) -> Arrays:
    """Random inputs; images reach past [-1, 1], where clipping begins."""
    rng = np.random.default_rng(7)
    shapes = {
        "frame": (batch, H, W, 3),
        "image": (batch, 3, H, W),
        "x": ({"halves": 2 * batch, "split_last": batch + 1}.get(op, batch), C, H, W),
        "y": (batch + 2 if op == "join" else batch, C, H, W),
        "z": (batch, C, H, W),
        **dict.fromkeys("abc", (batch, 1, 1, 1)),
        "mask": (batch, 1, H, W),
    }
    made = {port: rng.normal(0, 0.8, shapes[port]).astype(np.float32) for port in GLUE[op].inputs}
    if "frame" in made:
        made["frame"] = rng.integers(0, 256, shapes["frame"], np.uint8)
    return made


def results_of(op: str, inputs: Arrays) -> Arrays:
    """What the NumPy function gives."""
    batch = len(next(iter(inputs.values())))
    shapes = {
        "image": (batch, 3, H, W),
        "frame": (batch, H, W, 3),
        "out": ({"double": 2 * batch, "join": 2 * batch + 2}.get(op, batch), C, H, W),
        **dict.fromkeys(("first", "second"), (batch // 2, C, H, W)),
        "rest": (batch - 1, C, H, W),
        "last": (1, C, H, W),
    }
    kinds = {"frame": np.uint8}
    out = {port: np.empty(shapes[port], kinds.get(port, np.float32)) for port in GLUE[op].outputs}
    GLUE[op].run(**inputs, **out)
    return out


@pytest.mark.parametrize("op", GLUE)
def test_inputs_and_outputs_together_are_the_ports_of_the_function(op: str) -> None:
    glue = GLUE[op]
    assert [*glue.inputs, *glue.outputs] == list(inspect.signature(glue.run).parameters)


def test_there_is_one_file_for_each_operation_and_no_other() -> None:
    assert {path.stem for path in glue_folder().iterdir()} == set(GLUE)
    with pytest.raises(BackendError, match=r"no graph for the operation 'blur' \(known: frame_in"):
        glue_path("blur")


def test_the_files_are_those_that_the_maker_makes() -> None:
    pytest.importorskip("onnx")
    from tools.make_glue import make_glue

    assert {op: glue_path(op).read_bytes() for op in GLUE} == make_glue()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("op", GLUE)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_graph_gives_what_numpy_gives(backend: str, op: str, batch: int) -> None:
    pytest.importorskip(backend)
    inputs = inputs_of(op, batch)
    spec = GraphSpec(op, glue_path(op), {port: value.shape for port, value in inputs.items()}, key="")
    engine = open_engine(backend, spec, "fp32")
    wanted = results_of(op, inputs)
    assert engine.outputs == {port: (value.shape, value.dtype) for port, value in wanted.items()}
    found = engine(**inputs)
    for port, value in wanted.items():
        np.testing.assert_allclose(found[port], value, atol=1e-6, rtol=0, err_msg=port)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_frame_survives_the_way_to_an_image_and_back(backend: str) -> None:
    """All 256 values: rounding up and down by half a level would each lose some."""
    pytest.importorskip(backend)
    frame = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    there = GraphSpec("in", glue_path("frame_in"), {"frame": frame.shape}, key="")
    back = GraphSpec("out", glue_path("frame_out"), {"image": (1, 3, 16, 16)}, key="")
    image = open_engine(backend, there, "fp32")(frame=frame)["image"].copy()
    assert (image.min(), image.max()) == pytest.approx((-1, 1), abs=1e-6)
    step = np.float32(1 / 127.5)
    leave = open_engine(backend, back, "fp32")
    for moved in (-0.49, 0, 0.49):
        out = leave(image=image + np.float32(moved) * step)["frame"]
        assert np.array_equal(out, frame), moved


@pytest.mark.parametrize("op", GLUE)
def test_tensorrt_takes_them(op: str) -> None:
    """Parsed strongly typed by TensorRT-RTX, which needs no GPU for that; TensorRT's parser is the same."""
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse_from_file(str(glue_path(op))), [str(parser.get_error(i)) for i in range(9)]
    assert [network.get_input(i).name for i in range(network.num_inputs)] == list(GLUE[op].inputs)
    assert [network.get_output(i).name for i in range(network.num_outputs)] == list(GLUE[op].outputs)


def test_every_value_survives_the_conversion_to_an_image_and_back() -> None:
    frame = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    image, back = np.empty((1, 3, 16, 16), np.float32), np.empty_like(frame)
    GLUE["frame_in"].run(frame=frame, image=image)
    assert image.min() == -1
    assert image.max() == pytest.approx(1)
    GLUE["frame_out"].run(image=image, frame=back)
    np.testing.assert_array_equal(back, frame)


def test_values_outside_the_range_are_clipped() -> None:
    image = np.array([-9.0, -1.0, 1.0, 9.0], np.float32).reshape(1, 1, 2, 2).repeat(3, 1)
    frame = np.empty((1, 2, 2, 3), np.uint8)
    GLUE["frame_out"].run(image=image, frame=frame)
    np.testing.assert_array_equal(frame[0, ..., 0], [[0, 0], [255, 255]])


def test_channels_and_rows_keep_their_place() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 3), np.uint8)
    image = np.empty((1, 3, 8, 12), np.float32)
    GLUE["frame_in"].run(frame=frame, image=image)
    assert image[0, 2, 5, 11] == pytest.approx(frame[0, 5, 11, 2] / 127.5 - 1)
