"""`std-rt engines list | build | verify | gc`: what was compiled for this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from std_rt.cli.options import SizeOption, StepsOption, parse_size

__all__ = ["engines_app"]

engines_app = typer.Typer(
    help="List, build, verify and clean up what bundles were compiled to on this machine.",
    no_args_is_help=True,
)


@engines_app.command("list")
def engines_list() -> None:
    """List every engine of this machine: of which bundle and graph, for which GPU, how large."""
    from std_rt.cli.engines_run import show_list

    show_list()


@engines_app.command("build")
def engines_build(
    bundle: Annotated[str | None, typer.Argument(metavar="NAME|FOLDER")] = None,
    backend: Annotated[str, typer.Option("--backend", help="rtx, tensorrt or openvino.")] = "rtx",
    size: SizeOption = None,
    frame: Annotated[
        str | None,
        typer.Option("--frame", metavar="WxH", help="Size of the frames to come; default: the working size."),
    ] = None,
    steps: StepsOption = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="1 is none; default: the bundle's.")
    ] = None,
    guidance_mode: Annotated[
        str | None, typer.Option("--guidance-mode", help="none, full or residual.")
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="auto, or fp32 for no TF32.")] = "auto",
    sm: Annotated[
        str, typer.Option("--sm", metavar="89,120", help="GPUs to build rtx for; default: the one here.")
    ] = "",
) -> None:
    """Build ahead what a bundle needs at a size, so that the first frame need not wait for it.

    std-rt engines build my-bundle --backend rtx --size 512 --sm 89,120
    """
    wanted, coming = parse_size(size), parse_size(frame)
    from std_rt.cli.engines_run import Wanted, build

    build(
        Wanted(
            bundle=bundle,
            backend=backend,
            size=wanted,
            frame=(coming, coming) if isinstance(coming, int) else coming,
            steps=steps,
            guidance=guidance,
            guidance_mode=guidance_mode,
            precision=precision,
            targets=_targets(sm),
        )
    )


@engines_app.command("verify")
def engines_verify() -> None:
    """Hash every engine against the machine's list; exit 2 where one has changed."""
    from std_rt.cli.engines_run import verify

    verify()


@engines_app.command("gc")
def engines_gc(
    older_than: Annotated[
        float | None, typer.Option("--older-than", metavar="DAYS", min=0, help="Not used for so long.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All engines.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
) -> None:
    """Remove what is of no use any more: changed, of bundles that are gone, of other versions or drivers."""
    from std_rt.cli.engines_run import collect

    collect(older_than, everything=everything, dry_run=dry_run)


def _targets(text: str) -> tuple[str, ...]:
    """``89,sm120`` -> ("sm89", "sm120"). Raises BadParameter on anything else."""
    names = [
        name.strip().lower().removeprefix("sm").replace(".", "") for name in text.split(",") if name.strip()
    ]
    if not all(name.isdecimal() for name in names):
        raise typer.BadParameter(f"{text!r} names no GPUs; use compute capabilities such as --sm 89,120")
    return tuple(dict.fromkeys(f"sm{name}" for name in names))
