"""Sharded training on two to four real gloo processes: what it computes is what replicated training computes."""

from __future__ import annotations

import functools
import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from forge_ray.artifact import Artifact
from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.data.loader import SlotLoader
from forge_ray.errors import DiskFullError, TrainError
from forge_ray.model.transformer import Transformer, document_mask, load_weights
from forge_ray.train.elastic.group import Group
from forge_ray.train.loss import objective
from forge_ray.train.optimizer import Optimizer, rate_frac
from forge_ray.train.saving.checkpoint import Checkpoints
from forge_ray.train.saving.pieces import Pieces, assemble
from forge_ray.train.saving.saver import commit_pieces, save_piece
from forge_ray.train.sharded import buddy
from forge_ray.train.sharded.buddy import Buddy
from forge_ray.train.sharded.worker import Rows, ShardedOptimizer, ShardedWorker, _Named, form, share
from tests.unit.train import groups
from tests.unit.train.groups import Peer

ADAMW = {"kind": "adamw", "learning_rate": 4e-3}
MUON = {"kind": "muon", "learning_rate": 8e-3}
CPU = torch.device("cpu")
STEPS = 8
in_processes = functools.partial(groups.in_processes, limit_s=60.0)


def shape(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"num_layers": 2, "d_model": 32, "num_heads": 1, "d_ff": 50, **changes})


def settings(**changes: Any) -> PretrainConfig:
    small = {"steps": STEPS, "slots": 8, "micro_batch": 1, "seq_len": 32, "optimizer": ADAMW, "reduction": "fast"}
    return PretrainConfig(**{**small, **changes})


class Replicated:
    """The plain loop that sharded training is held against: one process, all slots, torch's own rules."""

    def __init__(self, corpus: Artifact, config: PretrainConfig, model: ModelConfig, bf16: bool = False) -> None:
        self.config, self.bf16, self.loader = config, bf16, SlotLoader.of(config, corpus)
        self.index = self.loader.order.index
        self.model = Transformer(model, self.index.vocab_size, config.seq_len).initialise(config.seed)
        self.optimizer = Optimizer(self.model, config.optimizer)

    def step(self, step: int) -> tuple[float, float]:
        loss, config = 0.0, self.config
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        for slot in range(config.slots):
            tokens = torch.from_numpy(self.loader.slot(step, slot))
            inputs, targets = tokens[:, :-1], tokens[:, 1:]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                hidden = self.model.hidden(inputs, document_mask(inputs, self.index.end_token))
            dtype = torch.bfloat16 if self.bf16 else torch.float32
            trained, mine = objective(self.model, hidden, targets, dtype)
            (trained / config.slots).backward()
            loss += float(mine) / config.slots
        norm = float(torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm())
        if norm > config.grad_clip:
            for p in self.model.parameters():
                p.grad.mul_(config.grad_clip / norm)
        self.optimizer.step(rate_frac(step, config))
        return loss, norm

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}


def meet(peer: Peer, generation: int, size: int) -> Group:
    store = dist.PrefixStore(str(generation), dist.FileStore(peer.store_path, -1))
    return form(store, peer.number, size, CPU, peer.limit_s)


class Member(ShardedWorker):
    """A worker of a group that stands, with what its tests want to know."""

    def __init__(self, peer: Peer, generation: int, size: int, corpus: Artifact, *args: Any, **options: Any) -> None:
        self.group = meet(peer, generation, size)
        config, model = args
        super().__init__(config, model, SlotLoader.of(config, corpus), **{"bf16": False, "device": CPU, **options})
        self.initialise()


def close(a: list[tuple[float, float]], b: list[tuple[float, float]], loss: float, norm: float) -> None:
    assert [row[0] for row in a] == pytest.approx([row[0] for row in b], rel=loss)
    assert [row[1] for row in a] == pytest.approx([row[1] for row in b], rel=norm)


