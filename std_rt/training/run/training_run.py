"""The run that every training stage goes through: folder, resuming, steps, log, checkpoints.

The same call continues where the last one stopped, and a run that was killed and resumed equals an unbroken
one, bit for bit on the CPU (nearly so if compiled): a stage registers every tensor that training changes and
every source of randomness. ``checkpoints/000300/`` holds one file that all processes share (weights,
averages, optimizers) and one of each process (random states, trajectory bank, place in the data). A file
named ``newest`` says which folder is whole; it is replaced last, so a half-written folder is never read. One
process at a time trains in a folder, and Ctrl-C has it write a checkpoint first.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from std_rt.core.errors import RecipeError
from std_rt.core.files import alone, remove_partials
from std_rt.core.signals import interruptible
from std_rt.training.run.checkpoint import (
    flatten_optimizer,
    load_state,
    restore_optimizer,
    save_state,
    unpacking,
    whole_file,
)
from std_rt.training.run.muon import Muon
from std_rt.training.run.recipe import as_dict, check_same_run
from std_rt.training.run.report import Report, Stopwatch

__all__ = [
    "ModuleRun",
    "Run",
    "cosine_rate",
    "linear_rate",
    "newest_checkpoint",
    "random_state",
    "restore_random_state",
]

_UNLOGGED = "unlogged/"  # losses since the last line of the log, in a checkpoint between two lines

State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and JSON values


class Stateful(Protocol):
    """The part of a run's state that differs by process."""

    def state(self) -> State: ...
    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None: ...


def random_state(rng: np.random.Generator, generator: torch.Generator) -> State:
    """Both random states, for a checkpoint."""
    return {"generator": generator.get_state()}, {"rng": rng.bit_generator.state}


