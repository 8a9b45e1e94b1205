"""What a user may ask of export, checked before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from std_rt.errors import ExportError
from std_rt.export.notes import LoraNotes
from std_rt.export.profiles import PROFILES, Profile, find_profile
from std_rt.schedule import start_timestep, trajectory_timesteps

__all__ = ["ExportOptions", "Trajectory", "check_base", "choose_trajectory", "remarks"]

DEFAULT_ETA = 0.75
DEFAULT_STEPS = (4,)
LCM_GAMMA = 1.0  # LCM draws noise again in every step
WEIGHTS = ("fp16", "fp32")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
_HALF_FROM = 500_000_000  # parameters: a UNet of SDXL's size is made for GPUs, which compute in halves


@dataclass(frozen=True)
class ExportOptions:
    """One export. ``size`` is (H, W) in px.

    ``eta``, ``tau`` and ``steps`` left out come from the LoRA, or from the ``profile`` of a published one.
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
    size: tuple[int, int] = (256, 256)
    weights: str = "fp16"
    prompt: str = ""
    style_layers: str = "auto"
    name: str = ""
    profile: str = ""
    precision: str = "auto"
    guidance_mode: str = "none"
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not self.source.is_dir():
            raise ExportError(f"{self.source} is no folder; export takes an SDXL-layout diffusers folder")
        if not (self.source / "model_index.json").is_file():
            raise ExportError(f"{self.source} has no model_index.json, so it is no diffusers pipeline folder")
        if self.weights not in WEIGHTS:
            raise ExportError(f"--weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        if self.precision not in PRECISIONS:
            raise ExportError(f"--precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for path, _ in self.lora:
            if not path.is_file():
                raise ExportError(f"LoRA {path} does not exist")
        for folder in (self.vae, self.image_encoder):
            if folder is not None and not folder.is_dir():
                raise ExportError(f"{folder} is no folder")

    def compute(self, parameters: int) -> str:
        """What graphs compute in: ``precision``, or for ``auto`` fp16 where the UNet is large, else fp32."""
        if self.precision != "auto":
            return self.precision
        return "fp16" if parameters >= _HALF_FROM else "fp32"

    @property
    def bundle_name(self) -> str:
        """The name in the manifest: that of the folder unless one is given."""
        return self.name or self.output.resolve().name


@dataclass(frozen=True)
class Trajectory:
    """Where sampling starts and how many steps it may take; the first step count is the default.

    ``gamma`` is the stochasticity of a step: 0 none, 1 new noise.
    """

    eta: float
    tau: int
    steps: tuple[int, ...]
    gamma: float = 0.0


def choose_trajectory(options: ExportOptions, notes: Sequence[LoraNotes]) -> Trajectory:
    """From the LoRAs' notes where they have any, else from the profile and flags, else 0.75 and 4 steps.

    A LoRA is right only where it was trained: a flag that says otherwise is an ExportError, and so are
    LoRAs that start in two places, and a LoRA of which nobody says where it starts.
    """
    profile = find_profile(options.profile) if options.profile else None
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
    return Trajectory(note.eta, note.tau, options.steps or _four_first(note.steps), _gamma(note))


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
    return _plain(options, eta, profile.tau, profile.steps, profile.gamma)


def _plain(
    options: ExportOptions,
    eta: float,
    tau: int | None = None,
    steps: tuple[int, ...] = DEFAULT_STEPS,
    gamma: float = 0.0,
) -> Trajectory:
    """Flags win; a start that nothing gives is that of eta."""
    tau = tau if options.tau is None else options.tau
    try:
        tau = start_timestep(eta) if tau is None else tau
    except ValueError as error:
        raise ExportError(str(error)) from error
    return Trajectory(eta, tau, options.steps or steps, gamma)


def _fitting(asked: Trajectory) -> Trajectory:
    """The same without repeated step counts. Raises ExportError where there are more steps than points."""
    steps = tuple(dict.fromkeys(asked.steps))
    try:
        for count in steps:
            trajectory_timesteps(asked.eta, count, asked.tau)
    except ValueError as error:
        raise ExportError(f"eta, tau and steps do not fit together: {error}") from error
    return Trajectory(asked.eta, asked.tau, steps, asked.gamma)


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
    for note in notes:
        if not options.profile and all(other.eta is None for other in notes):
            said.append(f"{note.path} says nothing of its eta; exported for eta {trajectory.eta:g} as asked")
        untrained = [str(count) for count in trajectory.steps if count not in note.steps]
        if note.steps and untrained:
            known = ", ".join(str(count) for count in note.steps)
            said.append(f"{note.path} was trained for {known} steps, not for {', '.join(untrained)}")
        if note.base and note.base != options.source.resolve().name:
            said.append(f"{note.path} was trained on {note.base}; {options.source} is of the same kind")
    lowest = find_profile(options.profile).guidance[0] if options.profile else 1.0
    if lowest > 1:
        said.append(
            f"profile {options.profile} was published for guidance {lowest:g} and up; a bundle has none"
        )
    return said
