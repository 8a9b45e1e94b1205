"""`std-rt bundles list | info | verify`."""

from __future__ import annotations

from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from std_rt.core.bundle import Bundle, list_bundles, load_bundle, search_paths, verify_bundle

__all__ = ["show_info", "show_list", "verify"]


def show_list() -> None:
    """One row a bundle; a broken one is named with what is wrong."""
    found = list_bundles()
    if not found:
        places = ", ".join(str(path) for path in search_paths())
        typer.echo(f"no bundles; looked inside std-rt and in {places}")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("name", "size", "steps", "style", "MB", "where"):
        table.add_column(title, overflow="fold")
    for item in found:
        table.add_row(*_row(item))
    Console().print(table)


def _row(item: Bundle | tuple[str, Exception]) -> tuple[str, ...]:
    if isinstance(item, tuple):
        return item[0], "", "", "", "", f"[red]{escape(str(item[1]))}[/]"
    height, width = item.size_default
    steps = ", ".join(str(n) for n in item.steps_allowed)
    megabytes = f"{item.total_bytes / 2**20:.1f}"
    return (
        item.name,
        f"{width}x{height}",
        steps,
        f"{item.style['tokens']} tokens",
        megabytes,
        escape(str(item.path)),
    )


def show_info(source: str | None) -> None:
    """Everything in the manifest that a person asks about."""
    bundle = load_bundle(source, verify=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in _facts(bundle):
        table.add_row(key, escape(value))
    Console().print(table)


def _facts(bundle: Bundle) -> Iterator[tuple[str, str]]:
    manifest = bundle.manifest
    height, width = bundle.size_default
    low, high = bundle.size_range
    yield "name", bundle.name
    yield "folder", str(bundle.path)
    yield "digest", bundle.digest
    yield (
        "size",
        f"{width}x{height} px by default, {low} to {high} px a side, multiples of {bundle.size_multiple}",
    )
    yield "schedule", f"{bundle.prediction_type}, eta {bundle.eta:g}, tau {bundle.tau}"
    for steps in bundle.steps_allowed:
        default = " (default)" if steps == bundle.default_steps else ""
        yield f"{steps} steps", ", ".join(str(c.timestep) for c in bundle.coefficients(steps)) + default
    yield "guidance", f"{bundle.guidance['mode']}, scale {bundle.guidance['scale']:g}"
    yield "style", f"{bundle.style['tokens']} tokens from {bundle.style_px} px"
    yield "text", str(manifest["text"]["mode"])
    for name in bundle.graph_names:
        yield f"graph {name}", _graph(bundle, name)
    for source in manifest.get("sources", []):
        yield (
            f"source {source['role']}",
            f"{source['id']} ({source['licence']}) sha256 {source['sha256'][:16]}",
        )
    yield "made with", ", ".join(f"{key} {value}" for key, value in manifest.get("created_with", {}).items())


def _graph(bundle: Bundle, name: str) -> str:
    precision = bundle.manifest.get("precision", {}).get(name, {})
    parity = bundle.manifest.get("parity", {}).get(name)
    megabytes = bundle.weights_path(name).stat().st_size / 2**20
    line = f"{megabytes:.1f} MB, weights {precision.get('weights', '?')}"
    return f"{line}, {parity['psnr_db']:.1f} dB against {parity['against']}" if parity else line


def verify(source: str | None) -> None:
    """Hash all files; BundleError names the one that has changed."""
    bundle = load_bundle(source, verify=False)
    verify_bundle(bundle)
    count = len(bundle.manifest["files"])
    typer.echo(f"{bundle.name}: {count} files, {bundle.total_bytes / 2**20:.1f} MB, all as exported")
