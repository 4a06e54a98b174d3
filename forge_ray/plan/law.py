"""How the loss falls with parameters and tokens.

Owns the published law by which sizes are compared before anything has been measured. It is of web text and of models
above 40 million parameters: it ranks, and no loss is promised from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A median, and the interval in which it lies with 90%."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """Loss in nats per token: floor + a / N^alpha + b / D^beta, for N parameters and D tokens.

    The defaults are the fit of Chinchilla's runs by Besiroglu et al. (arXiv 2404.10102). Repeated tokens and parameters
    in excess count less and less, as Muennighoff et al. measured (arXiv 2305.16264, section 5).
    """

    floor: float = 1.8172
    a: float = 482.01
    alpha: float = 0.3478
    b: float = 2085.43
    beta: float = 0.3658
    repeats: float = 15.39
    """Passes over the same tokens after which another one is worth 1/e of the first."""
    excess: float = 5.31
    """The same for parameters beyond those that the corpus could fill."""

    def loss(self, parameters: float, tokens: float, corpus_tokens: float) -> float:
        """Of a model of this size after so many tokens, taken from a corpus of so many."""
        unique = min(tokens, corpus_tokens)
        filled = min(parameters, self.fitting_parameters(unique))
        tokens_worth = _diminishing(tokens, unique, self.repeats)
        parameters_worth = _diminishing(parameters, filled, self.excess)
        return self.floor + self.a / parameters_worth**self.alpha + self.b / tokens_worth**self.beta

    def fitting_parameters(self, tokens: float) -> float:
        """The size for which so many tokens are what a fixed compute is best spent on."""
        return (self.alpha * self.a * tokens**self.beta / (self.beta * self.b)) ** (1 / self.alpha)


def _diminishing(amount: float, base: float, scale: float) -> float:
    return base + base * scale * (1.0 - math.exp(-(amount / base - 1.0) / scale))


def best_batch_tokens(tokens: float) -> float:
    """Tokens of a global batch beyond which more per step no longer saves as many steps.

    Source: 0.0306 D^0.383 sequences of 2,048 tokens: Bergsma et al., Power Lines (arXiv 2505.13738).
    """
    return 2048 * 0.0306 * tokens**0.383
