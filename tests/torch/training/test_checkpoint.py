"""State files are written whole or not at all, and what is read back is what was written, bit for bit."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from std_rt.core.errors import RecipeError
from std_rt.training.run.checkpoint import (
    flatten_optimizer,
    load_state,
    restore_optimizer,
    save_state,
    unpacking,
)

META = {"step": 7, "losses": [0.5, 0.25], "rng": {"state": 2**127 + 1}, "name": "größer", "none": None}


def _tensors() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=rng)
    return {
        "whole": weight,
        "view": weight.T,  # shares memory with "whole" and is not contiguous
        "row": weight[1:2].expand(3, 6),
        "half": weight.bfloat16(),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
    }


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert torch.equal(value, b[key]), key


# --- state files ----------------------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "state.safetensors"
    save_state(path, _tensors(), META)
    tensors, meta = load_state(path)
    _same(tensors, _tensors())
    assert meta == META
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    files = []
    for i in range(4):
        meta = META if i % 2 else dict(reversed(META.items()))
        save_state(tmp_path / "state.safetensors", _tensors(), meta)
        files.append((tmp_path / "state.safetensors").read_bytes())
    assert len(set(files)) == 1


def test_what_is_written_is_the_state_at_the_call(tmp_path: Path) -> None:
    value = torch.ones(3)
    save_state(tmp_path / "a", {"value": value}, META)
    loaded, _ = load_state(tmp_path / "a")
    save_state(tmp_path / "a", {"value": value * 2}, META)  # a file still mapped could not be replaced
    assert torch.equal(loaded["value"], value)


def test_a_partial_file_of_a_killed_run_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"value": torch.ones(2)}, META)
    left = tmp_path / ".state.0123abcd.part.safetensors"
    left.write_bytes(b"\x99" * 1000)
    os.utime(left, (0, 0))  # long ago
    assert torch.equal(load_state(path)[0]["value"], torch.ones(2))
    save_state(path, {"value": torch.zeros(2)}, META)
    assert torch.equal(load_state(path)[0]["value"], torch.zeros(2))
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["std_rt.training.run.checkpoint.save_file", "os.fsync", "os.replace"])
def test_on_a_full_disk_the_last_good_checkpoint_stands(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"value": torch.ones(2)}, META)
    good = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(where, _full)
        with pytest.raises(RecipeError) as caught:
            save_state(path, {"value": torch.zeros(2)}, META)
    message = str(caught.value)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    assert "No space left" in message
    assert "disk may be full" in message
    assert f"the previous checkpoint, {path}, is intact" in message
    assert "\n" not in message


def test_the_message_names_the_checkpoint_that_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "000100"
    before.mkdir()
    monkeypatch.setattr("os.fsync", _full)
    with pytest.raises(RecipeError, match=r"000100, is intact"):
        save_state(tmp_path / "000200" / "state.safetensors", _tensors(), META, last_good=before)
    with pytest.raises(RecipeError, match="the previous file is intact"):
        save_state(tmp_path / "000200" / "state.safetensors", _tensors(), META)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"^[^\n]*cannot be written: Not a dir[^\n]*$"):
        save_state(tmp_path / "file" / "run" / "state.safetensors", _tensors(), META)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is unwritable for root")
def test_a_read_only_folder_keeps_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, _tensors(), META)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RecipeError, match="Permission denied"):
            save_state(path, {}, META)
    finally:
        tmp_path.chmod(0o700)
    _same(load_state(path)[0], _tensors())


def _truncated(path: Path) -> None:
    save_state(path, _tensors(), META)
    path.write_bytes(path.read_bytes()[:-10])


def _noted(notes: dict[str, str] | None) -> Callable[[Path], None]:
    return lambda path: save_file({"weight": torch.ones(2)}, path, notes)


DAMAGED: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(300)),
    "truncated": _truncated,
    "folder": lambda path: path.mkdir(),
    "foreign without notes": _noted(None),
    "foreign with notes": _noted({"format": "pt"}),
    "notes that are no JSON": _noted({"std_rt_state": '{"step": 1'}),
    "notes that are no table": _noted({"std_rt_state": "[1, 2]"}),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_is_no_state_says_to_delete_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    DAMAGED[kind](path)
    with pytest.raises(
        RecipeError, match=r"^checkpoint [^\n]*state\.safetensors[^\n]*delete it to start over$"
    ):
        load_state(path)


def test_a_missing_file_is_not_to_be_deleted(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^no checkpoint [^\n]*none\.safetensors"):
        load_state(tmp_path / "none.safetensors")


def test_unpacking_names_the_file_and_lets_other_errors_through() -> None:
    lacking = r"run\.safetensors belongs to another run \(KeyError: 'step'\)"
    with pytest.raises(RecipeError, match=lacking), unpacking(Path("run.safetensors")):
        _ = {}["step"]
    with pytest.raises(RecipeError, match=r"^mine$"), unpacking(Path("x")):
        raise RecipeError("mine")
    with pytest.raises(torch.OutOfMemoryError), unpacking(Path("x")):
        raise torch.OutOfMemoryError("full")


# --- optimizers -----------------------------------------------------------------------------------------


class Quantized(torch.optim.Optimizer):
    """Keeps what bitsandbytes' 8-bit optimizers keep: bytes, maps, counts and tables of them."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "name": "q"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "share": 0.1, "warm": True, "lost": None}
                    state |= {"state1": torch.zeros(p.shape, dtype=torch.uint8)}
                    state["quant"] = {"map": torch.linspace(-1, 1, 256), "level": {"absmax": torch.ones(2)}}
                state["step"] += 1
                state["share"] *= 1 / 3
                state["state1"] += (p.grad.abs() * 100).to(torch.uint8)
                state["quant"]["map"] *= 1.01
                p -= group["lr"] * state["share"] * state["step"] * (p.grad + state["state1"] * 1e-3)


