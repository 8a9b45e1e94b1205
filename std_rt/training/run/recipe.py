"""Recipes: TOML files that describe a whole training run, read into frozen dataclasses."""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from std_rt.core.errors import RecipeError
from std_rt.core.schedule import GRID_POINTS, trajectory_timesteps
from std_rt.models import STYLE_HEADS

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Counts = Annotated[tuple[Count, ...], Meta(min_length=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]
Amount = Annotated[float, Meta(ge=0, le=1e9)]  # the upper end keeps infinity out
Pair = tuple[Count, Count]
Positive = Annotated[float, Meta(gt=0, le=1e9)]
CropSide = Annotated[int, Meta(ge=32, multiple_of=8)]  # px
Side = Annotated[int, Meta(ge=1, le=32)]  # in latent pixels
Precision = Literal["auto", "bf16", "fp16", "fp32"]


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
    seed: Whole = 0
    steps: Count = 10_000
    batch: Count = 16
    crop_px: Count = 96
    learning_rate: Positive = 1e-3
    latent_noise: Amount = 0.05  # of the latents' standard deviation
    scale_equivariance: Share = 0.25  # share of steps that decode half-size latents
    high_pass: Amount = 1.0  # weight of the gradient loss against the plain L1
    generated_share: Share = 0.25
    bf16: bool = True
    snapshot_every: Count = 500
    log_every: Count = 50
    channels: Pair = (64, 128)  # at a quarter and at an eighth of the picture's size
    encoder_channels: Pair | None = None  # left out: the decoder's
    encoder_blocks: Count = 2
    decoder_blocks: Count = 3
    quarter_blocks: Pair | None = None  # (encoder's, decoder's) at a quarter; left out: as at an eighth
    latent_channels: Count = 8
    shortcut: bool = False  # a linear code of 8x8 patches beside the convolutions, at next to no cost
    device: Literal["auto", "cpu", "cuda"] = "cpu"  # auto: CUDA where there is one
    start_from: str = ""  # autoencoder folder whose weights are copied as far as the shapes overlap
    latents_like: str = ""  # autoencoder folder whose latents the first channels should keep near
    latents_weight: Amount = 0.2
    triplets: str = ""  # folder of triplets, for their stylized pictures; empty: none
    stylized_share: Share = 0.5  # of each batch, where there are triplets
    perceptual: str = ""  # VGG-19 or SqueezeNet weights; empty: no perceptual losses
    feature_weight: Amount = 0.5
    gram_weight: Amount = 0.5


@dataclass(frozen=True)
class UNetConfig:
    """Size of the small SDXL-layout UNet and its style encoder."""

    block_out_channels: Counts = (96, 128, 192)
    layers_per_block: Count = 1
    cross_attention_dim: Count = 192
    attention_head_dim: Count = 32
    style_tokens: Count = 16
    pooled_dim: Count = 256


@dataclass(frozen=True)
class SheetConfig:
    """Held-out pictures for the periodic sheets; empty: no sheets."""

    contents: str = ""
    styles: str = ""
    pairs: Count = 6
    size_px: Count = 256


LOWEST_START_ETA = 0.4  # of the stylist stage


@dataclass(frozen=True)
class StylistConfig:
    """Recipe of the triplet stage: a UNet that sees the content, taught by stylized pictures."""

    output: str
    autoencoder: str
    triplets: str
    stage: str = "stylist"
    start_from: str = ""  # a stylist's pipeline folder to go on from; empty: random weights
    seed: Whole = 0
    steps: Count = 3_200
    styles: Count = 12  # of a step
    photos: Count = 3  # under each of them
    crop_px: CropSide = 128
    style_px: CropSide = 256
    learning_rate: Positive = 5e-4
    warmup: Whole = 200
    cooldown: Whole = 270  # steps at the end in which the rate falls in a straight line
    ema_decay: Share = 0.99
    drop_style: Share = 0.05
    reverse: bool = False  # a destylizer: from the stylized picture to the photo, never told a style
    snr_ratio: Positive = 6.0
    eta: PositiveShare = 0.75  # of the run that ships: half of all trajectories start here
    start_eta: Annotated[float, Meta(ge=LOWEST_START_ETA, le=1)] = 0.95  # highest level trained
    run_steps: Counts = (1, 1, 2, 4)  # nine in ten samples lie on these runs' timesteps
    perceptual: str = ""  # VGG-19 or SqueezeNet weights: the decoded estimate must look like the target
    look_weight: Amount = 0.5
    own_styles: Whole = 0  # of `styles`: those whose samples are the network's own runs; needs `perceptual`
    generated_styles: Whole = 0  # of `own_styles`: drawn at random, their targets exact
    own_steps: Counts = (1, 2, 2, 2, 4)  # lengths of those runs
    style_weight: Amount = 2.0
    colour_weight: Amount = 1.0
    content_weight: Amount = 0.25
    lattice_weight: Amount = 0.0  # against a pattern of the decoder's period on flat ground
    # Own runs of each step that are run again on parts of their photos: the two must agree, and at the
    # part's edges it must follow the whole.
    steady_photos: Whole = 0
    steadiness_weight: Amount = 0.5
    edge_weight: Amount = 1.0
    # Above 0 the decoder is trained too, and is held by pictures that must come back through it.
    reconstruction_weight: Amount = 0.0
    bf16: bool = False  # for GPUs, and processors that have it
    device: Literal["auto", "cpu", "cuda"] = "cpu"  # auto: CUDA where there is one
    snapshot_every: Count = 250
    log_every: Count = 50
    sheet: SheetConfig = field(default_factory=lambda: SheetConfig(pairs=8))
    model: UNetConfig = field(default_factory=UNetConfig)


@dataclass(frozen=True)
class MotionStageConfig:
    """Recipe of the motion stage: motion modules for std-tiny, taught by generated clips."""

    output: str
    base: str  # a stylist's pipeline folder
    photos: str
    art: str
    perceptual: str  # VGG-19 or SqueezeNet weights
    stage: str = "motion"
    seed: Whole = 0
    steps: Count = 1_500
    frames: Annotated[tuple[Annotated[int, Meta(ge=3)], ...], Meta(min_length=1)] = (8, 8, 8, 8, 16)
    crop_px: CropSide = 128
    learning_rate: Positive = 3e-3  # of what comes out of the modules; all else a sixth of it
    ema_decay: Share = 0.99
    eta: PositiveShare = 0.75
    own_steps: Counts = (1, 2, 2)  # lengths of the runs
    steadiness_weight: Amount = 15.0
    style_weight: Amount = 2.0
    kept_weight: Amount = 1.0
    bf16: bool = False  # for GPUs, and processors that have it
    device: Literal["auto", "cpu", "cuda"] = "cpu"  # auto: CUDA where there is one
    snapshot_every: Count = 250
    log_every: Count = 50


LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """The student: low-rank updates of the base's layers, by the ends of the layers' names."""

    rank: Count = 64
    alpha: Positive = 64.0
    targets: Annotated[tuple[str, ...], Meta(min_length=1)] = LORA_TARGETS


@dataclass(frozen=True)
class BankConfig:
    """The trajectory bank."""

    enabled: bool = True  # false: every state is solved by the teacher from tau (ablation, slow)
    capacity: Count = 64  # trajectories per latent size
    stored_conditioning: bool = True  # false: another trajectory's, as in the released code (ablation)
    spread: bool = True  # start with trajectories at random t, so that they do not all go down together
    device: Literal["auto", "cpu"] = "auto"  # beside the networks; cpu saves their memory and costs copies


@dataclass(frozen=True)
class AdversarialConfig:
    """The asymmetric adversarial loss; weight 0 leaves it out."""

    weight: Amount = 0.0
    # style: std-tiny's style encoder, on latents; perceptual: VGG-19 or SqueezeNet, on decoded pictures
    features: Literal["dinov2", "style", "perceptual"] = "dinov2"
    perceptual: str = ""  # the weight file of that
    dino: str = "facebook/dinov2-small"  # hub id or folder
    blocks: Annotated[tuple[Whole, ...], Meta(min_length=1)] = (2, 5, 8, 11)
    size_px: Count = 224
    real: Literal["below", "same"] = "below"  # real latents at r < s; "same": r = s (ablation)
    # last: only jumps that end clean, against the clean picture, whatever ``real`` says
    jumps: Literal["all", "last"] = "all"
    learning_rate: Positive = 5e-5  # scaled and scheduled as the student's
    r1: Amount = 1e-5
    start_step: Whole = 0


@dataclass(frozen=True)
class PicturesConfig:
    """Training pictures or videos, with captions if there are any."""

    folder: str = ""
    kind: Literal["auto", "pictures", "videos", "webdataset"] = "auto"
    resolution_px: Count = 512
    buckets: bool = True  # sizes by aspect ratio; false: squares
    caption_key: str = "text"
    caption: str = ""  # for files without one
    flip: bool = True
    centre: bool = False
    workers: Whole = 2
    cache: str = ""  # folder for latents and embeddings; empty: none


@dataclass(frozen=True)
class StyleConfig:
    """Style pictures for a distillation on pictures; std-tiny has an adapter of its own, SDXL an IP-Adapter.

    An SDXL without ``adapter`` is distilled on text alone.
    """

    adapter: str = ""  # IP-Adapter file for SDXL, Plus or plain, .safetensors or .bin
    encoder: str = ""  # folder of its CLIP image encoder; empty: the base's, or the one beside the adapter
    layers: str = "published"  # as --style-layers of the export: published, all, or prefixes
    # A picture's style is another crop of itself, another picture in a folder of the same name, or any.
    pairing: Literal["crop", "style", "any"] = "crop"
    folder: str = ""  # of style pictures; empty: the pictures themselves
    crops: Count = 4  # of each style picture, where pictures.cache keeps their tokens
    precompute: bool = False  # all of them before the first step, and the image encoder is not kept

    @property
    def used(self) -> bool:
        """Whether the recipe says anything of styles."""
        return self != StyleConfig()


@dataclass(frozen=True)
class TripletsConfig:
    """Triplets as the data of std-tiny, instead of pictures."""

    folder: str = ""
    side: Side = 16  # of the crops, in latent pixels
    paired: Share = 1.0  # share with a known target; the others: a photo under an unrelated style, as in use


@dataclass(frozen=True)
class MotionConfig:
    """Clips instead of pictures: an AnimateDiff motion adapter in the UNet; without one, pictures."""

    adapter: str = ""  # folder or hub id of a diffusers MotionAdapter for SDXL
    frames: Annotated[int, Meta(ge=2)] = 8  # of a sample; at most as many as the adapter has positions
    interval: Count = 4  # frames of the clip from one of the sample to the next
    # What the consistency loss compares. difference: of neighbouring frames; low, high: frequencies in
    # time; head: a small network that trains along and is not exported, its average on the target's side
    representation: Literal["raw", "difference", "low", "high", "head"] = "raw"
    head_decay: Share = 0.95  # of that moving average
    judged: Count = 2  # frames of a clip that the discriminator is shown
    own_starts: Share = 0.5  # mcm: share of states that start from the student's own one-jump result


@dataclass(frozen=True)
class DistilConfig:
    """Recipe of the distillation stage: a few-step LoRA of a base."""

    output: str
    base: str
    stage: str = "distil"
    method: Literal["std", "tcd", "lcm", "pcm", "mcm", "dmd"] = "std"
    seed: Whole = 0
    steps: Count = 10_000  # optimizer steps
    batch: Count = 1  # samples a micro-batch and process
    accumulate: Count = 16
    learning_rate: Positive = 5e-6
    rate_per_images: Whole = 0  # images per optimizer step that the learning rates are for; 0: any number
    rate_schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Whole = 500
    weight_decay: Amount = 0.0
    max_grad_norm: Positive = 10.0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit needs bitsandbytes
    eta: PositiveShare = 0.75
    tau: Whole = 0  # a grid timestep; 0: that of eta
    run_steps: Counts = (2, 4, 6, 8)  # step counts the LoRA is for
    stride: Count = 1  # grid points of one teacher step: more is faster and coarser
    window: PositiveShare = 0.5  # s lies at most window * ceil(50 eta) grid points below t
    phases: Count = 4  # pcm only
    score_rate: Positive = 5.0  # dmd only: learning rate of its second LoRA, in the student's
    guidance: tuple[Amount, Amount] = (6.0, 16.0)  # range of the teacher's scale; w = scale - 1
    drop_conditioning: Share = 0.1
    ema_decay: Share = 0.95
    ema_target: bool = True  # false: the online weights are the target (ablation)
    huber_c: Positive = 1e-3
    precision: Precision = "auto"  # fp16 on CUDA, else bf16
    gradient_checkpointing: bool = False
    compile: bool = False  # the UNet's transformer blocks
    snapshot_every: Count = 500
    log_every: Count = 10
    lora: LoraConfig = field(default_factory=LoraConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    style: StyleConfig = field(default_factory=StyleConfig)
    triplets: TripletsConfig = field(default_factory=TripletsConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)
    sheet: SheetConfig = field(default_factory=SheetConfig)


STAGES: dict[str, type] = {
    "autoencoder": AutoencoderConfig,
    "stylist": StylistConfig,
    "motion": MotionStageConfig,
    "distil": DistilConfig,
}

# The published STD LoRAs start two grid points above the rule of eta.
PUBLISHED_TAU = {0.65: 679, 0.75: 779, 0.85: 879, 0.95: 979}


def _build(kind: type, table: dict[str, Any]) -> Any:
    """A dataclass from plain values; RecipeError names the first key or value that does not fit."""
    _check_keys(kind, table)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise RecipeError(_explain(str(error), kind, table)) from None


def _check_keys(kind: type, table: dict[str, Any], prefix: str = "") -> None:
    hints = get_type_hints(kind)
    for key, value in table.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(sorted(hints))}"
            raise RecipeError(f"unknown key {prefix}{key}{hint}")
        if isinstance(value, dict) and hasattr(hints[key], "__dataclass_fields__"):
            _check_keys(hints[key], value, f"{prefix}{key}.")


def _explain(message: str, kind: type, table: dict[str, Any]) -> str:
    """msgspec's message (``Expected `int` >= 1 - at `$.lora.rank` ``) with the recipe's own words."""
    what, _, path = message.replace("`", "").replace(" | null", "").partition(" - at $.")
    if what.startswith("Object missing required field "):
        return f"the recipe lacks {path + '.' if path else ''}{what.split()[-1]}"
    value: Any = table
    hint: Any = kind
    for part in path.replace("[", ".[").split("."):
        if part.startswith("["):
            value = value[int(part.strip("[]"))]
        else:
            value, hint = value[part], get_type_hints(hint)[part]
    if what.startswith("Invalid enum value"):
        near = difflib.get_close_matches(str(value), get_args(hint), 1)
        suggestion = f"; did you mean {near[0]}?" if near else ""
        return f"{path} = {value!r} must be one of {', '.join(get_args(hint))}{suggestion}"
    for theirs, ours in (("object", f"a table ([{path}])"), ("array", "a list"), ("str", "text")):
        what = re.sub(rf"\b{theirs}\b", ours, what)
    return f"{path} = {value!r}: {what[0].lower()}{what[1:]}"


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


def _check_stylist(recipe: StylistConfig) -> None:
    if recipe.model.cross_attention_dim % STYLE_HEADS:
        raise RecipeError(f"model.cross_attention_dim must be a multiple of {STYLE_HEADS}")
    if recipe.reverse and recipe.own_styles:
        raise RecipeError("reverse learns from triplets alone; set own_styles = 0")
    if recipe.own_styles > recipe.styles:
        raise RecipeError(f"own_styles = {recipe.own_styles} is more than styles = {recipe.styles}")
    if recipe.own_styles and not recipe.perceptual:
        raise RecipeError(
            "own_styles needs a perceptual network; set perceptual to its weights, or own_styles = 0"
        )
    if recipe.own_styles and recipe.crop_px < 64:
        raise RecipeError(
            f"crop_px = {recipe.crop_px}: own runs are judged without 16 px at each edge; "
            "set it to 64 or more"
        )
    if recipe.lattice_weight and not recipe.perceptual:
        raise RecipeError(
            "lattice_weight needs a perceptual network; set perceptual to its weights, or lattice_weight = 0"
        )
    own_runs = recipe.own_styles * recipe.photos
    if recipe.steady_photos > own_runs:
        raise RecipeError(
            f"steady_photos = {recipe.steady_photos} is more than the {own_runs} own runs of a step "
            "(own_styles x photos)"
        )
    if recipe.generated_styles > recipe.own_styles:
        raise RecipeError(
            f"generated_styles = {recipe.generated_styles} is more than own_styles = {recipe.own_styles}"
        )
    try:
        trajectory_timesteps(min(LOWEST_START_ETA, recipe.eta), max(recipe.run_steps))
        trajectory_timesteps(recipe.eta, max(recipe.own_steps))
    except ValueError as error:
        raise RecipeError(f"eta, run_steps and own_steps do not fit together: {error}") from None
    _check_sheet(recipe.sheet)


def _check_sheet(sheet: SheetConfig) -> None:
    if bool(sheet.contents) != bool(sheet.styles):
        raise RecipeError("set both sheet.contents and sheet.styles, or neither")


def _check_distil(recipe: DistilConfig) -> None:
    """Values that must fit together; RecipeError names the first that does not."""
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
    published = PUBLISHED_TAU.get(recipe.eta, rule)
    if tau not in (rule, published):
        other = f"{published} (published) or " if published != rule else ""
        raise RecipeError(f"tau = {tau} does not belong to eta {recipe.eta:g}; set {other}0 for {rule}")
    if recipe.guidance[0] > recipe.guidance[1]:
        raise RecipeError(f"guidance = {list(recipe.guidance)} must be a range [low, high]")
    if bool(recipe.pictures.folder) == bool(recipe.triplets.folder):
        raise RecipeError("set the data to train on: pictures.folder or triplets.folder, only one of them")
    if not recipe.pictures.folder:
        _check_sheet(recipe.sheet)
    if recipe.bank.enabled and recipe.method == "std" and recipe.bank.capacity < 2 * recipe.batch:
        raise RecipeError(
            f"bank.capacity = {recipe.bank.capacity} must be at least twice the batch of {recipe.batch}"
        )


def _check_parts(recipe: DistilConfig) -> None:
    """Tables of a distillation that must fit each other; RecipeError names the first that does not."""
    style = recipe.style
    if style.used and not recipe.pictures.folder:
        raise RecipeError("[style] goes with pictures.folder; triplets bring their styles along")
    if style.folder and style.pairing == "crop":
        raise RecipeError('style.folder is not read with style.pairing = "crop"; set it to "any" or "style"')
    if style.precompute and not recipe.pictures.cache:
        raise RecipeError("style.precompute keeps tokens in pictures.cache; set that to a folder")
    judge = recipe.adversarial
    if judge.jumps == "last" and judge.features == "style":
        raise RecipeError(
            'adversarial.jumps = "last" judges decoded pictures, and adversarial.features = "style" sees '
            'latents; set features = "dinov2" or "perceptual", or jumps = "all"'
        )
    if judge.weight and judge.features == "perceptual" and not judge.perceptual:
        raise RecipeError(
            'adversarial.features = "perceptual" needs its weights: set adversarial.perceptual=FILE, '
            "VGG-19 or SqueezeNet (docs/training.md)"
        )
    _check_motion(recipe)
    if recipe.method in ("mcm", "dmd") and judge.weight and judge.jumps == "all":
        raise RecipeError(
            f'method = "{recipe.method}" jumps to the clean end, below which no real picture lies; '
            'set adversarial.jumps = "last", or adversarial.weight = 0'
        )
    if recipe.method == "dmd" and recipe.gradient_checkpointing:
        raise RecipeError(
            'method = "dmd" swaps the weights of one UNet, which gradient_checkpointing would run again with '
            "the wrong ones; set it to false"
        )


def _check_motion(recipe: DistilConfig) -> None:
    """What a distillation of clips needs and excludes; RecipeError names the first that does not fit."""
    motion = recipe.motion
    if not motion.adapter:
        if recipe.method == "mcm":
            raise RecipeError(
                'method = "mcm" is for clips; set motion.adapter, or method = "lcm" for pictures'
            )
        if motion != MotionConfig():
            raise RecipeError(
                "[motion] is for clips; set motion.adapter to a motion adapter's folder or hub id"
            )
        return
    if not recipe.pictures.folder:
        raise RecipeError("motion.adapter trains on clips; set pictures.folder to a folder of them")
    if recipe.pictures.kind not in ("auto", "videos"):
        raise RecipeError(
            f'pictures.kind = "{recipe.pictures.kind}" has no clips, which motion.adapter needs; set "videos"'
        )
    if motion.judged > motion.frames:
        raise RecipeError(f"motion.judged = {motion.judged} is more than motion.frames = {motion.frames}")
    if recipe.method == "dmd":
        raise RecipeError('method = "dmd" is for pictures; take out motion.adapter, or set method = "std"')


def target_window(eta: float, rate: float, tau: int) -> int:
    """How many grid points below t the target s may lie: ``rate * ceil(50 eta)`` (the error bound).

    Rounded up, and of the points from ``tau`` if those are more, so that with a rate of one half
    both jumps of a 2-step run lie inside, also for the published LoRAs, which start above eta's tau.
    """
    points = max(math.ceil(GRID_POINTS * eta - 1e-9), (tau + 1) // 20)
    return max(1, math.ceil(rate * points - 1e-9))


def learning_rates(recipe: DistilConfig, processes: int = 1) -> tuple[float, float]:
    """The highest rates of the student and of the discriminator; both grow with the images of a step."""
    images = recipe.batch * recipe.accumulate * processes
    scale = images / recipe.rate_per_images if recipe.rate_per_images else 1.0
    return recipe.learning_rate * scale, recipe.adversarial.learning_rate * scale


def describe_rates(recipe: DistilConfig, processes: int = 1) -> str:
    """What the learning rates come to, in a line."""
    student, heads = learning_rates(recipe, processes)
    judge = f", {heads:.3g} of the discriminator" if recipe.adversarial.weight else ""
    images = recipe.batch * recipe.accumulate * processes
    scaled = f", scaled by {images}/{recipe.rate_per_images}" if recipe.rate_per_images else ""
    of = "one process" if processes == 1 else f"{processes} processes"
    return f"learning rate at most {student:.3g}{judge}: {images} images per step of {of}{scaled}"


def distil_tau(recipe: DistilConfig) -> int:
    """The timestep at which the trajectory starts; ValueError if it is not on the grid."""
    return trajectory_timesteps(recipe.eta, 1, start=recipe.tau or None)[0]


def load_recipe(path: Path, overrides: tuple[str, ...] = (), given: dict[str, Any] | None = None) -> Any:
    """Read a recipe; RecipeError on a missing file, a wrong key (naming the nearest) or a wrong value.

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
    recipe = _build(STAGES[stage], table)
    if isinstance(recipe, StylistConfig):
        _check_stylist(recipe)
    if isinstance(recipe, DistilConfig):
        _check_distil(recipe)
        _check_parts(recipe)
    return recipe


def load_run_recipe(folder: Path) -> Any:
    """The recipe stored in a run folder; RecipeError if there is none."""
    try:
        table = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"{folder} is not a run folder (it has no recipe.json); train that stage first"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{folder / 'recipe.json'} cannot be read: {error}") from None
    if not isinstance(table, dict) or table.get("stage") not in STAGES:
        raise RecipeError(f"{folder / 'recipe.json'} names no known stage")
    return _build(STAGES[table["stage"]], table)


# What may change between a run and its continuation; everything else makes it another run.
FREE_KEYS = {
    "bank.device", "bf16", "compile", "device", "gradient_checkpointing", "learning_rate", "log_every",
    "output", "pictures.cache", "pictures.workers", "precision", "rate_per_images", "sheet", "snapshot_every",
    "steps", "style.precompute",
}  # fmt: skip


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_same_run(config: Any, folder: Path) -> dict[str, tuple[Any, Any]]:
    """What changes in the run of ``folder`` with ``config``: key -> (before, now).

    RecipeError if that makes it another run.
    """
    before, now = _flat(asdict(load_run_recipe(folder))), _flat(asdict(config))
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    for key in keys:
        if not {key, key.split(".")[0]} & FREE_KEYS:
            raise RecipeError(
                f"{folder} holds a run with another {key}; choose another output or delete the folder"
            )
    return {key: (before.get(key), now.get(key)) for key in keys if key not in ("output", "steps")}


def as_dict(recipe: Any) -> dict[str, Any]:
    """A recipe as plain values, for printing and for the run folder."""
    return asdict(recipe)
