"""`std-rt demo`: example pictures in example styles at two sizes, contact sheets, and a clip."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer import Option

from std_rt.cli.options import BackendOption, BundleOption, DeviceOption, use_device
from std_rt.cli.stylize import StylizeRequest
from std_rt.cli.terminal import program, progress_lines, working
from std_rt.core.machine import quoted

if TYPE_CHECKING:
    from std_rt.core.arrays import Frame

    Pictures = dict[str, Frame]

__all__ = ["demo"]

EXAMPLE_PX = 512
SIZES = (256, 512)
CLIP_FRAMES, _CLIP_STYLE = 90, "stained_glass"
_TILE_PX = 192


def demo(
    output: Annotated[Path, Option("--output", "-o", metavar="FOLDER")] = Path("demo"),
    bundle: BundleOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Stylize example pictures in example styles, and lay out the results on two sheets."""
    import numpy as np

    from std_rt import examples
    from std_rt.evaluation.picture_quality import write_sheet

    use_device(device)
    scenes = _write(examples.scenes(EXAMPLE_PX), output / "inputs")
    styles = _write(examples.styles(EXAMPLE_PX), output / "styles")
    results = {size: _stylize(scenes, styles, size, output / str(size), bundle, backend) for size in SIZES}
    _clip(styles[_CLIP_STYLE], output, bundle, backend)
    # Each scene in three styles, each style twice; then everything in everything.
    names = list(styles)
    pairs = [(scene, names[(3 * i + k) % len(names)]) for i, scene in enumerate(scenes) for k in range(3)]
    rows = [
        _tiles(scenes[scene], styles[style], *(results[size][f"{scene}_{style}"] for size in SIZES))
        for scene, style in pairs
    ]
    titles = ["input", "style", *(f"{size} px" for size in SIZES)]
    write_sheet(output / "sheet.png", rows, columns=2, names=dict(enumerate(titles * 2)))
    largest, white = results[SIZES[-1]], np.full((1, 1, 3), 255, np.uint8)
    grid = [_tiles(white, *styles.values())]
    grid += [_tiles(scenes[scene], *(largest[f"{scene}_{style}"] for style in styles)) for scene in scenes]
    write_sheet(output / "grid.png", grid)
    typer.echo(f"every pair: {output / 'grid.png'}")
    typer.echo(f"contact sheet ({' | '.join(titles)}): {output / 'sheet.png'}")


def _write(frames: Pictures, folder: Path) -> Pictures:
    from std_rt.media.image import write_picture

    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        write_picture(folder / f"{name}.png", frame)
    return frames


def _stylize(
    scenes: Pictures, styles: Pictures, size: int, folder: Path, bundle: str | None, backend: str
) -> Pictures:
    """Every pair at a working size, by the name SCENE_STYLE, and as files in ``folder``."""
    from rich.progress import track

    from std_rt.media.image import write_picture
    from std_rt.pipeline.stylizer import Stylizer

    console = Console(stderr=True)
    folder.mkdir(exist_ok=True)
    results: Pictures = {}
    seconds: list[float] = []
    lines = progress_lines(console)
    pairs = [(scene, style) for style in styles for scene in scenes]
    with Stylizer.load(bundle, backend=backend, size=size) as stylizer:
        stylizer.prepare(EXAMPLE_PX, EXAMPLE_PX)
        hidden = not console.is_terminal
        for scene, style in track(pairs, f"{size} px", console=console, transient=True, disable=hidden):
            lines(f"pictures at {size} px", len(results), len(pairs))
            stylizer.set_style(styles[style])
            begun = time.perf_counter()
            results[f"{scene}_{style}"] = stylizer.stylize(scenes[scene])
            seconds.append(time.perf_counter() - begun)
            write_picture(folder / f"{scene}_{style}.png", results[f"{scene}_{style}"])
        typer.echo(
            f"{size} px: {len(pairs)} pictures, {1000 * median(seconds):.0f} ms each "
            f"({stylizer.bundle.name}, {stylizer.steps} steps, {stylizer.backend} {stylizer.precision})"
        )
    return results


def _clip(style: Frame, output: Path, bundle: str | None, backend: str) -> None:
    """A moving example, ``inputs/moving.mp4``, and ``moving_styled.mp4``, made as `std-rt stylize` does."""
    from std_rt.examples import write_moving
    from std_rt.media.video.transcode import transcode_stream
    from std_rt.pipeline.stylizer import Stylizer
    from std_rt.streaming.frame_stream import GROUPED, FrameStream
    from std_rt.streaming.temporal import TemporalFilter

    source, sink = output / "inputs" / "moving.mp4", output / "moving_styled.mp4"
    status = working(Console(stderr=True), "rendering and stylizing a clip")
    with status, Stylizer.load(bundle, backend=backend) as stylizer:
        write_moving(source, CLIP_FRAMES, width_px=EXAMPLE_PX, height_px=EXAMPLE_PX * 3 // 4)
        stylizer.set_style(style)
        stream = FrameStream(stylizer, batching=GROUPED, temporal=TemporalFilter(StylizeRequest.temporal))
        report = transcode_stream(source, sink, stream.frames, overwrite=True)
    typer.echo(
        f"clip: {sink} ({report.frames} frames, painted at {report.frames / report.seconds:.1f} a second)"
    )
    styles = quoted(str(output / "styles"))
    typer.echo(f"live without a camera: {program()} live --style {styles} --camera {quoted(str(source))}")


def _tiles(*frames: Frame) -> list[Frame]:
    """Frames at the size they have on a sheet."""
    import cv2
    import numpy as np

    side = (_TILE_PX, _TILE_PX)
    return [np.asarray(cv2.resize(frame, side, interpolation=cv2.INTER_AREA), np.uint8) for frame in frames]
