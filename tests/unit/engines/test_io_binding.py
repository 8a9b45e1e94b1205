"""A program with its buffers on a device (here: the CPU) gives what the host's runner gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from support.handmade import write_handmade

pytest.importorskip("onnxruntime")

import onnxruntime as ort

from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import BackendError
from std_rt.engines import GraphSpec, open_engine
from std_rt.engines.glue import GLUE
from std_rt.engines.host import HostRunner
from std_rt.engines.onnxruntime import io_binding
from std_rt.engines.onnxruntime.io_binding import OrtRunner
from std_rt.engines.onnxruntime.ort_session import CPU, open_session
from std_rt.engines.program import FRAME, STYLED, Launch, Program, launch_specs
from std_rt.pipeline.denoise import Guidance
from std_rt.pipeline.program_builder import FrameNumbers, frame_program, graph_shapes
from std_rt.pipeline.stream_program import stream_program

SIZE = (32, 48)


@pytest.fixture(scope="module")
def stochastic(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The handmade bundle with noise at every step but the last."""
    pytest.importorskip("onnx")
    return write_handmade(tmp_path_factory.mktemp("bundle") / "handmade", gamma=0.3)


def numbers_of(bundle: Bundle) -> FrameNumbers:
    """What of a bundle decides shapes, as its graphs declare it."""
    ports = {port["name"]: port["shape"][1:] for port in bundle.manifest["graphs"]["unet"]["inputs"]}
    per_frame = ("sample", "timestep", *bundle.unet_inputs)
    conditioning = {k: tuple(v) for k, v in ports.items() if k not in per_frame}
    return FrameNumbers(bundle.vae_scale, bundle.latent_channels, conditioning, bundle.unet_inputs)


def program_of(
    bundle: Bundle, guidance: Guidance | None = None, batch: int = 1, steps: int = 4, *, masked: bool = False
) -> Program:
    """The program of a frame."""
    coefficients = bundle.coefficients(steps)
    return frame_program(numbers_of(bundle), coefficients, "epsilon", SIZE, guidance, batch, masked=masked)


def specs_of(bundle: Bundle, program: Program) -> dict[str, GraphSpec]:
    """What to open."""
    shapes = graph_shapes(program)
    return {name: GraphSpec(name, bundle.graph_path(name), shapes[name], key="") for name in program.graphs}


def on_host(program: Program, specs: dict[str, GraphSpec]) -> HostRunner:
    """The reference, over the same runtime."""
    return HostRunner({name: open_engine("onnxruntime", spec) for name, spec in specs.items()}, program)


def on_device(program: Program, specs: dict[str, GraphSpec]) -> OrtRunner:
    """What is tested."""
    return OrtRunner(program, specs, lambda spec: (open_session(spec, CPU), lambda: None))


