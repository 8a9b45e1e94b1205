"""Style files: what is written comes back, and whatever else is given is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file
from support.cli_support import files_in, picture
from support.handmade import DIM, POOLED, TOKENS

from std_rt.core.bundle import Bundle
from std_rt.core.errors import MediaError, UsageError
from std_rt.pipeline.conditioning import EncodedStyle
from std_rt.pipeline.style_file import (
    FORMAT_VERSION,
    StyleFile,
    blend_files,
    clean_name,
    encode_styles,
    load_style,
    open_styles,
    read_style,
    save_style,
    style_encoder_id,
    style_paths,
    thumbnail,
)


def encode(frame: np.ndarray, stroke_size: float = 1.0) -> EncodedStyle:
    """As the bundle made by hand does it: all tokens hold the picture's mean."""
    mean = np.float32(frame.mean() / 127.5 - 1)
    return EncodedStyle(np.full((1, TOKENS, DIM), mean), np.full((1, POOLED), mean))


def _style(bundle: Bundle, seed: int = 0, side: int = 40, name: str = "art") -> StyleFile:
    rng = np.random.default_rng(seed)
    return StyleFile(
        EncodedStyle(
            rng.standard_normal((1, TOKENS, DIM), np.float32), rng.standard_normal((1, POOLED), np.float32)
        ),
        name,
        rng.integers(0, 256, (side, side, 3), np.uint8),
        style_encoder_id(bundle),
        bundle.name,
        ((f"{name}.png", 1.0),),
    )


def _other_encoder(bundle: Bundle) -> Bundle:
    """The same bundle with another style encoder, as far as the manifest says."""
    listed = bundle.manifest["graphs"]["style_encoder"]["weights"]
    files = bundle.manifest["files"] | {listed: {"sha256": "f" * 64, "bytes": 1}}
    return Bundle(bundle.path, bundle.manifest | {"files": files, "name": "other"})


def _assert_same(a: StyleFile, b: StyleFile) -> None:
    np.testing.assert_array_equal(a.style.tokens, b.style.tokens)
    assert (a.style.text_embeds is None) == (b.style.text_embeds is None)
    if a.style.text_embeds is not None:
        np.testing.assert_array_equal(a.style.text_embeds, b.style.text_embeds)
    np.testing.assert_array_equal(a.thumbnail, b.thumbnail)
    assert (a.name, a.encoder, a.bundle, a.sources) == (b.name, b.encoder, b.bundle, b.sources)


def _refusal(path: Path, bundle: Bundle | None) -> str:
    with pytest.raises(MediaError) as caught:
        load_style(path, bundle)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_what_is_written_comes_back_bit_for_bit(handmade: Bundle, tmp_path: Path) -> None:
    style = replace(_style(handmade), sources=(("ink.png", 0.7), ("wave.png", 0.3)))
    save_style(tmp_path / "a.safetensors", style)
    _assert_same(load_style(tmp_path / "a.safetensors", handmade), style)
    _assert_same(load_style(tmp_path / "a.safetensors", None), style)
    assert files_in(tmp_path) == {"a.safetensors"}
    save_style(tmp_path / "b.safetensors", style)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_style_without_text_embeds_comes_back_without(handmade: Bundle, tmp_path: Path) -> None:
    style = replace(_style(handmade), style=EncodedStyle(np.ones((1, 3, 5), np.float32)))
    save_style(tmp_path / "a.safetensors", style)
    _assert_same(load_style(tmp_path / "a.safetensors", None), style)


@given(name=st.text(st.characters(), max_size=120))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_name_becomes_one_printable_line(handmade: Bundle, tmp_path: Path, name: str) -> None:
    clean = clean_name(name)
    assert clean.isprintable()
    assert 0 < len(clean) <= 80
    style = replace(_style(handmade, name=name), bundle=name)
    save_style(tmp_path / "a.safetensors", style, overwrite=True)
    loaded = load_style(tmp_path / "a.safetensors", handmade)
    assert loaded.name == loaded.bundle == clean
    assert clean_name(clean) == clean


