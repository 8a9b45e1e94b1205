"""A single-file SDXL checkpoint in the original key layout -> a diffusers folder in the cache, in fp16.

diffusers knows the key names; its own loader would build every network in memory first, so only its
renaming is used. Tensors are read from the file, rounded and written one after another: beside the page
cache, no more than a text encoder's reshaped weights is in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from std_rt.core.errors import ExportError
from std_rt.core.files import cache_root, file_digest
from std_rt.export.components import read_config, read_json, resolve
from std_rt.export.quiet import quiet
from std_rt.export.sources.weight_files import Slot, open_weights, read_shapes, write_weights

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
_FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
# A key's beginning that gives another kind of file away, and what that is.
_OTHERS = (
    ("cond_stage_model.transformer.", "a Stable Diffusion 1.x checkpoint"),
    ("cond_stage_model.model.", "a Stable Diffusion 2.x checkpoint"),
    ("conditioner.embedders.0.model.", "an SDXL refiner"),
    ("edm_mean", "a Playground 2.5 checkpoint (an EDM schedule)"),
    ("model.diffusion_model.double_blocks.", "a FLUX checkpoint"),
    ("double_blocks.", "a FLUX checkpoint"),
    ("model.diffusion_model.joint_blocks.", "a Stable Diffusion 3 checkpoint"),
    ("lora_unet_", "a LoRA (give it with --lora)"),
    ("unet.down_blocks.", "a LoRA (give it with --lora)"),
    ("image_proj.", "an IP-Adapter (give it with --ip-adapter)"),
    ("down_blocks.", "one part of a diffusers pipeline (give the folder of the whole)"),
    ("encoder.", "one part of a pipeline"),
)


def check_single_file(path: Path) -> None:
    """Raise ExportError unless the header is that of an SDXL checkpoint; no weight is read."""
    shapes = read_shapes(path, "checkpoint")
    for start, kind in _OTHERS:
        if any(key.startswith(start) for key in shapes):
            raise ExportError(f"{path} is {kind}; std-rt exports SDXL checkpoints")
    if _FIRST not in shapes:
        raise ExportError(f"{path} is no SDXL checkpoint in the original layout: it has no {_FIRST}")
    channels = shapes[_FIRST][1]
    if channels != 4:
        raise ExportError(
            f"{path} takes {channels} channels (inpainting, editing); std-rt exports those of 4"
        )
    for role in ("text_encoder", "text_encoder_2"):
        if not _keys(shapes, role):
            raise ExportError(f"{path} has no {role} in it ({_PREFIXES[role]}*); give the whole checkpoint")


def convert_single_file(path: Path, configs: Path, say: Say, *, own_vae: bool = True) -> Path:
    """The diffusers folder of the checkpoint ``path``, from the cache where it was converted before.

    ``configs`` is a diffusers folder of the same architecture: its configs, tokenizers and scheduler are
    copied. ``own_vae`` False: a checkpoint without a VAE will do. Raises ExportError where a weight is
    missing, left over, of another shape or beyond fp16.
    """
    check_single_file(path)
    shapes = read_shapes(path)
    if own_vae and not _keys(shapes, "vae"):
        raise ExportError(f"{path} has no VAE in it; add --vae fp16-fix")
    root = _root()
    say(f"hashing {path.name}")
    target = root / f"{file_digest(path)[:32]}-{_digest_configs(configs)[:8]}"
    with FileLock(root / f"{target.name}.lock"):
        if target.is_dir():
            say(f"{path.name} was converted before")
            return target
        _check_disk(root, 2 * sum(map(math.prod, shapes.values())))
        try:
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as partial:
                work = Path(partial) / "pipeline"
                _convert(path, shapes, configs, work, say)
                work.rename(target)
        except OSError as error:
            raise ExportError(
                f"{path} cannot be converted into {root}: {' '.join(str(error).split())}"
            ) from error
    return target


def _convert(path: Path, shapes: Shapes, configs: Path, work: Path, say: Say) -> None:
    _copy_configs(configs, work)
    _note_prediction(work, path, shapes)
    with open_weights(path) as file:
        for role in _PREFIXES:
            keys = _keys(shapes, role)
            if not keys:
                shutil.rmtree(work / role)
                continue
            say(f"converting {role} of {path.name}")
            found = _renamed(role, {key: file.get_tensor(key) for key in keys}, work / role, path)
            _check(role, found, work / role, path, configs)
            _write_halves(work / role / f"{_FILES.get(role, 'model')}.safetensors", found, path)


def _keys(shapes: Shapes, role: str) -> list[str]:
    return [key for key in shapes if key.startswith(_PREFIXES[role])]


def _renamed(role: str, state: dict[str, Tensor], folder: Path, path: Path) -> dict[str, Tensor]:
    """Under diffusers' names; ``state`` are views of the file."""
    config = read_config(role, folder)
    try:
        with quiet("diffusers"):
            match role:
                case "unet":
                    found = convert_ldm_unet_checkpoint(state, config)
                case "vae":
                    found = convert_ldm_vae_checkpoint(state, config)
                case "text_encoder":
                    found = convert_ldm_clip_checkpoint(state)
                case _:
                    model = SimpleNamespace(config=SimpleNamespace(**config))
                    found = convert_open_clip_checkpoint(model, state, prefix=_PREFIXES[role])
    except (KeyError, IndexError) as error:
        raise ExportError(f"{path} lacks {error} of its {role}, so it is no SDXL checkpoint") from error
    return {key: value for key, value in found.items() if not key.endswith("position_ids")}


