"""Whole distillation steps, done again by hand: a network whose output is a known function, float64, the
LoRA merged into the weights, and every formula written out from the method instead of imported.

What training draws (states, targets, noise) is taken from it and checked; what it computes is not taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from math import cos, pi, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file
from support.distil_runs import read_checkpoint
from torch import Tensor, nn

from std_rt.core.schedule import NoiseSchedule
from std_rt.training.distil import loop
from std_rt.training.distil.base import Base, Conditioning, Fresh, cat
from std_rt.training.distil.discriminator import Adversary, Heads
from std_rt.training.distil.distiller import Distiller, StepBatch
from std_rt.training.distil.loop import train_distil
from std_rt.training.distil.lora import Average, add_lora, lora_parameters
from std_rt.training.run.recipe import AdversarialConfig, BankConfig, DistilConfig, LoraConfig

C, SIDE, DIM, POOLED, MAPS = 3, 4, 5, 6, 8
SHAPE = (SIDE, SIDE)
SCALING, SHIFT = 0.5, 0.1
Lora = dict[str, Tensor]


def _values(*shape: int, seed: int) -> Tensor:
    """Fixed normal numbers; not torch's, whose draws a test listens to."""
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape), dtype=torch.float32)


# --- the networks of the run ----------------------------------------------------------------------------


class Network(nn.Module):
    """``tanh(conv1(x) + to_q(words) + pooled + sizes) (0.5 + t / 100)``, with content and tokens if asked."""

    def __init__(self, sees_content: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2 * C if sees_content else C, C, 3, padding=1)
        self.to_q = nn.Linear(DIM, C)
        for seed, value in enumerate(self.parameters()):
            value.data = 0.4 * _values(*value.shape, seed=seed)
        self.config = SimpleNamespace(
            in_channels=self.conv1.in_channels,
            out_channels=C,
            addition_time_embed_dim=2,
            projection_class_embeddings_input_dim=POOLED + 6 * 2,
            cross_attention_dim=DIM,
            block_out_channels=(C,),
        )
        self.dtypes: list[torch.dtype] = []  # of every evaluation

    @property
    def dtype(self) -> torch.dtype:
        """As diffusers' models have it."""
        return self.to_q.weight.dtype

    def add_adapter(self, settings: Any, name: str) -> None:
        inject_adapter_in_model(settings, self, name)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, added_cond_kwargs: dict[str, Any], return_dict: bool
    ) -> tuple[Tensor]:
        assert not return_dict
        tokens = [image[:, 0] for image in added_cond_kwargs.get("image_embeds", [])]
        hidden = self.conv1(x)
        self.dtypes.append(hidden.dtype)
        words = self.to_q(torch.cat([context, *tokens], 1)).mean(1)
        more = added_cond_kwargs["text_embeds"][:, :C] + added_cond_kwargs["time_ids"].sum(1)[:, None] / 1000
        gain = 0.5 + t.float() / 100
        return (torch.tanh(hidden + (words + more)[:, :, None, None]) * gain.view(-1, 1, 1, 1),)


class Autoencoder(nn.Module):
    """Latents <-> pictures twice as large."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_values(3, C, seed=11), requires_grad=False)
        self.config = SimpleNamespace(scaling_factor=SCALING, shift_factor=SHIFT, block_out_channels=(8, 8))

    def encode(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=images[:, :, ::2, ::2])

    def decode(self, z: Tensor) -> SimpleNamespace:
        image = torch.tanh(torch.einsum("ic,bchw->bihw", self.weight, z))
        return SimpleNamespace(sample=image.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Dino(nn.Module):
    """Patches of 2 px; block n is ``sin((n + 1) x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_values(MAPS, 3, 2, 2, seed=12) / 4)
        self.config = SimpleNamespace(num_hidden_layers=3, hidden_size=MAPS, patch_size=2)
        self.device = torch.device("cpu")

    def forward(self, pixels: Tensor, output_hidden_states: bool) -> SimpleNamespace:
        assert output_hidden_states
        patches = nn.functional.conv2d(pixels, self.weight, stride=2).flatten(2).transpose(1, 2)
        states = [torch.cat([torch.full_like(patches[:, :1], 9.0), patches], 1)]
        for n in range(3):
            states.append(torch.sin((n + 1) * states[-1]))
        return SimpleNamespace(hidden_states=states)


