"""The bundle: one folder with everything a runtime needs. Read, write, verify.

    NAME/
      manifest.json         contents, settings, and the sha256 of every other file
      GRAPH.onnx            one per graph: style_encoder, vae_encoder, unet, vae_decoder
      GRAPH.safetensors     its weights, under the names of the torch module; the ONNX file points into it
      GRAPH.int8.onnx       perhaps: the same graph in int8, which rounds the same weights when it is opened
      GRAPH.fp8.onnx        perhaps: the same in FP8, for GPUs
      conditioning.npz      baked text: encoder_hidden_states [1, L, D], text_embeds [1, P]
      reference.npz         inputs and outputs for a self-check

Needs neither torch nor onnx. A damaged, incomplete or too new bundle raises `BundleError` with the command
that repairs it; a half-written one never has the final name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files as package_files
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from std_rt.core.arrays import Size
from std_rt.core.errors import BundleError, UsageError
from std_rt.core.files import file_digest, is_inside, writing
from std_rt.core.machine import install_hint, quoted, upgrade_hint
from std_rt.core.onnx_file import external_locations
from std_rt.core.schedule import StepCoefficients

__all__ = [
    "BUILT_IN",
    "CONTENT",
    "INPAINTING",
    "MADE_FROM",
    "QUANTIZED",
    "REQUIRED_GRAPHS",
    "SCHEMA",
    "TINY",
    "VAES",
    "Bundle",
    "check_target",
    "list_bundles",
    "load_bundle",
    "search_paths",
    "verify_bundle",
    "write_bundle",
]

SCHEMA = 3  # 1: a UNet that sees the noisy latents only; 2: and more; 3: and several frames at once
MANIFEST = "manifest.json"
BUILT_IN = "std-tiny"
REQUIRED_GRAPHS = ("style_encoder", "vae_encoder", "unet", "vae_decoder")
VAES = ("full", "tiny")
TINY = "tiny_"  # before the names of the graphs of a second, faster VAE
MADE_FROM = {"int8": "fp32", "fp8": "fp16"}
"""Forms of 8 bits that graphs may have beside the one they were exported in, and which that must be."""
QUANTIZED = tuple(MADE_FROM)
# What a UNet may see beside the noisy latents: the frame's clean latents (InstructPix2Pix, arXiv 2211.09800),
# or where to paint and the latents of the rest (Stable Diffusion's inpainting models).
CONTENT, INPAINTING = ("content_latents",), ("mask", "masked_latents")
# Below this a full hash costs less than a tenth of a second, so loading always does it.
_HASH_ALWAYS_BYTES = 100 * 2**20
_LEFT_BEHIND_S = 24 * 3600  # no export takes that long, so an older folder is abandoned

Manifest = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle: the folder and its (checked) manifest."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The name given at export."""
        return str(self.manifest["name"])

    @property
    def digest(self) -> str:
        """sha256 hex of the manifest, which lists the sha256 of every file: the key for caches."""
        return str(self.manifest["manifest_sha256"])

    @property
    def total_bytes(self) -> int:
        """Size of all files the manifest lists."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())

    @property
    def graph_names(self) -> list[str]:
        """Names of the graphs inside."""
        return list(self.manifest["graphs"])

    def graph_path(self, name: str) -> Path:
        """Path of a graph's ONNX file. Raises BundleError if the bundle has no such graph."""
        return self.path / str(self._graph(name)["file"])

    def weights_path(self, name: str) -> Path:
        """Path of a graph's safetensors file."""
        return self.path / str(self._graph(name)["weights"])

    def graph_outputs(self, name: str) -> dict[str, list[int | str]]:
        """Output name -> shape as exported; symbolic axes are names such as ``batch``."""
        return {entry["name"]: entry["shape"] for entry in self._graph(name)["outputs"]}

    @property
    def forms(self) -> tuple[str, ...]:
        """The UNet's forms: fp32, fp16 or bf16 (int8 in old bundles), then those of `QUANTIZED`."""
        exported = str(self.manifest.get("precision", {}).get("unet", {}).get("compute", "fp32"))
        return (exported, *(form for form in QUANTIZED if self.quantized(form)))

    def quantized(self, form: str) -> dict[str, dict[str, Any]]:
        """A form of `QUANTIZED`: graph -> its file, the weights file that it shares, how near it comes."""
        return dict(self.manifest.get(form, {}).get("graphs", {}))

    def quantized_paths(self, name: str) -> dict[str, Path]:
        """A graph's ONNX file in each form of `QUANTIZED` that it is there in."""
        found = {form: self.quantized(form).get(name) for form in QUANTIZED}
        return {form: self.path / str(entry["file"]) for form, entry in found.items() if entry is not None}

    @property
    def has_tiny_vae(self) -> bool:
        """Whether there is a second, faster VAE of the same latents."""
        return f"{TINY}vae_decoder" in self.manifest["graphs"]

    def choose_vae(self, asked: str, *, live: bool) -> str:
        """One of `VAES` for ``--vae``. For ``auto`` the tiny one if frames are live, which leaves no time."""
        if asked != "auto":
            return asked
        return "tiny" if live and self.has_tiny_vae else "full"

    def vae_graph(self, name: str, vae: str) -> str:
        """The graph that stands for ``name`` with a VAE of `VAES`. Raises BundleError if it is not there."""
        if vae not in VAES:
            raise BundleError(f"there is no VAE '{vae}'; use --vae with one of {', '.join(VAES)}")
        if vae != "tiny" or not name.startswith("vae_"):
            return name
        if not self.has_tiny_vae:
            raise BundleError(
                f"bundle '{self.name}' has no tiny VAE; use --vae full, or export it again with "
                "--tiny-vae tiny"
            )
        return f"{TINY}{name}"

    def check_precision(self, precision: str) -> None:
        """Raise BundleError if int8 or FP8 is asked for and not there."""
        if precision in QUANTIZED and precision not in self.forms:
            found = self.name if _known().get(self.name) == self.path else self.path
            said = f"bundle '{self.name}' has no {precision} form"
            if self.forms[0] != MADE_FROM[precision]:
                raise BundleError(
                    f"{said}, which is made from {MADE_FROM[precision]}, and it is in {self.forms[0]}; "
                    f"export it again with --precision {precision}"
                )
            raise BundleError(
                f"{said}; make one: std-rt bundles {precision} {found} -o engines/{self.name}-{precision}"
            )

    def _graph(self, name: str) -> dict[str, Any]:
        if name not in self.manifest["graphs"]:
            known = ", ".join(self.graph_names)
            raise BundleError(f"bundle '{self.name}' has no graph '{name}'; it has {known}")
        graph: dict[str, Any] = self.manifest["graphs"][name]
        return graph

    @property
    def size_default(self) -> tuple[int, int]:
        """(H, W) in pixels that the bundle was made for."""
        height, width = self.manifest["size"]["default"]
        return int(height), int(width)

    @property
    def size_multiple(self) -> int:
        """H and W must divide by this."""
        return int(self.manifest["size"]["multiple"])

    @property
    def size_range(self) -> tuple[int, int]:
        """Smallest and largest H or W in pixels."""
        return int(self.manifest["size"]["min"]), int(self.manifest["size"]["max"])

    @property
    def vae_scale(self) -> int:
        """Image pixels per latent pixel, along one axis."""
        return int(self.manifest["vae_scale"])

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.manifest["latent_channels"])

    @property
    def unet_inputs(self) -> tuple[str, ...]:
        """What the UNet sees beside the noisy latents: nothing, `CONTENT` or `INPAINTING`."""
        return tuple(self.manifest.get("unet_inputs", ()))

    @property
    def window(self) -> tuple[int, int] | None:
        """(frames, overlap) of a video-to-video bundle: its UNet sees that many frames at once, and two
        windows in a row share ``overlap`` of them. None for a UNet that sees one frame."""
        found = self.manifest.get("window")
        return None if found is None else (int(found["frames"]), int(found["overlap"]))

    def check_single_frames(self, what: str) -> None:
        """Raise UsageError if ``what`` was asked of a video-to-video bundle, which cannot do it."""
        if self.window is not None:
            raise UsageError(
                f"bundle '{self.name}' is video-to-video ({self.window[0]} frames at once) and does not "
                f"work with {what}; use std-rt stylize CLIP, or a bundle for single frames (std-rt bundles)"
            )

    @property
    def guidance(self) -> dict[str, Any]:
        """``{"mode": "none", "scale": 1.0}``."""
        return dict(self.manifest["guidance"])

    @property
    def style(self) -> dict[str, Any]:
        """image_px, tokens, dim, gives_text_embeds, strength_range, layout."""
        return dict(self.manifest["style"])

    @property
    def style_px(self) -> int:
        """Side of the square style image."""
        return int(self.manifest["style"]["image_px"])

    @property
    def strength_range(self) -> tuple[float, float]:
        """Lowest and highest strength of a style."""
        low, high = self.manifest["style"].get("strength_range", (0, 2))
        return float(low), float(high)

    def check_size(self, size: int | Size | None) -> None:
        """Raise UsageError unless a working size, a side or (H, W), is in `size_range`; None always is."""
        if size is None:
            return
        low, high = self.size_range
        whole = int | np.integer
        sides = (size, size) if isinstance(size, whole) else size
        is_pair = isinstance(sides, tuple | list) and len(sides) == 2
        if not is_pair or not all(isinstance(side, whole) for side in sides):
            raise UsageError(f"a size must be a side in px, as 512, or (H, W), not {size!r}")
        if not all(low <= side <= high for side in sides):
            raise UsageError(
                f"bundle '{self.name}' works at {low} to {high} px per side, not at "
                f"{sides[1]}x{sides[0]}; change the size"
            )

    def check_strength(self, strength: float) -> float:
        """``strength`` itself. Raises UsageError unless it is in `strength_range`."""
        low, high = self.strength_range
        if not isinstance(strength, Real):
            raise UsageError(f"style strength must be a number, got {strength!r}")
        if not low <= strength <= high:
            raise UsageError(f"style strength must be in {low:g}..{high:g}, got {strength:g}")
        return float(strength)

    @property
    def prediction_type(self) -> str:
        """epsilon, v_prediction or sample."""
        return str(self.manifest["schedule"]["prediction_type"])

    @property
    def eta(self) -> float:
        """Share of the schedule at which the trajectory starts."""
        return float(self.manifest["schedule"]["eta"])

    @property
    def tau(self) -> int:
        """Timestep at which the trajectory starts."""
        return int(self.manifest["schedule"]["tau"])

    @property
    def default_steps(self) -> int:
        """Step count unless the user asks for another."""
        return int(self.manifest["schedule"]["default_steps"])

    @property
    def steps_allowed(self) -> list[int]:
        """Step counts the bundle has coefficients for, rising."""
        return sorted(int(steps) for steps in self.manifest["schedule"]["steps"])

    def coefficients(self, steps: int | None = None) -> list[StepCoefficients]:
        """One entry per step. Raises BundleError for a step count that is not in the bundle."""
        steps = self.default_steps if steps is None else steps
        if steps not in self.steps_allowed:
            allowed = ", ".join(map(str, self.steps_allowed))
            raise BundleError(
                f"bundle '{self.name}' has no {steps}-step schedule; use --steps with one of {allowed}"
            )
        entry = self.manifest["schedule"]["steps"][str(steps)]
        targets = [*entry["timesteps"][1:], -1]
        rows = zip(entry["timesteps"], targets, entry["coefficients"], strict=True)
        return [StepCoefficients(t, s, *row) for t, s, row in rows]

    @property
    def takes_prompts(self) -> bool:
        """Whether text encoders are in it; else its text is baked, and never another."""
        return bool(self.manifest["text"]["mode"] == "encoder")

    def conditioning(self) -> dict[str, NDArray[np.float32]]:
        """Baked text: ``encoder_hidden_states`` [1, L, D] and ``text_embeds`` [1, P]."""
        return _read_npz(self.path / self.manifest["text"]["file"])

    def reference(self) -> dict[str, NDArray[Any]]:
        """Inputs and outputs for the self-check, keyed ``GRAPH/in/NAME`` and ``GRAPH/out/NAME``."""
        return _read_npz(self.path / "reference.npz")


