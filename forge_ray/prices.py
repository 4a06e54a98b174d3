"""The price file: machines, what they compute and what they cost.

Owns its form and its reading. `prices.yaml` beside this is the one that is used where the user names none.
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError, model_validator

from forge_ray.config.base import Positive, Section
from forge_ray.errors import ConfigError

CORE = "core"
"""The chip of a machine without accelerators."""
OWN = "onprem"
"""The provider of machines that are not rented."""
_Amount = Annotated[float, Field(gt=0.0)]
_Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Chip(Section):
    """One accelerator, or one core of a machine without."""

    peak_tflops: _Amount
    """Dense bf16 operations a second, in 10^12."""
    memory_gib: _Amount
    """Memory of its own; of a core: its share of the machine's."""
    memory_gb_per_s: _Amount
    """Bandwidth of that memory."""
    train_frac: _Share
    """Share of the peak that a training step reaches."""
    serve_frac: _Share
    """Share of the peak that serving many requests at once reaches."""
    max_tokens_per_s: _Amount
    """Tokens that an engine generates at most on one, however small the model."""


class Machine(Section):
    """What can be rented, or stands in the cellar."""

    chip: str
    """Name of its chips in the same file."""
    count: Positive
    """Chips in one machine."""
    usd_per_hour: _Amount
    """Price of an hour that nobody takes away."""
    spot_usd_per_hour: _Amount | None = None
    """Price of an hour that may be taken away; none where there is no such market."""
    interruptions_per_day: Annotated[float, Field(ge=0.0)] = 0.0
    """How often one spot machine is expected to be taken away."""
    region: str = ""
    """Where the price holds."""


class Prices(Section):
    """A whole file."""

    as_of: datetime.date
    """The day on which the prices were looked up."""
    chips: dict[str, Chip]
    """By name."""
    machines: dict[str, Machine]
    """By provider/name."""

    @model_validator(mode="after")
    def _check(self) -> Prices:
        for name, machine in self.machines.items():
            if machine.chip not in self.chips:
                raise ValueError(
                    f"machines.{name} has chip {machine.chip}, which is not among chips: {_listed(self.chips)}"
                )
            if "/" not in name:
                raise ValueError(f"machine {name} wants a name like aws/p5.48xlarge: its provider, a slash, its type")
        return self

    def chosen(self, names: Sequence[str]) -> dict[str, Machine]:
        """These machines, or all of a provider's; for no names all that can be rented.

        Raises:
            ConfigError: One is not in the file.
        """
        found: dict[str, Machine] = {}
        for name in names:
            here = {key: m for key, m in self.machines.items() if name in (key, key.partition("/")[0])}
            if not here:
                near = difflib.get_close_matches(name, self.machines, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ConfigError(
                    "no such machine in the price file",
                    got=name,
                    wanted=_listed(self.machines),
                    do=f"{hint}Others go into a price file of your own: plan.prices",
                )
            found |= here
        return found or {key: m for key, m in self.machines.items() if not key.startswith(f"{OWN}/")}


def read(path: str | None) -> Prices:
    """The price file at a path, or ours.

    Raises:
        ConfigError: It is missing or not of this form.
    """
    place = Path(path) if path else Path(__file__).with_name("prices.yaml")
    try:
        return Prices.model_validate(yaml.safe_load(place.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(
            f"the price file cannot be read: {error.strerror}",
            got=place,
            do="mend plan.prices, or leave it out for ours",
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{place} is not valid YAML: {error}", do="mend the line named above") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"the price file is not valid: {where or 'file'}: {first['msg'].removeprefix('Value error, ')}",
            got=f"{place}, {len(error.errors())} such",
            do="forge_ray/prices.yaml shows the form",
        ) from None


def _listed(names: dict[str, Chip] | dict[str, Machine]) -> str:
    return ", ".join(sorted(names))
