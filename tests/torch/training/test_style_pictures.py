"""SDXL with style pictures: trained with an IP-Adapter, exported with it, and run as diffusers runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, TCDScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as img2img
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.pipelines import write_clip_pipeline, write_plain_ip_adapter
from torch import Tensor
from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

from std_rt import Stylizer
from std_rt.core.errors import ExportError, RecipeError
from std_rt.export.build import export_pipeline
from std_rt.export.export_options import ExportOptions
from std_rt.export.source_pipeline import read_source
from std_rt.models.ip_adapter import adapter_digest
from std_rt.pipeline.stylizer import State
from std_rt.training.distil import loop
from std_rt.training.distil.base import Base, load_base
from std_rt.training.distil.discriminator import Adversary
from std_rt.training.distil.distiller import Distiller, StepBatch
from std_rt.training.distil.loop import train_distil
from std_rt.training.run.recipe import (
    AdversarialConfig,
    BankConfig,
    DistilConfig,
    LoraConfig,
    PicturesConfig,
    StyleConfig,
)

KINDS = ["plus", "plain"]
SIZE = 32
LAYERS = {"up": {"block_0": [0.0, 1.0]}}  # the published ones, as diffusers names them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_pipeline(tmp_path_factory.mktemp("base") / "mini-xl", layers_per_block=1, levels=1)


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    plain = write_plain_ip_adapter(tmp_path_factory.mktemp("adapter") / "plain.safetensors", unet)
    return {"plus": folder / "ip_adapter.safetensors", "plain": plain}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six squares in two folders."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(_frame(i, SIZE + 8)).save(root / "ab"[i % 2] / f"{i}.png")
    return root


def _frame(seed: int, side: int = SIZE) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def _image(seed: int) -> Tensor:
    return torch.from_numpy(_frame(seed)).permute(2, 0, 1)[None].float() / 127.5 - 1


def _recipe(output: Path, folder: Path, pictures: Path, adapter: Path, **changes: Any) -> DistilConfig:
    config = DistilConfig(
        output=str(output),
        base=str(folder),
        steps=2,
        batch=2,
        accumulate=1,
        learning_rate=5e-2,
        warmup=1,
        eta=0.5,
        run_steps=(2, 4),
        guidance=(2.0, 3.0),
        drop_conditioning=0.3,
        precision="fp32",
        snapshot_every=2,
        log_every=1,
        lora=LoraConfig(rank=2, alpha=2.0),
        bank=BankConfig(capacity=4, spread=False),
        pictures=PicturesConfig(str(pictures), resolution_px=SIZE, buckets=False, workers=0),
        style=StyleConfig(adapter=str(adapter), encoder=str(folder / "image_encoder"), pairing="any"),
    )
    return replace(config, **changes)


def _pipe(folder: Path, adapter: Path, lora: Path | None = None) -> Any:
    """diffusers' pipeline with the adapter and perhaps a LoRA, loaded in its own way."""
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.feature_extractor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipe.load_ip_adapter(
        str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(LAYERS)
    return pipe


# --- the base -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_unet_are_diffusers(
    folder: Path, adapters: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    """Of a picture and of no style; the latter also as the export stores it."""
    base = load_base(folder, style=_recipe(tmp_path, folder, tmp_path, adapters[kind]).style)
    pipe = _pipe(folder, adapters[kind])
    with torch.no_grad():
        (embeds,) = pipe.prepare_ip_adapter_image_embeds(Image.fromarray(_frame(3)), None, "cpu", 1, True)
        null, tokens = (x[:, 0] for x in pipe.unet.encoder_hid_proj([embeds])[0].chunk(2))
    found = base.look(_image(3)).tokens
    assert base.null_tokens is not None
    torch.testing.assert_close(found, tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(base.null_tokens, null, atol=1e-5, rtol=1e-4)
    assert (found - base.null_tokens).abs().max() > 0.1
    options = ExportOptions(
        folder, tmp_path, ip_adapter=adapters[kind], image_encoder=folder / "image_encoder"
    )
    exported = read_source(options).load_style()[0]
    assert torch.equal(exported.negative, base.null_tokens)
    assert torch.equal(exported.module(_image(3)), found)

    cond = base.condition(base.read_text(["ink"]), base.look(_image(3)), torch.ones(1, 6))
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([99])
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids, "image_embeds": [embeds.chunk(2)[1]]}
    with torch.no_grad():
        theirs = pipe.unet(x, t, cond.context, added_cond_kwargs=added, return_dict=False)[0]
        ours = base.predict(base.unet, x, t, cond)
        without = base.predict(base.unet, x, t, base.null(cond))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert (ours - without).abs().max() > 0.01
    assert base.adapter is not None
    assert all(layer.startswith("up_blocks.0.attentions.1.") for layer in base.adapter.layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "no.safetensors"}, r"^style\.adapter = 'no\.safetensors' does not exist; hf download"),
        ({"encoder": "nowhere"}, r"beside .*: set style\.encoder to its folder$"),
        ({"layers": "down_blocks.7"}, r"^style\.layers 'down_blocks\.7' fits no layer; use all, published"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(
    folder: Path, adapters: dict[str, Path], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    style = replace(_recipe(tmp_path, folder, tmp_path, adapters["plain"]).style, **changes)
    with pytest.raises(RecipeError, match=message) as caught:
        load_base(folder, style=style)
    assert "\n" not in str(caught.value)


# --- a run ----------------------------------------------------------------------------------------------


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What a run gave to each role: tokens of every evaluation, conditions of the heads, its batches."""
    kept: dict[str, list[Any]] = {"tokens": [], "generator": [], "discriminator": [], "batch": []}

    def predict(self: Base, unet: Any, x: Any, t: Any, cond: Any, original: Any = Base.predict) -> Any:
        kept["tokens"].append(cond.tokens)
        return original(self, unet, x, t, cond)

    def draw(self: Distiller, original: Any = Distiller.draw) -> StepBatch:
        kept["batch"].append(original(self))
        return kept["batch"][-1]

    def generator(
        self: Any, fake: Any, condition: Any, *more: Any, original: Any = Adversary.generator_loss
    ) -> Any:
        kept["generator"].append(condition)
        return original(self, fake, condition, *more)

    def discriminator(
        self: Any, heads: Any, fake: Any, real: Any, condition: Any, *more: Any,
        original: Any = Adversary.discriminator_loss,
    ) -> Any:  # fmt: skip
        kept["discriminator"].append(condition)
        return original(self, heads, fake, real, condition, *more)

    monkeypatch.setattr(Base, "predict", predict)
    monkeypatch.setattr(Distiller, "draw", draw)
    monkeypatch.setattr(Adversary, "generator_loss", generator)
    monkeypatch.setattr(Adversary, "discriminator_loss", discriminator)
    small = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28
    )
    monkeypatch.setattr(loop, "load_dino", lambda _: Dinov2Model(small).eval().requires_grad_(False))
    return kept


def test_every_role_sees_the_tokens_of_its_own_sample(
    folder: Path, adapters: dict[str, Path], pictures: Path, tmp_path: Path, heard: dict[str, list[Any]]
) -> None:
    """Teacher, target, student and heads; and where a style is dropped, or for guidance, the null tokens."""
    judged = AdversarialConfig(0.5, blocks=(0, 1), size_px=28, learning_rate=1e-2)
    config = _recipe(tmp_path / "run", folder, pictures, adapters["plus"], steps=4, adversarial=judged)
    config = replace(config, drop_conditioning=0.5, bank=BankConfig(capacity=8, spread=False))
    base = load_base(folder, style=config.style)
    train_distil(config, base=base)
    known = [base.look(_image_of(path)).tokens for path in sorted(pictures.rglob("*.png"))]
    null = base.null_tokens
    assert null is not None
    assert len(heard["batch"]) == 4
    shares = []
    for n, batch in enumerate(heard["batch"]):
        teacher, target, student = heard["tokens"][3 * n : 3 * n + 3]
        tokens = batch.states.cond.tokens
        assert torch.equal(teacher, torch.cat([tokens, null.expand_as(tokens)]))
        assert torch.equal(target, tokens)
        assert torch.equal(student, tokens)
        told = torch.cat([batch.states.cond.pooled, (tokens - null).mean(1)], 1)
        assert torch.equal(heard["generator"][n], told)
        assert torch.equal(heard["discriminator"][n], told)
        dropped = (tokens == null).flatten(1).all(1)
        assert torch.equal(dropped, ~batch.states.cond.pooled.any(1)), "text and style are dropped together"
        shares += dropped.tolist()
        for row in tokens[~dropped]:
            # A crop of one of the pictures, which are 8 px larger: nearer to one than no style is to any.
            assert min((row - one[0]).abs().mean() for one in known) < (row - null[0]).abs().mean()
    assert 0 < sum(shares) < len(shares)


def _image_of(path: Path) -> Tensor:
    with Image.open(path) as picture:
        frame = np.array(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_precomputed_tokens_are_the_same_run_without_the_encoder(
    folder: Path, adapters: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """The same LoRA, bit for bit; the encoder is gone, and nothing but the cache is asked for a style."""
    cached = PicturesConfig(
        str(pictures), resolution_px=SIZE, buckets=False, workers=0, cache=str(tmp_path / "cache")
    )
    config = replace(_recipe(tmp_path / "lazy", folder, pictures, adapters["plain"]), pictures=cached)
    lazy = load_file(train_distil(config))
    other = replace(cached, cache=str(tmp_path / "other"))
    ahead = replace(config, output=str(tmp_path / "ahead"), pictures=other)
    ahead = replace(ahead, style=replace(ahead.style, precompute=True))
    base = load_base(folder, style=ahead.style)
    found = load_file(train_distil(ahead, base=base))
    assert base.style_encoder is None
    assert found.keys() == lazy.keys()
    assert all(torch.equal(found[name], lazy[name]) for name in found)
    with pytest.raises(RecipeError, match=r"not in pictures\.cache, and the image encoder is not loaded"):
        base.look(_image(0))


# --- export ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def students(
    folder: Path, adapters: dict[str, Path], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A LoRA trained with each adapter."""
    root = tmp_path_factory.mktemp("students")
    return {kind: train_distil(_recipe(root / kind, folder, pictures, adapters[kind])) for kind in KINDS}


class ReachedTheWeightsError(Exception):
    """Raised by the progress callback: every check before the slow part has passed."""


def _stop(note: str) -> None:
    if note != "reading the pipeline":
        raise ReachedTheWeightsError(note)


def test_the_adapter_is_noted_and_checked_by_the_export(
    folder: Path, adapters: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    student = students["plain"]
    with safe_open(student, "pt") as file:
        notes = file.metadata()
    assert notes["ip_adapter"] == "plain.safetensors"
    assert notes["ip_adapter_digest"] == adapter_digest(adapters["plain"])
    assert notes["style_layers"] == "up_blocks.0.attentions.1.transformer_blocks.0.attn2"

    def export(**flags: Any) -> None:
        given = {"ip_adapter": adapters["plain"], "image_encoder": folder / "image_encoder"} | flags
        export_pipeline(folder, tmp_path / "b", lora=[(student, 1.0)], progress=_stop, **given)

    for layers in ("auto", "published", "up_blocks.0.attentions.1"):
        with pytest.raises(ReachedTheWeightsError):
            export(style_layers=layers)
    for flags, message in (
        ({"ip_adapter": adapters["plus"]}, r"was trained with the IP-Adapter plain\.safetensors, and .*"
         r"ip_adapter\.safetensors is another; give that one with --ip-adapter"),
        ({"ip_adapter": tmp_path / "no.safetensors"}, r"IP-Adapter plain\.safetensors, and there is none at "
         r".*no\.safetensors; give it with --ip-adapter"),
        ({"style_layers": "all"}, r"trained with a style in 1 layers, and \d others .*omit --style-layers"),
    ):  # fmt: skip
        with pytest.raises(ExportError, match=message) as caught:
            export(**flags)
        assert "\n" not in str(caught.value)


def test_a_lora_with_layers_of_its_own_is_exported_with_them(
    folder: Path, adapters: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    """ "auto" takes the layers from the LoRA."""
    with safe_open(students["plus"], "pt") as file:
        notes = file.metadata()
    base = load_base(folder, style=StyleConfig(adapter=str(adapters["plus"]), layers="all"))
    assert base.adapter is not None
    assert len(base.adapter.layers) > 1
    path = tmp_path / "all.safetensors"
    save_file(load_file(students["plus"]), path, notes | {"style_layers": ",".join(base.adapter.layers)})
    with pytest.raises(ReachedTheWeightsError):
        export_pipeline(folder, tmp_path / "b", lora=[(path, 1.0)], progress=_stop)
    with pytest.raises(ExportError, match="omit --style-layers"):
        export_pipeline(folder, tmp_path / "b", lora=[(path, 1.0)], style_layers="published", progress=_stop)


def test_the_digest_is_of_the_numbers_and_not_of_the_file(adapters: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(adapters["plain"])
    torch.save(state, tmp_path / "a.bin")
    assert adapter_digest(tmp_path / "a.bin") == adapter_digest(adapters["plain"])
    name = next(iter(state))
    save_file(state | {name: state[name] + 1e-3}, tmp_path / "b.safetensors")
    assert adapter_digest(tmp_path / "b.safetensors") != adapter_digest(adapters["plain"])


STRENGTH, STEPS, SCALE, PROMPT = 0.5, 4, 3.0, "in ink"


def _painted_by_diffusers(pipe: Any, noise: np.ndarray, style: np.ndarray) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        # The only two things that are drawn: latents around their mean, and the start noise.
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        patch.setattr(img2img, "randn_tensor", lambda *args, **options: torch.from_numpy(noise))
        out = pipe(
            prompt=PROMPT,
            image=Image.fromarray(_frame(1, 64)),
            ip_adapter_image=Image.fromarray(style),
            strength=STRENGTH,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            eta=0.0,
            output_type="np",
        )
    frame: np.ndarray = out.images[0]
    return frame * 255


@pytest.mark.parametrize("kind", ["plus", pytest.param("plain", marks=pytest.mark.long)])
def test_a_student_with_its_adapter_paints_what_diffusers_paints(
    folder: Path, adapters: dict[str, Path], students: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Two styles, with guidance (so with the null tokens); the style picture changes the result."""
    bundle = export_pipeline(
        folder,
        tmp_path / "b",
        lora=[(students[kind], 1.0)],
        ip_adapter=adapters[kind],
        image_encoder=folder / "image_encoder",
        steps=(STEPS,),
        schedule="diffusers",
        guidance=SCALE,
        prompt=PROMPT,
        size=(64, 64),
        weights="fp32",
        precision="fp32",
    )
    noise = np.random.default_rng(5).standard_normal((1, 4, 16, 16)).astype(np.float32)
    pipe = _pipe(folder, adapters[kind], students[kind])
    pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
    styles = [_frame(2), _frame(7)]
    wanted = [_painted_by_diffusers(pipe, noise, style) for style in styles]
    found = []
    with Stylizer.load(bundle, backend="openvino", precision="fp32", size=(64, 64)) as stylizer:
        for style in styles:
            stylizer.set_style(style)
            found.append(stylizer.step(_frame(1, 64), State(0, 0, noise))[0].astype(np.float64))
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(ours - theirs).max() < 1.5
    assert np.abs(found[0] - found[1]).mean() > 1.5
    pipe.disable_lora()
    bare = _painted_by_diffusers(pipe, noise, styles[0])
    assert np.abs(found[0] - bare).mean() > 0.5, "the training has changed something"
