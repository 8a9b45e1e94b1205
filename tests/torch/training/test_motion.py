"""Distillation of clips: the base, its LoRA, clips as data, MCM, and runs that resume."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from diffusers import AnimateDiffSDXLPipeline, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from safetensors.torch import load_file, save_file
from support.cli_support import Cli
from support.distil_runs import assert_same, read_checkpoint
from support.motion_training import (
    motion_recipe,
    write_adapter,
    write_clips,
    write_dino,
    write_motion_base,
)
from support.pipelines import write_own_pipeline
from torch import Tensor

from std_rt.core.errors import RecipeError
from std_rt.export.lora_fusion import fuse_lora
from std_rt.training.data.picture_source import PictureSource
from std_rt.training.distil.base import Base, Conditioning, load_base
from std_rt.training.distil.distiller import Distiller
from std_rt.training.distil.loop import lora_notes, train_distil
from std_rt.training.distil.lora import (
    Average,
    add_lora,
    call_by_position,
    choose_layers,
    lora_parameters,
    save_lora,
)
from std_rt.training.distil.motion import MotionHead, low_pass
from std_rt.training.run.cost import estimate
from std_rt.training.run.recipe import (
    LORA_TARGETS,
    BankConfig,
    DistilConfig,
    MotionConfig,
    SheetConfig,
    StyleConfig,
    load_recipe,
)
from std_rt.training.run.sheet import to_tensor

RECIPE = Path(__file__).parents[3] / "training/std_sdxl_v2v.toml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_motion_base(tmp_path_factory.mktemp("motion") / "base")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips") / "clips")


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture
def config(folder: Path, clips: Path, dino: Path, tmp_path: Path) -> DistilConfig:
    return motion_recipe(tmp_path / "run", folder, clips, dino)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Base:
    return load_base(folder, motion=MotionConfig(str(folder / "motion"), 4, 2))


@pytest.fixture
def base(loaded: Base) -> Base:
    """To be changed at will."""
    return replace(loaded, unet=deepcopy(loaded.unet))


def _inputs(base: Base, frames: int = 4) -> tuple[Tensor, Tensor, Conditioning]:
    """Two clips, each with words, sizes and a time of its own."""
    rng = torch.Generator().manual_seed(1)
    context = torch.randn(2, 3, base.unet.config.cross_attention_dim, generator=rng)
    ids = 64 * torch.rand(2, 6, generator=rng)
    told = Conditioning(context, torch.randn(2, base.pooled_dim, generator=rng), ids)
    return torch.randn(2, 4, frames, 8, 8, generator=rng), torch.tensor([739, 19]), told


@torch.no_grad()
def _run(base: Base, unet: Any = None) -> Tensor:
    return base.predict(unet or base.unet, *_inputs(base))


def _randomize_lora(unet: Any) -> None:
    rng = torch.Generator().manual_seed(2)
    for value in lora_parameters(unet).values():
        value.data = torch.randn(value.shape, generator=rng) * value[0].numel() ** -0.5


# --- the base -------------------------------------------------------------------------------------------


def test_without_what_motion_modules_add_each_frame_is_the_pictures_network(folder: Path, base: Base) -> None:
    """Clips and pictures, one answer: words, sizes, times and all weights of the base arrive."""
    clip = _run(base)
    for name, value in base.unet.named_parameters():
        if "motion_modules" in name and ".proj_out." in name:
            value.data.zero_()
    pictures = load_base(folder)
    x, t, cond = _inputs(base)
    frames = torch.stack([pictures.predict(pictures.unet, x[:, :, n], t, cond) for n in range(4)], 2)
    torch.testing.assert_close(_run(base), frames, atol=1e-5, rtol=1e-5)
    assert (clip - frames).abs().max() > 0.01
    assert base.digest == pictures.digest, "the LoRA belongs to the base that it is trained on"
    assert base.motion is not None
    assert (base.motion.name, base.motion.frames, base.motion.interval) == ("motion", 4, 2)


@torch.no_grad()
def test_std_tiny_takes_a_motion_adapter(tmp_path: Path) -> None:
    """Its layers are shared with the network of pictures: scale and shift, content latents, style tokens."""
    folder = write_own_pipeline(tmp_path / "tiny", sees_content=True)
    adapter = write_adapter(tmp_path / "adapter", widths=(16, 32))
    base = load_base(folder, motion=MotionConfig(str(adapter), 4, 2))
    pictures = load_base(folder)
    rng = torch.Generator().manual_seed(1)
    x, z = torch.randn(2, 1, 8, 4, 8, 8, generator=rng)
    style, ids = base.look(torch.rand(1, 3, 64, 64, generator=rng)), 64 * torch.rand(1, 6, generator=rng)
    t = torch.tensor([739])
    clip = base.predict(base.unet, x, t, base.condition(None, style, ids, z))
    for name, value in base.unet.named_parameters():
        if "motion_modules" in name and ".proj_out." in name:
            value.data.zero_()
    still = base.predict(base.unet, x, t, base.condition(None, style, ids, z))
    frames = [
        pictures.predict(pictures.unet, x[:, :, n], t, pictures.condition(None, style, ids, z[:, :, n]))
        for n in range(4)
    ]
    torch.testing.assert_close(still, torch.stack(frames, 2), atol=1e-5, rtol=1e-5)
    assert (clip - still).abs().max() > 0.01


def test_an_adapter_that_does_not_fit_is_one_line(folder: Path, tmp_path: Path) -> None:
    def refused(base: Path, adapter: Path, frames: int = 4) -> str:
        with pytest.raises(RecipeError) as caught:
            load_base(base, motion=MotionConfig(str(adapter), frames))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "give a folder of diffusers' MotionAdapter" in refused(folder, tmp_path / "nowhere")
    assert "cannot be put into base" in refused(folder, write_adapter(tmp_path / "wide", widths=(48,)))
    assert "cannot be put into base" in refused(folder, write_adapter(tmp_path / "two", widths=(32, 32)))
    assert "has 8 positions; set it to 8 or less" in refused(folder, folder / "motion", frames=9)


# --- the LoRA -------------------------------------------------------------------------------------------


def test_the_layers_of_a_motion_lora_are_the_published_ones() -> None:
    """180 linear layers of the motion modules of SDXL's blocks, none of them in the middle."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8, 8),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=1,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    adapter = MotionAdapter((8, 8, 8), motion_norm_num_groups=4, use_motion_mid_block=False)
    motion = UNetMotionModel.from_unet2d(unet, adapter)
    pictures, layers = (set(choose_layers(network, LORA_TARGETS)) for network in (unet, motion))
    added = layers - pictures
    assert pictures < layers
    assert len(added) == 180
    assert {name.split(".")[0] for name in added} == {"down_blocks", "up_blocks"}
    block = "transformer_blocks.0."
    attention = [f"{block}attn{n}.to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out.0")]
    ends = {"proj_in", "proj_out", f"{block}ff.net.0.proj", f"{block}ff.net.2", *attention}
    assert {name.split(".motion_modules.")[1].split(".", 1)[1] for name in added} == ends


