"""Training of models that do not fit on one device: parameters, gradients and moments are shared out by rows (FSDP2).

Each worker keeps its rows of every matrix and of the optimizer's moments for it; a block's matrices are gathered when
it computes and dropped after. Vectors (norms) are a ten-thousandth of a model: every worker has them whole. Samples,
slots, the schedule and the loss are those of replicated training, and the sum over slots is the library's (fast mode).
Owns the sharding, a step, the optimizer on rows, and the rows in and out. Not covered: keeping activations small.

A group that loses a member ends: what a step has half scattered nobody can mend. Its workers start anew, from the
newest rows in their peers' memory (`buddy.py`) or from a checkpoint, in a group of any size.

Memory of a worker, for N parameters on W workers with Muon: 12 N / W bytes of fp32 weights, gradients and momentum (16
with AdamW), the embedding and the head whole, two blocks in the compute precision, activations.

Source: ZeRO stage 3 (arXiv 1910.02054), PyTorch FSDP (arXiv 2304.11277).

Lines that no test executes without a GPU: in `form`, the branch for CUDA. All else is the same code on both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch._dynamo  # fully_shard imports it when it is called: who is forked from this process need not
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.experimental import implicit_replication

from forge_ray.config import AdamWConfig, ModelConfig, MuonConfig, PretrainConfig
from forge_ray.data.loader import SlotLoader
from forge_ray.errors import TrainError
from forge_ray.model.transformer import Experts, Transformer, rotary_tables
from forge_ray.train.elastic.group import Group, GroupLost
from forge_ray.train.loop import learn
from forge_ray.train.optimizer import Optimizer, ahead, move, orthogonalised, rate_frac


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a tensor; a tensor without dimensions is one row.

    Args:
        shape: Of the whole tensor.
        first: Row of the whole at which these begin.
        tensor: The rows.
    """

    shape: tuple[int, ...]
    first: int
    tensor: Tensor


class RowReader(Protocol):
    """Where rows come from: a checkpoint's files, or peers. Every worker asks for every tensor, in one order."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by name, weights as `<parameter>`, the optimizer's as `<parameter>/<quantity>`."""
        ...

    def rows(self, name: str, rows: range) -> Tensor:
        """These rows of a tensor; of one without dimensions, itself."""
        ...


