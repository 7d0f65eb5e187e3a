"""What a user writes into files, as checked objects: profile with its contract, target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from toolkit import units
from toolkit.errors import UsageError

Precision = Literal["fp32", "fp16", "int8", "fp8"]
PrunerName = Literal["fastnas", "depgraph"]
RuntimeName = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
Gpus = int | Literal["all"]
DATA_KINDS = ("digits", "cifar10", "imagefolder")


def _read(table: dict[str, float]) -> BeforeValidator:
    return BeforeValidator(lambda value: value if value is None else units.parse(value, table))


def _write(unit: str, factor: float = 1) -> PlainSerializer:
    return PlainSerializer(lambda value: f"{value * factor:g} {unit}", return_type=str, when_used="json")


Milliseconds = Annotated[float, _read(units.MILLISECONDS), _write("ms")]
Bytes = Annotated[float, _read(units.BYTES), _write("MB", 1e-6)]
Fraction = Annotated[float, _read(units.FRACTION), _write("%", 100)]
Rate = Annotated[float, _read(units.RATE), _write("samples/s")]
Watts = Annotated[float, _read(units.WATTS), _write("W")]
Millijoules = Annotated[float, _read(units.MILLIJOULES), _write("mJ")]


class Strict(BaseModel):
    """A table whose keys are all known and which does not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Flops(Strict):
    """A FLOPs budget: absolute, or a share of the unpruned network's FLOPs (2 × MAC, batch norm left out)."""

    value: float
    relative: bool

    @classmethod
    def parse(cls, text: object) -> Flops:
        """Read ``60M``, ``1.2G`` or ``75%``; raises ValueError for anything else."""
        if isinstance(text, str) and text.strip().endswith("%"):
            budget = cls(value=units.parse(text, units.FRACTION), relative=True)
        else:
            budget = cls(value=units.parse(text, units.FLOPS), relative=False)
        if budget.value <= 0 or (not budget.relative and budget.value < 1000):
            raise ValueError(f"{text!r} is no FLOPs budget; write '60M' or '75%'")
        return budget

    def resolve(self, baseline: float) -> float:
        """Return the budget in FLOPs for a network of ``baseline`` FLOPs."""
        return self.value * baseline if self.relative else self.value

    @model_serializer(when_used="json")
    def __str__(self) -> str:
        return f"{self.value * 100:g}%" if self.relative else units.count(self.value)


class Recipe(Strict):
    """How a network is trained and fine-tuned; every key is explained in profiles/README.md."""

    epochs: int = Field(default=120, ge=0)
    finetune_epochs: int = Field(default=120, ge=0)
    batch: int = Field(default=128, ge=2)
    optimizer: Literal["muon", "sgd"] = "muon"
    lr: float = Field(default=0.2, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    flip: bool = True
    crop: int = Field(default=4, ge=0)
    cutout: int = Field(default=0, ge=0)
    small_crops: float = Field(default=0.0, ge=0, lt=1)
    gradient_checkpointing: bool = False
    teacher: bool = True
    temperature: float = Field(default=4.0, gt=0)
    qat: Literal["auto", "always"] = "auto"
    qat_epochs: int = Field(default=12, ge=0)
    train_images: int | None = Field(default=None, ge=2)  # batch norm has no variance of one
    val_images: int | None = Field(default=None, ge=1)
    search_images: int = Field(default=2000, ge=1)

    def images_per_epoch(self, available: int) -> int:
        """Return how many of the training images an epoch sees."""
        return min(available, self.train_images or available)

    @property
    def augmentation(self) -> dict[str, int | bool]:
        """What becomes of a training image."""
        return self.model_dump(include={"flip", "crop", "cutout"})

    @property
    def small_epochs(self) -> int:
        """How many epochs of training, the first, see small crops: never all of them."""
        return int(self.small_crops * self.epochs)

    @staticmethod
    def small_side(side: int) -> int:
        """Return the side of a small crop of images of this side: with 9/16 of their pixels."""
        return side * 3 // 4


class Fast(Strict):
    """What ``--fast`` does to a recipe: upper limits, and at least so much weight decay."""

    epochs: int = Field(default=14, ge=1)
    finetune_epochs: int = Field(default=8, ge=1)
    qat_epochs: int = Field(default=2, ge=0)
    train_images: int = Field(default=12_000, ge=2)
    val_images: int = Field(default=2_000, ge=1)
    crop: int = Field(default=2, ge=0)
    weight_decay: float = Field(default=1e-3, ge=0)


class Transfer(Strict):
    """What ``--weights`` does to a recipe, since it begins with a trained network: upper limits; and SGD."""

    epochs: int = Field(default=30, ge=0)
    lr: float = Field(default=0.02, gt=0)


class Contract(Strict):
    """What a release has to keep on its device; a clause that is left out is not judged."""

    latency_p50: Milliseconds | None = None
    latency_p90: Milliseconds | None = None
    latency_p99: Milliseconds | None = None
    throughput: Rate | None = None
    min_accuracy: Fraction | None = None
    max_accuracy_drop: Fraction | None = None
    peak_memory: Bytes | None = None
    engine_size: Bytes | None = None
    power: Watts | None = None
    energy: Millijoules | None = None
    max_regression: Fraction | None = None
    scenario: Literal["SingleStream", "DutyCycle"] = "SingleStream"
    confidence: Annotated[Fraction, Field(ge=0.5, lt=1)] = 0.95


class Benchmark(Strict):
    """How long and with which batches the device is measured."""

    warmup: Milliseconds = 10_000.0
    duration: Milliseconds = 2000.0
    queries: int = Field(default=1000, ge=1)
    rounds: int = Field(default=3, ge=1)
    batches: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 8, 32], min_length=1)
    time_limit: Milliseconds = 60_000.0
    period: Annotated[Milliseconds, Field(gt=0)] | None = None


