"""Scores that need weights: CLIP, DINOv2, CSD, LAION's aesthetic predictor, VGG distances and ArtFID's parts.

Nothing is downloaded, and no file may run code: safetensors, or ``torch.load(weights_only=True)``. All are
cosines in -1..1, except the aesthetic score, which is about 1..10, and the distances (0 = equal).

* CLIP: a transformers folder of a CLIPModel; output to content and output to style
* DINOv2: a transformers folder of a Dinov2Model; class token of output to content
* CSD (Somepalli et al. 2024, arXiv 2404.01292): the published checkpoint (``pytorch_model.bin`` of the
  authors, or its weights as safetensors); style vector of output to style
* aesthetic: ``sac+logos+ava1-l14-linearMSE.pth`` of LAION's improved predictor, over CLIP ViT-L/14
* VGG: weights of VGG-19 as training takes them (`models.perceptual`); ``vgg_style`` compares the normalised
  Gram matrices of relu1_1 to relu4_1 with the style's, ``vgg_content`` relu4_1 with the content's
* ArtFID: a folder of its published files (`models.artfid`); ``lpips`` of output and content

What only a whole set of pictures has (CSLS of CSD, the FID in ArtFID) is computed from `load_features`.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Model
from transformers.utils import logging

from std_rt.core.errors import RecipeError, UsageError, one_line
from std_rt.evaluation.measures import Frame
from std_rt.evaluation.picture_quality import Describe
from std_rt.models.artfid import SMALLEST_PX, ArtInception, Lpips
from std_rt.models.perceptual import Vgg, content_distance, load_perceptual, style_distance
from std_rt.training.run.sheet import to_tensor

__all__ = ["Scorer", "load_features", "load_scorers"]

T = TypeVar("T")
Scorer = Callable[[Frame, Frame, Frame], dict[str, float]]  # (output, content, style) -> numbers by name
Embed = Callable[[Tensor], Tensor]  # images [1, 3, S, S], normalised -> [1, D]

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINO_PX = 224
_HEAD_WIDTH = 64  # of every CLIP that OpenAI published
# Names in OpenAI's CLIP files, which CSD keeps -> in transformers' CLIPVisionModel.
_FROM_OPENAI = {
    "transformer.resblocks": "encoder.layers",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def load_scorers(
    *,
    clip: Path | None = None,
    dino: Path | None = None,
    csd: Path | None = None,
    aesthetic: Path | None = None,
    vgg: Path | None = None,
    artfid: Path | None = None,
    device: str = "cpu",
) -> list[Scorer]:
    """The scorers whose weights are given. Raises UsageError if a file or folder does not contain them."""
    if aesthetic is not None and clip is None:
        raise UsageError("--aesthetic needs the CLIP it was trained on; add --clip FOLDER of CLIP ViT-L/14")
    scorers: list[Scorer] = []
    if clip is not None:
        embedder = _load_clip(clip, device)
        scorers.append(_cosines(embedder, content="clip_content", style="clip_style"))
        if aesthetic is not None:
            scorers.append(_load_aesthetic(aesthetic, embedder, device))
    if dino is not None:
        scorers.append(_cosines(_load_dino(dino, device), content="dino_content"))
    if csd is not None:
        scorers.append(_cosines(_load_csd(csd, device), style="csd"))
    if vgg is not None:
        scorers.append(_load_vgg(vgg, device))
    if artfid is not None:
        scorers.append(_load_lpips(artfid, device))
    return scorers


def load_features(
    *, side_px: int, csd: Path | None = None, artfid: Path | None = None, device: str = "cpu"
) -> dict[str, Describe]:
    """What describes a picture, by the measure of a whole set that needs it: ``csd_csls``, ``artfid``.

    Unit vectors of CSD, and features of the Inception that ArtFID uses. Raises UsageError as `load_scorers`,
    and where pictures of ``side_px`` are too small.
    """
    found: dict[str, Describe] = {}
    if csd is not None:
        embedder = _load_csd(csd, device)
        found["csd_csls"] = lambda frame: np.asarray(embedder(frame).cpu(), np.float32)
    if artfid is not None and side_px < SMALLEST_PX:
        raise UsageError(
            f"--artfid needs pictures of at least {SMALLEST_PX} px, got {side_px}; give a larger --size"
        )
    if artfid is not None:
        found["artfid"] = _load_inception(artfid, device)
    return found


def _remembered(of: Callable[[Frame], T], most: int = 256) -> Callable[[Frame], T]:
    """``of``, with its last results kept: contents and styles come again."""
    known: dict[tuple[str, tuple[int, ...]], T] = {}

    def get(frame: Frame) -> T:
        key = hashlib.sha256(frame.tobytes()).hexdigest(), frame.shape
        if key not in known:
            if len(known) >= most:
                del known[next(iter(known))]
            known[key] = of(frame)
        return known[key]

    return get


class _Embedder:
    """Frames uint8 [S, S, 3] -> unit vectors [D]."""

    def __init__(
        self, embed: Embed, side_px: int, mean: tuple[float, ...], std: tuple[float, ...], device: str
    ) -> None:
        self._embed, self._side, self._device = embed, side_px, device
        self._mean, self._std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))
        self._vector = _remembered(self._of)

    def __call__(self, frame: Frame) -> Tensor:
        return self._vector(frame)

    @torch.no_grad()
    def _of(self, frame: Frame) -> Tensor:
        return F.normalize(self._embed(self._images(frame)).float(), dim=-1)[0]

    def _images(self, frame: Frame) -> Tensor:
        """The whole (square) frame at the network's size: bicubic, antialiased, as these were trained."""
        x = (to_tensor([frame]).to(self._device) + 1) / 2
        size = (self._side, self._side)
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return (x - self._mean) / self._std


