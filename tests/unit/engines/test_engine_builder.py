"""Building with the real TensorRT-RTX, which needs no GPU: parse, build for two GPUs, cache, refuse.

The code is TensorRT's too, so what only that one does (timings of kernels) is run with this module as well.
Running an engine needs a GPU; test_gpu_runner.py runs that code on a GPU made of NumPy.
"""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx")

import tensorrt_rtx as trt

from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import BackendError
from std_rt.core.schedule import NoiseSchedule, trajectory_timesteps
from std_rt.engines.cache import EngineCache
from std_rt.engines.glue import GLUE, glue_path, glue_spec
from std_rt.engines.gpu.driver import driver_problem
from std_rt.engines.program import launch_specs
from std_rt.engines.protocol import GraphSpec
from std_rt.engines.tensorrt.engine_builder import EngineBuilder, progress_to
from std_rt.engines.tensorrt.gpu_runner import RTX_BACKEND
from std_rt.engines.tensorrt.onnx_to_engine import (
    RTX,
    TENSORRT,
    Phases,
    Product,
    build_engine,
    load_product,
)
from std_rt.pipeline.denoise import Guidance
from std_rt.pipeline.program_builder import FrameNumbers, frame_program, graph_shapes
from std_rt.pipeline.stream_program import stream_program

TARGETS = ("sm89", "sm120")
# What TensorRT's path does and TensorRT-RTX's does not, on the module that is here.
AS_TENSORRT = Product("tensorrt", "tensorrt_rtx", "TensorRT", (1, 2), ahead=False)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STD_RT_DATA", str(tmp_path / "data"))


@pytest.fixture
def cache() -> EngineCache:
    opened = EngineCache.open()
    assert opened is not None
    return opened


@pytest.fixture
def builder(cache: EngineCache) -> EngineBuilder:
    return EngineBuilder(trt, RTX, TARGETS, cache=cache)


@pytest.fixture
def decoder() -> GraphSpec:
    """The built-in model's decoder at 64 px: 2 MB of weights in a file beside the graph."""
    bundle = load_bundle()
    shape = (1, bundle.latent_channels, 8, 8)
    return GraphSpec("vae_decoder", bundle.graph_path("vae_decoder"), {"latents": shape}, bundle.digest)


@pytest.fixture
def encoder(handmade: Bundle) -> GraphSpec:
    """A graph of one node."""
    path = handmade.graph_path("vae_encoder")
    return GraphSpec("vae_encoder", path, {"image": (1, 3, 32, 32)}, handmade.digest)


def _data(builder: EngineBuilder, spec: GraphSpec) -> bytes:
    with builder.data(spec) as data:
        return data[:]


