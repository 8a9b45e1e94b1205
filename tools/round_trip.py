"""How much of a style survives an autoencoder: MicroAST's pictures, encoded and decoded.

    python -m tools.round_trip VAE_FOLDER... --contents FOLDER --styles FOLDER \
        --microast microast.safetensors --vgg adain_vgg19.safetensors [--sheet sheet.png]

Lower is better, except for structure. ``own`` is VGG's style distance between a picture and its round trip;
``art own`` the same of the style pictures. GMAC: encoder and decoder at 256 px.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from std_rt.evaluation.measures import score
from std_rt.models.autoencoder import AutoencoderPixelShuffle
from std_rt.models.perceptual import content_distance, load_perceptual, style_distance
from std_rt.training.data.picture_set import Frame
from std_rt.training.run.sheet import save_sheet, spread_pairs, to_frames, to_tensor
from tools.teachers import MicroAst

COLUMNS = ("colour", "texture", "structure", "style", "content", "own", "art own", "GMAC enc", "GMAC dec")


def count_macs(network: nn.Module, example: Tensor) -> float:
    """10^9 multiplications with a weight in one call, of the convolutions."""
    total = 0

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d)
        total += output[0, 0].numel() * module.weight.numel()

    hooks = [m.register_forward_hook(add) for m in network.modules() if isinstance(m, nn.Conv2d)]
    network(example)
    for hook in hooks:
        hook.remove()
    return total / 1e9


class Judge:
    """Measures of pictures against their content and style."""

    def __init__(self, vgg: str) -> None:
        self.vgg = load_perceptual(vgg)

    def row(self, x: Tensor, content: Frame, style: Frame) -> list[float]:
        """colour, texture, structure, style and content distance of ``x [1, 3, H, W]`` in [-1, 1]."""
        features = [self.vgg(p) for p in (x, to_tensor([content]), to_tensor([style]))]
        plain = score(to_frames(x)[0], content, style)
        style_value = float(style_distance(features[0], features[2]))
        content_value = float(content_distance(features[0][-1], features[1][-1]))
        return [plain.colour, plain.texture, plain.structure, style_value, content_value]

    def own(self, x: Tensor, original: Tensor) -> float:
        return float(style_distance(self.vgg(x), self.vgg(original)))


def _trip(vae: AutoencoderPixelShuffle, x: Tensor) -> Tensor:
    return vae.decode(vae.encode(x).latents).sample.clamp(-1, 1)


def _gmac(vae: AutoencoderPixelShuffle) -> list[float]:
    image = torch.zeros(1, 3, 256, 256)
    return [count_macs(vae.encoder, image), count_macs(vae.decoder, vae.encode(image).latents)]


def measure(args: argparse.Namespace) -> None:
    pairs = spread_pairs(args.contents, args.styles, args.count, args.size)
    teacher, judge = MicroAst(args.microast), Judge(args.vgg)
    made = [teacher(*((to_tensor([f]) + 1) / 2 for f in pair)) * 2 - 1 for pair in pairs]
    vaes = {folder: AutoencoderPixelShuffle.from_pretrained(folder).eval() for folder in args.vae}
    print(" | ".join(("", *COLUMNS)))

    def show(name: str, rows: list[list[float]], rest: list[float]) -> None:
        print(" | ".join((name, *(f"{v:.4f}" for v in [*np.mean(rows, 0), *rest]))), flush=True)

    show("photos", [judge.row(to_tensor([c]), c, s) for c, s in pairs], [])
    show("MicroAST", [judge.row(x, c, s) for x, (c, s) in zip(made, pairs, strict=True)], [0.0, 0.0])
    columns = [[c for c, _ in pairs], [s for _, s in pairs], to_frames(torch.cat(made))]
    for folder, vae in vaes.items():
        trips, arts = [_trip(vae, x) for x in made], [_trip(vae, to_tensor([s])) for _, s in pairs]
        rows = [
            [*judge.row(t, c, s), judge.own(t, x), judge.own(a, to_tensor([s]))]
            for t, x, a, (c, s) in zip(trips, made, arts, pairs, strict=True)
        ]
        show(Path(folder).parent.name, rows, _gmac(vae))
        columns += [to_frames(torch.cat(trips)), to_frames(torch.cat(arts))]
    if args.sheet:
        save_sheet(args.sheet, [list(row) for row in zip(*columns, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vae", nargs="+", help="autoencoder folders (with config.json)")
    parser.add_argument("--contents", type=Path, required=True)
    parser.add_argument("--styles", type=Path, required=True)
    parser.add_argument("--microast", required=True)
    parser.add_argument("--vgg", required=True)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    measure(args)


if __name__ == "__main__":
    main()
