"""The trajectory bank: what goes in comes out, nothing is mixed up, every t is visited alike."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from std_rt.core.errors import RecipeError
from std_rt.training.distil.bank import States, TrajectoryBank
from std_rt.training.distil.base import Conditioning, cat

TOP, LAST = 36, 4
SHAPE = (4, 6)


def _states(ids: list[int], index: int = TOP, *, tokens: bool = True, seed: int = 0) -> States:
    """Rows that can be told apart: everything of a trajectory is drawn from its own number."""

    def draw(*shape: int) -> torch.Tensor:
        rows = [
            torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + 10 * i)) for i in ids
        ]
        return torch.stack(rows)

    cond = Conditioning(draw(2, 3) + 1, draw(5) + 2, draw(6) + 3, draw(4, 3) + 4 if tokens else None)
    n = len(ids)
    number, at = torch.tensor(ids), torch.full((n,), index)
    return States(draw(2, *SHAPE), draw(2, *SHAPE) + 9, at, draw(1)[:, 0], number, cond)


def _same(a: States, b: States) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("tokens", [True, False])
def test_what_goes_in_comes_out(tokens: bool) -> None:
    """Acceptance test 2, first half: z_0, conditioning, guidance, t and number are those of the item."""
    bank = TrajectoryBank(8, LAST)
    put = _states([0, 1, 2, 3], tokens=tokens)
    bank.update(SHAPE, [], put)
    assert len(bank) == 4
    assert _same(bank.get(SHAPE, [0, 1, 2, 3]), put)
    assert _same(bank.get(SHAPE, [2, 0]), put.rows(torch.tensor([2, 0])))


def test_advanced_rows_go_back_to_their_slots_and_new_ones_behind() -> None:
    bank = TrajectoryBank(8, LAST)
    bank.update(SHAPE, [], _states([0, 1, 2]))
    before = bank.get(SHAPE, [2, 0])
    moved = cat([replace(before, x=before.x + 1, index=before.index - 1), _states([3])])
    bank.update(SHAPE, [2, 0], moved)
    assert [int(row.id) for row in bank.slots[SHAPE]] == [0, 1, 2, 3]
    assert [int(row.index) for row in bank.slots[SHAPE]] == [35, 36, 35, 36]
    assert _same(bank.get(SHAPE, [2, 0]), moved.rows(slice(0, 2)))


def test_a_trajectory_leaves_after_the_last_grid_point_of_use() -> None:
    bank = TrajectoryBank(8, LAST)
    bank.update(SHAPE, [], cat([_states([0], index=LAST), _states([1], index=LAST - 1)]))
    assert [int(row.id) for row in bank.slots[SHAPE]] == [0]
    bank.update(SHAPE, [0], _states([0], index=LAST - 1))
    assert bank.state()[0] == {}, "a size without any is saved too"


def test_stored_rows_do_not_change_with_the_callers_tensors() -> None:
    bank = TrajectoryBank(8, LAST)
    put = _states([0])
    for slots in ([], [0]):  # as new rows, as moved ones
        bank.update(SHAPE, slots, put)
        kept = bank.get(SHAPE, [0]).map(torch.clone)
        put.x.add_(1)
        put.index.sub_(1)
        put.cond.pooled.add_(1)
        assert _same(bank.get(SHAPE, [0]), kept)


def test_stored_rows_keep_no_graph_alive() -> None:
    bank = TrajectoryBank(8, LAST)
    grown = _states([0]).map(lambda v: v.clone().requires_grad_() if v.is_floating_point() else v)
    for slots in ([], [0]):
        bank.update(SHAPE, slots, grown.map(lambda v: v * 1))
        assert not any(v.requires_grad for v in bank.get(SHAPE, [0]).tensors().values())


def test_sizes_are_kept_apart() -> None:
    bank = TrajectoryBank(4, LAST)
    bank.update(SHAPE, [], _states([0, 1]))
    rng = np.random.default_rng(0)
    assert bank.filled((6, 4)) == 0
    assert bank.plan(2, (6, 4), rng) == (2, [])


def _simulate(bank: TrajectoryBank, steps: int, batch: int, spread: bool) -> np.ndarray:
    """Visits over t of ``steps`` training steps; the teacher is a step down without a network."""
    rng = np.random.default_rng(0)
    if spread:
        for _ in range(bank.capacity):
            index = int(rng.integers(LAST, TOP + 1))
            bank.update(SHAPE, [], _states([int(bank.number(1)[0])], index=index))
    for _ in range(steps):
        fresh, slots = bank.plan(batch, SHAPE, rng)
        assert fresh + len(slots) == batch
        assert len(set(slots)) == len(slots)
        parts = [bank.get(SHAPE, slots)] if slots else []
        parts += [_states(bank.number(fresh).tolist())] if fresh else []
        states = cat(parts)
        bank.count(states.index)
        moved = States(states.z, states.x, states.index - 1, states.scale, states.id, states.cond)
        bank.update(SHAPE, slots, moved)
    return bank.visits[LAST : TOP + 1]


@pytest.mark.parametrize("capacity", [16, 40])
def test_visits_over_t_are_uniform(capacity: int) -> None:
    """Acceptance test 3. The released rule puts 21 % of all visits at tau; uniform are 3 %."""
    visits = _simulate(TrajectoryBank(capacity, LAST), 1000, 8, spread=True)
    assert visits.sum() == 1000 * 8
    assert np.abs(visits / visits.mean() - 1).max() < 0.15


def test_a_spread_bank_sees_all_of_t_from_the_first_steps() -> None:
    first = _simulate(TrajectoryBank(40, LAST), 20, 8, spread=True)
    unspread = _simulate(TrajectoryBank(40, LAST), 20, 8, spread=False)
    assert (first > 0).sum() > 25
    assert (unspread > 0).sum() < 20  # what the spread is there for


def test_a_size_with_less_room_takes_fresh_samples_into_its_own_slots_only() -> None:
    bank = TrajectoryBank(40, LAST, capacities={(6, 4): 4})
    rng = np.random.default_rng(0)
    bank.update((6, 4), [], _states([0, 1, 2, 3]))
    bank.update(SHAPE, [], _states([4, 5, 6, 7]))
    assert bank.plan(2, (6, 4), rng)[0] == 0  # full: nothing fresh, so no wave of starts
    assert bank.plan(2, SHAPE, rng)[0] == 2


def test_draws_are_uniform_over_filled_slots() -> None:
    bank, rng = TrajectoryBank(10, LAST), np.random.default_rng(0)
    bank.update(SHAPE, [], _states(list(range(10))))
    drawn = np.concatenate([bank.plan(3, SHAPE, rng)[1] for _ in range(2000)])
    counts = np.bincount(drawn, minlength=10)
    assert counts.sum() == 6000
    assert np.abs(counts / 600 - 1).max() < 0.15


def test_a_batch_larger_than_the_bank_says_what_to_set() -> None:
    with pytest.raises(RecipeError, match=r"set bank\.capacity to 16"):
        TrajectoryBank(3, LAST).plan(4, SHAPE, np.random.default_rng(0))


def test_saved_and_restored_it_goes_on_as_it_would_have() -> None:
    bank = TrajectoryBank(8, LAST)
    bank.update(SHAPE, [], _states([0, 1, 2], index=20))
    bank.update((6, 4), [], _states([7]).map(lambda x: x.transpose(2, 3) if x.ndim == 4 else x))
    bank.count(torch.tensor([20, 20, 5]))
    bank.number(8)
    tensors, meta = bank.state()
    again = TrajectoryBank(8, LAST)
    again.update((2, 2), [], _states([9]))
    again.restore(tensors, json.loads(json.dumps(meta)))
    assert len(again) == len(bank), "nothing of before"
    for shape in (SHAPE, (6, 4)):
        slots = list(range(bank.filled(shape)))
        assert _same(bank.get(shape, slots), again.get(shape, slots))
    for either in (bank, again):
        either.count(torch.tensor([20, 4]))
    assert again.visits.tolist() == bank.visits.tolist()
    assert [again.visits[i] for i in (4, 5, 20)] == [1, 1, 3]
    assert again.number(1).tolist() == bank.number(1).tolist() == [8]
    assert bank.plan(4, SHAPE, np.random.default_rng(3)) == again.plan(4, SHAPE, np.random.default_rng(3))
    assert bank.state()[0].keys() == tensors.keys()


def test_a_pinned_bank_keeps_its_rows_in_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New rows, moved ones and restored ones; without CUDA nothing can be pinned, so a copy stands in."""
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda v: (pinned.append(v.clone()), pinned[-1])[1])
    bank = TrajectoryBank(8, LAST, pinned=True)
    bank.update(SHAPE, [], _states([1, 2]))
    bank.update(SHAPE, [0], replace(_states([1]), x=torch.zeros(1, 2, 4, 6), index=torch.tensor([TOP - 1])))
    again = TrajectoryBank(8, LAST, pinned=True)
    again.restore(*bank.state())
    kept = {id(value) for value in pinned}
    for row in (*bank.slots[SHAPE], *again.slots[SHAPE]):
        assert {id(v) for v in (row.x, row.z, row.cond.context, row.cond.tokens)} <= kept
    assert _same(bank.get(SHAPE, [0, 1]), again.get(SHAPE, [0, 1]))


