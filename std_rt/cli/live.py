"""`std-rt live`: its options. Everything heavy is imported when it runs (`live_run`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from std_rt.cli.options import (
    BackendOption,
    BundleOption,
    GuidanceModeOption,
    GuidanceOption,
    OverwriteOption,
    PrecisionOption,
    SizeOption,
    StepsOption,
    TemporalOption,
    check_temporal,
    parse_size,
)
from std_rt.cli.styles import expand_styles

__all__ = ["live"]


def live(
    style: Annotated[
        list[str],
        typer.Option(
            "--style",
            "-s",
            metavar="PICTURE[:WEIGHT]|FOLDER",
            help="Picture, style file, or folder of them; repeatable. Weights begin with a blend.",
        ),
    ],
    camera: Annotated[
        str, typer.Option("--camera", "-c", metavar="N|DEVICE|FILE", help="A clip can stand in for a camera.")
    ] = "0",
    bundle: BundleOption = None,
    size: SizeOption = None,
    steps: StepsOption = None,
    strength: Annotated[float, typer.Option("--style-strength", help="0 none, 1 as trained.")] = 1.0,
    crossfade: Annotated[
        float, typer.Option("--crossfade", metavar="SECONDS", min=0, help="Of a change of style.")
    ] = 1.0,
    cycle: Annotated[
        float | None,
        typer.Option("--cycle", metavar="SECONDS", help="Next style by itself; 10 for a folder, 0 never."),
    ] = None,
    stream_batch: Annotated[
        bool, typer.Option("--stream-batch", help="More frames a second, some frames later.")
    ] = False,
    temporal: TemporalOption = None,
    similar: Annotated[
        float | None,
        typer.Option("--skip-similar", metavar="0..1", help="Skip frames more similar than this: 0.98."),
    ] = None,
    target_fps: Annotated[
        float | None, typer.Option("--target-fps", help="Hold it with fewer steps or a smaller size.")
    ] = None,
    mirror: Annotated[bool | None, typer.Option("--mirror/--no-mirror", help="Default: cameras.")] = None,
    window: Annotated[bool, typer.Option("--window/--no-window", help="Show a window.")] = True,
    fullscreen: Annotated[bool, typer.Option("--fullscreen", help="Begin in full screen.")] = False,
    record: Annotated[
        Path | None, typer.Option("--record", metavar="CLIP", help="Record from the start; key R: any time.")
    ] = None,
    virtual_camera: Annotated[
        bool, typer.Option("--virtual-camera", help="For calls. Needs: pip install 'std-rt\\[live]'")
    ] = False,
    virtual_device: Annotated[
        str | None, typer.Option("--virtual-device", metavar="DEVICE", help="Which one; default: the first.")
    ] = None,
    snapshots: Annotated[
        Path, typer.Option("--snapshots", metavar="FOLDER", help="Where key S puts pictures.")
    ] = Path(),
    metrics: Annotated[
        Path | None, typer.Option("--metrics", metavar="FILE", help="Figures every second, as JSON lines.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option("--duration", metavar="SECONDS", help="End after so long.")
    ] = None,
    camera_size: Annotated[
        str | None, typer.Option("--camera-size", metavar="WxH", help="Asked of the camera.")
    ] = None,
    camera_fps: Annotated[float | None, typer.Option("--camera-fps", help="Asked of the camera.")] = None,
    loop: Annotated[bool, typer.Option("--loop/--once", help="A clip as camera plays again.")] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same noise.")] = 0,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Words, for a bundle exported with --prompts encoder.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option("--negative-prompt", help="What not to paint; counts with guidance.")
    ] = None,
    guidance: GuidanceOption = None,
    guidance_mode: GuidanceModeOption = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    build_in_background: Annotated[
        bool, typer.Option("--build-in-background", help="Begin on the CPU while GPU engines are built.")
    ] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Paint a camera live in the style of a picture. In the window, H shows the keys.

    std-rt live --style art.png

    std-rt live -s paintings/ --camera clip.mp4 --stream-batch --record out.mp4
    """
    styles = expand_styles(style)
    has_folder = any(Path(text).is_dir() for text in style)
    working, asked = parse_size(size), parse_size(camera_size)
    from std_rt.cli.live_run import Request, run

    request = Request(
        styles=styles,
        camera=camera,
        camera_size=(asked, asked) if isinstance(asked, int) else asked,
        camera_fps=camera_fps,
        loop=loop,
        mirror=mirror,
        bundle=bundle,
        size=working,
        steps=steps,
        backend=backend,
        precision=precision,
        prompts=(prompt, negative),
        guidance=(guidance, guidance_mode),
        build_in_background=build_in_background,
        strength=strength,
        crossfade_s=crossfade,
        cycle_s=(10.0 if has_folder else 0.0) if cycle is None else cycle,
        stream_batch=stream_batch,
        temporal=check_temporal(temporal, "live"),
        similar=similar,
        target_fps=target_fps,
        seed=seed,
        window=window,
        fullscreen=fullscreen,
        record=record,
        virtual=virtual_camera or virtual_device is not None,
        virtual_device=virtual_device,
        snapshots=snapshots,
        metrics=metrics,
        duration_s=duration,
        overwrite=overwrite,
    )
    raise typer.Exit(run(request))
