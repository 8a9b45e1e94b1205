"""What a LoRA's file says of itself (flat text, written by ``std-rt train``), read and checked.

A LoRA without an ``eta`` is somebody else's: whatever its notes say, they are not ours, and it is exported
by flags alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from std_rt.core.errors import ExportError
from std_rt.core.schedule import GRID_POINTS, start_timestep, trajectory_timesteps

__all__ = ["LoraNotes", "read_notes"]


@dataclass(frozen=True)
class LoraNotes:
    """``eta`` None: the file says nothing of a trajectory. ``steps`` are the counts it was trained for."""

    path: Path
    eta: float | None = None
    tau: int = 0
    steps: tuple[int, ...] = ()
    method: str = "std"
    base: str = ""
    base_digest: str = ""


def read_notes(path: Path, metadata: Mapping[str, str]) -> LoraNotes:
    """The notes of the LoRA file ``path``. Raises ExportError where damaged, or made for another grid."""
    if "eta" not in metadata:
        if "std_rt_version" in metadata:
            raise ExportError(f"LoRA {path} was written by std-rt and lacks its eta; take another snapshot")
        return LoraNotes(path)
    try:
        notes = _parse(path, metadata)
        _check_timesteps(notes, metadata)
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"LoRA {path} has damaged notes ({reason}); take another snapshot of it") from error
    return notes


def _parse(path: Path, metadata: Mapping[str, str]) -> LoraNotes:
    eta = _number(metadata["eta"], "eta")
    tau = _whole(metadata["tau"], "tau") if "tau" in metadata else start_timestep(eta)
    grid = metadata.get("grid", str(GRID_POINTS))
    if grid != str(GRID_POINTS):
        raise ExportError(
            f"LoRA {path} was trained on a grid of {grid} points, and std-rt runs {GRID_POINTS}; "
            "it cannot be exported"
        )
    return LoraNotes(
        path,
        eta,
        tau,
        tuple(_whole(part, "steps") for part in metadata.get("steps", "").replace(",", " ").split()),
        metadata.get("method", "std"),
        metadata.get("base", ""),
        metadata.get("base_digest", ""),
    )


def _number(text: str, key: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{key} = {text!r} is no number") from None


def _whole(text: str, key: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{key} = {text!r} is no whole number") from None


def _check_timesteps(notes: LoraNotes, metadata: Mapping[str, str]) -> None:
    """The noted timesteps must be those that a bundle runs; ValueError for an eta or tau off the grid."""
    assert notes.eta is not None
    start_timestep(notes.eta)
    trajectory_timesteps(notes.eta, 1, notes.tau)
    for count, noted in json.loads(metadata.get("timesteps", "{}")).items():
        if trajectory_timesteps(notes.eta, int(count), notes.tau) != noted:
            raise ExportError(
                f"LoRA {notes.path} was trained for the timesteps {noted} in {count} steps, and this std-rt "
                f"runs others; export it with the version that trained it ({metadata.get('std_rt_version')})"
            )
