"""LoRA fusing, into the UNet (and text encoders) in fp32, before anything is traced.

Key names of diffusers (three generations), PEFT and kohya are read, for the UNet in diffusers' or in the
original model's terms. Layers are merged one at a time straight from the file: beside the model itself no
more than one layer's weight is in memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from std_rt.core.base_model import unet_digest
from std_rt.core.errors import ExportError
from std_rt.models.weight_files import open_weights, read_shapes, weight_files

__all__ = ["check_lora", "fuse_lora", "original_names", "read_metadata", "source_digest"]

# NAME.lora_A.weight (PEFT), NAME.lora_down.weight (kohya), NAME.lora.down.weight, NAME_lora.down.weight and
# NAME.lora_linear_layer.down.weight (diffusers, newest to oldest) are one thing.
_DOWN = re.compile(r"(.+?)(?:\.lora_(?:A|down)(?:\.default)?|[._]lora(?:_linear_layer)?\.down)\.weight")
_UP = re.compile(r"(.+?)(?:\.lora_(?:B|up)(?:\.default)?|[._]lora(?:_linear_layer)?\.up)\.weight")
_ALPHA = re.compile(r"(.+)\.alpha")

_PREFIXES = (
    ("lora_unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
    ("unet.", "unet"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
)
_OTHER_KINDS = (
    ("dora_scale", "a DoRA"),
    ("lora_magnitude_vector", "a DoRA"),
    ("hada_", "a LoHa"),
    ("lokr_", "a LoKr"),
    ("oft_", "an OFT"),
    ("lora_mid", "a LoCon with a Tucker core"),
    ("lora_embedding_", "a LoRA of word embeddings"),
    (".diff", "a file of whole weight differences"),
    ("lora_B.bias", "a LoRA with biases"),
    ("on_input", "an IA3"),
)
# Width of the text vectors that cross-attention reads -> family.
_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}

Shapes = Mapping[str, Sequence[int]]


def read_metadata(path: Path) -> dict[str, str]:
    """A LoRA file's own notes (``eta``, ``tau``, ``steps``, ...). Raises ExportError if unreadable."""
    with open_weights(path, "LoRA") as file:
        return dict(file.metadata() or {})


def source_digest(folder: Path) -> str:
    """``unet_digest`` of a diffusers UNet folder, from the headers of its files; no weight is read.

    Raises ExportError if a file is damaged. A folder without weights has the digest of nothing.
    """
    shapes: dict[str, list[int]] = {}
    for path in weight_files(folder):
        shapes |= read_shapes(path)
    return unet_digest(shapes)


def fuse_lora(
    parts: Mapping[str, nn.Module],
    path: Path,
    scale: float,
    *,
    elsewhere: Collection[str] = (),
) -> None:
    """Add ``scale`` times the LoRA to ``parts`` (in place): ``unet`` and, if present, the text encoders.

    Alpha is honoured: of each layer, else of the file's notes, else it is the rank. What the file holds for
    the parts named in ``elsewhere`` is left for another call. Raises ExportError if it holds anything
    else that does not fit, before a weight is changed.
    """
    shapes = read_shapes(path, "LoRA")
    found = _placed(parts, path, elsewhere, shapes)
    notes = _adapter_notes(path)
    with open_weights(path, "LoRA") as file:
        for layer, name, module in found:
            rank, own = shapes[layer.down][0], notes.get(layer.role, {})
            alpha = (
                _noted_alpha(own, name, rank) if layer.alpha is None else float(file.get_tensor(layer.alpha))
            )
            strength = alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)
            _merge(module, file.get_tensor(layer.down), file.get_tensor(layer.up), scale * strength)


def _merge(module: Any, down: Tensor, up: Tensor, strength: float) -> None:
    """In a function, so that one layer's tensors are freed before the next layer's are read."""
    # A convolution's kernel is a row of the same product.
    delta = up.float().flatten(1) @ down.float().flatten(1)
    weight: Tensor = module.weight.data
    weight.add_(delta.view_as(weight).to(weight.dtype), alpha=strength)


def check_lora(parts: Mapping[str, nn.Module], path: Path, *, elsewhere: Collection[str] = ()) -> None:
    """What `fuse_lora` would refuse, from names and shapes alone: ``parts`` need no weights (``meta``)."""
    _placed(parts, path, elsewhere, read_shapes(path, "LoRA"))


