"""Export from end to end: read, fuse, trace, write, compare, and only then give the bundle its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from std_rt.bundle import Bundle, write_bundle
from std_rt.errors import ExportError
from std_rt.export.graphs import Example, Graph, make_examples, make_graphs
from std_rt.export.lora import read_metadata, source_digest
from std_rt.export.notes import read_notes
from std_rt.export.onnx_graph import Port, trace
from std_rt.export.options import ExportOptions, Trajectory, check_base, choose_trajectory, remarks
from std_rt.export.parity import check_graph, lint
from std_rt.export.pipeline import Pipeline, read_pipeline
from std_rt.export.weights import externalize
from std_rt.schedule import GRID_POINTS, NoiseSchedule, trajectory_timesteps

__all__ = ["export_pipeline", "schedule_section"]

Progress = Callable[[str], None]
_SMALLEST_PX, _LARGEST_PX = 64, 2048
_PACKAGES = (
    "std-rt",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
)


def export_pipeline(
    source: Path,
    output: Path,
    *,
    lora: Sequence[tuple[Path, float]] = (),
    ip_adapter: Path | None = None,
    image_encoder: Path | None = None,
    vae: Path | None = None,
    eta: float | None = None,
    tau: int | None = None,
    steps: Sequence[int] = (),
    size: tuple[int, int] = (256, 256),
    weights: str = "fp16",
    prompt: str = "",
    style_layers: str = "auto",
    name: str = "",
    profile: str = "",
    overwrite: bool = False,
    progress: Progress = lambda note: None,
    remark: Progress = lambda note: None,
) -> Bundle:
    """Export the SDXL-layout folder ``source`` to the bundle ``output``; ``size`` is (H, W) in px.

    ``lora`` are (file, scale) pairs, fused in order. ``eta``, ``tau`` and ``steps`` default to what the
    LoRA notes, or to the published ``profile``'s, or to 0.75 and (4,); the first step count is the bundle's
    default. Every graph is compared with torch before the bundle gets its name. ``remark`` is told what is
    allowed and yet should be known. Raises ExportError or BundleError.
    """
    options = ExportOptions(
        Path(source),
        Path(output),
        tuple((Path(path), scale) for path, scale in lora),
        ip_adapter,
        image_encoder,
        vae,
        eta,
        tau,
        tuple(steps),
        size,
        weights,
        prompt,
        style_layers,
        name,
        profile,
    )
    trajectory = _plan(options, remark)
    return write_bundle(
        options.output, lambda folder: _fill(folder, options, trajectory, progress), overwrite=overwrite
    )


def _plan(options: ExportOptions, remark: Progress) -> Trajectory:
    """The schedule, from flags and the LoRAs' notes; what does not fit is found before weights are read."""
    notes = [read_notes(path, read_metadata(path)) for path, _ in options.lora]
    trajectory = choose_trajectory(options, notes)
    if any(note.base_digest for note in notes):
        check_base(options, notes, source_digest(options.source / "unet"))
    for line in remarks(options, trajectory, notes):
        remark(line)
    return trajectory


def _fill(folder: Path, options: ExportOptions, trajectory: Trajectory, progress: Progress) -> dict[str, Any]:
    progress("reading the pipeline")
    pipeline = read_pipeline(options)
    multiple = _check_size(options.size, pipeline)
    progress("running torch for comparison")
    sizes = [options.size, _other_size(options.size, multiple)]
    examples = [
        make_examples(pipeline, at, trajectory.tau, strength)
        for at, strength in zip(sizes, (1.0, 0.5), strict=True)
    ]
    graphs = make_graphs(pipeline)
    parity = {}
    for graph in graphs:
        progress(f"exporting {graph.name}")
        path = _write_graph(folder, graph, options.weights)
        progress(f"comparing {graph.name} with torch")
        parity[graph.name] = check_graph(
            graph.name, path, [ex[graph.name] for ex in examples], options.weights
        )
    np.savez(folder / "conditioning.npz", **pipeline.text)
    _write_reference(folder, examples[1])
    return _manifest(options, trajectory, pipeline, graphs, multiple) | {"parity": parity}


