"""What a user may ask of export, checked before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from std_rt.errors import ExportError
from std_rt.schedule import start_timestep, trajectory_timesteps

__all__ = ["ExportOptions", "Trajectory", "choose_trajectory"]

DEFAULT_ETA = 0.75
DEFAULT_STEPS = (4,)
WEIGHTS = ("fp16", "fp32")


@dataclass(frozen=True)
class ExportOptions:
    """One export. ``size`` is (H, W) in px; ``eta``, ``tau`` and ``steps`` left out come from the LoRA."""

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

    def __post_init__(self) -> None:
        if not self.source.is_dir():
            raise ExportError(f"{self.source} is no folder; export takes an SDXL-layout diffusers folder")
        if not (self.source / "model_index.json").is_file():
            raise ExportError(f"{self.source} has no model_index.json, so it is no diffusers pipeline folder")
        if self.weights not in WEIGHTS:
            raise ExportError(f"--weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        for path, _ in self.lora:
            if not path.is_file():
                raise ExportError(f"LoRA {path} does not exist")
        for folder in (self.vae, self.image_encoder):
            if folder is not None and not folder.is_dir():
                raise ExportError(f"{folder} is no folder")

    @property
    def bundle_name(self) -> str:
        """The name in the manifest: that of the folder unless one is given."""
        return self.name or self.output.resolve().name


@dataclass(frozen=True)
class Trajectory:
    """Where sampling starts and how many steps it may take; the first step count is the default."""

    eta: float
    tau: int
    steps: tuple[int, ...]


def choose_trajectory(options: ExportOptions, notes: Sequence[dict[str, str]]) -> Trajectory:
    """Flags win, then the LoRAs' own notes (the last LoRA first), then 0.75 and 4 steps.

    Raises ExportError where they do not make a trajectory.
    """
    noted: dict[str, str] = {}
    for note in notes:
        noted.update({key: note[key] for key in ("eta", "tau", "steps") if key in note})
    try:
        eta = options.eta if options.eta is not None else float(noted.get("eta", DEFAULT_ETA))
        # A tau goes with the eta it was written for: a flag for one alone recomputes the other.
        noted_tau = int(noted["tau"]) if "tau" in noted and options.eta is None else None
        tau = options.tau if options.tau is not None else noted_tau
        steps = options.steps or _steps(noted) or DEFAULT_STEPS
        chosen = Trajectory(eta, start_timestep(eta) if tau is None else tau, steps)
        for count in steps:
            trajectory_timesteps(eta, count, chosen.tau)
    except ValueError as error:
        raise ExportError(f"eta, tau and steps do not fit together: {error}") from error
    return replace(chosen, steps=tuple(dict.fromkeys(steps)))


def _steps(noted: dict[str, str]) -> tuple[int, ...]:
    return tuple(int(part) for part in noted.get("steps", "").replace(",", " ").split())