def test_diffusers_motion_pipeline_and_the_export_read_what_is_written(
    config: DistilConfig, folder: Path, base: Base, tmp_path: Path
) -> None:
    """The student, the file loaded by AnimateDiff's pipeline, and the file fused: one output."""
    plain = deepcopy(base.unet)
    add_lora(base.unet, config.lora, 0)
    _randomize_lora(base.unet)
    expected, path = _run(base), tmp_path / "lora.safetensors"
    assert (expected - _run(base, plain)).abs().max() > 0.01
    notes = lora_notes(config, base, 4)
    assert (notes["motion_adapter"], notes["frames"], notes["interval"]) == ("motion", "4", "2")
    save_lora(path, lora_parameters(base.unet), notes, config.lora, torch.float32)

    adapter = MotionAdapter.from_pretrained(folder / "motion")
    pipe = AnimateDiffSDXLPipeline.from_pretrained(folder, motion_adapter=adapter, image_encoder=None)
    pipe.unet.add_embedding.load_state_dict(plain.add_embedding.state_dict())  # diffusers forgets it
    pipe.load_lora_weights(path)
    call_by_position(pipe.unet)
    torch.testing.assert_close(_run(base, pipe.unet), expected, atol=1e-5, rtol=1e-5)

    # Final saves of the published ones keep PEFT's prefix.
    published = tmp_path / "published.safetensors"
    save_file({k.replace("unet.", "base_model.model."): v for k, v in load_file(path).items()}, published)
    for file in (path, published):
        fused = deepcopy(plain)
        fuse_lora({"unet": fused}, file, 1.0)
        torch.testing.assert_close(_run(base, fused), expected, atol=1e-5, rtol=1e-5)