def _check_size(size: tuple[int, int], pipeline: Pipeline) -> int:
    """The number that H and W must divide by. Raises ExportError where they do not."""
    multiple = pipeline.vae_scale * pipeline.latent_multiple
    for side in size:
        if side % multiple or not _SMALLEST_PX <= side <= _LARGEST_PX:
            raise ExportError(
                f"--size {size[1]}x{size[0]} does not fit: sides must be multiples of {multiple} "
                f"in {_SMALLEST_PX}..{_LARGEST_PX}"
            )
    return multiple


def _other_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Another, smaller and not square size, to catch a graph that only works at one."""
    low = -(-_SMALLEST_PX // multiple) * multiple
    return low, low + multiple if size != (low, low + multiple) else low + 2 * multiple


def _write_graph(folder: Path, graph: Graph, weights: str) -> Path:
    path = folder / f"{graph.name}.onnx"
    externalize(trace(graph.plan), graph.state, path, folder / graph.weights, weights)
    lint(path)
    return path


def _write_reference(folder: Path, examples: dict[str, Example]) -> None:
    """The smaller example: enough for a self-check, and small enough to ship."""
    arrays = {f"{name}/in/{key}": value for name, ex in examples.items() for key, value in ex.inputs.items()}
    arrays |= {
        f"{name}/out/{key}": value for name, ex in examples.items() for key, value in ex.outputs.items()
    }
    np.savez_compressed(folder / "reference.npz", allow_pickle=False, **arrays)


def schedule_section(schedule: NoiseSchedule, trajectory: Trajectory) -> dict[str, Any]:
    """The manifest's ``schedule``: every number a runtime needs to take the steps."""
    steps = {}
    for count in sorted(trajectory.steps):
        timesteps = trajectory_timesteps(trajectory.eta, count, trajectory.tau)
        rows = [
            [c.alpha_t, c.sigma_t, c.alpha_s, c.sigma_s, c.noise]
            for c in schedule.coefficients(timesteps, trajectory.gamma)
        ]
        steps[str(count)] = {"timesteps": timesteps, "coefficients": rows}
    return {
        "prediction_type": schedule.prediction_type,
        "betas": schedule.betas().tolist(),  # not for running: so that a bundle can be trained on again
        "eta": trajectory.eta,
        "tau": trajectory.tau,
        "grid": GRID_POINTS,
        "gamma": trajectory.gamma,
        "default_steps": trajectory.steps[0],
        "steps": steps,
    }


def _manifest(
    options: ExportOptions, trajectory: Trajectory, pipeline: Pipeline, graphs: Sequence[Graph], multiple: int
) -> dict[str, Any]:
    style = pipeline.style
    return {
        "name": options.bundle_name,
        "created_with": _versions(),
        "size": {
            "default": list(options.size),
            "multiple": multiple,
            "min": _SMALLEST_PX,
            "max": _LARGEST_PX,
        },
        "vae_scale": pipeline.vae_scale,
        "latent_channels": pipeline.unet.config.in_channels,
        "schedule": schedule_section(pipeline.schedule, trajectory),
        "guidance": {"mode": "none", "scale": 1.0},
        "style": {
            "image_px": style.image_px,
            "tokens": style.tokens,
            "dim": style.dim,
            "gives_text_embeds": style.text_dim is not None,
            "strength_range": [0, 2],
            "layout": {"name": pipeline.layout, "layers": list(pipeline.branches)},
        },
        "text": {"mode": pipeline.text_mode, "prompt": options.prompt, "file": "conditioning.npz"},
        "precision": {graph.name: {"compute": "fp32", "weights": options.weights} for graph in graphs},
        "graphs": {graph.name: _graph_entry(graph) for graph in graphs},
        "sources": pipeline.sources,
    }


def _graph_entry(graph: Graph) -> dict[str, Any]:
    return {
        "file": f"{graph.name}.onnx",
        "weights": graph.weights,
        "renamed": dict(graph.renamed),
        "class": graph.class_name,
        "config": graph.config,
        "inputs": [_port_entry(port) for port in graph.plan.inputs],
        "outputs": [_port_entry(port) for port in graph.plan.outputs],
    }


def _port_entry(port: Port) -> dict[str, Any]:
    return {"name": port.name, "shape": list(port.shape), "dtype": port.dtype, "meaning": port.meaning}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