def feeds_of(program: Program, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for everything that the host sets."""
    rng = np.random.default_rng(seed)
    shapes = {name: program.buffers[name][0] for name in program.feeds}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def frames_of(program: Program, count: int = 3) -> Iterator[np.ndarray]:
    """Random frames."""
    rng = np.random.default_rng(5)
    return (rng.integers(0, 256, program.buffers[FRAME][0], np.uint8) for _ in range(count))


MODES = [Guidance(), Guidance("full", 3.0), Guidance("residual", 2.0)]


@pytest.mark.parametrize("guidance", MODES, ids=lambda guidance: guidance.mode)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_both_runners_give_the_same_frames(
    stochastic: Bundle, guidance: Guidance, batch: int, masked: bool
) -> None:
    program = program_of(stochastic, guidance, batch, masked=masked)
    specs = specs_of(stochastic, program)
    host, device = on_host(program, specs), on_device(program, specs)
    for runner in (host, device):
        runner.set(**feeds_of(program))
    for frame in frames_of(program):
        wanted, found = host.run(frame), device.run(frame)
        assert wanted.std() > 5  # a picture, not a plain colour
        assert np.abs(wanted.astype(int) - found).max() <= 1  # the graphs may add in another order
        assert (wanted != found).mean() < 0.001


@pytest.mark.parametrize("guidance", MODES, ids=lambda guidance: guidance.mode)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_both_runners_carry_the_same_from_run_to_run(
    stochastic: Bundle, guidance: Guidance, steps: int
) -> None:
    """From the first run on, in which the other slots hold zeros."""
    program = stream_program(
        numbers_of(stochastic), stochastic.coefficients(steps), "epsilon", SIZE, guidance
    )
    specs = specs_of(stochastic, program)
    host, device = on_host(program, specs), on_device(program, specs)
    for runner in (host, device):
        runner.set(**feeds_of(program))
        assert not any(array.any() for array in runner.carried().values())
    found = []
    for frame in frames_of(program, 6):
        wanted, got = host.run(frame), device.run(frame)
        assert np.abs(wanted.astype(int) - got).max() <= 1
        assert (wanted != got).mean() < 0.001
        found.append(got)
        carried = device.carried()
        assert carried.keys() == program.carried
        for name, array in host.carried().items():
            np.testing.assert_allclose(carried[name], array, atol=1e-5)
    assert len({frame.tobytes() for frame in found}) == len(found)


def test_what_is_carried_goes_over_to_another_runner(stochastic: Bundle) -> None:
    program = stream_program(
        numbers_of(stochastic), stochastic.coefficients(4), "epsilon", SIZE, Guidance("residual", 2.0)
    )
    specs = specs_of(stochastic, program)
    first, second, alone = (on_device(program, specs), on_device(program, specs), on_host(program, specs))
    for runner in (first, second, alone):
        runner.set(**feeds_of(program))
    *before, last = frames_of(program, 6)
    for frame in before:
        first.run(frame)
        alone.run(frame)
    second.carry(**first.carried())
    assert np.abs(second.run(last).astype(int) - alone.run(last)).max() <= 1
    with pytest.raises(BackendError, match="no buffer 'noise_0' to set; known: gaps, waiting"):
        second.carry(noise_0=np.zeros(1, np.float32))
    with pytest.raises(BackendError, match=r"'waiting' is float32 \[3, 3, 4, 6\]; got"):
        alone.carry(waiting=np.zeros(1, np.float32))


def test_the_built_in_model_gives_the_same_frames() -> None:
    """Real networks: an exported UNet of many layers, fp16 weights read from their own file."""
    bundle = load_bundle(None, verify=False)
    program = frame_program(numbers_of(bundle), bundle.coefficients(2), bundle.prediction_type, (64, 64))
    specs = specs_of(bundle, program)
    feeds, frame = feeds_of(program), next(frames_of(program))
    found = []
    for runner in (on_host(program, specs), on_device(program, specs)):
        runner.set(**feeds)
        found.append(runner.run(frame).astype(int))
    assert found[0].std() > 10
    assert np.abs(found[0] - found[1]).max() <= 1


def test_every_feed_counts_again_when_it_is_set_again(stochastic: Bundle) -> None:
    program = program_of(stochastic)
    specs = specs_of(stochastic, program)
    host, device = on_host(program, specs), on_device(program, specs)
    feeds, frame = feeds_of(program), next(frames_of(program))
    host.set(**feeds)
    device.set(**feeds)
    for name in (name for name in program.feeds if name.startswith(("noise", "style"))):
        before = device.run(frame)
        changed = {name: feeds[name] + np.float32(0.5)}
        host.set(**changed)
        device.set(**changed)
        assert not np.array_equal(device.run(frame), before), name
        assert np.abs(host.run(frame).astype(int) - device.run(frame)).max() <= 1, name


def test_between_two_frames_only_the_frame_is_copied(
    stochastic: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses stay as they are, and what is set already is not copied again."""
    program = program_of(stochastic, Guidance("full", 3.0))
    device = on_device(program, specs_of(stochastic, program))
    feeds = feeds_of(program)
    device.set(**feeds)
    addresses = {name: value.data_ptr() for name, value in device._values.items()}
    assert len(set(addresses.values())) == len(program.buffers)
    filled = []
    monkeypatch.setattr(OrtRunner, "_fill", lambda self, name, array: filled.append(name))
    for frame in frames_of(program):
        device.set(**feeds)
        device.run(frame)
    assert filled == [FRAME] * 3
    assert {name: value.data_ptr() for name, value in device._values.items()} == addresses


def test_what_nodes_on_the_cpu_read_is_what_a_buffer_holds_now(
    stochastic: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a graph reads an input in other memory than it is in, binding copies it, there and then."""
    program = program_of(stochastic)
    specs = specs_of(stochastic, program)
    elsewhere = lambda value: ort.OrtValue.ortvalue_from_numpy(value.numpy().copy())  # noqa: E731
    allocate, bind = io_binding._allocate, ort.IOBinding.bind_ortvalue_input
    monkeypatch.setattr(io_binding, "_allocate", lambda buffers, *_: allocate(buffers, "cpu", 0))
    monkeypatch.setattr(
        ort.IOBinding,
        "bind_ortvalue_input",
        lambda self, name, value: bind(self, name, elsewhere(value) if name == "sample" else value),
    )
    opener = lambda spec: (open_session(spec, CPU), lambda: None)  # noqa: E731
    device, host = OrtRunner(program, specs, opener, device="gpu"), on_host(program, specs)
    for seed, frame in enumerate(frames_of(program)):
        for runner in (host, device):
            runner.set(**feeds_of(program, seed))
        assert np.abs(host.run(frame).astype(int) - device.run(frame)).max() <= 1


def test_the_addresses_of_a_cuda_graph_stay(stochastic: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    program, bound = program_of(stochastic), []
    allocate, bind = io_binding._allocate, ort.IOBinding.bind_ortvalue_input
    monkeypatch.setattr(io_binding, "_allocate", lambda buffers, *_: allocate(buffers, "cpu", 0))
    monkeypatch.setattr(
        ort.IOBinding, "bind_ortvalue_input", lambda *given: bound.append(given[1]) or bind(*given)
    )
    captured = {"CUDAExecutionProvider": {"enable_cuda_graph": "1"}}
    monkeypatch.setattr(ort.InferenceSession, "get_provider_options", lambda self: captured)
    opener = lambda spec: (open_session(spec, CPU), lambda: None)  # noqa: E731
    device = OrtRunner(program, specs_of(stochastic, program), opener, device="gpu")
    device.set(**feeds_of(program))
    before = list(bound)
    for frame in frames_of(program):
        device.run(frame)
    assert bound == before != []


def test_a_frame_that_was_returned_is_the_callers(stochastic: Bundle) -> None:
    program = program_of(stochastic)
    device = on_device(program, specs_of(stochastic, program))
    device.set(**feeds_of(program))
    first, second = frames_of(program, 2)
    kept = device.run(first)
    copy = kept.copy()
    device.run(second)
    assert np.array_equal(kept, copy)


def test_stages_are_marked_in_the_order_of_the_launches(stochastic: Bundle) -> None:
    program = program_of(stochastic)
    device = on_device(program, specs_of(stochastic, program))
    device.set(**feeds_of(program))
    marks: list[str] = []
    device.run(next(frames_of(program)), marks.append)
    assert marks == [launch.stage for launch in program.launches]


def test_each_launch_may_have_its_own_run_options(stochastic: Bundle) -> None:
    """A session's CUDA graphs are told apart by a number in them, one for each set of addresses."""
    program = program_of(stochastic)
    asked = []

    def options(index: int, launch: Launch) -> ort.RunOptions:
        asked.append((index, launch.graph))
        return ort.RunOptions()

    runner = OrtRunner(
        program,
        specs_of(stochastic, program),
        lambda spec: (open_session(spec, CPU), lambda: None),
        options=options,
    )
    assert asked == [(i, launch.graph) for i, launch in enumerate(program.launches)]
    assert len({id(call.options) for call in runner._calls}) == len(program.launches)
    assert len({id(call.session) for call in runner._calls if call.spec.name == "unet"}) == 1


def test_misuse_is_one_line(stochastic: Bundle) -> None:
    program = program_of(stochastic, steps=1)
    device = on_device(program, specs_of(stochastic, program))
    frame = next(frames_of(program))
    feeds = feeds_of(program)
    with pytest.raises(BackendError, match=r"set encoder_hidden_states, .*noise_0 before the first frame"):
        device.run(frame)
    device.set(**feeds)
    with pytest.raises(BackendError, match=r"takes frames uint8 \[1, 32, 48, 3\]; got uint8 \[1, 16"):
        device.run(frame[:, :16])
    with pytest.raises(BackendError, match="no buffer 'noise_7' to set"):
        device.set(noise_7=feeds["noise_0"])
    device.close()
    for use in (lambda: device.run(frame), lambda: device.set(**feeds)):
        with pytest.raises(BackendError, match="was closed"):
            use()


def test_a_graph_with_other_ports_than_the_program_is_refused(stochastic: Bundle) -> None:
    """The graph of another bundle would be bound half, and read what nobody wrote."""
    program = program_of(stochastic, steps=1)
    specs = specs_of(stochastic, program)
    swapped = {**specs, "vae_encoder": replace(specs["vae_encoder"], path=specs["vae_decoder"].path)}
    with pytest.raises(BackendError, match="'vae_encoder' takes latents; shapes were given for image"):
        on_device(program, swapped)
    renamed = replace(program, launches=tuple(_rename(x, "latents", "z") for x in program.launches))
    with pytest.raises(BackendError, match="takes image and returns latents; the program has image and z"):
        on_device(renamed, specs)


def _rename(launch: Launch, port: str, other: str) -> Launch:
    if launch.graph != "vae_encoder":
        return launch
    return replace(launch, outputs={other if p == port else p: b for p, b in launch.outputs.items()})


def test_one_operation_at_two_shapes_is_two_graphs() -> None:
    shapes = {FRAME: (1, 8, 8, 3), "image": (1, 3, 8, 8), "double": (2, 3, 8, 8), "quadruple": (4, 3, 8, 8)}
    dtypes = {FRAME: np.uint8, STYLED: np.uint8}
    shapes |= {"half": (2, 3, 8, 8), "other": (2, 3, 8, 8), "a": (1, 3, 8, 8), "b": (1, 3, 8, 8)}
    shapes |= {STYLED: (1, 8, 8, 3)}
    buffers = {k: (v, np.dtype(dtypes.get(k, np.float32))) for k, v in shapes.items()}
    plan = [
        ("frame_in", [FRAME], ["image"]),
        ("double", ["image"], ["double"]),
        ("double", ["double"], ["quadruple"]),
        ("halves", ["quadruple"], ["half", "other"]),
        ("halves", ["other"], ["a", "b"]),
        ("frame_out", ["b"], [STYLED]),
    ]
    launches = []
    for op, reads, writes in plan:
        takes, gives = GLUE[op].inputs, GLUE[op].outputs
        ins, outs = dict(zip(takes, reads, strict=True)), dict(zip(gives, writes, strict=True))
        launches.append(Launch(op, ins, outs, "convert"))
    program = Program(tuple(launches), buffers)
    assert {x.graph for x in launches} <= set(GLUE)
    wanted = launch_specs(program, {})
    assert wanted[1].name == wanted[2].name == "glue.double"
    assert wanted[1].identity != wanted[2].identity
    frame = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    assert np.array_equal(on_device(program, {}).run(frame), frame)


def test_memory_that_a_device_does_not_have_is_one_line() -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    launch = Launch("frame_in", {"frame": FRAME}, {"image": STYLED}, "convert")
    size = (1, 512, 1024, 3)
    program = Program((launch,), {FRAME: (size, np.dtype(np.uint8)), STYLED: (size, np.dtype(np.float32))})
    with pytest.raises(BackendError, match=r"cannot allocate 8 MB .* on cuda") as caught:
        OrtRunner(program, {}, lambda spec: (open_session(spec, CPU), lambda: None), device="cuda")
    assert "\n" not in str(caught.value)


def test_an_engine_of_onnx_runtime_hands_out_its_own_memory(stochastic: Bundle) -> None:
    """Why the CPU backend runs graph by graph: there is no copy that IO binding could save."""
    path = stochastic.graph_path("vae_encoder")
    engine = open_engine("onnxruntime", GraphSpec("vae_encoder", path, {"image": (1, 3, 32, 32)}, key=""))
    latents = engine(image=np.zeros((1, 3, 32, 32), np.float32))["latents"]
    assert not latents.flags.owndata
