"""What a user may ask of export, checked before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from std_rt.core.errors import ExportError
from std_rt.core.samplers import SCHEDULES, schedule_rows, takes_all
from std_rt.core.schedule import NoiseSchedule, StepCoefficients
from std_rt.export.notes import LoraNotes
from std_rt.export.profiles import PROFILES, Profile, find_profile, published_as

__all__ = [
    "ExportOptions",
    "Trajectory",
    "check_base",
    "check_choices",
    "choose_trajectory",
    "guidance_mode",
    "remarks",
]

DEFAULT_ETA = 0.75
DEFAULT_STEPS = (4,)
LCM_GAMMA = 1.0  # LCM draws noise again in every step
WEIGHTS = ("fp16", "fp32")
PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8")
GUIDANCE_MODES = ("auto", "none", "full", "residual")
PROMPTS = ("baked", "encoder")
_HALF_FROM = 500_000_000  # parameters: a UNet of SDXL's size is made for GPUs, which compute in halves


def check_choices(asked: Mapping[str, Any]) -> None:
    """Raise ExportError on a value that no export takes, whatever the source is."""
    for name, known in (
        ("weights", WEIGHTS),
        ("precision", PRECISIONS),
        ("guidance_mode", GUIDANCE_MODES),
        ("prompts", PROMPTS),
        ("schedule", ("auto", *SCHEDULES)),
    ):
        if asked.get(name, known[0]) not in known:
            flag = name.replace("_", "-")
            raise ExportError(f"--{flag} must be one of {', '.join(known)}, got {asked[name]!r}")
    guidance = asked.get("guidance")
    if guidance is not None and not 1 <= guidance <= 50:
        raise ExportError(f"--guidance must be in 1..50 (1 is none), got {guidance:g}")


@dataclass(frozen=True)
class ExportOptions:
    """One export. ``size`` is (H, W) in px (None: 512, for a small model
    256), ``lora`` are (file, scale) pairs, fused in order.

    ``eta``, ``tau``, ``steps``, ``schedule`` and ``guidance`` left out come from the LoRA, or from the
    ``profile`` of a published one, or are 0.75, (4,), ``std`` and 1; the first step count is the bundle's
    default. ``negative`` None is what the model takes for no negative prompt. ``origins`` says where files
    came from (`std_rt.export.sources.resolve`).
    """

    source: Path
    output: Path
    lora: tuple[tuple[Path, float], ...] = ()
    ip_adapter: Path | None = None
    image_encoder: Path | None = None
    vae: Path | None = None
    eta: float | None = None
    tau: int | None = None
    steps: tuple[int, ...] = ()
    size: tuple[int, int] | None = None
    weights: str = "fp16"
    precision: str = "auto"
    prompt: str = ""
    negative: str | None = None
    prompts: str = "baked"
    guidance: float | None = None
    guidance_mode: str = "auto"
    schedule: str = "auto"
    style_layers: str = "auto"
    name: str = ""
    profile: str = ""
    origins: Mapping[Path, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.source.is_dir():
            raise ExportError(f"{self.source} is no folder; export takes an SDXL-layout diffusers folder")
        if not (self.source / "model_index.json").is_file():
            raise ExportError(f"{self.source} has no model_index.json, so it is no diffusers pipeline folder")
        check_choices(vars(self))
        for path, _ in self.lora:
            if not path.is_file():
                raise ExportError(f"LoRA {path} does not exist")
        for folder in (self.vae, self.image_encoder):
            if folder is not None and not folder.is_dir():
                raise ExportError(f"{folder} is no folder")

    def working_size(self, parameters: int) -> tuple[int, int]:
        """(H, W) in px for a UNet of that many parameters."""
        return self.size or ((512, 512) if parameters >= _HALF_FROM else (256, 256))

    def compute(self, parameters: int) -> str:
        """What graphs compute in: ``precision``, or for ``auto`` fp16 where the UNet is large, else fp32.

        int8 is made afterwards, from fp32 (`std_rt.export.quantize`).
        """
        if self.precision != "auto":
            return "fp32" if self.precision == "int8" else self.precision
        return "fp16" if parameters >= _HALF_FROM else "fp32"

    @property
    def bundle_name(self) -> str:
        """The name in the manifest: that of the folder unless one is given."""
        return self.name or self.output.resolve().name


@dataclass(frozen=True)
class Trajectory:
    """Where sampling starts and how many steps it may take; the first step count is the default.

    ``tau`` None is where ``kind`` (of `core.samplers.SCHEDULES`) starts by itself, which for schedules that
    are cut depends on the steps. ``gamma`` is the
    stochasticity of a step: 0 none, 1 new noise. ``guidance`` is diffusers' scale: 1 is none.
    """

    eta: float
    tau: int | None
    steps: tuple[int, ...]
    gamma: float = 0.0
    kind: str = "std"
    guidance: float = 1.0

    def rows(self, schedule: NoiseSchedule, steps: int) -> list[StepCoefficients]:
        """What runs for ``steps`` on that noise schedule. Raises ExportError where these do not fit."""
        try:
            return schedule_rows(schedule, self.kind, self.eta, self.tau, steps, self.gamma)
        except ValueError as error:
            raise ExportError(f"eta, tau and steps do not fit together: {error}") from error


def choose_trajectory(options: ExportOptions, notes: Sequence[LoraNotes]) -> Trajectory:
    """From the LoRAs' notes where they have any, else from the profile and flags, else 0.75 and 4 steps.

    A LoRA is right only where it was trained: a flag that says otherwise is an ExportError, and so are
    LoRAs that start in two places, and a LoRA of which nobody says where it starts.
    """
    profile = _profile(options, notes)
    trained = [note for note in notes if note.eta is not None]
    if trained:
        return _fitting(_trained(options, profile, trained))
    if profile is not None:
        return _fitting(_published(options, profile))
    if notes and options.eta is None:
        raise ExportError(
            f"LoRA {notes[-1].path} says nothing of its eta (where its trajectory starts); "
            f"give --eta, or --profile where it is one of {', '.join(PROFILES)}"
        )
    eta = DEFAULT_ETA if options.eta is None else options.eta
    return _fitting(_plain(options, eta))


def _profile(options: ExportOptions, notes: Sequence[LoraNotes]) -> Profile | None:
    """The one asked for, or that of a published LoRA under its published name; notes of its own win."""
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
        raise ExportError(f"LoRA {note.path} notes its own schedule (eta {note.eta:g}); leave --profile out")
    for other in trained:
        if (other.eta, other.tau, _gamma(other)) != (note.eta, note.tau, _gamma(note)):
            raise ExportError(
                f"LoRA {other.path} was trained for {_start(other)}, {note.path} for {_start(note)}; "
                "a bundle has one schedule: export each by itself"
            )
    _check_flags(options, f"LoRA {note.path} was trained", note.eta, note.tau)
    kind = "std" if options.schedule == "auto" else options.schedule
    steps, tau = options.steps or _four_first(note.steps), note.tau if kind == "std" else None
    return Trajectory(note.eta, tau, steps, _gamma(note), kind, options.guidance or 1.0)


def _check_flags(options: ExportOptions, whose: str, eta: float, tau: int | None) -> None:
    for flag, asked, known in (("eta", options.eta, eta), ("tau", options.tau, tau)):
        if asked is not None and known is not None and asked != known:
            raise ExportError(
                f"--{flag} {asked:g} was asked, and {whose} for {flag} {known:g}; leave --{flag} out"
            )


def _start(note: LoraNotes) -> str:
    return f"eta {note.eta:g} from timestep {note.tau} ({note.method})"


def _gamma(note: LoraNotes) -> float:
    return LCM_GAMMA if note.method == "lcm" else 0.0


def _four_first(steps: tuple[int, ...]) -> tuple[int, ...]:
    """Notes list step counts in no order; the product's default is 4 where it is among them."""
    return DEFAULT_STEPS + steps if set(DEFAULT_STEPS) & set(steps) else steps or DEFAULT_STEPS


