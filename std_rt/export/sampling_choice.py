"""The trajectory of a bundle: where sampling starts, its steps and its guidance, from LoRAs and flags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from std_rt.core.errors import ExportError, one_line
from std_rt.core.samplers import schedule_rows, takes_all
from std_rt.core.schedule import (
    GRID_POINTS,
    NoiseSchedule,
    StepCoefficients,
    start_timestep,
    trajectory_timesteps,
)
from std_rt.export.export_options import ExportOptions
from std_rt.export.profiles import PROFILES, Profile, find_profile, published_as
from std_rt.models.ip_adapter import adapter_digest

__all__ = [
    "LoraNotes",
    "Trajectory",
    "check_base",
    "check_style",
    "check_style_layers",
    "choose_trajectory",
    "guidance_mode",
    "read_notes",
    "remarks",
    "schedule_section",
]

DEFAULT_ETA = 0.75
DEFAULT_STEPS = (4,)
_TEXT_NOTES = ("method", "base", "base_digest", "ip_adapter", "ip_adapter_digest", "style_layers")
LCM_GAMMA = 1.0  # LCM draws noise again in every step


@dataclass(frozen=True)
class LoraNotes:
    """What a LoRA's file says about itself (flat text, written by ``std-rt train``).

    ``eta`` None: the file says nothing about a trajectory. ``steps`` are the counts it was trained for.
    """

    path: Path
    eta: float | None = None
    tau: int = 0
    steps: tuple[int, ...] = ()
    method: str = "std"
    base: str = ""
    base_digest: str = ""
    ip_adapter: str = ""  # the file that teacher and student had; empty: trained on text alone
    ip_adapter_digest: str = ""
    style_layers: str = ""  # names with commas between

    @property
    def gamma(self) -> float:
        """Stochasticity of a step, by the training method."""
        return LCM_GAMMA if self.method in ("lcm", "mcm") else 0.0

    @property
    def start(self) -> str:
        """For messages."""
        return f"eta {self.eta:g} from timestep {self.tau} ({self.method})"


def read_notes(path: Path, metadata: Mapping[str, str]) -> LoraNotes:
    """The notes of the LoRA file ``path``. Raises ExportError if it is damaged, or made for another grid.

    A file without ``eta`` was made by others: whatever its notes say, they are not ours, and it is exported
    by flags alone.
    """
    if "eta" not in metadata:
        if "std_rt_version" in metadata:
            raise ExportError(
                f"LoRA {path} was written by std-rt but has no eta in its metadata; use another snapshot"
            )
        return LoraNotes(path)
    grid = metadata.get("grid", str(GRID_POINTS))
    if grid != str(GRID_POINTS):
        raise ExportError(
            f"LoRA {path} was trained on a grid of {grid} points, and std-rt runs {GRID_POINTS}; "
            "it cannot be exported"
        )
    try:
        eta = float(metadata["eta"])
        tau = int(metadata["tau"]) if "tau" in metadata else start_timestep(eta)
        steps = tuple(int(part) for part in metadata.get("steps", "").replace(",", " ").split())
        start_timestep(eta)
        trajectory_timesteps(eta, 1, tau)
        timesteps = {
            int(count): noted for count, noted in json.loads(metadata.get("timesteps", "{}")).items()
        }
        run = {count: trajectory_timesteps(eta, count, tau) for count in timesteps}
    except (ValueError, TypeError, AttributeError) as error:
        reason = one_line(error)
        raise ExportError(f"LoRA {path} has invalid metadata ({reason}); use another snapshot") from error
    for count, noted in timesteps.items():
        if run[count] != noted:
            raise ExportError(
                f"LoRA {path} was trained for the timesteps {noted} in {count} steps, and this std-rt "
                f"runs others; export it with the version that trained it ({metadata.get('std_rt_version')})"
            )
    text = {key: metadata[key] for key in _TEXT_NOTES if key in metadata}
    return LoraNotes(path, eta, tau, steps, **text)


@dataclass(frozen=True)
class Trajectory:
    """Where sampling starts and how many steps it may take; the first step count is the default.

    ``tau`` None: where ``kind`` (one of `core.samplers.SCHEDULES`) starts by itself, which may depend on the
    number of steps. ``gamma`` is the stochasticity of a step: 0 none, 1 new noise. ``guidance`` is diffusers'
    guidance_scale: 1 is none.
    """

    eta: float
    tau: int | None
    steps: tuple[int, ...]
    gamma: float = 0.0
    kind: str = "std"
    guidance: float = 1.0

    def rows(self, schedule: NoiseSchedule, steps: int) -> list[StepCoefficients]:
        """What runs for ``steps`` on that noise schedule. Raises ExportError if these do not fit."""
        try:
            return schedule_rows(schedule, self.kind, self.eta, self.tau, steps, self.gamma)
        except ValueError as error:
            raise ExportError(f"eta, tau and steps do not fit together: {error}") from error


def choose_trajectory(options: ExportOptions, notes: Sequence[LoraNotes]) -> Trajectory:
    """From the LoRAs' notes if they have any, else from the profile and flags, else 0.75 and 4 steps.

    A LoRA works only where it was trained: ExportError on a flag that says otherwise, on LoRAs that start in
    two places, and on a LoRA whose start is not known.
    """
    profile = _profile(options, notes)
    trained = [note for note in notes if note.eta is not None]
    if trained:
        found = _trained(options, profile, trained)
    elif profile is not None:
        found = _published(options, profile)
    elif notes and options.eta is None:
        raise ExportError(
            f"LoRA {notes[-1].path} does not record its eta (where its trajectory starts); "
            f"give --eta, or --profile if it is one of {', '.join(PROFILES)}"
        )
    else:
        eta = DEFAULT_ETA if options.eta is None else options.eta
        kind = "std" if options.schedule == "auto" else options.schedule
        steps = options.steps or DEFAULT_STEPS
        found = Trajectory(eta, options.tau, steps, 0.0, kind, options.guidance or 1.0)
    steps = tuple(dict.fromkeys(found.steps))
    rows = [found.rows(NoiseSchedule.scaled_linear(), count) for count in steps]
    return replace(found, steps=steps, tau=rows[0][0].timestep if takes_all(found.kind) else found.tau)


def _profile(options: ExportOptions, notes: Sequence[LoraNotes]) -> Profile | None:
    """The one asked for, or that of a published LoRA under its published name; a LoRA's own notes win."""
    if options.profile:
        return find_profile(options.profile)
    if any(note.eta is not None for note in notes):
        return None
    found = [published_as(note.path) for note in notes]
    return next((profile for profile in found if profile is not None), None)