def test_bundles_with_one_style_encoder_share_files(handmade: Bundle, tmp_path: Path) -> None:
    unet = handmade.manifest["graphs"]["unet"]["weights"]
    files = handmade.manifest["files"] | {unet: {"sha256": "e" * 64, "bytes": 1}}
    sibling = Bundle(handmade.path, handmade.manifest | {"files": files, "name": "sibling"})
    save_style(tmp_path / "a.safetensors", _style(handmade))
    assert load_style(tmp_path / "a.safetensors", sibling).bundle == handmade.name


def test_a_style_of_another_encoder_is_refused_with_both_names(handmade: Bundle, tmp_path: Path) -> None:
    other = _other_encoder(handmade)
    save_style(tmp_path / "a.safetensors", _style(handmade))
    said = _refusal(tmp_path / "a.safetensors", other)
    assert "bundle 'handmade'" in said
    assert "not for that of 'other'" in said
    assert said.endswith(
        f"std-rt styles save art.png -o {tmp_path / 'a.safetensors'} --bundle other --overwrite"
    )


def test_an_existing_file_is_kept_unless_overwritten(handmade: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_style(path, _style(handmade))
    before = path.read_bytes()
    with pytest.raises(MediaError, match="exists already; add --overwrite"):
        save_style(path, _style(handmade, 1))
    assert path.read_bytes() == before
    save_style(path, _style(handmade, 1), overwrite=True)
    _assert_same(load_style(path, handmade), _style(handmade, 1))


def test_a_full_disk_leaves_the_old_file_and_no_other(
    handmade: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_style(path, _style(handmade))
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(MediaError, match=r"a\.safetensors cannot be written: the disk is full"):
            save_style(path, _style(handmade, 1), overwrite=True)
    assert path.read_bytes() == before
    assert files_in(tmp_path) == {"a.safetensors"}


def test_a_place_with_another_suffix_is_refused(handmade: Bundle, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"ends in \.safetensors; use -o .*art\.safetensors"):
        save_style(tmp_path / "art.png", _style(handmade))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"style": EncodedStyle(np.full((1, 2, 4), np.nan, np.float32))}, "style_tokens contains NaN"),
        ({"style": EncodedStyle(np.zeros((1, 2, 4)))}, "style_tokens is float64"),  # type: ignore[arg-type]
        ({"style": EncodedStyle(np.zeros((2, 2, 4), np.float32))}, "style_tokens has shape"),
        ({"thumbnail": np.zeros((129, 20, 3), np.uint8)}, "the limit is 128"),
        ({"thumbnail": np.zeros((20, 20), np.uint8)}, "thumbnail is uint8"),
    ],
)
def test_arrays_that_are_no_style_are_not_saved(
    handmade: Bundle, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        save_style(tmp_path / "a.safetensors", replace(_style(handmade), **change))
    assert not files_in(tmp_path)


def test_a_missing_file_an_empty_one_and_a_folder(handmade: Bundle, tmp_path: Path) -> None:
    assert "does not exist" in _refusal(tmp_path / "no.safetensors", handmade)
    (tmp_path / "empty.safetensors").touch()
    assert "is empty" in _refusal(tmp_path / "empty.safetensors", handmade)
    (tmp_path / "folder.safetensors").mkdir()
    assert "is a folder" in _refusal(tmp_path / "folder.safetensors", handmade)


def test_a_picture_under_the_name_of_a_style_file(handmade: Bundle, tmp_path: Path) -> None:
    picture(tmp_path / "art.png", 20, 20).rename(tmp_path / "art.safetensors")
    said = _refusal(tmp_path / "art.safetensors", handmade)
    assert "is not a .safetensors file" in said
    assert "std-rt styles save art.png -o NAME.safetensors" in said


def test_a_lora_given_by_mistake(handmade: Bundle, tmp_path: Path) -> None:
    save_file({"unet.to_q.lora_A.weight": np.zeros((4, 8), np.float16)}, tmp_path / "lora.safetensors")
    said = _refusal(tmp_path / "lora.safetensors", handmade)
    assert "is a LoRA, not a style; use it with std-rt export --lora" in said


def test_other_weights_given_by_mistake(handmade: Bundle, tmp_path: Path) -> None:
    assert "is not a style file (it contains" in _refusal(handmade.weights_path("unet"), handmade)
    save_file({"b": np.zeros(3), "a": np.zeros(2)}, tmp_path / "weights.safetensors", {"format": "pt"})
    assert "2 tensors, the first 'a'" in _refusal(tmp_path / "weights.safetensors", handmade)


def test_a_file_of_a_later_version(handmade: Bundle, tmp_path: Path) -> None:
    notes = json.dumps({"format_version": FORMAT_VERSION + 1})
    save_file({"new": np.zeros(1)}, tmp_path / "new.safetensors", {"std_rt_style": notes})
    said = _refusal(tmp_path / "new.safetensors", handmade)
    assert "reads up to 1; upgrade std-rt: git pull, then pip install -e ." in said


@pytest.mark.parametrize("notes", ["", "{", "[]", "null", '{"format_version": "x"}', "[" * 10_000])
def test_notes_that_cannot_be_read(handmade: Bundle, tmp_path: Path, notes: str) -> None:
    save_file({"style_tokens": np.zeros(1)}, tmp_path / "a.safetensors", {"std_rt_style": notes})
    assert "is damaged (its metadata cannot be read)" in _refusal(tmp_path / "a.safetensors", handmade)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"style_tokens": None}, "style_tokens is missing"),
        ({"thumbnail": None}, "thumbnail is missing"),
        ({"style_tokens": np.zeros((1, TOKENS, DIM), np.float16)}, "stored as F16 instead of F32"),
        ({"thumbnail": np.zeros((4, 4, 3), np.float32)}, "stored as F32 instead of U8"),
        ({"style_tokens": np.full((1, TOKENS, DIM), np.inf, np.float32)}, "contains NaN or infinite"),
        ({"text_embeds": np.full((1, POOLED), np.nan, np.float32)}, "text_embeds contains NaN or infinite"),
        ({"text_embeds": np.zeros((1, 0), np.float32)}, "text_embeds has shape"),
        ({"style_tokens": np.zeros((TOKENS, DIM), np.float32)}, "style_tokens has shape"),
        ({"thumbnail": np.zeros((4, 4), np.uint8)}, "thumbnail is uint8"),
        ({"thumbnail": np.zeros((4, 4, 3), np.uint8)}, "its contents have changed"),
    ],
)
def test_arrays_that_are_no_style_are_not_loaded(
    handmade: Bundle, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    import safetensors

    path = tmp_path / "a.safetensors"
    save_style(path, _style(handmade))
    with safetensors.safe_open(path, "np") as file:
        notes = file.metadata()
        tensors = {name: np.array(file.get_tensor(name)) for name in file.keys()} | change  # noqa: SIM118
    path.write_bytes(save({name: value for name, value in tensors.items() if value is not None}, notes))
    assert said in _refusal(path, handmade)


def test_tokens_of_another_shape_than_the_bundles(handmade: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    pooled = np.zeros((1, POOLED), np.float32)
    tokens = np.zeros((1, TOKENS, DIM), np.float32)
    for style, said in (
        (
            EncodedStyle(np.zeros((1, TOKENS + 1, DIM), np.float32), pooled),
            "its tokens are [1, 3, 4] instead of [1, 2, 4]",
        ),
        (EncodedStyle(tokens), "it has no text_embeds"),
        (EncodedStyle(tokens, np.zeros((1, 9), np.float32)), "its text_embeds are [1, 9] instead of [1, 6]"),
    ):
        save_style(path, replace(_style(handmade), style=style), overwrite=True)
        assert said in _refusal(path, handmade)


@given(cut=st.integers(1, 5000))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_short_is_refused(handmade: Bundle, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.safetensors"
    save_style(path, _style(handmade), overwrite=True)
    path.write_bytes(path.read_bytes()[: -min(cut, path.stat().st_size - 1)])
    _refusal(path, handmade)


@given(data=st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_is_refused_or_changes_nothing(
    handmade: Bundle, tmp_path: Path, data: st.DataObject
) -> None:
    """Nothing: where the byte is white space of the header."""
    path = tmp_path / "a.safetensors"
    style = _style(handmade, side=8)
    save_style(path, style, overwrite=True)
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(whole))
    said = ""
    try:
        _assert_same(load_style(path, handmade), style)
    except MediaError as error:
        said = str(error)
    assert "\n" not in said


@given(junk=st.binary(min_size=1, max_size=200))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_junk_is_refused(handmade: Bundle, tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(junk)
    _refusal(tmp_path / "a.safetensors", handmade)


def test_a_pickle_does_not_run(handmade: Bundle, tmp_path: Path) -> None:
    import pickle

    class Bad:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Bad()))
    _refusal(tmp_path / "a.safetensors", handmade)
    assert not (tmp_path / "ran").exists()


def test_a_picture_a_frame_and_a_style_file_read_alike(handmade: Bundle, tmp_path: Path) -> None:
    path = picture(tmp_path / "ink wash.png", 300, 200)
    drawn = read_style(path, handmade, encode)
    assert (drawn.name, drawn.sources) == ("ink wash", (("ink wash.png", 1.0),))
    assert drawn.thumbnail.shape == (128, 128, 3)
    assert read_style(path, handmade, encode, "ink").name == "ink"
    save_style(tmp_path / "a.safetensors", drawn)
    path.unlink()

    def never(frame: np.ndarray, stroke_size: float) -> EncodedStyle:
        raise AssertionError("a style file needs no encoder")

    _assert_same(read_style(tmp_path / "a.safetensors", handmade, never), drawn)
    assert read_style(tmp_path / "a.safetensors", handmade, never, "b").name == "b"
    framed = read_style(np.zeros((5, 9, 3), np.uint8), handmade, encode)
    assert framed.thumbnail.shape == (5, 5, 3)


def test_the_stroke_size_is_stored_and_another_one_refused(handmade: Bundle, tmp_path: Path) -> None:
    def at_size(frame: np.ndarray, stroke_size: float) -> EncodedStyle:
        return encode(np.full_like(frame, 100 * stroke_size))

    source, path = picture(tmp_path / "ink.png", 20, 20), tmp_path / "a.safetensors"
    drawn = read_style(source, handmade, at_size, stroke_size=1.5)
    np.testing.assert_array_equal(drawn.style.tokens, encode(np.full((1, 1, 3), 150, np.uint8)).tokens)
    save_style(path, drawn)
    for wanted in (None, 1.5):
        assert load_style(path, handmade, wanted).stroke_size == 1.5
    with pytest.raises(MediaError) as caught:
        load_style(path, handmade, 0.5)
    assert str(caught.value) == (
        f"{path} was saved at stroke size 1.5 without its picture, which stroke size 0.5 needs; leave out "
        f"--stroke-size, or save it again: std-rt styles save ink.png --stroke-size 0.5 -o {path} --overwrite"
    )


def test_a_blend_has_a_stroke_size_if_its_parts_agree(handmade: Bundle, tmp_path: Path) -> None:
    frame, path = np.zeros((9, 9, 3), np.uint8), tmp_path / "a.safetensors"
    one, two, three = (read_style(frame, handmade, encode, stroke_size=size) for size in (1.5, 1.5, 2.0))
    assert blend_files([(one, 1.0), (two, 1.0)], "same").stroke_size == 1.5
    assert blend_files([(one, 1.0), (three, 0.0)], "one").stroke_size == 1.5
    save_style(path, blend_files([(one, 1.0), (three, 1.0)], "mixed"))
    assert load_style(path, handmade).stroke_size is None
    with pytest.raises(
        MediaError, match=r"saved at several stroke sizes without its picture, which stroke size 1\.5"
    ):
        load_style(path, handmade, 1.5)


def test_weighted_pictures_and_style_files_become_one_style(handmade: Bundle, tmp_path: Path) -> None:
    frame = np.full((10, 10, 3), 255, np.uint8)
    save_style(tmp_path / "b.safetensors", read_style(np.zeros((9, 9, 3), np.uint8), handmade, encode))
    mixed = encode_styles(encode, [(frame, 3.0), (tmp_path / "b.safetensors", 1.0)], handmade)
    np.testing.assert_allclose(mixed.tokens, 0.75 * 1 + 0.25 * -1, rtol=1e-6)
    alone = encode_styles(encode, [(tmp_path / "b.safetensors", 2.0)], handmade)
    assert alone.tokens.max() == -1


def test_files_are_read_before_anything_is_encoded(handmade: Bundle, tmp_path: Path) -> None:
    art = picture(tmp_path / "art.png", 20, 20)
    save_style(tmp_path / "b.safetensors", _style(handmade))
    pairs = [(art, 1.0), (tmp_path / "b.safetensors", 3.0)]
    expected = encode_styles(encode, pairs, handmade)
    opened = open_styles(pairs, handmade)
    for path, _ in pairs:
        path.unlink()
    np.testing.assert_array_equal(encode_styles(encode, opened, handmade).tokens, expected.tokens)
    with pytest.raises(MediaError, match=r"art\.png does not exist"):
        open_styles(pairs, handmade)


@given(weights=st.lists(st.floats(0, 1e300), min_size=2, max_size=4).filter(any))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_blend_remembers_its_sources(handmade: Bundle, weights: list[float]) -> None:
    parts = [(_style(handmade, i, side=20 + i, name=f"s{i}"), weight) for i, weight in enumerate(weights)]
    mixed = blend_files(parts, "mixed")
    assert sum(share for _, share in mixed.sources) == pytest.approx(1)
    counted = {f"s{i}.png" for i, weight in enumerate(weights) if weight}
    assert {name for name, _ in mixed.sources} == counted
    again = blend_files([(mixed, 1.0), (_style(handmade, 9, name="s9"), 1.0)], "again")
    assert dict(again.sources)["s9.png"] == pytest.approx(0.5)
    assert max(mixed.thumbnail.shape[:2]) <= 128


def test_a_blends_thumbnail_is_in_stripes_as_wide_as_the_shares(handmade: Bundle) -> None:
    dark, light = _style(handmade, side=100), _style(handmade, side=100)
    dark.thumbnail[...], light.thumbnail[...] = 0, 255
    stripes = blend_files([(dark, 0.7), (light, 0.3)], "both").thumbnail
    assert stripes.shape == (100, 100, 3)
    assert (stripes[:, :70].max(), stripes[:, 70:].min()) == (0, 255)


@given(st.integers(1, 300), st.integers(1, 300))
@settings(deadline=None, max_examples=30)
def test_a_thumbnail_is_square_and_small(h: int, w: int) -> None:
    small = thumbnail(np.zeros((h, w, 3), np.uint8))
    assert small.shape == (min(h, w, 128), min(h, w, 128), 3)


def test_a_folder_is_its_pictures_and_style_files_by_name(handmade: Bundle, tmp_path: Path) -> None:
    for name in ("b.PNG", "A.jpg", "c.safetensors", ".hidden.png", "notes.txt", "clip.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "sub.png").mkdir()
    assert [path.name for path in style_paths(tmp_path)] == ["A.jpg", "b.PNG", "c.safetensors"]
    with pytest.raises(MediaError, match="contains no picture or style file"):
        style_paths(tmp_path / "sub.png")
    with pytest.raises(MediaError, match="cannot be read"):
        style_paths(tmp_path / "nowhere")
