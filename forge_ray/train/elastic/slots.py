"""Who computes which slots, and how their gradients become one sum.

A step is a fixed number of slots, a power of two, whatever the number of workers. Owns the aligned binary tree over
slots, who computes what is missing of a step, the sums that a worker holds of it, and the reduction over workers.

In exact mode a slot's gradient is a leaf of the tree, and a node is the sum of its two children in fp32: a worker holds
the sums of whole nodes and hands those on, so the bits of the root depend neither on who computed what, nor on how
often the group changed on the way. In fast mode a worker adds its slots up as they come, and the communication library
chooses the order of the rest.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forge_ray.train.elastic.group import Group, GroupLost
from forge_ray.train.state import offsets

Node = tuple[int, int]
"""(level, index): stands for the slots from `index << level` up to `(index + 1) << level`."""

# fp32 values that are reduced at a time, 16 MiB. At 64 MiB fresh pages double the CPU time (2026-11-24).
_PIECE = 1 << 22


def slots_of(nodes: Iterable[Node]) -> set[int]:
    """The slots below these nodes."""
    return {slot for level, index in nodes for slot in range(index << level, (index + 1) << level)}


def nodes_of(slots: Iterable[int]) -> tuple[Node, ...]:
    """The fewest nodes that stand for exactly these slots, in their order."""
    tree: set[Node] = set()
    for slot in set(slots):
        _insert(tree, (0, slot))
    return tuple(sorted(tree, key=lambda node: node[1] << node[0]))


@dataclass(frozen=True)
class Assignment:
    """Who does what for the rest of a step; everything by rank."""

    dropped: tuple[tuple[Node, ...], ...]
    """Held nodes that do not count, because another worker holds the same slots."""
    slots: tuple[tuple[int, ...], ...]
    """What each worker computes now, in this order."""
    nodes: tuple[tuple[Node, ...], ...]
    """What each worker holds afterwards: together, every slot once."""


def assign(held: Sequence[Collection[Node]], slots: int, *, exact: bool = True) -> Assignment:
    """Shares out what is missing of a step, the same way on every worker that asks.

    The worker with the most gets as little as can be, so a step takes no longer than it must; within that, workers get
    nodes as large as possible, because each node that is held in the end is sent once. Some may get none: 5 workers for
    16 slots are 4, 4, 4, 4 and 0, which takes as long as 4, 3, 3, 3, 3 and sends 4 nodes, not 9. Of nodes that overlap
    the largest counts, among equals that of the lowest rank.

    Args:
        held: By rank, what each worker holds already: nothing in a fresh step.
        slots: Of a step, a power of two.
        exact: False where a worker's nodes are one sum, which counts as a whole or not at all.

    Cost: 0.1 ms for 64 slots and 7 workers, 4 ms for 1,024 and 128.
    """
    ranks = range(len(held))
    whole = [tuple((level, index) for level, index in nodes) for nodes in held]  # JSON makes lists of them
    lots = [(rank, lot) for rank in ranks for lot in ([(node,) for node in whole[rank]] if exact else [whole[rank]])]
    kept: list[set[Node]] = [set() for _ in ranks]
    dropped: list[list[Node]] = [[] for _ in ranks]
    covered: set[int] = set()
    for rank, lot in sorted(lots, key=lambda entry: (-len(slots_of(entry[1])), entry)):
        if covered.isdisjoint(slots_of(lot)):
            kept[rank].update(lot)
            covered |= slots_of(lot)
        else:
            dropped[rank].extend(lot)
    missing = set(range(slots)) - covered
    room = [-(-len(missing) // len(held))] * len(held)
    mine: list[set[int]] = [set() for _ in ranks]
    left = [(-level, index) for level, index in nodes_of(missing)]
    heapq.heapify(left)
    while left:
        level, index = -left[0][0], heapq.heappop(left)[1]
        able = [rank for rank in ranks if room[rank] >= 1 << level]
        if not able:
            for half in (2 * index, 2 * index + 1):
                heapq.heappush(left, (1 - level, half))
            continue
        rank = min(able, key=lambda r: (_sibling((level, index)) not in kept[r], -room[r], r))
        room[rank] -= 1 << level
        mine[rank] |= slots_of([(level, index)])
        _insert(kept[rank], (level, index))
    return Assignment(
        tuple(map(tuple, dropped)),
        tuple(tuple(sorted(own)) for own in mine),
        tuple(nodes_of(slots_of(k)) for k in kept),
    )


class SlotSums:
    """What a worker has computed of a step: the sums of its slots' gradients, with a tail of scalars summed along.

    `values` is the buffer behind every parameter's `.grad`, each aligned, then the scalars: backward adds a slot's
    gradient there, `add` takes it away, and `reduce` puts the sum over all workers there, for the optimizer.

    Args:
        model: Its parameters' gradients become views of `values`.
        num_scalars: Length of the tail.
        exact: Keep sums of nodes; else one sum, which stays in `values`.

    Cost: Exact mode holds one more buffer of the model's size for each node, and while it computes 2**k slots of one
    node up to k of them (`arithmetic.num_sums`); buffers are used again. A slot costs about three passes over such a
    buffer: 4 ms of CPU time with 10 M parameters.
    """

    def __init__(self, model: nn.Module, num_scalars: int, *, exact: bool = True) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        begins, count = offsets(parameter.numel() for parameter in parameters)
        self.values = torch.zeros(count + num_scalars, dtype=torch.float32, device=parameters[0].device)
        self.gradients, self.scalars = self.values[:count], self.values[count:]
        for parameter, begin in zip(parameters, begins, strict=True):
            parameter.grad = self.values[begin : begin + parameter.numel()].view_as(parameter)
        self.exact = exact
        self._slots: set[int] = set()
        self._tree: dict[Node, Tensor] = {}
        self._spare: list[Tensor] = []

    def add(self, slot: int) -> None:
        """Takes what `values` holds for the gradient and the scalars of this slot."""
        self._slots.add(slot)
        if self.exact:
            consumed = _add_up(self._tree, (0, slot), self.values)
            if consumed:
                self._spare += consumed[1:]  # the first is `values` itself
            else:
                leaf = self._spare.pop() if self._spare else torch.empty_like(self.values)
                self._tree[0, slot] = leaf.copy_(self.values)
            self.values.zero_()

    def forget_scalar(self, index: int) -> None:
        """Takes a scalar of the tail out of all that is held: what it counted no longer holds."""
        for values in (self.values, *self._tree.values()):
            values[len(self.gradients) + index] = 0.0

    def reserve(self, count: int) -> None:
        """Makes room for so many sums at a time, before any is needed."""
        self._spare += [torch.empty_like(self.values) for _ in range(count - len(self._spare) - len(self._tree))]

    def held(self) -> tuple[Node, ...]:
        """The nodes whose sums are here."""
        return nodes_of(self._slots)

    def discard(self, nodes: Collection[Node]) -> None:
        """Forgets the sums of these nodes; in fast mode all that are held, or none."""
        if nodes and not self.exact:
            self.clear()
        elif nodes:
            self._slots -= slots_of(nodes)
            self._spare += [self._tree.pop(node) for node in nodes]

    def clear(self) -> None:
        """Zeros, and nothing held, for the next step."""
        self._slots.clear()
        self._spare += self._tree.values()
        self._tree.clear()
        self.values.zero_()

    def restore(self) -> None:
        """Holds again what it held before the sum over workers; in fast mode nothing, since that is gone."""
        if self.exact:
            self.values.zero_()
        else:
            self.clear()

    def clip(self, max_norm: float) -> float:
        """Scales the gradients down to a largest norm; returns the norm before."""
        norm = float(self.gradients.norm())
        if norm > max_norm:
            self.gradients.mul_(max_norm / norm)
        return norm


def reduce(sums: SlotSums, group: Group, held: Sequence[Collection[Node]]) -> Tensor:
    """Adds up what all workers hold and puts it into `values` on each of them, the same bits everywhere.

    Exact mode: an all-to-all brings each rank its share of every node, the rank adds them up the tree, an all-gather
    returns the shares. When the group is lost on the way, the worker holds what it held before. A call that a lost
    group leaves behind writes only into buffers made here. What it still reads may change, but reaches no total:
    without this worker nobody gets past the all-gather that follows.

    Args:
        held: By rank, what each worker holds: `Assignment.nodes`.

    Raises:
        GroupLost: A member is gone, or another group takes its place.

    Cost: With N nodes on W workers a worker sends and receives N/W of the model's size on average, and once more to
    return it: as much as a ring, where N = W. Memory: N/W + 1 times 16 MiB. Fast mode: one all-reduce, and a copy of
    `values`.
    """
    if sums.held() != tuple(held[group.rank]):
        raise ValueError(f"rank {group.rank} holds {sums.held()}, not {held[group.rank]}")
    if not sums.exact:
        if group.size > 1:
            total = sums.values.clone()
            group.all_reduce(total)
            sums.values.copy_(total)
    elif group.size == 1:
        ((_, total),) = sums._tree.items()
        sums.values.copy_(total)
    else:
        try:
            for piece in range(0, sums.values.numel(), _PIECE):
                _reduce_piece(sums, group, held, slice(piece, piece + _PIECE))
        except GroupLost:
            sums.values.zero_()
            raise
    return sums.values


def _reduce_piece(sums: SlotSums, group: Group, held: Sequence[Collection[Node]], piece: slice) -> None:
    """One turn for each node of the worker that holds most; each sends one node's piece, cut into the ranks' shares."""
    values = sums.values[piece]
    share = -(-values.numel() // group.size)
    shares = [min(share, max(0, values.numel() - share * rank)) for rank in range(group.size)]
    mine = shares[group.rank]
    tree: dict[Node, Tensor] = {}
    for turn in range(max(map(len, held))):
        sent = [nodes[turn] if turn < len(nodes) else None for nodes in held]
        node = sent[group.rank]
        got = values.new_empty(len(held) - sent.count(None), mine)
        group.all_to_all(
            got.view(-1),
            values.new_empty(0) if node is None else sums._tree[node][piece],
            [0 if node is None else mine for node in sent],
            [0] * group.size if node is None else shares,
        )
        for node, part in zip((node for node in sent if node is not None), got):
            _add_up(tree, node, part)
    ((_, total),) = tree.items()
    padded = values.new_zeros(share)
    padded[:mine] = total
    out = values.new_empty(share * group.size)
    group.all_gather(out, padded)
    values.copy_(out[: values.numel()])


def _add_up(tree: dict[Node, Tensor], node: Node, value: Tensor) -> list[Tensor]:
    """Puts a node's sum into a tree and adds up pairs as far as there are any; returns the tensors no longer needed.

    A pair is added into the one that was there first, left or right: IEEE addition is commutative, so both ways give
    the same bits (but for the payload of a NaN made from two, and then the step is lost anyway).
    """
    consumed = []
    while (other := tree.pop(_sibling(node), None)) is not None:
        consumed.append(value)
        node, value = _parent(node), other.add_(value)
    tree[node] = value
    return consumed


def _insert(tree: set[Node], node: Node) -> None:
    """Puts a node into a set of nodes; a pair becomes its parent."""
    while _sibling(node) in tree:
        tree.remove(_sibling(node))
        node = _parent(node)
    tree.add(node)


def _sibling(node: Node) -> Node:
    return node[0], node[1] ^ 1


def _parent(node: Node) -> Node:
    return node[0] + 1, node[1] >> 1