def _trained(options: ExportOptions, profile: Profile | None, trained: Sequence[LoraNotes]) -> Trajectory:
    note = trained[-1]
    assert note.eta is not None
    if profile is not None:
        raise ExportError(f"LoRA {note.path} records its own schedule (eta {note.eta:g}); omit --profile")
    for other in trained:
        if (other.eta, other.tau, other.gamma) != (note.eta, note.tau, note.gamma):
            raise ExportError(
                f"LoRA {other.path} was trained for {other.start}, {note.path} for {note.start}; "
                "a bundle has one schedule: export each by itself"
            )
    _check_flags(options, f"LoRA {note.path}, which was trained", note.eta, note.tau)
    kind = "std" if options.schedule == "auto" else options.schedule
    # Notes list step counts in no order; the product's default is 4 if it is among them.
    steps = DEFAULT_STEPS + note.steps if DEFAULT_STEPS[0] in note.steps else note.steps or DEFAULT_STEPS
    tau = note.tau if kind == "std" else None
    return Trajectory(note.eta, tau, options.steps or steps, note.gamma, kind, options.guidance or 1.0)


def _check_flags(options: ExportOptions, trained: str, eta: float, tau: int | None) -> None:
    for name, wanted in (("eta", eta), ("tau", tau)):
        asked = getattr(options, name)
        if asked is not None and wanted is not None and asked != wanted:
            raise ExportError(
                f"--{name} {asked:g} conflicts with {trained} for {name} {wanted:g}; omit --{name}"
            )


def _published(options: ExportOptions, profile: Profile) -> Trajectory:
    if profile.fixed:
        _check_flags(
            options, f"the LoRA of profile {profile.name}, which was trained", profile.eta, profile.tau
        )
    eta = profile.eta if options.eta is None else options.eta
    kinds = {"auto": profile.schedule, "diffusers": profile.in_diffusers}
    kind = kinds.get(options.schedule, options.schedule)
    tau = profile.tau if options.tau is None and kind == profile.schedule else options.tau
    guidance = profile.scale if options.guidance is None else options.guidance
    return Trajectory(eta, tau, options.steps or profile.steps, profile.gamma, kind, guidance)


