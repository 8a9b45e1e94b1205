"""A LoRA is exported where it was trained, or not at all: its notes, the flags, and published profiles."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from support.pipelines import write_lora

from std_rt.cli.app import main
from std_rt.core.base_model import unet_digest
from std_rt.core.errors import ExportError
from std_rt.core.schedule import NoiseSchedule
from std_rt.export.build import export_pipeline
from std_rt.export.export_options import ExportOptions
from std_rt.export.lora_fusion import fuse_lora, read_metadata, source_digest
from std_rt.export.profiles import PROFILES
from std_rt.export.sampling_choice import (
    LoraNotes,
    Trajectory,
    choose_trajectory,
    read_notes,
    remarks,
    schedule_section,
)
from std_rt.training.distil.lora import add_lora, lora_parameters, make_notes, save_lora
from std_rt.training.run.recipe import LoraConfig

FILE = Path("ink.safetensors")
SMALL = LoraConfig(rank=2, alpha=2.0)


class ReachedTheWeightsError(Exception):
    """Raised by the progress callback: every check before the slow part has passed."""


def stop(note: str) -> None:
    raise ReachedTheWeightsError(note)


def notes(**changes: str) -> dict[str, str]:
    """Notes as training writes them, of a LoRA for eta 0.75."""
    made = make_notes(
        method="std", eta=0.75, tau=739, run_steps=(2, 4, 6, 8), guidance=(6, 16), base="mini",
        base_digest="", step=1, seed=0,
    )  # fmt: skip
    return made | changes


@pytest.fixture
def options(tmp_path: Path) -> Any:
    """Makes options of a source that has just enough to be looked at."""
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "model_index.json").write_text("{}", encoding="utf-8")
    return lambda **flags: ExportOptions(tmp_path / "mini", tmp_path / "out", **flags)


def chosen(options: ExportOptions, *metadata: dict[str, str]) -> tuple[Trajectory, list[str]]:
    found = [read_notes(Path(f"{i}.safetensors"), entry) for i, entry in enumerate(metadata)]
    trajectory = choose_trajectory(options, found)
    return trajectory, remarks(options, trajectory, found)


@pytest.fixture(scope="module")
def unet(own_source: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(own_source / "unet")


@pytest.fixture(scope="module")
def student(unet: UNet2DConditionModel, own_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA as `std-rt train` writes it, for `own_source`."""
    path = tmp_path_factory.mktemp("student") / "std.safetensors"
    copy = UNet2DConditionModel.from_pretrained(own_source / "unet")
    add_lora(copy, SMALL, 0)
    made = notes(base=own_source.name, base_digest=source_digest(own_source / "unet"))
    save_lora(path, lora_parameters(copy), made, SMALL)
    return path


def test_the_schedule_is_read_from_the_notes(options: Any) -> None:
    trajectory, said = chosen(options(), notes())
    assert (trajectory.eta, trajectory.tau, trajectory.gamma) == (0.75, 739, 0.0)
    assert trajectory.steps == (4, 2, 6, 8)  # 4 is the default, in whatever order the notes have it
    assert said == []
    assert chosen(options(eta=0.75, tau=739, steps=(8,)), notes())[0].steps == (8,)
    other = notes(eta="0.5", tau="479", steps="6 3", timesteps="{}")
    trajectory, _ = chosen(options(), other)
    assert (trajectory.eta, trajectory.tau, trajectory.steps) == (0.5, 479, (6, 3))
    only = {"eta": "0.65"}
    trajectory, _ = chosen(options(), only)
    assert (trajectory.tau, trajectory.steps) == (639, (4,))


