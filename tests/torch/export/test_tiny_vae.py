"""A second VAE in a bundle: live uses it, pictures keep the full one, and both are compared with torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from std_rt.cli.engines import plan
from std_rt.core.bundle import Bundle
from std_rt.core.errors import BundleError, ExportError
from std_rt.evaluation.bench import sample_frame
from std_rt.export.build import export_pipeline
from std_rt.pipeline.stylizer import Stylizer


def _tiny(source: Path, folder: Path, deeper: int = 0, more: int = 0) -> Path:
    """A VAE of diffusers' tiny kind, with latents like those of the source's own."""
    torch.manual_seed(0)
    config = json.loads((source / "vae" / "config.json").read_text(encoding="utf-8"))
    levels = len(config.get("block_out_channels") or config["encoder_block_out_channels"]) + deeper
    AutoencoderTiny(
        latent_channels=config["latent_channels"] + more,
        encoder_block_out_channels=(16,) * levels,
        decoder_block_out_channels=(16,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(own_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("tiny")
    vae = _tiny(own_source, folder / "taesd")
    return export_pipeline(own_source, folder / "both", size=(64, 96), tiny_vae=vae)


def test_the_tiny_vae_is_in_the_bundle_and_was_compared_with_torch(both: Bundle) -> None:
    assert both.has_tiny_vae
    for name in ("tiny_vae_encoder", "tiny_vae_decoder", "vae_encoder", "vae_decoder"):
        assert both.manifest["parity"][name]["psnr_db"] > 50
    assert both.manifest["sources"][-1]["role"] == "tiny_vae"


def test_asked_for_it_paints_another_picture_and_full_is_as_without(both: Bundle) -> None:
    frame, pictures = sample_frame(64, 96), {}
    for vae in ("full", "tiny"):
        with Stylizer.load(both, size=(64, 96), precision="fp32", vae=vae) as stylizer:
            stylizer.set_style(sample_frame(64, 64, seed=1))
            pictures[vae] = stylizer.stylize(frame).astype(int)
    assert np.abs(pictures["full"] - pictures["tiny"]).mean() > 2
    with Stylizer.load(both, size=(64, 96), precision="fp32") as stylizer:
        stylizer.set_style(sample_frame(64, 64, seed=1))
        np.testing.assert_array_equal(stylizer.stylize(frame), pictures["full"])


def test_live_takes_it_and_pictures_do_not(both: Bundle, handmade: Bundle) -> None:
    assert both.choose_vae("auto", live=True) == "tiny"
    assert both.choose_vae("auto", live=False) == "full"
    assert both.choose_vae("full", live=True) == "full"
    assert handmade.choose_vae("auto", live=True) == "full"
    with pytest.raises(
        BundleError, match="has no tiny VAE; use --vae full, or export it again with --tiny-vae"
    ):
        Stylizer.load(handmade, vae="tiny")


def test_latents_that_do_not_match_are_refused(own_source: Path, tmp_path: Path) -> None:
    deep = _tiny(own_source, tmp_path / "deep", deeper=1)
    with pytest.raises(ExportError, match=r"the tiny VAE .* makes latents .* give one that matches"):
        export_pipeline(own_source, tmp_path / "x", tiny_vae=deep)
    other = _tiny(own_source, tmp_path / "other", more=1)
    with pytest.raises(ExportError, match=r"the VAE has \d+ latent channels"):
        export_pipeline(own_source, tmp_path / "x", tiny_vae=other)


def test_engines_are_built_ahead_for_either(both: Bundle) -> None:
    for vae, name in (("full", "vae_decoder"), ("tiny", "tiny_vae_decoder")):
        assert name in {spec.name for spec in plan(str(both.path), size=64, vae=vae).engines(glue=False)}
