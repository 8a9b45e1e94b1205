"""What export refuses, before it spends minutes on tracing: one line, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from diffusers import UNet2DConditionModel
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from support.pipelines import write_lora, write_tiny_vae

from std_rt.core.bundle import Bundle
from std_rt.core.errors import BundleError, ExportError
from std_rt.export.build import export_pipeline
from std_rt.export.graphs import Example
from std_rt.export.parity import check_graph, lint

Break = Callable[[Path], Any]


def edit(path: Path, **changes: Any) -> None:
    """Change a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def drop_layer(folder: Path) -> None:
    """An IP-Adapter with one layer less."""
    state = load_file(folder / "ip_adapter.safetensors")
    save_file({k: v for k, v in state.items() if ".1.to_" not in k}, folder / "ip_adapter.safetensors")


def strip_projection(folder: Path) -> None:
    """An IP-Adapter without its resampler."""
    state = load_file(folder / "ip_adapter.safetensors")
    save_file({k: v for k, v in state.items() if "image_proj" not in k}, folder / "ip_adapter.safetensors")


CASES: dict[str, tuple[Break, dict[str, Any], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), {}, "has no model_index.json"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), {}, "no unet in"),
    "no weights": (
        lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
        {},
        r"no \.safetensors weights",
    ),
    "config is no json": (lambda f: (f / "vae" / "config.json").write_text("{"), {}, "cannot be read"),
    "an EDM schedule": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", _class_name="EDMEulerScheduler"),
        {},
        "names EDMEulerScheduler: a CosXL",
    ),
    "unknown betas": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", beta_schedule="cosine"),
        {},
        "cannot be used: beta_schedule 'cosine'",
    ),
    "unknown vae": (lambda f: edit(f / "vae" / "config.json", _class_name="VQModel"), {}, "class VQModel"),
    "not text_time": (
        lambda f: edit(f / "unet" / "config.json", addition_embed_type=None),
        {},
        "addition_embed_type None",
    ),
    "other attention": (
        lambda f: edit(f / "unet" / "config.json", only_cross_attention=[False, True]),
        {},
        "the UNet has only_cross_attention",
    ),
    "no adapter": (lambda f: (f / "ip_adapter.safetensors").unlink(), {}, "give --ip-adapter"),
    "adapter of another model": (drop_layer, {}, "made for another model"),
    "adapter without projection": (strip_projection, {}, "has no image_proj weights"),
    "no image encoder": (lambda f: shutil.rmtree(f / "image_encoder"), {}, "no image_encoder"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_2"), {}, "no tokenizer_2"),
    "one text encoder": (lambda f: shutil.rmtree(f / "text_encoder_2"), {}, "no text_encoder_2"),
    "odd size": (lambda f: None, {"size": (64, 68)}, "68x64 does not fit: sides must be multiples of 8"),
    "size too small": (lambda f: None, {"size": (32, 64)}, r"in 64\.\.2048"),
    "unknown precision": (lambda f: None, {"weights": "int4"}, "must be one of fp16, fp32"),
    "unknown layers": (lambda f: None, {"style_layers": "middle"}, "fits no layer"),
    "missing lora": (lambda f: None, {"lora": [(Path("none.safetensors"), 1.0)]}, "does not exist"),
    "too many steps": (lambda f: None, {"steps": (40,)}, "do not fit together: steps must be in 1..37"),
    "eta out of range": (lambda f: None, {"eta": 1.5}, "eta must be in"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_nothing_is_written(case: str, clip_source: Path, tmp_path: Path) -> None:
    breaks, options, message = CASES[case]
    source = Path(shutil.copytree(clip_source, tmp_path / "source"))
    breaks(source)
    with pytest.raises(ExportError, match=message) as caught:
        export_pipeline(source, tmp_path / "out" / "bundle", **{"size": (64, 64), **options})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


def test_a_vae_with_other_latents_is_refused(own_source: Path, tmp_path: Path) -> None:
    vae = write_tiny_vae(tmp_path / "vae")
    with pytest.raises(ExportError, match="4 latent channels, the UNet 8"):
        export_pipeline(own_source, tmp_path / "bundle", vae=vae)


def test_a_prompt_needs_text_encoders(own_source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="takes no --prompt"):
        export_pipeline(own_source, tmp_path / "bundle", prompt="in ink")


def test_a_lora_of_another_model_is_refused(clip_source: Path, own_source: Path, tmp_path: Path) -> None:
    """Somebody else's, without notes: found when it is put on the UNet."""
    other = write_lora(
        tmp_path / "other.safetensors", UNet2DConditionModel.from_pretrained(own_source / "unet")
    )
    with pytest.raises(ExportError, match=r"LoRA .*other\.safetensors (does not fit|has weights)"):
        export_pipeline(clip_source, tmp_path / "bundle", lora=[(other, 1.0)], eta=0.75, size=(64, 64))


def test_a_file_that_is_no_lora_is_refused(clip_source: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ExportError, match="cannot be read"):
        export_pipeline(clip_source, tmp_path / "bundle", lora=[(tmp_path / "x.safetensors", 1.0)])


def test_an_existing_bundle_is_refused_before_any_work(own_bundle: Bundle, own_source: Path) -> None:
    with pytest.raises(BundleError, match="add --overwrite"):
        export_pipeline(own_source, own_bundle.path, progress=lambda note: pytest.fail("it began to work"))


def test_the_parity_gate_refuses_a_wrong_answer(own_bundle: Bundle) -> None:
    reference = own_bundle.reference()
    parts = {
        kind: {k.split("/")[2]: v for k, v in reference.items() if k.startswith(f"vae_encoder/{kind}/")}
        for kind in ("in", "out")
    }
    path = own_bundle.graph_path("vae_encoder")
    passed = check_graph("vae_encoder", path, [Example(parts["in"], parts["out"])], "fp32")
    assert passed["psnr_db"] > 100
    wrong = {"latents": parts["out"]["latents"] + np.float32(0.05)}
    with pytest.raises(ExportError, match=r"differs from torch: .* dB .* nothing was written"):
        check_graph("vae_encoder", path, [Example(parts["in"], wrong)], "fp32")


def test_the_gate_looks_at_every_size(own_bundle: Bundle) -> None:
    """A graph with a size baked in fails at the second one."""
    reference = own_bundle.reference()
    image = reference["vae_encoder/in/image"]
    good = Example({"image": image}, {"latents": reference["vae_encoder/out/latents"]})
    turned = Example({"image": image.transpose(0, 1, 3, 2).copy()}, {"latents": good.outputs["latents"]})
    with pytest.raises((ExportError, ValueError)):
        check_graph("vae_encoder", own_bundle.graph_path("vae_encoder"), [good, turned], "fp32")


def test_mixed_float_types_are_found(tmp_path: Path) -> None:
    """The trap of SDXL in fp16: text_embeds in half next to time embeddings in single precision."""
    half = numpy_helper.from_array(np.ones((1, 2), np.float16), "half")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])]
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    node = helper.make_node("Concat", ["x", "half"], ["y"], axis=1, name="cat")
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, output, [half]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "g.onnx")
    with pytest.raises(ExportError, match=r"g\.onnx"):
        lint(tmp_path / "g.onnx")


def test_guidance_that_does_not_fit_is_refused_before_any_work(own_source: Path, tmp_path: Path) -> None:
    for choices, message in (
        ({"guidance_mode": "full"}, "--guidance-mode full needs a scale"),
        ({"guidance": 3.0, "guidance_mode": "none"}, "exclude each other"),
        ({"guidance": 0.5}, "--guidance must be in 1..50"),
        ({"precision": "fp4"}, "--precision must be one of auto, fp32, fp16, bf16, int8, fp8"),
        ({"prompts": "encoder"}, "has no text encoders"),
    ):
        with pytest.raises(ExportError, match=message):
            export_pipeline(own_source, tmp_path / "b", **choices)
    assert not list(tmp_path.iterdir())


def test_memory_that_ends_is_one_line(
    own_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr("std_rt.export.build.Build._vae", full)
    monkeypatch.setattr("std_rt.export.build.Build._style", lambda self: (None, {}))
    with pytest.raises(ExportError, match="memory is too small"):
        export_pipeline(own_source, tmp_path / "b")
    assert not list(tmp_path.iterdir())