def test_rows_of_a_bank_live_on_its_device_and_what_leaves_it_on_the_asked_one() -> None:
    """ "meta" stands for a GPU. Indices and numbers stay on the CPU, where the loop decides by them."""
    devices = {"index": "cpu", "id": "cpu"}
    on = {name: value.device.type for name, value in _states([0]).to("meta").tensors().items()}
    assert on == {name: devices.get(name, "meta") for name in on}
    bank = TrajectoryBank(4, LAST, device="meta")
    bank.update(SHAPE, [], _states([0, 1]))
    bank.update(SHAPE, [1], _states([1], index=TOP - 1))
    here = TrajectoryBank(4, LAST)
    here.update(SHAPE, [], _states([0, 1]))
    again = TrajectoryBank(4, LAST, device="meta")
    again.restore(*here.state())
    for row in (*bank.slots[SHAPE], *again.slots[SHAPE]):
        assert {name: value.device.type for name, value in row.tensors().items()} == on
    mixed = here.mixed(here.get(SHAPE, [0], "meta"), SHAPE, np.random.default_rng(0))
    assert {value.device.type for value in (mixed.x, mixed.cond.context, mixed.cond.tokens)} == {"meta"}


def test_mixed_conditioning_is_of_other_trajectories() -> None:
    bank = TrajectoryBank(8, LAST)
    bank.update(SHAPE, [], _states(list(range(8))))
    states = bank.get(SHAPE, [0, 1, 2, 3])
    mixed = bank.mixed(states, SHAPE, np.random.default_rng(0))
    assert torch.equal(mixed.x, states.x)
    stored = [row.cond.pooled[0] for row in bank.slots[SHAPE]]
    assert all(any(torch.equal(row, s) for s in stored) for row in mixed.cond.pooled)
    assert not torch.equal(mixed.cond.pooled, states.cond.pooled)
    drawn = [bank.mixed(states, SHAPE, np.random.default_rng(seed)).cond.pooled for seed in range(20)]
    assert all(any(torch.equal(row, s) for batch in drawn for row in batch) for s in stored), "any of them"
    alone = TrajectoryBank(8, LAST).mixed(states, SHAPE, np.random.default_rng(0))
    assert torch.equal(alone.cond.pooled, states.cond.pooled[:1].expand(4, -1)), "an empty bank has no others"
