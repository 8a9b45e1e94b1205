"""Recipes: TOML files that say all of a training run, read into frozen dataclasses."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import GRID_POINTS, trajectory_timesteps
from std_rt.models import STYLE_HEADS

T = TypeVar("T")


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
    start_from: str = ""  # a pipeline folder to go on from; empty: random weights
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


LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """The student: low-rank updates of the base's layers, by the ends of the layers' names."""

    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] = LORA_TARGETS


@dataclass(frozen=True)
class BankConfig:
    """The trajectory bank."""

    enabled: bool = True  # false: every state is solved by the teacher from tau (ablation, slow)
    capacity: int = 64  # trajectories per latent size
    stored_conditioning: bool = True  # false: another trajectory's, as the released code has it (ablation)
    spread: bool = True  # begin with the bank's trajectories spread over t, so that no wave goes through
    device: str = "auto"  # where its tensors lie: beside the networks; cpu saves their memory, costs copies


@dataclass(frozen=True)
class AdversarialConfig:
    """The asymmetric adversarial loss; weight 0 leaves it out."""

    weight: float = 0.0
    features: str = "dinov2"  # or "style": std-tiny's style encoder on latents, which needs no download
    dino: str = "facebook/dinov2-small"  # hub id or folder
    blocks: tuple[int, ...] = (2, 5, 8, 11)
    size_px: int = 224
    real: str = "below"  # real latents at r < s; "same": r = s (ablation)
    learning_rate: float = 5e-5
    r1: float = 1e-5
    start_step: int = 0


@dataclass(frozen=True)
class PicturesConfig:
    """Training pictures or videos, with captions where there are any."""

    folder: str = ""
    kind: str = "auto"  # pictures, videos, webdataset
    resolution_px: int = 512
    buckets: bool = True  # sizes by aspect ratio; false: squares
    caption_key: str = "text"
    caption: str = ""  # for files without one
    flip: bool = True
    centre: bool = False
    workers: int = 2
    cache: str = ""  # folder for latents and embeddings; empty: none


@dataclass(frozen=True)
class LatentsConfig:
    """In the place of pictures: stored latents of a std-tiny teacher's run."""

    file: str = ""
    side: int = 16  # of the crops, in latent pixels
    paired: float = 1.0  # share with a known target; the others: a photo under an unrelated style, as in use
    share_art: float = 0.6  # (artwork, its content version) among these; the others: generated styles


@dataclass(frozen=True)
class SheetConfig:
    """Held-out pictures for the periodic sheets; empty: no sheets."""

    contents: str = ""
    styles: str = ""
    pairs: int = 6
    size_px: int = 256