def load_bundle(source: str | Path | None = None, *, verify: bool | None = None) -> Bundle:
    """Open a bundle by name or folder; None is the built-in one.

    Always checks the manifest (schema, its own hash, structure), that every file is there with the
    right size, and that no graph reads weights from outside. ``verify`` also hashes every file; the
    default does so below 100 MB, which takes no time. Raises BundleError.
    """
    folder = _find(source)
    bundle = Bundle(folder, _read_manifest(folder))
    _check_structure(bundle)
    _check_files(bundle)
    _check_external(bundle)
    if verify or (verify is None and bundle.total_bytes < _HASH_ALWAYS_BYTES):
        verify_bundle(bundle)
    return bundle


def verify_bundle(bundle: Bundle) -> None:
    """Hash every file; raises BundleError that names the first changed one and how to repair it."""
    for name, entry in bundle.manifest["files"].items():
        if file_digest(bundle.path / name) != entry["sha256"]:
            raise BundleError(
                f"bundle '{bundle.name}' is damaged: {name} has changed since export; {_repair(bundle.path)}"
            )


def search_paths() -> list[Path]:
    """Folders that hold bundles by name, besides the built-in ones: ./engines, then the user's data."""
    return [Path("engines"), Path(platformdirs.user_data_dir("std-rt", appauthor=False)) / "bundles"]


