"""Recipes: TOML files that say all of a training run, read into frozen dataclasses."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from std_rt.errors import RecipeError

T = TypeVar("T")
STYLE_HEADS = 6  # attention heads of the style encoder's resampler


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures lie. Relative folders are taken from the working directory."""

    photos: str
    art: str
    held_out_content: str
    held_out_style: str
    sources: str = ""  # CSV with the columns file, group: even weight per group's square root


@dataclass(frozen=True)
class AutoencoderConfig:
    """Recipe of the autoencoder stage."""

    output: str
    data: DataConfig
    stage: str = "autoencoder"
    seed: int = 0
    steps: int = 10_000
    batch: int = 16
    crop_px: int = 96
    learning_rate: float = 1e-3
    latent_noise: float = 0.05  # of the latents' standard deviation
    scale_equivariance: float = 0.25  # share of steps that decode half-size latents
    high_pass: float = 1.0  # weight of the gradient loss against the plain L1
    generated_share: float = 0.25
    bf16: bool = True
    snapshot_every: int = 500
    channels: tuple[int, ...] = (64, 128)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    latent_channels: int = 8


@dataclass(frozen=True)
class UNetConfig:
    """Size of the small SDXL-layout UNet and its style encoder."""

    block_out_channels: tuple[int, ...] = (96, 128, 192)
    layers_per_block: int = 1
    cross_attention_dim: int = 192
    attention_head_dim: int = 32
    style_tokens: int = 16
    pooled_dim: int = 256


@dataclass(frozen=True)
class TeacherConfig:
    """Recipe of the base (teacher) stage: UNet and style encoder together."""

    output: str
    autoencoder: str
    data: DataConfig
    stage: str = "teacher"
    seed: int = 0
    steps: int = 20_000
    batch: int = 32
    window: tuple[int, ...] = (16, 24)  # latent sizes of the training crops, drawn per step
    learning_rate: float = 5e-4
    warmup: int = 300
    ema_decay: float = 0.999
    drop_style: float = 0.12
    snr_ratio: float = 4.0  # resolution ratio of the schedule shift: log-SNR + 2 ln(ratio)
    start_eta: float = 0.95  # highest noise level trained
    content_from_eta: float = 0.75  # level at and above which the input carries the content version only
    share_art: float = 0.6
    share_generated: float = 0.4
    variants: int = 2  # content versions an artwork, generated stylizations a photo
    bf16: bool = True
    snapshot_every: int = 500
    model: UNetConfig = field(default_factory=UNetConfig)


@dataclass(frozen=True)
class FinishConfig:
    """Recipe of the finishing stage; data, shares and latents are those of the teacher's run."""

    output: str
    teacher: str  # the run folder of the teacher stage
    stage: str = "finish"
    seed: int = 1
    steps: int = 2_000
    batch: int = 24
    window: tuple[int, ...] = (24, 28)
    learning_rate: float = 2e-4
    warmup: int = 100
    ema_decay: float = 0.998
    eta: float = 0.75
    run_steps: int = 4
    guidance: float = 2.0  # of the frozen teacher that anchors content and colours
    base_weight: float = 0.5
    anchor_weight: float = 1.0
    texture_weight: float = 0.5
    detail_weight: float = 1.0
    bf16: bool = True
    snapshot_every: int = 250


STAGES: dict[str, type] = {
    "autoencoder": AutoencoderConfig,
    "teacher": TeacherConfig,
    "finish": FinishConfig,
}


def _convert(value: Any, kind: Any, where: str) -> Any:
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, dict):
            raise RecipeError(f"{where} must be a table ([{where}])")
        return _build(kind, value, where + ".")
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_convert(v, get_args(kind)[0], where) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = get_origin(kind) or kind
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise RecipeError(f"{where} = {value!r} must be of type {plain.__name__}")
    return value