def _cosines(embedder: _Embedder, content: str = "", style: str = "") -> Scorer:
    """Cosine of the output's vector to the content's and the style's, under the names given."""

    def scorer(output: Frame, content_frame: Frame, style_frame: Frame) -> dict[str, float]:
        ours = embedder(output)
        named = {content: content_frame, style: style_frame}
        return {name: float(ours @ embedder(frame)) for name, frame in named.items() if name}

    return scorer


def _read_folder(option: str, folder: Path, kind: Any) -> Any:
    """A transformers model of class ``kind`` from a folder, never from the network."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{option} {folder} is not a transformers folder (it has no config.json)")
    logging.set_verbosity_error()  # nothing about the weights of the text encoder, which is not used here
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, weights_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        raise UsageError(
            f"{option} {folder} cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from None
    if report["missing_keys"]:
        lost = sorted(report["missing_keys"])[0]
        raise UsageError(f"{option} {folder} does not hold a {kind.__name__}: {lost} is missing")
    return model.eval().requires_grad_(False)


def _load_clip(folder: Path, device: str) -> _Embedder:
    model = _read_folder("--clip", folder, CLIPVisionModelWithProjection).to(device)
    return _Embedder(lambda x: model(x).image_embeds, model.config.image_size, _CLIP_MEAN, _CLIP_STD, device)


def _load_dino(folder: Path, device: str) -> _Embedder:
    model = _read_folder("--dino", folder, Dinov2Model).to(device)
    side = min(_DINO_PX, int(model.config.image_size))
    side -= side % int(model.config.patch_size)

    def class_token(x: Tensor) -> Tensor:
        found: Tensor = model(x).last_hidden_state[:, 0]
        return found

    return _Embedder(class_token, side, _IMAGENET_MEAN, _IMAGENET_STD, device)


def _load_state(option: str, path: Path) -> dict[str, Any]:
    """A state dict, or a checkpoint that holds one; no code in the file is run. Raises UsageError."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # The authors' CSD file also holds its training arguments and a NumPy number: data only.
        scalar = np.float64(0).__reduce__()[0]
        harmless: list[Any] = [argparse.Namespace, np.dtype, type(np.dtype(np.float64)), scalar]
        harmless.append((scalar, "numpy.core.multiarray.scalar"))  # its name in NumPy 1
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickles; what cannot be read raises
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        reason = one_line(error, 160)
        raise UsageError(f"{option} {path} cannot be read as weights: {reason}") from None
    if not isinstance(found, Mapping):
        raise UsageError(f"{option} {path} holds a {type(found).__name__}, not weights by name")
    return dict(found)


def _clip_from_openai(state: Mapping[str, Tensor], projection: Tensor) -> CLIPVisionModelWithProjection:
    """CLIP's picture encoder from weights by OpenAI's names, and a projection [width, D] behind it.

    Raises KeyError or RuntimeError if they do not fit together.
    """
    width, _, patch, _ = state["conv1.weight"].shape
    grid = round((len(state["positional_embedding"]) - 1) ** 0.5)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=len({name.split(".")[2] for name in state if "resblocks" in name}),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        image_size=grid * patch,
        patch_size=patch,
        projection_dim=projection.shape[1],
        hidden_act="quick_gelu",
    )
    renamed = {"visual_projection.weight": projection.T}
    for name, value in state.items():
        for old, new in _FROM_OPENAI.items():
            name = name.replace(old, new)
        parts = value.chunk(3) if "in_proj_" in name else (value,)
        for head, part in zip("qkv", parts, strict=False):
            renamed[f"vision_model.{name.replace('in_proj_', f'{head}_proj.')}"] = part
    model = CLIPVisionModelWithProjection(config)
    model.load_state_dict(renamed)
    return model.eval().requires_grad_(False)