def _published(options: ExportOptions, profile: Profile) -> Trajectory:
    if profile.fixed:
        _check_flags(options, f"the LoRA of profile {profile.name} was trained", profile.eta, profile.tau)
    eta = profile.eta if options.eta is None else options.eta
    kinds = {"auto": profile.schedule, "diffusers": profile.in_diffusers}
    kind = kinds.get(options.schedule, options.schedule)
    tau = profile.tau if options.tau is None and kind == profile.schedule else options.tau
    guidance = profile.scale if options.guidance is None else options.guidance
    return Trajectory(eta, tau, options.steps or profile.steps, profile.gamma, kind, guidance)


def _plain(options: ExportOptions, eta: float) -> Trajectory:
    kind = "std" if options.schedule == "auto" else options.schedule
    return Trajectory(eta, options.tau, options.steps or DEFAULT_STEPS, 0.0, kind, options.guidance or 1.0)


def _fitting(asked: Trajectory) -> Trajectory:
    """The same without repeated step counts. Raises ExportError where eta, tau and steps do not fit."""
    steps = tuple(dict.fromkeys(asked.steps))
    rows = [asked.rows(NoiseSchedule.scaled_linear(), count) for count in steps]
    return replace(asked, steps=steps, tau=rows[0][0].timestep if takes_all(asked.kind) else asked.tau)


