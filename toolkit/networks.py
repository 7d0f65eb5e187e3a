"""How the networks of a run come to be: train → prune → finetune → export → quantize; no device has a part in it.

Each stage is asked of the store first and made when it is not there. What a stage is made from stands in its
line: configuration, input artifacts, and the function that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import compression, engines
from toolkit.bench import reference
from toolkit.config import Recipe
from toolkit.errors import UsageError
from toolkit.job import Job
from toolkit.stages import Runner
from toolkit.store import Artifact, Work
from toolkit.workload import Model

if TYPE_CHECKING:
    from toolkit.compression.spelling import Levels

_QAT = {"qat", "qat_epochs"}
_NOT_TRAINING = {"finetune_epochs", "teacher", "temperature", "search_images", *_QAT}


@dataclass(frozen=True)
class Networks:
    """The networks of a run; a user's ONNX file was never a network of ours, so that three of them are None.

    Attributes:
        data: The images, and what is known of them.
        baseline: The unpruned network.
        pruned: The pruned one.
        tuned: The pruned one after fine-tuning.
        exported: The fp32 graph, which device and host are held against.
        graph: What the engine is built from: ``exported``, or the same in another precision.
        reference: What the host's ONNX Runtime computes of the test images by both graphs.
    """

    data: Artifact
    baseline: Artifact | None
    pruned: Artifact | None
    tuned: Artifact | None
    exported: Artifact
    graph: Artifact
    reference: Artifact

    @property
    def reference_accuracy(self) -> float | None:
        """Accuracy that a drop is counted from, 0 to 1; None where the data have no labels."""
        accuracy: float | None = (self.baseline or self.exported).meta["accuracy"]
        return accuracy


@dataclass(frozen=True)
class Teacher:
    """Who teaches a run's networks beside the labels: a checkpoint, a network that was trained for it, or nobody.

    Attributes:
        given: The model, with the user's checkpoint if there is one.
        trained: The network if there is none.
    """

    given: Model | None = None
    trained: Artifact | None = None

    @property
    def config(self) -> dict[str, Any]:
        """What the stages that learn from it depend on, beside ``inputs``."""
        return {"teacher": compression.sources.identify(self.given)} if self.given and not self.trained else {}

    @property
    def inputs(self) -> dict[str, Artifact]:
        """Artifacts that the stages that learn from it are made from."""
        return {"teacher": self.trained} if self.trained else {}

    @property
    def model(self) -> Model | None:
        """The model with its checkpoint."""
        if self.given is None or self.trained is None:
            return self.given
        return self.given.model_copy(update={"weights": str(self.trained.file("model.safetensors"))})


def compress(job: Job, stages: Runner) -> Networks:
    """Train, prune, fine-tune, export, quantise, ask the host: all that does not depend on a device."""
    engines.require_precision(job.target, job.precision)
    data, teacher, baseline, pruned, tuned, exported = (shrink if job.model.trainable else take_over)(job, stages)
    graph = quantize(job, stages, data, teacher, baseline, tuned, exported)
    return Networks(data, baseline, pruned, tuned, exported, graph, refer(stages, data, exported, graph))


def shrink(job: Job, stages: Runner) -> tuple[Artifact, Teacher, Artifact, Artifact, Artifact, Artifact]:
    """Train a network, prune it to the budget, fine-tune and export it."""
    profile, recipe, seed = job.profile, job.recipe, job.seed
    if job.gpus is not None:
        compression.distributed.require(job.gpus, recipe.batch)
    divisor, pruner = profile.channel_divisor, profile.pruner
    model = {"model": compression.sources.identify(job.model)}

    data = prepare(job, stages, profile.input_size)
    small = recipe.small_side(profile.input_size) if recipe.small_epochs else None
    check = stages.make(
        "check",
        model
        | Teacher(job.teacher).config
        | {"divisor": divisor, "pruner": pruner}
        | ({} if small is None else {"small": small}),
        {"data": data},
        lambda work: compression.pruning.check(
            data, job.model, divisor, pruner, job.build / "downloads", job.teacher, small
        ),
    )
    if check.meta:
        compression.budget.require_reachable(check.meta, job.budget, divisor)
    teacher = educate(job, stages, data)
    baseline = _train("train", job, stages, data, job.model, recipe, teacher)
    pruned = stages.make(
        "prune",
        model
        | {
            "budget": job.budget.model_dump(),
            "divisor": divisor,
            "pruner": pruner,
            "recipe": recipe.model_dump(include={"val_images", "search_images"}) | recipe.augmentation,
            "seed": seed,
            "fast": job.fast,
        },
        {"data": data, "baseline": baseline},
        lambda work: compression.pruning.prune(
            work,
            data,
            job.model,
            baseline,
            recipe,
            job.budget,
            divisor,
            pruner,
            stages.store.searches,
            seed,
        ),
        amount=1,
    )
    reached = max(
        (epoch["val"] for epoch in baseline.meta.get("history", ())), default=baseline.meta.get("val", 1.0)
    )
    enough = job.enough(reached)
    tuned = stages.make(
        "finetune",
        model
        | teacher.config
        | {
            "recipe": recipe.model_dump(exclude={"epochs", "small_crops", "search_images", *_QAT}),
            "seed": seed,
            "fast": job.fast,
            **({} if enough is None else {"enough": enough}),
        },
        {"data": data, "baseline": baseline, "pruned": pruned} | teacher.inputs,
        lambda work: compression.distributed.run(
            job.gpus,
            compression.training.finetune,
            work,
            data,
            job.model,
            baseline,
            pruned,
            recipe,
            seed,
            programs=job.build / ".compile",
            teacher=teacher.model,
            enough=enough,
        ),
        amount=_images(data, recipe) * recipe.finetune_epochs,
    )
    return data, teacher, baseline, pruned, tuned, export(job, stages, data, tuned)


def educate(job: Job, stages: Runner, data: Artifact) -> Teacher:
    """Return who teaches; trained like an unpruned network, by itself, where it brings no checkpoint."""
    recipe = job.teacher_recipe
    if job.teacher is None or recipe is None:
        return Teacher(job.teacher)
    return Teacher(job.teacher, _train("teacher", job, stages, data, job.teacher, recipe, Teacher()))


def _train(
    stage: str,
    job: Job,
    stages: Runner,
    data: Artifact,
    model: Model,
    recipe: Recipe,
    teacher: Teacher,
) -> Artifact:
    """Train a network that nothing is pruned of."""
    return stages.make(
        stage,
        {"model": compression.sources.identify(model)}
        | teacher.config
        | {
            "recipe": recipe.model_dump(exclude=_NOT_TRAINING - ({"temperature"} if teacher.given else set())),
            "seed": job.seed,
            "fast": job.fast,
        },
        {"data": data} | teacher.inputs,
        lambda work: compression.distributed.run(
            job.gpus,
            compression.training.train,
            work,
            data,
            model,
            recipe,
            job.seed,
            programs=job.build / ".compile",
            downloads=job.build / "downloads",
            teacher=teacher.model,
        ),
        amount=_images(data, recipe) * recipe.epochs,
    )


def take_over(job: Job, stages: Runner) -> tuple[Artifact, Teacher, None, None, None, Artifact]:
    """Take over a user's ONNX file, which is neither trained nor pruned."""
    from toolkit import adopt, onnxfile  # onnx with them

    source = onnxfile.read(job.model, job.profile.input_size, job.precision)
    data = prepare(job, stages, source.size)
    for name in ("check", "train", "prune", "finetune"):
        stages.skip(name, "not needed: the model is an ONNX file")
    normalization = job.model.normalization and job.model.normalization.model_dump()
    exported = stages.make(
        "export",
        {
            "model": {"source": "onnx", "content": source.digest},
            "normalization": normalization,
            "size": source.size,
        },
        {"data": data},
        lambda work: adopt.adopt(work, data, job.model, source),
        amount=1,
    )
    return data, Teacher(), None, None, None, exported


