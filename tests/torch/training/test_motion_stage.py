"""The motion stage: exact flow, modules that begin as a mean over time, runs that resume bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import MotionAdapter
from support.distil_runs import assert_same, read_checkpoint
from support.pipelines import write_own_pipeline
from torch import Tensor

from std_rt.core.errors import RecipeError
from std_rt.evaluation.measures import warp
from std_rt.models.components import motion_unet
from std_rt.training.run.recipe import MotionStageConfig
from std_rt.training.tiny.motion_stage import MotionStage, detail, moved, train_motion, unsteadiness
from std_rt.training.tiny.scenes import Scene, camera, draw_scene
from std_rt.training.tiny.tiny_pipeline import load_tiny


def smooth(seed: int, side: int = 160) -> np.ndarray:
    """A picture that interpolation changes little."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("motion-stage")
    for kind in ("photos", "art"):
        (folder / kind).mkdir()
        for i in range(2):
            cv2.imwrite(str(folder / kind / f"{i}.png"), smooth(i))
    return write_own_pipeline(folder / "base", sees_content=True)


@pytest.fixture
def config(pipeline: Path, vgg_file: Path, tmp_path: Path) -> MotionStageConfig:
    return MotionStageConfig(
        output=str(tmp_path / "run"),
        base=str(pipeline),
        photos=str(pipeline.parent / "photos"),
        art=str(pipeline.parent / "art"),
        perceptual=str(vgg_file),
        steps=4,
        frames=(3, 4),
        crop_px=64,
        snapshot_every=2,
        log_every=1,
    )


# --- generated clips ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_frames_carried_along_the_flow_are_the_others(seed: int) -> None:
    scene = draw_scene([smooth(i) for i in range(3)], 5, 96, np.random.default_rng(seed))
    known = np.zeros(())
    for after, before in ((1, 0), (4, 1), (0, 3)):
        source, seen = scene.flow(after, before)
        gap = np.abs(warp(scene.frames[before], source) - scene.frames[after].astype(np.float32))
        if seen.any():
            assert gap[seen].mean() < 2
        known = known + seen.mean()
    assert known > 0.5, "most of a clip can be followed"


def test_layers_hide_each_other() -> None:
    """Of some clip two layers are seen, and what the front one hides is not followed."""
    scenes = (draw_scene([smooth(i) for i in range(3)], 4, 96, np.random.default_rng(s)) for s in range(20))
    scene = next(scene for scene in scenes if scene.layers.max() > 0)
    _, seen = scene.flow(3, 0)
    assert not seen[~scene.sure[3]].any()
    assert 0 < (scene.layers > 0).mean() < 1


def test_a_camera_takes_the_same_clip_with_its_faults() -> None:
    clip = np.stack([smooth(0, 64)] * 3)
    seen = [camera(clip, np.random.default_rng(seed)).astype(float) - clip for seed in range(12)]
    off = [float(np.abs(each).mean()) for each in seen]
    assert max(off) > 2
    assert max(off) < 12
    assert any(np.abs(each[1] - each[0]).max() > 3 for each in seen), "another in every frame"


def _scene(shift_px: int, frames: int = 4, side: int = 64) -> Scene:
    """A pan by whole pixels."""
    poses = np.stack([np.eye(3)] * frames)[None]
    poses[0, :, 0, 2] = shift_px * np.arange(frames)
    wide = smooth(0)
    pictures = np.stack([wide[:side, shift_px * t : shift_px * t + side] for t in range(frames)])
    shape = (frames, side, side)
    return Scene(pictures, poses, np.zeros(shape, np.int64), np.ones(shape, bool))


def _images(scene: Scene) -> Tensor:
    return torch.from_numpy(scene.frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_what_moves_with_the_scene_is_steady_and_flicker_is_measured_in_the_range_of_pictures() -> None:
    scene = _scene(4)
    images = _images(scene)
    assert unsteadiness(images, scene, np.random.default_rng(0)) < 1e-4
    # 0.2 of the range 2 between neighbours in turn; frames two apart are alike, three apart are not.
    turns = torch.tensor([0.0, 0.4, 0.0, 0.4])[:, None, None, None]
    near = unsteadiness(images / 2 + turns, scene, np.random.default_rng(0))
    assert 0.199 <= float(near) <= 0.3
    stuck = images[:1].expand_as(images)  # what sticks to the glass is not steady
    assert unsteadiness(stuck, scene, np.random.default_rng(0)) > 0.01


def test_noise_goes_along_by_whole_cells() -> None:
    noise = torch.randn(2, 8, 8)
    rolled = moved(noise, _scene(4), 8)
    for t, cells in enumerate((0, 0, -1, -2)):  # 0, 4, 8 and 12 px to the left, rounded to even
        torch.testing.assert_close(rolled[t], noise.roll(cells, 2))


def test_detail_falls_with_blur_and_not_with_brightness() -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(image, 3, 1, 1)
    assert detail(blurred) < detail(image) / 2
    torch.testing.assert_close(detail(image + 0.5), detail(image))


# --- the stage ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_modules_begin_as_the_pipeline_and_hold_a_mean_over_time(config: MotionStageConfig) -> None:
    stage = MotionStage(config)
    run = stage.run()
    stage.start(run)
    sample = stage.sample(run.rng, run.generator)
    steps = stage.tiny.schedule.coefficients([739, 379])
    every = range(len(sample.z))
    windowed = stage.tiny.vae.decode(stage.state_after(sample, steps, 2)).sample.clamp(-1, 1)
    torch.testing.assert_close(windowed, stage.frame_wise(sample, every, steps), atol=1e-4, rtol=1e-4)

    module = stage.motion.up_blocks[-1].motion_modules[-1]
    block, width = module.transformer_blocks[0], module.transformer_blocks[0].attn1.to_q.in_features
    own = torch.arange(width).unflatten(0, (4, -1))
    first, second = (half.flatten() for half in own.chunk(2, 1))
    features = torch.randn(5, width) @ module.proj_in.weight.T
    assert not features[:, second].any()
    told = torch.randn(1, 6, width)
    heard = block.attn1(told)
    assert not heard[..., first].any()
    low, high = told[..., first].min(1).values, told[..., first].max(1).values
    assert ((heard[..., second] >= low[:, None]) & (heard[..., second] <= high[:, None])).all()


def test_a_run_resumes_bit_for_bit_and_gives_an_adapter(config: MotionStageConfig, tmp_path: Path) -> None:
    folder = train_motion(config)
    broken = replace(config, output=str(tmp_path / "broken"))
    train_motion(broken, stop_after=2)
    train_motion(broken)
    assert_same(read_checkpoint(broken), read_checkpoint(config))
    assert (tmp_path / "run" / "sheets" / "000004.png").is_file()
    tiny, stage = load_tiny(Path(config.base)), MotionStage(config)
    unet = motion_unet(tiny.unet, MotionAdapter.from_pretrained(folder))
    average = {n: v for n, v in unet.named_parameters() if "motion_modules" in n}
    assert average.keys() == stage.parameters.keys()
    assert all(v.abs().max() > 0 for n, v in average.items() if n.endswith("proj_out.weight"))


def test_only_std_tiny_takes_them(config: MotionStageConfig, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a std-tiny pipeline; get the built-in one"):
        MotionStage(replace(config, base=str(tmp_path)))
