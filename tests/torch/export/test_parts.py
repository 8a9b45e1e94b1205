"""Parts of export on their own: LoRA fusing, style layers, autoencoders, weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file
from support.pipelines import write_lora, write_plain_ip_adapter, write_text_lora, write_tiny_vae
from torch import nn
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from std_rt.core.errors import ExportError
from std_rt.export.export_options import ExportOptions
from std_rt.export.graphs import Example, Port, Trace, trace
from std_rt.export.lora_fusion import fuse_lora
from std_rt.export.modules import VaeDecoder, VaeEncoder
from std_rt.export.parity import check_graph
from std_rt.export.source_pipeline import read_source
from std_rt.export.weights import externalize
from std_rt.models.clip_style import CLIP_MEAN, CLIP_STD
from std_rt.models.ip_adapter import choose_layers, cross_layers


@pytest.fixture
def unet(clip_source: Path) -> UNet2DConditionModel:
    """The UNet of `clip_source`, to be changed at will."""
    return UNet2DConditionModel.from_pretrained(clip_source / "unet").eval()


def run(unet: nn.Module) -> torch.Tensor:
    """One evaluation at fixed inputs."""
    rng = torch.Generator().manual_seed(3)
    added = {"text_embeds": torch.randn(1, 20, generator=rng), "time_ids": torch.ones(1, 6)}
    x, text = torch.randn(1, 4, 8, 8, generator=rng), torch.randn(1, 3, 40, generator=rng)
    with torch.no_grad():
        return unet(x, 500, text, added_cond_kwargs=added).sample


def test_fused_equals_unfused(unet: UNet2DConditionModel, lora: Path) -> None:
    plain = run(unet)
    config = {"unet.r": 4, "unet.lora_alpha": 8.0, "unet.target_modules": ["to_q", "to_v"]}
    unet.load_lora_adapter(load_file(lora), prefix="unet", metadata=config)
    unet.set_adapters(["default_0"], [0.7])
    unfused = run(unet)
    fused = UNet2DConditionModel.from_pretrained(unet.config._name_or_path)
    fuse_lora({"unet": fused}, lora, 0.7)
    torch.testing.assert_close(run(fused), unfused, atol=1e-5, rtol=1e-4)
    assert (unfused - plain).abs().max() > 0.01
    assert not [name for name, _ in fused.named_modules() if "lora" in name]


@pytest.mark.parametrize("alpha", [2.0, 8.0])
def test_alpha_and_scale_are_honoured(unet: UNet2DConditionModel, tmp_path: Path, alpha: float) -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
    before = unet.get_submodule(name).weight.clone()
    path = write_lora(tmp_path / "l.safetensors", unet, rank=4, alpha=alpha)
    state = load_file(path)
    delta = state[f"unet.{name}.lora_B.weight"] @ state[f"unet.{name}.lora_A.weight"]
    fuse_lora({"unet": unet}, path, 0.5)
    torch.testing.assert_close(unet.get_submodule(name).weight, before + 0.5 * alpha / 4 * delta)


def test_two_loras_add_up(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    expected = unet.get_submodule(name).weight.clone()
    for seed in (1, 2):
        path = write_lora(tmp_path / f"{seed}.safetensors", unet, seed=seed, rank=4, alpha=4.0)
        state = load_file(path)
        expected += state[f"unet.{name}.lora_B.weight"] @ state[f"unet.{name}.lora_A.weight"]
    for seed in (1, 2):
        fuse_lora({"unet": unet}, tmp_path / f"{seed}.safetensors", 1.0)
    torch.testing.assert_close(unet.get_submodule(name).weight, expected, atol=1e-5, rtol=1e-5)


def test_a_lora_reaches_the_text_encoder(
    unet: UNet2DConditionModel, clip_source: Path, tmp_path: Path
) -> None:
    encoder = CLIPTextModel.from_pretrained(clip_source / "text_encoder")
    name, layer = next((name, m) for name, m in encoder.named_modules() if name.endswith("q_proj"))
    before = layer.weight.clone()
    path = write_text_lora(tmp_path / "t.safetensors", encoder)
    state = load_file(path)
    delta = state[f"text_encoder.{name}.lora_B.weight"] @ state[f"text_encoder.{name}.lora_A.weight"]
    fuse_lora({"unet": unet, "text_encoder": encoder}, path, 0.5)
    torch.testing.assert_close(encoder.get_submodule(name).weight, before + 0.5 * delta)
    with pytest.raises(ExportError, match="changes text_encoder, which this pipeline does not have"):
        fuse_lora({"unet": unet}, path, 0.5)


def test_the_plain_ip_adapter_reads_the_pooled_embedding(clip_source: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(clip_source, tmp_path / "source"))
    adapter = write_plain_ip_adapter(
        tmp_path / "plain.safetensors", UNet2DConditionModel.from_pretrained(source / "unet")
    )
    style = read_source(ExportOptions(source, tmp_path / "out", ip_adapter=adapter)).load_style()[0]
    assert (style.tokens, style.dim, style.text_dim) == (4, 40, None)
    encoder = CLIPVisionModelWithProjection.from_pretrained(source / "image_encoder")
    state, image = load_file(adapter), torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        pooled = encoder(((image + 1) / 2 - mean) / std).image_embeds
        flat = pooled @ state["image_proj.proj.weight"].T + state["image_proj.proj.bias"]
        norm = (state["image_proj.norm.weight"], state["image_proj.norm.bias"])
        expected = nn.functional.layer_norm(flat.view(2, 4, 40), (40,), *norm)
        torch.testing.assert_close(style.module(image), expected, atol=1e-5, rtol=1e-4)


def test_style_layers_are_chosen_by_name(unet: UNet2DConditionModel) -> None:
    every = cross_layers(unet)
    published = [name for name in every if name.startswith("up_blocks.0.attentions.1.")]
    assert len(published) == 1
    assert choose_layers(unet, "all", own_encoder=False) == ("all", every)
    assert choose_layers(unet, "auto", own_encoder=False) == ("published", published)
    assert choose_layers(unet, "auto", own_encoder=True) == ("all", every)
    kept = choose_layers(unet, "mid_block, up_blocks.0.attentions.1", own_encoder=False)[1]
    assert [name.split(".")[0] for name in kept] == ["up_blocks", "mid_block"]


def test_published_needs_its_block(own_source: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(own_source / "unet")
    narrow = {name: processor for name, processor in unet.attn_processors.items() if "up_blocks" not in name}

    class Stub:
        attn_processors = narrow

    with pytest.raises(ExportError, match="use --style-layers all"):
        choose_layers(Stub(), "published", own_encoder=False)


@pytest.mark.parametrize("weights", [pytest.param("fp16", marks=pytest.mark.long), "fp32"])
def test_autoencoder_tiny_is_exported(tmp_path: Path, weights: str) -> None:
    """Sizes stay open, weights keep torch's names; the gate passes at two sizes."""
    vae = AutoencoderTiny.from_pretrained(write_tiny_vae(tmp_path / "vae")).eval()
    z = Port("latents", ("batch", 4, "latent_height", "latent_width"), "")
    decoder = Trace(VaeDecoder(vae), (z,), (Port("image", ("batch", 3, "height", "width"), ""),))
    state = {key: value for key, value in vae.state_dict().items() if key.startswith("decoder.")}
    path = tmp_path / "vae_decoder.onnx"
    externalize(trace(decoder), state, path, tmp_path / "vae_decoder.safetensors", weights)
    examples = []
    for size in ((8, 8), (5, 9)):
        latents = torch.randn(1, 4, *size)
        with torch.no_grad():
            image = vae.decode(latents).sample
        examples.append(Example({"latents": latents.numpy()}, {"image": image.numpy()}))
    assert check_graph("vae_decoder", path, examples, weights)["psnr_db"] > (100 if weights == "fp32" else 45)
    assert load_file(tmp_path / "vae_decoder.safetensors").keys() == state.keys()


