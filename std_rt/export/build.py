"""The export from start to end: read, fuse, trace, write, compare, then name the bundle."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from std_rt.core.bundle import TINY, Bundle, write_bundle
from std_rt.core.errors import ExportError
from std_rt.export.export_options import LARGE, ExportOptions
from std_rt.export.graph_precision import half_dtype, to_half, vae_compute, within_range
from std_rt.export.graphs import (
    Example,
    Graph,
    ReferenceRun,
    style_graph,
    trace,
    unet_graph,
    vae_graphs,
)
from std_rt.export.lora_fusion import read_metadata, source_digest
from std_rt.export.modules import prepare_attention
from std_rt.export.parity import check_graph, lint
from std_rt.export.resources import check_room, estimate_export
from std_rt.export.sampling_choice import (
    LoraNotes,
    Trajectory,
    check_base,
    check_style,
    check_style_layers,
    choose_trajectory,
    guidance_mode,
    read_notes,
    remarks,
    schedule_section,
)
from std_rt.export.source_pipeline import Source, Style, read_source
from std_rt.export.text import TextConstants, TextParts
from std_rt.export.weights import externalize
from std_rt.models.clip_style import ClipStyleEncoder
from std_rt.models.components import Network
from std_rt.models.ip_adapter import Branches, attach_diffusers, detach_diffusers

__all__ = ["export_pipeline"]

Progress = Callable[[str], None]
_SMALLEST_PX, _LARGEST_PX = 64, 2048
_PACKAGES = ("std-rt", "torch", "diffusers", "transformers", "peft", "onnx", "onnxscript", "onnxruntime",
             "openvino")  # fmt: skip


def export_pipeline(
    source: Path,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda note: None,
    remark: Progress = lambda note: None,
    **choices: Any,
) -> Bundle:
    """Export the SDXL-layout folder ``source`` to the bundle ``output``.

    ``choices`` are the fields of `ExportOptions`. Every graph is compared with torch before the bundle gets
    its name. ``remark`` gets a line on each allowed but unusual choice. Raises ExportError or
    BundleError.
    """
    options = ExportOptions(Path(source), Path(output), **choices)
    notes = [read_notes(path, read_metadata(path)) for path, _ in options.lora]
    trajectory = _plan(options, notes, remark)
    options = replace(options, style_layers=check_style(options, notes))

    def fill(folder: Path) -> dict[str, Any]:
        try:
            return Build(folder, options, trajectory, progress, notes).run()
        except (MemoryError, RuntimeError) as error:
            # torch reports it as a RuntimeError.
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            raise ExportError(
                "this machine's memory is too small for the export; close other programs or add swap"
            ) from error

    return write_bundle(options.output, fill, overwrite=overwrite)


def _plan(options: ExportOptions, notes: Sequence[LoraNotes], remark: Progress) -> Trajectory:
    """The schedule, from flags and the LoRAs' notes; what does not fit is found before weights are read."""
    trajectory = choose_trajectory(options, notes)
    guidance_mode(options, trajectory)  # raises before the work if it does not fit
    if any(note.base_digest for note in notes):
        check_base(options, notes, source_digest(options.source / "unet"))
    for line in remarks(options, trajectory, notes):
        remark(line)
    parts = {"vae": options.vae, "image_encoder": options.image_encoder}
    parts |= {"motion_adapter": options.motion_adapter}
    stored = options.precision if options.precision in ("fp16", "bf16") else options.weights
    need = estimate_export(
        options.source,
        stored,
        adapter=options.ip_adapter,
        parts={name: folder for name, folder in parts.items() if folder is not None},
        text=options.prompts == "encoder",
    )
    check_room(need, options.output)
    return trajectory


