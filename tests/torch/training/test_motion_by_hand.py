"""A step on clips done again by hand: NumPy, float64, every formula written out; gradients by differences.

What training draws (states, targets, frames) is taken from it; what it computes is not taken.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import inject_adapter_in_model
from torch import Tensor, nn

from std_rt.core.schedule import NoiseSchedule
from std_rt.training.distil.base import Base, Conditioning, Fresh, Motion
from std_rt.training.distil.distiller import Distiller, StepBatch
from std_rt.training.distil.lora import Average, add_lora, lora_parameters
from std_rt.training.run.recipe import (
    AdversarialConfig,
    BankConfig,
    DistilConfig,
    LoraConfig,
    MotionConfig,
    PicturesConfig,
)

C, T, SIDE, DIM, POOLED = 3, 8, 4, 2, 4
SHAPE = (SIDE, SIDE)
KEPT = np.cumprod(1 - np.linspace(sqrt(0.00085), sqrt(0.012), 1000) ** 2)
Array = NDArray[Any]


def _values(*shape: int, seed: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape), dtype=torch.float32)


class Network(nn.Module):
    """``tanh(to_q(x) + mean over frames + words + pooled) (0.5 + t / 1000)``; words come a row a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(C, C)
        for seed, value in enumerate(self.parameters()):
            value.data = 0.5 * _values(*value.shape, seed=seed)
        self.config = SimpleNamespace(
            in_channels=C,
            out_channels=C,
            addition_time_embed_dim=1,
            projection_class_embeddings_input_dim=POOLED + 6,
            block_out_channels=(C,),
        )

    def add_adapter(self, settings: Any, name: str) -> None:
        inject_adapter_in_model(settings, self, name)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, added_cond_kwargs: dict[str, Tensor], return_dict: bool
    ) -> tuple[Tensor]:
        assert not return_dict
        hidden = self.to_q(x.permute(0, 2, 3, 4, 1))
        words = context.mean((1, 2)).view(len(x), -1, 1, 1, 1)
        pooled = added_cond_kwargs["text_embeds"].mean(1).view(-1, 1, 1, 1, 1)
        hidden = torch.tanh(hidden + hidden.mean(1, keepdim=True) + words + pooled)
        gain = (0.5 + t / 1000).view(-1, 1, 1, 1, 1)
        return ((hidden * gain).permute(0, 4, 1, 2, 3),)


class Clips:
    """Clips of noise, each with words of its own."""

    def __init__(self) -> None:
        self.shapes, self.weights, self.taken = [SHAPE], np.ones(1), 0

    def take(self, n: int, shape: tuple[int, int]) -> Fresh:
        assert shape == SHAPE
        seed, self.taken = 10 * self.taken, self.taken + 1
        z = _values(n, C, T, *SHAPE, seed=seed)
        told = _values(n, 2, DIM, seed=seed + 1), _values(n, POOLED, seed=seed + 2)
        return Fresh(z, z, z, Conditioning(*told, torch.ones(n, 6)))

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def _distiller(**changes: Any) -> Distiller:
    """With a LoRA, its average and a motion head that are all something."""
    motion = MotionConfig("m", T, 2, judged=2, **{"representation": "head"} | changes)
    config = DistilConfig(
        "out", "known", batch=2, eta=0.3, run_steps=(2, 3), window=0.5, guidance=(2.0, 5.0),
        drop_conditioning=0.0, huber_c=0.05, precision="fp32", lora=LoraConfig(2, 3.0, ("to_q",)),
        bank=BankConfig(capacity=6, spread=False), motion=motion, adversarial=AdversarialConfig(weight=0.5),
        pictures=PicturesConfig("clips"),
    )  # fmt: skip
    base = Base(
        Network(), nn.Identity(), NoiseSchedule.scaled_linear(), "known", "", motion=Motion("m", T, 2)
    )
    add_lora(base.unet, config.lora, 0)
    parameters = lora_parameters(base.unet)
    average = Average(parameters)
    distiller = Distiller(config, base, Clips(), average)
    clips = distiller.representation
    assert clips is not None
    found = [*parameters.values(), *average.tensors.values()]
    if clips.head is not None and clips.average is not None:
        found += [*clips.head.parameters(), *clips.average.tensors.values()]
    with torch.no_grad():
        for seed, value in enumerate(found):
            value.add_(0.3 * _values(*value.shape, seed=500 + seed))
    return distiller


