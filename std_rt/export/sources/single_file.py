"""A single-file SDXL checkpoint in the original key layout -> a diffusers folder in the cache, in fp16.

diffusers' ``from_single_file`` reads it, with the configs of a pipeline folder and so without the network.
Checked before: what kind of file it is, from its header. Checked after: that every weight found its place and
that fp16 holds it. The pipeline is in memory once in fp16, 7 GB for SDXL, less than the export takes later.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from std_rt.core.errors import ExportError, one_line
from std_rt.core.files import cache_root, file_digest
from std_rt.core.machine import free_disk_gb
from std_rt.models.components import quiet, read_config, read_json
from std_rt.models.weight_files import open_weights, read_shapes

__all__ = ["check_single_file", "convert_single_file"]

Say = Callable[[str], None]
Shapes = Mapping[str, Sequence[int]]

# Part of the pipeline -> prefix in the checkpoint.
_PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
_NOT_WEIGHTS = ("position_ids", "logit_scale")  # in a checkpoint, and of no use to the networks
_PREDICTIONS = ("", "epsilon", "eps", "v", "v_prediction")  # that a checkpoint's metadata may note
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
# A key's beginning that gives another kind of file away, and what that is.
_OTHERS = (
    ("cond_stage_model.transformer.", "a Stable Diffusion 1.x checkpoint"),
    ("cond_stage_model.model.", "a Stable Diffusion 2.x checkpoint"),
    ("conditioner.embedders.0.model.", "an SDXL refiner"),
    ("edm_mean", "a Playground 2.5 checkpoint (an EDM schedule)"),
    ("edm_vpred.", "a CosXL checkpoint (an EDM schedule with v-prediction)"),
    ("model.diffusion_model.double_blocks.", "a FLUX checkpoint"),
    ("double_blocks.", "a FLUX checkpoint"),
    ("model.diffusion_model.joint_blocks.", "a Stable Diffusion 3 checkpoint"),
    ("lora_", "a LoRA (give it with --lora)"),
    ("image_proj.", "an IP-Adapter (give it with --ip-adapter)"),
    ("down_blocks.", "one part of a diffusers pipeline (give the folder of the whole)"),
    ("encoder.", "one part of a pipeline (give the whole)"),
)

# A part of a key that gives packed weights or a LoRA away.
_PACKED = (
    ("scaled_fp8", "has fp8 weights with scales; give the fp16 file of the same model"),
    (".scale_weight", "has fp8 weights with scales; give the fp16 file of the same model"),
    (".weight_scale", "has quantized weights with scales; give the fp16 file of the same model"),
    (".absmax", "has 4-bit weights (bitsandbytes); give the fp16 file of the same model"),
    (".lora_", "is a LoRA (give it with --lora); std-rt exports SDXL checkpoints"),
    ("lora.down.", "is a LoRA (give it with --lora); std-rt exports SDXL checkpoints"),
)


def check_single_file(path: Path) -> None:
    """Raise ExportError unless the header is that of an SDXL checkpoint; no weight is read."""
    shapes = read_shapes(path, "checkpoint")
    for start, kind in _OTHERS:
        if any(key.startswith(start) for key in shapes):
            raise ExportError(f"{path} is {kind}; std-rt exports SDXL checkpoints")
    for mark, trouble in _PACKED:
        if any(mark in key for key in shapes):
            raise ExportError(f"{path} {trouble}")
    if _FIRST not in shapes:
        raise ExportError(f"{path} is not an SDXL checkpoint in the original layout: it has no {_FIRST}")
    channels = shapes[_FIRST][1]
    if channels != 4:
        raise ExportError(
            f"{path} takes {channels} channels (inpainting, editing), which std-rt reads from diffusers "
            "folders only; give the folder or hub id of the pipeline"
        )
    for role in ("text_encoder", "text_encoder_2"):
        if not _has(shapes, role):
            raise ExportError(f"{path} has no {role} in it ({_PREFIXES[role]}*); give the whole checkpoint")


def convert_single_file(path: Path, configs: Path, say: Say, *, own_vae: bool = True) -> Path:
    """The diffusers folder of the checkpoint ``path``, from the cache if it was converted before.

    ``configs`` is a diffusers folder of the same architecture: its configs, tokenizers and scheduler are
    copied. ``own_vae`` False: a checkpoint without a VAE will do. Raises ExportError if a weight is
    missing, left over, of another shape or beyond fp16.
    """
    check_single_file(path)
    shapes = read_shapes(path)
    if own_vae and not _has(shapes, "vae"):
        raise ExportError(f"{path} has no VAE in it; add --vae fp16-fix")
    cache = cache_root()
    if cache is None:
        raise ExportError("no cache folder can be written; set STD_RT_CACHE to one that can")
    root = cache / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    say(f"hashing {path.name}")
    target = root / f"{file_digest(path)[:32]}-{_digest_configs(configs)[:8]}"
    with FileLock(root / f"{target.name}.lock"):
        if target.is_dir():
            say(f"{path.name} was converted before")
            return target
        needed_gb = 2 * sum(map(math.prod, shapes.values())) / 2**30
        if (free_gb := free_disk_gb(root)) < needed_gb * 1.02:
            raise ExportError(
                f"converting takes {needed_gb:.1f} GB and {root} has {free_gb:.1f} GB free; "
                "make room, or set STD_RT_CACHE to a folder on another disk"
            )
        try:
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as partial:
                work = Path(partial) / "pipeline"
                _copy_configs(configs, work)
                _note_prediction(work, path, shapes)
                say(f"converting {path.name}")
                _convert(path, shapes, configs, work)
                work.rename(target)
        except (OSError, SafetensorError) as error:
            raise ExportError(
                f"{path} cannot be converted into {root}: {' '.join(str(error).split())}"
            ) from error
    return target


def _has(shapes: Shapes, role: str) -> bool:
    return any(key.startswith(_PREFIXES[role]) for key in shapes)


def _convert(path: Path, shapes: Shapes, configs: Path, work: Path) -> None:
    """Write the weights of every part into ``work``, which has the configs."""
    from diffusers import StableDiffusionXLPipeline

    left_out = dict.fromkeys(
        ("scheduler", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor", "safety_checker")
    )
    if not _has(shapes, "vae"):
        left_out["vae"] = None
        shutil.rmtree(work / "vae")
    hint = f"the configs in {configs} are not its own; give --config FOLDER or hub id of a pipeline like it"
    with quiet("diffusers", "transformers"):
        try:
            pipeline: Any = StableDiffusionXLPipeline.from_single_file(
                str(path), config=str(configs), torch_dtype=torch.float16, local_files_only=True, **left_out
            )
        # A missing weight is a KeyError in there, one left empty a NotImplementedError, and so on.
        except (LookupError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            reason = one_line(error, 200)
            raise ExportError(f"{path} cannot be read as SDXL ({reason}); {hint}") from error
        for role, prefix in _PREFIXES.items():
            if role in left_out:
                continue
            part = getattr(pipeline, role)
            _check_weights(path, role, part, [key for key in shapes if key.startswith(prefix)], shapes, hint)
            part.save_pretrained(work / role)


def _check_weights(path: Path, role: str, part: Any, keys: Sequence[str], shapes: Shapes, hint: str) -> None:
    """Raise ExportError if a weight is missing or left over, which diffusers only logs, or beyond fp16."""
    state = part.state_dict()
    missing = [name for name, value in state.items() if value.is_meta]
    if missing:
        raise ExportError(f"{path} lacks {len(missing)} weights of the {role}, such as {missing[0]}; {hint}")
    given = sum(math.prod(shapes[key]) for key in keys if not key.endswith(_NOT_WEIGHTS))
    taken = sum(value.numel() for value in part.parameters())
    if given != taken:
        raise ExportError(f"{path} has {given} parameters in its {role}, not {taken}; {hint}")
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise ExportError(f"{path} has values in {name} that fp16 cannot hold; it cannot be exported")


def _copy_configs(configs: Path, work: Path) -> None:
    """Texts only. Raises ExportError if ``configs`` is not a pipeline."""
    read_json(configs / "model_index.json")
    for source in _config_files(configs):
        place = work / source.relative_to(configs)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
    for role in _PREFIXES:
        read_config(role, work / role)


def _config_files(configs: Path) -> list[Path]:
    folders = (*_PREFIXES, "tokenizer", "tokenizer_2", "scheduler")
    found = [path for folder in folders for path in (configs / folder).glob("*")]
    kept = [path for path in found if path.suffix in (".json", ".txt") and ".index" not in path.name]
    return [configs / "model_index.json", *sorted(kept)]


def _note_prediction(work: Path, path: Path, shapes: Shapes) -> None:
    """v-prediction models say so by an empty tensor ``v_pred`` (and ``ztsnr``), or in their metadata."""
    with open_weights(path) as file:
        noted = (file.metadata() or {}).get("modelspec.prediction_type", "")
    changes: dict[str, Any] = {}
    if noted not in _PREDICTIONS:
        raise ExportError(f"{path} says that it predicts {noted!r}; std-rt exports epsilon and v-prediction")
    if "v_pred" in shapes or noted in ("v", "v_prediction"):
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in shapes:
        changes["rescale_betas_zero_snr"] = True
    place = work / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(read_json(place) | changes, indent=2), encoding="utf-8")


def _digest_configs(configs: Path) -> str:
    found = hashlib.sha256()
    for path in _config_files(configs):
        if path.is_file():
            found.update(f"{path.relative_to(configs).as_posix()} {file_digest(path)}\n".encode())
    return found.hexdigest()
