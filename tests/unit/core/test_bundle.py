"""Bundles: what is refused, what the message says, and that a half-written one has no name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, load, save_model
from support.handmade import write_handmade

from std_rt.core import bundle as bundle_module
from std_rt.core.bundle import (
    CONTENT,
    SCHEMA,
    Bundle,
    list_bundles,
    load_bundle,
    manifest_digest,
    search_paths,
    verify_bundle,
    write_bundle,
)
from std_rt.core.errors import BundleError
from std_rt.core.schedule import NoiseSchedule, trajectory_timesteps

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(handmade: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle made by hand that a test may damage."""
    return Path(shutil.copytree(handmade.path, tmp_path / "mine"))


def reseal(folder: Path, change: Change = lambda manifest: None, *, rehash: tuple[str, ...] = ()) -> None:
    """Change the manifest as its author could: with right hashes afterwards."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    for name in rehash:
        manifest["files"][name] = bundle_module._entry(folder / name)
    manifest["manifest_sha256"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def test_what_was_written_is_what_is_read(handmade: Bundle) -> None:
    found = load_bundle(handmade.path)
    assert found.digest == handmade.digest
    assert found.name == "handmade"
    assert found.size_default == (64, 64)
    assert found.size_range == (16, 512)
    assert (found.size_multiple, found.vae_scale, found.latent_channels, found.style_px) == (8, 8, 3, 32)
    assert (found.eta, found.tau, found.default_steps, found.steps_allowed) == (0.5, 499, 4, [1, 2, 4])
    assert found.graph_outputs("vae_encoder")["latents"][:2] == ["batch", 3]
    assert found.graph_path("unet") == handmade.path / "unet.onnx"


def test_coefficients_are_those_of_the_schedule(handmade: Bundle) -> None:
    wanted = NoiseSchedule.scaled_linear().coefficients(trajectory_timesteps(0.5, 2))
    assert handmade.coefficients(2) == wanted
    assert handmade.coefficients() == handmade.coefficients(4)


def test_an_unknown_step_count_names_those_allowed(handmade: Bundle) -> None:
    with pytest.raises(BundleError, match=r"no 3-step schedule; use --steps with one of 1, 2, 4"):
        handmade.coefficients(3)


def test_an_unknown_graph_names_those_inside(handmade: Bundle) -> None:
    with pytest.raises(BundleError, match=r"has no graph 'controlnet'; it has style_encoder"):
        handmade.graph_path("controlnet")


@pytest.mark.parametrize("name", ["unet.onnx", "unet.safetensors", "conditioning.npz"])
def test_one_flipped_byte_in_any_file_is_refused(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} has changed since export; export it again"):
        load_bundle(folder, verify=True)
    with pytest.raises(BundleError, match=name):
        load_bundle(folder)  # small bundles are always hashed


def test_a_large_bundle_is_hashed_on_request_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "_HASH_ALWAYS_BYTES", 1)
    data = bytearray((folder / "conditioning.npz").read_bytes())
    data[-1] ^= 1
    (folder / "conditioning.npz").write_bytes(data)
    opened = load_bundle(folder)
    with pytest.raises(BundleError, match=r"conditioning\.npz"):
        verify_bundle(opened)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "vae_decoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"incomplete: vae_decoder\.onnx is missing; export it again"):
        load_bundle(folder)


def test_a_file_that_was_cut_off_is_refused_without_hashing(folder: Path) -> None:
    whole = (folder / "unet.onnx").read_bytes()
    (folder / "unet.onnx").write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=rf"{len(whole) - 1} bytes, not {len(whole)}"):
        load_bundle(folder, verify=False)


def test_an_edited_manifest_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"eta": 0.5', '"eta": 0.6'), encoding="utf-8")
    with pytest.raises(BundleError, match="its hash does not match"):
        load_bundle(folder)


def test_a_newer_schema_says_upgrade(folder: Path) -> None:
    reseal(folder, lambda manifest: manifest.update(schema=SCHEMA + 1))
    with pytest.raises(BundleError, match=r"has schema 4 .* upgrade std-rt"):
        load_bundle(folder)


def test_only_a_bundle_that_needs_it_has_the_new_schema(folder: Path, handmade: Bundle) -> None:
    assert handmade.manifest["schema"] == 1
    assert handmade.unet_inputs == ()

    def fill(partial: Path) -> dict[str, Any]:
        for name in handmade.manifest["files"]:
            shutil.copyfile(handmade.path / name, partial / name)
        added = ("schema", "files", "manifest_sha256")
        manifest = {key: value for key, value in handmade.manifest.items() if key not in added}
        return manifest | {"unet_inputs": list(CONTENT)}

    written = write_bundle(folder.with_name("content"), fill)
    assert written.manifest["schema"] == 2
    assert written.unet_inputs == CONTENT


def test_windows_are_a_schema_of_their_own_and_must_make_sense(folder: Path, handmade: Bundle) -> None:
    reseal(folder, lambda manifest: manifest.update(schema=SCHEMA, window={"frames": 8, "overlap": 2}))
    assert load_bundle(folder).window == (8, 2)
    assert handmade.window is None
    reseal(folder, lambda manifest: manifest.update(window={"frames": 4, "overlap": 4}))
    with pytest.raises(BundleError, match="windows of 4 frames that share 4"):
        load_bundle(folder)


def test_a_unet_that_sees_something_unknown_says_upgrade(folder: Path) -> None:
    reseal(folder, lambda manifest: manifest.update(unet_inputs=["depth"]))
    with pytest.raises(
        BundleError, match="has a UNet that sees depth, unknown to this std-rt; upgrade std-rt"
    ):
        load_bundle(folder)


def test_a_missing_graph_is_named(folder: Path) -> None:
    reseal(folder, lambda manifest: manifest["graphs"].pop("style_encoder"))
    with pytest.raises(BundleError, match="has no graph 'style_encoder'"):
        load_bundle(folder)


@pytest.mark.parametrize("key", ["vae_scale", "schedule", "text"])
def test_a_manifest_that_lacks_a_part_says_which(folder: Path, key: str) -> None:
    reseal(folder, lambda manifest: manifest.pop(key))
    with pytest.raises(BundleError, match=f"has no {key}"):
        load_bundle(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "x"}', '{"schema": "1"}'])
def test_a_manifest_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load_bundle(folder)


@pytest.mark.parametrize(
    "outside", ["../secret", "/etc/passwd", "C:\\secret", "a\\..\\..\\secret", "\\\\host\\x"]
)
def test_a_listed_file_outside_the_folder_is_refused(folder: Path, outside: str) -> None:
    reseal(folder, lambda manifest: manifest["files"].update({outside: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(BundleError, match="outside its folder; do not use it"):
        load_bundle(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_weights_behind_a_link_to_another_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    """As the cache of the Hugging Face Hub has them; the engines' own messages do not say what helps."""
    weights = folder / "unet.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    with pytest.raises(BundleError, match=r"unet\.safetensors is a link to another folder.*cp -rL"):
        load_bundle(folder)
    weights.unlink()
    (tmp_path / "blob").rename(weights)
    (tmp_path / "linked").symlink_to(folder)
    load_bundle(tmp_path / "linked")  # the folder itself may be a link


