"""A form in 8 bits beside the graphs of a bundle in float: `std-rt export --precision int8`, `bundles int8`.

    quantize_bundle(load_bundle("std-tiny"), Path("engines/std-tiny-int8"))
    quantize_bundle(load_bundle("my-sdxl"), Path("engines/my-sdxl-fp8"), form="fp8")

int8 is for processors and needs the extra ``[int8]``; FP8 is for GPUs. Activations are calibrated on what the
graphs see in use: states on the bundle's own trajectory, from tau down, of pictures under real style tokens,
at every step count that the bundle allows. Then pictures and styles that calibration has not seen are
stylized in float and in 8 bits and compared (FP8 on ONNX Runtime, which rounds to E4M3 as the standard says):
layers that cost too much stay in float, and a form that still differs is not written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from std_rt.core.arrays import Frame
from std_rt.core.bundle import MADE_FROM, Bundle, write_bundle
from std_rt.core.errors import ExportError
from std_rt.core.machine import install_hint
from std_rt.engines import Engine, GraphSpec, choose_backend, open_engine
from std_rt.examples import scenes, styles
from std_rt.export.float8 import activation_ranges, float8_graph
from std_rt.export.parity import lint
from std_rt.export.quantize_graph import RUNGS, Sample, kept_layers, quantize_graph, weighted_layers
from std_rt.pipeline.stylizer import Stylizer

__all__ = ["FLOOR_MEAN_DB", "FLOOR_WORST_DB", "FORMS", "Form", "Quality", "make_pairs", "quantize_bundle"]

Pair = tuple[Frame, Frame]  # (picture, style)
Samples = dict[str, list[dict[str, NDArray[Any]]]]
Maker = Callable[[Path, Collection[str]], None]


@dataclass(frozen=True)
class Form:
    """How a form in 8 bits is made.

    ``graphs`` have it, in this order: each is judged on top of those accepted before. ``backend`` runs it for
    the judgement; ``pairs`` are calibrated on, at least. ``maker`` takes a graph's file, the folder of the
    new bundle, the graph's name and its samples, and returns what writes a file with some nodes in float.
    """

    graphs: tuple[str, ...]
    backend: str
    pairs: int
    maker: Callable[[Path, Path, str, Sequence[Sample]], Maker]


def _int8_maker(source: Path, folder: Path, name: str, samples: Sequence[Sample]) -> Maker:
    return lambda target, kept: quantize_graph(source, target, name, samples, kept)


def _float8_maker(source: Path, folder: Path, name: str, samples: Sequence[Sample]) -> Maker:
    ranges = activation_ranges(source, folder, name, samples)
    return lambda target, kept: float8_graph(source, target, ranges, kept)


# The style encoder runs once a style, so its speed is of no use. FP8 is floating: it needs fewer pictures.
FORMS = {
    "int8": Form(("unet", "vae_decoder", "vae_encoder"), "cpu", 18, _int8_maker),
    "fp8": Form(("unet",), "onnxruntime", 6, _float8_maker),
}
# Stylized pictures against those of the float form, over 8 bits. 34 dB is an error of 5 levels of 255, which
# a side by side at full zoom does not show on paint; 28 dB, what is asked of bf16, is asked of every picture.
FLOOR_MEAN_DB, FLOOR_WORST_DB = 34.0, 28.0

_HELD_OUT = 6  # pairs to judge on
_PICTURES = 4  # fewer than these are filled up with the example pictures


@dataclass(frozen=True)
class Quality:
    """Stylized pictures against those of the float form: PSNR in dB, mean over pictures and of the worst."""

    mean_db: float
    worst_db: float

    @property
    def passes(self) -> bool:
        """At or above both floors."""
        return self.mean_db >= FLOOR_MEAN_DB and self.worst_db >= FLOOR_WORST_DB

    def rounded(self) -> dict[str, float]:
        """For a manifest."""
        return {"psnr_db": round(self.mean_db, 2), "worst_db": round(self.worst_db, 2)}

    def __str__(self) -> str:
        return f"{self.mean_db:.1f} dB (worst {self.worst_db:.1f} dB)"


def quantize_bundle(
    bundle: Bundle,
    output: Path,
    calibration: Sequence[Frame] = (),
    progress: Callable[[str], None] = lambda note: None,
    *,
    overwrite: bool = False,
    name: str = "",
    form: str = "int8",
    pairs: int | None = None,
) -> Bundle:
    """Write ``output``, perhaps the bundle's own folder: ``bundle`` with a ``form`` of `FORMS` added.

    ``calibration`` are pictures uint8 [H, W, 3], of the kind that will be stylized; fewer than four are
    filled up with example pictures. ``pairs`` of a picture and a style are calibrated on (default: see
    `FORMS`), and at most as many judged on. A VAE graph that does not pass has no such form.
    Raises ExportError if the UNet does not pass, the bundle computes in another type than the form is made
    from, or NNCF is missing.
    """
    _check(bundle, form)
    seen, unseen = make_pairs(calibration, pairs or FORMS[form].pairs)
    work = _Work(bundle, form, seen[:pairs], unseen[:pairs], progress)
    return write_bundle(
        Path(output),
        lambda folder: work.fill(folder, name or Path(output).resolve().name),
        overwrite=overwrite,
    )


def make_pairs(pictures: Sequence[Frame], count: int) -> tuple[list[Pair], list[Pair]]:
    """(``count`` pairs or more to calibrate on, pairs to judge on); no picture is in both, in either role.

    Every fourth picture and every third example style is kept for the judgement; every picture is stylized
    by others. What a range of activations does not cover is most often a style unlike the others.
    """
    contents = list(pictures)
    if len(contents) < _PICTURES:
        contents += scenes().values()
    used, held = _split(contents, _PICTURES)
    used_styles, held_styles = _split(list(styles().values()), 3)
    return (
        _combine(used, used_styles, max(count, len(used))),
        _combine(held, held_styles, max(_HELD_OUT, len(held))),
    )


def _split(items: Sequence[Frame], every: int) -> tuple[list[Frame], list[Frame]]:
    """(the rest, the last of ``every``)."""
    rest = [item for i, item in enumerate(items) if i % every != every - 1]
    return rest, list(items[every - 1 :: every])


def _combine(contents: Sequence[Frame], styles: Sequence[Frame], count: int) -> list[Pair]:
    """``count`` pairs: each content once in one of the styles, then any two of all pictures, evenly."""
    pictures = [*contents, *styles]
    n, first = len(pictures), len(contents)
    begin = [(i, first + i % len(styles)) for i in range(first)]
    rounds = (((i, (i + k) % n) for i in range(n)) for k in range(n - 1, 0, -1))
    rest = (pair for pair in chain.from_iterable(rounds) if pair not in begin)
    return [(pictures[i], pictures[k]) for i, k in islice(chain(begin, rest), count)]


def _check(bundle: Bundle, form: str) -> None:
    bundle.check_single_frames(form)
    if form == "int8":
        try:
            metadata.version("nncf")
        except metadata.PackageNotFoundError as error:
            raise ExportError(f"int8 needs nncf; run: {install_hint('int8')}") from error
    for graph in FORMS[form].graphs:
        compute = bundle.manifest["precision"].get(graph, {}).get("compute", "fp32")
        if compute != MADE_FROM[form]:
            raise ExportError(
                f"bundle '{bundle.name}' computes {graph} in {compute}, and {form} is made from "
                f"{MADE_FROM[form]}; export it with --precision {MADE_FROM[form]} first"
            )


@dataclass(frozen=True)
class _Work:
    """The making of one form of one bundle; pairs that are ``seen`` in calibration, and others."""

    bundle: Bundle
    form: str
    seen: list[Pair]
    unseen: list[Pair]
    progress: Callable[[str], None]

    def fill(self, folder: Path, name: str) -> dict[str, Any]:
        """Everything but the manifest, which is returned."""
        bundle = self.bundle
        replaced = {entry["file"] for entry in bundle.quantized(self.form).values()}
        for file in bundle.manifest["files"].keys() - replaced:
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / file, target)
        self.progress(f"calibrating on {len(self.seen)} pictures")
        samples = self._record()
        self.progress(f"stylizing {len(self.unseen)} other pictures for comparison")
        gate = Gate(bundle, self.form, self.unseen)
        done: dict[str, dict[str, Any]] = {}
        for graph in FORMS[self.form].graphs:
            done |= self._descend(folder, graph, samples[graph], gate)
        added = ("schema", "files", "manifest_sha256")
        manifest = deepcopy({key: value for key, value in bundle.manifest.items() if key not in added})
        manifest["name"] = name
        if self.form == "int8":
            manifest["created_with"] |= {"nncf": metadata.version("nncf")}
        counts = {"pictures": len(self.seen), "unet_states": len(samples["unet"])}
        counts["judged_on"] = len(self.unseen)
        manifest[self.form] = {"calibration": counts, "graphs": done}
        return manifest

    def _record(self) -> Samples:
        """Every input of every graph while pairs are stylized, with the allowed step counts in turn.

        The highest comes first: it visits the most states.
        """
        samples: Samples = {graph: [] for graph in self.bundle.graph_names}
        counts = sorted(self.bundle.steps_allowed, reverse=True)

        def opened(spec: GraphSpec) -> Engine:
            return Recorder(_open(spec, self.form), samples[spec.name])

        for i, steps in enumerate(counts):
            mine = self.seen[i :: len(counts)]
            if mine:
                _stylize(self.bundle, opened, mine, steps)
        return samples

    def _descend(
        self, folder: Path, graph: str, samples: Sequence[Sample], gate: Gate
    ) -> dict[str, dict[str, Any]]:
        """Quantize one graph, with more layers in float on every rung; {} where no rung passes."""
        # The copy: onnx_ir refuses weights with a second hard link, as installers make them.
        bundle, source = self.bundle, folder / self.bundle.graph_path(graph).relative_to(self.bundle.path)
        found: list[Quality] = []
        path = folder / f"{graph}.{self.form}.onnx"
        self.progress(f"quantizing {graph}")
        make = FORMS[self.form].maker(source, folder, graph, samples)
        layers = weighted_layers(ir.load(source))
        rungs = [kept_layers(layers, keep) for keep in RUNGS]
        # A graph may have none of the layers that a rung names.
        for kept in [kept for i, kept in enumerate(rungs) if kept not in rungs[:i]]:
            if found:
                self.progress(f"quantizing {graph}, attempt {len(found) + 1}")
            make(path, kept)
            lint(path)
            quality = gate.judge(graph, path)
            found.append(quality)
            if quality.passes:
                gate.accept(graph, path, quality)
                entry = {"file": path.name, "weights": bundle.weights_path(graph).name}
                return {graph: entry | {"kept_float": sorted(kept.values())} | quality.rounded()}
        path.unlink()
        if graph == "unet":
            raise ExportError(
                f"{self.form} changes the pictures of '{bundle.name}' too much: "
                f"{', '.join(map(str, found))}, and {FLOOR_MEAN_DB:.0f} dB (worst {FLOOR_WORST_DB:.0f} dB) "
                "are required; --calibrate with pictures like those you will stylize"
            )
        self.progress(f"{graph} stays in float: {found[-1]}")
        return {}


class Recorder:
    """An engine that records its inputs."""

    def __init__(self, engine: Engine, notes: list[dict[str, NDArray[Any]]]) -> None:
        self.inputs, self.outputs, self.precision = engine.inputs, engine.outputs, engine.precision
        self._engine, self._notes = engine, notes

    def __call__(self, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        self._notes.append({name: value.copy() for name, value in inputs.items()})
        return self._engine(**inputs)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


class Gate:
    """Pictures stylized in float, and how near a form in 8 bits comes to them."""

    def __init__(self, bundle: Bundle, form: str, pairs: list[Pair]) -> None:
        self._bundle, self._form, self._pairs = bundle, form, pairs
        self._wanted = _stylize(bundle, lambda spec: _open(spec, form), pairs)
        self.accepted: dict[str, Path] = {}
        self.quality = Quality(float("inf"), float("inf"))

    def judge(self, graph: str, path: Path) -> Quality:
        """The quality with ``graph`` in 8 bits from ``path``, on top of the graphs accepted before."""
        paths = self.accepted | {graph: path}

        def opened(spec: GraphSpec) -> Engine:
            if spec.name in paths:
                spec = replace(spec, path=paths[spec.name], compute=self._form)
            return _open(spec, self._form)

        found = _stylize(self._bundle, opened, self._pairs)
        rows = [_psnr(a, b) for a, b in zip(found, self._wanted, strict=True)]
        return Quality(float(np.mean(rows)), min(rows))

    def accept(self, graph: str, path: Path, quality: Quality) -> None:
        """Judge later graphs with this one in 8 bits."""
        self.accepted[graph], self.quality = path, quality


def _psnr(found: Frame, wanted: Frame) -> float:
    """PSNR over 8 bits, in dB; equal pictures give 100."""
    error = float(np.mean((found.astype(np.float64) - wanted) ** 2))
    return 100.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def _stylize(
    bundle: Bundle, opened: Callable[[GraphSpec], Engine], pairs: list[Pair], steps: int | None = None
) -> list[Frame]:
    with Stylizer(bundle, opened, steps=steps) as stylizer:
        results = []
        for picture, style in pairs:
            stylizer.set_style(style)
            results.append(stylizer.stylize(picture))
        return results


def _open(spec: GraphSpec, form: str) -> Engine:
    """In float (or 8 bits, if the file is), uncached: what is tried here is opened once."""
    backend, _ = choose_backend(FORMS[form].backend)
    # OpenVINO must be kept from bf16; ONNX Runtime has no choice.
    precision = "fp32" if backend == "openvino" else "auto"
    return open_engine(backend, replace(spec, key="", quantized={}), precision)
