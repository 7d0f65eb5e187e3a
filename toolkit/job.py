"""Everything that was asked for, in one object."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from toolkit.config import Data, Flops, Model, Precision, Profile, Recipe, Target
from toolkit.delivery.lease import Claim
from toolkit.errors import UsageError


@dataclass(frozen=True)
class Job:
    """A workload for a target, within a profile.

    Raises:
        UsageError: Two of its parts do not go together.
    """

    target: Target
    profile: Profile
    model: Model
    data: Data
    precision: Precision
    budget: Flops
    seed: int
    fast: bool
    allow_fast: bool
    rebuild_stale: bool
    build: Path
    claim: Claim = field(default_factory=Claim)

    def __post_init__(self) -> None:
        if self.model.trainable and not self.data.labelled:
            raise UsageError(
                f"the model '{self.model}' is trained, and --data {self.data} has no labels",
                "give a labelled data set; --data none and inputs:FILE.npy go with --model onnx:FILE",
            )
        if self.fast and not self.model.trainable:
            raise UsageError("an ONNX file is not trained, so that --fast shortens nothing", "leave out --fast")
        if self.precision == "int8" and self.data.kind == "none":
            raise UsageError(
                "int8 is calibrated on images, and --data none has only noise",
                "give inputs like the network's own (--data inputs:FILE.npy), or use --precision fp32 or fp16",
            )

    def at(self, host: str) -> Job:
        """Return the job for one host of its target's fleet."""
        return replace(self, target=self.target.at(host))

    @property
    def recipe(self) -> Recipe:
        """How its networks are trained."""
        return self.profile.recipe_for(self.data.kind, fast=self.fast)
