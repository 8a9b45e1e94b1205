"""Assembles the command line: one file per command; heavy packages are imported only when a command runs."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from std_rt import __version__
from std_rt.cli.bench import bench
from std_rt.cli.bulk import bulk
from std_rt.cli.bundles import bundles_app
from std_rt.cli.demo import demo
from std_rt.cli.doctor import doctor
from std_rt.cli.engines import engines_app
from std_rt.cli.evaluate import evaluate
from std_rt.cli.export import export
from std_rt.cli.live import live
from std_rt.cli.options import command_of
from std_rt.cli.serve import app as window
from std_rt.cli.serve import serve
from std_rt.cli.styles import styles_app
from std_rt.cli.stylize import stylize
from std_rt.cli.tally import tally
from std_rt.cli.train import train
from std_rt.core.errors import StdRtError

__all__ = ["app", "main"]

app = typer.Typer(
    name="std-rt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


app.command("stylize")(command_of(stylize))
app.command("bulk")(command_of(bulk))
app.command("export")(command_of(export))
app.command("train")(train)
app.command("bench")(command_of(bench))
app.command("live")(command_of(live))
app.command("serve")(command_of(serve))
app.command("app")(command_of(window))
app.command("evaluate")(command_of(evaluate))
app.command("eval", hidden=True)(command_of(evaluate))  # its old name
app.command("tally")(tally)
app.command("doctor")(doctor)
app.command("demo")(demo)
app.add_typer(bundles_app, name="bundles")
app.add_typer(engines_app, name="engines")
app.add_typer(styles_app, name="styles")


def main() -> None:
    """Entry point ``std-rt``: a user error is one line on stderr and exit 2, Ctrl-C is exit 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not end a batch
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="std-rt")
    except StdRtError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except OSError as error:
        # A path that the system refuses to look at: too long, or in a folder that is closed to the user.
        if error.filename is None:
            raise
        typer.echo(f"error: {error.filename}: {error.strerror}; check the path", err=True)
        sys.exit(2)
