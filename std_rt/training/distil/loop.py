"""The distillation stage: a few-step LoRA of a base, by STD, TCD, LCM, PCM, MCM or DMD, of pictures or clips.

Single Trajectory Distillation: arXiv 2412.18945. Several processes go through Accelerate; each has its own
data, noise and bank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from std_rt.core.errors import RecipeError, one_line
from std_rt.models.perceptual import load_perceptual
from std_rt.models.style_encoder import StyleEncoder
from std_rt.training.distil.base import Base, load_base
from std_rt.training.distil.discriminator import Adversary
from std_rt.training.distil.distiller import Distiller, Source, StepBatch
from std_rt.training.distil.features import (
    DinoFeatures,
    Features,
    PerceptualFeatures,
    StyleFeatures,
    load_dino,
)
from std_rt.training.distil.lora import Average, add_lora, lora_parameters, make_notes, save_lora
from std_rt.training.distil.matching import Matching
from std_rt.training.distil.sampling import SheetMaker
from std_rt.training.run.precision import DTYPES, attention_kernels, resolve_precision
from std_rt.training.run.recipe import DistilConfig, describe_rates, distil_tau, learning_rates
from std_rt.training.run.report import Stopwatch
from std_rt.training.run.training_run import Run, cosine_rate
from std_rt.training.tiny.triplets import TripletSource

__all__ = ["train_distil"]

_SCORE_SCALE = 2.0**12  # of the loss of DMD's second LoRA in fp16, at first


@contextmanager
def _accelerator(config: DistilConfig) -> Iterator[Accelerator]:
    """Accelerate for one run; its global state is reset after, so that one process can train twice."""
    # bf16 needs no gradient scaler and is switched on around the networks only (distiller.py).
    device = PartialState().device.type
    precision = resolve_precision(config.precision, device)
    if precision == "fp16" and device == "cpu":
        raise RecipeError("precision = 'fp16' needs a GPU, and there is none; set precision = 'auto'")
    mixed = "fp16" if precision == "fp16" else "no"
    try:
        yield Accelerator(mixed_precision=mixed, gradient_accumulation_steps=config.accumulate)
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()


def _base_dtype(config: DistilConfig, device: torch.device) -> torch.dtype:
    """Of the UNet's weights; on the CPU autocast casts them."""
    if device.type == "cpu":
        return torch.float32
    return DTYPES[resolve_precision(config.precision, device.type)]