def share(count: int, rank: int, size: int) -> range:
    """The rows of a worker, as FSDP2 shares them out: equal runs, rounded up, so that the last may get fewer."""
    run = -(-count // size)
    return range(min(rank * run, count), min((rank + 1) * run, count))


def num_rows(shape: Sequence[int]) -> int:
    """Rows of a tensor; one without dimensions is one row."""
    return shape[0] if len(shape) else 1


def form(store: Any, rank: int, size: int, device: torch.device, timeout_s: float) -> Group:
    """Makes this process a member of torch's default group, which device meshes want.

    Args:
        store: A torch store of this generation's own.
        timeout_s: A call that waits longer for a peer fails. One whose peer has died fails within milliseconds.

    Returns:
        The same group, for tensors in CPU memory.

    Raises:
        GroupLost: A member is gone before all have met.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise GroupLost(f"the group could not form: {error}") from None
    return Group(dist.group.WORLD, rank, size, torch.device("cpu"), lambda: False)


class ShardedWorker:
    """A member of a sharded group: its rows, and the steps that they take. It has no state before `initialise` or
    `load_rows`.

    All members call its methods in the same order; a member that is gone makes them raise `RuntimeError`, and ends the
    group.

    Args:
        config: Of the run.
        shape: Of the model.
        loader: What slot s of position t reads, as in replicated training.
        bf16: Whether blocks compute in bf16; weights, sums of gradients and moments are fp32.
        device: Of this process.
        num_votes: Numbers that `compute` sums over the workers along with the gradients.
    """

    def __init__(
        self,
        config: PretrainConfig,
        shape: ModelConfig,
        loader: SlotLoader,
        *,
        bf16: bool,
        device: torch.device,
        num_votes: int = 0,
    ) -> None:
        self.config, self.loader, self.bf16, self.device = config, loader, bf16, device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        index = loader.order.index
        self.end_token = index.end_token
        self.model = _shard(shape, index.vocab_size, config.seq_len, bf16, device, recompute=config.recompute == "on")
        named = dict(self.model.named_parameters())
        self._matrices = {name: p for name, p in named.items() if p.ndim == 2}
        with torch.no_grad():
            local = {name: nn.Parameter(p.to_local()) if p.ndim == 2 else p for name, p in named.items()}
        self._local = {name: local[name] for name in self._matrices}
        self._shapes = {name: tuple(p.shape) for name, p in named.items()}
        self.optimizer = ShardedOptimizer(_Named(local), config.optimizer, self._shapes)
        vectors = [p for p in named.values() if p.ndim == 1]
        self._sums = torch.zeros(sum(p.numel() for p in vectors) + 2 + num_votes, device=device)
        begin = 0
        for p in vectors:
            p.grad = self._sums[begin : begin + p.numel()].view_as(p)
            begin += p.numel()
        self._vector_sums, self._scalars = self._sums[:begin], self._sums[begin:]
        self.data_s = self.waited_s = 0.0
        """Seconds in the last `compute` for samples, and for the slowest member and the last sum."""

    def initialise(self) -> None:
        """Takes the weights and moments that a run begins with: those of replicated training, bit for bit.

        Cost: every worker draws every weight, and holds one tensor whole at a time.
        """
        with implicit_replication():
            self.model.initialise(self.config.seed)
        for tensor in self.optimizer.tensors().values():
            tensor.zero_()

    def compute(
        self, position: int, votes: Sequence[float] = (), progress: Callable[[str], None] = lambda phase: None
    ) -> tuple[float, float, list[float]]:
        """Forward and backward over the slots of a position; the gradients wait for `commit` or `discard`.

        Gradients are scattered after every pass: a slot, or `at_once` of its sequences. Scattering once per step would
        keep a whole fp32 gradient on every worker, which is what did not fit; each pass gathers the blocks twice
        anyway, so it saves half the traffic at most. A worker with fewer passes than others goes through the same
        collective calls with two tokens of weight zero.

        Args:
            progress: Told before samples are awaited, and when they are there.

        Returns:
            Loss in nats per token, the norm of the gradient and the sum of the votes, the same on every worker.
        """
        at_once = self.config.at_once or self.config.micro_batch
        parts = self.config.micro_batch // at_once
        count = self.config.slots * parts
        mine = range(count * self.rank // self.size, count * (self.rank + 1) // self.size)
        passes = -(-count // self.size)
        self.data_s = 0.0
        for i in range(passes):
            # The embedding and the head stay gathered from pass to pass.
            self.model.set_reshard_after_backward(i + 1 == passes, recurse=False)
            if i < len(mine):
                slot, part = divmod(mine[i], parts)
                asked_s = time.monotonic()
                progress("data")
                tokens = torch.from_numpy(self.loader.slot(position, slot))
                progress("computing")
                self.data_s += time.monotonic() - asked_s
                self._backward(tokens[part * at_once : (part + 1) * at_once], 1.0 / count)
            else:
                self._backward(torch.zeros((1, 3), dtype=torch.int64), 0.0)
        self._scalars[1] = nn.utils.get_total_norm(self._gradients()).square()
        self._scalars[2:] = torch.tensor(votes)
        computed_s = time.monotonic()
        dist.all_reduce(self._sums)
        loss, squares, *votes = self._scalars.tolist()
        self.waited_s = time.monotonic() - computed_s
        return loss, (squares + float(self._vector_sums.square().sum())) ** 0.5, votes

    def commit(self, step: int, norm: float) -> None:
        """Takes the step with the gradients of the last `compute`, clipped."""
        if norm > self.config.grad_clip:
            for gradient in (*self._gradients(), self._vector_sums):
                gradient.mul_(self.config.grad_clip / norm)
        for name, gradient in zip(self._local, self._gradients(), strict=True):
            self._local[name].grad = gradient
        self.optimizer.step(rate_frac(step, self.config))
        self.discard()

    def discard(self) -> None:
        """Forgets the gradients."""
        for name, matrix in self._matrices.items():
            matrix.grad = self._local[name].grad = None
        self._sums.zero_()

    def step_once(self, step: int, position: int) -> tuple[float, float]:
        """One step, taken.

        Returns:
            Loss in nats per token and the norm of the gradient before clipping.

        Raises:
            TrainError: The loss or the gradient is not finite; nothing is changed.
        """
        loss, norm, _ = self.compute(position)
        if not torch.isfinite(torch.tensor([loss, norm])).all():
            self.discard()
            raise TrainError(
                "the loss is not finite",
                got=f"loss {loss}, gradient norm {norm} at step {step}",
                do="lower pretrain.optimizer.learning_rate, or set pretrain.precision to fp32",
            )
        self.commit(step, norm)
        return loss, norm

    def state_rows(self) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """This worker's rows of the weights and of the optimizer's tensors: together all rows, each once.

        They are the state itself, not copies. Tensors without dimensions are with rank 0.
        """
        weights, optimizer = {}, {}
        for name, whole, tensor in self._tensors():
            mine = share(num_rows(whole), self.rank, self.size)
            if len(whole) == 1:
                tensor = tensor[mine.start : mine.stop]
            if whole or mine:
                (optimizer if "/" in name else weights)[name] = Rows(whole, mine.start, tensor)
        return weights, optimizer

    def load_rows(self, reader: RowReader) -> None:
        """Takes over a state, written by any number of workers.

        Raises:
            TrainError: It belongs to another model or another optimizer; nothing is changed.
            CorruptError: Some of it does not verify; some may be taken over already.
        """
        tensors = list(self._tensors())
        own, given = {name: whole for name, whole, _ in tensors}, reader.shapes()
        wrong = sorted(set(own) ^ set(given)) or sorted(name for name in own if own[name] != tuple(given[name]))
        if wrong:
            raise TrainError(
                "the checkpoint belongs to a model of another shape or another optimizer",
                got=", ".join(wrong[:3]),
                do="use the model and optimizer sections that the run was started with",
            )
        with torch.no_grad():
            for name, whole, tensor in tensors:
                rows = range(num_rows(whole))
                tensor.copy_(reader.rows(name, share(len(rows), self.rank, self.size) if len(whole) == 2 else rows))

    def _tensors(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Name, shape of the whole, and what this worker holds of it: rows of matrices, all of the rest."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                yield name, self._shapes[name], self._local.get(name, parameter).detach()
            for name, tensor in sorted(self.optimizer.tensors().items()):
                yield name, self._shapes[name.rpartition("/")[0]] if tensor.ndim else (), tensor

    def _gradients(self) -> list[Tensor]:
        return [matrix.grad.to_local() for matrix in self._matrices.values()]

    def _backward(self, tokens: Tensor, weight: float) -> None:
        """Adds `weight` times the gradient of a micro-batch's loss. Shapes: tokens (B, T + 1)."""
        self._scalars[0] += weight * learn(self.model, tokens.to(self.device), self.end_token, self.bf16, weight)


class ShardedOptimizer(Optimizer):
    """The rules of `Optimizer` on rows. AdamW looks at one value at a time, so rows are all it needs.

    Muon's update is a function of the whole matrix: matrix i of a batch of W travels to worker i, which
    orthogonalises it while the others do theirs, and its rows travel back. bf16 is sent both ways, because that is what
    torch's Newton-Schulz computes in and returns: the result is that of torch's own Muon, bit for bit.

    Cost: 4 bytes of traffic per parameter and step, a W-th of replicated Muon's Newton-Schulz, one matrix of memory.
    """

    def __init__(
        self, parameters: nn.Module, config: AdamWConfig | MuonConfig, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        super().__init__(parameters, config)
        self._shapes = shapes
        self._rank, self._size = dist.get_rank(), dist.get_world_size()

    def step(self, rate_frac: float) -> None:
        """Applies the gradients at this share of the peak rates. Collective."""
        for rule, peaks in zip(self._rules, self._peaks, strict=True):
            for group, peak in zip(rule.param_groups, peaks, strict=True):
                group["lr"] = peak * rate_frac
                if isinstance(rule, torch.optim.Muon):
                    self._muon(group, rule.state)
            if not isinstance(rule, torch.optim.Muon):
                rule.step()

    @torch.no_grad()
    def _muon(self, group: dict[str, Any], state: dict[nn.Parameter, dict[str, Tensor]]) -> None:
        # Matrices of one shape together, so that the workers' shares of a batch take equally long.
        matrices = sorted(group["params"], key=lambda p: self._shapes[self._names[p]])
        for start in range(0, len(matrices), self._size):
            batch = matrices[start : start + self._size]
            updates = []
            for p in batch:
                momentum = state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                updates.append(ahead(p.grad, momentum, group).bfloat16())
            shapes = [self._shapes[self._names[p]] for p in batch]
            for p, update, shape in zip(batch, self._orthogonalised(updates, shapes, group), shapes, strict=True):
                move(p, update.view_as(p), group, shape)

    def _orthogonalised(
        self, updates: list[Tensor], shapes: list[tuple[int, ...]], group: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """Own rows of the orthogonalised matrices of which `updates` are own rows; worker i computes matrix i."""
        own_counts = [update.numel() for update in updates] + [0] * (self._size - len(updates))
        whole = shapes[self._rank] if self._rank < len(shapes) else (0, 0)
        whole_counts = [len(share(whole[0], rank, self._size)) * whole[1] for rank in range(self._size)]
        sent = torch.cat([update.flatten() for update in updates])
        matrix = sent.new_empty(sum(whole_counts))
        dist.all_to_all_single(matrix, sent, whole_counts, own_counts)
        if self._rank < len(shapes):
            matrix = orthogonalised(matrix.view(whole), group)
        dist.all_to_all_single(sent, matrix.contiguous().flatten(), own_counts, whole_counts)
        return sent.split(own_counts[: len(updates)])


class _Named(nn.Module):
    """Parameters under names that may hold dots."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._named = parameters

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._named.items()


def _shard(
    shape: ModelConfig, vocab_size: int, max_len: int, bf16: bool, device: torch.device, recompute: bool
) -> Transformer:
    """A model of which this worker has its rows, not yet initialised. One block at a time is allocated whole.

    Blocks gather their matrices in the precision in which they compute: with fp32 matrices under autocast, autograd
    would keep a bf16 copy of every gathered matrix until the backward pass, and so the whole model. The embedding and
    the head are fp32, because the residual stream is and because the loss casts the head by itself; so is a router,
    which chooses experts as in replicated training.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    with torch.device("meta"):
        model = Transformer(shape, vocab_size, max_len)
    model.recompute = recompute
    model.cos, model.sin = (table.to(device) for table in rotary_tables(max_len, shape.head_dim, shape.rope_theta))
    compute = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    routers = []
    for block in model.blocks:
        block.to_empty(device=device)
        if isinstance(block.mlp, Experts):
            routers.append(fully_shard(block.mlp.router, mesh=mesh))
        fully_shard(block, mesh=mesh, mp_policy=compute, ignored_params={p for p in block.parameters() if p.ndim == 1})
    for module in (model.embedding, model.norm, model.head):
        module.to_empty(device=device)
    if shape.tied_embeddings:
        model.head.weight = model.embedding.weight
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p.ndim == 1})
    register_fsdp_forward_method(model, "hidden")
    for module in (model, *model.blocks, *routers):
        # The sum over slots is what counts, not the mean over workers; gloo has no other operation.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model
