"""Students beside their teacher: runs, the reference, LoRAs attached and detached."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.pipelines import write_clip_pipeline, write_lora, write_own_pipeline
from torch import Tensor

from std_rt.core import schedule as runtime
from std_rt.core.errors import UsageError
from std_rt.core.schedule import NoiseSchedule, trajectory_timesteps
from std_rt.evaluation.candidates import Candidate, attached, label_of, read_candidate, teachers
from std_rt.evaluation.inpaint import composite, latent_mask, outside_difference
from std_rt.evaluation.measures import Frame
from std_rt.evaluation.students import Comparison, Row, Setting, aggregate, compare, timesteps_for
from std_rt.training.distil.base import Base, Conditioning, load_base
from std_rt.training.distil.lora import add_lora, lora_parameters, make_notes, save_lora
from std_rt.training.distil.sampling import (
    Scene,
    draw_noise,
    encode_scene,
    reference_timesteps,
    sample_latents,
)
from std_rt.training.run.recipe import LoraConfig
from std_rt.training.tiny.tiny_pipeline import load_tiny
from std_rt.training.tiny.trajectories import sample

TAU = 739
NOTES = {"method": "std", "eta": "0.75", "tau": str(TAU), "base": "tiny", "guidance": "[2.0, 4.0]"}


def _pictures(count: int, seed: int, side: int = 64) -> list[Frame]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (side, side, 3), np.uint8) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_pipeline(tmp_path_factory.mktemp("base"), sees_content=True)


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(folder)


@pytest.fixture(scope="module")
def scene(base: Base) -> Scene:
    pairs = list(zip(_pictures(3, 0), _pictures(3, 1), strict=True))
    return encode_scene(base, pairs, draws=4, batch=2)


@pytest.fixture
def lora(base: Base, tmp_path: Path) -> Path:
    return _lora(base, tmp_path / "std-0" / "lora.safetensors")


def _lora(base: Base, path: Path, seed: int = 0, **notes: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(path, base.unet, seed=seed, **{**NOTES, "base_digest": base.digest, **notes})
    with safe_open(path, "pt") as file:
        known = file.metadata()
    save_file(load_file(path), path, {**known, "seed": str(seed)})
    return path


def _teacher(method: str = "teacher") -> Candidate:
    return Candidate("teacher", None, 0.75, TAU, method, "teacher")


def _reference(base: Base, scene: Scene, guidance: float, steps: int, batch: int = 4) -> Tensor:
    comparison = Comparison(base, scene, _brightness, batch=batch)
    return comparison.sample(scene, reference_timesteps(TAU, steps), guidance)


def _brightness(frame: Frame, *_: object) -> dict[str, float]:
    return {"bright": float(frame.mean())}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_run_is_the_runtime_formulas_step_by_step(
    base: Base, scene: Scene, kind: str, guidance: float
) -> None:
    own = replace(base, schedule=NoiseSchedule(base.schedule.alphas_cumprod, kind))
    timesteps = trajectory_timesteps(0.75, 3)
    found = sample_latents(own, scene.cond, scene.z, timesteps, guidance, scene.noise)

    coefficients = own.schedule.coefficients(timesteps)
    x = runtime.add_noise(scene.z.numpy(), scene.noise[0].numpy(), coefficients[0])
    for c in coefficients:
        t = torch.full((3,), c.timestep)
        with torch.no_grad():
            styled, free = (
                own.predict(own.unet, torch.from_numpy(x), t, cond).numpy()
                for cond in (scene.cond, base.null(scene.cond))
            )
        output = free + guidance * (styled - free)
        x = runtime.step(x, runtime.to_eps(output, x, c, kind), c).astype(np.float32)
    assert np.abs(found.numpy() - x).max() < 2e-3 * np.abs(x).max()


def test_a_run_is_the_stylist_stages_own(folder: Path, base: Base, scene: Scene) -> None:
    pipeline = load_tiny(folder)
    images, styles = (torch.rand(2, 3, 64, 64) * 2 - 1 for _ in range(2))
    theirs = sample(pipeline, images, styles, 4, guidance=2.0, seed=5)
    noise = torch.randn(scene.z.shape[1:], generator=torch.Generator().manual_seed(5))
    content = base.encode(images)
    cond = base.condition(None, base.look(styles), torch.tensor([[64, 64, 0, 0, 64, 64]] * 2), content)
    timesteps = trajectory_timesteps(0.75, 4)
    z = sample_latents(base, cond, content, timesteps, 2.0, noise.expand(1, 2, -1, -1, -1))
    assert torch.allclose(base.decode(z), theirs, atol=1e-4 * float(theirs.abs().max()))


class _Recorder(Base):
    """Predicts a clean estimate of 0.5 everywhere, and keeps what it was asked."""

    def __init__(self, like: Base) -> None:
        schedule = NoiseSchedule(like.schedule.alphas_cumprod, "sample")
        super().__init__(like.unet, like.vae, schedule, "recorder", "")
        self.states: list[Tensor] = []
        self.timesteps: list[int] = []

    def predict(self, unet: object, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert len(x) == len(t) == len(cond)
        self.states.append(x.clone())
        self.timesteps.append(int(t[0]))
        return torch.full_like(x, 0.5)


def test_lcm_draws_new_noise_between_steps(base: Base, scene: Scene) -> None:
    recorder = _Recorder(base)
    end = sample_latents(recorder, scene.cond, scene.z, [739, 559, 379], 1.0, scene.noise, gamma=1.0)
    assert recorder.timesteps == [739, 559, 379]
    for i, t in ((1, 559), (2, 379)):
        alpha, sigma = base.schedule.alpha_sigma(t)
        assert torch.allclose(recorder.states[i], alpha * 0.5 + sigma * scene.noise[i], atol=1e-6)
    assert torch.allclose(end, torch.full_like(end, 0.5))


def test_deterministic_steps_use_the_start_noise_only(base: Base, scene: Scene) -> None:
    one = sample_latents(base, scene.cond, scene.z, [739, 379], 1.0, scene.noise[:1])
    assert torch.equal(one, sample_latents(base, scene.cond, scene.z, [739, 379], 1.0, scene.noise))


def test_rows_do_not_depend_on_the_batch(base: Base) -> None:
    pairs = list(zip(_pictures(3, 0), _pictures(3, 1), strict=True))
    scenes = [encode_scene(base, pairs, batch=n) for n in (1, 3)]
    assert torch.equal(scenes[0].noise, scenes[1].noise)
    found = [_reference(base, s, 2.0, 5, batch=n) for s, n in zip(scenes, (1, 3), strict=True)]
    assert torch.allclose(*found, atol=1e-4 * float(found[0].abs().max()))


def test_frames_of_a_stream_share_their_noise(base: Base) -> None:
    pairs = list(zip(_pictures(2, 0), _pictures(2, 1), strict=True))
    stream, single = encode_scene(base, pairs, one_noise=True), encode_scene(base, pairs)
    assert torch.equal(stream.noise[:, 0], stream.noise[:, 1])
    assert not torch.equal(single.noise[:, 0], single.noise[:, 1])


def test_the_reference_is_the_teacher_over_the_whole_grid(base: Base, scene: Scene) -> None:
    comparison = Comparison(base, scene, _brightness, reference_guidance=2.0)
    settings = [Setting(37, 2.0), Setting(4, 2.0), Setting(2, 1.0)]
    first, same, four, two = compare(comparison, [_teacher()], settings)
    assert first.label == "reference"
    assert first.timesteps == list(range(739, 0, -20))
    assert first.evaluations == same.evaluations == 74
    assert same.measures["latent_rmse"] == pytest.approx(0, abs=1e-5)
    assert same.measures["psnr_db"] == pytest.approx(100, abs=1)
    assert (four.evaluations, two.evaluations) == (8, 2)
    assert four.measures["latent_rmse"] > 0
    assert four.measures["bright"] == pytest.approx(np.mean([f.mean() for f in four.frames]))


def test_distances_are_means_over_the_pairs(base: Base, scene: Scene) -> None:
    comparison = Comparison(base, scene, _brightness, reference_guidance=1.0, reference_steps=10)
    _, row = compare(comparison, [_teacher()], [Setting(1, 1.0)])
    target = comparison.references[TAU, 1.0]
    z = sample_latents(base, scene.cond, scene.z, [TAU], 1.0, scene.noise)
    off = [float(((z[i] - target.z[i]) ** 2).mean() ** 0.5) for i in range(3)]
    images = (base.decode(z).clamp(-1, 1) + 1) / 2
    off_images = [float(((images[i] - target.images[i]) ** 2).mean() ** 0.5) for i in range(3)]
    assert row.measures["latent_rmse"] == pytest.approx(np.mean(off), rel=1e-4)
    assert row.measures["image_rmse"] == pytest.approx(np.mean(off_images), rel=1e-4)
    assert row.measures["psnr_db"] == pytest.approx(np.mean(-20 * np.log10(off_images)), rel=1e-4)


def test_a_lora_is_put_on_with_its_alpha_and_taken_off_again(base: Base, scene: Scene, lora: Path) -> None:
    candidate = read_candidate(lora, base)
    assert candidate.tensors is not None
    fused = copy.deepcopy(base.unet)
    for key, down in candidate.tensors.items():
        if ".lora_A." in key:
            layer = fused.get_submodule(key.removeprefix("unet.").split(".lora_A")[0])
            layer.weight.data += 8 / 4 * candidate.tensors[key.replace("lora_A", "lora_B")] @ down

    def run(unet: object = None) -> Tensor:
        return sample_latents(base, scene.cond, scene.z, [739, 379], 1.0, scene.noise, unet=unet)

    bare = run()
    with attached(base.unet, candidate):
        worn = run()
    again = run()
    assert torch.equal(bare, again)
    assert torch.allclose(worn, run(fused), atol=1e-4 * float(worn.abs().max()))
    assert float((worn - bare).abs().max()) > 1e-2


def test_what_training_saves_runs_as_it_was_trained(
    folder: Path, base: Base, scene: Scene, tmp_path: Path
) -> None:
    config = LoraConfig(rank=2, alpha=3.0)
    student = load_base(folder)
    add_lora(student.unet, config, seed=1)
    tensors = lora_parameters(student.unet)
    for value in tensors.values():
        value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(4)) * 0.1
    notes = make_notes(
        method="lcm", eta=0.75, tau=TAU, run_steps=(2, 4), guidance=(6.0, 16.0), base="tiny",
        base_digest=student.digest, step=7, seed=3,
    )  # fmt: skip
    path = tmp_path / "lcm-3" / "lora.safetensors"
    save_lora(path, tensors, notes, config, torch.float32)
    candidate = read_candidate(path, base)
    assert (candidate.label, candidate.seed, candidate.gamma) == ("lcm", 3, 1.0)
    assert candidate.reference_guidance() == 11
    expected = sample_latents(student, scene.cond, scene.z, [739], 1.0, scene.noise)
    with attached(base.unet, candidate):
        found = sample_latents(base, scene.cond, scene.z, [739], 1.0, scene.noise)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert base.digest == student.digest


def test_candidates_do_not_change_each_other(base: Base, scene: Scene, tmp_path: Path) -> None:
    loras = [read_candidate(_lora(base, tmp_path / f"std-{i}" / "lora.safetensors", i), base) for i in (0, 1)]

    def run(candidates: list[Candidate]) -> dict[str, dict[str, float]]:
        comparison = Comparison(base, scene, _brightness, reference_steps=10)
        return {row.name: row.measures for row in compare(comparison, candidates, [Setting(2, 1.0)])}

    together = run(loras)
    assert together[loras[1].name] == run(loras[1:])[loras[1].name]
    assert together[loras[0].name] != together[loras[1].name]


def test_the_reference_guidance_is_the_middle_of_what_was_trained(base: Base, lora: Path) -> None:
    candidate = read_candidate(lora, base)
    assert candidate.reference_guidance() == 3.0
    assert candidate.reference_guidance(1.5) == 1.5
    assert _teacher().reference_guidance() == 2.0
    assert [(t.tau, t.guidance, t.label) for t in teachers([candidate], 0.5)] == [(TAU, (2, 4), "teacher")]
    assert [(t.tau, t.label) for t in teachers([], 0.5)] == [(499, "teacher")]
    two = teachers([candidate, replace(candidate, tau=839, eta=0.85)], 0.5)
    assert [t.label for t in two] == ["teacher from 739, reference 3", "teacher from 839, reference 3"]


def test_seeds_of_one_label_become_mean_and_spread() -> None:
    def row(label: str, seed: int | None, value: float, steps: int = 4) -> Row:
        return Row(f"{label}-{seed}", label, "std", seed, TAU, steps, 1.0, [], steps, {"off": value})

    rows = [row("std", 0, 1.0), row("std", 1, 2.0), row("std", 2, 6.0), row("std", 0, 9.0, 2)]
    groups = aggregate([*rows, row("teacher", None, 5.0)])
    assert [(g["label"], g["steps"], g["seeds"]) for g in groups] == [
        ("std", 4, [0, 1, 2]),
        ("std", 2, [0]),
        ("teacher", 4, [None]),
    ]
    assert groups[0]["mean"] == {"off": 3.0}
    assert groups[0]["spread"]["off"] == pytest.approx(7**0.5)
    assert groups[1]["spread"] is None


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("runs/table/std-0/lora.safetensors", "std"),
        ("runs/ablate/no-bank-12/lora.safetensors", "std no-bank"),
        ("runs/std-fresh/lora.safetensors", "std-fresh"),
        ("runs/std-1/loras/001000.safetensors", "std 1000"),
        ("mine-3.safetensors", "std mine"),
    ],
)
def test_labels_come_from_the_run_folder(path: str, label: str) -> None:
    assert label_of(Path(path), "std") == label


def test_the_diffusers_cut_costs_the_same_and_starts_elsewhere() -> None:
    aligned, cut = (
        [timesteps_for(_teacher(), Setting(n, 1, s)) for n in (4, 6, 8)] for s in ("aligned", "diffusers")
    )
    assert [len(t) for t in cut] == [len(t) for t in aligned] == [4, 6, 8]
    assert [t[0] for t in aligned] == [739, 739, 739]
    assert [t[0] for t in cut] == [679, 759, 739]


def test_more_steps_than_grid_points_are_refused(base: Base, scene: Scene) -> None:
    with pytest.raises(UsageError, match="--steps 38 cannot be run"):
        next(compare(Comparison(base, scene, _brightness), [_teacher()], [Setting(38, 1.0)]))


def _broken(base: Base, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    yield _lora(base, tmp_path / "a" / "l.safetensors", base_digest="0" * 64), "another base"
    yield _lora(base, tmp_path / "b" / "l.safetensors", tau="740"), "invalid metadata"
    yield _lora(base, tmp_path / "c" / "l.safetensors", method="magic"), "invalid metadata"
    yield _lora(base, tmp_path / "d" / "l.safetensors", guidance="[1"), "invalid metadata"
    yield _lora(base, tmp_path / "e" / "l.safetensors", ip_adapter_digest="0" * 64), "with style pictures"
    yield write_lora(tmp_path / "plain.safetensors", base.unet), "has no method, eta, tau, base_digest in its"
    save_file({"unet.conv_in.weight": torch.zeros(1)}, tmp_path / "weights.safetensors", NOTES)
    yield tmp_path / "weights.safetensors", "holds no LoRA"
    (tmp_path / "text.safetensors").write_text("no", encoding="utf-8")
    yield tmp_path / "text.safetensors", "cannot be read"
    yield tmp_path / "nowhere.safetensors", "cannot be read"


def test_a_lora_that_does_not_belong_is_one_clear_line(base: Base, tmp_path: Path) -> None:
    for path, reason in _broken(base, tmp_path):
        with pytest.raises(UsageError, match=reason) as caught:
            read_candidate(path, base)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", ["name", "shape"])
def test_a_lora_that_does_not_fit_leaves_the_teacher_alone(
    base: Base, scene: Scene, lora: Path, spoil: str
) -> None:
    candidate = read_candidate(lora, base)
    assert candidate.tensors is not None
    tensors = dict(candidate.tensors)
    key = sorted(tensors)[0]
    value = tensors.pop(key)
    tensors |= (
        {key.replace("down_blocks.0", "down_blocks.9"): value} if spoil == "name" else {key: value[:, :3]}
    )
    before = sample_latents(base, scene.cond, scene.z, [739], 1.0, scene.noise)
    damaged = attached(base.unet, replace(candidate, tensors=tensors))
    with pytest.raises(UsageError, match=r"which this teacher lacks|does not fit this teacher"), damaged:
        pass
    assert torch.equal(before, sample_latents(base, scene.cond, scene.z, [739], 1.0, scene.noise))


def test_a_size_the_teacher_cannot_take_names_the_next(base: Base) -> None:
    frames = _pictures(2, 0, 72)
    with pytest.raises(UsageError, match=r"--size 72 is not a multiple of 16.*use 64"):
        encode_scene(base, [(frames[0], frames[1])])


def test_noise_is_the_runtimes() -> None:
    from std_rt.pipeline.stylizer import draw_noise as theirs

    assert np.array_equal(draw_noise(3, (2, 4, 5)).numpy(), theirs(3, (2, 4, 5)))


def _mask() -> np.ndarray:
    mask = np.zeros((64, 64), np.bool_)
    mask[12:44, 20:64] = True
    return mask


def test_a_masked_run_changes_nothing_outside(base: Base, scene: Scene) -> None:
    comparison = Comparison(base, replace(scene, mask=_mask()), _brightness, reference_steps=10)
    _, row = compare(comparison, [_teacher()], [Setting(4, 2.0)])
    assert row.measures["outside_max"] == 0
    for frame, content in zip(row.frames, scene.contents, strict=True):
        assert np.array_equal(frame[~_mask()], content[~_mask()])
        assert not np.array_equal(frame[_mask()], content[_mask()])


def test_a_masked_run_keeps_the_content_on_its_trajectory_outside(base: Base, scene: Scene) -> None:
    recorder, masked = _Recorder(base), replace(scene, mask=_mask())
    found = _reference(recorder, masked, 1.0, 4)
    inside = latent_mask(_mask(), (8, 8)).expand_as(scene.z).bool()
    for x, t in zip(recorder.states, recorder.timesteps, strict=True):
        alpha, sigma = base.schedule.alpha_sigma(t)
        kept = alpha * scene.z + sigma * scene.noise[0]
        assert torch.allclose(x[~inside], kept[~inside], atol=1e-5)
    assert torch.equal(found[~inside], scene.z[~inside])
    assert torch.allclose(found[inside], torch.tensor(0.5))


def test_a_white_mask_is_no_mask(base: Base, scene: Scene) -> None:
    white = replace(scene, mask=np.ones((64, 64), np.bool_))
    rows = [
        list(compare(Comparison(base, s, _brightness, reference_steps=10), [_teacher()], [Setting(2, 1.0)]))
        for s in (scene, white)
    ]
    for plain, masked in zip(*rows, strict=True):
        assert masked.measures.pop("outside_max") == 0
        assert masked.measures == pytest.approx(plain.measures, rel=1e-5, abs=1e-6)


def test_a_latent_is_inside_where_any_of_its_pixels_is() -> None:
    mask = np.zeros((64, 64), np.bool_)
    mask[15, 16] = True
    found = latent_mask(mask, (8, 8))[0, 0]
    assert found.sum() == 1
    assert found[1, 2] == 1


def test_composite_and_what_it_left_outside() -> None:
    frame, content = _pictures(2, 0)
    whole = composite(frame, content, _mask())
    assert outside_difference(whole, content, _mask()) == 0
    whole[0, 0, 0] ^= 128
    assert outside_difference(whole, content, _mask()) == 128
    assert outside_difference(frame, content, np.ones((64, 64), np.bool_)) == 0


def test_clips_are_judged_by_their_own_measure(base: Base, scene: Scene) -> None:
    pairs = list(zip(_pictures(3, 0), _pictures(3, 1), strict=True))
    clip = encode_scene(base, pairs, one_noise=True)
    seen: list[int] = []

    def judge(outputs: list[Frame]) -> dict[str, float]:
        seen.append(len(outputs))
        return {"warping": 0.25}

    clips = [(clip, judge), (clip, lambda _: {})]
    comparison = Comparison(base, scene, _brightness, clips, reference_steps=2)
    rows = list(compare(comparison, [_teacher()], [Setting(1, 1.0)]))
    assert [row.measures["warping"] for row in rows] == [0.25, 0.25]
    assert seen == [3, 3]


def test_rows_are_json_without_their_pictures(base: Base, scene: Scene) -> None:
    comparison = Comparison(base, scene, _brightness, reference_steps=2)
    rows = list(compare(comparison, [_teacher()], [Setting(1, 1.0)]))
    found = json.loads(json.dumps([row.as_dict() for row in rows]))
    assert found[1]["timesteps"] == [TAU]
    assert "frames" not in found[1]
    assert len(rows[1].frames) == 3


def test_a_base_with_text_runs_on_a_prompt(tmp_path: Path) -> None:
    text = load_base(write_clip_pipeline(tmp_path))
    frames = _pictures(2, 0, 32)
    plain, prompted = (encode_scene(text, [(frames[0], frames[1])], prompt=p) for p in ("", "ink"))
    assert plain.cond.tokens is None
    ends = [_reference(text, s, 2.0, 4) for s in (plain, prompted)]
    assert ends[0].shape == (1, 4, 8, 8)
    assert not torch.allclose(*ends)


def test_bf16_is_near_fp32(base: Base, scene: Scene) -> None:
    fine, coarse = (
        sample_latents(base, scene.cond, scene.z, [739, 379], 2.0, scene.noise, bf16=b) for b in (False, True)
    )
    assert coarse.dtype == torch.float32
    assert not torch.equal(fine, coarse)
    assert float((fine - coarse).square().mean().sqrt()) < 0.05 * float(fine.square().mean().sqrt())
