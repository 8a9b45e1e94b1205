"""Candidates of a comparison: LoRAs, with their training metadata, and the bare teacher."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as XL
from safetensors import SafetensorError, safe_open
from torch import Tensor

from std_rt.core.errors import UsageError, one_line
from std_rt.core.schedule import start_timestep, trajectory_timesteps
from std_rt.training.distil.base import Base
from std_rt.training.distil.trajectory import METHODS

__all__ = ["Candidate", "attached", "label_of", "read_candidate", "teachers"]

REFERENCE_GUIDANCE = 2.0  # if no LoRA states its own
_NOTES = ("method", "eta", "tau", "base_digest")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A LoRA, or with ``tensors`` None the bare teacher.

    ``label`` groups the seeds of one recipe; ``guidance`` is the range of scales the LoRA was trained for;
    ``adapter`` is diffusers' metadata on rank and alpha.
    """

    name: str
    tensors: dict[str, Tensor] | None
    eta: float
    tau: int
    method: str
    label: str = ""
    seed: int | None = None
    guidance: tuple[float, float] | None = None
    adapter: dict[str, Any] | None = None

    @property
    def gamma(self) -> float:
        """Stochasticity of its steps: LCM draws new noise between them, the others are deterministic."""
        return 1.0 if self.method == "lcm" else 0.0

    def reference_guidance(self, asked: float | None = None) -> float:
        """The scale of its reference: as asked, else the middle of what it was trained for, else 2."""
        if asked is not None:
            return asked
        return REFERENCE_GUIDANCE if self.guidance is None else sum(self.guidance) / 2


def read_candidate(path: Path, base: Base) -> Candidate:
    """A LoRA that std-rt has written. Raises UsageError: unreadable, no metadata, or another base."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            notes = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--lora {path} cannot be read ({error}); give a .safetensors file") from None
    if not any("lora" in key for key in tensors):
        raise UsageError(f"--lora {path} holds no LoRA; give the lora.safetensors of a run")
    lost = [name for name in _NOTES if name not in notes]
    if lost:
        raise UsageError(
            f"--lora {path} has no {', '.join(lost)} in its metadata; give a LoRA written by std-rt train"
        )
    if notes["base_digest"] != base.digest:
        raise UsageError(
            f"--lora {path} was trained on another base ({notes.get('base', 'unnamed')}) than "
            f"--teacher {base.name}; give the folder it was trained on"
        )
    if "ip_adapter_digest" in notes:
        raise UsageError(
            f"--lora {path} was trained with style pictures, which --teacher cannot show it; "
            "export it and give the bundle: std-rt evaluate CONTENTS STYLES --bundle NAME"
        )
    try:
        return _from_notes(path, tensors, notes)
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"--lora {path} has invalid metadata ({error}); save it again with std-rt train"
        ) from None


def _from_notes(path: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> Candidate:
    method, eta, tau = notes["method"], float(notes["eta"]), int(notes["tau"])
    trajectory_timesteps(eta, 1, start=tau)  # ValueError if tau is not on the grid
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    scales = json.loads(notes.get("guidance", "null"))
    return Candidate(
        name=str(path),
        tensors=tensors,
        eta=eta,
        tau=tau,
        method=method,
        label=label_of(path, method),
        seed=int(notes["seed"]) if "seed" in notes else None,
        guidance=None if scales is None else (float(scales[0]), float(scales[1])),
        adapter=json.loads(notes.get("lora_adapter_metadata", "null")),
    )


def label_of(path: Path, method: str) -> str:
    """The name that seeds of one recipe share: method and run folder less ``-SEED``.

    ``runs/std-0/lora.safetensors`` -> ``std``; ``runs/no-bank-2/lora.safetensors`` -> ``std no-bank``;
    a snapshot ``runs/std-0/loras/001000.safetensors`` -> ``std 1000``; another file goes by its own name.
    """
    run, suffix = path.stem, ""
    if path.name == "lora.safetensors":
        run = path.absolute().parent.name
    elif path.parent.name == "loras" and path.stem.isdigit():
        run, suffix = path.absolute().parent.parent.name, f" {int(path.stem)}"
    stem = re.sub(r"-\d+$", "", run)
    named = stem if stem.startswith(method) else f"{method} {stem}"
    return f"{named}{suffix}"


def teachers(candidates: Sequence[Candidate], eta: float) -> list[Candidate]:
    """The bare teacher, once for every (tau, trained guidance) among the LoRAs; without LoRAs, at ``eta``."""
    starts = {(c.tau, c.guidance): c.eta for c in candidates}
    if not starts:
        try:
            starts = {(start_timestep(eta), None): eta}
        except ValueError as error:
            raise UsageError(f"--eta cannot be used: {error}") from None
    found = [
        Candidate("teacher", None, eta, tau, "teacher", "teacher", guidance=guidance)
        for (tau, guidance), eta in starts.items()
    ]
    if len(found) == 1:
        return found
    return [replace(c, label=f"teacher from {c.tau}, reference {c.reference_guidance():g}") for c in found]


@contextmanager
def attached(unet: Any, candidate: Candidate) -> Iterator[None]:
    """Inside the block ``unet`` is the candidate, afterwards the bare teacher again.

    Raises UsageError if a weight does not fit: nothing runs with half a LoRA.
    """
    if candidate.tensors is None:
        yield
        return
    # a.to_q.lora_A.weight, a.to_q.lora.down.weight and a.to_q_lora.down.weight are one layer each.
    named = {re.split(r"[._]lora", key)[0].removeprefix("unet.") for key in candidate.tensors}
    missing = sorted(named - {name for name, _ in unet.named_modules()})
    if missing:
        raise UsageError(f"--lora {candidate.name} has weights for {missing[0]}, which this teacher lacks")
    state = {key: value.float() for key, value in candidate.tensors.items()}
    try:
        try:
            XL.load_lora_into_unet(state, None, unet, adapter_name="candidate", metadata=candidate.adapter)
        except (ValueError, RuntimeError, KeyError) as error:
            reason = one_line(error, 200)
            raise UsageError(f"--lora {candidate.name} does not fit this teacher: {reason}") from None
        yield
    finally:
        unet.unload_lora()