class Profile(Strict):
    """A device's budget: FLOPs, precision, training recipe and contract."""

    name: str
    description: str = ""
    input_size: int = Field(default=32, ge=8)
    flops: Annotated[Flops, BeforeValidator(Flops.parse)]
    channel_divisor: int = Field(default=16, ge=1)
    pruner: PrunerName = "fastnas"
    precision: Precision = "fp32"
    calibration_images: int = Field(default=512, ge=1)
    recipe: Recipe = Recipe()
    recipes: dict[str, dict[str, Any]] = Field(default={})
    fast: Fast = Fast()
    transfer: Transfer = Transfer()
    contract: Contract = Contract()
    benchmark: Benchmark = Benchmark()

    @model_validator(mode="after")
    def _check_scenario(self) -> Profile:
        if self.contract.scenario == "DutyCycle" and self.benchmark.period is None:
            raise ValueError("a contract on DutyCycle needs the time between two queries: benchmark.period: 33 ms")
        return self

    @field_validator("recipes")
    @classmethod
    def _check_recipes(cls, recipes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for data, changes in recipes.items():
            if data not in DATA_KINDS:
                raise ValueError(f"no data set is called '{data}'; {units.nearest(data, list(DATA_KINDS))}")
            for key in changes:
                if key not in Recipe.model_fields:
                    hint = units.nearest(key, list(Recipe.model_fields))
                    raise ValueError(f"a recipe has no key '{key}'; {hint}")
            Recipe(**changes)
        return recipes

    def recipe_for(self, data: str, *, fast: bool, transfer: bool = False) -> Recipe:
        """Return the recipe for a kind of data: the profile's, that data's changes, what the others do to it."""
        recipe = self.recipe.model_dump() | self.recipes.get(data, {})
        if transfer:
            for key, limit in self.transfer.model_dump().items():
                recipe[key] = min(limit, recipe[key])
            recipe["optimizer"] = "sgd"  # Muon's gain is in getting far
        if fast:
            for key, limit in self.fast.model_dump(exclude={"weight_decay"}).items():
                recipe[key] = limit if recipe[key] is None else min(limit, recipe[key])
            recipe["weight_decay"] = max(recipe["weight_decay"], self.fast.weight_decay)
        return Recipe(**recipe)


Capability = Annotated[str, Field(pattern=r"^sm_\d{2,3}$")]
Where = Literal["host", "container", "device", "ahead-of-time"]

# where each runtime's engines can be built, the natural place first
PLACES: dict[str, tuple[Where, ...]] = {
    "onnxruntime": ("device", "host"),
    "openvino": ("device", "host"),
    "tensorrt": ("device", "container", "host"),
    "tensorrt-rtx": ("ahead-of-time", "container", "device"),
}


class Build(Strict):
    """Where and how the engine of a target is built; every key is explained in targets/README.md."""

    where: Where | None = None
    on: str | None = None
    workspace: Bytes | None = None
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    dla_core: Annotated[int, Field(ge=0, le=1)] | None = None
    hardware_compatibility: Literal["none", "ampere+", "same-compute-capability"] = "none"
    compute_capabilities: list[Capability] = Field(default=[])


def _mode(value: object) -> object:
    """Take a power mode's number, as YAML reads it, for its text."""
    return str(value) if type(value) is int else value


class Target(Strict):
    """A device or a class of device: how to reach it, what runs there, where releases live on it."""

    name: str
    description: str = ""
    profile: str
    arch: Literal["x86_64", "aarch64", "any"] = "any"
    compute_capability: Capability | None = None
    runtime: RuntimeName
    alternatives: list[Literal["onnxruntime", "openvino"]] = Field(default=[])
    host: str | None = None
    hosts: list[str] = Field(default=[])
    groups: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(default={})
    root: str | None = None
    python: str = "python3"
    accept_new_host_key: bool = False
    signing: Literal["optional", "required"] = "optional"
    signing_key: str | None = None
    image: str | None = None
    threads: int = Field(default=1, ge=1)
    power_mode: Annotated[str, BeforeValidator(_mode)] | None = None
    clocks: Literal["locked"] | None = None
    sudo: bool = False
    build: Build = Build()

    @model_validator(mode="after")
    def _check_hosts(self) -> Target:
        if self.host is not None and (self.hosts or self.groups):
            raise ValueError("'host' names one device, 'hosts' and 'groups' a fleet; keep one of them")
        return self

    @model_validator(mode="after")
    def _check_alternatives(self) -> Target:
        if self.alternatives and not self.on_cpu:
            raise ValueError("alternatives are runtimes of the CPU, and this target's runtime is of the GPU")
        if self.runtime in self.alternatives:
            raise ValueError(f"{self.runtime} is the runtime already; leave it out of alternatives")
        return self

    @model_validator(mode="after")
    def _check_build(self) -> Target:
        build = self.build
        if build.where is not None and build.where not in PLACES[self.runtime]:
            known = ", ".join(PLACES[self.runtime])
            raise ValueError(
                f"a {self.runtime} engine is not built '{build.where}'; it is built in one of: {known}"
            )
        if not self.on_cpu and self.compute_capability is None:
            raise ValueError(f"a target of {self.runtime} needs its GPU's compute_capability, as sm_87")
        if build.hardware_compatibility == "ampere+" and self.capability < 80:
            raise ValueError("hardware_compatibility 'ampere+' is for sm_80 and newer GPUs")
        if build.hardware_compatibility != "none" and self.arch == "aarch64":
            raise ValueError("TensorRT documents no hardware compatibility for Jetson; leave it out")
        if build.dla_core is not None and self.arch != "aarch64":
            raise ValueError("only Jetson modules have a DLA; leave dla_core out")
        return self

    @property
    def on_cpu(self) -> bool:
        """Whether its releases run on the CPU."""
        return self.runtime in ("onnxruntime", "openvino")

    @property
    def capability(self) -> int:
        """The compute capability as a number, 87 for sm_87; 0 without a GPU."""
        return int(self.compute_capability[3:]) if self.compute_capability else 0

    @property
    def where(self) -> Where:
        """Where its engine is built: as the file says, or the natural place of its runtime."""
        return self.build.where or PLACES[self.runtime][0]

    def tuning(self) -> dict[str, Any]:
        """Return what the agent sets while it measures."""
        return {"power_mode": self.power_mode, "clocks": self.clocks, "sudo": self.sudo}

    @property
    def fleet(self) -> list[str]:
        """Its hosts and those of its groups, each once; empty where it is one device."""
        named = [*self.hosts, *(host for group in self.groups.values() for host in group)]
        return list(dict.fromkeys(named))

    def at(self, host: str) -> Target:
        """Return the target as one device."""
        return self.model_copy(update={"host": host, "hosts": [], "groups": {}})

    def across(self, hosts: Sequence[str]) -> Target:
        """Return the target as a fleet of these hosts."""
        return self.model_copy(update={"host": None, "hosts": list(dict.fromkeys(hosts)), "groups": {}})

    def using(self, runtime: RuntimeName) -> Target:
        """Return the target with this runtime alone, whose engine is built where another one's naturally is.

        Raises:
            UsageError: It does not go with that runtime.
        """
        if runtime == self.runtime:
            return self.model_copy(update={"alternatives": []})
        values = self.model_dump()
        try:
            changes = {"runtime": runtime, "alternatives": [], "build": values["build"] | {"where": None}}
            return Target(**values | changes)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UsageError(f"--runtime {runtime}: {problem}", f"toolkit targets show {self.name}") from None