def test_projections_of_motion_modules_learn(config: DistilConfig, base: Base) -> None:
    add_lora(base.unet, config.lora, 0)
    _randomize_lora(base.unet)
    base.checkpoint()
    base.predict(base.unet.train(), *_inputs(base)).square().sum().backward()
    without = [n for n, v in lora_parameters(base.unet).items() if v.grad is None or not v.grad.any()]
    assert not without


# --- clips as data --------------------------------------------------------------------------------------


def _source(config: DistilConfig, base: Base, **settings: Any) -> PictureSource:
    pictures = replace(config.pictures, **settings)
    return PictureSource(pictures, base, seed=3)


def _frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_sample_is_frames_at_the_interval_under_one_crop(
    config: DistilConfig, base: Base, clips: Path
) -> None:
    source = _source(config, base, flip=False)
    fresh = source.take(4, (8, 8))
    assert fresh.z.shape == (4, 4, 4, 8, 8)
    starts = set()
    for n, name in enumerate(fresh.names):
        file, start = name.split("#")
        starts.add(start)
        top, left = fresh.cond.time_ids[n, 2:4].int().tolist()
        chosen = _frames(clips / file)[int(start) :: 2][:4]
        resized = [cv2.resize(frame, (43, 32), interpolation=cv2.INTER_AREA) for frame in chosen]
        crops = [frame[top : top + 32, left : left + 32] for frame in resized]
        expected = base.encode(to_tensor(crops)).transpose(0, 1)
        torch.testing.assert_close(fresh.z[n], expected, atol=1e-4, rtol=1e-4)
        word = base.read_text([f"clip {'abcdefgh'[int(file[0])]}"])
        assert word is not None
        torch.testing.assert_close(fresh.cond.context[n], word[0][0])
    assert len(fresh.cond) == 4
    assert len(starts) > 1, "starts vary"


@pytest.mark.parametrize("cached", [False, True])
def test_clips_are_drawn_alike_after_resuming(
    config: DistilConfig, base: Base, cached: bool, tmp_path: Path
) -> None:
    settings = {"cache": str(tmp_path / "cache") if cached else "", "workers": 2}
    whole, other = (_source(config, base, **settings) for _ in range(2))
    whole.take(3, (8, 8))
    state = whole.state()
    expected = [whole.take(2, (8, 8)) for _ in range(3)]
    other.load_state(state)
    for fresh in expected:
        again = other.take(2, (8, 8))
        assert again.names == fresh.names
        assert torch.equal(again.z, fresh.z)
        assert torch.equal(again.cond.time_ids, fresh.cond.time_ids)
    for source in (whole, other):
        source.close()