# --- by hand --------------------------------------------------------------------------------------------


def _plain(values: dict[str, Tensor]) -> dict[str, Array]:
    return {name: v.detach().numpy().astype(np.float64) for name, v in values.items()}


def _levels(index: Array) -> tuple[Array, Array]:
    kept = np.array([1.0 if i < 0 else KEPT[20 * i + 19] for i in index])[:, None, None, None, None]
    return np.sqrt(kept), np.sqrt(1 - kept)


def _output(lora: dict[str, Array] | None, x: Array, index: Array, words: Array, pooled: Array) -> Array:
    """`Network` with the LoRA merged; every frame of a clip has the clip's words."""
    plain = Network().to_q
    weight = plain.weight.detach().numpy().astype(np.float64)
    if lora is not None:
        up, down = (lora[f"to_q.lora_{name}.default.weight"] for name in "BA")
        weight = weight + 3.0 / 2 * up @ down
    hidden = np.einsum("oc,bcthw->bothw", weight, x)
    hidden = hidden + plain.bias.detach().numpy()[:, None, None, None]
    told = (words.mean((1, 2)) + pooled.mean(1))[:, None, None, None, None]
    gain = np.array([0.5 + (0 if i < 0 else 20 * i + 19) / 1000 for i in index])
    mixed = np.tanh(hidden + hidden.mean(2, keepdims=True) + told)
    return np.asarray(mixed * gain[:, None, None, None, None])


def _move(output: Array, x: Array, index: Array, s: Array) -> Array:
    (alpha, sigma), (alpha_s, sigma_s) = _levels(index), _levels(s)
    return np.asarray(alpha_s * (x - sigma * output) / alpha + sigma_s * output)


def _norm_silu(h: Array, scale: Array, shift: Array) -> Array:
    """GroupNorm with 8 groups, frame by frame, then SiLU: ``[B, W, T, h, w]``."""
    for b in range(len(h)):
        for t in range(T):
            groups = h[b, :, t].reshape(8, -1)
            unit = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-5)
            h[b, :, t] = unit.reshape(h[b, :, t].shape)
    h = h * scale[:, None, None, None] + shift[:, None, None, None]
    return np.asarray(h / (1 + np.exp(-h)))


def _mix(h: Array, weight: Array, bias: Array) -> Array:
    return np.asarray(np.einsum("oc,bcthw->bothw", weight[:, :, 0, 0], h) + bias[:, None, None, None])


def _head(w: dict[str, Array], x: Array) -> Array:
    def part(name: str, h: Array) -> Array:
        normed = _norm_silu(h.copy(), w[f"{name}.0.weight"], w[f"{name}.0.bias"])
        return _mix(normed, w[f"{name}.2.weight"], w[f"{name}.2.bias"])

    h = _mix(x, w["enter.weight"], w["enter.bias"])
    for name in ("blocks.0", "blocks.1"):
        h = h + part(name, h)
    return x + part("leave", h)


def _huber(a: Array, b: Array) -> float:
    return float((np.sqrt((a - b) ** 2 + 0.05**2) - 0.05).mean())