def test_the_encoder_scales_and_shifts(tmp_path: Path) -> None:
    vae = AutoencoderTiny.from_pretrained(write_tiny_vae(tmp_path / "vae")).eval()
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        raw = vae.encode(image).latents
        z = VaeEncoder(vae)(image)
        torch.testing.assert_close(z, (raw - 0.25) * 0.5)
        torch.testing.assert_close(VaeDecoder(vae)(z), vae.decode(raw).sample)


class Layers(nn.Module):
    """One weight used as it is, one transposed, one in halves, one too large for fp16."""

    def __init__(self, largest: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.linear = nn.Linear(8, 12)
        self.wide = nn.Linear(12, 16)
        with torch.no_grad():
            self.linear.weight[0, 0] = largest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 2, H, W]`` -> ``[B, H, W, 8]``."""
        y = self.linear(self.conv(x).permute(0, 2, 3, 1))
        weight, bias = self.wide.weight, self.wide.bias
        return nn.functional.linear(y, weight[:8], bias[:8]) * nn.functional.linear(y, weight[8:], bias[8:])


class Wrapped(nn.Module):
    """As export wraps networks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Passed on."""
        return self.module(x)


def layers_plan(module: nn.Module) -> Trace:
    """Traced with open height and width."""
    x = Port("x", ("batch", 2, "height", "width"), "")
    return Trace(Wrapped(module), (x,), (Port("y", ("batch", "height", "width", 8), ""),))


@pytest.mark.parametrize("weights", ["fp16", pytest.param("fp32", marks=pytest.mark.long)])
def test_transposed_and_halved_weights_point_into_torchs_own_layout(tmp_path: Path, weights: str) -> None:
    torch.manual_seed(0)
    module = Layers().eval()
    path = tmp_path / "g.onnx"
    externalize(trace(layers_plan(module)), module.state_dict(), path, tmp_path / "g.safetensors", weights)
    stored = load_file(tmp_path / "g.safetensors")
    assert stored.keys() == module.state_dict().keys()
    for key, value in module.state_dict().items():
        torch.testing.assert_close(stored[key].float(), value, atol=1e-3, rtol=1e-3)
    x = torch.randn(1, 2, 5, 6)
    with torch.no_grad():
        y = module.load_state_dict({k: v.float() for k, v in stored.items()}) and module(x)
    example = Example({"x": x.numpy()}, {"y": np.asarray(y)})
    assert check_graph("g", path, [example], "fp32")["psnr_db"] > 100


def test_a_weight_beyond_fp16_is_refused(tmp_path: Path) -> None:
    module = Layers(largest=1e6).eval()
    with pytest.raises(
        ExportError, match=r"linear\.weight is 1000000, which exceeds the fp16 range; use --weights fp32"
    ):
        externalize(
            trace(layers_plan(module)),
            module.state_dict(),
            tmp_path / "g.onnx",
            tmp_path / "g.safetensors",
            "fp16",
        )
