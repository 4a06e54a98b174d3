"""Who computes which slots, and that their sum has the same bits whoever did."""

from __future__ import annotations

import gc
import hashlib
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from forge_ray.model.arithmetic import num_sums
from forge_ray.train.elastic import slots as slots_module
from forge_ray.train.elastic.group import Group, GroupLost
from forge_ray.train.elastic.slots import Assignment, Node, SlotSums, assign, nodes_of, reduce, slots_of
from tests.unit.train.groups import Peer, in_group, in_processes

SLOTS = 16


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 3))


class Computer:
    """A model with its sums, and a gradient for each slot."""

    def __init__(self, exact: bool = True) -> None:
        self.model = small_model()
        self.sums = SlotSums(self.model, num_scalars=2, exact=exact)

    def backward(self, slot: int) -> None:
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(slot))
        loss = self.model(x).square().mean() * 10.0 ** (slot % 5)
        loss.backward()
        self.sums.scalars[0] += loss.detach()

    def add(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.backward(slot)
            self.sums.add(slot)


def digest(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def leaves(slots: int = SLOTS) -> list[Tensor]:
    computer = Computer()
    found = []
    for slot in range(slots):
        computer.backward(slot)
        found.append(computer.sums.values.clone())
        computer.sums.clear()
    return found


def tree_sum(values: Sequence[Tensor]) -> Tensor:
    half = len(values) // 2
    return values[0] if half == 0 else tree_sum(values[:half]) + tree_sum(values[half:])


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    torch.set_num_threads(1)
    return tree_sum(leaves())


def test_nodes_of_are_the_fewest_aligned_blocks() -> None:
    draw = random.Random(0)
    for _ in range(200):
        chosen = {slot for slot in range(64) if draw.random() < draw.choice([0.1, 0.5, 0.95])}
        nodes = nodes_of(chosen)
        assert slots_of(nodes) == chosen
        assert sum(1 << level for level, _ in nodes) == len(chosen)
        assert not any((level, index ^ 1) in nodes for level, index in nodes)
    assert nodes_of(range(1, 7)) == ((0, 1), (1, 1), (1, 2), (0, 6))
    assert nodes_of(range(64)) == ((6, 0),)


@pytest.mark.parametrize("slots", [1, 2, 8, 16, 64])
def test_a_fresh_step_is_shared_out_whole_and_nobody_has_more_than_necessary(slots: int) -> None:
    for world_size in [*range(1, slots + 1), 2 * slots + 1]:
        got = assign([()] * world_size, slots)
        assert sorted(slot for own in got.slots for slot in own) == list(range(slots))
        assert max(map(len, got.slots)) == -(-slots // world_size)
        assert all(tuple(sorted(own)) == own for own in got.slots)
        assert got.nodes == tuple(nodes_of(own) for own in got.slots)
        if world_size.bit_count() == 1:  # one node each
            assert [len(nodes) for nodes in got.nodes] == [1] * world_size
        # Never more to send than contiguous shares, as even as the numbers allow, would give.
        shares = [range(slots * r // world_size, slots * (r + 1) // world_size) for r in range(world_size)]
        assert sum(map(len, got.nodes)) <= sum(len(nodes_of(share)) for share in shares)


def check(held: Sequence[Sequence[Node]], got: Assignment, slots: int, exact: bool) -> None:
    everything = [slot for nodes in got.nodes for slot in slots_of(nodes)]
    assert sorted(everything) == list(range(slots))
    missing = sum(map(len, got.slots))
    assert max(map(len, got.slots)) == -(-missing // len(held))
    for had, dropped, new, nodes in zip(held, got.dropped, got.slots, got.nodes, strict=True):
        assert set(dropped) <= set(had)
        assert exact or set(dropped) in (set(), set(had))
        assert slots_of(set(had) - set(dropped)) | set(new) == slots_of(nodes)
    if exact:  # nothing is computed again that somebody still has
        assert missing == slots - len(slots_of(node for nodes in held for node in nodes))


@pytest.mark.parametrize("exact", [True, False])
def test_whatever_the_history_every_slot_counts_once(exact: bool) -> None:
    draw = random.Random(1)
    for _ in range(300):
        slots = 1 << draw.randrange(7)
        held: list[set[int]] = [set() for _ in range(draw.randint(1, 9))]
        away: list[set[int]] = []
        for _ in range(6):
            nodes = [nodes_of(own) for own in held]
            got = assign(nodes, slots, exact=exact)
            check(nodes, got, slots, exact)
            # As far as each came before the group changed again:
            for own, dropped, new in zip(held, got.dropped, got.slots, strict=True):
                own -= slots_of(dropped)
                own |= set(new[: draw.randint(0, len(new))])
            # Some are lost; one that was away comes back with what it held then; others are new.
            draw.shuffle(held)
            away += [held.pop() for _ in range(draw.randint(0, len(held) - 1))]
            if away and draw.random() < 0.4:
                held.append(away.pop(draw.randrange(len(away))))
            held += [set() for _ in range(draw.randint(0, 2))]


def test_gradients_are_aligned_views_and_add_takes_them_away() -> None:
    computer = Computer()
    sums = computer.sums
    parameters = list(computer.model.parameters())
    computer.backward(3)
    own = [parameter.grad.clone() for parameter in parameters]
    assert all(gradient.abs().max() > 0 for gradient in own)
    assert all((p.grad.data_ptr() - sums.values.data_ptr()) % 64 == 0 for p in parameters)
    sums.add(3)
    assert not sums.values.any()
    sums.add(2)  # zeros
    sums.add(0)
    sums.add(1)
    assert sums.held() == ((2, 0),)
    reduce(sums, Group.alone(), [((2, 0),)])
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(parameters, own, strict=True))
    assert float(sums.scalars[0]) > 0
    sums.clear()
    assert sums.held() == ()
    assert not any(parameter.grad.any() for parameter in parameters)


@pytest.mark.parametrize("exact", [True, False])
def test_a_scalar_that_holds_no_longer_is_taken_out_of_all_that_is_held(exact: bool) -> None:
    computer = Computer(exact)
    computer.add([0, 1, 4])
    before = [values.clone() for values in (computer.sums.values, *computer.sums._tree.values())]
    computer.sums.scalars[0] += 1.0
    last = len(computer.sums.scalars) - 1
    computer.sums.forget_scalar(last)
    for values, was in zip((computer.sums.values, *computer.sums._tree.values()), before, strict=True):
        assert float(values[-1]) == 0.0
        assert torch.equal(values[: len(computer.sums.gradients)], was[: len(computer.sums.gradients)])


def test_slots_of_one_node_need_a_buffer_for_each_level_and_use_them_again() -> None:
    length = 123_457
    sums = SlotSums(nn.Linear(1, length, bias=False), num_scalars=3)

    def buffers() -> int:
        size = sums.values.numel()
        return sum(type(found) is Tensor and found.numel() == size for found in gc.get_objects())

    for _ in range(3):
        for slot in range(32):
            sums.add(slot)
        assert sums.held() == ((5, 0),)
        assert buffers() == 1 + 5
        sums.clear()


def test_reducing_something_else_than_what_is_held_is_refused() -> None:
    computer = Computer(exact=False)
    computer.add(range(4))
    with pytest.raises(ValueError, match="rank 0 holds"):
        reduce(computer.sums, Group.alone(), [((3, 0),)])


def test_clip_scales_to_the_largest_norm_and_leaves_scalars_and_small_gradients() -> None:
    model = small_model()
    sums = SlotSums(model, num_scalars=1)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad += 1.0 + i
    sums.scalars[0] = 1e6
    before = sums.gradients.clone()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item()
    assert sums.clip(2 * norm) == pytest.approx(norm)
    assert torch.equal(sums.gradients, before)
    assert sums.clip(0.5) == pytest.approx(norm)
    assert float(sums.gradients.norm()) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(sums.gradients / sums.gradients[0], before / before[0])
    assert float(sums.scalars[0]) == 1e6


def whole_step(group: Group, exact: bool = True) -> Tensor:
    computer = Computer(exact)
    todo = assign([()] * group.size, SLOTS)
    computer.add(todo.slots[group.rank])
    return reduce(computer.sums, group, todo.nodes).clone()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
def test_every_world_gives_the_bits_of_the_tree(wanted: Tensor, world_size: int) -> None:
    assert {digest(values) for values in in_group(world_size, whole_step)} == {digest(wanted)}


def test_another_order_of_the_sum_has_other_bits(wanted: Tensor) -> None:
    in_turn = torch.stack(leaves()).cumsum(0)[-1]
    torch.testing.assert_close(in_turn, wanted)
    assert digest(in_turn) != digest(wanted)


@pytest.mark.parametrize("piece", [2, 50, 64])
def test_pieces_make_no_difference(wanted: Tensor, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also pieces with fewer values than workers."""
    monkeypatch.setattr(slots_module, "_PIECE", piece)
    assert {digest(values) for values in in_group(3, whole_step)} == {digest(wanted)}


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_fast_mode_agrees_to_rounding(wanted: Tensor, world_size: int) -> None:
    for values in in_group(world_size, lambda group: whole_step(group, exact=False)):
        assert float((values - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_workers_that_vanish_and_come_in_mid_step_change_nothing(wanted: Tensor, exact: bool, seed: int) -> None:
    """Generations of one step: members compute some of their slots, then some are gone and others come."""
    draw = random.Random(seed)
    generations = [[0, 1, 2, 3, 4]]
    for newcomer in (5, 6):
        staying = draw.sample(generations[-1], draw.randint(1, len(generations[-1]) - 1))
        generations.append([*staying, newcomer])
        draw.shuffle(generations[-1])

    def body(peer: Peer) -> Tensor | None:
        computer, own = Computer(exact), random.Random(f"{seed} {peer.number}")
        for generation, members in enumerate(generations):
            if peer.number not in members:
                continue
            group = peer.form(generation, members)
            held = [[(level, index) for level, index in nodes] for nodes in group.gather_json(computer.sums.held())]
            todo = assign(held, SLOTS, exact=exact)
            check(held, todo, SLOTS, exact)
            computer.sums.discard(todo.dropped[group.rank])
            new = todo.slots[group.rank]
            last = generation == len(generations) - 1
            computer.add(new if last else new[: own.randint(0, len(new))])
            if last:
                return reduce(computer.sums, group, todo.nodes)
            group.leave()
        return None

    results = in_processes(7, body)
    assert [values is not None for values in results] == [number in generations[-1] for number in range(7)]
    for values in results:
        if values is not None and exact:
            assert digest(values) == digest(wanted)
        elif values is not None:
            assert float((values - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("exact", [True, False])
def test_a_worker_that_dies_in_the_reduction_costs_its_own_slots_only(
    wanted: Tensor, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "_PIECE", 64)

    class DiesInTheMiddle(Group):
        def all_gather(self, out: Tensor, mine: Tensor) -> None:
            self.leave()
            super().all_gather(out, mine)

        def all_reduce(self, tensor: Tensor) -> None:
            self.leave()
            super().all_reduce(tensor)

    def body(peer: Peer) -> tuple[int, Tensor] | None:
        computer = Computer(exact)
        group = peer.form(0, range(4))
        todo = assign([()] * 4, SLOTS, exact=exact)
        computer.add(todo.slots[group.rank])
        if peer.number == 2:
            group.__class__ = DiesInTheMiddle
        with pytest.raises(GroupLost):
            reduce(computer.sums, group, todo.nodes)
        if peer.number == 2:
            return None
        group.leave()
        assert computer.sums.held() == todo.nodes[peer.number]
        assert not exact or not computer.sums.values.any()

        group = peer.form(1, [3, 0, 1])
        again = assign(group.gather_json(computer.sums.held()), SLOTS, exact=exact)
        assert sorted(slot for own in again.slots for slot in own) == list(todo.slots[2])
        computer.add(again.slots[group.rank])
        return len(again.slots[group.rank]), reduce(computer.sums, group, again.nodes)

    results = [result for result in in_processes(4, body) if result is not None]
    assert sorted(count for count, _ in results) == [0, 2, 2]
    for _, values in results:
        if exact:
            assert digest(values) == digest(wanted)
        else:
            assert float((values - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("slots", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_arithmetic_counts_the_sums_that_are_held(slots: int, workers: int) -> None:
    computer = Computer()
    for slot in assign([()] * workers, slots).slots[0]:
        computer.sums.add(slot)
    held = len(computer.sums._tree) + len(computer.sums._spare)
    told = num_sums(slots, workers, exact=True)
    assert told == held if workers < 3 else held <= told <= held + 1


def test_room_that_is_reserved_is_used() -> None:
    computer = Computer()
    computer.sums.reserve(4)
    own = {tensor.data_ptr() for tensor in computer.sums._spare}
    computer.add(range(16))
    assert {t.data_ptr() for t in (*computer.sums._spare, *computer.sums._tree.values())} == own
    computer.sums.reserve(4)
    assert len(computer.sums._spare) == 3