@pytest.mark.parametrize(
    "outside", ["../secret.safetensors", "/tmp/secret.safetensors", "vae_encoder.safetensors"]
)
def test_a_graph_that_reads_other_weights_than_its_own_is_refused(folder: Path, outside: str) -> None:
    model = load(folder / "unet.onnx")
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=outside)
    model.graph.initializer.append(tensor)
    (folder / "unet.onnx").write_bytes(model.SerializeToString())
    reseal(folder, rehash=("unet.onnx",))
    with pytest.raises(BundleError, match=r"graph 'unet' reads weights from .* do not use it"):
        load_bundle(folder)


def test_a_graph_file_without_a_hash_is_refused(folder: Path) -> None:
    reseal(folder, lambda manifest: manifest["files"].pop("unet.safetensors"))
    with pytest.raises(BundleError, match=r"uses unet\.safetensors, whose hash is not listed"):
        load_bundle(folder)


def test_a_graph_that_is_no_onnx_is_refused(folder: Path) -> None:
    (folder / "unet.onnx").write_bytes(b"\xff" * 40)
    reseal(folder, rehash=("unet.onnx",))
    with pytest.raises(BundleError, match=r"unet\.onnx is not a readable ONNX file"):
        load_bundle(folder)


def test_arrays_are_never_unpickled(folder: Path) -> None:
    np.savez(folder / "conditioning.npz", encoder_hidden_states=np.array([{}], object))
    reseal(folder, rehash=("conditioning.npz",))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_bundle(folder).conditioning()


def test_names_are_looked_up_in_engines_and_the_data_folder(
    handmade: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundle_module.platformdirs, "user_data_dir", lambda *_, **__: str(tmp_path / "data"))
    near, far = (root / "ink" for root in search_paths())
    shutil.copytree(handmade.path, tmp_path / far)
    assert load_bundle("ink").path == far
    shutil.copytree(handmade.path, near)
    assert load_bundle("ink").path == near
    assert {item.path for item in list_bundles() if isinstance(item, Bundle)} >= {near}