@dataclass(frozen=True)
class DistilConfig:
    """Recipe of the distillation stage: a few-step LoRA of a base."""

    output: str
    base: str
    stage: str = "distil"
    method: str = "std"
    seed: int = 0
    steps: int = 10_000  # optimizer steps
    batch: int = 1  # samples a micro-batch and process
    accumulate: int = 16
    learning_rate: float = 5e-6
    rate_schedule: str = "cosine"  # or constant
    warmup: int = 500
    weight_decay: float = 0.0
    max_grad_norm: float = 10.0
    optimizer: str = "adamw"  # or adamw8bit (bitsandbytes)
    eta: float = 0.75
    tau: int = 0  # a grid timestep; 0: that of eta
    run_steps: tuple[int, ...] = (2, 4, 6, 8)  # step counts the LoRA is for; the first is not special
    stride: int = 1  # grid points of one teacher step: more spread what is learned faster, and coarser
    window: float = 0.5  # s lies at most window * ceil(50 eta) grid points below t
    phases: int = 4  # pcm only
    guidance: tuple[float, ...] = (6.0, 16.0)  # range of the teacher's scale; w = scale - 1
    drop_conditioning: float = 0.1
    ema_decay: float = 0.95
    ema_target: bool = True  # false: the online weights are the target (ablation)
    huber_c: float = 1e-3
    precision: str = "bf16"  # fp16, fp32
    gradient_checkpointing: bool = False
    snapshot_every: int = 500
    log_every: int = 10
    lora: LoraConfig = field(default_factory=LoraConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    sheet: SheetConfig = field(default_factory=SheetConfig)


STAGES: dict[str, type] = {
    "autoencoder": AutoencoderConfig,
    "teacher": TeacherConfig,
    "finish": FinishConfig,
    "distil": DistilConfig,
}

# The published STD LoRAs start two grid points above the rule of eta.
PUBLISHED_TAU = {0.65: 679, 0.75: 779, 0.85: 879, 0.95: 979}

# Texts that are one of a few.
CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("std", "tcd", "lcm", "pcm"),
    "rate_schedule": ("cosine", "constant"),
    "optimizer": ("adamw", "adamw8bit"),
    "precision": ("bf16", "fp16", "fp32"),
    "features": ("dinov2", "style"),
    "real": ("below", "same"),
    "device": ("auto", "cpu"),
    "kind": ("auto", "pictures", "videos", "webdataset"),
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
    "content_from_eta", "drop_conditioning", "drop_style", "ema_decay", "eta", "generated_share",
    "paired", "scale_equivariance", "share_art", "share_generated", "start_eta", "window",
}  # fmt: skip
_FROM_ZERO = {"blocks", "seed", "start_step", "tau", "warmup", "workers"}  # whole numbers that may be 0
_POSITIVE = {"eta", "huber_c", "alpha", "max_grad_norm", "learning_rate", "window"}
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
            low = 0 if f.name in _FROM_ZERO or isinstance(number, float) else 1
            share = f.name in _SHARES and isinstance(number, float)
            high = 1 if share else _STORED_SIDE if f.name in ("window", "side") else math.inf
            if not low <= number <= high or number == math.inf or (f.name in _POSITIVE and not number):
                raise RecipeError(f"{name} = {number} is outside {low}..{high}")
        if f.name in CHOICES and value not in CHOICES[f.name]:
            near = difflib.get_close_matches(value, CHOICES[f.name], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RecipeError(f"{name} = {value!r} is none of {', '.join(CHOICES[f.name])}{hint}")


def _validate_model(recipe: Any) -> None:
    if isinstance(recipe, TeacherConfig):
        if recipe.share_art + recipe.share_generated <= 0:
            raise RecipeError("share_art and share_generated are both 0; there is nothing to train on")
        if recipe.model.cross_attention_dim % STYLE_HEADS:
            raise RecipeError(f"model.cross_attention_dim must divide by {STYLE_HEADS}")


def _validate_distil(recipe: DistilConfig) -> None:
    """What must fit together; RecipeError names the first that does not."""
    try:
        tau = distil_tau(recipe)
        for count in (*recipe.run_steps, recipe.phases if recipe.method == "pcm" else 1):
            trajectory_timesteps(recipe.eta, count, start=tau)
    except ValueError as error:
        raise RecipeError(f"eta, tau, run_steps and phases do not fit together: {error}") from None
    points = target_window(recipe.eta, recipe.window, tau)
    if recipe.stride > points:
        raise RecipeError(f"stride = {recipe.stride} is more than the window of {points} grid points")
    rule = trajectory_timesteps(recipe.eta, 1)[0]
    known = (rule, PUBLISHED_TAU.get(recipe.eta, rule))
    if tau not in known:
        raise RecipeError(
            f"tau = {tau} is not of eta {recipe.eta:g}: set tau = {known[1]} (published) or 0 for {rule}"
            if known[1] != rule
            else f"tau = {tau} is not of eta {recipe.eta:g}: set tau = 0 for {rule}"
        )
    low_high = recipe.guidance
    if len(low_high) != 2 or low_high[0] > low_high[1]:
        raise RecipeError(f"guidance = {list(low_high)} must be a range [low, high]")
    if bool(recipe.pictures.folder) == bool(recipe.latents.file):
        raise RecipeError("give either pictures.folder or latents.file: one of them is what is trained on")
    if bool(recipe.sheet.contents) != bool(recipe.sheet.styles) and recipe.latents.file:
        raise RecipeError("sheet.contents and sheet.styles belong together: give both or none")
    if recipe.bank.enabled and recipe.method == "std" and recipe.bank.capacity < 2 * recipe.batch:
        raise RecipeError(
            f"bank.capacity = {recipe.bank.capacity} must be at least twice the batch of {recipe.batch}"
        )


def target_window(eta: float, rate: float, tau: int) -> int:
    """How many grid points below t the target s may lie: ``rate * ceil(50 eta)`` (the error bound).

    Rounded up, and of the points from ``tau`` where those are more, so that with a rate of one half
    both jumps of a 2-step run lie inside, also for the published LoRAs, which start above eta's tau.
    """
    points = max(math.ceil(GRID_POINTS * eta - 1e-9), (tau + 1) // 20)
    return max(1, math.ceil(rate * points - 1e-9))


def distil_tau(recipe: DistilConfig) -> int:
    """The timestep at which the trajectory starts; ValueError where it is not on the grid."""
    return trajectory_timesteps(recipe.eta, 1, start=recipe.tau or None)[0]


def _checked(recipe: Any) -> Any:
    _validate(recipe)
    _validate_model(recipe)
    if isinstance(recipe, DistilConfig):
        _validate_distil(recipe)
    return recipe


def load_recipe(path: Path, overrides: tuple[str, ...] = (), given: dict[str, Any] | None = None) -> Any:
    """Read a recipe; raise RecipeError on a missing file, a wrong key (naming the nearest) or type.

    ``overrides`` are ``section.key=value`` texts, ``given`` top-level values; they win in this order.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe {path}; the repository's recipes are in training/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} is not a TOML recipe: {error}") from None
    for assignment in overrides:
        _override(table, assignment)
    table |= given or {}
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
FREE_KEYS = {
    "bf16", "gradient_checkpointing", "learning_rate", "log_every", "output", "pictures.cache",
    "pictures.workers", "precision", "sheet", "snapshot_every", "steps",
}  # fmt: skip


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_same_run(config: Any, folder: Path) -> None:
    """RecipeError where ``folder`` holds a run of another recipe than ``config``."""
    before, now = _flat(asdict(load_run_recipe(folder))), _flat(asdict(config))
    changed = sorted(
        k
        for k in before.keys() | now.keys()
        if before.get(k) != now.get(k) and not {k, k.split(".")[0]} & FREE_KEYS
    )
    if changed:
        raise RecipeError(
            f"{folder} holds a run with another {changed[0]}; choose another output, or delete the folder"
        )


def as_dict(recipe: Any) -> dict[str, Any]:
    """A recipe as plain values, for printing and for the run folder."""
    return asdict(recipe)