@pytest.mark.parametrize(
    ("size", "config", "model", "bf16"),
    [
        (2, {}, {}, False),
        (3, {}, {"tied_embeddings": False}, True),  # 3 + 3 + 2 slots
        (3, {"optimizer": MUON, "micro_batch": 2}, {}, False),
        (4, {"optimizer": MUON, "slots": 2}, {"tied_embeddings": False}, True),  # two members have no slot at all
        (1, {"optimizer": MUON, "grad_clip": 0.5}, {}, True),
        (3, {"optimizer": MUON}, {"num_experts": 4, "experts_per_token": 2}, False),
        (2, {"optimizer": MUON}, {"num_experts": 4, "experts_per_token": 2}, True),
    ],
)
def test_losses_and_norms_are_those_of_replicated_training(
    corpus: Artifact, size: int, config: dict[str, Any], model: dict[str, Any], bf16: bool
) -> None:
    told = settings(**config), shape(**model)

    def train(peer: Peer) -> list[tuple[float, float]]:
        worker = Member(peer, 0, size, corpus, *told, bf16=bf16)
        return [worker.step_once(step, step) for step in range(STEPS)]

    replicated = Replicated(corpus, *told, bf16)
    wanted = [replicated.step(step) for step in range(STEPS)]
    results = in_processes(size, train)
    assert all(result == results[0] for result in results)
    # Where a CPU emulates bf16, a norm was off by 1.04e-3 (torch 2.13, AVX2).
    close(results[0], wanted, loss=1e-4, norm=3e-3 if bf16 else 1e-3)
    assert wanted[-1][0] < 0.95 * wanted[0][0]


def test_every_slot_is_read_once(corpus: Artifact) -> None:
    def train(peer: Peer) -> list[tuple[int, int]]:
        worker = Member(peer, 0, 3, corpus, settings(), shape())
        read, slot = [], worker.loader.slot
        worker.loader.slot = lambda position, number: (read.append((position, number)), slot(position, number))[1]
        worker.step_once(0, 5)
        return read

    read = [slot for slots in in_processes(3, train) for slot in slots]
    assert sorted(read) == [(5, slot) for slot in range(8)]


def test_a_worker_holds_its_rows_and_no_others(corpus: Artifact) -> None:
    def train(peer: Peer) -> tuple[int, int, int]:
        others = set(large_storages())  # of tests before this one
        worker = Member(peer, 0, 2, corpus, settings(optimizer=MUON), shape())

        def held() -> int:
            return sum(size for at, size in large_storages().items() if at not in others)

        worker.step_once(0, 0)
        between_steps = held()
        worker.compute(1)
        rows = sum(rows.tensor.nbytes for state in worker.state_rows() for rows in state.values())
        return between_steps, held(), rows

    whole = sum(p.nbytes for p in Transformer(shape(), 64, 32).parameters())
    for between_steps, before_commit, rows in in_processes(2, train):
        # Half of the weights and of momentum, and AdamW's second moment of the embedding.
        assert rows < between_steps < 1.3 * whole
        assert before_commit < 1.7 * whole  # and half of the gradients


def large_storages() -> dict[int, int]:
    """Bytes by address of all memory behind this process's larger tensors."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.numel() > 500]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_initial_weights_are_those_of_replicated_training_bit_for_bit(corpus: Artifact) -> None:
    def begin(peer: Peer) -> dict[str, Rows]:
        return Member(peer, 0, 3, corpus, settings(seed=7), shape()).state_rows()[0]

    whole = gathered(in_processes(3, begin))
    wanted = dict(Transformer(shape(), 64, 32).initialise(7).named_parameters())
    assert set(whole) == set(wanted)
    assert all(torch.equal(whole[name], wanted[name]) for name in wanted)


def gathered(pieces: list[dict[str, Rows]]) -> dict[str, Tensor]:
    """Whole tensors from every member's rows, each row of which there must be once."""
    whole: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for piece in pieces:
        for name, rows in piece.items():
            out = whole.setdefault(name, torch.empty(rows.shape))
            count = counts.setdefault(name, torch.zeros(rows.shape[0] if rows.shape else 1))
            if rows.shape:
                out[rows.first : rows.first + len(rows.tensor)] = rows.tensor
            else:
                out.copy_(rows.tensor)
            count[rows.first : rows.first + (len(rows.tensor) if rows.shape else 1)] += 1
    assert all(bool((count == 1).all()) for count in counts.values())
    return whole


