"""A run restores all that training changes, stops at a loss that is not a number, and loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from std_rt.core.errors import RecipeError
from std_rt.training.run.checkpoint import load_state, save_state
from std_rt.training.run.recipe import AutoencoderConfig, DataConfig
from std_rt.training.run.training_run import ModuleRun, Run, cosine_rate


@pytest.fixture
def config(tmp_path: Path) -> AutoencoderConfig:
    data = DataConfig("photos", "art", "content", "style")
    return AutoencoderConfig(str(tmp_path / "run"), data, steps=6, snapshot_every=2, log_every=1)


def _start(config: AutoencoderConfig) -> tuple[nn.Module, ModuleRun]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return model, ModuleRun(config, {"net": model}, list(model.parameters()), weight_decay=1e-2)


def _train(
    config: AutoencoderConfig, stop_after: int | None = None, wrong_at: int = -1, signal_at: int = -1
) -> ModuleRun:
    model, run = _start(config)
    with closing(run):
        for step in run.steps(lambda i: cosine_rate(1e-2, i, config.steps, 2), stop_after):
            x = torch.randn(5, 3, generator=run.generator) * run.rng.random()
            run.update(model(x).square().mean() * (float("nan") if step == wrong_at else 1.0), 5)
            if step == signal_at:
                signal.raise_signal(signal.SIGINT)
            if run.due(step):
                run.save(step, figure=float(step))
    return run


def _newest(folder: Path) -> Path:
    return folder / "checkpoints" / (folder / "checkpoints" / "newest").read_text(encoding="utf-8")


def _files(folder: Path) -> dict[str, bytes]:
    """Every file of a run that must not depend on when it was killed."""
    kept = {path.name: path.read_bytes() for path in _newest(folder).iterdir()}
    return kept | {"log.jsonl": (folder / "log.jsonl").read_bytes()}


@pytest.mark.parametrize("kill", [1, 2, 5])
def test_a_stopped_run_goes_on_as_if_unbroken(config: AutoencoderConfig, tmp_path: Path, kill: int) -> None:
    broken = replace(config, output=str(tmp_path / "broken"))
    _train(config)
    _train(broken, stop_after=kill)
    _train(broken)
    assert _files(tmp_path / "broken") == _files(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[1]["figure"] == 1
    assert rows[0]["learning_rate"] == pytest.approx(cosine_rate(1e-2, 0, 6, 2))
    for name in ("loss.png", "timing.jsonl", "recipe.json"):
        assert (tmp_path / "run" / name).is_file()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.is_dir()] == ["000006"]


@pytest.mark.parametrize(("signal_at", "saved"), [(0, 1), (2, 3), (4, 5)])
def test_ctrl_c_saves_the_step_and_the_run_goes_on_as_if_unbroken(
    config: AutoencoderConfig, tmp_path: Path, signal_at: int, saved: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between two lines of the log, which has means over several steps, and between two checkpoints."""
    config = replace(config, log_every=4, snapshot_every=5)
    broken = replace(config, output=str(tmp_path / "broken"))
    _train(config)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        _train(broken, signal_at=signal_at)
    assert signal.getsignal(signal.SIGINT) is before
    assert _newest(tmp_path / "broken").name == f"{saved:06d}"
    assert "stopping after this step" in capsys.readouterr().err
    _train(replace(broken, learning_rate=5.0))  # told, and without effect here
    said = capsys.readouterr().err
    assert f"broken is at step {saved} of 6" in said
    assert f"learning_rate was {config.learning_rate}, is 5.0" in said
    assert _files(tmp_path / "broken") == _files(tmp_path / "run")


def test_ctrl_c_does_not_replace_a_good_checkpoint_by_a_wrong_one(
    config: AutoencoderConfig, tmp_path: Path
) -> None:
    config = replace(config, log_every=6, snapshot_every=2)
    with pytest.raises(RecipeError, match="not a number at step 3"):
        _train(config, wrong_at=2, signal_at=2)
    assert _newest(tmp_path / "run").name == "000002"
    assert _train(config).end == 6