@cache  # for its score and for its features
def _load_csd(path: Path, device: str) -> _Embedder:
    """The backbone and the style projection: ``normalize(tower(x) @ last_layer_style)``."""
    stored = _load_state("--csd", path)
    stored = dict(stored.get("model_state_dict", stored))
    state = {name.removeprefix("module."): value for name, value in stored.items()}
    backbone = {k.removeprefix("backbone."): v.float() for k, v in state.items() if k.startswith("backbone.")}
    backbone.pop("proj", None)  # moved out into the two last layers
    try:
        model: Any = _clip_from_openai(backbone, state["last_layer_style"].float()).to(device)
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        reason = one_line(error, 160)
        raise UsageError(
            f"--csd {path} is not a CSD checkpoint (backbone.*, last_layer_style): {reason}"
        ) from None
    return _Embedder(lambda x: model(x).image_embeds, model.config.image_size, _CLIP_MEAN, _CLIP_STD, device)


def _load_aesthetic(path: Path, embedder: _Embedder, device: str) -> Scorer:
    """Five linear layers with only dropout in between: from the unit CLIP vector to one number."""
    if "relu" in path.name.lower():
        raise UsageError(
            f"--aesthetic {path} is the variant with ReLU; give sac+logos+ava1-l14-linearMSE.pth"
        )
    state = _load_state("--aesthetic", path)
    order = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
    try:
        layers = [
            (state[f"{name}.weight"].float().to(device), state[f"{name}.bias"].float().to(device))
            for name in order
        ]
    except (KeyError, AttributeError) as error:
        raise UsageError(f"--aesthetic {path} is not an aesthetic predictor: {error} is missing") from None

    def scorer(output: Frame, content: Frame, style: Frame) -> dict[str, float]:
        x = embedder(output)
        wanted = layers[0][0].shape[1]
        if len(x) != wanted:
            raise UsageError(f"--aesthetic judges CLIP vectors of {wanted} numbers, --clip gives {len(x)}")
        for weight, bias in layers:
            x = F.linear(x, weight, bias)
        return {"aesthetic": float(x)}

    return scorer


def _load_vgg(path: Path, device: str) -> Scorer:
    """Style and content distance, at the pictures' own sizes."""
    try:
        network = load_perceptual(path)
    except RecipeError:
        network = None
    if not isinstance(network, Vgg):
        raise UsageError(
            f"--vgg {path} does not hold VGG-19 (tensors vgg.00.block1_conv1.weight to vgg.08.output.bias); "
            "see docs/evaluation.md"
        )
    network.to(device)

    @torch.no_grad()
    def features(frame: Frame) -> list[Tensor]:
        taps: list[Tensor] = network(to_tensor([frame]).to(device))
        return taps

    known = _remembered(features, 2)  # several outputs for one pair come one after the other

    def scorer(output: Frame, content: Frame, style: Frame) -> dict[str, float]:
        x, photo, art = features(output), known(content), known(style)
        return {
            "vgg_style": float(style_distance(x, art)),
            "vgg_content": float(content_distance(x[-1], photo[-1])),
        }

    return scorer


_ARTFID = {"inception": "art_inception.pth", "alexnet": "alexnet-owt-7be5be79.pth", "linear": "alex.pth"}


def _artfid_state(folder: Path, part: str) -> dict[str, Any]:
    path = folder / _ARTFID[part]
    if not path.is_file():
        raise UsageError(f"--artfid {folder} lacks {path.name}; it is to hold {', '.join(_ARTFID.values())}")
    return _load_state("--artfid", path)


def _load_lpips(folder: Path, device: str) -> Scorer:
    try:
        network = Lpips(_artfid_state(folder, "alexnet"), _artfid_state(folder, "linear")).to(device)
    except KeyError as error:
        raise UsageError(
            f"--artfid {folder} does not hold AlexNet and LPIPS 0.1: {error} is missing"
        ) from None

    @torch.no_grad()
    def scorer(output: Frame, content: Frame, style: Frame) -> dict[str, float]:
        x, photo = (to_tensor([frame]).to(device) for frame in (output, content))
        return {"lpips": float(network(x, photo))}

    return scorer


def _load_inception(folder: Path, device: str) -> Describe:
    """Pooled features [2048]."""
    try:
        network = ArtInception(_artfid_state(folder, "inception")).to(device)
    except KeyError as error:
        raise UsageError(f"--artfid {folder} does not hold an Inception v3: {error} is missing") from None

    @_remembered
    @torch.no_grad()
    def describe(frame: Frame) -> NDArray[np.float32]:
        return np.asarray(network(to_tensor([frame]).to(device))[0].cpu(), np.float32)

    return describe
