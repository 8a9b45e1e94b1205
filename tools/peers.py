"""Outputs of pretrained style transfer networks for the pairs of `std-rt evaluate`.

    std-rt evaluate PHOTOS ART --pairs 24 --size 256 --save-outputs pairs
    python -m tools.peers pairs --microast FILE --magenta FOLDER --adain FILE
    std-rt evaluate PHOTOS ART --pairs 24 --size 256 --peer MicroAST=pairs/microast --peer AdaIN=pairs/adain

For every picture in ``pairs/content`` and the style of that name in ``pairs/style``: a file of the same name
in ``pairs/microast``, ``pairs/magenta`` and ``pairs/adain``. Frames of clips are in folders of their own,
named like the style.

    python -m tools.peers pairs --microast FILE --magenta FOLDER --time 256 --time 512

times them on OpenVINO instead, as `std-rt bench` does the bundles: fp32, one picture at a time, the part that
depends on the style alone computed before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

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


class _FixedStyle(nn.Module):
    """A network with its style picture inside, so that the compiler folds all that depends on it alone."""

    def __init__(self, teacher: Teacher, side: int) -> None:
        super().__init__()
        self.teacher = teacher
        style = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        self.style = nn.Parameter(style, requires_grad=False)

    def forward(self, photo: Tensor) -> Tensor:
        return self.teacher(photo, self.style)


def time_on_openvino(teacher: Teacher, side: int, threads: int, runs: int = 60) -> float:
    """Median seconds per picture of ``side`` x ``side``; of Magenta, its transformer at that size."""
    import std_rt.engines.openvino  # noqa: F401, I001  (first, so that OpenVINO reports nothing)
    import openvino as ov

    photo = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    if isinstance(teacher, Magenta):
        model = ov.Core().read_model(teacher.transformer)
        shapes = {i: i.partial_shape for i in model.inputs}
        model.reshape({i: [1, side, side, 3] if s[len(s) - 1] == 3 else s for i, s in shapes.items()})
    else:
        model = ov.convert_model(_FixedStyle(teacher, side), example_input=photo, input=[1, 3, side, side])
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = ov.compile_model(model, "CPU", options)
    rng = np.random.default_rng(0)
    inputs = [rng.random(i.partial_shape.to_shape(), np.float32) for i in compiled.inputs]
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        compiled(inputs)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[runs // 6 :])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path, help="folder that std-rt evaluate --save-outputs wrote")
    parser.add_argument("--microast", help="safetensors")
    parser.add_argument("--adain", help="VGG-19 and the AdaIN decoder (safetensors)")
    parser.add_argument("--magenta", help="folder with the predict and transform ONNX files")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--time", type=int, action="append", metavar="PX", help="only time them; repeatable")
    args = parser.parse_args()
    makers: dict[str, Callable[[str], Teacher]] = {"microast": MicroAst, "adain": AdaIn, "magenta": Magenta}
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    given = {label: getattr(args, label) for label in makers if getattr(args, label)}
    if not given:
        parser.error("give at least one of --microast, --adain, --magenta")
    try:
        for label, weights in given.items():
            for side in args.time or ():
                took = time_on_openvino(makers[label](weights), side, args.threads)
                print(f"{label} {side} px: {1000 * took:.1f} ms")
            if args.time:
                continue
            count = write_outputs(args.pairs, label, makers[label](weights))
            print(f"{args.pairs / label}: {count} pictures")
    except MediaError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
