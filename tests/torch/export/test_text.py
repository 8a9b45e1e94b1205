"""Text at export: equal to diffusers, and the graphs equal to torch on both CPU backends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from support.pipelines import randomize, write_text_lora
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from std_rt.core.bundle import Bundle
from std_rt.core.errors import ExportError
from std_rt.engines import GraphSpec, open_engine
from std_rt.export.graph_precision import to_half
from std_rt.export.graphs import Graph, Port, Trace, trace
from std_rt.export.lora_fusion import fuse_lora
from std_rt.export.modules import ClipText
from std_rt.export.parity import lint
from std_rt.export.text import TextConstants, TextParts, read_tokenizer
from std_rt.export.weights import externalize
from std_rt.models.components import load_part
from std_rt.pipeline.text_encoder import ClipTokenizer, TextEncoder

ROLES = ("text_encoder", "text_encoder_2")
DIMS = (40, 20)
LENGTH = 12
BACKENDS = ("openvino", "onnxruntime")
POSITIVE = ("encoder_hidden_states", "text_embeds")
NEGATIVE = tuple(f"negative_{name}" for name in POSITIVE)


def bake(source: Path, prompt: str, negative: str | None, get_encoder: Callable[[str], Any]) -> TextConstants:
    """As export does it, one encoder after the other."""
    parts = TextParts(source, prompt, negative)
    for role in parts.roles:
        parts.encode(role, get_encoder(role))
    return parts.constants(DIMS)


@pytest.fixture(scope="module")
def source(clip_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clip_source` with what SDXL has: the second tokenizer fills up with the word of id 0."""
    folder = Path(shutil.copytree(clip_source, tmp_path_factory.mktemp("text") / "mini-xl"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / "tokenizer_2" / name
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"pad_token": "a"}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def encoders(source: Path) -> dict[str, Any]:
    """Both text encoders, as export loads them."""
    return {role: load_part(role, source / role) for role in ROLES}


@pytest.fixture(scope="module")
def reference(source: Path, encoders: dict[str, Any]) -> Callable[..., dict[str, np.ndarray]]:
    """``encode_prompt`` of diffusers' pipeline, under our names."""
    tokenizers = {name: CLIPTokenizer.from_pretrained(source / name) for name in ("tokenizer", "tokenizer_2")}

    def encode(prompt: str, negative: str | None, zeros: bool = True) -> dict[str, np.ndarray]:
        pipeline = StableDiffusionXLPipeline(
            vae=None,
            unet=None,
            scheduler=None,
            **tokenizers,
            **encoders,
            force_zeros_for_empty_prompt=zeros,
            add_watermarker=False,
        )
        with torch.no_grad():
            found = pipeline.encode_prompt(prompt, negative_prompt=negative, device="cpu")
        order = (POSITIVE[0], NEGATIVE[0], POSITIVE[1], NEGATIVE[1])
        return {name: value.numpy() for name, value in zip(order, found, strict=True)}

    return encode


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """To the bit."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("in ink", None),
        ("in ink", "dull"),
        ("in ink", ""),
        ("", None),
        ("a bad cat", "a"),
        ("it's, 3x", "?"),  # with letters that the tokenizer lacks: its unknown is the end token
    ],
)
def test_plain_prompts_are_encoded_as_diffusers_does(
    source: Path, encoders: dict[str, Any], reference: Any, prompt: str, negative: str | None
) -> None:
    constants = bake(source, prompt, negative, encoders.__getitem__)
    assert (constants.mode, constants.chunks, constants.zero_negative) == ("baked", 1, True)
    assert_same(constants.arrays, reference(prompt, negative))
    assert constants.arrays["encoder_hidden_states"].shape == (1, LENGTH, DIMS[0])
    assert constants.arrays["negative_text_embeds"].any() == (negative is not None)


def test_the_index_says_what_no_negative_means(source: Path, encoders: Any, reference: Any) -> None:
    index = source / "model_index.json"
    before = index.read_text(encoding="utf-8")
    index.write_text(
        json.dumps(json.loads(before) | {"force_zeros_for_empty_prompt": False}), encoding="utf-8"
    )
    try:
        constants = bake(source, "in ink", None, encoders.__getitem__)
    finally:
        index.write_text(before, encoding="utf-8")
    assert not constants.zero_negative
    assert constants.arrays["negative_text_embeds"].any()
    assert_same(constants.arrays, reference("in ink", None, zeros=False))


def test_the_first_chunk_of_a_long_prompt_is_what_diffusers_keeps(
    source: Path, encoders: Any, reference: Any
) -> None:
    long = "in ink " * 8  # 2 tokens each and more: three chunks of 10
    constants = bake(source, long, None, encoders.__getitem__)
    first = reference(long, None)
    assert constants.chunks > 1
    assert constants.arrays["encoder_hidden_states"].shape == (1, LENGTH * constants.chunks, DIMS[0])
    np.testing.assert_array_equal(
        constants.arrays["encoder_hidden_states"][:, :LENGTH], first["encoder_hidden_states"]
    )
    np.testing.assert_array_equal(constants.arrays["text_embeds"], first["text_embeds"])


def test_a_weight_raises_its_words_against_the_others(source: Path, encoders: Any) -> None:
    plain = bake(source, "dry ink", None, encoders.__getitem__).arrays["encoder_hidden_states"]
    heavy = bake(source, "dry (ink:1.4)", None, encoders.__getitem__).arrays["encoder_hidden_states"]
    for part in (slice(0, 16), slice(16, 40)):  # each encoder by itself
        ratio = np.linalg.norm(heavy[0, :, part], axis=1) / np.linalg.norm(plain[0, :, part], axis=1)
        ink = slice(4, 6)  # d r y in k</w>
        np.testing.assert_allclose(ratio[ink] / ratio[0], 1.4, rtol=1e-5)
        np.testing.assert_allclose(np.delete(ratio, [4, 5]) / ratio[0], 1, rtol=1e-5)
        assert heavy[..., part].mean() == pytest.approx(plain[..., part].mean(), rel=1e-4)
    same = bake(source, "dry (ink:1.0)", None, encoders.__getitem__).arrays["encoder_hidden_states"]
    np.testing.assert_array_equal(same, plain)


def write_graph(folder: Path, graph: Graph, weights: str = "fp32") -> Path:
    """As export does it."""
    path = folder / f"{graph.name}.onnx"
    externalize(trace(graph.plan), graph.state, path, folder / graph.weights, weights)
    lint(path)
    return path


@pytest.fixture(scope="module")
def written(source: Path, encoders: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TextParts]:
    """Graphs and tokenizers on disk."""
    folder, parts = tmp_path_factory.mktemp("written"), TextParts(source, "in ink", "dull")
    for role in parts.roles:
        write_graph(folder, parts.graph(role, encoders[role]))
    parts.write_tokenizers(folder)
    return folder, parts


def run(path: Path, backend: str, ids: np.ndarray) -> dict[str, np.ndarray]:
    """One call, at the shape of ``ids``."""
    engine = open_engine(backend, GraphSpec(path.stem, path, {"input_ids": ids.shape}, key=""), "fp32")
    found = {name: value.copy() for name, value in engine(input_ids=ids).items()}
    engine.close()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("role", ROLES)
def test_a_graph_gives_what_transformers_gives(
    written: tuple[Path, TextParts], encoders: Any, backend: str, role: str
) -> None:
    folder, parts = written
    examples = parts.examples(role, encoders[role])
    assert len({example.inputs["input_ids"].tobytes() for example in examples}) == 3
    for example in examples:
        found = run(folder / f"{role}.onnx", backend, example.inputs["input_ids"])
        assert found.keys() == example.outputs.keys()
        for name, value in example.outputs.items():
            np.testing.assert_allclose(found[name], value, atol=1e-5)
    # The batch is open, and rows do not mix.
    ids = np.concatenate([example.inputs["input_ids"] for example in examples])
    for name, value in run(folder / f"{role}.onnx", backend, ids).items():
        wanted = np.concatenate([example.outputs[name] for example in examples])
        np.testing.assert_allclose(value, wanted, atol=1e-5)


@pytest.fixture(scope="module")
def bundle(written: tuple[Path, TextParts]) -> Bundle:
    """As much of a bundle as the runtime's text encoder reads."""
    folder, parts = written
    graphs = {role: {"file": f"{role}.onnx"} for role in parts.roles}
    text = {"mode": "encoder", "zero_negative": parts.zero_negative, "tokenizers": parts.tokenizer_folders}
    return Bundle(folder, {"name": "mini", "text": text, "graphs": graphs, "manifest_sha256": ""})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("prompt", "negative"),
    [("in ink", None), ("(in ink:1.3), [a cat] BREAK on a mat", "dull"), ("a " * 30, "")],
)
def test_the_runtime_encodes_what_export_bakes(
    bundle: Bundle, source: Path, encoders: Any, backend: str, prompt: str, negative: str | None
) -> None:
    baked = bake(source, prompt, negative, encoders.__getitem__).arrays
    with_engines = TextEncoder(bundle, lambda spec: open_engine(backend, spec, "fp32"))
    found = with_engines.encode(prompt, negative)
    with_engines.release()
    assert found.keys() == baked.keys()
    for name, value in baked.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5, rtol=1e-4, err_msg=name)


