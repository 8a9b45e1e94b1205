"""LoRAs in every published key format: fused equals unfused, by the formula and by diffusers' own loader."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from std_rt.core.errors import ExportError
from std_rt.export.lora_fusion import fuse_lora, original_names
from std_rt.models.components import quiet

Parts = dict[str, nn.Module]


@dataclass(frozen=True)
class Layer:
    """One LoRA layer of one part."""

    role: str
    name: str
    down: Tensor
    up: Tensor
    alpha: float


@pytest.fixture(scope="module")
def originals(clip_source: Path) -> Parts:
    """The networks of `clip_source`; tests change copies of them."""
    return {
        "unet": UNet2DConditionModel.from_pretrained(clip_source / "unet").eval(),
        "text_encoder": CLIPTextModel.from_pretrained(clip_source / "text_encoder").eval(),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(clip_source / "text_encoder_2").eval(),
    }


@pytest.fixture
def parts(originals: Parts) -> Parts:
    return copy.deepcopy(originals)


def make_layers(parts: Parts, *, alpha: float = 3.0, convs: bool = True, seed: int = 5) -> list[Layer]:
    """Attention, feed-forward and convolutions of the UNet, attention and MLP of both text encoders."""
    rng = torch.Generator().manual_seed(seed)
    unet = (
        ".to_q",
        ".to_out.0",
        "ff.net.0.proj",
        "proj_in",
        *((".conv1", "conv_shortcut", ".0.conv") if convs else ()),
    )
    layers = []
    for role, ends in (
        ("unet", unet),
        ("text_encoder", ("q_proj", "out_proj", "fc1")),
        ("text_encoder_2", ("v_proj", "out_proj", "fc2")),
    ):
        for name, module in parts[role].named_modules():
            if name.endswith(ends) and isinstance(module, nn.Linear | nn.Conv2d):
                out, inner, *kernel = module.weight.shape
                down = torch.randn(4, inner, *kernel, generator=rng) * 0.2
                up = torch.randn(out, 4, *(1 for _ in kernel), generator=rng) * 0.2
                layers.append(Layer(role, name, down, up, alpha))
    return layers


def delta(layer: Layer, like: Tensor) -> Tensor:
    """``alpha / rank`` times the product, in the shape of the weight."""
    product = layer.up.flatten(1) @ layer.down.flatten(1)
    return (layer.alpha / layer.down.shape[0] * product).view_as(like)


def _spelled(layer: Layer) -> str:
    """Text encoders' names with the prefix that published files have."""
    return layer.name if layer.role == "unet" else f"text_model.{layer.name.removeprefix('text_model.')}"