def test_muon_on_rows_is_torchs_own_bit_for_bit() -> None:
    # Also holds torch's private functions to what they were when this was written.
    config = settings(optimizer=MUON).optimizer
    shapes = {"blocks.0.a": (7, 5), "blocks.0.b": (5, 7), "blocks.1.c": (2, 9), "blocks.1.d": (7, 5), "e": (11, 3)}

    def drawn(seed: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}

    def train(peer: Peer | None) -> dict[str, Tensor]:
        rank, size = (peer.number, 3) if peer else (0, 1)

        def mine(tensor: Tensor) -> Tensor:
            rows = share(len(tensor), rank, size)
            return tensor[rows.start : rows.stop].clone()

        parameters = {name: torch.nn.Parameter(mine(tensor)) for name, tensor in drawn(0).items()}
        if peer:
            meet(peer, 0, size)
            optimizer = ShardedOptimizer(_Named(parameters), config, shapes)
        else:
            optimizer = Optimizer(_Named(parameters), config)
        for step in range(1, 5):
            for name, tensor in drawn(step).items():
                parameters[name].grad = mine(tensor)
            optimizer.step(1.0 / step)
        return {name: parameter.detach() for name, parameter in parameters.items()}

    wanted, parts = train(None), in_processes(3, train)
    for name, tensor in wanted.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name


def test_a_loss_that_is_not_finite_changes_nothing_on_any_worker(corpus: Artifact) -> None:
    def train(peer: Peer) -> str:
        worker = Member(peer, 0, 2, corpus, settings(), shape())
        weights, _ = worker.state_rows()
        if worker.rank == 1:
            weights["embedding.weight"].tensor[0] = float("nan")
        before = {name: rows.tensor.clone() for name, rows in weights.items()}
        with pytest.raises(TrainError, match="the loss is not finite") as caught:
            worker.step_once(3, 0)
        weights, _ = worker.state_rows()
        assert all(torch.equal(rows.tensor.nan_to_num(), before[name].nan_to_num()) for name, rows in weights.items())
        return str(caught.value)

    assert all("step 3" in text for text in in_processes(2, train))


def test_what_a_discarded_step_computed_leaves_no_trace(corpus: Artifact) -> None:
    def train(peer: Peer) -> list[tuple[float, float]]:
        worker = Member(peer, 0, 2, corpus, settings(), shape())
        losses = []
        for step in range(3):
            worker.compute(100 + step)
            worker.discard()
            losses.append(worker.step_once(step, step))
        return losses

    replicated = Replicated(corpus, settings(), shape())
    close(in_processes(2, train)[0], [replicated.step(step) for step in range(3)], loss=1e-5, norm=1e-4)


# ------------------------------------------------------------------------------------------------- state in and out


def test_a_run_resized_from_checkpoint_to_checkpoint_keeps_its_curve(corpus: Artifact) -> None:
    told = settings(optimizer=MUON), shape()
    checkpoints = Checkpoints(corpus.workspace, "resized")
    replicated = Replicated(corpus, *told)
    wanted = [replicated.step(step) for step in range(STEPS)]
    found: Artifact | None = None
    curve = []
    for size in (4, 2, 3, 1):
        begin = len(curve)

        def train(peer: Peer, size: int = size, begin: int = begin, found: Artifact | None = found) -> tuple[Any, ...]:
            worker = Member(peer, 0, size, corpus, *told)
            if found is not None:
                worker.load_rows(Pieces(found))
            losses = [worker.step_once(step, step) for step in (begin, begin + 1)]
            return losses, *worker.state_rows()

        results = in_processes(size, train)
        curve += results[0][0]
        pieces = [save_piece(checkpoints, rank, size, *states) for rank, (_, *states) in enumerate(results)]
        found = commit_pieces(checkpoints, len(curve), pieces, {}, time.time(), keep=3)
    close(curve, wanted, loss=1e-4, norm=1e-3)
    last, _ = assemble(found)
    assert all(torch.allclose(last[name], value, atol=2e-3) for name, value in replicated.weights().items())


