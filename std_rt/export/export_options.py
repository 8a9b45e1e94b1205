"""Export options, from flags or a recipe file, validated up front."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from std_rt.core.bundle import MADE_FROM, QUANTIZED
from std_rt.core.errors import ExportError
from std_rt.core.files import reason as cause
from std_rt.core.samplers import SCHEDULES

__all__ = ["LARGE", "ExportOptions", "check_choices", "check_pipeline_folder", "load_recipe"]

WEIGHTS = ("fp16", "fp32")
PRECISIONS = ("auto", "fp32", "fp16", "bf16", *QUANTIZED)
GUIDANCE_MODES = ("auto", "none", "full", "residual")
PROMPTS = ("baked", "encoder")
# Parameters of a UNet of SDXL's size: it is made for GPUs, which compute in halves, and to export it takes
# gigabytes.
LARGE = 500_000_000


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


def check_pipeline_folder(path: Path) -> None:
    """Raise ExportError unless the folder has a pipeline; a training's is told what to export instead."""
    if (path / "model_index.json").is_file():
        return
    lora = path / "lora.safetensors"
    instead = f"; export the base that it was trained on, with --lora {lora}" if lora.is_file() else ""
    raise ExportError(f"{path} has no model_index.json, so it is not a diffusers pipeline folder{instead}")


@dataclass(frozen=True)
class ExportOptions:
    """One export. ``size`` is (H, W) in px (None: 512, for a small model 256), ``lora`` are (file, scale)
    pairs, fused in order.

    ``eta``, ``tau``, ``steps``, ``schedule`` and ``guidance`` left out come from the LoRA, or from the
    ``profile`` of a published one, or are 0.75, (4,), ``std`` and 1; the first step count is the bundle's
    default. ``motion_adapter`` makes a video-to-video bundle, whose UNet sees ``frames`` (8) at once, windows
    sharing ``overlap`` (2) of them. ``negative`` None means whatever the model uses without a
    negative prompt. ``origins`` says where files came from (`std_rt.export.sources.resolve`).
    """

    source: Path
    output: Path
    lora: tuple[tuple[Path, float], ...] = ()
    ip_adapter: Path | None = None
    image_encoder: Path | None = None
    vae: Path | None = None
    tiny_vae: Path | None = None
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
    motion_adapter: Path | None = None
    frames: int | None = None
    overlap: int | None = None
    origins: Mapping[Path, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.source.is_dir():
            raise ExportError(f"{self.source} is not a folder; export takes an SDXL-layout diffusers folder")
        check_pipeline_folder(self.source)
        check_choices(vars(self))
        for path, _ in self.lora:
            if not path.is_file():
                raise ExportError(f"LoRA {path} does not exist")
        self._check_window()
        for folder in (self.vae, self.tiny_vae, self.image_encoder, self.motion_adapter):
            if folder is not None and not folder.is_dir():
                raise ExportError(f"{folder} is not a folder")

    def _check_window(self) -> None:
        if self.motion_adapter is None:
            if self.frames is not None or self.overlap is not None:
                raise ExportError("--frames and --overlap are for video; add --motion-adapter FOLDER")
            return
        frames, overlap = self.window or (0, 0)
        if frames < 2:
            raise ExportError(f"--frames must be 2 or more, got {frames}; for pictures omit --motion-adapter")
        if not 0 <= overlap < frames:
            raise ExportError(
                f"--overlap must be from 0 to {frames - 1}, less than --frames {frames}, got {overlap}"
            )
        for flag, asked in ((f"--precision {self.precision}", self.precision in QUANTIZED),
                            ("--guidance-mode residual", self.guidance_mode == "residual")):  # fmt: skip
            if asked:
                raise ExportError(f"{flag} does not work with --motion-adapter; omit one of them")

    @property
    def window(self) -> tuple[int, int] | None:
        """(frames, overlap) of a video-to-video bundle."""
        if self.motion_adapter is None:
            return None
        return (8 if self.frames is None else self.frames, 2 if self.overlap is None else self.overlap)

    def working_size(self, parameters: int) -> tuple[int, int]:
        """(H, W) in px for a UNet of that many parameters."""
        return self.size or ((512, 512) if parameters >= LARGE else (256, 256))

    def compute(self, parameters: int) -> str:
        """What graphs compute in: ``precision``, or for ``auto`` fp16 if the UNet is large, else fp32."""
        if self.precision != "auto":
            return MADE_FROM.get(self.precision, self.precision)
        return "fp16" if parameters >= LARGE else "fp32"

    @property
    def bundle_name(self) -> str:
        """The name in the manifest: that of the folder unless one is given."""
        return self.name or self.output.resolve().name


class _Recipe(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Every key of a recipe file. They are named as the flags of ``std-rt export``; ``source`` is BASE."""

    source: str | None = None
    output: str | None = None
    lora: list[str] = []
    ip_adapter: str | None = None
    image_encoder: str | None = None
    vae: str | None = None
    tiny_vae: str | None = None
    config: str | None = None
    profile: str = ""
    eta: float | None = None
    tau: int | None = None
    steps: list[int] = []
    schedule: str = "auto"
    guidance: float | None = None
    guidance_mode: str = "auto"
    size: int | str | None = None
    precision: str = "auto"
    weights: str = "fp16"
    calibrate: str | None = None
    prompt: str = ""
    negative_prompt: str | None = None
    prompts: str = "baked"
    style_layers: str = "auto"
    name: str = ""
    motion_adapter: str | None = None
    frames: int | None = None
    overlap: int | None = None


def load_recipe(path: Path) -> dict[str, Any]:
    """The options in the TOML file ``path``: only those it states, by the flags' names with ``_`` for ``-``.

    Values are as a command line has them: ``lora`` is a list of ``FILE[:SCALE]``, ``size`` a number of px or
    ``"WxH"``. Files and folders are relative to the current folder, as in flags; ``source`` and the others
    may be hub ids too. Raises ExportError on an unknown key, or a wrong type or value.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = f"recipe {path} cannot be read: {cause(error)}; give a TOML file like export/std_tiny.toml"
        raise ExportError(said) from error
    for key in found:
        if key not in _Recipe.__struct_fields__:
            near = difflib.get_close_matches(key.replace("-", "_"), _Recipe.__struct_fields__, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ExportError(f"recipe {path} has an unknown key {key}{hint}")
    try:
        msgspec.convert(found, _Recipe)
        check_choices(found)
    except msgspec.ValidationError as error:
        reason = str(error).replace(" | null", "").replace(" - at `$.", ", in `")
        raise ExportError(f"recipe {path}: {reason}") from error
    except ExportError as error:
        raise ExportError(f"recipe {path}: {error}") from error
    return found