def peft(layers: list[Layer], parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What diffusers saves today: ranks and alphas in the file's notes."""
    state = {}
    config: dict[str, object] = {}
    for layer in layers:
        state[f"{layer.role}.{layer.name}.lora_A.weight"] = layer.down
        state[f"{layer.role}.{layer.name}.lora_B.weight"] = layer.up
        targets = sorted({other.name for other in layers if other.role == layer.role})
        config |= {f"{layer.role}.r": 4, f"{layer.role}.lora_alpha": layer.alpha}
        config[f"{layer.role}.target_modules"] = targets
    return state, {"lora_adapter_metadata": json.dumps(config)}


def kohya(layers: list[Layer], parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Flat names, an alpha for every layer."""
    start = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    return _kohya({start[layer.role] + _spelled(layer).replace(".", "_"): layer for layer in layers}), {}


def kohya_original(layers: list[Layer], parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """kohya for SDXL: the UNet's names are those of the original code."""
    names = original_names(parts["unet"])
    flat = {
        f"lora_unet_{names[layer.name].replace('.', '_')}": layer for layer in layers if layer.role == "unet"
    }
    others = [layer for layer in layers if layer.role != "unet"]
    return _kohya(flat) | kohya(others, parts)[0], {}


def _kohya(flat: dict[str, Layer]) -> dict[str, Tensor]:
    state = {}
    for name, layer in flat.items():
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = layer.down, layer.up
        state[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return state


def older(layers: list[Layer], parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """diffusers before PEFT: attention's LoRA sits in its processor, alpha is the rank."""
    state = {}
    for layer in layers:
        name = f"{layer.role}.{_spelled(layer)}"
        middle = f"{name}.lora"
        if layer.role == "unet" and ".attn" in name:
            where, _, kind = name.removesuffix(".0").rpartition(".")
            middle = f"{where}.processor.{kind}_lora"
        elif layer.role != "unet":
            middle = f"{name}.lora_linear_layer"
        state[f"{middle}.down.weight"], state[f"{middle}.up.weight"] = layer.down, layer.up
    return state, {}


def wrapped(layers: list[Layer], parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As PEFT saves a UNet that it wrapped."""
    state = {}
    for layer in layers:
        state[f"base_model.model.{layer.name}.lora_A.weight"] = layer.down
        state[f"base_model.model.{layer.name}.lora_B.weight"] = layer.up
    return state, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": layers[0].alpha})}


def bare(layers: list[Layer], parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The UNet's names without any prefix."""
    state, notes = wrapped(layers, parts)
    return {key.removeprefix("base_model.model."): value for key, value in state.items()}, notes


Writer = Callable[[list[Layer], Parts], tuple[dict[str, Tensor], dict[str, str]]]


def write(path: Path, writer: Writer, layers: list[Layer], parts: Parts) -> Path:
    state, notes = writer(layers, parts)
    save_file({key: value.contiguous() for key, value in state.items()}, path, {"format": "pt", **notes})
    return path


def outputs(parts: Parts) -> dict[str, Tensor]:
    """One evaluation of each network at fixed inputs."""
    rng = torch.Generator().manual_seed(3)
    added = {"text_embeds": torch.randn(1, 20, generator=rng), "time_ids": torch.ones(1, 6)}
    x, text = torch.randn(1, 4, 8, 8, generator=rng), torch.randn(1, 3, 40, generator=rng)
    ids = torch.tensor([[54, 3, 17, 55]])
    with torch.no_grad():
        return {
            "unet": parts["unet"](x, 500, text, added_cond_kwargs=added).sample,
            "text_encoder": parts["text_encoder"](ids).last_hidden_state,
            "text_encoder_2": parts["text_encoder_2"](ids).text_embeds,
        }


@pytest.mark.parametrize("writer", [peft, kohya, kohya_original, older, wrapped, bare])
def test_every_weight_is_the_formulas(writer: Writer, parts: Parts, originals: Parts, tmp_path: Path) -> None:
    scale = -0.6
    layers = make_layers(parts, alpha=4.0 if writer is older else 3.0)
    if writer in (wrapped, bare):
        layers = [layer for layer in layers if layer.role == "unet"]
    fuse_lora(parts, write(tmp_path / "l.safetensors", writer, layers, parts), scale)
    changes = {(layer.role, f"{layer.name}.weight"): layer for layer in layers}
    assert len(changes) == len(layers) > 20
    for role, module in parts.items():
        for name, before in originals[role].state_dict().items():
            wanted = before
            if layer := changes.get((role, name)):
                wanted = before + scale * delta(layer, before)
            torch.testing.assert_close(module.state_dict()[name], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "writer", [peft, kohya, *(pytest.param(w, marks=pytest.mark.long) for w in (kohya_original, older))]
)
def test_fused_equals_diffusers_unfused(
    writer: Writer, parts: Parts, originals: Parts, clip_source: Path, tmp_path: Path
) -> None:
    """Two paths, one answer: their loader with two adapters side by side, and ours."""
    layers = make_layers(parts, alpha=4.0 if writer is older else 3.0, convs=writer is not older)
    path = write(tmp_path / "l.safetensors", writer, layers, parts)
    other = write(tmp_path / "o.safetensors", kohya, make_layers(parts, alpha=1.0, seed=6), parts)
    theirs = copy.deepcopy(originals)
    pipe = StableDiffusionXLPipeline(
        AutoencoderKL.from_pretrained(clip_source / "vae"),
        theirs["text_encoder"],
        theirs["text_encoder_2"],
        CLIPTokenizer.from_pretrained(clip_source / "tokenizer"),
        CLIPTokenizer.from_pretrained(clip_source / "tokenizer_2"),
        theirs["unet"],
        EulerDiscreteScheduler(),
    )
    with quiet("diffusers", "peft"):  # PEFT warns of the second adapter
        pipe.load_lora_weights(path, adapter_name="one")
        pipe.load_lora_weights(other, adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.7, -0.4])
    fuse_lora(parts, path, 0.7)
    fuse_lora(parts, other, -0.4)
    plain, unfused, fused = outputs(originals), outputs(theirs), outputs(parts)
    for role in parts:
        assert (unfused[role] - plain[role]).abs().max() > 0.01, role
        torch.testing.assert_close(fused[role], unfused[role], atol=2e-5, rtol=1e-4)


def test_every_layer_has_its_own_alpha(parts: Parts, originals: Parts, tmp_path: Path) -> None:
    first, second = make_layers(parts)[:2]
    layers = [first, Layer(second.role, second.name, second.down, second.up, 16.0)]
    fuse_lora(parts, write(tmp_path / "l.safetensors", kohya, layers, parts), 1.0)
    for layer in layers:
        before = originals[layer.role].get_submodule(layer.name).weight
        found = parts[layer.role].get_submodule(layer.name).weight
        torch.testing.assert_close(found, before + delta(layer, before))


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({}, 1.0),
    ],
)
def test_pefts_own_file_is_read_with_the_config_beside_it(
    config: dict[str, object], factor: float, parts: Parts, originals: Parts, tmp_path: Path
) -> None:
    layers = [layer for layer in make_layers(parts) if layer.name.endswith("attn1.to_q")]
    state, _ = wrapped(layers, parts)
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    fuse_lora(parts, tmp_path / "adapter_model.safetensors", 1.0)
    name = layers[0].name
    before = originals["unet"].get_submodule(name).weight
    expected = before + factor * layers[0].up @ layers[0].down
    torch.testing.assert_close(parts["unet"].get_submodule(name).weight, expected)


def test_a_lora_in_halves_is_added_in_full_precision(parts: Parts, originals: Parts, tmp_path: Path) -> None:
    layer = make_layers(parts)[0]
    halves = Layer(layer.role, layer.name, layer.down.half(), layer.up.half(), layer.alpha)
    fuse_lora(parts, write(tmp_path / "l.safetensors", kohya, [halves], parts), 1.0)
    before = originals[layer.role].get_submodule(layer.name).weight
    exact = Layer(layer.role, layer.name, halves.down.float(), halves.up.float(), layer.alpha)
    torch.testing.assert_close(parts["unet"].get_submodule(layer.name).weight, before + delta(exact, before))


Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
FLAT = f"lora_unet_{Q.replace('.', '_')}"


def pair(name: str, inner: int = 40, out: int = 32, rank: int = 2) -> dict[str, Tensor]:
    """A kohya layer."""
    return {
        f"{name}.lora_down.weight": torch.ones(rank, inner),
        f"{name}.lora_up.weight": torch.ones(out, rank),
    }


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            pair(FLAT, inner=768),
            rf"does not fit the unet: {Q} is \[32, 40\] there, and .*\[32, 768\]; .* Diffusion 1\.x",
        ),
        (pair(FLAT, out=64), r"the file changes \[64, 40\]"),
        (
            pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", inner=768)
            | pair(FLAT),
            r"for 2 layers of the unet, of which 1 fit \(not down_blocks_0_.*made for Stable Diffusion 1\.x",
        ),
        (pair("lora_unet_double_blocks_0_img_attn_proj"), "made for a transformer"),
        (pair("lora_te3_x"), "made for another model"),
        ({f"{FLAT}.lora_down.weight": torch.ones(2, 40)}, rf"has only a part of the layer {FLAT}"),
        (pair(FLAT) | {f"{FLAT}x.alpha": torch.ones(1)}, rf"has only a part of the layer {FLAT}x"),
        (
            pair(FLAT) | {f"{FLAT}.lora_up.weight": torch.ones(32, 3)},
            r"is damaged: .* is \[2, 40\] and .* \[32, 3\]",
        ),
        (
            pair(FLAT) | {f"{FLAT}.dora_scale": torch.ones(32)},
            r"is a DoRA \(it has .*dora_scale\), which std-rt does not",
        ),
        ({f"unet.{Q}.lora_magnitude_vector": torch.ones(32)}, "is a DoRA"),
        ({f"{FLAT}.hada_w1_a": torch.ones(2, 2)}, "is a LoHa"),
        ({f"{FLAT}.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
        (pair(FLAT) | {f"{FLAT}.lora_mid.weight": torch.ones(2, 2)}, "is a LoCon with a Tucker core"),
        ({f"{FLAT}.diff": torch.ones(2, 2)}, "is a file of whole weight differences"),
        ({"conv_in.weight": torch.ones(2, 2)}, r"has unknown key names \(conv_in\.weight\)"),
        ({}, "has no LoRA weights in it"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    state: dict[str, Tensor], message: str, parts: Parts, originals: Parts, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ExportError, match=message) as caught:
        fuse_lora(parts, tmp_path / "x.safetensors", 1.0)
    assert str(caught.value).startswith(f"LoRA {tmp_path / 'x.safetensors'} ")
    assert "\n" not in str(caught.value)
    for role, module in parts.items():
        before = originals[role].state_dict()
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_parts_may_be_fused_one_by_one(parts: Parts, originals: Parts, tmp_path: Path) -> None:
    layers = make_layers(parts)
    path = write(tmp_path / "l.safetensors", kohya_original, layers, parts)
    together = copy.deepcopy(originals)
    fuse_lora(together, path, 0.5)
    for role in parts:
        fuse_lora({role: parts[role]}, path, 0.5, elsewhere=parts)
    for role, module in together.items():
        found = parts[role].state_dict()
        assert all(torch.equal(value, found[name]) for name, value in module.state_dict().items())
    with pytest.raises(ExportError, match="changes text_encoder, which this pipeline does not have"):
        fuse_lora({"unet": parts["unet"]}, path, 0.5)


MEMORY = """
import sys
from pathlib import Path
from torch import nn
from std_rt.export.lora_fusion import fuse_lora

def status_mb(key):
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split(key)[1].split()[0]) / 1024

model = nn.ModuleDict({f"layer{i}": nn.Linear(1024, 1024, bias=False) for i in range(40)})
fuse_lora({"text_encoder": nn.ModuleDict({"layer0": nn.Linear(1024, 1024)})}, Path(sys.argv[2]), 1.0)
Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
before = status_mb("VmRSS:")
fuse_lora({"text_encoder": model}, Path(sys.argv[1]), 1.0)
print(status_mb("VmHWM:") - before)
"""


@pytest.mark.long  # a process that imports torch, for its peak memory
@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
def test_fusing_holds_one_layer_at_a_time(tmp_path: Path) -> None:
    """160 MB of weights and 40 MB of LoRA: what is added is the file, and a few layers of 4 MB."""
    state = {}
    for i in range(40):
        state[f"text_encoder.layer{i}.lora_A.weight"] = torch.ones(128, 1024)
        state[f"text_encoder.layer{i}.lora_B.weight"] = torch.ones(1024, 128)
    save_file(state, tmp_path / "l.safetensors")
    save_file({key: value for key, value in state.items() if "layer0." in key}, tmp_path / "one.safetensors")
    run = [sys.executable, "-c", MEMORY, str(tmp_path / "l.safetensors"), str(tmp_path / "one.safetensors")]
    added_mb = float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert added_mb < 80