def _represented(kind: str, x: Array) -> Array:
    """By sums of cosines and sines: of 8 frames, the mean and the slowest frequency are low."""
    if kind == "raw":
        return x
    if kind == "difference":
        return np.asarray(x[:, :, 1:] - x[:, :, :-1])
    low = np.repeat(x.mean(2, keepdims=True), T, 2)
    for wave in (np.cos, np.sin):
        turn = wave(2 * np.pi * np.arange(T) / T)
        low = low + 2 / T * np.einsum("t,s,bcshw->bcthw", turn, turn, x)
    return np.asarray(low if kind == "low" else x - low)


@pytest.mark.parametrize("kind", ["head", "raw", "difference", "low", "high"])
def test_a_step_on_clips_by_hand(kind: str) -> None:
    distiller = _distiller(representation=kind)
    lora, average = (_plain(v) for v in (lora_parameters(distiller.base.unet), distiller.average.tensors))
    batch = distiller.draw()
    while len(set(batch.states.index.tolist())) == 1:  # until it has states from the bank, at two levels
        batch = distiller.draw()
    x, index, s = batch.states.x.numpy().astype(np.float64), batch.states.index.numpy(), batch.s.numpy()
    words, pooled = batch.states.cond.context.numpy(), batch.states.cond.pooled.numpy()
    scale = batch.states.scale.numpy()[:, None, None, None, None]

    styled, free = (_output(None, x, index, k * words, k * pooled) for k in (1, 0))
    x_next = _move(free + scale * (styled - free), x, index, index - 1)
    kept = [row.x[0].numpy() for row in distiller.bank.slots[SHAPE]]
    assert sum(min(np.abs(row - clip).max() for row in kept) < 1e-4 for clip in x_next) >= 1
    target = _move(_output(average, x_next, index - 1, words, pooled), x_next, index - 1, s)
    here = (s == index - 1)[:, None, None, None, None]
    target = np.where(here, x_next, target)
    np.testing.assert_allclose(batch.target.numpy(), target, atol=2e-5)

    clips = distiller.representation
    assert clips is not None
    heads = [] if clips.head is None or clips.average is None else [
        _plain(dict(clips.head.named_parameters())), _plain(clips.average.tensors)
    ]  # fmt: skip

    def loss() -> float:
        x_s = _move(_output(lora, x, index, words, pooled), x, index, s)
        if heads:
            return _huber(_head(heads[0], x_s), _head(heads[1], target))
        return _huber(_represented(kind, x_s), _represented(kind, target))

    ours = distiller.consistency_loss(
        distiller.student_jump(distiller.base.unet, batch.states, batch.s), batch
    )
    assert ours.item() == pytest.approx(loss(), rel=1e-4)
    ours.backward()
    _check_slopes(lora, lora_parameters(distiller.base.unet), loss)
    if heads and clips.head is not None:
        _check_slopes(heads[0], dict(clips.head.named_parameters()), loss)


def _check_slopes(values: dict[str, Array], live: dict[str, nn.Parameter], loss: Callable[[], float]) -> None:
    """The gradient of one entry of each weight, by central differences."""
    for name, value in values.items():
        at = tuple(side // 2 for side in value.shape)
        before, sides = value[at], []
        for step in (1e-4, -1e-4):
            value[at] = before + step
            sides.append(loss())
        value[at] = before
        gradient = live[name].grad
        assert gradient is not None, name
        assert gradient[at].item() == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=2e-3, abs=1e-6), name


def test_the_discriminator_is_shown_some_frames_of_every_clip() -> None:
    distiller = _distiller()
    seen = set()
    for _ in range(12):
        batch: StepBatch = distiller.draw()
        assert batch.frames is not None
        shown = batch.shown(batch.real)
        assert shown.shape == (4, C, *SHAPE)
        for n, frames in enumerate(batch.frames.tolist()):
            assert len(set(frames)) == 2
            seen |= set(frames)
            for k, frame in enumerate(frames):
                assert torch.equal(shown[2 * n + k], batch.real[n, :, frame])
        assert batch.per_picture(batch.s).tolist() == [i for i in batch.s.tolist() for _ in range(2)]
    assert seen == set(range(T))
