"""State files: everything a run needs to continue, written whole or not at all.

A state file is a safetensors file whose one note is the JSON of everything else. It is written under
another name, forced to the disk and only then renamed: a kill, a full disk or a power cut leaves the
file that was there before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from std_rt.core.errors import RecipeError, one_line
from std_rt.core.files import atomic_file, writing

__all__ = ["flatten_optimizer", "load_state", "restore_optimizer", "save_state", "unpacking", "whole_file"]

# One note, not one a value: safetensors writes several in a random order, and equal runs' files would differ.
NOTE = "std_rt_state"
# Plain numbers of an optimizer's state become tensors of one entry, named so that the same type comes back.
NUMBERS = {"bool": torch.bool, "int": torch.int64, "float": torch.float64}
NOTHING = "none"
STANDING = "the previous file is intact"


def save_state(
    path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], last_good: Path | None = None
) -> None:
    """Write ``tensors`` (any device) and ``meta`` (JSON values) to ``path``; the folder is made.

    RecipeError if the disk is full or not writable. What was written before is kept: ``last_good``, which
    the message names (by default the file that ``path`` was until now).
    """
    # Copies: tensors that share memory cannot be stored, and training may go on meanwhile.
    own = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    good = last_good or path
    standing = f"the previous checkpoint, {good}, is intact" if good.exists() else STANDING
    with whole_file(path, standing) as partial:
        save_file(own, partial, {NOTE: json.dumps(meta, sort_keys=True)})


@contextmanager
def whole_file(path: Path, standing: str = STANDING) -> Iterator[Path]:
    """A partial file beside ``path`` that is forced to the disk and takes its name when the block ends well.

    RecipeError if the disk is full or not writable; ``standing`` says what is left then.
    """
    with writing(path, RecipeError, "choose another output"):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(path, durable=True) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        room = ""
        with suppress(OSError):
            room = f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MB free)"
        raise RecipeError(
            f"{path} could not be written: {one_line(error, 200)}; the disk may be full or not "
            f"writable{room}, {standing}; free some room and run the same command again to continue"
        ) from None


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and meta of a state file.

    RecipeError if it is missing, damaged or foreign.
    """
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            # Copies: the file stays mapped as long as its own tensors live, and Windows would not replace it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        meta = json.loads(notes[NOTE])
        if not isinstance(meta, dict):
            raise ValueError("its note is not a table")
    except FileNotFoundError:
        raise RecipeError(f"no checkpoint {path}; start the run with std-rt train") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RecipeError(
            f"checkpoint {path} cannot be read ({one_line(error, 200)}); delete it to start over"
        ) from None
    return tensors, meta


@contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """Around code that reads a loaded state: whatever is missing or does not fit becomes a RecipeError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # nothing is wrong with the file
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"checkpoint {path} belongs to another run ({type(error).__name__}: {one_line(error, 200)}); "
            "delete it to start over"
        ) from None


# --- optimizers -----------------------------------------------------------------------------------------


def flatten_optimizer(
    prefix: str, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as tensors ``<prefix><parameter>.<key>``, and its groups (JSON values).

    The tensors are the optimizer's own, not copies. A state may hold tensors, numbers, None and
    dictionaries of them (bitsandbytes' 8-bit ones do); TypeError for anything else.
    """
    state = optimizer.state_dict()
    leaves = (leaf for index, entry in state["state"].items() for leaf in _leaves(f"{prefix}{index}.", entry))
    return dict(leaves), state["param_groups"]


def _leaves(prefix: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in entry.items():
        name, kind = f"{prefix}{key}", type(value).__name__
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _leaves(f"{name}/", value)
        elif value is None:
            yield f"{name}:{NOTHING}", torch.empty(0)
        elif kind in NUMBERS:
            yield f"{name}:{kind}", torch.tensor(value, dtype=NUMBERS[kind])
        else:
            raise TypeError(f"optimizer state {name} is a {kind}, which a checkpoint cannot hold")


def restore_optimizer(
    prefix: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Undo ``flatten_optimizer``, bit for bit; other names in ``tensors`` are left alone.

    Raises ValueError, KeyError or TypeError if the state is another optimizer's (see ``unpacking``).
    """
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            index, _, key = name.removeprefix(prefix).partition(".")
            _put(state.setdefault(int(index), {}), key, value)
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for group, old in zip(optimizer.param_groups, before, strict=True):
        for key in group.keys() & old.keys():
            if isinstance(old[key], tuple):  # JSON knows lists only
                group[key] = tuple(group[key])
    _undo_casts(optimizer, state, [index for group in groups for index in group["params"]])


def _put(entry: dict[str, Any], key: str, value: Tensor) -> None:
    *tables, last = key.split("/")
    for table in tables:
        entry = entry.setdefault(table, {})
    name, _, kind = last.partition(":")
    entry[name] = None if kind == NOTHING else value.item() if kind else value.clone()


def _undo_casts(
    optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]], ids: Iterable[int]
) -> None:
    """Restore the type of tensors that torch's ``load_state_dict`` cast to their parameter's."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(ids, parameters, strict=True):
        _undo_cast(optimizer.state.get(parameter, {}), state.get(index, {}))


def _undo_cast(held: dict[str, Any], stored: Mapping[str, Any]) -> None:
    for key, value in stored.items():
        now = held.get(key)
        if isinstance(value, Mapping) and isinstance(now, dict):
            _undo_cast(now, value)
        elif isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
            held[key] = value.to(now.device)
