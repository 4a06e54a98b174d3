"""What every section of the configuration is made of: closed, frozen groups of documented fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class _Operational:
    """Marker in a field's metadata: not part of any fingerprint."""


OPERATIONAL = _Operational()

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen group of fields that refuses names it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )

    def model_copy(self, *, update: Any = None, deep: bool = False) -> Any:
        """Copies; refuses `update`, which in pydantic skips validation (`replace` validates)."""
        if update is not None:
            raise TypeError("model_copy(update=...) skips validation; use Section.replace(...)")
        return super().model_copy(deep=deep)

    def replace(self, **values: Any) -> Any:
        """A validated copy with these fields changed."""
        return type(self).model_validate({**self.model_dump(), **values})

    def fingerprinted(self) -> dict[str, Any]:
        """The fields that decide what comes out, as plain JSON values: operational ones left out at every depth."""
        return _strip_operational(self)


def _strip_operational(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        kept = [name for name, field in fields.items() if OPERATIONAL not in field.metadata]
        return {name: _strip_operational(getattr(value, name)) for name in kept}
    if isinstance(value, (list, tuple)):
        return [_strip_operational(item) for item in value]
    return value
