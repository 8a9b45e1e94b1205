"""Published LoRAs: each profile is the scheduler of its model card, and says what it really runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.schedulers import SCHEDULE, compare

from std_rt.core.errors import ExportError
from std_rt.core.samplers import SCHEDULES, schedule_rows
from std_rt.export.profiles import PROFILES, REFUSED, Profile, find_profile, published_as

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ALL = list(PROFILES.values())


def name(profile: Profile) -> str:
    return profile.name


@pytest.mark.parametrize("profile", ALL, ids=name)
def test_every_profile_runs_in_each_of_its_step_counts(profile: Profile) -> None:
    for steps in profile.steps:
        rows = schedule_rows(SCHEDULE, profile.schedule, profile.eta, profile.tau, steps, profile.gamma)
        assert len(rows) == profile.evaluations(steps) >= 1
        assert rows[0].timestep <= 1000 * profile.eta + 40
    assert profile.in_diffusers in SCHEDULES
    assert profile.guidance[0] <= profile.scale <= profile.guidance[1]


@pytest.mark.parametrize("profile", [p for p in ALL if p.schedule not in ("std", "tdd")], ids=name)
def test_every_profile_is_its_scheduler_in_diffusers(profile: Profile) -> None:
    """TDDScheduler is not part of diffusers; see test_samplers."""
    for steps in profile.steps:
        compare(profile.schedule, "epsilon", steps, profile.eta, profile.gamma)


@pytest.mark.parametrize("profile", [p for p in ALL if p.in_diffusers != "tdd"], ids=name)
def test_asked_for_diffusers_it_is_the_img2img_pipeline(profile: Profile) -> None:
    for steps in profile.steps:
        if int(steps * profile.eta):
            compare(profile.in_diffusers, "epsilon", steps, profile.eta, profile.gamma)


@pytest.mark.parametrize(
    ("profile", "timesteps"),
    [
        ("lightning-4step", [749, 499, 249]),
        ("lightning-2step", [499]),
        ("hyper-sdxl-12steps-cfg", [749, 666, 582, 499, 416, 332, 249, 166, 82]),
        ("hyper-sdxl-1step", [739]),
        ("tdd", [751, 499, 251]),
    ],
)
def test_timesteps_at_strength_three_quarters(profile: str, timesteps: list[int]) -> None:
    p = PROFILES[profile]
    rows = schedule_rows(SCHEDULE, p.schedule, 0.75, None, p.steps[0], p.gamma)
    assert [c.timestep for c in rows] == timesteps


def test_a_remark_says_both_counts_of_steps() -> None:
    lightning = PROFILES["lightning-4step"]
    assert lightning.remark(4, 0.75) == (
        "profile lightning-4step: 3 of 4 steps are taken at eta 0.75, as diffusers does"
    )
    assert lightning.remark(4, 1.0) is None
    assert lightning.remark(8, 1.0) == "profile lightning-4step was distilled for 4 steps, not for 8"
    assert PROFILES["tcd"].remark(5, 0.75) is None


@pytest.mark.parametrize("profile", ALL, ids=name)
def test_a_published_file_is_recognised_by_its_name(profile: Profile) -> None:
    _, _, file = profile.file.partition(": ")
    found = published_as(Path("somewhere") / Path(file).name) if file else profile
    assert found is profile


def test_a_file_of_any_name_is_not_recognised() -> None:
    assert published_as(Path("pytorch_lora_weights.safetensors")) is None


def test_only_video_is_refused() -> None:
    assert not set(PROFILES) & set(REFUSED)
    for refused in REFUSED:
        with pytest.raises(ExportError, match=r"cannot be exported: it .*motion adapter"):
            find_profile(refused)
    with pytest.raises(ExportError, match=r"did you mean 'lightning-4step'\?"):
        find_profile("lightning4")
