"""The command line: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from std_rt import __version__
from std_rt.cli.engines import engines_app
from std_rt.cli.evaluate import evaluate
from std_rt.cli.live import live
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
    parse_style,
)
from std_rt.cli.styles import styles_app
from std_rt.core.errors import StdRtError

__all__ = ["app", "main"]

app = typer.Typer(
    name="std-rt",
    help="Stylize pictures and video with a diffusion model, in real time and without torch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bundles_app = typer.Typer(help="List, describe and verify bundles (models).", no_args_is_help=True)
app.add_typer(bundles_app, name="bundles")
app.add_typer(engines_app, name="engines")
app.add_typer(styles_app, name="styles")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"std-rt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Stylize pictures and video with a diffusion model, in real time and without torch."""


@app.command()
def stylize(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Pictures, clips or folders.")],
    style: Annotated[
        list[str],
        typer.Option(
            "--style",
            "-s",
            metavar="PICTURE[:WEIGHT]",
            help="Picture or style file; several blend by weight.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE|FOLDER", help="Default: NAME_styled beside it."),
    ] = None,
    bundle: BundleOption = None,
    size: SizeOption = None,
    steps: StepsOption = None,
    strength: Annotated[float, typer.Option("--style-strength", help="0 none, 1 as trained.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same noise, same picture.")] = 0,
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
    temporal: TemporalOption = None,
    build_in_background: Annotated[
        bool, typer.Option("--build-in-background", help="Begin on the CPU while GPU engines are built.")
    ] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Paint pictures, folders and clips in the style of a picture.

    std-rt stylize photo.jpg --style art.png

    std-rt stylize clip.mp4 -s art.png:0.7 -s ink.png:0.3 -o styled.mp4 --size 512
    """
    styles = [parse_style(text) for text in style]
    working = parse_size(size)
    from std_rt.cli.stylize import Request, run

    request = Request(
        inputs,
        styles,
        out,
        overwrite,
        strength,
        seed,
        bundle,
        working,
        steps,
        backend,
        precision,
        (prompt, negative),
        (guidance, guidance_mode),
        build_in_background,
        check_temporal(temporal, "file"),
    )
    raise typer.Exit(run(request))


@app.command()
def export(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[BASE]",
            help="Hub id, diffusers folder or .safetensors checkpoint; default: SDXL with STD.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="The bundle; default: engines/NAME."),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option("--lora", metavar="FILE|HUB[:SCALE]", help="Fused in; repeatable.")
    ] = None,
    ip_adapter: Annotated[
        str | None, typer.Option("--ip-adapter", metavar="FILE|HUB", help="Or: plus, base, base-bigg.")
    ] = None,
    image_encoder: Annotated[str | None, typer.Option("--image-encoder", help="Its CLIP folder.")] = None,
    vae: Annotated[str | None, typer.Option("--vae", help="Folder, hub id, fp16-fix or tiny.")] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="Pipeline whose configs a checkpoint file takes.")
    ] = None,
    profile: Annotated[
        str,
        typer.Option("--profile", help="Schedule of a published LoRA: std-0.75, tcd, lightning-4step, ..."),
    ] = "",
    eta: Annotated[float | None, typer.Option("--eta", help="Start; default: the LoRA's, or 0.75.")] = None,
    tau: Annotated[int | None, typer.Option("--tau", help="Start as a timestep; default: eta's.")] = None,
    steps: Annotated[
        list[int] | None, typer.Option("--steps", help="Step count; repeatable, the first is the default.")
    ] = None,
    schedule: Annotated[
        str, typer.Option("--schedule", help="auto, or diffusers: as its img2img pipeline, for parity.")
    ] = "auto",
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Scale, 1 is none; default: the profile's, or 1.")
    ] = None,
    guidance_mode: Annotated[
        str,
        typer.Option("--guidance-mode", help="full (twice the work) or residual (one call more a frame)."),
    ] = "auto",
    size: Annotated[
        str | None, typer.Option("--size", metavar="PX|WxH", help="Working size; default 512 or 256.")
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="auto, fp32, fp16, bf16 or int8 (see docs/export.md).")
    ] = "auto",
    weights: Annotated[
        str, typer.Option("--weights", help="Stored weights of fp32 graphs: fp16, fp32.")
    ] = "fp16",
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", metavar="FOLDER", help="Pictures to calibrate int8 on.")
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="Baked in, where there are text encoders.")] = "",
    negative: Annotated[
        str | None, typer.Option("--negative-prompt", help="For guidance; default: the model's own none.")
    ] = None,
    prompts: Annotated[
        str, typer.Option("--prompts", help="baked, or encoder: text encoders go into the bundle.")
    ] = "baked",
    style_layers: Annotated[
        str, typer.Option("--style-layers", help="auto, all, published or layer prefixes.")
    ] = "auto",
    name: Annotated[str, typer.Option("--name", help="Default: the folder's name.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Download without asking.")] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn a diffusers pipeline (and a LoRA) into a bundle. Needs: pip install 'std-rt\\[export]'

    std-rt export --eta 0.75 --steps 4

    std-rt export my-sdxl.safetensors --lora tcd.safetensors --profile tcd --ip-adapter plus
    """
    from std_rt.cli.build import run_export

    run_export(
        source,
        output,
        lora=tuple(lora or ()),
        ip_adapter=ip_adapter,
        image_encoder=image_encoder,
        vae=vae,
        config=config,
        profile=profile,
        eta=eta,
        tau=tau,
        steps=tuple(steps or ()),
        schedule=schedule,
        guidance=guidance,
        guidance_mode=guidance_mode,
        size=parse_size(size),
        precision=precision,
        weights=weights,
        calibrate=calibrate,
        prompt=prompt,
        negative=negative,
        prompts=prompts,
        style_layers=style_layers,
        name=name,
        yes=yes,
        overwrite=overwrite,
    )


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FOLDER", help="The run folder.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", metavar="N", help="Optimizer steps.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of everything random.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print recipe, parameters, memory and time; train nothing.")
    ] = False,
) -> None:
    """Run a training recipe; run again, it goes on where it stopped. Needs: pip install 'std-rt\\[train]'

    std-rt train training/std_tiny.toml --set method=tcd --output runs/tcd --seed 1
    """
    from std_rt.cli.build import run_train

    given = {"output": output, "steps": max_steps, "seed": seed}
    run_train(recipe, tuple(overrides or ()), given, dry_run=dry_run)


