"""What every section of the YAML file shares: unknown keys are refused, values never change."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section. Every key has a default and a description, from which docs/configuration.md is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)
