"""Video-to-video bundles: diffusers' UNetMotionModel as one graph, and clips through its windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.cli_support import Cli
from support.motion_export import motion_unet, write_motion_adapter, write_v2v_lora
from support.pipelines import write_clip_pipeline, write_lora, write_own_pipeline

from std_rt import Stylizer
from std_rt.core.bundle import Bundle, load_bundle
from std_rt.core.errors import ExportError, UsageError
from std_rt.engines import open_engine
from std_rt.evaluation.bench import sample_frame
from std_rt.export.build import export_pipeline
from std_rt.pipeline.conditioning import EncodedStyle, unet_inputs
from std_rt.pipeline.denoise import Guidance, denoise
from std_rt.pipeline.openers import window_specs
from std_rt.pipeline.runner_cache import RunnerKey
from std_rt.streaming.frame_stream import ONE_BY_ONE, STREAM_BATCH, FrameStream
from std_rt.streaming.temporal import TemporalFilter

FRAMES, OVERLAP, SIZE = 4, 1, (64, 96)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("v2v")
    pipeline = write_clip_pipeline(folder / "pipeline", layers_per_block=1)
    adapter = write_motion_adapter(folder / "adapter", layers=1)
    lora = write_v2v_lora(
        folder / "v2v.safetensors", motion_unet(pipeline, adapter), prefix="base_model.model."
    )
    return {"folder": folder, "pipeline": pipeline, "adapter": adapter, "lora": lora}


@pytest.fixture(scope="module")
def bundle(made: dict[str, Path]) -> Bundle:
    return export_pipeline(
        made["pipeline"],
        made["folder"] / "v2v",
        motion_adapter=made["adapter"],
        frames=FRAMES,
        overlap=OVERLAP,
        lora=((made["lora"], 1.0),),
        eta=0.75,
        style_layers="all",
        weights="fp32",
        steps=(4, 2),
        size=SIZE,
    )


@pytest.fixture(scope="module")
def own(made: dict[str, Path]) -> Bundle:
    """std-tiny in miniature: its UNet sees the clean latents, and its time embedding scales and shifts."""
    return export_pipeline(
        write_own_pipeline(made["folder"] / "tiny", sees_content=True),
        made["folder"] / "own",
        motion_adapter=write_motion_adapter(made["folder"] / "own-adapter", layers=1),
        frames=FRAMES,
        overlap=OVERLAP,
        eta=0.75,
        weights="fp32",
        steps=(2,),
        size=SIZE,
    )


def test_the_manifest_declares_the_window(bundle: Bundle) -> None:
    opened = load_bundle(bundle.path, verify=True)
    assert opened.window == (FRAMES, OVERLAP)
    assert opened.manifest["schema"] == 3  # which readers of single frames refuse
    assert opened.manifest["parity"]["unet"]["psnr_db"] >= 60


def test_unpacking_says_what_to_train_on_instead(cli: Cli, bundle: Bundle, tmp_path: Path) -> None:
    error = cli("bundles", "unpack", bundle.path, "-o", tmp_path / "again").error
    assert "from the diffusers folder pipeline and the motion adapter adapter and does" in error
    assert error.endswith("; train on these instead")
    assert not (tmp_path / "again").exists()


@torch.no_grad()
def test_the_graph_is_diffusers_motion_model_with_the_lora_in_it(
    bundle: Bundle, made: dict[str, Path]
) -> None:
    """Without style: the LoRA's product added by hand, layer by layer, under diffusers' own forward."""
    unet = motion_unet(made["pipeline"], made["adapter"])
    lora = load_file(made["lora"])
    down = [key for key in lora if ".lora_A." in key]
    assert sum(".motion_modules." in key for key in down) == 12 * 6
    for key in down:
        layer = unet.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        layer.weight += lora[key.replace("lora_A", "lora_B")] @ lora[key]
    text = bundle.conditioning()
    shapes = {name: value.shape for name, value in text.items()}
    specs = window_specs(bundle, SIZE, Guidance(), shapes)
    assert specs["unet"].baked.keys() == {"encoder_hidden_states"}
    assert not window_specs(bundle, SIZE, Guidance("full", 2.0), shapes)["unet"].baked
    sample = np.random.default_rng(0).normal(size=specs["unet"].shapes["sample"]).astype(np.float32)
    tokens = np.zeros(specs["unet"].shapes["style_tokens"], np.float32)
    given: dict[str, Any] = unet_inputs(text, EncodedStyle(tokens), 0.0, SIZE)
    engine = open_engine("onnxruntime", specs["unet"], "fp32")
    found = engine(sample=sample, timestep=np.full(1, 739, np.float32), **given)["noise_pred"]
    wanted = (
        unet(
            torch.from_numpy(sample).transpose(0, 1)[None],
            torch.tensor([739.0]),
            torch.from_numpy(given["encoder_hidden_states"]).repeat_interleave(FRAMES, 0),
            added_cond_kwargs={key: torch.from_numpy(given[key]) for key in ("text_embeds", "time_ids")},
        )
        .sample[0]
        .transpose(0, 1)
    )
    np.testing.assert_allclose(found, wanted.numpy(), atol=2e-4)
    engine.close()


def moving(count: int) -> list[np.ndarray]:
    """A pan, a pixel a frame."""
    wide = sample_frame(SIZE[0], SIZE[1] + count)
    return [np.ascontiguousarray(wide[:, i : i + SIZE[1]]) for i in range(count)]


def opened(bundle: Bundle, **options: Any) -> Stylizer:
    stylizer = Stylizer.load(bundle, backend="onnxruntime", steps=2, **options)
    stylizer.set_style(sample_frame(32, 32, seed=1))
    return stylizer


@pytest.mark.parametrize("kind", ["bundle", "own"])
def test_a_short_clip_is_one_window_of_the_reference_loop(kind: str, request: pytest.FixtureRequest) -> None:
    frames, bundle = moving(FRAMES), request.getfixturevalue(kind)
    assert bundle.manifest["parity"]["unet"]["psnr_db"] >= 60
    with opened(bundle) as stylizer:
        styled = [*FrameStream(stylizer).frames(frames)]
        noise = np.repeat(stylizer.state(*SIZE).noise[:1], FRAMES, 0)
        graphs, given = stylizer._graphs_of_windows(SIZE), stylizer.conditioning(SIZE)
        z = np.stack([graphs.encode(frame) for frame in frames])
        seen = dict.fromkeys(bundle.unet_inputs, z)  # own: the clean latents, of every frame its own
        x = denoise(
            z,
            lambda x, t, _: graphs.predict(x, t, {**given.positive, **seen}),
            noise=[noise],
            steps=stylizer.coefficients,
            prediction_type=bundle.prediction_type,
        )
        wanted = [graphs.decode(each) for each in x]
    assert np.abs(np.stack(styled).astype(int) - np.stack(wanted)).max() <= 1
    assert np.std(np.stack(styled)) > 1


def test_a_cut_begins_a_scene_in_every_temporal_mode(bundle: Bundle) -> None:
    scenes = moving(6), [255 - frame for frame in moving(3)]
    with opened(bundle) as stylizer:
        for mode in ("off", "noise"):
            apart = [
                frame
                for scene in scenes
                for frame in FrameStream(stylizer, temporal=TemporalFilter(mode)).frames(scene)
            ]
            together = [*FrameStream(stylizer, temporal=TemporalFilter(mode)).frames(scenes[0] + scenes[1])]
            np.testing.assert_array_equal(np.stack(together), np.stack(apart))


def test_a_picture_is_a_window_of_equal_frames(bundle: Bundle) -> None:
    frame = moving(1)[0]
    with opened(bundle) as stylizer:
        (clip, *_) = FrameStream(stylizer).frames([frame] * FRAMES)
        # In a clip the copies drift apart a little, each at its own position in the window.
        assert np.abs(stylizer.stylize(frame).astype(int) - clip).max() <= 2


def test_full_guidance_is_the_mean_of_both_prompts_predictions(made: dict[str, Path], bundle: Bundle) -> None:
    frames = moving(2)
    with opened(bundle) as plain, opened(bundle, guidance=3.0) as guided:
        a, b = ([*FrameStream(each).frames(frames)] for each in (plain, guided))
    assert np.abs(np.stack(a).astype(int) - np.stack(b)).max() > 2
    with pytest.raises(UsageError, match="no residual guidance"):
        opened(bundle, guidance=3.0, guidance_mode="residual")


def test_what_windows_cannot_do_is_said(bundle: Bundle) -> None:
    with opened(bundle) as stylizer:
        with pytest.raises(UsageError, match=r"video-to-video .4 frames at once"):
            stylizer.runner(RunnerKey(stylizer.quality(*SIZE)))
        assert FrameStream(stylizer, batching=STREAM_BATCH)._batching != STREAM_BATCH
        assert FrameStream(stylizer, batching=ONE_BY_ONE)._batching != ONE_BY_ONE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 4}, r"--overlap must be from 0 to 3, less than --frames 4, got 4"),
        ({"overlap": -1}, "--overlap must be"),
        ({"frames": 1}, "--frames must be 2 or more"),
        ({"frames": 17}, r"--frames 17 is more than the 16 "),
        ({"motion_adapter": None}, "add --motion-adapter FOLDER"),
        ({"motion_adapter": Path("nowhere")}, "nowhere is not a folder"),
        ({"precision": "int8"}, "--precision int8 does not work with --motion-adapter"),
    ],
)
def test_a_window_that_cannot_be_is_refused(
    made: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    choices = {"motion_adapter": made["adapter"], "frames": 4, "overlap": 1} | options
    with pytest.raises(ExportError, match=message):
        export_pipeline(made["pipeline"], made["folder"] / "never", **choices)
    assert not (made["folder"] / "never").exists()


def test_an_adapter_of_another_kind_or_size_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    wide = write_motion_adapter(tmp_path / "wide", (32, 32), layers=1)
    for adapter, message in (
        (wide, r"for a UNet of widths \[32, 32\], this one has \[16, 32\]"),
        (made["pipeline"] / "unet", "motion_adapter is of class UNet2DConditionModel"),
        (tmp_path, "no motion_adapter in"),
    ):
        with pytest.raises(ExportError, match=message):
            export_pipeline(made["pipeline"], tmp_path / "never", motion_adapter=adapter)
    with pytest.raises(ExportError, match="add --motion-adapter FOLDER"):
        export_pipeline(made["pipeline"], tmp_path / "never", eta=0.75, lora=((made["lora"], 1.0),))


def test_an_image_lora_fits_the_video_unet_too(made: dict[str, Path], tmp_path: Path) -> None:
    from std_rt.export.lora_fusion import fuse_lora

    unet = motion_unet(made["pipeline"], made["adapter"])
    before = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight.clone()
    fuse_lora({"unet": unet}, write_lora(tmp_path / "image.safetensors", unet), 1.0)
    assert not torch.equal(unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight, before)