def restore_random_state(
    rng: np.random.Generator, generator: torch.Generator, tensors: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """The reverse of `random_state`, in place."""
    generator.set_state(tensors["generator"])
    rng.bit_generator.state = meta["rng"]


class OneProcess:
    """The part of Accelerate's ``Accelerator`` that a run uses, for stages that train in one process."""

    process_index, num_processes, is_main_process = 0, 1, True
    device = torch.device("cpu")

    def wait_for_everyone(self) -> None: ...

    def gather(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, how: str) -> Tensor:
        return value


def newest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of the run in ``folder``, which has the number of its step as its name."""
    pointer = folder / "checkpoints" / "newest"
    return pointer.with_name(pointer.read_text(encoding="utf-8").strip()) if pointer.exists() else None


class Run:
    """A resumable run in ``config.output``.

    ``parts``: modules or named tensors that training changes. ``optimizers``: the first one gets the learning
    rate of `steps`, the others theirs in the proportion that they come with. ``own``: the state of this
    process alone. ``accelerator``: Accelerate's, or one process. ``scalers``: torch's of gradients in fp16;
    None where there is none.
    Raises RecipeError if the folder cannot be written or holds another run.
    """

    def __init__(
        self,
        config: Any,
        parts: Mapping[str, nn.Module | Mapping[str, Tensor]],
        optimizers: Mapping[str, Any],
        own: Stateful,
        *,
        accelerator: Any = None,
        scalers: Mapping[str, Any] | None = None,
        title: str = "",
        watch: Stopwatch | None = None,
    ) -> None:
        self.config, self.parts, self.optimizers, self.own = config, parts, optimizers, own
        self.accelerator = accelerator or OneProcess()
        self.scalers = {name: scaler for name, scaler in (scalers or {}).items() if scaler is not None}
        self.watch = watch or Stopwatch()
        rates = [o.param_groups[0]["lr"] for o in optimizers.values()]  # a checkpoint's are those of its step
        self.proportions = dict(zip(optimizers, (rate / rates[0] for rate in rates), strict=True))
        self.folder = Path(config.output)
        self.checkpoints = self.folder / "checkpoints"
        self.end = config.steps
        self.seen = 0  # samples since the last line of the log
        self.histogram: Callable[[], Any] = lambda: None  # counts to show beside the losses
        self._losses: dict[str, list[Tensor]] = {}
        self._held = ExitStack()
        self._logged = 0
        try:
            notes = self._open_together()
            self.start = self._restore()
            self.report = Report(
                self.folder,
                total_steps=config.steps,
                title=title or config.stage,
                log_every=config.log_every,
                main=self.accelerator.is_main_process,
                resume_at=self.start,
            )
        except BaseException:
            self._held.close()
            raise
        for note in notes:
            self.report.say(note)

    def close(self) -> None:
        """End the progress bar and TensorBoard's file, and let others train in the folder; again is fine."""
        self.report.close()
        self._held.close()

    def _open_together(self) -> list[str]:
        """`_open_folder` in every process; if one is refused, all are, for they would wait for it."""
        notes, refused = list[str](), None
        try:
            notes = self._open_folder()
        except RecipeError as error:
            refused = error
        failed = torch.tensor([refused is not None], device=self.accelerator.device)
        if self.accelerator.gather(failed).any():
            raise refused or RecipeError(f"another process of this run cannot use {self.folder}")
        return notes

    def _open_folder(self) -> list[str]:
        """Take the folder for this run; returns what to tell of the run that it holds."""
        if self.accelerator.is_main_process:
            # Two would overwrite each other's checkpoints and mix their logs.
            busy = f"another training runs in {self.folder}; wait for it, or choose another output"
            lock = alone(self.folder, ".std-rt-train.lock", busy, RecipeError, "choose another output")
            self._held.enter_context(lock)
        newest = newest_checkpoint(self.folder)
        done = 0 if newest is None else int(newest.name)
        changed = {} if newest is None else check_same_run(self.config, self.folder)
        if done > self.end:
            raise RecipeError(
                f"{self.folder} is at step {done} already, and only {self.end} steps were requested; "
                "request more with --max-steps, or choose another output"
            )
        if not self.accelerator.is_main_process:
            return []
        remove_partials(self.folder)
        with whole_file(self.folder / "recipe.json") as partial:
            partial.write_text(json.dumps(as_dict(self.config), indent=1), encoding="utf-8")
        if newest is None:
            was_there = (self.folder / "log.jsonl").exists()
            return [f"{self.folder} has no checkpoint: starting over, with a new log"] if was_there else []
        said = f"{self.folder} is at step {done} of {self.end}"
        return [said, *(f"{key} was {before}, is {now}" for key, (before, now) in changed.items())]

    # --- steps ------------------------------------------------------------------------------------------

    def steps(self, rate: Callable[[int], float], stop_after: int | None = None) -> Iterator[int]:
        """Step numbers still to do, each with the learning rate ``rate(step)`` set; logs every so often.

        ``stop_after`` ends after that many steps with the last due checkpoint in place, as a kill would.
        Ctrl-C or SIGTERM ends a run of one process after the step, with a checkpoint, by KeyboardInterrupt.
        Several processes would have to agree on a step: they end at once, without.
        """
        self.end = min(self.config.steps, stop_after or self.config.steps)
        names = ("SIGINT", "SIGTERM", "SIGHUP") if self.accelerator.num_processes == 1 else ()
        with interruptible(*names, on_request=self._say_stopping) as interrupted:
            yield from self._steps(rate, interrupted)

    def _say_stopping(self) -> None:
        self.report.say("stopping after this step (press Ctrl-C again to stop now and lose unsaved steps)")

    def _steps(self, rate: Callable[[int], float], interrupted: Callable[[], bool]) -> Iterator[int]:
        self.report.begin(self.start)
        try:
            for step in range(self.start, self.end):
                self.rate = rate(step)
                for name, optimizer in self.optimizers.items():
                    for group in optimizer.param_groups:
                        group["lr"] = self.rate * self.proportions[name]
                self.watch.start()
                yield step
                self.report.advance(step + 1)
                saved = self.due(step)
                if not saved and (step + 1) % self.config.log_every == 0:
                    self._log(step + 1, {})
                if interrupted() and step + 1 < self.end:
                    if not saved:
                        self._means(step + 1)  # raises before what is not finite replaces a good checkpoint
                        self._write(step + 1)
                    raise KeyboardInterrupt
        finally:
            self.report.close()

    def add(self, **losses: Tensor) -> None:
        """Note losses for the next line of the log; they stay on their device until then."""
        for name, value in losses.items():
            self._losses.setdefault(name, []).append(value.detach().float())

    def due(self, step: int) -> bool:
        """The step is done: whether a checkpoint and a sheet are due after it."""
        self.watch.stop()
        return (step + 1) % self.config.snapshot_every == 0 or step + 1 == self.config.steps

    def sheet(self, step: int) -> Path:
        """File of the sheet after this step."""
        return self.folder / "sheets" / f"{step + 1:06d}.png"

    def save(self, step: int, **figures: float) -> None:
        """Write a line of the log (with ``figures``), the checkpoint and the curves.

        RecipeError if a loss is not a number or the disk is full; the last good checkpoint is intact.
        """
        self._log(step + 1, figures)
        self._write(step + 1)
        self.report.curves()
        self.report.histogram()

    def _log(self, done: int, figures: dict[str, float]) -> None:
        values = self._means(done)
        self.report.log(done, values | figures | {"learning_rate": self.rate})
        images = self.seen // max(1, done - self._logged)
        self.report.timing(done, self.watch.summary(images_per_step=images))
        self.report.progress(done, values, histogram=self.histogram())
        self.seen, self._logged, self._losses = 0, done, {}

    def _means(self, done: int) -> dict[str, float]:
        """Means over steps and processes; RecipeError names the first step with a wrong one."""
        stacked = self._stacked()
        means = {name: float(self.accelerator.reduce(v.mean(), "mean").item()) for name, v in stacked.items()}
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        if wrong:
            self.report.close()
            raise RecipeError(self._not_a_number(wrong[0], stacked[wrong[0]], done))
        return means

    def _stacked(self) -> dict[str, Tensor]:
        """The losses since the last line; after resuming, the first of them are on the CPU."""
        return {name: torch.stack([v.to(of[-1].device) for v in of]) for name, of in self._losses.items()}

    def _not_a_number(self, name: str, values: Tensor, done: int) -> str:
        bad = (~values.isfinite()).nonzero()
        per_step = 1 if name == "gradient" else getattr(self.config, "accumulate", 1)
        back = 0 if not len(bad) else (len(values) - 1 - int(bad[0])) // per_step
        narrow = "precision = 'fp32'" if hasattr(self.config, "precision") else "bf16 = false"
        return (
            f"the {name} is not a number at step {done - back}; lower learning_rate or set {narrow}, "
            "then run the same command to continue from the last checkpoint"
        )

    # --- checkpoints ------------------------------------------------------------------------------------

    def _write(self, done: int) -> None:
        """On an error the last good checkpoint is intact, and the error says so."""
        target = self.checkpoints / f"{done:06d}"
        standing = newest_checkpoint(self.folder) or self.checkpoints
        save_state(target / f"rank{self.accelerator.process_index}.safetensors", *self.own.state(), standing)
        if self.accelerator.is_main_process:
            save_state(target / "shared.safetensors", *self._shared(done), standing)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._publish(target)

    def _publish(self, target: Path) -> None:
        with whole_file(self.checkpoints / "newest", "the previous checkpoint is intact") as partial:
            partial.write_text(target.name, encoding="utf-8")
        for old in self.checkpoints.iterdir():
            if old.is_dir() and old != target:
                shutil.rmtree(old)

    def _shared(self, done: int) -> State:
        tensors = {f"{part}/{name}": v for part, live in self._live() for name, v in live.items()}
        # Of this process; between two lines only a run of one process writes a checkpoint.
        tensors |= {f"{_UNLOGGED}{name}": values for name, values in self._stacked().items()}
        groups = {}
        for name, optimizer in self.optimizers.items():
            flat, groups[name] = flatten_optimizer(f"{name}_optimizer", optimizer)
            tensors |= flat
        scales = {name: scaler.state_dict() for name, scaler in self.scalers.items()}
        world = self.accelerator.num_processes
        logged = {"logged": self._logged, "seen": self.seen}
        return tensors, {"step": done, "world": world, "groups": groups, "scalers": scales} | logged

    def _live(self) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        for name, part in self.parts.items():
            yield name, part.state_dict() if isinstance(part, nn.Module) else part

    def _restore(self) -> int:
        """Load the newest checkpoint; returns its step, 0 if there is none."""
        folder = newest_checkpoint(self.folder)
        self._check_together(folder)
        if folder is None:
            return 0
        shared = folder / "shared.safetensors"
        if not folder.exists():
            raise RecipeError(f"the checkpoint {folder} is gone; delete {self.checkpoints} to start over")
        tensors, meta = load_state(shared)
        with unpacking(shared):
            if meta["world"] != self.accelerator.num_processes:
                raise RecipeError(
                    f"{self.folder} was trained by {meta['world']} processes, now there are "
                    f"{self.accelerator.num_processes}; start as many, or choose another output"
                )
            with torch.no_grad():
                for part, live in self._live():
                    for name, value in live.items():
                        value.copy_(tensors[f"{part}/{name}"])
            for name, optimizer in self.optimizers.items():
                restore_optimizer(f"{name}_optimizer", optimizer, tensors, meta["groups"][name])
            for name, state in meta.get("scalers", {}).items():
                if name in self.scalers and state:
                    self.scalers[name].load_state_dict(state)
            self._logged, self.seen = meta.get("logged", meta["step"]), meta.get("seen", 0)
            self._losses = {
                name.removeprefix(_UNLOGGED): [*value]
                for name, value in tensors.items()
                if name.startswith(_UNLOGGED)
            }
        own = folder / f"rank{self.accelerator.process_index}.safetensors"
        state = load_state(own)
        with unpacking(own):
            self.own.restore(*state)
        return int(meta["step"])

    def _check_together(self, folder: Path | None) -> None:
        """Every process must see the same checkpoint, or they would train different weights."""
        step = torch.tensor([0 if folder is None else int(folder.name)], device=self.accelerator.device)
        steps = set(self.accelerator.gather(step).tolist())
        if len(steps) > 1:
            raise RecipeError(
                f"processes would continue from different steps {sorted(steps)} of {self.folder}; "
                "the output must be one folder that all nodes share"
            )


class ModuleRun(Run):
    """A run that trains whole modules with AdamW in one process, those ``by_muon`` with Muon.

    ``slower``: parameters that learn at a sixth of the rate.

    Everything random must come from ``rng`` and ``generator``, which are part of the checkpoint.
    """

    def __init__(
        self,
        config: Any,
        modules: Mapping[str, nn.Module | Mapping[str, Tensor]],
        parameters: list[nn.Parameter],
        weight_decay: float,
        by_muon: Sequence[nn.Parameter] = (),
        slower: Sequence[nn.Parameter] = (),
    ) -> None:
        self.parameters = parameters
        self.rng = np.random.default_rng(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        rate, others = config.learning_rate, {id(p) for p in (*by_muon, *slower)}
        rest = [p for p in parameters if id(p) not in others]
        optimizers: dict[str, torch.optim.Optimizer] = {
            "main": torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay)
        }
        if slower:
            optimizers["slower"] = torch.optim.AdamW(
                slower, lr=rate / 6, betas=(0.9, 0.99), weight_decay=weight_decay
            )
        if by_muon:
            optimizers["muon"] = Muon(by_muon, lr=rate, weight_decay=weight_decay)
        super().__init__(config, modules, optimizers, self)

    def update(self, loss: Tensor, samples: int) -> None:
        """One optimizer step."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.add(loss=loss, gradient=norm)
        self.seen += samples

    def state(self) -> State:
        """The random states."""
        return random_state(self.rng, self.generator)

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """The reverse of `state`."""
        restore_random_state(self.rng, self.generator, tensors, meta)


def cosine_rate(base: float, step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up, then a cosine from ``base`` to ``floor * base``."""
    late = max(0.0, step - warmup) / max(1.0, steps - warmup)
    warm = min(1.0, (step + 1) / max(1, warmup))
    return base * warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * late)))


def linear_rate(base: float, step: int, steps: int, warmup: int, cooldown: int) -> float:
    """Linear warm-up, ``base``, and over the last ``cooldown`` steps a straight line to nothing."""
    return base * min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, cooldown))