class Items:
    """Samples that can be told apart; target, content and real picture of each differ."""

    def __init__(self, content: bool, tokens: bool) -> None:
        self.content, self.tokens, self.taken = content, tokens, 0
        self.shapes, self.weights = [SHAPE], np.ones(1)

    def item(self, number: int) -> Fresh:
        z, c, real = (_values(1, C, *SHAPE, seed=100 * number + n) for n in range(3))
        context, pooled, ids = (
            _values(1, *shape, seed=100 * number + 10 + len(shape) + shape[-1])
            for shape in ((2, DIM), (POOLED,), (6,))
        )
        tokens = _values(1, 4, DIM, seed=100 * number + 50) if self.tokens else None
        return Fresh(
            z, c, real, Conditioning(context, pooled, 100 * ids, tokens, c if self.content else None)
        )

    def take(self, n: int, shape: tuple[int, int]) -> Fresh:
        assert shape == SHAPE
        new = [self.item(self.taken + i) for i in range(n)]
        self.taken += n
        z, c, real = (torch.cat([getattr(item, name) for item in new]) for name in ("z", "c", "real"))
        return Fresh(z, c, real, cat([item.cond for item in new]))

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]

    def close(self) -> None: ...


NULL_TOKENS = _values(1, 4, DIM, seed=77)


def _base(kind: str = "epsilon", content: bool = False, tokens: bool = False) -> Base:
    schedule = replace(NoiseSchedule.scaled_linear(), prediction_type=kind)
    null = NULL_TOKENS if tokens else None
    return Base(Network(content), Autoencoder(), schedule, "known", "digest", null_tokens=null)


def _config(output: Path, **changes: Any) -> DistilConfig:
    """Three steps; every setting that a formula reads differs from its default and from 0 and 1."""
    config = DistilConfig(
        output=str(output),
        base="known",
        seed=3,
        steps=3,
        batch=2,
        accumulate=2,
        learning_rate=0.05,
        warmup=2,
        weight_decay=0.2,
        max_grad_norm=0.008,
        eta=0.1,
        run_steps=(2, 5),
        window=1.0,
        guidance=(2.0, 5.0),
        drop_conditioning=0.3,
        ema_decay=0.8,
        huber_c=0.05,
        precision="fp32",
        snapshot_every=1,
        log_every=1,
        lora=LoraConfig(rank=2, alpha=3.0, targets=("conv1", "to_q")),
        bank=BankConfig(capacity=4, spread=False),
        adversarial=AdversarialConfig(
            weight=0.7, blocks=(0, 2), size_px=2 * SIDE, learning_rate=0.005, r1=0.2, start_step=1
        ),
    )
    return replace(config, **changes)


# --- the same by hand -----------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """What the bank has to keep of one item."""

    x: Tensor
    index: int
    scale: float
    cond: Conditioning


def _network(frozen: Lora, lora: Lora, gain: float, x: Tensor, t: list[int], cond: Conditioning) -> Tensor:
    """`Network` with the LoRA merged: ``W + alpha / rank * B A``."""
    down, up = lora["conv1.lora_A"], lora["conv1.lora_B"][:, :, 0, 0]
    kernel = frozen["conv1.weight"] + gain * torch.einsum("or,rikl->oikl", up, down)
    matrix = frozen["to_q.weight"] + gain * lora["to_q.lora_B"] @ lora["to_q.lora_A"]
    if cond.content is not None:
        x = torch.cat([x, cond.content], 1)
    words = cond.context if cond.tokens is None else torch.cat([cond.context, cond.tokens], 1)
    hidden = nn.functional.conv2d(x, kernel, frozen["conv1.bias"], padding=1)
    shift = words.mean(1) @ matrix.T + frozen["to_q.bias"] + cond.pooled[:, :C]
    shift = shift + cond.time_ids.sum(1, keepdim=True) / 1000
    factor = torch.tensor([0.5 + at / 100 for at in t], dtype=x.dtype)
    return torch.tanh(hidden + shift[:, :, None, None]) * factor[:, None, None, None]


