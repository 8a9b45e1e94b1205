"""`std-rt demo`: every example picture in every example style, and the sheets that show them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from std_rt import examples
from std_rt.media.image import write_picture
from std_rt.media.video.transcode import transcode_stream
from std_rt.pipeline.stylizer import Stylizer
from std_rt.streaming.frame_stream import GROUPED, FrameStream

__all__ = ["SIZES", "contact_sheet", "pair_grid", "run"]

T = TypeVar("T")
Frame = NDArray[np.uint8]
Outputs = dict[tuple[str, str], Frame]  # (scene, style) -> stylized

EXAMPLE_PX = 512  # of the inputs
SIZES = (256, 512)
CLIP_FRAMES, _CLIP_STYLE = 90, "stained_glass"
_TILE, _GAP, _TITLE = 192, 6, 22


def run(out: Path, bundle: str | None, backend: str) -> None:
    """Write inputs, styles, a result for every pair and size, two sheets and a clip to ``out``."""
    console = Console(stderr=True)
    scenes = _write(examples.scenes(EXAMPLE_PX), out / "inputs")
    styles = _write(examples.styles(EXAMPLE_PX), out / "styles")
    results = {size: _stylize(scenes, styles, size, out, bundle, backend, console) for size in SIZES}
    _clip(styles[_CLIP_STYLE], out, bundle, backend, console)
    write_picture(out / "sheet.png", contact_sheet(scenes, styles, results))
    write_picture(out / "grid.png", pair_grid(scenes, styles, results[SIZES[-1]]))
    typer.echo(f"every pair: {out / 'grid.png'}")
    typer.echo(
        f"contact sheet (input | style | {' | '.join(f'{size} px' for size in SIZES)}): {out / 'sheet.png'}"
    )


def _write(frames: dict[str, Frame], folder: Path) -> dict[str, Frame]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        write_picture(folder / f"{name}.png", frame)
    return frames


def _shown(items: list[T], title: str, console: Console) -> Iterator[T]:
    return iter(track(items, title, console=console, transient=True, disable=not console.is_terminal))


def _stylize(
    scenes: dict[str, Frame],
    styles: dict[str, Frame],
    size: int,
    out: Path,
    bundle: str | None,
    backend: str,
    console: Console,
) -> Outputs:
    """Every pair at a size, written to ``out/SIZE``."""
    (out / str(size)).mkdir(exist_ok=True)
    outputs: Outputs = {}
    seconds = []
    with Stylizer.load(bundle, backend=backend, size=size) as stylizer:
        stylizer.prepare(EXAMPLE_PX, EXAMPLE_PX)
        pairs = [(scene, style) for style in styles for scene in scenes]
        for scene, style in _shown(pairs, f"{size} px", console):
            stylizer.set_style(styles[style])
            begun = time.perf_counter()
            outputs[scene, style] = stylizer.stylize(scenes[scene])
            seconds.append(time.perf_counter() - begun)
            write_picture(out / str(size) / f"{scene}_{style}.png", outputs[scene, style])
        typer.echo(
            f"{size} px: {len(pairs)} pictures, {1000 * float(np.median(seconds)):.0f} ms each "
            f"({stylizer.bundle.name}, {stylizer.steps} steps, {stylizer.backend} {stylizer.precision})"
        )
    return outputs


def _clip(style: Frame, out: Path, bundle: str | None, backend: str, console: Console) -> None:
    """A moving example, ``inputs/moving.mp4``, and what becomes of it, ``moving_styled.mp4``."""
    source, sink = out / "inputs" / "moving.mp4", out / "moving_styled.mp4"
    with console.status("drawing and painting a clip"), Stylizer.load(bundle, backend=backend) as stylizer:
        examples.write_moving(source, CLIP_FRAMES, width_px=EXAMPLE_PX, height_px=EXAMPLE_PX * 3 // 4)
        stylizer.set_style(style)
        stream = FrameStream(stylizer, batching=GROUPED)
        report = transcode_stream(source, sink, stream.frames, overwrite=True)
    typer.echo(f"clip: {sink} ({report.frames} frames, {report.frames / report.seconds:.1f} fps)")
    typer.echo(f"live without a camera: std-rt live --style {out / 'styles'} --camera {source}")


def contact_sheet(scenes: dict[str, Frame], styles: dict[str, Frame], results: dict[int, Outputs]) -> Frame:
    """Two columns of rows ``input | style | result at each size``; every style twice."""
    names = list(styles)
    pairs = [(scene, names[(i * 3 + k) % len(names)]) for i, scene in enumerate(scenes) for k in range(3)]
    rows = [
        _row([scenes[scene], styles[style], *(results[size][scene, style] for size in results)])
        for scene, style in pairs
    ]
    titles = _titles(["input", "style", *(f"{size} px" for size in results)])
    half = (len(rows) + 1) // 2
    left = np.concatenate([titles, *rows[:half]])
    blank = [np.full_like(rows[0], 255)] * (2 * half - len(rows))
    right = np.concatenate([titles, *rows[half:], *blank])
    gap = np.full((left.shape[0], 3 * _GAP, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], 1)


def pair_grid(scenes: dict[str, Frame], styles: dict[str, Frame], outputs: Outputs) -> Frame:
    """Styles along the top, inputs down the left, the result of each pair where they meet."""
    corner = np.full((_TILE, _TILE, 3), 255, np.uint8)
    rows = [_row([corner, *styles.values()])]
    rows += [_row([frame, *(outputs[scene, style] for style in styles)]) for scene, frame in scenes.items()]
    return np.concatenate(rows)


def _row(frames: list[Frame]) -> Frame:
    tiles = [cv2.resize(frame, (_TILE, _TILE), interpolation=cv2.INTER_AREA) for frame in frames]
    edged = [np.pad(tile, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=255) for tile in tiles]
    return np.asarray(np.concatenate(edged, 1), np.uint8)


def _titles(texts: list[str]) -> Frame:
    strip = np.full((_TITLE, len(texts) * (_TILE + _GAP), 3), 255, np.uint8)
    for i, text in enumerate(texts):
        at = (i * (_TILE + _GAP) + 2, _TITLE - 7)
        cv2.putText(strip, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (40, 40, 40), 1, cv2.LINE_AA)
    return strip
