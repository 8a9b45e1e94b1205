"""Exported bundles against torch: the same weights, two paths, one answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from std_rt import Stylizer
from std_rt.core.bundle import Bundle, load_bundle, verify_bundle
from std_rt.core.schedule import NoiseSchedule, trajectory_timesteps
from std_rt.engines import Engine, GraphSpec, open_engine
from std_rt.export.parity import psnr_db
from std_rt.export.restore import load_torch_components

Arrays = dict[str, np.ndarray]
BUNDLES = ("clip_bundle", "own_bundle")
ENGINES: dict[Any, Engine] = {}
COMPONENTS: dict[str, dict[str, Any]] = {}  # of load_torch_components, by the digest of the bundle


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """Each exported bundle in turn."""
    found: Bundle = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module", autouse=True)
def _close_engines() -> Iterator[None]:
    """They and the rebuilt networks do not outlive the module."""
    yield
    ENGINES.clear()
    COMPONENTS.clear()


def shapes(bundle: Bundle, graph: str, size: tuple[int, int] = (64, 64), batch: int = 1) -> dict[str, Any]:
    """Static shapes at ``size`` px."""
    scale = bundle.vae_scale
    axes = {"batch": batch, "height": size[0], "width": size[1], "text_tokens": 12}
    axes |= {"latent_height": size[0] // scale, "latent_width": size[1] // scale}
    inputs = bundle.manifest["graphs"][graph]["inputs"]
    return {port["name"]: tuple(axes.get(a, a) for a in port["shape"]) for port in inputs}


def open_(bundle: Bundle, graph: str, backend: str = "openvino", **at: Any) -> Engine:
    """An fp32 engine of one graph, opened once per module."""
    key = (bundle.digest, graph, backend, *sorted(at.items()))
    if key not in ENGINES:
        spec = GraphSpec(graph, bundle.graph_path(graph), shapes(bundle, graph, **at), bundle.digest)
        ENGINES[key] = open_engine(backend, spec, "fp32")
    return ENGINES[key]


def draw(engine: Engine, seed: int = 0) -> Arrays:
    """Random inputs in the range each one has."""
    rng = np.random.default_rng(seed)
    drawn = {k: rng.standard_normal(shape).astype(np.float32) for k, (shape, _) in engine.inputs.items()}
    if "timestep" in drawn:
        batch = drawn["timestep"].shape[0]
        drawn["timestep"] = rng.integers(0, 1000, batch).astype(np.float32)
        drawn["time_ids"] = np.tile(np.float32([64, 64, 0, 0, 64, 64]), (batch, 1))
        drawn["style_strength"] = rng.uniform(0.3, 1.7, batch).astype(np.float32)
    return drawn


@torch.no_grad()
def torch_answer(bundle: Bundle, graph: str, inputs: Arrays) -> Arrays:
    """The same from diffusers' own modules, rebuilt from the bundle's weights."""
    if bundle.digest not in COMPONENTS:
        COMPONENTS[bundle.digest] = load_torch_components(bundle)
    parts = COMPONENTS[bundle.digest]
    given = {key: torch.from_numpy(value) for key, value in inputs.items()}
    vae, factor = parts["vae"], parts["vae"].config.scaling_factor
    match graph:
        case "style_encoder":
            out = parts["style_encoder"](given["style_image"])
            both = out if isinstance(out, tuple) else (out,)
            return {k: v.numpy() for k, v in zip(bundle.graph_outputs(graph), both, strict=True)}
        case "vae_encoder":
            encoded = vae.encode(given["image"])
            z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
            return {"latents": (z * factor).numpy()}
        case "vae_decoder":
            return {"image": vae.decode(given["latents"] / factor).sample.numpy()}
        case _:
            return {"noise_pred": _torch_unet(parts["unet"], given).numpy()}


def _torch_unet(unet: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    strengths = set(given["style_strength"].tolist())
    assert len(strengths) == 1, "diffusers has one scale for a whole batch"
    for processor in unet.attn_processors.values():
        if getattr(processor, "scale", [0.0]) != [0.0]:
            processor.scale = list(strengths)
    added = {"text_embeds": given["text_embeds"], "time_ids": given["time_ids"]}
    added["image_embeds"] = [given["style_tokens"]]
    return unet(
        given["sample"], given["timestep"], given["encoder_hidden_states"], added_cond_kwargs=added
    ).sample


@pytest.mark.parametrize("graph", ["style_encoder", "vae_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_engine_and_torch_agree_on_the_weights_in_the_bundle(
    bundle: Bundle, graph: str, backend: str
) -> None:
    engine = open_(bundle, graph, backend, size=(32, 64))
    inputs = draw(engine)
    for name, expected in torch_answer(bundle, graph, inputs).items():
        assert psnr_db(engine(**inputs)[name], expected) > 90, name


def test_every_unet_input_changes_the_output(bundle: Bundle) -> None:
    engine = open_(bundle, "unet")
    inputs = draw(engine)
    before = engine(**inputs)["noise_pred"].copy()
    for name in inputs:
        changed = {**inputs, name: inputs[name] + np.float32(0.3 if name != "time_ids" else 64)}
        assert np.abs(engine(**changed)["noise_pred"] - before).max() > 1e-4, name


def test_at_strength_zero_the_style_is_without_effect(bundle: Bundle) -> None:
    engine = open_(bundle, "unet")
    inputs = draw(engine) | {"style_strength": np.zeros(1, np.float32)}
    before = engine(**inputs)["noise_pred"].copy()
    inputs["style_tokens"] = inputs["style_tokens"] + 1
    np.testing.assert_array_equal(engine(**inputs)["noise_pred"], before)


def test_a_batch_gives_what_its_members_give(bundle: Bundle) -> None:
    """Each member has its own timestep and strength, as a stream batch needs."""
    many, one = open_(bundle, "unet", batch=3), open_(bundle, "unet")
    inputs = draw(many)
    together = many(**inputs)["noise_pred"].copy()
    for i in range(3):
        alone = one(**{key: value[i : i + 1] for key, value in inputs.items()})["noise_pred"]
        np.testing.assert_allclose(together[i : i + 1], alone, atol=2e-5)


def test_clip_bundle_equals_the_diffusers_pipeline(clip_bundle: Bundle, one_level: tuple[Path, Path]) -> None:
    """diffusers loads everything its own way: IP-Adapter with its loader, the LoRA unfused, text live."""
    source, lora = one_level
    pipe = StableDiffusionXLPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    pipe.set_adapters(pipe.get_active_adapters(), [0.7])
    pipe.load_ip_adapter(
        str(source), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale({"up": {"block_0": [0.0, 1.0]}})
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt("in ink", do_classifier_free_guidance=False)
        style_image = torch.rand(1, 3, 32, 32) * 2 - 1
        mean, std = (
            torch.tensor([0.48145466, 0.4578275, 0.40821073]),
            torch.tensor([0.26862954, 0.26130258, 0.27577711]),
        )
        pixels = ((style_image + 1) / 2 - mean[:, None, None]) / std[:, None, None]
        hidden = pipe.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
        sample, time_ids = torch.randn(1, 4, 16, 16), torch.tensor([[64.0, 64, 0, 0, 64, 64]])
        added = {"text_embeds": pooled, "time_ids": time_ids, "image_embeds": [hidden[:, None]]}
        expected = pipe.unet(sample, torch.tensor([499.0]), text, added_cond_kwargs=added).sample
    baked = clip_bundle.conditioning()
    np.testing.assert_allclose(baked["encoder_hidden_states"], text, atol=1e-5)
    np.testing.assert_allclose(baked["text_embeds"], pooled, atol=1e-5)
    tokens = open_(clip_bundle, "style_encoder")(style_image=style_image.numpy())["style_tokens"]
    found = open_(clip_bundle, "unet")(
        sample=sample.numpy(),
        timestep=np.float32([499]),
        **{name: baked[name] for name in ("encoder_hidden_states", "text_embeds")},
        time_ids=time_ids.numpy(),
        style_tokens=tokens,
        style_strength=np.ones(1, np.float32),
    )["noise_pred"]
    assert psnr_db(found, expected.numpy()) > 55  # fp16 weights


def test_the_lora_notes_decide_the_schedule(clip_bundle: Bundle) -> None:
    assert (clip_bundle.eta, clip_bundle.tau) == (0.5, 499)
    assert (clip_bundle.steps_allowed, clip_bundle.default_steps) == ([2, 4], 4)


def test_trained_betas_and_prediction_type_reach_the_manifest(own_bundle: Bundle) -> None:
    schedule = NoiseSchedule.scaled_linear().shifted(4)
    assert own_bundle.prediction_type == "v_prediction"
    found = own_bundle.coefficients(4)
    for mine, theirs in zip(found, schedule.coefficients(trajectory_timesteps(0.75, 4)), strict=True):
        assert (mine.timestep, mine.target) == (theirs.timestep, theirs.target)
        np.testing.assert_allclose(mine.affine(), theirs.affine(), rtol=1e-9)
    assert (own_bundle.eta, own_bundle.tau, own_bundle.default_steps) == (0.75, 739, 4)


def test_the_manifest_says_what_is_inside(clip_bundle: Bundle, own_bundle: Bundle) -> None:
    clip, own = clip_bundle.manifest, own_bundle.manifest
    assert (clip_bundle.vae_scale, clip_bundle.latent_channels, clip_bundle.size_multiple) == (4, 4, 4)
    assert (own_bundle.vae_scale, own_bundle.latent_channels, own_bundle.size_multiple) == (8, 8, 8)
    assert clip_bundle.size_default == (64, 96)
    assert clip["style"]["layout"]["name"] == "published"
    assert clip["style"]["layout"]["layers"] == ["up_blocks.0.attentions.1.transformer_blocks.0.attn2"]
    assert own["style"]["layout"]["name"] == "all"
    assert (clip["text"]["mode"], own["text"]["mode"]) == ("encoder", "none")
    assert (clip["style"]["gives_text_embeds"], own["style"]["gives_text_embeds"]) == (False, True)
    assert [source["role"] for source in clip["sources"]] == ["pipeline", "lora", "ip_adapter"]
    assert clip["sources"][0]["licence"] == "openrail++"
    assert clip["sources"][1]["scale"] == 0.7
    assert all(len(source["sha256"]) == 64 for source in clip["sources"])
    assert {"torch", "diffusers", "onnx"} <= clip["created_with"].keys()
    assert clip["parity"].keys() == clip["graphs"].keys() == clip["precision"].keys()


def test_weights_are_stored_once_under_torch_names(bundle: Bundle) -> None:
    half = bundle.manifest["precision"]["unet"]["weights"] == "fp16"
    for graph in bundle.graph_names:
        state = load_file(bundle.weights_path(graph))
        made = [key for key in state if key.startswith("constant.")]
        assert made == (["constant.mask"] if graph.startswith("text_encoder") else []), graph
        wide = {value.dtype for key, value in state.items() if value.ndim > 1 and key not in made}
        assert wide == {torch.float16 if half else torch.float32}, graph
        assert bundle.graph_path(graph).stat().st_size < 400_000, graph
    parameters = sum(value.numel() for value in load_torch_components(bundle)["unet"].state_dict().values())
    assert sum(value.numel() for value in load_file(bundle.weights_path("unet")).values()) <= parameters


def test_one_flipped_weight_is_refused(own_bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    from std_rt.core.errors import BundleError

    folder = Path(shutil.copytree(own_bundle.path, tmp_path / "copy"))
    verify_bundle(load_bundle(folder))
    data = bytearray((folder / "unet.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "unet.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match=r"unet\.safetensors has changed since export"):
        load_bundle(folder)


def test_the_reference_inside_is_reproduced(bundle: Bundle) -> None:
    """What a self-check does on a user's machine."""
    reference = bundle.reference()
    for graph in bundle.graph_names:
        given = {k.split("/")[2]: v for k, v in reference.items() if k.startswith(f"{graph}/in/")}
        expected = {k.split("/")[2]: v for k, v in reference.items() if k.startswith(f"{graph}/out/")}
        spec = GraphSpec(graph, bundle.graph_path(graph), {k: v.shape for k, v in given.items()}, "")
        results = open_engine("openvino", spec, "fp32")(**given)
        for name, value in expected.items():
            assert psnr_db(results[name], value) > 50, (graph, name)