def _trained(make: Any, steps: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(dtype)
    unused = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = make([{"params": [*model.parameters()]}, {"params": [unused], "lr": 0.5}])
    _train(model, optimizer, steps)
    return model, optimizer


def _train(model: nn.Module, optimizer: Any, steps: int) -> None:
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(2, 5, generator=rng).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.99)),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2),
    "momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "quantized": Quantized,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, optimizer = _trained(OPTIMIZERS[kind], 3, dtype)
    tensors, groups = flatten_optimizer("optimizer/", optimizer)
    save_state(tmp_path / "a", {**tensors, "other": torch.ones(1)}, {"groups": groups})
    loaded, meta = load_state(tmp_path / "a")

    again, fresh = _trained(OPTIMIZERS[kind], 0, dtype)
    again.load_state_dict(model.state_dict())
    restore_optimizer("optimizer/", fresh, loaded, meta["groups"])

    back, back_groups = flatten_optimizer("optimizer/", fresh)
    _same(back, tensors)
    assert back_groups == groups
    kinds = [[{k: type(v) for k, v in g.items()} for g in o.param_groups] for o in (fresh, optimizer)]
    assert kinds[0] == kinds[1]
    _train(model, optimizer, 2)
    _train(again, fresh, 2)
    _same(dict(again.state_dict()), dict(model.state_dict()))


def test_numbers_keep_their_type() -> None:
    _, optimizer = _trained(Quantized, 2)
    tensors, groups = flatten_optimizer("", optimizer)
    assert all(isinstance(value, Tensor) for value in tensors.values())
    json.dumps(groups)
    _, fresh = _trained(Quantized, 0)
    restore_optimizer("", fresh, tensors, groups)
    entry = next(iter(fresh.state.values()))
    assert (entry["step"], entry["share"], entry["warm"], entry["lost"]) == (
        2,
        0.1 * (1 / 3) * (1 / 3),
        True,
        None,
    )
    assert type(entry["step"]) is int
    assert entry["state1"].dtype == torch.uint8
    assert fresh.param_groups[0]["betas"] == (0.9, 0.99)


def test_restoring_takes_copies() -> None:
    model, optimizer = _trained(OPTIMIZERS["adamw"], 1)
    tensors, groups = flatten_optimizer("", optimizer)
    _, fresh = _trained(OPTIMIZERS["adamw"], 0)
    restore_optimizer("", fresh, tensors, groups)
    kept = {name: value.clone() for name, value in flatten_optimizer("", fresh)[0].items()}
    _train(model, optimizer, 1)
    _same(flatten_optimizer("", fresh)[0], kept)


def test_a_state_that_no_checkpoint_can_hold_is_refused() -> None:
    _, optimizer = _trained(OPTIMIZERS["sgd"], 1)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["odd"] = "text"
    with pytest.raises(TypeError, match=r"0\.odd is a str"):
        flatten_optimizer("", optimizer)