@app.command()
def bench(
    bundle: BundleOption = None,
    size: SizeOption = None,
    steps: StepsOption = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    frames: Annotated[int, typer.Option("--frames", min=1, help="Frames to time.")] = 60,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Frames before the clock starts.")] = 10,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="diffusers|compile", help="The same weights there; repeatable."),
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="All sizes, steps, precisions and backends; takes a while.")
    ] = False,
    first_frame: Annotated[
        bool, typer.Option("--first-frame", help="Seconds from the start of a process to its first frame.")
    ] = False,
    live_too: Annotated[
        bool, typer.Option("--live", help="The latency contract, on a generated clip of 30 fps.")
    ] = False,
    stream_batch: Annotated[bool, typer.Option("--stream-batch", help="With --live.")] = False,
    temporal: TemporalOption = None,
    target_fps: Annotated[float | None, typer.Option("--target-fps", help="With --live.")] = None,
    duration: Annotated[
        float, typer.Option("--duration", metavar="SECONDS", min=1, help="With --live.")
    ] = 20.0,
) -> None:
    """Time every stage. The last line of the output is one JSON object."""
    working = parse_size(size)
    if table + first_frame + live_too > 1:
        raise typer.BadParameter("--table, --first-frame and --live exclude each other")
    if not live_too and (stream_batch or temporal or target_fps):
        raise typer.BadParameter("--stream-batch, --temporal and --target-fps go with --live; add it")
    from std_rt.evaluation.bench import AGAINST, Settings, run, run_first_frame

    for name in against or ():
        if name not in AGAINST:
            raise typer.BadParameter(f"--against knows {' and '.join(AGAINST)}, not {name!r}")
    asked = tuple(dict.fromkeys(against or ()))
    settings = Settings(bundle, working, steps, backend, precision, frames, warmup, asked)
    if live_too:
        from std_rt.evaluation.bench_live import Plan
        from std_rt.evaluation.bench_live import run as run_live
        from std_rt.live.session import Settings as LiveSettings

        how = LiveSettings(
            stream_batch=stream_batch, temporal=check_temporal(temporal, "live"), target_fps=target_fps
        )
        run_live(settings, how, Plan(duration))
        return
    if table:
        from std_rt.evaluation.bench_table import run_table

        run_table(settings)
        return
    (run_first_frame if first_frame else run)(settings)


app.command("live")(live)
app.command("evaluate")(evaluate)
app.command("eval", hidden=True)(evaluate)  # its name in 0.1


@app.command()
def doctor() -> None:
    """Show the machine, the backends found and missing, and the bundles. Exit 1 where stylize cannot run."""
    from std_rt.cli.doctor import run

    raise typer.Exit(run())


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER")] = Path("demo"),
    bundle: BundleOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Stylize example pictures in example styles, and lay out a contact sheet."""
    from std_rt.cli.demo import run

    run(out, bundle, backend)


@bundles_app.command("list")
def bundles_list() -> None:
    """List every bundle in reach."""
    from std_rt.cli.bundles import show_list

    show_list()


@bundles_app.command("info")
def bundles_info(bundle: Annotated[str | None, typer.Argument(metavar="NAME|FOLDER")] = None) -> None:
    """Describe a bundle: sizes, schedule, graphs, sources, parity."""
    from std_rt.cli.bundles import show_info

    show_info(bundle)


@bundles_app.command("unpack")
def bundles_unpack(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The diffusers folder.")],
    bundle: Annotated[str | None, typer.Argument(metavar="NAME|FOLDER")] = None,
) -> None:
    """Turn a bundle back into a diffusers folder, to train on. Needs: pip install 'std-rt\\[export]'"""
    from std_rt.cli.build import unpack

    unpack(bundle, output)


@bundles_app.command("verify")
def bundles_verify(bundle: Annotated[str | None, typer.Argument(metavar="NAME|FOLDER")] = None) -> None:
    """Hash every file of a bundle against its manifest; exit 2 and name the file where one has changed."""
    from std_rt.cli.bundles import verify

    verify(bundle)


def main() -> None:
    """Entry point ``std-rt``: a user error is one line on stderr and exit 2, Ctrl-C is exit 130."""
    try:
        app(prog_name="std-rt")
    except StdRtError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except OSError as error:
        # A path that the system will not even look at: too long, or in a folder that is closed to us.
        if error.filename is None:
            raise
        typer.echo(f"error: {error.filename}: {error.strerror}; check the path", err=True)
        sys.exit(2)
