"""What every section of the YAML file shares: unknown keys are refused, values never change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


def _absolute(path: Path | None) -> Path | None:
    return path.absolute() if path is not None else None


File = Annotated[Path | None, AfterValidator(_absolute)]  # processes may start in other directories than the command


class Section(BaseModel):
    """One section. Every key has a default and a description, from which docs/configuration.md is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)