def test_the_bundles_tokenizers_are_the_sources(written: tuple[Path, TextParts], source: Path) -> None:
    folder, parts = written
    assert parts.tokenizer_folders == {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    for name in parts.tokenizer_folders.values():
        theirs = CLIPTokenizer.from_pretrained(source / name)
        ours = ClipTokenizer.load(folder / name)
        assert (ours.length, ours.pad) == (LENGTH, theirs.pad_token_id)
        for text in ("a bad cat", "in  INK", "x9<|endoftext|>y"):
            assert ours(text) == theirs(text, add_special_tokens=False).input_ids
    assert parts.tokenizers["text_encoder_2"].pad == 0


def test_a_tokenizer_may_be_one_file(source: Path, tmp_path: Path) -> None:
    """As transformers 5 saves it."""
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    shutil.rmtree(folder / "tokenizer_2")
    CLIPTokenizer.from_pretrained(source / "tokenizer_2").save_pretrained(folder / "tokenizer_2")
    assert not (folder / "tokenizer_2" / "merges.txt").exists()
    found, wanted = (read_tokenizer(place, "text_encoder_2") for place in (folder, source))
    assert json.loads(found.rules) == json.loads(wanted.rules)
    assert (found.length, found.begin, found.end, found.pad) == (
        wanted.length,
        wanted.begin,
        wanted.end,
        wanted.pad,
    )


def test_a_lora_in_the_text_encoder_is_heard(
    source: Path, encoders: Any, bundle: Bundle, tmp_path: Path
) -> None:
    fused = load_part("text_encoder", source / "text_encoder")
    lora = write_text_lora(tmp_path / "l.safetensors", fused)
    fuse_lora({"text_encoder": fused}, lora, 0.5)
    both = {**encoders, "text_encoder": fused}
    baked = bake(source, "in ink", None, both.__getitem__).arrays["encoder_hidden_states"]
    plain = bake(source, "in ink", None, encoders.__getitem__).arrays["encoder_hidden_states"]
    assert np.abs(baked - plain)[..., :16].max() > 0.01
    np.testing.assert_array_equal(baked[..., 16:], plain[..., 16:])
    parts = TextParts(source, "in ink")
    write_graph(tmp_path, parts.graph("text_encoder", fused))
    ids = parts.examples("text_encoder", fused)[-1].inputs["input_ids"]
    found = run(tmp_path / "text_encoder.onnx", "onnxruntime", ids)["hidden_states"]
    np.testing.assert_allclose(found, baked[..., :16], atol=1e-5)


def projecting(eos: int, act: str = "quick_gelu") -> CLIPTextModelWithProjection:
    """A text encoder with 30 words that says ``eos`` is its end."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=7,
        projection_dim=5,
        hidden_act=act,
        bos_token_id=28,
        eos_token_id=eos,
        attn_implementation="eager",
    )
    return randomize(CLIPTextModelWithProjection(config), 3)  # type: ignore[return-value]


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [29, 2])
def test_the_pooled_text_is_that_of_the_end(eos: int, act: str) -> None:
    """The first end where the config knows it, the highest id with the legacy end 2; else the first id."""
    encoder = projecting(eos, act)
    ids = torch.tensor(
        [
            [28, 3, 4, 29, 0, 0, 0],
            [28, 29, 29, 29, 29, 29, 29],
            [28, 3, 29, 5, 6, 29, 0],
            [28, 2, 4, 5, 2, 1, 2],
        ]
    )
    with torch.no_grad():
        wanted = encoder(ids, output_hidden_states=True)
        hidden, pooled = ClipText(encoder, 7)(ids)
    torch.testing.assert_close(hidden, wanted.hidden_states[-2])
    torch.testing.assert_close(pooled, wanted.text_embeds)


def plain_graph(encoder: nn.Module) -> Graph:
    """The graph of `projecting`, which has no tokenizer."""
    ids = Port("input_ids", ("batch", 7), "", "int64")
    outputs = (Port("hidden_states", ("batch", 7, 8), ""), Port("text_embeds", ("batch", 5), ""))
    return Graph("clip", Trace(ClipText(encoder, 7), (ids,), outputs), encoder.state_dict(), "", {})


def test_the_legacy_end_in_a_graph(tmp_path: Path) -> None:
    encoder = projecting(2)
    path = write_graph(tmp_path, plain_graph(encoder))
    ids = np.array([[28, 3, 29, 5, 6, 29, 0], [27, 2, 4, 28, 2, 1, 2]], np.int64)
    with torch.no_grad():
        wanted = encoder(torch.from_numpy(ids)).text_embeds.numpy()
    for backend in BACKENDS:
        np.testing.assert_allclose(run(path, backend, ids)["text_embeds"], wanted, atol=1e-5)


def test_halves_have_a_float32_boundary(tmp_path: Path) -> None:
    encoder = projecting(29)
    ids = np.array([[28, 3, 4, 29, 0, 0, 0]], np.int64)
    with torch.no_grad():
        wanted = encoder(torch.from_numpy(ids)).text_embeds.numpy()
    path = write_graph(tmp_path, plain_graph(to_half(encoder, torch.float16)), "fp16")
    for backend in BACKENDS:
        found = run(path, backend, ids)["text_embeds"]
        assert found.dtype == np.float32
        assert 0 < np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max()


@pytest.fixture
def broken(source: Path, tmp_path: Path) -> Path:
    """A copy of `source` to damage."""
    return Path(shutil.copytree(source, tmp_path / "broken"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: shutil.rmtree(s / "tokenizer"), "has a text_encoder but no tokenizer"),
        (lambda s: shutil.rmtree(s / "text_encoder_2"), "has no text_encoder_2, whose pooled text"),
        (lambda s: (s / "tokenizer" / "vocab.json").write_text("{", encoding="utf-8"), "cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused(broken: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(broken)
    with pytest.raises(ExportError, match=message):
        TextParts(broken, "in ink")


def test_a_model_without_text_takes_no_prompts(own_source: Path) -> None:
    constants = TextParts(own_source).constants((24, 20))
    assert (constants.mode, constants.chunks) == ("none", 1)
    assert {name: value.shape for name, value in constants.arrays.items()} == {
        POSITIVE[0]: (1, 1, 24),
        POSITIVE[1]: (1, 20),
        NEGATIVE[0]: (1, 1, 24),
        NEGATIVE[1]: (1, 20),
    }
    assert not any(value.any() for value in constants.arrays.values())
    for prompts in (("ink", None), ("", "dull")):
        with pytest.raises(ExportError, match="has no text encoders, so it takes no --prompt"):
            TextParts(own_source, *prompts)
