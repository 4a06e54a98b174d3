"""The fields of the guardian: what counts as trouble in training, what is done about it, and how often."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from forge_ray.config.base import Positive, Section

NonFinitePolicy = Literal["skip", "rollback", "stop"]
SpikePolicy = Literal["ignore", "skip", "rollback", "stop"]


class GuardConfig(Section):
    """Skips batches, goes back to an earlier checkpoint, or stops, when the loss or the gradient makes no sense."""

    non_finite: NonFinitePolicy = "skip"
    """What follows a loss or gradient norm that is NaN or infinite: `skip` trains the same step on the next batch;
    `rollback` goes back to a checkpoint and leaves out the batches since, and some more; `stop` ends the run."""
    loss_spike: SpikePolicy = "skip"
    """What follows a loss far above those of the last steps; `ignore` trains on."""
    norm_spike: SpikePolicy = "skip"
    """What follows a gradient norm, before clipping, far above those of the last steps; `ignore` trains on."""
    history_steps: Annotated[int, Field(ge=16, le=4096)] = 128
    """Steps whose median a spike is measured from; until there are so many, only NaN and infinity count."""
    loss_sigmas: Annotated[float, Field(gt=0.0)] = 8.0
    """A spike is at least so many standard deviations (1.4826 x median absolute deviation) above the median loss."""
    loss_jump: Annotated[float, Field(gt=0.0)] = 0.5
    """And at least so many nats per token above it."""
    norm_sigmas: Annotated[float, Field(gt=0.0)] = 8.0
    """A spike is at least so many standard deviations above the median gradient norm."""
    norm_factor: Annotated[float, Field(gt=1.0)] = 7.0
    """And at least so many times that median."""
    max_skips: Annotated[int, Field(ge=0, le=1000)] = 8
    """Batches skipped one by one within `limit_steps`; trouble beyond that is met with a rollback."""
    max_rollbacks: Annotated[int, Field(ge=0, le=1000)] = 3
    """Rollbacks within `limit_steps`; trouble beyond that stops the run."""
    limit_steps: Positive = 1000
    """Steps over which skips and rollbacks are counted."""
    rollback_steps: Positive = 100
    """A rollback goes back at least so many steps, if there is a checkpoint that old; else to the oldest."""
    rollback_skip_batches: Annotated[int, Field(ge=0)] = 100
    """Batches left out after the one that showed the trouble, besides those since the checkpoint."""
