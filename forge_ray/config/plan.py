"""The fields of `forge plan`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from forge_ray.config.base import Positive, Section

_Amount = Annotated[float, Field(gt=0.0)]


class PlanConfig(Section):
    """What a model may cost and what it is for; `forge plan` finds its size."""

    usd: _Amount | None = None
    """Most money for training, and for serving `served_tokens`; none for no limit."""
    hours: _Amount | None = None
    """Longest training, by the clock; none for no limit."""
    nodes: Positive = 1
    """Most machines at a time."""
    machines: tuple[str, ...] = ()
    """Machines of the price file to choose from, or a whole provider (`aws`); none for all that can be rented."""
    market: Literal["any", "on-demand", "spot"] = "any"
    """Whether machines may be taken away while they are rented."""
    prices: str | None = None
    """A price file of your own in place of ours (`forge_ray/prices.yaml` shows the form)."""
    corpus_tokens: _Amount | None = None
    """Tokens of training documents; none for what `corpus_bytes` says or, without that, the job's published shards."""
    corpus_bytes: _Amount | None = None
    """Bytes of training text, where no vocabulary has been trained yet."""
    bytes_per_token: _Amount = 4.0
    """Turns `corpus_bytes` into tokens; the vocabulary's report has yours."""
    max_epochs: _Amount = 4.0
    """Most passes over the corpus."""
    served_tokens: Annotated[float, Field(ge=0.0)] = 0.0
    """Tokens that will be served over the model's life: who serves much should train a smaller model longer."""
    serve_on: str | None = None
    """Machine of the price file that serves; none for the cheapest on which the model fits."""
    ladder_rungs: Annotated[int, Field(ge=4, le=12)] = 6
    """Small models that `forge plan fit` trains to predict the job's."""
    ladder_largest_frac: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """Size of the largest of them, as a share of the job's."""
    ladder_step: Annotated[float, Field(gt=1.0)] = 1.6
    """How much larger each is than the one before."""
    max_ms_per_token: _Amount | None = None
    """Longest time between two tokens of an answer; none for no limit."""