def test_a_graph_with_weights_beside_it_is_built_for_two_gpus_once(
    builder: EngineBuilder, decoder: GraphSpec, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _data(builder, decoder)
    weights = decoder.path.with_suffix(".safetensors").stat().st_size
    assert len(data) > weights  # they are inside
    [entry] = cache.entries()
    assert (entry.key.graph, entry.key.target, entry.key.version) == (
        "vae_decoder",
        "sm89+sm120",
        trt.__version__,
    )
    assert entry.key.shapes == decoder.shapes
    assert entry.key.driver == ""
    assert Path(entry.origin) == decoder.path.parent.resolve()
    before = (cache.folder / "manifest.json").read_bytes()
    hashed = []
    load = EngineCache._load
    with monkeypatch.context() as patch:
        patch.setattr(EngineCache, "_load", lambda self, *given: hashed.append(given) or load(self, *given))
        assert _data(builder, decoder) == data
    assert len(hashed) == 1  # an engine has gigabytes
    assert (cache.folder / "manifest.json").read_bytes() == before
    for target in TARGETS:
        assert EngineBuilder(trt, RTX, (target,), cache=cache).find(decoder) is not None
    assert EngineBuilder(trt, RTX, ("sm86",), cache=cache).find(decoder) is None


def test_a_tampered_engine_is_refused_and_comes_back_after_gc(
    builder: EngineBuilder, encoder: GraphSpec, cache: EngineCache
) -> None:
    path = builder.ensure(encoder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for ask in (partial(_data, builder), builder.find, builder.ensure):
        with pytest.raises(
            BackendError, match=r"tensorrt_rtx engine of 'vae_encoder' is not used.*engines gc"
        ):
            ask(encoder)
    cache.gc()
    assert builder.ensure(encoder).read_bytes() != bytes(data)


def test_another_bundle_shape_option_or_file_is_another_engine(
    builder: EngineBuilder, encoder: GraphSpec, cache: EngineCache, tmp_path: Path
) -> None:
    known = builder.key(encoder).digest
    others = [
        builder.key(replace(encoder, key="another bundle")),
        builder.key(replace(encoder, shapes={"image": (2, 3, 32, 32)})),
        EngineBuilder(trt, RTX, TARGETS, cache=cache, tf32=False).key(encoder),
        EngineBuilder(trt, RTX, ("sm89",), cache=cache).key(encoder),
        builder.key(replace(encoder, key="")),
    ]
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(encoder.path.read_bytes() + b"\x00")
    others.append(builder.key(replace(encoder, key="", path=changed)))
    assert len({known, *(key.digest for key in others)}) == 1 + len(others)


@pytest.mark.parametrize("op", GLUE)
def test_every_operation_between_graphs_is_built(builder: EngineBuilder, op: str) -> None:
    shapes = {"frame": (1, 16, 24, 3), "image": (1, 3, 16, 24)}
    shapes |= dict.fromkeys(("x", "y", "z"), (2, 4, 2, 3)) | dict.fromkeys(("a", "b", "c"), (2, 1, 1, 1))
    shapes["mask"] = (1, 1, 2, 3)
    spec = glue_spec(op, {port: shapes[port] for port in GLUE[op].inputs})
    assert spec.path == glue_path(op)
    assert _data(builder, spec)


@pytest.mark.parametrize("mode", ["none", "full", "residual"])
@pytest.mark.parametrize("stream", [False, True])
def test_every_launch_of_a_frame_has_an_engine_with_its_ports(
    builder: EngineBuilder, handmade: Bundle, mode: str, stream: bool
) -> None:
    conditioning = {
        "encoder_hidden_states": (3, 5),
        "text_embeds": (6,),
        "time_ids": (6,),
        "style_tokens": (2, 4),
        "style_strength": (),
    }
    steps = NoiseSchedule.scaled_linear().coefficients(trajectory_timesteps(0.5, 2), 0.3)
    guidance = Guidance(mode, 1.0 if mode == "none" else 4.0)
    make = stream_program if stream else frame_program
    program = make(FrameNumbers(8, 3, conditioning), steps, "epsilon", (16, 24), guidance)
    specs = {
        name: GraphSpec(name, handmade.graph_path(name), shapes, handmade.digest)
        for name, shapes in graph_shapes(program).items()
    }
    wanted = launch_specs(program, specs)
    assert len(wanted) == len(program.launches)
    for spec in wanted:
        builder.ensure(spec)
    assert builder.cache is not None
    assert len(builder.cache.entries()) == len({id(spec) for spec in wanted}) <= len(wanted)
    [batch] = {spec.shapes["sample"][0] for spec in wanted if spec.name == "unet"}
    alone = {"none": 1, "full": 2, "residual": 1}
    assert batch == ({"none": 2, "full": 4, "residual": 3} if stream else alone)[mode]


def test_progress_rises_to_the_end_and_is_heard_by_whoever_listens(
    encoder: GraphSpec, cache: EngineCache
) -> None:
    heard: list[tuple[str, float]] = []
    with progress_to(lambda name, share: heard.append((name, share))):
        EngineBuilder(trt, RTX, TARGETS, cache=cache).ensure(encoder)
    assert {name for name, _ in heard} == {"vae_encoder"}
    shares = [share for _, share in heard]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    heard.clear()
    EngineBuilder(trt, RTX, ("sm89",), cache=cache).ensure(encoder)
    assert heard == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_a_build_stopped_from_its_progress_leaves_nothing(
    decoder: GraphSpec, cache: EngineCache, stop: type[BaseException]
) -> None:
    def progress(name: str, share: float) -> None:
        if share > 0.1:
            raise stop

    with pytest.raises(stop):
        EngineBuilder(trt, RTX, TARGETS, cache=cache, progress=progress).ensure(decoder)
    assert cache.entries() == []
    assert [path for path in cache.folder.iterdir() if path.is_file()] == []


def test_phases_inside_phases_make_one_share_that_never_falls() -> None:
    phases = Phases()
    assert phases.start("all", 2) == 0
    assert phases.start("first", 4) == 0
    assert phases.step("first", 0) == pytest.approx(1 / 8)
    assert phases.finish("first") == pytest.approx(1 / 8)
    assert phases.step("all", 0) == pytest.approx(1 / 2)
    phases.start("second", 2)
    phases.step("second", 0)
    assert phases.start("second", 2) == pytest.approx(3 / 4)  # the same name inside itself
    assert phases.step("unknown", 3) == pytest.approx(3 / 4)
    assert phases.step("all", 1) == 1
    assert phases.finish("all") == 1


@pytest.mark.parametrize(
    "location", ["../weights.bin", "/etc/passwd", "a/../../b", "C:\\weights", "\\\\host\\share", "..\\b", ""]
)
def test_weights_from_outside_the_folder_are_refused_before_parsing(
    location: str, tmp_path: Path, builder: EngineBuilder
) -> None:
    path = _graph(tmp_path, _external("w", location))
    with pytest.raises(BackendError, match=r"reads weights from .*, outside its folder; do not use it"):
        builder.ensure(GraphSpec("unet", path, {"x": (4,)}, "b1"))


def test_a_file_that_is_no_graph_is_one_line(builder: EngineBuilder, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    for data in (b"", b"\xff" * 9, b"not onnx"):
        path.write_bytes(data)
        with pytest.raises(BackendError, match=r"'unet'") as caught:
            builder.ensure(GraphSpec("unet", path, {"x": (4,)}, "b1"))
        assert "\n" not in str(caught.value)


def test_mixed_types_are_refused_with_the_node(builder: EngineBuilder, tmp_path: Path) -> None:
    """The trap of SDXL's time embedding: half and single precision in one Concat."""
    onnx = pytest.importorskip("onnx")
    half = onnx.numpy_helper.from_array(np.ones(4, np.float16), "w")
    path = _graph(tmp_path, half, "Concat", axis=0)
    with pytest.raises(
        BackendError, match=r"TensorRT-RTX cannot build graph 'unet' at x \[4\]: .*; try"
    ) as caught:
        builder.ensure(GraphSpec("unet", path, {"x": (4,)}, "b1"))
    assert "\n" not in str(caught.value)


def test_wrong_shapes_and_names_are_one_line(builder: EngineBuilder, decoder: GraphSpec) -> None:
    with pytest.raises(BackendError, match="takes latents; shapes were given for image"):
        builder.ensure(replace(decoder, shapes={"image": (1, 8, 8, 8)}))
    with pytest.raises(BackendError, match=r"cannot build graph 'vae_decoder' at latents \[1, 7, 8, 8\]"):
        builder.ensure(replace(decoder, shapes={"latents": (1, 7, 8, 8)}))


def test_a_gpu_that_the_product_has_no_code_for_is_refused(cache: EngineCache) -> None:
    for target in ("sm90", "sm1", "current", "none", ""):
        with pytest.raises(BackendError, match=rf"no code for {target}, only for .*sm89"):
            EngineBuilder(trt, RTX, (target,), cache=cache)


def test_without_a_store_engines_are_made_every_time_and_left_nowhere(encoder: GraphSpec) -> None:
    builder = EngineBuilder(trt, RTX, TARGETS)
    assert _data(builder, encoder) == _data(builder, encoder)
    assert builder.find(encoder) is None
    with pytest.raises(BackendError, match="STD_RT_CACHE"):
        builder.ensure(encoder)


def test_a_full_disk_while_the_engine_is_written_is_one_line(
    builder: EngineBuilder, encoder: GraphSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, *how, **more: Full() if ".part" in self.name else opened(self, *how, **more),
    )
    with pytest.raises(BackendError, match="the disk is full"):
        builder.ensure(encoder)


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_timings_are_learned_and_given_to_the_next_build(
    encoder: GraphSpec, tmp_path: Path, cache: EngineCache
) -> None:
    """TensorRT's path; for named GPUs, as there is none here to take timings on."""
    out = tmp_path / "engine"
    learned = build_engine(trt, AS_TENSORRT, encoder, out, targets=TARGETS, timings=b"")
    assert learned
    again = build_engine(trt, AS_TENSORRT, encoder, out, targets=TARGETS, timings=learned)
    assert again
    assert out.stat().st_size


def test_engines_of_tensorrt_are_bound_to_the_driver_and_those_of_rtx_are_not(encoder: GraphSpec) -> None:
    both = [
        EngineBuilder(trt, p, ("sm89",), driver="cuda 13.0").key(encoder).driver for p in (AS_TENSORRT, RTX)
    ]
    assert both == ["cuda 13.0", ""]


def test_tf32_can_be_turned_off(encoder: GraphSpec, tmp_path: Path) -> None:
    build_engine(trt, RTX, encoder, tmp_path / "engine", targets=TARGETS, tf32=False)
    assert (tmp_path / "engine").stat().st_size


def test_a_product_that_is_missing_or_too_old_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        BackendError, match=r"TensorRT-RTX 1\.\S+ is too old, 99\.0 is needed; run: pip install"
    ):
        load_product(replace(RTX, oldest=(99, 0)))
    with pytest.raises(BackendError, match=r"TensorRT is not installed; run: pip install -e '\.\["):
        load_product(replace(TENSORRT, module="no_such_module"))


def test_without_a_driver_a_frame_is_refused_before_the_runtime_is_touched(decoder: GraphSpec) -> None:
    if not driver_problem():
        pytest.skip("there is a GPU here")
    with pytest.raises(BackendError, match=r"no GPU can be used: .*; use --backend openvino"):
        RTX_BACKEND.open_graph(decoder, "auto")
    assert RTX_BACKEND.devices() == driver_problem()


def test_a_moved_bundle_keeps_its_engines(builder: EngineBuilder, decoder: GraphSpec, tmp_path: Path) -> None:
    path = builder.ensure(decoder)
    moved = tmp_path / "moved"
    shutil.copytree(decoder.path.parent, moved)
    assert builder.ensure(replace(decoder, path=moved / decoder.path.name)) == path


def _external(name: str, location: str) -> Any:
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name=name, dims=[4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def _graph(folder: Path, weights: Any, kind: str = "Add", **attributes: int) -> Path:
    """``kind(x, weights)``."""
    from onnx import TensorProto, helper

    node = helper.make_node(kind, ["x", weights.name], ["y"], **attributes)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    ends[0] = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_engines_are_built_so_that_they_can_be_captured(
    builder: EngineBuilder, encoder: GraphSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX then refuses what would allocate while it runs, which no CUDA graph allows."""
    flags = []
    set_flag = trt.IBuilderConfig.set_flag
    monkeypatch.setattr(
        trt.IBuilderConfig, "set_flag", lambda self, flag: (flags.append(flag), set_flag(self, flag))[1]
    )
    builder.ensure(encoder)
    assert trt.BuilderFlag.REQUIRE_USER_ALLOCATION in flags
    assert "user allocation" in builder.key(encoder).flags  # engines of before are built again
