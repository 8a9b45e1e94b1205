"""Parts of the autoencoder stage: its model, the start from older weights, and the losses beside L1."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from std_rt.core.errors import RecipeError
from std_rt.models.autoencoder import AutoencoderPixelShuffle, Shortcut, body_of
from std_rt.models.perceptual import feature_distance, gram_distance, load_perceptual
from std_rt.training.run.recipe import AutoencoderConfig


def load_autoencoder(folder: str) -> AutoencoderPixelShuffle:
    """A trained autoencoder, frozen; RecipeError where the folder holds none."""
    if not (Path(folder) / "config.json").is_file():
        raise RecipeError(
            f"no autoencoder in {folder}; train it first: std-rt train training/std_tiny_autoencoder.toml"
        )
    return AutoencoderPixelShuffle.from_pretrained(folder).eval().requires_grad_(False)


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderPixelShuffle:
    """The recipe's network, with older weights in it where ``start_from`` names some."""
    shallow = config.quarter_blocks or (config.encoder_blocks, config.decoder_blocks)
    model = AutoencoderPixelShuffle(
        config.latent_channels,
        config.channels,
        (shallow[0], config.encoder_blocks),
        (shallow[1], config.decoder_blocks),
        encoder_channels=config.encoder_channels,
        shortcut=config.shortcut,
    )
    if config.start_from:
        source = load_autoencoder(config.start_from)
        copy_overlap(body_of(model.encoder), body_of(source.encoder))
        copy_overlap(body_of(model.decoder), body_of(source.decoder))
        for ours, theirs in ((model.encoder, source.encoder), (model.decoder, source.decoder)):
            if isinstance(ours, Shortcut) and isinstance(theirs, Shortcut):
                ours.linear.load_state_dict(theirs.linear.state_dict())
    return model


def latent_weights(vae: AutoencoderPixelShuffle, latents: Tensor) -> Tensor:
    """``[1, C, 1, 1]``, mean 1: what an error of each channel of ``latents [B, C, h, w]`` is worth.

    Channels of the shortcut vary more than the others and the decoder hardly listens to them: weighted alike,
    two thirds of a squared error would be theirs. The decoder's mean squared gain would measure errors in
    pixels; its power 3/4 leaves fine detail a little more, as the eye does.
    """
    z = latents.detach().clone().requires_grad_()
    with torch.enable_grad():
        picture = vae.decode(z).sample
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0)).to(picture.device)
        (slope,) = torch.autograd.grad((picture * noise).sum(), z)
    gain = slope.square().mean((0, 2, 3)) ** 0.75
    return (gain / gain.mean())[None, :, None, None]


@torch.no_grad()
def fit_shortcut(model: AutoencoderPixelShuffle, images: list[Tensor], first: int) -> None:
    """Let latent channels from ``first`` on carry the best linear code of what the network misses.

    Reduced-rank regression of the residual's 8x8 patches on the pictures'; the body stops using these
    channels and starts again from zero there. ``images``: ``[1, 3, H, W]`` in [-1, 1], some dozens.
    """
    assert isinstance(model.encoder, Shortcut)
    assert isinstance(model.decoder, Shortcut)
    last, start = _conv(body_of(model.encoder)[-1]), _conv(body_of(model.decoder)[0])
    assert last.bias is not None
    last.weight[first:] = 0
    last.bias[first:] = 0
    start.weight[:, first:] = 0
    analysis, synthesis = _reduced_rank(*_patch_moments(model, images), model.config.latent_channels - first)
    _conv(model.encoder.linear[1]).weight[first:, :, 0, 0] = analysis
    _conv(model.decoder.linear[0]).weight[:, first:, 0, 0] = synthesis


def _conv(layer: nn.Module) -> nn.Conv2d:
    assert isinstance(layer, nn.Conv2d)
    return layer


def _patch_moments(model: AutoencoderPixelShuffle, images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Second moments ``[192, 192]`` over 8x8 patches: of pictures, and of residuals with pictures."""
    own, cross, count = torch.zeros(192, 192), torch.zeros(192, 192), 0
    for image in images:
        residual = image - model.decode(model.encode(image).latents).sample
        x, r = (F.pixel_unshuffle(v.cpu(), 8).flatten(2)[0] for v in (image, residual))
        own, cross, count = own + x @ x.T, cross + r @ x.T, count + x.shape[1]
    return own / count, cross / count


def _reduced_rank(own: Tensor, cross: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``analysis [rank, 192]`` with outputs of unit variance and ``synthesis [192, rank]``."""
    values, vectors = torch.linalg.eigh(own + 1e-5 * torch.eye(len(own)))
    inverse = (vectors * values**-0.5) @ vectors.T
    u, s, v = torch.linalg.svd(cross @ inverse)
    return v[:rank] @ inverse, u[:, :rank] * s[:rank]


def _sections(network: nn.Sequential) -> list[list[nn.Module]]:
    """The layers with weights, cut where the resolution changes, so that equal sections face each other."""
    sections: list[list[nn.Module]] = [[]]
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            sections += [[layer], []]
        elif any(True for _ in layer.parameters()):
            sections[-1].append(layer)
    return sections


@torch.no_grad()
def copy_overlap(model: nn.Sequential, source: nn.Sequential) -> None:
    """Copy the leading channels of every layer that both have; inputs only ``model`` has start near zero.

    A narrower network thus begins as a pruned one, one with more latent channels begins with the old latents
    in the first of them.
    """
    for ours, theirs in zip(_sections(model), _sections(source), strict=True):
        for a, b in zip(ours, theirs, strict=False):
            values = b.state_dict()
            for name, parameter in a.named_parameters():
                shared = tuple(
                    slice(0, min(m, n)) for m, n in zip(parameter.shape, values[name].shape, strict=True)
                )
                if parameter.dim() == 4 and parameter.shape[1] > values[name].shape[1]:
                    parameter[: values[name].shape[0], values[name].shape[1] :].mul_(0.1)
                parameter[shared] = values[name][shared]


class ExtraLosses:
    """Losses beside L1: perceptual ones, and the distance to an older autoencoder's latents."""

    def __init__(self, config: AutoencoderConfig, device: str) -> None:
        self.config = config
        self.network = load_perceptual(config.perceptual).to(device) if config.perceptual else None
        self.like = load_autoencoder(config.latents_like).to(device) if config.latents_like else None

    def latents(self, z: Tensor, images: Tensor) -> Tensor:
        """Weighted L1 of the first channels to those of ``latents_like``; 0 where there is none."""
        if self.like is None:
            return z.new_zeros(())
        with torch.no_grad():
            wanted = self.like.encode(images).latents
        shared = min(z.shape[1], wanted.shape[1])
        return self.config.latents_weight * F.l1_loss(z[:, :shared].float(), wanted[:, :shared].float())

    def pictures(self, output: Tensor, target: Tensor) -> Tensor:
        """Weighted distances of features and of Gram matrices at relu1_1 to 3_1; 0 without a network."""
        if self.network is None:
            return output.new_zeros(())
        with torch.no_grad():
            wanted = self.network(target, 3)
        features = self.network(output, 3)
        loss = self.config.feature_weight * feature_distance(features, wanted)
        with torch.autocast(output.device.type, enabled=False):
            grams = gram_distance([f.float() for f in features], [f.float() for f in wanted])
        return loss + self.config.gram_weight * grams