def test_a_replicated_run_goes_on_sharded_and_back(corpus: Artifact) -> None:
    told = settings(optimizer=MUON), shape()
    replicated = Replicated(corpus, *told)
    wanted = [replicated.step(step) for step in range(STEPS)]
    replicated = Replicated(corpus, *told)
    for step in range(3):
        replicated.step(step)
    checkpoint = Checkpoints(corpus.workspace, "whole").save(
        3, replicated.weights(), replicated.optimizer.tensors(), {}, keep=3
    )

    def train(peer: Peer) -> tuple[list[tuple[float, float]], dict[str, Rows], dict[str, Rows]]:
        worker = Member(peer, 0, 3, corpus, *told)
        worker.load_rows(Pieces(checkpoint))
        return [worker.step_once(step, step) for step in (3, 4, 5)], *worker.state_rows()

    results = in_processes(3, train)
    close(results[0][0], wanted[3:6], loss=1e-4, norm=1e-3)
    replicated = Replicated(corpus, *told)
    load_weights(replicated.model, gathered([weights for _, weights, _ in results]))
    for name, tensor in gathered([state for *_, state in results]).items():
        replicated.optimizer.tensors()[name].copy_(tensor)
    close([replicated.step(step) for step in (6, 7)], wanted[6:], loss=1e-4, norm=1e-3)


@pytest.mark.parametrize("other", [{"d_ff": 52}, {"num_layers": 3}, {"tied_embeddings": False}])
def test_a_state_of_another_model_is_refused(corpus: Artifact, other: dict[str, Any]) -> None:
    whole = Replicated(corpus, settings(), shape(**other))

    class Given:
        def shapes(self) -> dict[str, tuple[int, ...]]:
            tensors = {**whole.weights(), **whole.optimizer.tensors()}
            return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def load(peer: Peer) -> None:
        with pytest.raises(TrainError, match="another shape"):
            Member(peer, 0, 2, corpus, settings(), shape()).load_rows(Given())

    in_processes(2, load)


# ------------------------------------------------------------------------------------------------- memory of peers


def rounds(
    corpus: Artifact, folder: Path, generation: int, seats: list[int], stop: int, *, every: int = 2, run_id: str = "run"
) -> tuple[int | None, list[tuple[float, float]]]:
    """A group of these seats goes on from what their memory holds, up to a step; where it began, and its curve."""

    def train(peer: Peer) -> tuple[int | None, list[tuple[float, float]]]:
        worker = Member(peer, generation, len(seats), corpus, settings(optimizer=MUON), shape(), num_votes=1)
        own = folder / str(seats[peer.number])
        own.mkdir(exist_ok=True)
        found = buddy.newest(own, run_id, worker.group)
        if found is not None:
            worker.load_rows(found)
            assert found.extra == {"said at": found.step}
        kept, curve = Buddy(own, run_id, generation), []
        begin = found.step if found else 0
        for step in range(begin, stop):
            loss, norm, (busy,) = worker.compute(step, [kept.busy()])
            worker.commit(step, norm)
            curve.append((loss, norm))
            done = step + 1
            if done % every == 0:
                while busy:  # a loop would go on, and copy later
                    busy = sum(worker.group.gather_json(int(kept.busy())))
                weights, optimizer = worker.state_rows()
                kept.begin(done, {**weights, **optimizer}, {"said at": done})
        kept.wait()
        return found and found.step, curve

    results = in_processes(len(seats), train)
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def wanted(corpus: Artifact) -> list[tuple[float, float]]:
    replicated = Replicated(corpus, settings(optimizer=MUON), shape())
    return [replicated.step(step) for step in range(STEPS)]


