"""Base classes and field types shared by all sections of the configuration."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen, strict part of the configuration: unknown keys, NaN, type coercion are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


def resumable(default: Any = ..., **constraints: Any) -> Any:
    """A field that may differ between a run and its resumption; the change is recorded."""
    return Field(default, json_schema_extra={"resumable": True}, **constraints)


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
TARGET = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
URI = r"^[a-z][a-z0-9+.-]*:.+$"
DEFINITION = (
    r"^(nir\.map_(1000|lim|c)|oml\.(cmc|precision|map)_at_[1-9]\d*"
    r"|mlrc\.(precision_at_1|r_precision|map_at_r))$"
)
PATTERN_DESCRIPTIONS = {
    DEFINITION: (
        "a name such as nir.map_1000, nir.map_lim, nir.map_c, oml.cmc_at_5, oml.precision_at_5, "
        "oml.map_at_5, mlrc.precision_at_1, mlrc.r_precision or mlrc.map_at_r"
    ),
    RUN_NAME: "a name of letters, digits, '.', '_' and '-' that begins with a letter or digit",
    TARGET: "text of the form package.module:name",
    URI: "a URI such as http://host:5000 or file:///shared/mlflow",
}
"""Descriptions of regular expressions in messages."""


class CustomSection(Section):
    """A member of a family, defined in user code."""

    target: Annotated[str, Field(pattern=TARGET)]
    """Import path of the object, as `package.module:name`."""

    options: dict[str, Any] = {}
    """Keyword arguments given to it."""


PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
