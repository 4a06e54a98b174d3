"""AdamW and Muon behind one face: a step at a rate, and a state that is nothing but named tensors.

Owns which parameter gets which rule, and the schedule. The rules themselves are torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from forge_ray.config import AdamWConfig, MuonConfig, PretrainConfig
from forge_ray.model.arithmetic import newton_schulz_cost
from forge_ray.train.elastic.group import Group


class Optimizer:
    """Steps a model's parameters.

    With Muon, hidden matrices get Muon and the rest (embedding, output projection, routers, norms) AdamW: what
    multiplies or makes a one-hot vector, or is one vector, has no spectrum to even out.

    Source: Muon: Jordan et al. 2024, and its scaling to AdamW's update size in Moonlight (arXiv 2502.16982).
    """

    def __init__(self, model: nn.Module, config: AdamWConfig | MuonConfig) -> None:
        named = dict(model.named_parameters())  # a tied head is listed once, as the embedding
        self._names = {parameter: name for name, parameter in named.items()}
        hidden = (
            [p for n, p in named.items() if p.ndim == 2 and n.startswith("blocks.") and not n.endswith("router.weight")]
            if isinstance(config, MuonConfig)
            else []
        )
        taken = {id(p) for p in hidden}
        rest = [p for p in named.values() if id(p) not in taken]
        self._rules: list[torch.optim.Optimizer] = [
            _adamw(rest, config.adamw if isinstance(config, MuonConfig) else config)
        ]
        if isinstance(config, MuonConfig):
            self._rules.append(
                torch.optim.Muon(
                    hidden,
                    lr=config.learning_rate,
                    momentum=config.momentum,
                    nesterov=True,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        for rule in self._rules:
            _begin(rule)
        self._peaks = [[group["lr"] for group in rule.param_groups] for rule in self._rules]

    @torch.no_grad()
    def directions(self, members: Group) -> dict[nn.Parameter, Tensor] | None:
        """What Muon moves each matrix along in this step: every worker works out some, and all get all.

        Changes nothing, so that a step that is lost here can be taken again. The bits are those of torch's own rule;
        none where one worker has to do it all, or there is no Muon.

        Raises:
            GroupLost: A member is gone, or another group takes its place.

        Cost: 2 bytes of traffic and of memory for a parameter, a W-th of Newton-Schulz.
        """
        muon = next((rule for rule in self._rules if isinstance(rule, torch.optim.Muon)), None)
        if muon is None or members.size == 1:
            return None
        (group,) = muon.param_groups
        shares = shared_out(group["params"], members.size)
        longest = max(sum(p.numel() for p in share) for share in shares)
        mine, at = torch.zeros(longest, dtype=torch.bfloat16, device=members.device), 0
        for p in shares[members.rank]:
            momentum = muon.state[p]["momentum_buffer"].lerp(p.grad, 1 - group["momentum"])
            mine[at : at + p.numel()] = orthogonalised(ahead(p.grad, momentum, group), group).flatten()
            at += p.numel()
        out = mine.new_empty(longest * members.size)
        members.all_gather(out.view(torch.uint8), mine.view(torch.uint8))
        found = {}
        for share, row in zip(shares, out.view(members.size, longest), strict=True):
            counts = [p.numel() for p in share]
            parts = row[: sum(counts)].split(counts)
            found |= {p: part.view_as(p) for p, part in zip(share, parts, strict=True)}
        return found

    @torch.no_grad()
    def step(self, rate_frac: float, directions: dict[nn.Parameter, Tensor] | None = None) -> None:
        """Applies the gradients at this share of the peak rates, with Muon's part worked out before or here."""
        for rule, peaks in zip(self._rules, self._peaks, strict=True):
            for group, peak in zip(rule.param_groups, peaks, strict=True):
                group["lr"] = peak * rate_frac
                if directions is not None and isinstance(rule, torch.optim.Muon):
                    for p in group["params"]:
                        rule.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                        move(p, directions[p], group, p.shape)
            if directions is None or not isinstance(rule, torch.optim.Muon):
                rule.step()

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, by `<parameter>/<quantity>`."""
        return {
            f"{self._names[parameter]}/{key}": value
            for rule in self._rules
            for parameter, state in rule.state.items()
            for key, value in state.items()
        }

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        """Keeps its state in these tensors from now on, named as `tensors` names them."""
        for rule in self._rules:
            for parameter, state in rule.state.items():
                for quantity in state:
                    state[quantity] = tensors[f"{self._names[parameter]}/{quantity}"]


def shared_out(matrices: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """Matrices by worker, so that each has about as much to orthogonalise; the same on every worker that asks."""
    shares: list[list[Tensor]] = [[] for _ in range(size)]
    costs = [0] * size
    for matrix in sorted(matrices, key=_cost, reverse=True):
        lightest = costs.index(min(costs))
        shares[lightest].append(matrix)
        costs[lightest] += _cost(matrix)
    return shares


def orthogonalised(update: Tensor, group: dict[str, Any]) -> Tensor:
    """The bf16 matrix next to orthogonal, as torch's Muon finds it."""
    return _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])


def move(p: Tensor, direction: Tensor, group: dict[str, Any], shape: Sequence[int]) -> None:
    """Muon's update of a matrix of this shape, or of rows of it."""
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.add_(direction, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], torch.Size(shape)))


def ahead(grad: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
    """What is orthogonalised: the momentum, or with Nesterov's look ahead between it and the gradient."""
    return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum


def _cost(matrix: Tensor) -> int:
    return newton_schulz_cost(*matrix.shape)


def rate_frac(step: int, config: PretrainConfig) -> float:
    """Share of the peak rate at a step: linear warm-up, constant, linear to zero (a trapezoid, arXiv 2405.18392).

    A run that extends another has warmed up there.
    """
    warmup = 0.0 if config.extends else config.warmup_frac * config.steps
    decay = config.decay_frac * config.steps
    rise = (step + 1) / warmup if warmup else 1.0
    fall = (config.steps - step) / decay if decay else 1.0
    return min(1.0, rise, fall)


def _adamw(parameters: list[nn.Parameter], config: AdamWConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def _begin(rule: torch.optim.Optimizer) -> None:
    """Makes the state that torch's rule would make in its first step, so that it has its place before."""
    for group in rule.param_groups:
        for parameter in group["params"]:
            if isinstance(rule, torch.optim.Muon):
                rule.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            else:
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                # fp32 and beside the parameter, as torch's fused AdamW keeps it.
                rule.state[parameter] |= {"step": torch.zeros((), device=parameter.device), **moments}