def _placed(
    parts: Mapping[str, nn.Module], path: Path, elsewhere: Collection[str], shapes: Shapes
) -> list[tuple[_Layer, str, Any]]:
    """(layer of the file, its module's name, the module) of everything that goes to ``parts``."""
    layers = _read_layers(path, shapes)
    for role in sorted({layer.role for layer in layers}):
        if role not in parts and role not in elsewhere:
            raise ExportError(f"LoRA {path} changes {role}, which this pipeline does not have")
    return [placed for role, module in parts.items() for placed in _place(role, module, layers, path, shapes)]


def original_names(unet: Any) -> dict[str, str]:
    """Module of a diffusers UNet -> its name in the original SDXL code, for those with weights."""
    layers = unet.config.layers_per_block  # of a motion model perhaps one number for each block
    count = layers if isinstance(layers, int) else layers[0]
    return {
        name: _original_name(name, count + 1, unet)
        for name, module in unet.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


@dataclass(frozen=True)
class _Layer:
    """One layer in the file: its part, its name as written there without prefix, and the file's keys."""

    role: str
    name: str
    down: str
    up: str
    alpha: str | None


def _read_layers(path: Path, shapes: Shapes) -> list[_Layer]:
    """Sort the file's keys into layers. Raises ExportError if one is of another kind, or half there."""
    down: dict[str, str] = {}
    up: dict[str, str] = {}
    alpha: dict[str, str] = {}
    for key in shapes:
        for pattern, found in ((_DOWN, down), (_UP, up), (_ALPHA, alpha)):
            if match := pattern.fullmatch(key):
                found[match[1]] = key
                break
        else:
            for mark, kind in _OTHER_KINDS:
                if mark in key:
                    raise ExportError(
                        f"LoRA {path} is {kind} (it has {key}), which std-rt does not fuse; use a plain LoRA"
                    )
            raise ExportError(
                f"LoRA {path} has unknown key names ({key}); std-rt reads those of diffusers, PEFT and kohya"
            )
    if not down:
        raise ExportError(f"LoRA {path} has no LoRA weights in it")
    if odd := sorted((down.keys() ^ up.keys()) | (alpha.keys() - down.keys())):
        raise ExportError(f"LoRA {path} has only a part of the layer {odd[0]}; download it again")
    if all(stem.startswith("lora_te_") for stem in down):
        raise ExportError(
            f"LoRA {path} changes only the text encoder of Stable Diffusion 1.x or 2.x (lora_te_*); give one "
            "made for SDXL, whose files have lora_unet_*, lora_te1_* and lora_te2_*"
        )
    layers = []
    for stem in down:
        bare = stem.removeprefix("base_model.model.")
        # A name without a prefix is the UNet's.
        prefix, role = next((pair for pair in _PREFIXES if bare.startswith(pair[0])), ("", "unet"))
        layers.append(_Layer(role, bare.removeprefix(prefix), down[stem], up[stem], alpha.get(stem)))
    return layers


def _place(
    role: str, module: nn.Module, layers: Sequence[_Layer], path: Path, shapes: Shapes
) -> Iterator[tuple[_Layer, str, nn.Module]]:
    """(layer, name in the module, the module's layer) of a part. Raises ExportError on the first misfit."""
    own = [layer for layer in layers if layer.role == role]
    known = _known_names(role, module) if own else {}
    strangers = [layer for layer in own if _flat(layer.name) not in known]
    if strangers:
        raise ExportError(
            f"LoRA {path} has weights for {len(own)} layers of the {role}, of which "
            f"{len(own) - len(strangers)} fit (not {strangers[0].name}); it was made for {_family(shapes)}"
            + ("; add --motion-adapter FOLDER" if ".motion_modules." in strangers[0].name else "")
        )
    for layer in own:
        name = known[_flat(layer.name)]
        target = module.get_submodule(name)
        _check_shape(role, name, target, layer, path, shapes)
        yield layer, name, target


def _known_names(role: str, module: nn.Module) -> dict[str, str]:
    """Every spelling of a layer's name, with ``_`` for ``.`` -> its name in ``module``."""
    known: dict[str, str] = {}
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    originals = original_names(module) if role == "unet" else {}
    for name in layers:
        spellings = {name, name.removesuffix(".0") if name.endswith("to_out.0") else name}
        if role == "unet":
            spellings.add(originals[name])
        else:
            bare = name.removeprefix("text_model.")
            spellings |= {bare, f"text_model.{bare}"}
            spellings |= {
                re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", text) for text in spellings
            }
        known |= {_flat(text): name for text in spellings}
    return known


def _flat(name: str) -> str:
    return name.replace(".processor.", ".").replace(".", "_")


def _check_shape(role: str, name: str, target: nn.Module, layer: _Layer, path: Path, shapes: Shapes) -> None:
    wanted = list(target.weight.shape)  # type: ignore[arg-type]
    down, up = shapes[layer.down], shapes[layer.up]
    rank, inner, outer = down[0], math.prod(down[1:]), up[0]
    if rank != math.prod(up[1:]):
        raise ExportError(f"LoRA {path} is damaged: {layer.down} is {down} and {layer.up} is {up}")
    if (outer, inner) != (wanted[0], math.prod(wanted[1:])):
        raise ExportError(
            f"LoRA {path} does not fit the {role}: {name} is {wanted} there, and the file changes "
            f"{[outer, *down[1:]]}; it was made for {_family(shapes)}"
        )


def _family(shapes: Shapes) -> str:
    """What the file was made for, as far as its keys tell."""
    if any("double_blocks" in key or "joint_" in key or key.startswith("transformer.") for key in shapes):
        return "a transformer (FLUX, SD3), not for SDXL"
    if any("motion_modules" in key for key in shapes):
        return "a UNet with motion modules (video)"
    for key, shape in shapes.items():
        if re.search(r"attn2[._](processor\.)?to_k", key) and _DOWN.fullmatch(key):
            return _FAMILIES.get(shape[1], "another model")
    return "another model"


def _noted_alpha(notes: Mapping[str, Any], name: str, rank: int) -> float:
    for pattern, alpha in (notes.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):  # PEFT's rule
            return float(alpha)
    found = notes.get("lora_alpha")
    return float(rank if found is None else found)


def _adapter_notes(path: Path) -> dict[str, dict[str, Any]]:
    """What diffusers (in the file) or PEFT (in a file beside it) says of rank and alpha, by part."""
    text = read_metadata(path).get("lora_adapter_metadata")
    beside = path.parent / "adapter_config.json"
    is_peft = text is None and path.name == "adapter_model.safetensors" and beside.is_file()
    try:
        found = json.loads(beside.read_text(encoding="utf-8") if is_peft else text or "{}")
        if is_peft:
            return {"unet": dict(found)}
        notes: dict[str, dict[str, Any]] = {}
        for key, value in found.items():
            role, _, name = key.partition(".")
            notes.setdefault(role, {})[name] = value
    except (ValueError, TypeError, AttributeError) as error:
        where = beside.name if is_peft else "lora_adapter_metadata"
        raise ExportError(f"LoRA {path} has invalid metadata ({where}: {error})") from error
    return notes


_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)")


def _original_name(name: str, per_block: int, unet: Any) -> str:
    """The original counts the layers of all levels in one row; a layer's attention is its part 1."""
    match = _BLOCK.fullmatch(name)
    if match is None or match[3] == "motion_modules":  # the original has none
        return _ENDS.get(name, name)
    side, level, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    count = level * per_block + index
    match side, kind:
        case None, "resnets":
            return f"middle_block.{2 * index}.{_RESNET[rest]}"
        case None, _:
            return f"middle_block.1.{rest}"
        case "down", "downsamplers":
            return f"input_blocks.{(level + 1) * per_block}.0.op"
        case "up", "upsamplers":
            part = 2 if hasattr(unet.up_blocks[level], "attentions") else 1
            return f"output_blocks.{(level + 1) * per_block - 1}.{part}.{rest}"
    block = f"input_blocks.{count + 1}" if side == "down" else f"output_blocks.{count}"
    return f"{block}.0.{_RESNET[rest]}" if kind == "resnets" else f"{block}.1.{rest}"