def unpruned(job: Job, stages: Runner, networks: Networks) -> Networks:
    """Return the networks of a release that is not pruned, in fp32: what the pruned one is held against."""
    if networks.baseline is None:
        raise UsageError("an ONNX file was not pruned, so that it has no baseline", "give --against a release")
    data, baseline = networks.data, networks.baseline
    exported = export(job, stages, data, baseline)
    return Networks(data, baseline, None, None, exported, exported, refer(stages, data, exported, exported))


def prepare(job: Job, stages: Runner, size: int) -> Artifact:
    """Read the data, every image brought to ``size`` pixels."""
    content = compression.data.fingerprint(job.data, stages.store.root / ".index", remember=stages.writes)
    return stages.make(
        "data",
        {"data": content, "size": size},
        {},
        lambda work: compression.data.prepare(work, job.data, size, job.build / "downloads"),
    )


def export(job: Job, stages: Runner, data: Artifact, network: Artifact) -> Artifact:
    """Bring a network to ONNX, held against PyTorch."""

    def make(work: Work) -> dict[str, Any]:
        from toolkit import export  # PyTorch with it

        return export.export(work, data, job.model, network)

    model = {"model": compression.sources.identify(job.model)}
    return stages.make("export", model | {"fast": job.fast}, {"data": data, "tuned": network}, make, amount=1)