@pytest.mark.skipif(os.name != "posix", reason="a terminal of POSIX")
@pytest.mark.parametrize("is_terminal", [True, False])
def test_where_nobody_listens_any_more_the_step_is_saved(
    config: AutoencoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    """A terminal that hung up, or ``2>&1 | tee log``, where Ctrl-C ends tee, too."""
    end, other = os.openpty() if is_terminal else os.pipe()[::-1]
    with os.fdopen(other if is_terminal else end, "w") as gone:
        monkeypatch.setattr("sys.stderr", gone)
        os.close(end if is_terminal else other)
        with pytest.raises(KeyboardInterrupt):
            _train(replace(config, log_every=1, snapshot_every=5), signal_at=2)
        monkeypatch.undo()
        with suppress(OSError):
            gone.close()
    assert _newest(tmp_path / "run").name == "000003"


def test_losses_of_a_checkpoint_go_on_where_the_next_ones_are(config: AutoencoderConfig) -> None:
    """Stages of std-tiny train on the GPU beside what the checkpoint has on the CPU."""
    config = replace(config, log_every=4, snapshot_every=6)
    with pytest.raises(KeyboardInterrupt):
        _train(config, signal_at=0)
    _, run = _start(config)
    run.add(loss=torch.zeros((), device="meta"))
    assert run._stacked()["loss"].device.type == "meta"
    assert len(run._stacked()["loss"]) == 2


def test_ctrl_c_in_the_last_step_ends_the_run_as_usual(config: AutoencoderConfig, tmp_path: Path) -> None:
    _train(config, signal_at=5)
    assert _newest(tmp_path / "run").name == "000006"


def test_a_second_ctrl_c_ends_at_once(config: AutoencoderConfig, tmp_path: Path) -> None:
    steps = _start(config)[1].steps(lambda _: 1.0)
    next(steps)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    steps.close()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_two_trainings_in_one_folder_are_refused(config: AutoencoderConfig, tmp_path: Path) -> None:
    _train(config, stop_after=2)
    before = _files(tmp_path / "run")
    _, first = _start(config)
    with pytest.raises(RecipeError, match=r"^another training runs in [^\n]*run; wait for it"):
        _start(config)
    first.close()
    assert _files(tmp_path / "run") == before
    assert _start(config)[1].start == 2


def test_fewer_steps_than_there_are_is_one_line(config: AutoencoderConfig, tmp_path: Path) -> None:
    """It would write what it has as the result of fewer."""
    _train(config, stop_after=4)
    kept = (tmp_path / "run" / "recipe.json").read_bytes()
    with pytest.raises(RecipeError, match=r"at step 4 already, and only 3 .*; request more with --max-steps"):
        _start(replace(config, steps=3))
    assert (tmp_path / "run" / "recipe.json").read_bytes() == kept


def test_a_checkpoint_that_is_gone_is_told(
    config: AutoencoderConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _train(config, stop_after=2)
    shutil.rmtree(_newest(tmp_path / "run"))
    with pytest.raises(RecipeError, match=r"000002 is gone; delete [^\n]*checkpoints to start over"):
        _start(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert _start(config)[1].start == 0
    assert "run has no checkpoint: starting over, with a new log" in capsys.readouterr().err


def test_scales_of_gradients_are_restored(config: AutoencoderConfig) -> None:
    class Own:
        def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
            return {}, {}

        def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None: ...

    def start(scale: float) -> tuple[GradScaler, Run]:
        scaler, model = GradScaler("cpu", init_scale=scale), nn.Linear(2, 2)
        scaler.scale(model(torch.ones(1, 2)).sum())
        optimizers = {"net": torch.optim.AdamW(model.parameters())}
        scalers = {"score": scaler, "student": None}
        return scaler, Run(config, {"net": model}, optimizers, Own(), scalers=scalers)

    run = start(8.0)[1]
    for step in run.steps(lambda _: 1e-3, 2):
        run.add(loss=torch.zeros(()))
        if run.due(step):
            run.save(step)
    run.close()
    scaler, run = start(2.0)
    assert (run.start, scaler.get_scale()) == (2, 8.0)


def test_a_finished_run_does_nothing_more(config: AutoencoderConfig, tmp_path: Path) -> None:
    _train(config)
    before = _files(tmp_path / "run")
    assert list(_start(config)[1].steps(lambda _: 1.0)) == []
    assert _files(tmp_path / "run") == before


def test_the_step_of_the_wrong_loss_is_named_though_it_is_noticed_later(config: AutoencoderConfig) -> None:
    config = replace(config, log_every=50, snapshot_every=50, steps=6)
    with pytest.raises(RecipeError, match="the loss is not a number at step 4"):
        _train(config, wrong_at=3)


def test_on_a_full_disk_the_last_checkpoint_stands(
    config: AutoencoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _train(config, stop_after=2)
    before = _files(tmp_path / "run")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("std_rt.training.run.checkpoint.save_file", full)
        with pytest.raises(RecipeError, match=r"^[^\n]*000002, is intact[^\n]*$"):
            _train(config)
    assert {k: v for k, v in _files(tmp_path / "run").items() if k != "log.jsonl"} == {
        k: v for k, v in before.items() if k != "log.jsonl"
    }


def _other_groups(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    meta["groups"]["main"] = []


def _other_weights(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    tensors["net/0.weight"] = torch.ones(9, 9)


def _no_weights(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    del tensors["net/0.weight"]


def _other_rng(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    meta["rng"] = {"bit_generator": "MT19937"}


def _no_generator(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    del tensors["generator"]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("shared", _other_groups),
        ("shared", _other_weights),
        ("shared", _no_weights),
        ("rank0", _other_rng),
        ("rank0", _no_generator),
    ],
)
def test_the_state_of_another_run_says_to_delete_it(
    config: AutoencoderConfig, tmp_path: Path, file: str, change: Callable[..., None]
) -> None:
    _train(config, stop_after=2)
    path = _newest(tmp_path / "run") / f"{file}.safetensors"
    tensors, meta = load_state(path)
    change(tensors, meta)
    save_state(path, tensors, meta)
    with pytest.raises(RecipeError, match=r"^[^\n]*belongs to another run[^\n]*start over$"):
        _start(config)


def test_a_run_of_more_processes_is_not_continued_by_one(config: AutoencoderConfig, tmp_path: Path) -> None:
    _train(config, stop_after=2)
    path = _newest(tmp_path / "run") / "shared.safetensors"
    tensors, meta = load_state(path)
    save_state(path, tensors, meta | {"world": 2})
    with pytest.raises(RecipeError, match="trained by 2 processes, now there are 1"):
        _start(config)


def test_another_recipe_is_not_continued(config: AutoencoderConfig, tmp_path: Path) -> None:
    _train(config, stop_after=2)
    kept = (tmp_path / "run" / "recipe.json").read_bytes()
    with pytest.raises(RecipeError, match="holds a run with another batch"):
        _start(replace(config, batch=3))
    assert (tmp_path / "run" / "recipe.json").read_bytes() == kept
    _start(replace(config, snapshot_every=3))  # the same run


def test_a_folder_that_cannot_be_made_is_one_line(config: AutoencoderConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"^[^\n]*file.run cannot be written: [^\n]*another output$"):
        _start(replace(config, output=str(tmp_path / "file" / "run")))


def test_the_rate_warms_up_and_falls_to_a_fiftieth() -> None:
    rates = [cosine_rate(1.0, i, 100, 10) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.51)
    assert rates[99] == pytest.approx(0.02, abs=2e-3)
    assert cosine_rate(1.0, 0, 10, 0) == 1  # no warm-up


def test_the_cosine_begins_where_the_warm_up_ends() -> None:
    rates = [cosine_rate(1.0, i, 100, 40, floor=0.0) for i in range(101)]
    assert rates[39] == rates[40] == 1
    assert rates[70] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)
    assert cosine_rate(1.0, 3, 4, 8) == 0.5  # a run that ends before its warm-up does
