"""Everything that was asked for, in one object."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit.config import Flops, Gpus, Precision, Profile, Recipe, Target
from toolkit.delivery.lease import Claim
from toolkit.errors import UsageError
from toolkit.workload import Data, Model


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
    until_contract: bool = False  # fine-tuning ends as soon as its accuracy suffices
    claim: Claim = field(default_factory=Claim)
    teacher: Model | None = None
    gpus: Gpus | None = None  # that train together; None for one process, on a GPU if there is one

    def __post_init__(self) -> None:
        if self.model.trainable and not self.data.labelled:
            raise UsageError(
                f"the model '{self.model}' is trained, and --data {self.data} has no labels",
                "give a labelled data set; --data none and inputs:FILE.npy go with --model onnx:FILE",
            )
        contract = self.profile.contract
        if self.until_contract and contract.min_accuracy is None and contract.max_accuracy_drop is None:
            raise UsageError(
                f"the contract of profile {self.profile.name} asks for no accuracy, so that none suffices",
                "give it max_accuracy_drop or min_accuracy, or leave out --until contract",
            )
        if self.fast and not self.model.trainable:
            raise UsageError("an ONNX file is not trained, so that --fast shortens nothing", "leave out --fast")
        if self.teacher is not None and not self.model.trainable:
            raise UsageError("an ONNX file is not trained, so that nothing teaches it", "leave out --teacher")
        if self.teacher_recipe is not None and self.teacher_recipe.epochs == 0:
            raise UsageError(
                f"the recipe of profile {self.profile.name} trains for 0 epochs, so that the teacher knows nothing",
                "give its checkpoint: --teacher MODEL=FILE",
            )
        if self.gpus is not None and not self.model.trainable:
            raise UsageError("an ONNX file is not trained, so that no GPU trains it", "leave out --gpus")
        if self.precision in ("int8", "fp8") and self.data.kind == "none":
            raise UsageError(
                f"{self.precision} is calibrated on images, and --data none has only noise",
                "give inputs like the network's own (--data inputs:FILE.npy), or use --precision fp32 or fp16",
            )

    def at(self, host: str) -> Job:
        """Return the job for one host of its target's fleet."""
        return replace(self, target=self.target.at(host))

    def enough(self, baseline: float) -> float | None:
        """Return the validation accuracy (0 to 1) that fine-tuning may end with; None for all of its epochs.

        Args:
            baseline: The unpruned network's, on the same images.
        """
        if not self.until_contract:
            return None
        contract = self.profile.contract
        drop = contract.max_accuracy_drop
        if drop is not None and self.quantization_drop is not None:
            drop -= self.quantization_drop
        return max(contract.min_accuracy or 0.0, 0.0 if drop is None else baseline - drop)

    @property
    def quantization_drop(self) -> float | None:
        """What a lower precision may take of the contract's accuracy drop: half; None where there is no limit."""
        drop = self.profile.contract.max_accuracy_drop
        return None if drop is None or self.precision == "fp32" else drop / 2

    @property
    def recipe(self) -> Recipe:
        """How its networks are trained."""
        return self._recipe_of(self.model)

    @property
    def teacher_recipe(self) -> Recipe | None:
        """How its teacher is trained; None where nobody teaches who has to be."""
        return None if self.teacher is None or self.teacher.checkpoint else self._recipe_of(self.teacher)

    def _recipe_of(self, model: Model) -> Recipe:
        return self.profile.recipe_for(self.data.kind, fast=self.fast, transfer=model.weights is not None)

    def trained_by(self, **changes: Any) -> Job:
        """Return the job with these keys of the recipe changed, whatever the data."""
        kind = self.data.kind
        recipes = self.profile.recipes | {kind: self.profile.recipes.get(kind, {}) | changes}
        return replace(self, profile=self.profile.model_copy(update={"recipes": recipes}))
