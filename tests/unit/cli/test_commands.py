"""Every command but `stylize`, through the entry point."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.cli_support import Cli, files_in, picture
from support.media_samples import make_clip

from std_rt import __version__
from std_rt.core.bundle import manifest_digest


def test_version(cli: Cli) -> None:
    result = cli("--version")
    assert (result.code, result.out.strip()) == (0, f"std-rt {__version__}")


@pytest.mark.parametrize(
    "command",
    [
        "stylize",
        "export",
        "train",
        "bench",
        "evaluate",
        "eval",
        "doctor",
        "demo",
        "bundles",
        "live",
        "styles",
        "tally",
    ],
)
def test_every_command_explains_itself(cli: Cli, command: str) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    assert f"std-rt {command}" in result.out


def test_help_names_the_extra_to_install(cli: Cli) -> None:
    assert "[export]" in cli("export", "--help").out
    assert "[train]" in cli("train", "--help").out


def test_an_unknown_flag_is_no_traceback(cli: Cli) -> None:
    result = cli("stylize", "a.png", "--styel", "b.png")
    assert result.code == 2
    assert "--style" in result.err
    assert "Traceback" not in result.err


def test_bundles_list_names_a_broken_one_with_what_is_wrong(
    cli: Cli, own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(own_bundle, tmp_path / "engines" / "good")
    shutil.copytree(own_bundle, tmp_path / "engines" / "bad")
    (tmp_path / "engines" / "bad" / "unet.onnx").unlink()
    monkeypatch.chdir(tmp_path)
    result = cli("bundles", "list")
    assert result.code == 0
    assert "handmade" in result.out
    assert "unet.onnx is missing" in " ".join(result.out.split())


def test_bundles_info_says_what_is_inside(cli: Cli, bundle: Path) -> None:
    out = cli("bundles", "info", bundle).out
    for words in ("64x64 px", "eta 0.5", "tau 499", "4 steps", "(default)", "graph unet", "Apache-2.0"):
        assert words in out


def test_bundles_info_tells_a_video_to_video_bundle(cli: Cli, own_bundle: Path) -> None:
    manifest = json.loads((own_bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest.update(schema=3, window={"frames": 8, "overlap": 2})
    manifest["manifest_sha256"] = manifest_digest(manifest)
    (own_bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "8 frames at once, 2 shared with the window before" in cli("bundles", "info", own_bundle).out
    art = picture(own_bundle.parent / "art.png", 32, 32)
    camera = make_clip(own_bundle.parent / "clip.mkv")
    flags = ["--style", art, "--bundle", own_bundle, "--camera", camera, "--no-window", "--target-fps", 9]
    assert "paints windows of 8 frames, which --target-fps does not work with" in cli("live", *flags).error


def test_bundles_verify_finds_a_changed_byte(cli: Cli, own_bundle: Path) -> None:
    assert "unchanged since export" in cli("bundles", "verify", own_bundle).out
    path = own_bundle / "conditioning.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "conditioning.npz has changed" in cli("bundles", "verify", own_bundle).error


def test_doctor_shows_what_is_here_and_how_to_add_what_is_not(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from std_rt.engines import registry as base

    missing = base.BACKENDS["onnxruntime"]._replace(package="no_such_module")
    monkeypatch.setitem(base.BACKENDS, "onnxruntime", missing)
    result = cli("doctor")
    assert result.code in (0, 1)
    for words in (
        __version__,
        "cores",
        "openvino",
        "to add it: pip install -e '.[onnx]'",
        "cache",
        "std-tiny",
    ):
        assert words in result.out


def test_doctor_finds_packages_that_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata
    from types import SimpleNamespace

    from std_rt.cli.doctor import _packages

    names = ("onnxruntime", "ONNXRuntime-GPU", "numpy")
    found = [SimpleNamespace(metadata={"Name": name}) for name in names]
    monkeypatch.setattr(metadata, "distributions", lambda: found)
    ((mark, _, detail),) = _packages()
    assert "!!" in mark
    assert "onnxruntime and onnxruntime-gpu overwrite each other" in detail


def test_bench_ends_with_one_json_line(cli: Cli, bundle: Path) -> None:
    result = cli("bench", "-b", bundle, "--frames", 3, "--warmup", 1, "--steps", 2, "--size", "64x32")
    assert result.code == 0
    found = json.loads(result.out.splitlines()[-1])
    assert found["fps"] > 0
    assert (found["backend"], found["size"], found["steps"]) == ("openvino", [64, 32], 2)
    assert set(found["stages_ms"]) == {"convert", "vae_encoder", "unet", "scheduler", "vae_decoder", "total"}
    assert 10 < found["peak_memory_mb"] < 10_000
    assert "median" in result.out


def test_bench_against_something_unknown(cli: Cli, bundle: Path) -> None:
    result = cli("bench", "-b", bundle, "--against", "comfyui")
    assert result.code == 2
    assert "diffusers" in result.err


def test_bench_against_diffusers_needs_torch(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("std_rt.core.machine.find_spec", lambda name: None)
    assert "pip install -e '.[export]'" in cli("bench", "-b", bundle, "--against", "diffusers").error


@pytest.mark.parametrize(("command", "extra"), [("export", "export"), ("train", "train")])
def test_what_torch_is_needed_for_says_how_to_get_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, extra: str
) -> None:
    monkeypatch.setattr("std_rt.core.machine.find_spec", lambda name: None)
    recipe = _recipe(tmp_path)
    arguments = ("export", tmp_path, "-o", tmp_path / "out") if command == "export" else ("train", recipe)
    assert f"pip install -e '.[{extra}]'" in cli(*arguments).error


def _recipe(folder: Path) -> Path:
    path = folder / "recipe.toml"
    keys = ("photos", "art", "held_out_content", "held_out_style")
    data = "\n".join(f'{key} = "nowhere/{key}"' for key in keys)
    path.write_text(f'stage = "autoencoder"\noutput = "out"\n[data]\n{data}\n', encoding="utf-8")
    return path


def test_train_dry_run_prints_the_recipe_with_what_was_set(cli: Cli, tmp_path: Path) -> None:
    result = cli("train", _recipe(tmp_path), "--set", "steps=7", "--set", "data.art=elsewhere", "--dry-run")
    assert result.code == 0
    found = json.loads(result.out)
    assert (found["steps"], found["data"]["art"]) == (7, "elsewhere")


def test_train_names_the_nearest_key(cli: Cli, tmp_path: Path) -> None:
    assert "did you mean steps?" in cli("train", _recipe(tmp_path), "--set", "stpes=7", "--dry-run").error
    assert "no recipe" in cli("train", tmp_path / "none.toml").error


def test_demo_writes_a_sheet_of_every_pair(
    cli: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from std_rt.cli import demo

    monkeypatch.setattr(demo, "EXAMPLE_PX", 64)
    monkeypatch.setattr(demo, "SIZES", (32, 64))
    monkeypatch.setattr(demo, "CLIP_FRAMES", 6)
    result = cli("demo", "-o", tmp_path / "demo", "-b", bundle)
    assert result.code == 0
    assert str(tmp_path / "demo" / "sheet.png") in result.out
    assert files_in(tmp_path / "demo") == {
        "inputs",
        "styles",
        "32",
        "64",
        "sheet.png",
        "grid.png",
        "moving_styled.mp4",
    }
    assert len(files_in(tmp_path / "demo" / "64")) == 24


def test_eval_writes_a_sheet_and_scores(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    for i in range(2):
        picture(tmp_path / "contents" / f"{i}.png", 64, 64, seed=i)
        picture(tmp_path / "styles" / f"{i}.png", 64, 64, seed=9 + i)
    sheet = tmp_path / "sheet.png"
    result = cli("eval", tmp_path / "contents", tmp_path / "styles", "-o", sheet, "--pairs", 2, "-b", bundle)
    assert result.code == 0
    found = json.loads(result.out.splitlines()[-1])
    assert list(found["scores"]) == ["handmade-4-step", "reinhard", "cv2.stylization", "photo"]
    assert sheet.is_file()
    assert "--overwrite" in cli("eval", tmp_path, tmp_path, "-o", sheet, "-b", bundle).error
