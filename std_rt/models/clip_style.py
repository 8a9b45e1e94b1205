"""CLIP's picture encoder with IP-Adapter's projection as one module, opened from published files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from std_rt.core.errors import ExportError
from std_rt.models.components import Network, load_part, read_json
from std_rt.models.ip_adapter import Branches, make_projection, pair_branches, read_ip_adapter
from std_rt.models.style_encoder import StyleEncoder

__all__ = ["CLIP_MEAN", "CLIP_STD", "ClipStyleEncoder", "find_encoder", "open_adapter"]

# Pictures' statistics in CLIP's preprocessing, in [0, 1] RGB (openai/clip-vit-*).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipStyleEncoder(nn.Module):
    """CLIP's picture encoder and IP-Adapter's projection in one: style image -> style tokens.

    The Plus projections read the last hidden layer but one, the plain one the pooled embedding.
    """

    def __init__(
        self,
        encoder: Network,
        projection: nn.Module,
        *,
        reads_hidden: bool,
        mean: Collection[float] = CLIP_MEAN,
        std: Collection[float] = CLIP_STD,
    ) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"image_encoder": encoder, "image_proj": projection})
        self.reads_hidden = reads_hidden
        self.mean, self.std = tuple(mean), tuple(std)
        self.dtype = torch.float32
        # Image x in [-1, 1] -> ((x + 1) / 2 - mean) / std as one product and one sum.
        half = torch.tensor(self.std).view(1, 3, 1, 1) * 2
        self.register_buffer("gain", 1 / half, persistent=False)
        self.register_buffer(
            "offset", (1 - 2 * torch.tensor(self.mean).view(1, 3, 1, 1)) / half, persistent=False
        )

    @property
    def image_px(self) -> int:
        """Side of the style image."""
        encoder: Network = self.module["image_encoder"]
        return int(encoder.config.image_size)

    def forward(self, style_image: Tensor) -> Tensor:
        """``[B, 3, S, S]`` in [-1, 1] -> ``[B, T, D]``."""
        pixels = (style_image * self.get_buffer("gain") + self.get_buffer("offset")).to(self.dtype)
        encoded = self.module["image_encoder"](pixels, output_hidden_states=self.reads_hidden)
        features = encoded.hidden_states[-2] if self.reads_hidden else encoded.image_embeds
        tokens: Tensor = self.module["image_proj"](features)
        return tokens.float()

    @torch.no_grad()
    def negative(self) -> Tensor:
        """Style tokens of no style ``[1, T, D]``, as diffusers' pipelines encode it: from pixels of zero.

        The plain projection gets a zero embedding instead.
        """
        encoder: Network = self.module["image_encoder"]
        features, side = torch.zeros(1, encoder.config.projection_dim), encoder.config.image_size
        if self.reads_hidden:
            pixels = torch.zeros(1, 3, side, side)
            features = encoder(pixels, output_hidden_states=True).hidden_states[-2]
        tokens: Tensor = self.module["image_proj"](features)
        return tokens


def find_encoder(adapter: Path, *folders: Path | None) -> Path:
    """The first of ``folders`` with an image encoder, or the one beside the adapter, as the hub has it.

    Raises ExportError if there is none.
    """
    for folder in (*folders, adapter.parent / "image_encoder"):
        if folder is not None and (folder / "config.json").is_file():
            return folder
    named = " or ".join(str(folder.parent) for folder in folders[-1:] if folder is not None)
    raise ExportError(f"no image_encoder in {named} or beside {adapter}; a style needs one")


def open_adapter(unet: Network, path: Path, folder: Path) -> tuple[StyleEncoder | ClipStyleEncoder, Branches]:
    """(style encoder in fp32, image branches of every cross-attention layer of ``unet``), from the adapter
    ``path`` and the image encoder in ``folder``. ``unet`` needs no weights. Raises ExportError.
    """
    projection, weights = read_ip_adapter(path)
    branches = pair_branches(unet, weights)
    encoder = load_part("image_encoder", folder)
    own = isinstance(encoder, StyleEncoder)
    if own and projection:
        raise ExportError(f"{path} has image_proj weights, and {folder} is a StyleEncoder, which has its own")
    if not own and not projection:
        raise ExportError(f"{path} has no image_proj weights, which the encoder in {folder} needs")
    style = encoder if own else _with_projection(encoder, unet, projection, path, folder)
    found, dim = style.negative().shape[2], next(iter(branches.values()))[0].shape[1]
    if found != dim:
        raise ExportError(f"style tokens are {found} wide, the attention in {path} takes {dim}")
    return style, branches


def _with_projection(
    encoder: Network, unet: Network, weights: dict[str, Tensor], path: Path, folder: Path
) -> ClipStyleEncoder:
    projection, reads_hidden = make_projection(unet, weights, path)
    mean, std = _statistics(folder)
    style = ClipStyleEncoder(encoder, projection, reads_hidden=reads_hidden, mean=mean, std=std).eval()
    try:
        style.negative()
    except RuntimeError as error:
        raise ExportError(
            f"the projection in {path} does not fit the encoder in {folder}: {error}"
        ) from error
    return style


def _statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The pictures' mean and standard deviation that the encoder was trained with."""
    for place in (folder, folder.parent / "feature_extractor"):
        path = place / "preprocessor_config.json"
        if path.is_file():
            found = read_json(path)
            return tuple(found.get("image_mean", CLIP_MEAN)), tuple(found.get("image_std", CLIP_STD))
    return CLIP_MEAN, CLIP_STD