def lose(memory: Path, *seats: int) -> None:
    for seat in seats:
        for path in (memory / str(seat)).iterdir():
            path.unlink()


def test_lost_nodes_that_are_no_neighbours_cost_no_more_than_the_steps_since_the_last_copy(
    corpus: Artifact, memory: Path, wanted: list[tuple[float, float]]
) -> None:
    begun, curve = rounds(corpus, memory, 1, [0, 1, 2, 3], stop=3)
    assert begun is None
    lose(memory, 1, 3)
    begun, more = rounds(corpus, memory, 2, [0, 2], stop=4)
    assert begun == 2
    curve[2:] = more
    # A new node comes, others change places; nobody has lost anything but the work since step 4.
    begun, more = rounds(corpus, memory, 3, [5, 2, 0], stop=7)
    assert begun == 4
    curve[4:] = more
    begun, more = rounds(corpus, memory, 4, [0, 5], stop=8)
    assert begun == 6
    curve[6:] = more
    close(curve, wanted, loss=1e-4, norm=1e-3)


def test_neighbours_lost_together_leave_no_whole_state(corpus: Artifact, memory: Path) -> None:
    rounds(corpus, memory, 1, [0, 1, 2], stop=2)
    lose(memory, 0, 1)
    begun, _ = rounds(corpus, memory, 2, [2, 0], stop=1)
    assert begun is None


def test_a_copy_with_a_flipped_bit_is_passed_over_for_the_neighbours_or_for_the_one_before(
    corpus: Artifact, memory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rounds(corpus, memory, 1, [0, 1], stop=4)
    flip(memory / "0" / "1-own-1.rows", 1000)
    assert rounds(corpus, memory, 1, [0, 1], stop=0)[0] == 4
    assert "1-own-1.rows of step 4 is damaged" in capfd.readouterr().err
    flip(memory / "1" / "1-peer-1.rows", 3)
    assert rounds(corpus, memory, 1, [0, 1], stop=0)[0] == 2


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_no_byte_of_a_copy_can_change_unseen(memory: Path) -> None:
    tensors = {"a": Rows((3, 2), 0, torch.randn(3, 2)), "a/step": Rows((), 0, torch.tensor(5.0))}

    def keep(peer: Peer) -> None:
        meet(peer, 0, 1)
        kept = Buddy(memory, "run", 3)
        kept.begin(7, tensors, {"said": [0.1, "é"]})
        kept.wait()

    in_processes(1, keep)
    alone = Group.alone()
    found = buddy.newest(memory, "run", alone)
    assert (found.step, found.extra) == (7, {"said": [0.1, "é"]})
    assert found.shapes() == {"a": (3, 2), "a/step": ()}
    assert torch.equal(found.rows("a", range(1, 3)), tensors["a"].tensor[1:])
    assert found.rows("a/step", range(1)) == 5.0
    for path in memory.iterdir():
        whole = path.read_bytes()
        for at in range(len(whole)):
            content = bytearray(whole)
            content[at] ^= 1 << at % 8
            path.write_bytes(content)
            assert buddy.newest(memory, "run", alone) is None, (path.name, at)
        path.write_bytes(whole)
    assert buddy.newest(memory, "run", alone)


def test_copies_of_another_run_are_not_taken(corpus: Artifact, memory: Path) -> None:
    rounds(corpus, memory, 1, [0, 1], stop=2)
    assert rounds(corpus, memory, 2, [0, 1], stop=0, run_id="other")[0] is None


def test_memory_that_does_not_hold_the_copies_is_said(corpus: Artifact, memory: Path) -> None:
    import resource

    def train(peer: Peer) -> None:
        worker = Member(peer, 0, 1, corpus, settings(), shape())
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(DiskFullError, match="no memory for copies"):
            Buddy(memory, "run", 1).begin(1, worker.state_rows()[0], {})

    in_processes(1, train)