class Build:
    """The parts of one bundle, loaded, compared and written one after the other."""

    def __init__(
        self,
        folder: Path,
        options: ExportOptions,
        trajectory: Trajectory,
        progress: Progress,
        notes: Sequence[LoraNotes] = (),
    ) -> None:
        self._folder, self._options, self._trajectory = folder, options, trajectory
        self._progress = progress
        progress("reading the pipeline")
        self._source = read_source(options)
        check_style_layers(self._source.layers, notes)
        self._parts = TextParts(options.source, options.prompt, options.negative)
        if options.prompts == "encoder" and not self._parts.roles:
            raise ExportError(f"{options.source} has no text encoders; omit --prompts encoder")
        self._size = options.working_size(self._source.parameters)
        self._multiple = _check_size(self._size, self._source)
        self._compute = options.compute(self._source.parameters)
        # A large graph is compared at the smaller size alone, and on one backend: a minute each.
        self._large = self._source.parameters >= LARGE
        full = [] if self._large else [ReferenceRun(self._size, 1.0)]
        self._runs = [*full, ReferenceRun(_other_size(self._size, self._multiple), 0.5)]
        self._reference: dict[str, Example] = {}
        self._graphs: dict[str, dict[str, Any]] = {}
        self._parity: dict[str, dict[str, Any]] = {}
        self._precision: dict[str, dict[str, str]] = {}

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Everything but the manifest, which is returned."""
        style, branches = self._style()
        self._vaes(style)
        # The encoder is written; what follows needs its numbers only.
        style = replace(style, module=torch.nn.Identity())
        text = self._text(style)
        self._unet(style, branches, text)
        # The smaller example: enough for a self-check, and small enough to ship.
        reference = {
            f"{name}/{side}/{key}": value
            for name, example in self._reference.items()
            for side, arrays in (("in", example.inputs), ("out", example.outputs))
            for key, value in arrays.items()
        }
        np.savez_compressed(self._folder / "reference.npz", allow_pickle=False, **reference)
        self._progress("hashing")
        return self._manifest(style, branches)

    def _style(self) -> tuple[Style, Branches]:
        self._progress("style encoder: torch")
        style, branches = self._source.load_style()
        with within_range(style.module, self._compute, "style encoder"):
            examples = [run.style(style) for run in self._runs]
        compute = "fp32"
        dtype = half_dtype(self._compute)
        if dtype is not None and isinstance(style.module, ClipStyleEncoder):
            to_half(style.module.module, dtype)
            style.module.dtype, compute = dtype, self._compute
        self._write(style_graph(style), compute)
        self._check("style_encoder", examples)
        return style, branches

    def _vaes(self, style: Style) -> None:
        """The VAE, and before it the tiny one: the last latents are those that the UNet is compared with."""
        if self._options.tiny_vae is not None:
            self._vae(self._source.load_tiny_vae(self._options.tiny_vae), style, TINY)
        self._vae(self._source.load_vae(), style)

    def _vae(self, vae: Network, style: Style, prefix: str = "") -> None:
        self._progress(f"{prefix}vae: torch")
        compute = vae_compute(vae, self._compute)
        with within_range(vae, compute, "vae"):
            examples = list(zip(*(run.vae(vae) for run in self._runs), strict=True))
        dtype = half_dtype(compute)
        if dtype is not None:
            to_half(vae, dtype)
        graphs = vae_graphs(self._source, vae, dtype or torch.float32, style)
        for graph, found in zip(graphs, examples, strict=True):
            named = replace(graph, name=f"{prefix}{graph.name}")
            self._write(named, compute)
            self._check(named.name, list(found))

    def _text(self, style: Style) -> TextConstants:
        """Prompts, one encoder in memory at a time; for open prompts the encoders' graphs too."""
        source, options = self._source, self._options
        parts, open_prompts = self._parts, options.prompts == "encoder"
        for role in parts.roles:
            self._progress(f"{role}: torch")
            encoder = source.load_text_encoder(role)
            parts.encode(role, encoder)
            examples = parts.examples(role, encoder) if open_prompts else []
            if open_prompts:
                self._write(parts.graph(role, encoder), "fp32")
            del encoder
            if open_prompts:
                self._check(role, examples)
        if open_prompts:
            parts.write_tokenizers(self._folder)
        text = parts.constants(source.text_dims)
        source.check_text(text.arrays)
        constants = {**text.arrays, "negative_style_tokens": style.negative.numpy()}
        np.savez(self._folder / "conditioning.npz", allow_pickle=False, **constants)
        self._text_section = {
            "mode": "encoder" if open_prompts else text.mode,
            "prompt": options.prompt,
            "negative": options.negative,
            "zero_negative": text.zero_negative,
            "chunks": text.chunks,
            "file": "conditioning.npz",
        } | ({"tokenizers": parts.tokenizer_folders} if open_prompts else {})
        return text

    def _unet(self, style: Style, branches: Branches, text: TextConstants) -> None:
        self._progress("unet: reading, fusing LoRAs")
        unet = self._source.load_unet()
        self._progress("unet: torch")
        attach_diffusers(unet, branches, style.tokens)
        schedule = self._source.schedule
        start = self._trajectory.rows(schedule, self._trajectory.steps[0])[0].timestep
        with within_range(unet, self._compute, "unet"):
            examples = [run.unet(unet, self._source, start, text.arrays) for run in self._runs]
        detach_diffusers(unet)
        prepare_attention(unet, branches, fused=self._compute == "fp16")
        dtype = half_dtype(self._compute)
        if dtype is not None:
            to_half(unet, dtype)
        tokens: int | str = (
            "text_tokens" if self._source.text_roles else text.arrays["encoder_hidden_states"].shape[1]
        )
        graph = unet_graph(self._source, unet, dtype or torch.float32, style, tokens)
        self._write(graph, self._compute)
        # Freed before an engine is opened, which takes as much memory once more.
        del graph, unet
        gc.collect()
        self._check("unet", examples)

    def _write(self, graph: Graph, compute: str) -> None:
        """Trace and store."""
        self._graphs[graph.name] = graph.entry()
        weights = self._options.weights if compute == "fp32" else compute
        self._precision[graph.name] = {"compute": compute, "weights": weights}
        self._progress(f"{graph.name}: tracing")
        path = self._folder / f"{graph.name}.onnx"
        externalize(trace(graph.plan), graph.state, path, self._folder / graph.weights, weights)
        lint(path)

    def _check(self, name: str, examples: list[Example]) -> None:
        """Compare what was written with torch. Raises ExportError if it differs."""
        self._progress(f"{name}: comparing with torch")
        self._reference[name] = examples[-1]
        precision = self._precision[name]
        floor = precision["weights"] if precision["compute"] == "fp32" else precision["compute"]
        path = self._folder / f"{name}.onnx"
        self._parity[name] = check_graph(name, path, examples, floor, lean=self._large)

    def _manifest(self, style: Style, branches: Branches) -> dict[str, Any]:
        options, source = self._options, self._source
        return {
            "name": options.bundle_name,
            "created_with": _versions(),
            "size": {
                "default": list(self._size),
                "multiple": self._multiple,
                "min": _SMALLEST_PX,
                "max": _LARGEST_PX,
            },
            "vae_scale": source.vae_scale,
            "latent_channels": source.unet.config.out_channels,
            "unet_inputs": list(source.unet_inputs),
            **_window_section(options),
            "schedule": schedule_section(source.schedule, self._trajectory),
            "guidance": {
                "mode": guidance_mode(options, self._trajectory),
                "scale": self._trajectory.guidance,
            },
            "style": {
                "image_px": style.image_px,
                "tokens": style.tokens,
                "dim": style.dim,
                "gives_text_embeds": style.text_dim is not None,
                "strength_range": [0, 2],
                "layout": {"name": source.layout, "layers": list(branches)},
            },
            "text": self._text_section,
            "precision": self._precision,
            "graphs": self._graphs,
            "sources": source.listed(),
            "parity": self._parity,
        }


def _window_section(options: ExportOptions) -> dict[str, Any]:
    if options.window is None:
        return {}
    frames, overlap = options.window
    return {"window": {"frames": frames, "overlap": overlap}}


def _check_size(size: tuple[int, int], source: Source) -> int:
    """The number that H and W must divide by. Raises ExportError if they do not."""
    multiple = source.vae_scale * source.latent_multiple
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


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