def _optimizer(config: DistilConfig, parameters: list[torch.nn.Parameter], rate: float) -> Any:
    options: dict[str, Any] = {"lr": rate, "betas": (0.9, 0.999), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise RecipeError(
            "optimizer = 'adamw8bit' needs bitsandbytes: pip install bitsandbytes, or --set optimizer=adamw"
        ) from None
    return AdamW8bit(parameters, **options)


def _features(config: DistilConfig, base: Base) -> Features:
    chosen = config.adversarial
    if chosen.features == "style":
        if base.style_encoder is None:
            raise RecipeError("adversarial.features = 'style' needs a base with a style encoder; use dinov2")
        return StyleFeatures(base.style_encoder)
    if chosen.features == "perceptual":
        return PerceptualFeatures(load_perceptual(chosen.perceptual), base.decode)
    return DinoFeatures(load_dino(chosen.dino), base.decode, chosen.blocks, chosen.size_px)


def _source(config: DistilConfig, base: Base, rank: int, world: int) -> Source:
    if config.pictures.folder:
        from std_rt.training.data.picture_source import PictureSource

        pictures = PictureSource(
            config.pictures, base, seed=config.seed, rank=rank, world=world, style=config.style
        )
        if config.style.precompute:
            pictures.precompute_styles()
        return pictures
    if not isinstance(base.style_encoder, StyleEncoder):
        raise RecipeError(
            "triplets.folder needs a std-tiny, with its style encoder; set pictures.folder instead"
        )
    return TripletSource(config.triplets, base, config.seed, rank, world)


def lora_notes(config: DistilConfig, base: Base, step: int) -> dict[str, str]:
    """Metadata of this run's LoRA; ``std-rt export --lora`` reads its schedule from it."""
    return make_notes(
        method=config.method,
        eta=config.eta,
        tau=distil_tau(config),
        run_steps=config.run_steps,
        guidance=config.guidance,
        base=base.name,
        base_digest=base.digest,
        step=step,
        seed=config.seed,
        adapter=base.adapter,
        motion=base.motion,
    )


def write_card(folder: Path, config: DistilConfig, base: Base) -> None:
    """A model card beside the LoRA; its licence is the base's, from which it is derived."""
    licence = f"license: {base.licence}\n" if base.licence else ""
    front = f"{licence}base_model: {base.name}\nlibrary_name: diffusers\ntags: [lora, {config.method}]"
    steps = ", ".join(map(str, config.run_steps))
    text = (
        f"---\n{front}\n---\n"
        f"A few-step LoRA of {base.name}, distilled by {config.method.upper()} with std-rt: "
        f"eta {config.eta:g}, start at timestep {distil_tau(config)}, {steps} steps.\n"
        "Its own notes (schedule, guidance, base) are in the file's metadata.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _rate(config: DistilConfig, highest: float, step: int) -> float:
    if config.rate_schedule == "constant":
        return highest * min(1.0, (step + 1) / max(1, config.warmup))
    return cosine_rate(highest, step, config.steps, config.warmup, floor=0.0)


def train_distil(config: DistilConfig, stop_after: int | None = None, base: Base | None = None) -> Path:
    """Start or continue a distillation; returns the LoRA file of the averaged student.

    ``stop_after`` ends the call after that many optimizer steps with the last due checkpoint standing, as
    a kill would. ``base``: instead of loading ``config.base``. Raises RecipeError, also if the GPU's memory
    does not suffice.
    """
    with (
        _accelerator(config) as accelerator,
        attention_kernels(accelerator.device.type),
        ExitStack() as stack,
    ):
        device = accelerator.device
        dtype = _base_dtype(config, device)
        try:
            base = base or load_base(config.base, dtype, device, config.style, config.motion)
            with _compiling() if config.compile else nullcontext():
                return _train(config, accelerator, base, stop_after, stack)
        except torch.OutOfMemoryError as error:
            raise RecipeError(_no_room(config, error)) from error


@contextmanager
def _compiling() -> Iterator[None]:
    """Around a run with compiled blocks: RecipeError if they cannot be compiled."""
    try:
        # After 8 forms of one function, torch would go on without compiling: see `Base.compile`.
        with torch._dynamo.config.patch(recompile_limit=64):
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            raise error.__cause__ from error
        raise RecipeError(
            f"compile = true does not work here ({one_line(error, 200)}); continue with "
            "--set compile=false, or install a C++ compiler (on CUDA Triton, too)"
        ) from error


def _no_room(config: DistilConfig, error: torch.OutOfMemoryError) -> str:
    """What saves memory: of the run as it is, and of another one."""
    saves = [] if config.gradient_checkpointing or config.method == "dmd" else ["gradient_checkpointing=true"]
    uses_bank = config.method == "std" and config.bank.enabled
    saves += ["bank.device=cpu"] if uses_bank and config.bank.device == "auto" else []
    first = f"continue with {' '.join(f'--set {each}' for each in saves)}, or start" if saves else "start"
    told = ". ".join(one_line(error, 500).split(". ")[:2])
    return (
        f"the GPU ran out of memory ({told}); {first} another run with a smaller batch and a larger "
        "accumulate to match, --set optimizer=adamw8bit or a smaller pictures.resolution_px "
        "(--dry-run estimates the memory)"
    )


class _Game:
    """The discriminator in a run: its part of the student's loss, and its own step on the same pictures."""

    def __init__(
        self, config: DistilConfig, base: Base, accelerator: Accelerator, rate: float, distiller: Distiller
    ) -> None:
        self.config, self.base, self.accelerator, self.distiller = config, base, accelerator, distiller
        torch.manual_seed(config.seed)
        self.adversary = Adversary(_features(config, base), base.heads_dim).to(accelerator.device)
        self.optimizer = _optimizer(config, list(self.adversary.heads.parameters()), rate)
        # Its optimizer steps by itself: the heads are fp32, and fp16's gradient scaler is the student's.
        self.heads = accelerator.prepare(self.adversary.heads)

    def fooled(self, x_s: Tensor, batch: StepBatch) -> Tensor:
        """The student's loss, a scalar; the heads are frozen in it. What they saw is kept for `step`."""
        self.batch, self.fake = batch, batch.shown(x_s)
        self.condition = batch.per_picture(self.base.heads_condition(batch.states.cond))
        self.pair = batch.per_picture(batch.pair)
        with self.distiller.watch("adversarial"), self.distiller.judging():
            self.maps = self.adversary.features(self.fake)  # decoded and encoded once, for both networks
            loss = self.adversary.generator_loss(self.fake, self.condition, self.pair, self.maps)
        return batch.judged_share * loss

    def step(self) -> dict[str, Tensor]:
        """The discriminator's turn, and what to log of it; its gradients are cleared after its step."""
        with self.distiller.watch("adversarial"):
            with self.distiller.judging():
                judged, parts = self.adversary.discriminator_loss(
                    self.heads,
                    self.fake.detach(),
                    self.batch.shown(self.batch.real),
                    self.condition,
                    self.pair,
                    self.config.adversarial.r1,
                    [m.detach() for m in self.maps],
                )
            # Not in there: autocast would take the fp32 heads' gradients in half precision (1 % off in bf16).
            judged = self.batch.judged_share * judged
            (judged / self.config.accumulate).backward()
            if self.accelerator.sync_gradients:
                self.optimizer.step()
                self.optimizer.zero_grad()
        return parts | {"discriminator": judged}


class _Score:
    """DMD's second LoRA in a run; outside of DDP, which knows the student's alone.

    ``scaler``: its own, as the student's of Accelerate knows only the student; idle but in fp16.
    """

    def __init__(
        self, config: DistilConfig, matching: Matching, accelerator: Accelerator, rate: float
    ) -> None:
        self.accelerator, self.matching, self.share = accelerator, matching, 1 / config.accumulate
        self.scaler = torch.amp.GradScaler(
            accelerator.device.type, init_scale=_SCORE_SCALE, enabled=accelerator.scaler is not None
        )
        self.optimizer = _optimizer(config, [*matching.tensors.values()], rate * config.score_rate)

    def step(self, x_s: Tensor, batch: StepBatch) -> Tensor:
        """Its turn on the student's results; the loss, a scalar."""
        loss = self.matching.score_loss(x_s, batch.states)
        with self.matching.distiller.watch("score"):
            self.scaler.scale(self.share * loss).backward()
            if self.accelerator.sync_gradients:
                # Before the scaler looks at them, so that every process skips the same steps.
                for value in self.matching.tensors.values():
                    value.grad = self.accelerator.reduce(value.grad, "mean")
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
        return loss


# One long function, to be read from top to bottom.
def _train(  # noqa: C901
    config: DistilConfig, accelerator: Accelerator, base: Base, stop_after: int | None, stack: ExitStack
) -> Path:
    device, main = accelerator.device, accelerator.is_main_process
    if str(accelerator.distributed_type).endswith(("FSDP", "DEEPSPEED")):
        raise RecipeError(
            "FSDP and DeepSpeed shard the LoRA, whose average and file need it whole; "
            "use plain data parallelism: accelerate launch --multi_gpu -m std_rt train RECIPE"
        )

    # --- networks: one UNet holds teacher (LoRA off), student (LoRA on) and averaged student ---------
    base.to(device)
    if base.unet.dtype != (dtype := _base_dtype(config, device)):
        base.unet.to(dtype)  # the autoencoder stays in fp32: SDXL's overflows in fp16
    add_lora(base.unet, config.lora, config.seed)
    if config.gradient_checkpointing:
        base.checkpoint()
    if config.compile:
        base.compile()
    parameters = lora_parameters(base.unet)
    average = Average(parameters)
    watch = Stopwatch(device)
    rank, world = accelerator.process_index, accelerator.num_processes
    source = stack.enter_context(closing(_source(config, base, rank, world)))
    distiller = Distiller(config, base, source, average, device=str(device), rank=rank, watch=watch)
    student_rate, heads_rate = learning_rates(config, world)
    clips = distiller.representation
    motion_head = None if clips is None else clips.head  # learns with the student, and is not exported
    trained = [*parameters.values(), *([] if motion_head is None else motion_head.parameters())]
    optimizer = _optimizer(config, trained, student_rate)
    student, optimizer = accelerator.prepare(base.unet, optimizer)
    compare = None if motion_head is None else accelerator.prepare(motion_head)

    # --- what the recipe has besides, each with an optimizer of its own ----------------------------------
    game = _Game(config, base, accelerator, heads_rate, distiller) if config.adversarial.weight else None
    matching = distiller.matching
    score = None if matching is None else _Score(config, matching, accelerator, student_rate)

    # --- resume ------------------------------------------------------------------------------------------
    parts: dict[str, Any] = {"lora": parameters, "average": average.tensors}
    optimizers = {"student": optimizer}
    if clips is not None and motion_head is not None and clips.average is not None:
        parts |= {"motion_head": motion_head, "motion_head_average": clips.average.tensors}
    if game is not None:
        parts["heads"], optimizers["heads"] = game.adversary.heads, game.optimizer
    if score is not None:
        parts["score"], optimizers["score"] = score.matching.tensors, score.optimizer
    run = Run(
        config,
        parts,
        optimizers,
        distiller,
        accelerator=accelerator,
        scalers={"student": accelerator.scaler, "score": score and score.scaler},
        title=f"{config.method} of {base.name}",
        watch=watch,
    )
    stack.callback(run.close)
    run.report.say(describe_rates(config, world))
    run.histogram = lambda: distiller.bank.visits[: distiller.levels.tau_index + 1]
    sheets = SheetMaker(config, base, distiller) if main else None
    if run.start == 0 and distiller.uses_bank and config.bank.spread:
        distiller.spread_bank(run.report.say)
    if config.style.precompute:
        base.release_style_encoder()

    for step in run.steps(partial(_rate, config, student_rate), stop_after):
        for _ in range(config.accumulate):
            batch = distiller.draw()
            playing = game if step >= config.adversarial.start_step else None
            learning = (student, compare, None if game is None else game.heads)
            with accelerator.accumulate(*(part for part in learning if part is not None)):
                x_s = distiller.student_jump(student, batch.states, batch.s)
                loss = distiller.consistency_loss(x_s, batch, compare)
                run.add(consistency=loss)
                if playing is not None:
                    fooled = playing.fooled(x_s, batch)
                    loss = loss + config.adversarial.weight * fooled
                    run.add(generator=fooled)
                with watch("student"):
                    accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm)
                    # fp16 overflows now and then by design; such a step is skipped, not an error.
                    run.add(gradient=norm if accelerator.scaler is None else norm.nan_to_num(0, 0, 0))
                with watch("optimizer"):
                    optimizer.step()
                    optimizer.zero_grad()
                if score is not None:
                    run.add(score=score.step(x_s, batch))
                if playing is not None:
                    run.add(**playing.step())
        with watch("optimizer"):
            if not optimizer.step_was_skipped:  # fp16: the scaler found an overflow and halves its scale
                average.update(config.ema_decay)
                if clips is not None:
                    clips.update()
        run.seen += config.batch * config.accumulate * world
        if run.due(step):
            run.save(step)
            if main:
                lora = run.folder / "loras" / f"{step + 1:06d}.safetensors"
                save_lora(lora, average.tensors, lora_notes(config, base, step + 1), config.lora)
                if sheets is not None and sheets.make(run.sheet(step)):
                    run.report.sheet(step + 1, run.sheet(step))
            accelerator.wait_for_everyone()

    final = run.folder / "lora.safetensors"
    if run.end == config.steps and main:
        save_lora(final, average.tensors, lora_notes(config, base, config.steps), config.lora)
        write_card(run.folder, config, base)
    return final