def _features(latents: Tensor, vae: Autoencoder, dino: Dino) -> list[Tensor]:
    """The maps of blocks 0 and 2 of the decoded picture, with ImageNet's statistics."""
    image = torch.tanh(torch.einsum("ic,bchw->bihw", vae.weight.double(), latents / SCALING + SHIFT))
    image = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    mean, std = (
        torch.tensor(v).double()[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    first = torch.sin(nn.functional.conv2d((image / 2 + 0.5 - mean) / std, dino.weight.double(), stride=2))
    return [first, torch.sin(3 * torch.sin(2 * first))]


class Adam:
    """AdamW (arXiv 1711.05101) with betas 0.9 and 0.999."""

    def __init__(self, values: Lora, decay: float) -> None:
        self.values, self.decay, self.count = values, decay, 0
        self.first = {name: torch.zeros_like(v) for name, v in values.items()}
        self.second = {name: torch.zeros_like(v) for name, v in values.items()}

    def step(self, gradients: Lora, rate: float) -> None:
        self.count += 1
        for name, g in gradients.items():
            self.first[name] = 0.9 * self.first[name] + 0.1 * g
            self.second[name] = 0.999 * self.second[name] + 0.001 * g * g
            m, v = self.first[name] / (1 - 0.9**self.count), self.second[name] / (1 - 0.999**self.count)
            with torch.no_grad():
                value = self.values[name]
                value.copy_(value - rate * self.decay * value - rate * m / (v.sqrt() + 1e-8))


class ByHand:
    """Student, average, discriminator and trajectories after the same draws."""

    def __init__(self, config: DistilConfig, base: Base, items: Items, heads: Heads | None) -> None:
        self.config, self.items, self.vae, self.dino = config, items, base.vae, Dino()
        self.kind = base.schedule.prediction_type
        self.frozen = {n: v.detach().double() for n, v in base.unet.named_parameters()}
        student = deepcopy(base.unet)
        add_lora(student, config.lora, config.seed)
        self.lora = {
            n.replace(".default.weight", ""): v.detach().double().requires_grad_()
            for n, v in lora_parameters(student).items()
        }
        self.average = {name: v.detach().clone() for name, v in self.lora.items()}
        self.heads = None if heads is None else heads.double()
        self.optimizer = Adam(self.lora, config.weight_decay)
        judges = {} if self.heads is None else dict(self.heads.named_parameters())
        self.judges = Adam(judges, config.weight_decay)
        kept = np.cumprod(1 - np.linspace(sqrt(0.00085), sqrt(0.012), 1000) ** 2)
        self.kept = {-1: 1.0} | {i: float(kept[20 * i + 19]) for i in range(50)}  # alpha bar
        self.top = config.tau // 20 if config.tau else int(50 * config.eta) - 1
        points = max(self.top + 1, 50 * config.eta)
        self.window = int(np.ceil(config.window * points - 1e-9))
        self.bank: dict[int, Trajectory] = {}
        self.seen = 0
        self.logs: list[dict[str, float]] = []

    def _levels(self, index: list[int]) -> tuple[Tensor, Tensor]:
        kept = torch.tensor([self.kept[i] for i in index], dtype=torch.float64)[:, None, None, None]
        return kept.sqrt(), (1 - kept).sqrt()

    def move(self, output: Tensor, x: Tensor, index: list[int], s: list[int]) -> Tensor:
        """DDIM (arXiv 2010.02502), v as in arXiv 2202.00512."""
        (alpha, sigma), (alpha_s, sigma_s) = self._levels(index), self._levels(s)
        if self.kind == "epsilon":
            clean, noise = (x - sigma * output) / alpha, output
        else:
            clean, noise = alpha * x - sigma * output, sigma * x + alpha * output
        return alpha_s * clean + sigma_s * noise

    def run(self, lora: Lora, x: Tensor, index: list[int], cond: Conditioning) -> Tensor:
        t = [20 * i + 19 if i >= 0 else 0 for i in index]
        return _network(self.frozen, lora, self.config.lora.alpha / self.config.lora.rank, x, t, cond)

    def states(self, batch: StepBatch, noise: list[Tensor]) -> list[Trajectory]:
        """Each row must be what the bank was left with, or an unused item at tau."""
        found = []
        for n, real in enumerate(batch.states.z):
            numbers = [i for i in range(self.items.taken) if torch.equal(self.items.item(i).real[0], real)]
            assert len(numbers) == 1, "the real picture is of no item"
            row = batch.states.rows(slice(n, n + 1))
            if numbers[0] not in self.bank:
                assert numbers[0] == self.seen, "an item begins once"
                self.seen += 1
                self.bank[numbers[0]] = self._fresh(numbers[0], row, noise)
            held = self.bank[numbers[0]]
            torch.testing.assert_close(row.x.double(), held.x, atol=1e-5, rtol=1e-4)
            assert int(row.index) == held.index
            assert float(row.scale) == held.scale
            for name, value in vars(held.cond).items():
                ours = getattr(row.cond, name)
                assert value is None if ours is None else torch.equal(ours.double(), value), name
            found.append(held)
        return found

    def _fresh(self, number: int, row: Any, noise: list[Tensor]) -> Trajectory:
        item = self.items.item(number)
        alpha, sigma = self._levels([self.top])
        starts = [alpha * item.c.double() + sigma * n for n in noise]
        fits = [x for x in starts if torch.allclose(x, row.x.double(), atol=1e-5)]
        assert len(fits) == 1, "a fresh state is its content at tau, with noise of its own"
        assert self.config.guidance[0] <= float(row.scale) <= self.config.guidance[1]
        whole = item.cond.to(dtype=torch.float64)
        cond = whole if row.cond.pooled.any() else _null(whole)
        return Trajectory(fits[0], self.top, float(row.scale), cond)

    def real(self, batch: StepBatch, noise: list[Tensor]) -> Tensor:
        """The rows' own real pictures with noise of a level strictly below s, found by trying them."""
        rows = []
        for n, s in enumerate(batch.s.tolist()):
            z = batch.states.z[n].double()
            tries = ((r, e, *self._levels([r])) for r in range(-1, self.top + 1) for e in noise)
            fits = {r: a * z + b * e for r, e, a, b in tries if _near(a * z + b * e, batch.real[n])}
            ((r, row),) = fits.items()
            # Where s is the clean end there is nothing below; that row is masked.
            game = self.config.adversarial
            if game.jumps == "last":
                assert r == -1, "a picture in pixels is clean"
            else:
                assert r < max(s, 0) if game.real == "below" else r == s
            rows.append(row)
        return torch.cat(rows)

    def teach(self, held: list[Trajectory], x: Tensor, cond: Conditioning) -> Tensor:
        """One guided step of the base for every row, ``c + w (c - u)`` with w = scale - 1."""
        index = [row.index for row in held]
        zero = {name: torch.zeros_like(v) for name, v in self.lora.items()}
        w = torch.tensor([row.scale - 1 for row in held], dtype=torch.float64)[:, None, None, None]
        styled, free = self.run(zero, x, index, cond), self.run(zero, x, index, _null(cond))
        return self.move(styled + w * (styled - free), x, index, [i - 1 for i in index])

    def step(self, number: int, batches: list[tuple[StepBatch, list[Tensor]]]) -> None:
        """One optimizer step."""
        gradients = {name: torch.zeros_like(v) for name, v in self.lora.items()}
        judged = {name: torch.zeros_like(v) for name, v in self.judges.values.items()}
        logs: list[dict[str, float]] = []
        game = self.config.adversarial
        for batch, noise in batches:
            held = self.states(batch, noise)
            cond = cat([row.cond for row in held])
            x_s, target = self.jumps(held, cond, batch)
            loss = (((x_s - target) ** 2 + self.config.huber_c**2) ** 0.5 - self.config.huber_c).mean()
            log = {"consistency": loss.item()}
            if self.heads is not None and number >= game.start_step:
                mask = (batch.s > -1).double() if game.real == "below" else torch.ones(len(held))
                if game.jumps == "last":
                    mask = (batch.s == -1).double()
                generator = -(self._judge(x_s, cond).mean(1) * mask).mean()
                loss = loss + game.weight * generator
                judgement = self._judgement(self.real(batch, noise), x_s.detach(), cond, mask)
                self._add(judged, judgement, self.judges.values)
                log |= {"generator": generator.item(), "discriminator": judgement.item()}
            self._add(gradients, loss, self.lora)
            logs.append(log)
        self._update(number, gradients, judged)
        self.logs[-1] |= {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}

    def jumps(self, held: list[Trajectory], cond: Conditioning, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """x_s of the student and of the average; the trajectories go one grid point down."""
        index, s = [row.index for row in held], batch.s.tolist()
        assert all(max(-1, i - self.window) <= to < i for to, i in zip(s, index, strict=True))
        x, below = torch.cat([row.x for row in held]), [i - 1 for i in index]
        x_next = self.teach(held, x, cond)
        theirs = self.average if self.config.ema_target else self.lora
        target = self.move(self.run(theirs, x_next, below, cond), x_next, below, s).detach()
        for n, (to, i) in enumerate(zip(s, below, strict=True)):
            target[n] = x_next[n] if to == i else target[n]
        torch.testing.assert_close(batch.target.double(), target, atol=1e-5, rtol=1e-4)
        for row, moved in zip(held, x_next, strict=True):
            row.x, row.index = moved[None], row.index - 1
        return self.move(self.run(self.lora, x, index, cond), x, index, s), target

    def _judge(self, latents: Tensor, cond: Conditioning) -> Tensor:
        assert self.heads is not None
        return self.heads(_features(latents, self.vae, self.dino), _told(cond))

    def _judgement(self, real: Tensor, fake: Tensor, cond: Conditioning, mask: Tensor) -> Tensor:
        """Hinge loss and R1 (arXiv 1801.04406) on the features of real pictures."""
        assert self.heads is not None
        maps = [m.detach().requires_grad_() for m in _features(real, self.vae, self.dino)]
        true, false = self.heads(maps, _told(cond)), self._judge(fake, cond)
        slopes = torch.autograd.grad(true.sum(), maps, create_graph=True)
        r1 = sum((g**2).sum((1, 2, 3)) for g in slopes)
        hinge = (1 - true).clamp(min=0).mean(1) + (1 + false).clamp(min=0).mean(1)
        return ((hinge + self.config.adversarial.r1 * r1) * mask).mean()

    def _add(self, total: Lora, loss: Tensor, values: Lora) -> None:
        """One of ``accumulate`` equal parts."""
        for name, g in zip(values, torch.autograd.grad(loss, list(values.values())), strict=True):
            total[name] += g / self.config.accumulate

    def _update(self, number: int, gradients: Lora, judged: Lora) -> None:
        config = self.config
        norm = sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        factor = min(1.0, config.max_grad_norm / norm)
        rate = config.learning_rate * min(1.0, (number + 1) / config.warmup)
        if config.rate_schedule == "cosine":
            late = max(0.0, (number - config.warmup) / (config.steps - config.warmup))
            rate *= (1 + cos(pi * late)) / 2
        self.optimizer.step({name: g * factor for name, g in gradients.items()}, rate)
        if self.heads is not None and number >= config.adversarial.start_step:
            self.judges.step(judged, config.adversarial.learning_rate * rate / config.learning_rate)
        d = config.ema_decay
        self.average = {n: d * v + (1 - d) * self.lora[n].detach() for n, v in self.average.items()}
        self.logs.append({"gradient": norm, "learning_rate": rate})


def _null(cond: Conditioning) -> Conditioning:
    """No text, and the tokens of no style; sizes and content stay."""
    tokens = None if cond.tokens is None else NULL_TOKENS.to(cond.tokens).expand_as(cond.tokens)
    zero = torch.zeros_like
    return Conditioning(zero(cond.context), zero(cond.pooled), cond.time_ids, tokens, cond.content)


def _told(cond: Conditioning) -> Tensor:
    """What the heads are told: the pooled text, and how the tokens differ from no style, on average."""
    if cond.tokens is None:
        return cond.pooled
    return torch.cat([cond.pooled, cond.tokens.mean(1) - NULL_TOKENS.to(cond.tokens).mean(1)], 1)


def _near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.reshape(b.shape), b.double(), atol=1e-5)


# --- runs -----------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """What a run drew, and what it started with."""

    items: Items
    draws: list[tuple[StepBatch, list[Tensor]]]  # with the noise drawn for them
    heads: list[Heads]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    """``watched(content=, tokens=)``: runs from here on train on `Items`, and are listened to."""

    def start(content: bool = False, tokens: bool = False) -> Watched:
        kept, noise = Watched(Items(content, tokens), [], []), []

        def randn(*args: Any, original: Any = torch.randn, **more: Any) -> Tensor:
            noise.append(original(*args, **more))
            return noise[-1]

        def draw(self: Distiller, original: Any = Distiller.draw) -> StepBatch:
            noise.clear()
            batch = original(self)
            rows = [row[None].double() for values in noise if values.ndim == 4 for row in values]
            kept.draws.append((batch, rows))
            return batch

        class Recorded(Adversary):
            def __init__(self, *args: Any, **more: Any) -> None:
                super().__init__(*args, **more)
                kept.heads.append(deepcopy(self.heads))

        monkeypatch.setattr(torch, "randn", randn)
        monkeypatch.setattr(Distiller, "draw", draw)
        monkeypatch.setattr(loop, "Adversary", Recorded)
        monkeypatch.setattr(loop, "_source", lambda *_: kept.items)
        monkeypatch.setattr(loop, "load_dino", lambda _: Dino())
        return kept

    return start


def _log(config: DistilConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]


def _stored(path: Path, config: DistilConfig) -> Lora:
    """A file's LoRA as it is trained: in the file, alpha over rank is part of A."""
    lora = {n.removeprefix("unet.").removesuffix(".weight"): v.double() for n, v in load_file(path).items()}
    scale = config.lora.alpha / config.lora.rank
    return {n: v / scale if n.endswith("lora_A") else v for n, v in lora.items()}


def _close(ours: Lora, theirs: Lora, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        expected = theirs[name].detach()
        assert (value - expected).abs().max() < tolerance, f"{name} is off by\n{value - expected}"


def _apart(ours: Lora, theirs: Lora) -> float:
    """Root of the summed squares: Adam makes a whole step of a gradient that is nothing but rounding."""
    return sqrt(sum(float((ours[name] - value).detach().square().sum()) for name, value in theirs.items()))


def _part(end: Lora, part: str) -> Lora:
    names = [name for name in end if name.startswith(f"shared.safetensors/{part}/")]
    return {name.split("/", 2)[2].replace(".default.weight", ""): end[name].double() for name in names}


LAST = AdversarialConfig(
    weight=0.7, blocks=(0, 2), size_px=2 * SIDE, learning_rate=0.005, r1=0.2, start_step=1, jumps="last"
)
CASES = [
    ("epsilon", {}, {}),
    ("v_prediction", {"content": True, "tokens": True}, {"tau": 119, "window": 0.5}),
    ("epsilon", {"content": True}, {"rate_schedule": "constant", "accumulate": 1, "steps": 4}),
    ("v_prediction", {"tokens": True}, {"accumulate": 3, "ema_target": False}),
    (
        "epsilon",
        {"tokens": True},
        {"batch": 3, "bank": BankConfig(capacity=6, spread=False), "adversarial": LAST},
    ),
]


@pytest.mark.parametrize(("kind", "sees", "changes"), CASES)
def test_a_run_is_what_the_formulas_say(
    watched: Callable[..., Watched], tmp_path: Path, kind: str, sees: dict[str, bool], changes: dict[str, Any]
) -> None:
    """Every weight after every step: student, average, discriminator; and what is logged and written."""
    kept, config = watched(**sees), _config(tmp_path, **changes)
    base = _base(kind, **sees)
    before = deepcopy(base)
    final = train_distil(config, base=base)
    hand = ByHand(config, before, kept.items, deepcopy(kept.heads[0]))
    parts = config.accumulate
    for step in range(config.steps):
        hand.step(step, kept.draws[step * parts : (step + 1) * parts])
        _close(_stored(tmp_path / "loras" / f"{step + 1:06d}.safetensors", config), hand.average, 3e-4)
        for name, value in hand.logs[step].items():
            assert _log(config)[step][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert len(kept.draws) == config.steps * parts
    _close(_stored(final, config), hand.average, 3e-4)
    end = read_checkpoint(config)
    _close(_part(end, "lora"), hand.lora, 1e-4)
    _close(_part(end, "average"), hand.average, 1e-4)
    start = dict(kept.heads[0].named_parameters())
    assert _apart(_part(end, "heads"), hand.judges.values) < 2e-3 * _apart(start, hand.judges.values)


def test_the_base_is_frozen(watched: Callable[..., Watched], tmp_path: Path) -> None:
    watched()
    base = _base()

    def values() -> Lora:
        named = [*base.unet.state_dict().items(), *base.vae.state_dict().items()]
        return {name.replace(".base_layer", ""): value.clone() for name, value in named}

    before = values()
    train_distil(_config(tmp_path, steps=2), base=base)
    assert all(torch.equal(values()[name], value) for name, value in before.items())


@pytest.mark.parametrize(("tau", "start"), [(0, 99), (119, 119)])
def test_a_tau_of_the_recipe_is_where_it_starts_and_what_the_notes_say(
    watched: Callable[..., Watched], tmp_path: Path, tau: int, start: int
) -> None:
    kept = watched()
    with safe_open(train_distil(_config(tmp_path, tau=tau, steps=1), base=_base()), "pt") as file:
        notes = file.metadata()
    assert notes["tau"] == str(start)
    assert {steps[0] for steps in json.loads(notes["timesteps"]).values()} == {start}
    assert kept.draws[0][0].states.index.tolist() == [start // 20] * 2
    assert f"start at timestep {start}" in (tmp_path / "README.md").read_text(encoding="utf-8")


# --- what is drawn --------------------------------------------------------------------------------------


def _distiller(config: DistilConfig) -> Distiller:
    base = _base()
    add_lora(base.unet, config.lora, config.seed)
    return Distiller(config, base, Items(False, False), Average(lora_parameters(base.unet)))


@pytest.mark.parametrize(("window", "reach"), [(0.2, 2), (0.5, 5)])
def test_targets_fill_the_recipes_window_and_nothing_more(tmp_path: Path, window: float, reach: int) -> None:
    """eta 0.2: ten grid points."""
    config = _config(tmp_path, eta=0.2, run_steps=(2,), window=window, batch=8, bank=BankConfig(capacity=16))
    distiller = _distiller(config)
    down = {int(d) for _ in range(30) for b in (distiller.draw(),) for d in b.states.index - b.s}
    assert down == set(range(1, reach + 1))


@pytest.mark.parametrize("method", ["std", "tcd", "lcm"])
@pytest.mark.parametrize(("run_steps", "last"), [((2,), 4), ((2, 5), 1), ((10,), 0)])
def test_states_go_from_tau_to_the_last_grid_point_that_a_run_visits(
    tmp_path: Path, method: str, run_steps: tuple[int, ...], last: int
) -> None:
    """eta 0.2 is index 9: two steps visit 9 and 4, five steps 9, 7, 5, 3, 1."""
    config = _config(tmp_path, method=method, eta=0.2, run_steps=run_steps, batch=8)
    distiller = _distiller(replace(config, bank=BankConfig(capacity=16)))
    seen = {int(i) for _ in range(30) for i in distiller.draw().states.index}
    assert seen == set(range(last, 10))


def test_real_pictures_have_every_level_below_s(tmp_path: Path) -> None:
    distiller = _distiller(_config(tmp_path, eta=0.2, run_steps=(10,), batch=8, bank=BankConfig(capacity=16)))
    shares = []
    for _ in range(30):
        batch = distiller.draw()
        z, real = batch.states.z.flatten(1), batch.real.flatten(1)
        alpha = ((z * real).sum(1) / (z * z).sum(1))[:, None]
        noise = (real - alpha * z).std(1)
        most = torch.tensor(1 - _kept(batch.s.clamp(min=0))).sqrt()
        shares += (noise / most)[batch.s > 3].tolist()
    assert max(shares) < 1.3
    assert np.mean(np.array(shares) < 0.01) < 0.3, "clean is only one of the levels"
    assert np.mean(shares) == pytest.approx(0.5, abs=0.15)


def _kept(index: Tensor) -> NDArray[np.float64]:
    kept: NDArray[np.float64] = np.cumprod(1 - np.linspace(sqrt(0.00085), sqrt(0.012), 1000) ** 2)
    return kept[20 * index.numpy() + 19]


@pytest.mark.parametrize("spread", [True, False])
def test_the_bank_of_a_new_run_is_spread_over_t_if_asked(
    watched: Callable[..., Watched], tmp_path: Path, spread: bool
) -> None:
    kept = watched()
    config = _config(tmp_path, eta=0.2, run_steps=(10,), steps=1, accumulate=1)
    train_distil(replace(config, bank=BankConfig(capacity=24, spread=spread)), base=_base())
    index = read_checkpoint(config)["rank0.safetensors/bank/4x4/index"].tolist()
    assert len(kept.draws) == 1
    assert (len(index) > 20, len(set(index)) > 5) == (spread, spread)


# --- precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_networks_run_in_the_recipes_precision(
    watched: Callable[..., Watched], tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    """Teacher, target and student alike; the weights that learn stay in fp32."""
    watched()
    config, base = _config(tmp_path, precision=precision, steps=2), _base()
    train_distil(config, base=base)
    assert set(base.unet.dtypes) == {dtype}
    assert len(base.unet.dtypes) == 3 * config.steps * config.accumulate
    assert {value.dtype for value in lora_parameters(base.unet).values()} == {torch.float32}


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float32), ("bf16", torch.bfloat16)])
def test_pictures_are_never_decoded_in_fp16(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    """SDXL's decoder overflows in it."""
    distiller, a = _distiller(_config(tmp_path, precision=precision)), torch.ones(2, 2)
    with distiller.judging():
        assert (a @ a).dtype == dtype


def test_the_heads_gradients_are_fp32s_own_where_pictures_are_judged_in_bf16(
    watched: Callable[..., Watched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward pass under autocast would multiply them in bf16."""
    watched()
    seen: list[Tensor] = []

    class Checked(Adversary):
        def discriminator_loss(self, *given: Any) -> tuple[Tensor, dict[str, Tensor]]:
            loss, parts = super().discriminator_loss(*given)
            weight = self.heads.heads[0].look.weight
            weight.register_hook(seen.append)
            with torch.autocast("cpu", enabled=False):
                torch.autograd.grad(loss, weight, retain_graph=True)
            return loss, parts

    monkeypatch.setattr(loop, "Adversary", Checked)
    train_distil(_config(tmp_path, precision="bf16", steps=2, accumulate=1), base=_base())
    expected, trained = seen
    assert expected.abs().max() > 0
    assert torch.equal(trained, expected)


def test_latents_are_scaled_and_shifted_as_the_autoencoder_says() -> None:
    """As diffusers does: ``(z - shift) scaling``, and back."""
    base, x = _base(), _values(1, C, 4, 4, seed=0)
    torch.testing.assert_close(base.encode(x), (x[:, :, ::2, ::2] - SHIFT) * SCALING)
    z = _values(1, C, 2, 2, seed=1)
    torch.testing.assert_close(base.decode(z), base.vae.decode(z / SCALING + SHIFT).sample)


# --- pictures, bit for bit ------------------------------------------------------------------------------


@torch.no_grad()
def _plain_ddim(
    output: Tensor, x: Tensor, here: tuple[Tensor, Tensor], there: tuple[Tensor, Tensor]
) -> Tensor:
    return there[0] * ((x - here[1] * output) / here[0]) + there[1] * output


@pytest.mark.parametrize("average", [True, False])
def test_a_picture_step_is_the_plain_one_bit_for_bit(average: bool, tmp_path: Path) -> None:
    """In torch as one would write it for pictures alone, its random draws included: what clips added to
    training must not change one bit of a picture's states, target, loss or gradients."""
    config = _config(tmp_path, bank=BankConfig(enabled=False), ema_target=average, eta=0.3)
    base = _base()
    add_lora(base.unet, config.lora, 0)
    live = lora_parameters(base.unet)
    distiller = Distiller(config, base, Items(False, False), Average(live))
    with torch.no_grad():
        for seed, value in enumerate([*live.values(), *distiller.average.tensors.values()]):
            value.add_(0.3 * _values(*value.shape, seed=500 + seed))
    teacher, student, target_net = Network(False), base.unet, deepcopy(base.unet)
    target_net.load_state_dict(distiller.average.tensors if average else {}, strict=False)

    kept = NoiseSchedule.scaled_linear()
    levels = [tuple(torch.tensor(v) for v in kept.alpha_sigma(t)) for t in (-1, *range(19, 1000, 20))]
    steps = [0, *range(19, 1000, 20)]
    top, last = 14, distiller.last
    items, generator = Items(False, False), torch.Generator().manual_seed(
        int(np.random.default_rng((config.seed, 0)).integers(2**62))
    )  # fmt: skip

    def at(index: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [levels[i + 1] for i in index.tolist()]
        alpha, sigma = (torch.stack(v).float().view(-1, 1, 1, 1) for v in zip(*pairs, strict=True))
        return alpha, sigma

    def run(unet: nn.Module, x: Tensor, index: Tensor, cond: Conditioning) -> Tensor:
        t = torch.tensor([steps[i + 1] for i in index.tolist()])
        added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        return unet(x, t, cond.context, added_cond_kwargs=added, return_dict=False)[0]

    def draw(low: Tensor, high: Tensor) -> Tensor:
        return low + (torch.rand(2, generator=generator, dtype=torch.float64) * (high - low + 1)).long()

    @torch.no_grad()
    def teach(x: Tensor, index: Tensor, scale: Tensor, cond: Conditioning) -> Tensor:
        without = Conditioning(cond.context * 0, cond.pooled * 0, cond.time_ids)
        both = run(teacher, torch.cat([x, x]), index.repeat(2), cat([cond, without]))
        styled, free = both.chunk(2)
        output = free + scale.view(-1, 1, 1, 1) * (styled - free)
        return _plain_ddim(output, x, at(index), at(index - 1))

    for _ in range(3):
        batch = distiller.draw()
        new = items.take(2, SHAPE)
        noise = torch.randn(new.z.shape, generator=generator)
        scale = 2.0 + (5.0 - 2.0) * torch.rand(2, generator=generator)
        keep = (torch.rand(2, generator=generator) >= 0.3).float()
        index = torch.full((2,), top)
        alpha, sigma = at(index)
        x = alpha * new.c + sigma * noise
        cond = Conditioning(
            new.cond.context * keep.view(-1, 1, 1), new.cond.pooled * keep.view(-1, 1), new.cond.time_ids
        )
        until = draw(torch.full((2,), last), index)
        while len(rows := (index > until).nonzero()[:, 0]):
            x[rows] = teach(x[rows], index[rows], scale[rows], cond.rows(rows))
            index[rows] -= 1
        s = draw((index - distiller.window).clamp(min=-1), index - 1)
        x_next = teach(x, index, scale, cond)
        r = draw(torch.full((2,), -1), s - 1)
        alpha, sigma = at(r)
        real = alpha * new.real + sigma * torch.randn(new.z.shape, generator=generator)
        arrived = _plain_ddim(run(target_net, x_next, index - 1, cond), x_next, at(index - 1), at(s))
        target = torch.where((s == index - 1).view(-1, 1, 1, 1), x_next, arrived)
        for ours, plain in (
            (batch.states.x, x), (batch.states.index, index), (batch.s, s), (batch.real, real),
            (batch.target, target), (distiller.generator.get_state(), generator.get_state()),
        ):  # fmt: skip
            assert torch.equal(ours, plain)

        loss = distiller.consistency_loss(distiller.student_jump(student, batch.states, s), batch)
        ours = torch.autograd.grad(loss, list(live.values()))
        (alpha, sigma), (alpha_s, sigma_s) = at(index), at(s)
        output = run(student, x, index, cond)
        x_s = alpha_s * ((x - sigma * output) / alpha) + sigma_s * output
        plain_loss = (((x_s - target) ** 2 + 0.05 * 0.05).sqrt() - 0.05).flatten(1).mean(1).mean()
        assert torch.equal(loss, plain_loss)
        for a, b in zip(ours, torch.autograd.grad(plain_loss, list(live.values())), strict=True):
            assert torch.equal(a, b)
