"""Everything that was asked for, in one object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolkit.config import Data, Flops, Model, Precision, Profile, Recipe, Target


@dataclass(frozen=True)
class Job:
    """A workload for a target, within a profile."""

    target: Target
    profile: Profile
    model: Model
    data: Data
    precision: Precision
    budget: Flops
    seed: int
    fast: bool
    allow_fast: bool
    build: Path

    @property
    def recipe(self) -> Recipe:
        """How its networks are trained."""
        return self.profile.recipe_for(self.data.kind, fast=self.fast)
