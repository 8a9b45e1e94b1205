"""Outputs of pretrained style transfer networks for the pairs of `std-rt evaluate`.

    std-rt evaluate PHOTOS ART --pairs 24 --size 256 --save-outputs pairs
    python -m tools.peers pairs --microast FILE --magenta FOLDER --adain FILE
    std-rt evaluate PHOTOS ART --pairs 24 --size 256 --peer MicroAST=pairs/microast --peer AdaIN=pairs/adain

For every picture in ``pairs/content`` and the style of that name in ``pairs/style``: a file of the same name
in ``pairs/microast``, ``pairs/magenta`` and ``pairs/adain``. Frames of clips are in folders of their own,
named like the style.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from std_rt.core.errors import MediaError
from std_rt.media.image import read_picture, write_picture
from std_rt.training.run.sheet import to_frames, to_tensor
from tools.teachers import AdaIn, Magenta, MicroAst, Teacher


def write_outputs(pairs: Path, label: str, teacher: Teacher) -> int:
    """Stylize everything in ``pairs/content`` into ``pairs/LABEL``; the number of pictures."""
    contents = sorted((pairs / "content").rglob("*.png"))
    if not contents:
        raise MediaError(f"{pairs / 'content'} holds no .png; write it with std-rt evaluate --save-outputs")
    for path in contents:
        name = path.relative_to(pairs / "content")
        pair = name.stem if len(name.parts) == 1 else name.parts[0]  # or a frame of that clip
        style = pairs / "style" / f"{pair}.png"
        photo, art = ((to_tensor([read_picture(p).frame]) + 1) / 2 for p in (path, style))
        output = pairs / label / name
        output.parent.mkdir(parents=True, exist_ok=True)
        write_picture(output, to_frames(teacher(photo, art) * 2 - 1)[0])
    return len(contents)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path, help="folder that std-rt evaluate --save-outputs wrote")
    parser.add_argument("--microast", help="safetensors")
    parser.add_argument("--adain", help="VGG-19 and the AdaIN decoder (safetensors)")
    parser.add_argument("--magenta", help="folder with the predict and transform ONNX files")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    makers: dict[str, Callable[[str], Teacher]] = {"microast": MicroAst, "adain": AdaIn, "magenta": Magenta}
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    given = {label: getattr(args, label) for label in makers if getattr(args, label)}
    if not given:
        parser.error("give at least one of --microast, --adain, --magenta")
    try:
        for label, weights in given.items():
            count = write_outputs(args.pairs, label, makers[label](weights))
            print(f"{args.pairs / label}: {count} pictures")
    except MediaError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