def list_bundles() -> list[Bundle | tuple[str, BundleError]]:
    """Every bundle that can be found, built-in first; (name, error) for one that cannot be opened."""
    found: list[Bundle | tuple[str, BundleError]] = []
    for name, folder in _known().items():
        try:
            found.append(load_bundle(folder, verify=False))
        except BundleError as error:
            found.append((name, error))
    return found


def write_bundle(final: Path, fill: Callable[[Path], Manifest], *, overwrite: bool = False) -> Bundle:
    """Write a bundle so that it appears under its final name complete and verified, or not at all.

    ``fill(folder)`` writes every file but the manifest and returns the manifest without ``schema``,
    ``files`` and ``manifest_sha256``, which are added here. It works in a hidden sibling folder,
    which is renamed at the end; when killed half-way, only that sibling is left. Raises BundleError
    if ``final`` exists and is not a bundle, or ``overwrite`` is False.
    """
    check_target(final, overwrite)
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    with writing(final, BundleError, "no partial bundle is left; free some space or choose another --output"):
        _sweep(final)
        partial.mkdir(parents=True)
        try:
            manifest = fill(partial)
            _write_manifest(partial, manifest)
            load_bundle(partial, verify=True)
            _move_into_place(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return load_bundle(final, verify=False)


def _sweep(final: Path) -> None:
    """Remove the partial folders of killed exports: gigabytes that no other command shows."""
    for left in final.parent.glob(f".{final.name}.*.partial"):
        if time.time() - left.stat().st_mtime > _LEFT_BEHIND_S:
            shutil.rmtree(left, ignore_errors=True)


def check_target(final: Path, overwrite: bool) -> None:
    """Raise BundleError if a bundle may not be written to ``final``."""
    if not final.exists():
        return
    if not final.is_dir() or (any(final.iterdir()) and not (final / MANIFEST).is_file()):
        raise BundleError(f"{final} exists and is not a bundle; choose another --output")
    if not overwrite and any(final.iterdir()):
        raise BundleError(f"{final} exists already; add --overwrite to replace it or choose another output")


def _move_into_place(partial: Path, final: Path) -> None:
    """A folder cannot replace a folder in one call everywhere, so the old one steps aside first."""
    if not final.exists():
        partial.rename(final)
        return
    aside = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.old")
    final.rename(aside)
    try:
        partial.rename(final)
    except OSError:
        aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    listed = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _entry(path) for path in listed}
    # A bundle that needs nothing new says so, for older versions of std-rt.
    schema = 3 if manifest.get("window") else 2 if manifest.get("unet_inputs") else 1
    complete = {"schema": schema, **manifest, "files": files}
    complete["manifest_sha256"] = manifest_digest(complete)
    text = json.dumps(complete, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")


def manifest_digest(manifest: Manifest) -> str:
    """sha256 over the canonical JSON (sorted keys, no spaces) without ``manifest_sha256`` itself."""
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def _built_in_folder() -> Path:
    return Path(str(package_files("std_rt"))) / "bundles"


def _known() -> dict[str, Path]:
    """Name -> folder of everything that looks like a bundle; the first of a name wins."""
    found: dict[str, Path] = {}
    for root in [_built_in_folder(), *search_paths()]:
        for manifest in sorted(root.glob(f"*/{MANIFEST}")):
            if not manifest.parent.name.startswith("."):
                found.setdefault(manifest.parent.name, manifest.parent)
    return found


def _find(source: str | Path | None) -> Path:
    if source is None or source == BUILT_IN:
        return _built_in_folder() / BUILT_IN
    folder = Path(source).expanduser()
    known = _known()
    if not (folder / MANIFEST).is_file() and str(source) in known:
        return known[str(source)]
    if folder.is_dir():
        return folder
    names = sorted({BUILT_IN, *known})
    near = difflib.get_close_matches(str(source), names, 1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise BundleError(f"there is no bundle or folder '{source}'; {hint}known bundles: {', '.join(names)}")


def _repair(folder: Path) -> str:
    """The command that repairs a damaged bundle."""
    if folder.parent == _built_in_folder():
        return f"install std-rt again: {install_hint()} --force-reinstall --no-deps"
    return f"export it again: std-rt export ... --output {folder} --overwrite"


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; {_repair(folder)}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BundleError(f"{path} cannot be read ({error}); {_repair(folder)}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
        raise BundleError(f"{path} is not a bundle manifest: it has no schema number; {_repair(folder)}")
    if manifest["schema"] > SCHEMA:
        raise BundleError(
            f"bundle {folder} has schema {manifest['schema']} and this std-rt reads up to {SCHEMA}; "
            f"upgrade std-rt: {upgrade_hint()}"
        )
    if manifest.get("manifest_sha256") != manifest_digest(manifest):
        raise BundleError(f"{path} has changed since export (its hash does not match); {_repair(folder)}")
    return manifest


_SECTIONS: dict[str, tuple[str, ...]] = {
    "size": ("default", "multiple", "min", "max"),
    "schedule": ("prediction_type", "eta", "tau", "default_steps", "steps"),
    "guidance": ("mode", "scale"),
    "style": ("image_px", "tokens", "dim", "gives_text_embeds"),
    "text": ("mode", "file"),
    "graphs": (),
    "files": (),
}


def _check_structure(bundle: Bundle) -> None:
    top = ("name", "vae_scale", "latent_channels", *_SECTIONS)
    missing = [key for key in top if key not in bundle.manifest]
    for section, keys in _SECTIONS.items():
        missing += [f"{section}.{key}" for key in keys if key not in bundle.manifest.get(section, {})]
    if missing:
        raise BundleError(f"{bundle.path / MANIFEST} has no {', '.join(missing)}; {_repair(bundle.path)}")
    if bundle.unet_inputs not in ((), CONTENT, INPAINTING):
        raise BundleError(
            f"bundle '{bundle.name}' has a UNet that sees {', '.join(bundle.unet_inputs)}, unknown to this "
            f"std-rt; upgrade std-rt: git pull, then {install_hint()}"
        )
    frames, overlap = bundle.window or (2, 0)
    if frames < 2 or not 0 <= overlap < frames:
        raise BundleError(
            f"bundle '{bundle.name}' has windows of {frames} frames that share {overlap}; "
            f"{_repair(bundle.path)}"
        )
    for graph in [*REQUIRED_GRAPHS, *(name for form in QUANTIZED for name in bundle.quantized(form))]:
        if graph not in bundle.manifest["graphs"]:
            raise BundleError(f"bundle '{bundle.name}' has no graph '{graph}'; {_repair(bundle.path)}")


def _check_files(bundle: Bundle) -> None:
    listed = bundle.manifest["files"]
    for name, entry in listed.items():
        if not is_inside(name):
            raise BundleError(f"bundle '{bundle.name}' lists {name!r}, outside its folder; do not use it")
        path = bundle.path / name
        if not path.is_file():
            raise BundleError(
                f"bundle '{bundle.name}' is incomplete: {name} is missing; {_repair(bundle.path)}"
            )
        if path.stat().st_size != entry["bytes"]:
            raise BundleError(
                f"bundle '{bundle.name}' is damaged: {name} has {path.stat().st_size} bytes, "
                f"not {entry['bytes']} as its manifest says; {_repair(bundle.path)}"
            )
    graphs = [entry for _, entry in _all_graphs(bundle)]
    used = [bundle.manifest["text"]["file"], *(graph[key] for graph in graphs for key in ("file", "weights"))]
    for name in used:
        if name not in listed:
            raise BundleError(
                f"bundle '{bundle.name}' uses {name}, whose hash is not listed; {_repair(bundle.path)}"
            )


def _all_graphs(bundle: Bundle) -> list[tuple[str, dict[str, Any]]]:
    """(name, entry) of every graph in every form."""
    forms = (bundle.quantized(form) for form in QUANTIZED)
    return [*bundle.manifest["graphs"].items(), *(item for form in forms for item in form.items())]


def _check_external(bundle: Bundle) -> None:
    """Graphs may read their own weights file and nothing else, whatever the path looks like."""
    for name, graph in _all_graphs(bundle):
        try:
            outside = external_locations(bundle.path / graph["file"]) - {graph["weights"]}
        except ValueError as error:
            raise BundleError(f"bundle '{bundle.name}': {error}; {_repair(bundle.path)}") from error
        if outside:
            raise BundleError(
                f"bundle '{bundle.name}': graph '{name}' reads weights from {sorted(outside)[0]!r} "
                f"instead of {graph['weights']!r}; do not use it"
            )
        if not (bundle.path / graph["weights"]).resolve().is_relative_to(bundle.path.resolve()):
            copy = f"cp -rL {quoted(str(bundle.path))} COPY"
            raise BundleError(
                f"bundle '{bundle.name}': {graph['weights']} is a link to another folder, which ONNX Runtime "
                f"and OpenVINO refuse; copy the folder with what it links to: {copy}"
            )


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}