@pytest.mark.parametrize(
    ("flags", "metadata", "message"),
    [
        ({"eta": 0.65}, [notes()], r"--eta 0\.65 conflicts with LoRA 0.* for eta 0\.75; omit --eta"),
        ({"tau": 759}, [notes()], r"--tau 759 conflicts with LoRA 0.* for tau 739; omit --tau"),
        ({"profile": "tcd"}, [notes()], r"LoRA 0\.safetensors records its own schedule .*omit --profile"),
        (
            {},
            [notes(), notes(eta="0.5", tau="479", timesteps="{}")],
            r"LoRA 0\S* was trained for eta 0\.75 from timestep 739 .*1\S* for eta 0\.5 from timestep 479",
        ),
        ({}, [notes(), notes(method="lcm")], r"\(std\), .* \(lcm\); a bundle has one schedule"),
        ({}, [{}], r"LoRA 0\S* does not record its eta .*give --eta, or --profile .*std-0\.75"),
        ({}, [{"ss_steps": "100", "steps": "1500"}], "does not record its eta"),
        ({}, [{"std_rt_version": "0.1.0"}], "was written by std-rt but has no eta"),
        (
            {},
            [notes(eta="abc")],
            r"LoRA 0\S* has invalid metadata \(could not convert string to float: 'abc'\)",
        ),
        ({}, [notes(eta="nan")], "has invalid metadata .*eta must be in"),
        ({}, [notes(eta="7.5")], "has invalid metadata .*eta must be in"),
        ({}, [notes(tau="740")], "has invalid metadata .*740 is not on the grid"),
        ({}, [notes(tau="x")], r"has invalid metadata \(invalid literal .*'x'"),
        ({}, [notes(steps="2 x")], r"has invalid metadata \(invalid literal .*'x'"),
        ({}, [notes(timesteps="{")], "has invalid metadata"),
        ({}, [notes(timesteps="[1]")], "has invalid metadata"),
        ({}, [notes(timesteps='{"4": [1, 2]}')], r"timesteps \[1, 2\] in 4 steps, .*version that trained it"),
        ({}, [notes(grid="100")], "trained on a grid of 100 points"),
        ({"steps": (60,)}, [notes()], "do not fit together: steps must be in 1..37"),
        (
            {"profile": "std-0.75", "eta": 0.65},
            [{}],
            r"--eta 0\.65 .*profile std-0\.75, which was trained for eta",
        ),
        (
            {"profile": "std-0.75", "tau": 739},
            [{}],
            r"--tau 739 .*profile std-0\.75, which was trained for tau 779",
        ),
        ({"profile": "std-75"}, [{}], r"unknown --profile 'std-75'; did you mean 'std-0\.75'\?"),
        ({"profile": "std-v2v-0.75"}, [{}], "cannot be exported: it was trained in a UNet with a motion"),
    ],
)
def test_what_does_not_fit_is_one_line(
    options: Any, flags: dict[str, Any], metadata: Sequence[dict[str, str]], message: str
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        chosen(options(**flags), *metadata)
    assert "\n" not in str(caught.value)


def test_a_style_lora_goes_with_a_trained_one(options: Any) -> None:
    """Somebody else's notes are not ours, whatever they are called."""
    trajectory, said = chosen(options(), notes(), {"steps": "1500", "base": "sdxl"})
    assert (trajectory.eta, trajectory.steps, said) == (0.75, (4, 2, 6, 8), [])
    assert chosen(options(), notes(), notes())[0].tau == 739


def test_a_foreign_lora_is_exported_by_flags(options: Any) -> None:
    trajectory, said = chosen(options(eta=0.65), {})
    assert (trajectory.eta, trajectory.tau, trajectory.steps) == (0.65, 639, (4,))
    assert said == ["0.safetensors does not record its eta; exporting for eta 0.65 as requested"]
    assert chosen(options())[0] == Trajectory(0.75, 739, (4,))  # no LoRA: nothing to ask


def test_what_is_allowed_and_should_be_known_is_said(options: Any) -> None:
    _, said = chosen(options(steps=(4, 5)), notes(base="another"))
    assert said[0] == "0.safetensors was trained for 2, 4, 6, 8 steps, not for 5"
    assert said[1].startswith("0.safetensors was trained on another; ")
    assert len(said) == 2


def test_published_std_loras_start_where_they_were_trained(options: Any) -> None:
    starts = {name: chosen(options(profile=name), {})[0].tau for name in PROFILES if name.startswith("std")}
    assert starts == {"std-0.65": 679, "std-0.75": 779, "std-0.85": 879, "std-0.95": 979}
    trajectory, said = chosen(options(profile="std-0.75"), {})
    assert (trajectory.eta, trajectory.steps[0], trajectory.gamma) == (0.75, 8, 0.0)
    assert (trajectory.guidance, said) == (6.0, [])
    trajectory, said = chosen(options(profile="std-0.75", guidance=1.0), {})
    assert said == ["profile std-0.75 was published for guidance 2 to 8, not 1"]


def test_a_published_lora_is_known_by_its_file_name(options: Any) -> None:
    note = LoraNotes(Path("cache/std_sdxl_i2i_eta0.75.safetensors"))
    trajectory = choose_trajectory(options(guidance=2.0), [note])
    assert (trajectory.tau, trajectory.guidance) == (779, 2.0)
    assert remarks(options(guidance=2.0), trajectory, [note]) == [
        "recognized by its file name as SecondComming/Single-Trajectory-Distillation: "
        "std_sdxl_i2i_eta0.75.safetensors; exported with --profile std-0.75"
    ]
    with pytest.raises(ExportError, match=r"profile std-0\.75, which was trained for eta 0\.75"):
        choose_trajectory(options(eta=0.65), [note])
    assert choose_trajectory(options(profile="tcd"), [note]).gamma == 0.3  # what is asked for wins


def test_profiles_of_full_range_loras_take_any_eta(options: Any) -> None:
    trajectory, _ = chosen(options(profile="lcm", eta=0.5, steps=(2,)), {})
    assert trajectory == Trajectory(0.5, 499, (2,), 1.0, "lcm")
    assert chosen(options(profile="tcd"), {})[0].gamma == 0.3


@pytest.mark.parametrize("method", ["lcm", "mcm"])
def test_the_stochasticity_of_lcm_reaches_the_manifest(options: Any, method: str) -> None:
    schedule = NoiseSchedule.scaled_linear()
    found = schedule_section(schedule, chosen(options(), notes(method=method))[0])
    assert found["gamma"] == 1.0
    *stochastic, last = [row[4] for row in found["steps"]["4"]["coefficients"]]
    assert all(noise > 0.3 for noise in stochastic)
    assert last == 0
    still = schedule_section(schedule, Trajectory(0.75, 739, (4,)))
    assert {row[4] for row in still["steps"]["4"]["coefficients"]} == {0.0}


def test_the_digest_of_a_folder_is_that_of_the_network(
    unet: UNet2DConditionModel, own_source: Path, clip_source: Path, tmp_path: Path
) -> None:
    expected = unet_digest({name: tuple(value.shape) for name, value in unet.state_dict().items()})
    assert source_digest(own_source / "unet") == expected != source_digest(clip_source / "unet")
    unet.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert source_digest(tmp_path / "shards") == expected
    unet.save_pretrained(tmp_path / "half", variant="fp16")
    assert source_digest(tmp_path / "half") == expected
    next((tmp_path / "half").glob("*.safetensors")).write_bytes(b"cut off")
    with pytest.raises(ExportError, match="cannot be read"):
        source_digest(tmp_path / "half")


def test_a_student_passes_every_check_of_its_own_base(
    student: Path, own_source: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    with pytest.raises(ReachedTheWeightsError):
        export_pipeline(own_source, tmp_path / "b", lora=[(student, 1.0)], progress=stop, remark=said.append)
    assert said == []
    moved = Path(shutil.copytree(own_source, tmp_path / "renamed"))
    with pytest.raises(ReachedTheWeightsError):
        export_pipeline(moved, tmp_path / "b", lora=[(student, 1.0)], progress=stop, remark=said.append)
    assert [f"trained on {own_source.name}" in line for line in said] == [True]


def test_a_student_of_another_base_is_refused_before_any_work(
    student: Path, clip_source: Path, own_source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError) as caught:
        export_pipeline(clip_source, tmp_path / "b", lora=[(student, 1.0)], progress=stop)
    line = str(caught.value)
    assert (
        f"LoRA {student} was trained on {own_source.name}, and {clip_source} is another kind of model" in line
    )
    assert f"std-rt export PATH/TO/{own_source.name} --lora {student}" in line
    assert "\n" not in line


def test_a_wrong_eta_is_refused_before_any_work(student: Path, own_source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="omit --eta"):
        export_pipeline(own_source, tmp_path / "b", lora=[(student, 1.0)], eta=0.5, progress=stop)


def test_the_command_line_says_it_all(
    student: Path,
    own_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise ExportError("as far as this test goes")

    def run(*flags: object) -> str:
        asked = ("export", own_source, "-o", tmp_path / "b", *flags)
        monkeypatch.setattr(sys, "argv", ["std-rt", *(str(flag) for flag in asked)])
        with pytest.raises(SystemExit, match="2"):
            main()
        return capfd.readouterr().err

    monkeypatch.setattr("std_rt.export.build.write_bundle", full)
    said = run("--lora", student, "--steps", 5).splitlines()
    assert [line for line in said if line.startswith("note: ")] == [
        f"note: {student} was trained for 2, 4, 6, 8 steps, not for 5"
    ]
    assert said[-1] == "error: as far as this test goes"
    assert run("--profile", "lcmm").startswith("error: unknown --profile 'lcmm'; did you mean 'lcm'?")


def test_damaged_rank_notes_are_one_line(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "l.safetensors", unet, eta="0.75")
    assert read_notes(path, read_metadata(path)) == LoraNotes(path, 0.75, 739)
    path = write_lora(tmp_path / "l.safetensors", unet, lora_adapter_metadata="{rank")
    with pytest.raises(ExportError, match="invalid metadata"):
        fuse_lora({"unet": unet}, path, 1.0)