def check_base(options: ExportOptions, notes: Sequence[LoraNotes], digest: str) -> None:
    """Raises ExportError if a LoRA was trained on a UNet of another architecture than ``digest``'s."""
    for note in notes:
        if note.base_digest and note.base_digest != digest:
            raise ExportError(
                f"LoRA {note.path} was trained on {note.base or 'another base'}, and {options.source} is "
                f"another kind of model; type: std-rt export PATH/TO/{note.base or 'ITS_BASE'} "
                f"--lora {note.path} --output {options.output}"
            )


def check_style(options: ExportOptions, notes: Sequence[LoraNotes]) -> str:
    """The ``--style-layers`` of the export: those that LoRAs were trained with, if any names them.

    Raises ExportError if the IP-Adapter of the export is not the LoRAs', or other layers are asked for.
    """
    chosen, adapter = options.style_layers, options.ip_adapter or options.source / "ip_adapter.safetensors"
    for note in notes:
        if not note.ip_adapter_digest:
            continue
        trained = f"LoRA {note.path} was trained with the IP-Adapter {note.ip_adapter}"
        if not adapter.is_file():
            raise ExportError(f"{trained}, and there is none at {adapter}; give it with --ip-adapter")
        if adapter_digest(adapter) != note.ip_adapter_digest:
            raise ExportError(f"{trained}, and {adapter} is another; give that one with --ip-adapter")
        if chosen == "auto":
            chosen = note.style_layers
    return chosen


def check_style_layers(kept: Sequence[str], notes: Sequence[LoraNotes]) -> None:
    """Raises ExportError unless ``kept`` are the layers that each LoRA was trained with."""
    for note in notes:
        if note.style_layers and note.style_layers.split(",") != list(kept):
            raise ExportError(
                f"LoRA {note.path} was trained with a style in {len(note.style_layers.split(','))} layers, "
                f"and {len(kept)} others would have one; omit --style-layers"
            )


def remarks(options: ExportOptions, trajectory: Trajectory, notes: Sequence[LoraNotes]) -> list[str]:
    """Remarks on allowed but unusual choices, one line each."""
    lines = []
    profile = _profile(options, notes)
    if profile is not None and not options.profile:
        lines.append(f"recognized by its file name as {profile.file}; exported with --profile {profile.name}")
    for note in notes:
        if profile is None and all(other.eta is None for other in notes):
            lines.append(
                f"{note.path} does not record its eta; exporting for eta {trajectory.eta:g} as requested"
            )
        untrained = [str(count) for count in trajectory.steps if count not in note.steps]
        if note.steps and untrained:
            known = ", ".join(str(count) for count in note.steps)
            lines.append(f"{note.path} was trained for {known} steps, not for {', '.join(untrained)}")
        if note.base and note.base != options.source.resolve().name:
            lines.append(f"{note.path} was trained on {note.base}; {options.source} is of the same kind")
    if profile is not None:
        found = (profile.remark(count, trajectory.eta) for count in trajectory.steps)
        lines += [line for line in found if line]
        low, high = profile.guidance
        if not low <= trajectory.guidance <= high:
            lines.append(
                f"profile {profile.name} was published for guidance {low:g} to {high:g}, "
                f"not {trajectory.guidance:g}"
            )
    return lines


def guidance_mode(options: ExportOptions, trajectory: Trajectory) -> str:
    """``none`` at scale 1; else as asked, and ``full`` by default. Raises ExportError."""
    asked = options.guidance_mode
    if trajectory.guidance == 1:
        if asked in ("full", "residual"):
            raise ExportError(f"--guidance-mode {asked} needs a scale; add --guidance 2 or more")
        return "none"
    if asked == "none":
        raise ExportError(f"--guidance {trajectory.guidance:g} and --guidance-mode none exclude each other")
    return "full" if asked == "auto" else asked


def schedule_section(schedule: NoiseSchedule, trajectory: Trajectory) -> dict[str, Any]:
    """The manifest's ``schedule``: every number a runtime needs to take the steps."""
    steps: dict[str, dict[str, Any]] = {}
    for count in sorted(trajectory.steps):
        found = trajectory.rows(schedule, count)
        rows = [[c.alpha_t, c.sigma_t, c.alpha_s, c.sigma_s, c.noise] for c in found]
        steps[str(count)] = {"timesteps": [c.timestep for c in found], "coefficients": rows}
    return {
        "prediction_type": schedule.prediction_type,
        "betas": schedule.betas().tolist(),  # not for running: so that a bundle can be trained on again
        "kind": trajectory.kind,
        "eta": trajectory.eta,
        "tau": steps[str(trajectory.steps[0])]["timesteps"][0],
        "grid": GRID_POINTS,
        "gamma": trajectory.gamma,
        "default_steps": trajectory.steps[0],
        "steps": steps,
    }