def check_base(options: ExportOptions, notes: Sequence[LoraNotes], digest: str) -> None:
    """Raises ExportError where a LoRA was trained on a UNet of another architecture than ``digest``'s."""
    for note in notes:
        if note.base_digest and note.base_digest != digest:
            raise ExportError(
                f"LoRA {note.path} was trained on {note.base or 'another base'}, and {options.source} is a "
                f"model of another kind; type: std-rt export PATH/TO/{note.base or 'ITS_BASE'} "
                f"--lora {note.path} --output {options.output}"
            )


def remarks(options: ExportOptions, trajectory: Trajectory, notes: Sequence[LoraNotes]) -> list[str]:
    """What is allowed and yet should be known, a line each."""
    said = []
    profile = _profile(options, notes)
    if profile is not None and not options.profile:
        said.append(f"recognised by its file name: {profile.file}; exported with --profile {profile.name}")
    for note in notes:
        if profile is None and all(other.eta is None for other in notes):
            said.append(f"{note.path} says nothing of its eta; exported for eta {trajectory.eta:g} as asked")
        untrained = [str(count) for count in trajectory.steps if count not in note.steps]
        if note.steps and untrained:
            known = ", ".join(str(count) for count in note.steps)
            said.append(f"{note.path} was trained for {known} steps, not for {', '.join(untrained)}")
        if note.base and note.base != options.source.resolve().name:
            said.append(f"{note.path} was trained on {note.base}; {options.source} is of the same kind")
    if profile is not None:
        found = (profile.remark(count, trajectory.eta) for count in trajectory.steps)
        said += [line for line in found if line]
        low, high = profile.guidance
        if not low <= trajectory.guidance <= high:
            said.append(
                f"profile {profile.name} was published for guidance {low:g} to {high:g}, "
                f"not {trajectory.guidance:g}"
            )
    return said


def guidance_mode(options: ExportOptions, trajectory: Trajectory) -> str:
    """``none`` at scale 1; else as asked, and ``full`` where nobody asks. Raises ExportError."""
    asked = options.guidance_mode
    if trajectory.guidance == 1:
        if asked in ("full", "residual"):
            raise ExportError(f"--guidance-mode {asked} needs a scale; add --guidance 2 or more")
        return "none"
    if asked == "none":
        raise ExportError(f"--guidance {trajectory.guidance:g} and --guidance-mode none exclude each other")
    return "full" if asked == "auto" else asked