def test_an_unknown_name_suggests_the_nearest(
    handmade: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(handmade.path, tmp_path / "engines" / "watercolour")
    with pytest.raises(BundleError, match=r"did you mean 'watercolour'\? known bundles: .*std-tiny"):
        load_bundle("watercolor")


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        load_bundle(tmp_path)


def test_a_broken_bundle_is_listed_with_what_is_wrong(
    handmade: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = Path(shutil.copytree(handmade.path, tmp_path / "engines" / "broken"))
    (broken / "unet.onnx").unlink()
    found = [item for item in list_bundles() if isinstance(item, tuple)]
    assert [(name, "unet.onnx is missing" in str(error)) for name, error in found] == [("broken", True)]


def test_a_failing_export_leaves_nothing(tmp_path: Path) -> None:
    def fill(partial: Path) -> dict[str, Any]:
        (partial / "unet.onnx").write_bytes(b"half")
        raise BundleError("parity failed")

    with pytest.raises(BundleError, match="parity failed"):
        write_bundle(tmp_path / "new", fill)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_load_never_gets_the_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no vae_scale"):
        write_bundle(tmp_path / "new", lambda partial: {"name": "new"})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_final_name(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from std_rt.core.bundle import write_bundle\n"
        "def fill(folder):\n"
        "    (folder / 'unet.onnx').write_bytes(b'half'); print('half', flush=True); time.sleep(60)\n"
        "write_bundle(Path(sys.argv[1]), fill)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "new"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"half"
        process.kill()
    assert not (tmp_path / "new").exists()
    left = list(tmp_path.iterdir())
    assert [path.name.startswith(".new.") for path in left] == [True]
    assert write_handmade(tmp_path / "new").name == "new"


def test_an_existing_bundle_is_replaced_only_on_request(folder: Path) -> None:
    with pytest.raises(BundleError, match="add --overwrite"):
        write_handmade(folder)
    before = load_bundle(folder).digest

    def fill(partial: Path) -> dict[str, Any]:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        (partial / "manifest.json").unlink()
        return {**load_bundle(folder).manifest, "name": "renamed"}

    after = write_bundle(folder, fill, overwrite=True)
    assert (after.name, after.digest != before) == ("renamed", True)
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x")
    with pytest.raises(BundleError, match="exists and is not a bundle; choose"):
        write_bundle(tmp_path / "photos", lambda partial: {}, overwrite=True)
    assert (tmp_path / "photos" / "one.jpg").read_bytes() == b"x"


def test_bundle_engines_and_the_door_of_export_load_no_torch() -> None:
    code = (
        "import sys, std_rt.core.bundle, std_rt.engines, std_rt.export\n"
        "print({'torch', 'onnx', 'openvino', 'onnxruntime'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("graph", "file", "weights", "said"),
    [
        ("unet", "other.onnx", "unet.safetensors", r"uses other\.onnx, whose hash is not listed"),
        ("ghost", "unet.onnx", "unet.safetensors", "has no graph 'ghost'"),
        ("unet", "large.onnx", "unet.safetensors", r"graph 'unet' reads weights from 'large\.safetensors'"),
    ],
)
def test_an_int8_form_is_checked_as_the_other_form_is(
    folder: Path, graph: str, file: str, weights: str, said: str
) -> None:
    model = load(folder / "unet.onnx")
    model.graph.initializer.append(TensorProto(name="w", dims=[9], data_type=1, raw_data=bytes(36)))
    save_model(
        model,
        folder / "large.onnx",
        save_as_external_data=True,
        location="large.safetensors",
        size_threshold=9,
    )
    reseal(
        folder,
        lambda m: m.update(int8={"graphs": {graph: {"file": file, "weights": weights}}}),
        rehash=("large.onnx", "large.safetensors"),
    )
    with pytest.raises(BundleError, match=said):
        load_bundle(folder)


def test_weights_written_beside_the_graph_are_accepted(folder: Path) -> None:
    model = load(folder / "unet.onnx")
    (folder / "unet.onnx").unlink()
    (folder / "unet.safetensors").unlink()
    save_model(
        model, folder / "unet.onnx", save_as_external_data=True, location="unet.safetensors", size_threshold=0
    )
    reseal(folder, rehash=("unet.onnx", "unet.safetensors"))
    assert load_bundle(folder).name == "handmade"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, None])
def test_a_full_disk_is_one_line_and_leaves_nothing(number: int | None, tmp_path: Path) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "half.bin").write_bytes(b"half")
        # NumPy's tofile gives no number.
        raise OSError("331776 requested and 52008 written") if number is None else OSError(number, "full")

    with pytest.raises(BundleError, match="cannot be written: the disk is full; no partial bundle is left"):
        write_bundle(tmp_path / "b", fill)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BundleError, match="cannot be written"):
        write_bundle(tmp_path / "file" / "b", lambda folder: {})


def test_what_a_killed_export_left_is_swept_up_after_a_day(tmp_path: Path) -> None:
    old, new, other = (tmp_path / f".{name}.partial" for name in ("b.1", "b.2", "c.1"))
    for folder in (old, new, other):
        folder.mkdir()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    with pytest.raises(BundleError):
        write_bundle(tmp_path / "b", lambda folder: {})
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)