def _check(role: str, found: Mapping[str, Tensor], folder: Path, path: Path, configs: Path) -> None:
    """All weights of the architecture, each in its shape, and no others."""
    wanted = _wanted_shapes(role, read_config(role, folder))
    given = {_bare(key): list(value.shape) for key, value in found.items()}
    hint = f"the configs in {configs} are not its own; give --config FOLDER or hub id of a pipeline like it"
    for text, names in (("lacks", wanted.keys() - given.keys()), ("has", given.keys() - wanted.keys())):
        if names:
            first = min(names)
            raise ExportError(f"{path} {text} {len(names)} weights of the {role}, such as {first}; {hint}")
    for name, shape in given.items():
        if shape != wanted[name]:
            raise ExportError(f"{path} has {name} of the {role} as {shape}, not {wanted[name]}; {hint}")


def _wanted_shapes(role: str, config: dict[str, Any]) -> dict[str, list[int]]:
    kind: Any = resolve(role, config.get("_class_name") or config["architectures"][0])
    with torch.device("meta"), quiet("diffusers", "transformers"):
        if role.startswith("text"):
            module = kind(kind.config_class.from_dict(config))
        else:
            module = kind.from_config(config)
    return {_bare(name): list(value.shape) for name, value in module.state_dict().items()}


def _bare(name: str) -> str:
    """transformers names CLIP's text model with and without this prefix, by version and class."""
    return name.removeprefix("text_model.")


def _write_halves(target: Path, state: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file in fp16, tensor by tensor (the library would hold all of them)."""
    slots = {name: Slot("F16", tuple(value.shape)) for name, value in state.items()}
    write_weights(target, slots, (_half(name, value, path) for name, value in state.items()))


def _half(name: str, value: Tensor, path: Path) -> NDArray[np.float16]:
    half = value.to(torch.float16).contiguous().view(-1)
    if not torch.isfinite(half).all():
        raise ExportError(f"{path} has values in {name} that fp16 cannot hold; it cannot be exported")
    return half.numpy()


def _copy_configs(configs: Path, work: Path) -> None:
    """Texts only. Raises ExportError where ``configs`` is no pipeline."""
    read_json(configs / "model_index.json")
    for source in _config_files(configs):
        place = work / source.relative_to(configs)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
    for role in _PREFIXES:
        read_config(role, work / role)


def _config_files(configs: Path) -> list[Path]:
    folders = (*_PREFIXES, "tokenizer", "tokenizer_2", "scheduler")
    found = [path for folder in folders for path in (configs / folder).glob("*") if path.suffix in _TEXTS]
    kept = [path for path in found if ".index" not in path.name]
    return [configs / "model_index.json", *sorted(kept)]


_TEXTS = (".json", ".txt")


def _note_prediction(work: Path, path: Path, shapes: Shapes) -> None:
    """v-prediction models say so by an empty tensor ``v_pred`` (and ``ztsnr``), or in their metadata."""
    with open_weights(path) as file:
        noted = (file.metadata() or {}).get("modelspec.prediction_type", "")
    changes: dict[str, Any] = {}
    if "v_pred" in shapes or noted in ("v", "v_prediction"):
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in shapes:
        changes["rescale_betas_zero_snr"] = True
    place = work / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(read_json(place) | changes, indent=2), encoding="utf-8")


def _root() -> Path:
    cache = cache_root()
    if cache is None:
        raise ExportError("no cache folder can be written; set STD_RT_CACHE to one that can")
    root = cache / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _digest_configs(configs: Path) -> str:
    found = hashlib.sha256()
    for path in _config_files(configs):
        if path.is_file():
            found.update(f"{path.relative_to(configs).as_posix()} {file_digest(path)}\n".encode())
    return found.hexdigest()


def _check_disk(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed * 1.02:
        raise ExportError(
            f"converting takes {needed / 1e9:.1f} GB and {root} has {free / 1e9:.1f} GB free; "
            "make room, or set STD_RT_CACHE to a folder on another disk"
        )