def test_clips_that_are_too_short_are_one_line_or_left_out(
    config: DistilConfig, base: Base, clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mixed = write_clips(tmp_path / "mixed", count=2)
    write_clips(tmp_path / "short", count=1, frames=6)
    (tmp_path / "short/0.mkv").rename(mixed / "short.mkv")
    source = _source(config, base, folder=str(mixed))
    assert {name.split("#")[0] for name in source.take(4, (8, 8)).names} == {"0.mkv", "1.mkv"}
    assert "left out 1 clips with fewer than the 7 frames" in caplog.text
    assert "short.mkv 6" in caplog.text
    base.motion = replace(base.motion, interval=5)
    with pytest.raises(
        RecipeError, match=r"the 16 frames that 4 .*the longest is \S+ with 12: .*interval = 3"
    ):
        _source(config, base)


def test_a_clip_that_ends_early_is_replaced(
    config: DistilConfig, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_clips(tmp_path / "cut", count=2)
    whole = (folder / "0.mkv").read_bytes()
    source = _source(config, base, folder=str(folder))
    (folder / "0.mkv").write_bytes(whole[: len(whole) // 3])
    assert {name.split("#")[0] for name in source.take(3, (8, 8)).names} == {"1.mkv"}
    assert "0.mkv is broken (it ends before frame" in caplog.text


# --- styles and sheets ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def styled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StyleConfig, Base]:
    """With a folder of two style pictures."""
    art = tmp_path_factory.mktemp("art")
    for seed in range(2):
        frame = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        cv2.imwrite(str(art / f"{seed}.png"), cv2.resize(frame, (40, 40), interpolation=cv2.INTER_CUBIC))
    style = StyleConfig(
        str(folder / "ip_adapter.safetensors"), str(folder / "image_encoder"), pairing="any", folder=str(art)
    )
    return style, load_base(folder, style=style, motion=MotionConfig(str(folder / "motion"), 4, 2))


def test_every_frame_of_a_clip_sees_its_style(folder: Path, styled: tuple[StyleConfig, Base]) -> None:
    """As the pictures' network does, where the motion modules add nothing."""
    style, loaded = styled
    base, pictures = replace(loaded, unet=deepcopy(loaded.unet)), load_base(folder, style=style)
    for name, value in base.unet.named_parameters():
        if "motion_modules" in name and ".proj_out." in name:
            value.data.zero_()
    x, t, plain = _inputs(base)
    side = base.style_px
    cond = replace(plain, tokens=base.look(torch.rand(2, 3, side, side) * 2 - 1).tokens)
    with torch.no_grad():
        found = base.predict(base.unet, x, t, cond)
        frames = [pictures.predict(pictures.unet, x[:, :, n], t, cond) for n in range(4)]
        without = base.predict(base.unet, x, t, base.null(cond))
    torch.testing.assert_close(found, torch.stack(frames, 2), atol=1e-5, rtol=1e-5)
    assert (found - without).abs().max() > 1e-3


def test_styles_of_clips_are_pictures(config: DistilConfig, styled: tuple[StyleConfig, Base]) -> None:
    style, base = styled
    any_one = PictureSource(config.pictures, base, seed=3, style=style).take(3, (8, 8))
    assert any_one.real.shape == any_one.z.shape
    assert torch.equal(any_one.real[:, :, 0], any_one.real[:, :, 3]), "a style picture stands still"
    assert not torch.equal(any_one.real[:, :, 0], any_one.z[:, :, 0])
    own = PictureSource(config.pictures, base, seed=3, style=replace(style, pairing="crop", folder=""))
    fresh = own.take(3, (8, 8))
    assert torch.equal(fresh.real, fresh.z)
    assert fresh.cond.tokens is not None
    assert fresh.cond.tokens.shape == (3, *base.null_tokens.shape[1:])  # type: ignore[union-attr]


def test_a_run_on_clips_with_styles_writes_sheets_of_their_frames(
    config: DistilConfig, styled: tuple[StyleConfig, Base], clips: Path
) -> None:
    style, loaded = styled
    sheet = SheetConfig(str(clips), style.folder, pairs=2, size_px=32)
    run = replace(
        config, style=style, sheet=sheet, steps=2, batch=1, bank=BankConfig(capacity=2, spread=False)
    )
    train_distil(run, None, replace(loaded, unet=deepcopy(loaded.unet)))
    sheets = sorted(Path(run.output).rglob("*.png"))
    sizes = {path.name: cv2.imread(str(path)).shape[:2] for path in sheets}
    # Two clips of four frames under a heading; content, style, teacher, and the student at two step counts.
    assert (20 + 8 * 36, 5 * 36) in sizes.values(), sizes
    notes = lora_notes(run, loaded, 2)
    assert {"ip_adapter", "motion_adapter"} <= notes.keys()


# --- the loss -------------------------------------------------------------------------------------------


def test_a_new_motion_head_changes_nothing_and_low_and_high_are_all() -> None:
    x = torch.randn(2, 4, 8, 5, 5)
    assert torch.equal(MotionHead(4)(x), x)
    low = low_pass(8)
    assert torch.allclose(low @ low, low, atol=1e-6)
    assert torch.allclose(low.sum(1), torch.ones(8), atol=1e-6)
    fastest = torch.tensor([1.0, -1.0] * 4)
    assert (low @ fastest).abs().max() < 1e-6


def _distiller(config: DistilConfig, base: Base) -> Distiller:
    add_lora(base.unet, config.lora, 0)
    _randomize_lora(base.unet)
    source = _source(config, base)
    return Distiller(config, base, source, Average(lora_parameters(base.unet)))


def test_mcm_starts_half_of_its_states_from_the_students_own_result(
    config: DistilConfig, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a state is the student's jump from tau, noised again: clean estimate and noise by hand."""
    half = replace(config, method="mcm", batch=3, motion=replace(config.motion, own_starts=0.5))
    distiller = _distiller(half, base)
    jumps: list[tuple[Any, Tensor]] = []
    original = distiller.student_jump

    def recorded(unet: Any, states: Any, s: Tensor) -> Tensor:
        jumps.append((states, original(unet, states, s)))
        assert (s == -1).all()
        return jumps[-1][1]

    monkeypatch.setattr(distiller, "student_jump", recorded)
    own = total = 0
    for _ in range(8):
        fresh = distiller.fresh(3, (8, 8))
        states = distiller.restarted(fresh)
        moved = (states.x != fresh.x).flatten(1).any(1)
        own, total = own + int(moved.sum()), total + 3
        assert torch.equal(states.index, fresh.index)
        if not moved.any():
            continue
        start, clean = jumps[-1]
        top = distiller.levels.tau_index
        assert (start.index == top).all()
        noise = (start.x - distiller.levels.alpha(start.index) * fresh.z[moved]) / distiller.levels.sigma(
            start.index
        )
        assert noise.std() == pytest.approx(1, abs=0.15)
        index = fresh.index[moved]
        again = (states.x[moved] - distiller.levels.alpha(index) * clean) / distiller.levels.sigma(index)
        assert again.std() == pytest.approx(1, abs=0.15)
        assert again.mean() == pytest.approx(0, abs=0.15)
    assert 5 <= own <= 19
    batch = distiller.draw()
    assert (batch.s == -1).all()
    assert len(distiller.bank) == 0


# --- runs -----------------------------------------------------------------------------------------------


@pytest.mark.long  # resuming itself: test_distil.py
@pytest.mark.parametrize("method", ["std", "mcm"])
def test_a_resumed_run_on_clips_equals_an_unbroken_one(
    config: DistilConfig, loaded: Base, method: str, tmp_path: Path
) -> None:
    """Weights, averages, motion head, discriminator, optimizers, bank, random states and log."""
    game = replace(config.adversarial, jumps="last" if method == "mcm" else "all")
    bank = BankConfig(capacity=4, spread=False)
    whole = replace(config, method=method, adversarial=game, bank=bank, batch=1, output=str(tmp_path / "a"))
    broken = replace(whole, output=str(tmp_path / "b"))
    # The checkpoint of the second is of step 2: step 3 is done again.
    for run, steps in ((whole, None), (broken, 3), (broken, None)):
        train_distil(run, steps, replace(loaded, unet=deepcopy(loaded.unet)))
    kept = read_checkpoint(whole)
    assert_same(kept, read_checkpoint(broken))
    logs = [(Path(c.output) / "log.jsonl").read_bytes() for c in (whole, broken)]
    assert logs[0] == logs[1]
    heads = {name for name in kept if "/motion_head" in name}
    assert len(heads) == 2 * len(list(MotionHead(4).named_parameters()))
    name = "shared.safetensors/motion_head{}/leave.2.weight"
    assert kept[name.format("")].abs().max() > 0
    assert not torch.equal(kept[name.format("")], kept[name.format("_average")])
    lora = load_file(Path(whole.output) / "lora.safetensors")
    assert not [key for key in lora if not key.startswith(("unet.down", "unet.mid", "unet.up"))]
    assert any(".motion_modules.0.proj_in.lora_A" in key for key in lora)


def test_a_dry_run_with_styles_counts_what_a_run_trains(
    cli: Cli, config: DistilConfig, styled: tuple[StyleConfig, Base], tmp_path: Path
) -> None:
    """Recipe and command, against the networks themselves: layers of motion and of the styles' branches."""
    (style, loaded), motion = styled, config.motion
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"stage = 'distil'\noutput = '{config.output}'\nbase = '{config.base}'\nsteps = 4\nbatch = 2\n"
        "accumulate = 1\nprecision = 'fp32'\neta = 0.2\nrun_steps = [2, 4]\nwarmup = 0\n"
        "[lora]\nrank = 2\nalpha = 2\n[bank]\ncapacity = 4\n"
        f"[pictures]\nfolder = '{config.pictures.folder}'\nresolution_px = 32\nbuckets = false\n"
        f"[style]\nadapter = '{style.adapter}'\nencoder = '{style.encoder}'\nfolder = '{style.folder}'\n"
        f"pairing = 'any'\n[motion]\nadapter = '{motion.adapter}'\nframes = 4\ninterval = 2\n",
        encoding="utf-8",
    )
    done = cli("train", recipe, "--dry-run")
    assert done.code == 0, done.err
    assert not Path(config.output).exists()
    unet = deepcopy(loaded.unet)
    frozen = sum(value.numel() for value in unet.parameters())
    layers = len(add_lora(unet, config.lora, seed=0))
    trained = sum(value.numel() for value in lora_parameters(unet).values())
    assert f"trains   {trained:,} parameters in a LoRA of rank 2 on {layers} layers\n" in done.out
    assert f"frozen   {frozen:,} parameters in the UNet" in done.out
    assert f"{trained:,} p" not in cli("train", recipe, "--dry-run", "--set", "motion.adapter=").out
    assert f"{frozen:,} p" not in cli("train", recipe, "--dry-run", "--set", "style.adapter=").out


def test_a_dry_run_counts_every_frame(config: DistilConfig) -> None:
    def cost(frames: int) -> Any:
        motion = replace(config.motion, frames=frames, judged=2)
        return estimate(replace(config, motion=motion), "cpu", flops_per_s=1e9)

    two, four = cost(2), cost(4)
    passes = [found.step_flops / sum(found.evaluations.values()) for found in (two, four)]
    assert passes[1] / passes[0] == pytest.approx(2, rel=0.1)
    states = 2 * 4 * 8 * 8 * 4 * config.bank.capacity  # bytes of z and x of a frame, for each
    assert (four.bank_gib - two.bank_gib) * 2**30 == pytest.approx(2 * states)
    pictures = estimate(replace(config, motion=MotionConfig()), "cpu", flops_per_s=1e9)
    assert four.lora_layers > pictures.lora_layers


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("motion.adapter=",), r"\[motion\] is for clips"),
        (("motion.adapter=", "method=mcm"), "mcm.* is for clips"),
        (("pictures.folder=", "triplets.folder=x"), "set pictures.folder to a folder of them"),
        (("pictures.kind=webdataset",), 'set "videos"'),
        (("motion.judged=9",), "motion.judged = 9 is more than motion.frames = 8"),
        (("method=mcm",), 'adversarial.jumps = "last"'),
        (("motion.frames=1",), "motion.frames = 1: expected int >= 2"),
        (("motion.representation=lo",), "did you mean low"),
    ],
)
def test_recipes_of_clips_that_do_not_fit_together(changes: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(RECIPE, changes)


def test_the_recipe_is_the_published_one() -> None:
    recipe = load_recipe(RECIPE)
    motion = recipe.motion
    assert (motion.frames, motion.interval, motion.judged) == (8, 4, 2)
    assert (motion.representation, motion.head_decay) == ("head", 0.95)
    assert (recipe.window, recipe.adversarial.weight, recipe.tau) == (0.3, 0.5, 779)
    mcm = load_recipe(RECIPE, ("method=mcm", "adversarial.jumps=last"))
    assert mcm.motion.own_starts == 0.5