def quantize(
    job: Job,
    stages: Runner,
    data: Artifact,
    teacher: Teacher,
    baseline: Artifact | None,
    tuned: Artifact | None,
    exported: Artifact,
) -> Artifact:
    """Return the graph in the precision asked for, from a network that may be trained for it."""
    if job.precision == "fp32":
        stages.skip("quantize", "not needed for fp32")
        return exported
    spelling, images = engines.spelling(job.target), job.profile.calibration_images
    config: dict[str, Any] = {
        "precision": job.precision,
        "spelling": spelling,
        "images": images,
        "allowed": job.quantization_drop,
    }
    inputs = {"data": data, "exported": exported}
    retrain = None
    if baseline and tuned and job.precision == "int8" and job.recipe.qat_epochs:
        retrain = partial(_retrain, job, data, teacher, baseline, tuned, exported)
        config |= {
            "model": compression.sources.identify(job.model),
            **teacher.config,
            "recipe": job.recipe.model_dump(exclude={"epochs", "small_crops", "finetune_epochs", "search_images"}),
            "seed": job.seed,
        }
        inputs |= {"baseline": baseline, "tuned": tuned} | teacher.inputs
    return stages.make(
        "quantize",
        config,
        inputs,
        lambda work: compression.quantization.quantize(
            work,
            data,
            exported,
            job.precision,
            spelling,
            images,
            job.quantization_drop,
            retrain,
            always=job.recipe.qat == "always",
        ),
        amount=1,
    )


def _retrain(
    job: Job,
    data: Artifact,
    taught: Teacher,
    baseline: Artifact,
    tuned: Artifact,
    exported: Artifact,
    work: Work,
    levels: Mapping[str, Levels],
) -> tuple[Path, dict[str, Any]]:
    """Train the network with what its nodes read at these levels; returns its graph, and how it went."""
    from toolkit import export  # PyTorch with it

    network = compression.models.restore(job.model, len(data.meta["classes"]), tuned.file("model.pth"))
    teacher = compression.training.find_teacher(data, job.model, baseline, job.recipe, taught.model)
    by_module = export.by_module(network, levels)
    fitted = compression.qat.train(work, data, network, by_module, job.recipe, job.seed, teacher)
    path = work.resume / "retrained.onnx"
    export.export_again(network, data, exported, path)
    return path, asdict(fitted)


def refer(stages: Runner, data: Artifact, exported: Artifact, graph: Artifact) -> Artifact:
    """Ask the host's ONNX Runtime what both graphs say of the test images."""
    images = data.meta["counts"]["test"] if data.meta else 0
    return stages.make(
        "reference",
        {},
        {"data": data, "exported": exported, "graph": graph},
        lambda work: reference.reference(work, data, exported, graph),
        amount=images * (1 if graph is exported else 2),
    )


def _images(data: Artifact, recipe: Recipe) -> int:
    """Return how many training images an epoch sees; 0 while nobody knows."""
    return recipe.images_per_epoch(int(data.meta["counts"]["train"]) if data.meta else 0)