def test_the_stroke_size_works_with_every_style_encoder(bundle: Bundle) -> None:
    """CLIP or ours: tokens move steadily from the whole picture to the mean of its quarters."""
    side = bundle.style_px
    picture = np.random.default_rng(0).integers(0, 256, (2 * side, 2 * side, 3), np.uint8)
    picture[:side] //= 3
    parts = [picture[y : y + side, x : x + side] for y in (0, side) for x in (0, side)]
    with Stylizer.load(bundle, backend="openvino", precision="fp32") as stylizer:
        one, *others = (stylizer.encode_style(picture, size).tokens for size in (1.0, 1.2, 1.5, 1.9, 2.0))
        quarters = np.mean([stylizer.encode_style(part).tokens for part in parts], axis=0)
    np.testing.assert_allclose(others[-1], quarters, atol=1e-5)
    moved = [np.abs(tokens - one).mean() for tokens in others]
    assert moved == sorted(moved)
    assert moved[0] > 0


def test_a_prompt_at_run_time_paints_what_the_baked_one_paints(clip_bundle: Bundle) -> None:
    pytest.importorskip("tokenizers")
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    with Stylizer.load(clip_bundle, backend="openvino", precision="fp32") as stylizer:
        stylizer.set_style(frame)
        baked = stylizer.stylize(frame)
        stylizer.set_prompt("in ink")
        assert np.abs(stylizer.stylize(frame).astype(int) - baked).max() <= 1  # weights are stored in fp16
        stylizer.set_prompt("a dull, grey (photograph:1.4)")
        other = stylizer.stylize(frame)
        assert np.abs(other.astype(int) - baked).max() > 1
        stylizer.set_prompt("ink " * 30)  # more than one chunk: engines of another text length
        assert stylizer.stylize(frame).shape == frame.shape
        stylizer.set_prompt("in ink")
        assert np.abs(stylizer.stylize(frame).astype(int) - baked).max() <= 1
