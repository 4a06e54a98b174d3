"""AdamW and Muon behind one face: a step at a rate, and a state that is nothing but named tensors.

Owns which parameter gets which rule, and the schedule. The rules themselves are torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forge_ray.config import AdamWConfig, MuonConfig, PretrainConfig


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

    def step(self, rate_frac: float) -> None:
        """Applies the gradients at this share of the peak rates."""
        for rule, peaks in zip(self._rules, self._peaks, strict=True):
            for group, peak in zip(rule.param_groups, peaks, strict=True):
                group["lr"] = peak * rate_frac
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
