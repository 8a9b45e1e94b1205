"""N steps of N frames in one call against frames one by one, on engines made of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.numpy_model import KINDS, MODELS, NUMBERS, SIZE, Scene, coefficients, engines

from std_rt.engines.host import HostRunner
from std_rt.engines.program import Program
from std_rt.pipeline.denoise import Guidance
from std_rt.pipeline.program_builder import CONDITIONING, frame_program, graph_shapes
from std_rt.pipeline.stream_program import stream_program, unet_rows

MODES = ("none", "full", "residual")


def guidance_of(mode: str) -> Guidance:
    return Guidance(mode, 1.0 if mode == "none" else 6.0)


def masks(scene: Scene, program: Program) -> dict[str, Any]:
    """What the program takes of the scene's mask."""
    found = {"mask": scene.mask, "image_mask": scene.image_mask}
    return {name: value for name, value in found.items() if name in program.feeds}


def one_by_one(scene: Scene, kind: str, mode: str, model: str) -> tuple[Any, Any]:
    """The frame and its last latents."""
    program = frame_program(MODELS[model], scene.cs, kind, SIZE, guidance_of(mode))
    opened = engines(program)
    runner = HostRunner(opened, program)
    runner.set(**scene.feeds(mode), **masks(scene, program))
    return runner.run(scene.frame), opened["vae_decoder"].calls[0]["latents"]


class Stream:
    """Scenes through the slots, fed by hand from the docstring of `stream_program`."""

    def __init__(self, scenes: list[Scene], kind: str, mode: str, model: str = "plain") -> None:
        self.scenes, self.cs, self.mode = scenes, scenes[0].cs, mode
        self.program = stream_program(MODELS[model], self.cs, kind, SIZE, guidance_of(mode))
        self.opened = engines(self.program)
        self.runner = HostRunner(self.opened, self.program)

    def push(self, k: int) -> Any:
        """Run ``k``, in which scene k - i is in slot i; scenes come round again where there are none left."""
        slots = [self.scenes[(k - i) % len(self.scenes)] for i in range(len(self.cs))]
        rows = unet_rows(len(self.cs), self.mode)
        told = [slots[i].negative if negative else slots[i].positive for i, negative in rows]
        feeds = {name: np.concatenate([one[name] for one in told]) for name in CONDITIONING}
        feeds["noise_0"] = slots[0].noise[0]
        if len(slots[0].noise) > 1:
            feeds["noise_steps"] = np.concatenate(
                [
                    scene.noise[i + 1 if c.noise else 0]
                    for i, (scene, c) in enumerate(zip(slots, self.cs, strict=True))
                ]
            )
        self.runner.set(**feeds, **masks(slots[0], self.program))
        return self.runner.run(slots[0].frame)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS)
def test_every_frame_comes_out_as_it_does_on_its_own(
    kind: str, gamma: float, mode: str, steps: int, model: str
) -> None:
    """To the last bit: the same operations in the same order, on engines that treat every row alike."""
    cs = coefficients(steps, gamma)
    scenes = [Scene(cs, seed) for seed in range(4)]
    stream = Stream(scenes, kind, mode, model)
    found = [stream.push(k) for k in range(len(scenes) + steps - 1)][steps - 1 :]
    latents = [call["latents"] for call in stream.opened["vae_decoder"].calls][steps - 1 :]
    assert len({x.tobytes() for x in latents}) == len(scenes)
    for scene, frame, x in zip(scenes, found, latents, strict=True):
        expected, expected_x = one_by_one(scene, kind, mode, model)
        np.testing.assert_array_equal(x, expected_x)
        np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_one_call_of_the_unet_at_the_timesteps_of_its_slots(mode: str) -> None:
    stream = Stream([Scene(coefficients(4), seed) for seed in range(3)], "epsilon", mode)
    stream.push(0)
    (call,) = stream.opened["unet"].calls
    assert [int(t) for t in call["timestep"]] == {
        "none": [739, 559, 379, 199],
        "full": [739, 559, 379, 199] * 2,
        "residual": [739, 559, 379, 199, 739],
    }[mode]
    assert (
        unet_rows(4, mode)
        == {
            "none": [(0, False), (1, False), (2, False), (3, False)],
            "full": [(i, True) for i in range(4)] + [(i, False) for i in range(4)],
            "residual": [(0, True), (1, False), (2, False), (3, False), (0, False)],
        }[mode]
    )


@pytest.mark.parametrize("mode", MODES)
def test_while_it_fills_the_other_slots_hold_zeros(mode: str) -> None:
    stream = Stream([Scene(coefficients(4), seed) for seed in range(2)], "epsilon", mode)
    stream.push(0)
    sample = stream.opened["unet"].calls[0]["sample"]
    assert [bool(row.any()) for row in sample] == [i == 0 for i, _ in unet_rows(4, mode)]


def test_what_is_carried_is_what_must_be_and_one_step_carries_nothing() -> None:
    def program(mode: str, steps: int) -> Any:
        return stream_program(NUMBERS, coefficients(steps), "epsilon", SIZE, guidance_of(mode))

    assert program("none", 4).carried == program("full", 4).carried == {"waiting"}
    assert program("residual", 4).carried == {"waiting", "gaps"}
    assert program("none", 4).buffers["waiting"][0] == (3, 3, 2, 3)
    for mode in MODES:
        assert not program(mode, 1).carried


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_feeds_and_shapes_say_what_to_set_and_what_to_open(mode: str, gamma: float) -> None:
    program = stream_program(NUMBERS, coefficients(4, gamma), "epsilon", SIZE, guidance_of(mode))
    noises = {"noise_0", "noise_steps"} if gamma else {"noise_0"}
    assert set(program.feeds) == {*noises, *CONDITIONING}
    shapes = graph_shapes(program)
    rows = {"none": 4, "full": 8, "residual": 5}[mode]
    assert {shape[0] for shape in shapes["unet"].values()} == {rows}
    # The same autoencoder as for frames one by one, so that both can share its engines.
    alone = graph_shapes(frame_program(NUMBERS, coefficients(4), "epsilon", SIZE))
    assert {name: shapes[name] for name in alone if name != "unet"} == {
        name: shape for name, shape in alone.items() if name != "unet"
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 4])
def test_no_launch_is_for_nothing_and_nothing_is_written_twice(mode: str, steps: int) -> None:
    program = stream_program(NUMBERS, coefficients(steps, 0.3), "sample", SIZE, guidance_of(mode))
    written = [buffer for launch in program.launches for buffer in launch.outputs.values()]
    assert len(written) == len(set(written))
    used = {buffer for launch in program.launches for buffer in launch.inputs.values()} | {"styled"}
    # The gap of the frame that is done leaves with it.
    spent = {"spent"} if mode == "residual" and steps > 1 else set()
    assert set(program.buffers) == used | spent
