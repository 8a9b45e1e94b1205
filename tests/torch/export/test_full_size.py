"""SDXL at its true sizes with random weights: exported, built for GPUs, and one picture painted on the CPU.

Takes 9 GB of disk for the pipeline, three times as much for bundles and engines, up to 18 GB of memory and
half an hour on two cores, so it runs only where ``STD_RT_FULL_SIZE`` names a folder: ``make full-size``. What
was measured is printed and kept in ``FOLDER/full-size.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.full_size import write_full_size

from std_rt.core.bundle import load_bundle

FOLDER = os.environ.get("STD_RT_FULL_SIZE", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="make full-size runs it"),
]
UNET_PARAMETERS = 2_567_463_684  # of stabilityai/stable-diffusion-xl-base-1.0
SIDE_PX = 512


class Measured:
    """Commands of the installed package, their time, and their peak memory without what is mapped files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, dict[str, float]] = {}

    def run(self, name: str, *arguments: str) -> str:
        """Run ``std-rt``; its output."""
        environment = os.environ | {
            "STD_RT_CACHE": str(self.folder / "cache"),
            "STD_RT_DATA": str(self.folder / "data"),
        }
        begun = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "std_rt", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        peak = self._watch(process)
        output, _ = process.communicate()
        seconds = round(time.perf_counter() - begun, 1)
        self.results[name] = {"seconds": seconds, "peak_memory_gb": round(peak[0], 1)}
        print(name, self.results[name], output, sep="\n")
        (self.folder / "full-size.json").write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        assert process.returncode == 0, output
        return output

    @staticmethod
    def _watch(process: subprocess.Popen[str]) -> list[float]:
        """The largest anonymous memory so far in GB; Linux only."""
        peak = [0.0]

        def look() -> None:
            status = Path(f"/proc/{process.pid}/status")
            while process.poll() is None and status.is_file():
                lines = status.read_text(encoding="utf-8").splitlines()
                found = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
                peak[0] = max([peak[0], *(kilobytes / 2**20 for kilobytes in found)])
                time.sleep(0.2)

        threading.Thread(target=look, daemon=True).start()
        return peak


def _pictures(folder: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    paths = (folder / "photo.png", folder / "art.png")
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
        coarse.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).save(path)
    return paths


def test_sdxl_at_its_true_size() -> None:
    folder = Path(FOLDER).resolve()
    source, bundle, painted = folder / "sdxl", folder / "bundle", folder / "painted.png"
    eight = folder / "bundle-fp8"
    if not (source / "model_index.json").is_file():
        write_full_size(source)
    measured = Measured(folder)
    lora = f"{source / 'lora.safetensors'}:0.8"
    options = ("--eta", "0.75", "--steps", "4", "--size", str(SIDE_PX), "--prompt", "in ink", "--overwrite")
    measured.run("export", "export", str(source), "-o", str(bundle), "--lora", lora, *options)
    measured.run("verify", "bundles", "verify", str(bundle))
    exported = load_bundle(bundle, verify=False)
    assert exported.manifest["precision"]["unet"] == {"compute": "fp16", "weights": "fp16"}
    assert exported.weights_path("unet").stat().st_size >= 2 * UNET_PARAMETERS
    assert exported.manifest["parity"]["unet"]["psnr_db"] >= 35

    photo, art = _pictures(folder)
    arguments = ("--style", str(art), "--bundle", str(bundle), "--size", str(SIDE_PX), "--overwrite")
    measured.run("stylize", "stylize", str(photo), "-o", str(painted), *arguments, "--backend", "onnxruntime")
    picture = np.asarray(Image.open(painted))
    assert picture.shape == (SIDE_PX, SIDE_PX, 3)
    assert picture.std() > 5

    pytest.importorskip("tensorrt_rtx")
    targets = ("--backend", "rtx", "--size", str(SIDE_PX), "--sm", "89,120")
    measured.run("engines", "engines", "build", str(bundle), *targets)
    measured.run("fp8", "bundles", "fp8", str(bundle), "-o", str(eight), "--pairs", "1", "--overwrite")
    assert load_bundle(eight, verify=False).forms == ("fp16", "fp8")
    measured.run("fp8 engines", "engines", "build", str(eight), *targets, "--precision", "fp8")
    listed = measured.run("list", "engines", "list")
    for graph in ("unet", "vae_encoder", "vae_decoder"):
        assert graph in listed
    measured.run("check", "engines", "verify")