def _build(kind: type[T], table: dict[str, Any], prefix: str = "") -> T:
    hints = get_type_hints(kind)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(sorted(hints))}"
            raise RecipeError(f"unknown key {prefix}{key}{hint}")
    values = {k: _convert(v, hints[k], prefix + k) for k, v in table.items()}
    for f in fields(kind):  # type: ignore[arg-type]
        if f.name not in table and f.default is MISSING and f.default_factory is MISSING:
            raise RecipeError(f"the recipe lacks {prefix}{f.name}")
    return kind(**values)


def _override(table: dict[str, Any], assignment: str) -> None:
    key, _, text = assignment.partition("=")
    if not _:
        raise RecipeError(f"--set takes section.key=value, not {assignment!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, name = key.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {assignment}: {section} is a value, not a table")
    table[name] = value


# Floats that are shares or levels, and so lie in 0..1.
_SHARES = {
    "content_from_eta", "drop_style", "ema_decay", "eta", "generated_share", "scale_equivariance",
    "share_art", "share_generated", "start_eta",
}  # fmt: skip
_STORED_SIDE = 32  # stored latents have at least this short side


def _validate(recipe: Any, prefix: str = "") -> None:
    """Ranges that hold for every stage; RecipeError names the first value outside."""
    for f in fields(recipe):
        value, name = getattr(recipe, f.name), prefix + f.name
        if is_dataclass(value):
            _validate(value, name + ".")
        numbers = value if isinstance(value, tuple) else (value,)
        if isinstance(value, tuple) and not value:
            raise RecipeError(f"{name} is empty")
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            low = 0 if f.name == "seed" or isinstance(number, float) else 1
            high = 1 if f.name in _SHARES else _STORED_SIDE if f.name == "window" else math.inf
            if not low <= number <= high or number == math.inf:
                raise RecipeError(f"{name} = {number} is outside {low}..{high}")


def _validate_model(recipe: Any) -> None:
    if isinstance(recipe, TeacherConfig):
        if recipe.share_art + recipe.share_generated <= 0:
            raise RecipeError("share_art and share_generated are both 0; there is nothing to train on")
        if recipe.model.cross_attention_dim % STYLE_HEADS:
            raise RecipeError(f"model.cross_attention_dim must divide by {STYLE_HEADS}")


def _checked(recipe: Any) -> Any:
    _validate(recipe)
    _validate_model(recipe)
    return recipe


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Any:
    """Read a recipe; raise RecipeError on a missing file, a wrong key (naming the nearest) or type."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe {path}; the repository's recipes are in training/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} is not a TOML recipe: {error}") from None
    for assignment in overrides:
        _override(table, assignment)
    stage = table.get("stage", "")
    if not isinstance(stage, str) or stage not in STAGES:
        raise RecipeError(f"{path}: stage = {stage!r}; known stages: {', '.join(STAGES)}")
    return _checked(_build(STAGES[stage], table))


def load_run_recipe(folder: Path) -> Any:
    """The recipe that a run folder keeps; raise RecipeError where there is none."""
    try:
        table = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"{folder} is no run folder (it has no recipe.json); train that stage first"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{folder / 'recipe.json'} cannot be read: {error}") from None
    if not isinstance(table, dict) or table.get("stage") not in STAGES:
        raise RecipeError(f"{folder / 'recipe.json'} names no known stage")
    return _build(STAGES[table["stage"]], table)


# What may change between a run and its continuation; everything else makes it another run.
FREE_KEYS = {"output", "steps", "snapshot_every", "learning_rate", "bf16"}


def check_same_run(config: Any, folder: Path) -> None:
    """RecipeError where ``folder`` holds a run of another recipe than ``config``."""
    before, now = asdict(load_run_recipe(folder)), asdict(config)
    changed = sorted(
        k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k not in FREE_KEYS
    )
    if changed:
        raise RecipeError(
            f"{folder} holds a run with another {changed[0]}; choose another output, or delete the folder"
        )


def as_dict(recipe: Any) -> dict[str, Any]:
    """A recipe as plain values, for printing and for the run folder."""
    return asdict(recipe)
