"""A graph in a narrower precision: fp16 by cast; int8 and fp8 by Q/DQ, with what is sensitive left in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toolkit import graphs
from toolkit.compression import calibration
from toolkit.compression import data as datasets
from toolkit.compression.calibration import Ranges
from toolkit.compression.spelling import Levels, Narrow, Spelling, input_levels, quantised, spell
from toolkit.config import Precision
from toolkit.errors import StageError
from toolkit.store import Artifact, Work

_JUDGED = 2000  # validation images
_RANKED = 64

# trains the network with these levels, by node; returns its graph in fp32, and what training.Fitted holds
Retrain = Callable[[Work, Mapping[str, Levels]], tuple[Path, Mapping[str, Any]]]


def quantize(
    work: Work,
    data: Artifact,
    exported: Artifact,
    precision: Precision,
    spelling: Spelling,
    images: int,
    allowed: float | None = None,
    retrain: Retrain | None = None,
    *,
    always: bool = False,
) -> dict[str, Any]:
    """Write ``model.onnx`` in the precision asked for.

    Args:
        work: Output.
        data: Its training images, or the half of the user's inputs, calibrate; validation images judge; the test
            split is not opened.
        exported: The fp32 graph.
        precision: ``fp16`` casts the graph, ``int8`` and ``fp8`` add Q/DQ nodes.
        spelling: Whose Q/DQ; see :func:`toolkit.compression.spelling.spell`.
        images: How many images calibrate.
        allowed: Accuracy that may be lost, 0 to 1. When more is, up to half of the quantised nodes go back to
            fp32, the most sensitive first, until no more is lost than that or than a single image.
        retrain: Quantisation-aware training in int8, when more is lost even so. What it gives is quantised like the
            graph before, and taken when less is lost.
        always: Whether to train in any case.

    Returns:
        ``precision``, ``spelling``, ``method`` (``cast``, ``ptq`` or ``qat``), ``calibration`` (``minmax`` or
        ``mse``; None for a cast), ``calibration_images``, ``kept`` (``node``, ``precision`` and ``why`` of what
        stays in fp32), ``drop`` (accuracy lost against the fp32 graph on validation images, by ONNX Runtime; None
        without labels), ``allowed``, ``qat`` (None, or ``epochs``, the drop ``before`` and ``after``, and whether
        it is ``taken``), ``notes``, ``bytes``; ``input`` and ``batch`` of the fp32 graph.

    Raises:
        StageError: The graph cannot be quantised.
    """
    source, target = exported.file("model.onnx"), work.out / "model.onnx"
    found: dict[str, Any] = {
        "method": "cast",
        "calibration": None,
        "calibration_images": 0,
        "kept": [],
        "qat": None,
        "notes": [],
    }
    if precision == "fp16":
        model = _to_fp16(onnx.load(source))
        drop = _Judge(data, exported)(model).drop if data.meta["classes"] else None
    else:
        assert precision != "fp32"
        chosen = datasets.load_images(data, "train")[:images]
        judge = _Judge(data, exported)
        best = _to_narrow(work, source, chosen, precision, spelling, judge, allowed)
        found |= {"method": "ptq", "calibration_images": len(chosen)}
        if retrain is not None and (always or not best.loss.within(allowed)):
            path, fitted = retrain(work, input_levels(best.whole))
            again = _to_narrow(work, path, chosen, precision, spelling, judge, allowed)
            taken = again.loss < best.loss
            told = {"before": best.loss.drop, "after": again.loss.drop, "taken": taken}
            found |= {"qat": {"epochs": len(fitted["history"]), **told}, "notes": fitted["notes"]}
            if taken:
                best, source = again, path
                found["method"] = "qat"
        found |= {"calibration": best.calibration, "kept": best.kept}
        model, drop = best.model, best.loss.drop
    onnx.helper.set_model_props(model, {entry.key: entry.value for entry in onnx.load(source).metadata_props})
    onnx.save(model, target)
    onnx.checker.check_model(str(target), full_check=True)
    return found | {
        "precision": precision,
        "spelling": spelling,
        "drop": drop,
        "allowed": allowed,
        "bytes": target.stat().st_size,
        "input": exported.meta["input"],
        "batch": exported.meta["batch"],
    }


def _to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Cast weights and activations to fp16; the logits stay float32 for whoever reads them."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted = convert_float_to_float16(model, keep_io_types=True)
    assert isinstance(converted, onnx.ModelProto)
    return converted


@dataclass(frozen=True, order=True)
class _Loss:
    """What a precision costs; smaller is better, accuracy first.

    Attributes:
        images: More images wrong than in fp32; negative when fewer are. 0 without labels.
        error: Squared error of the logits as a share of their squares.
        of: Images that were judged by.
        labelled: Whether they have labels.
    """

    images: int
    error: float
    of: int
    labelled: bool

    @property
    def drop(self) -> float | None:
        """Accuracy lost, 0 to 1."""
        return self.images / self.of if self.labelled else None

    def within(self, allowed: float | None) -> bool:
        """Whether it may be lost; a single image is no evidence."""
        return allowed is None or self.images <= max(1, allowed * self.of)


class _Judge:
    """Holds a graph against the fp32 graph: on validation images; without labels on those that calibrate."""

    def __init__(self, data: Artifact, exported: Artifact) -> None:
        self._labels = datasets.load(data, "val").labels[:_JUDGED] if data.meta["classes"] else None
        split = "train" if self._labels is None else "val"
        self._images = np.array(datasets.load_images(data, split)[:_JUDGED])
        self.batch = 32 if exported.meta["batch"] == "dynamic" else 1
        self._expected = self._run(onnx.load(exported.file("model.onnx")), self._images)

    def __call__(self, model: onnx.ModelProto, limit: int | None = None) -> _Loss:
        """Return what a graph loses on the first ``limit`` images."""
        expected, found = self._expected[:limit], self._run(model, self._images[:limit])
        images = 0
        if self._labels is not None:
            right = [int((logits.argmax(1) == self._labels[:limit]).sum()) for logits in (expected, found)]
            images = right[0] - right[1]
        error = float(((found - expected) ** 2).sum() / max(float((expected**2).sum()), 1e-12))
        return _Loss(images, error, len(expected), self._labels is not None)

    def _run(self, model: onnx.ModelProto, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        (logits,) = graphs.run_onnx(model.SerializeToString(), images, self.batch)
        return logits.astype(np.float32)


@dataclass(frozen=True)
class _Narrowed:
    """A graph that was quantised.

    Attributes:
        model: With what stays in fp32.
        whole: With everything quantised.
        loss: What ``model`` loses.
        calibration: Which ranges it has.
        kept: What stays in fp32, and why.
    """

    model: onnx.ModelProto
    whole: onnx.ModelProto
    loss: _Loss
    calibration: str
    kept: list[dict[str, str]]


def _to_narrow(
    work: Work, source: Path, images: NDArray[np.uint8], precision: Narrow, spelling: Spelling, judge: _Judge,
    allowed: float | None,
) -> _Narrowed:  # fmt: skip
    try:
        narrowed = _calibrated(work, source, images, precision, spelling, judge, allowed)
    except Exception as error:
        raise StageError(
            f"the graph cannot be quantised to {precision}: "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            "use --precision fp32 or fp16 for this network",
        ) from error
    if not quantised(narrowed.model):
        raise StageError(
            f"no layer of the graph can be quantised to {precision}: none has constant float32 weights",
            "use --precision fp32 or fp16 for this network",
        )
    return narrowed


def _calibrated(
    work: Work, source: Path, images: NDArray[np.uint8], precision: Narrow, spelling: Spelling, judge: _Judge,
    allowed: float | None,
) -> _Narrowed:  # fmt: skip
    """Quantise with the ranges that lose least, and with layers in fp32 where that is more than allowed."""
    model = calibration.prepare(source)
    by_method = calibration.calibrate(model, images, judge.batch, work.progress)
    losses: dict[str, _Loss] = {}
    for method, ranges in by_method.items():
        work.progress(len(losses), len(by_method), f"measuring {precision}")
        losses[method] = judge(spell(model, ranges, spelling, precision))
    method = min(losses, key=losses.__getitem__)
    loss, ranges = losses[method], by_method[method]
    keep: dict[str, float] = {}
    if not loss.within(allowed):
        loss, keep = _keep(work, model, ranges, precision, spelling, judge, allowed, loss)
    kept = [
        {"node": node, "precision": "fp32", "why": f"alone in {precision} it puts the logits {error**0.5:.1%} off"}
        for node, error in keep.items()
    ]
    whole = spell(model, ranges, spelling, precision)
    return _Narrowed(spell(model, ranges, spelling, precision, keep), whole, loss, method, kept)


def _keep(
    work: Work, model: onnx.ModelProto, ranges: Ranges, precision: Narrow, spelling: Spelling, judge: _Judge,
    allowed: float | None, loss: _Loss,
) -> tuple[_Loss, dict[str, float]]:  # fmt: skip
    """Return the least that is lost, and what stays in fp32 for it: node to the logits' error of it alone."""
    nodes = quantised(spell(model, ranges, spelling, precision))
    everything = {node.name for node in model.graph.node}
    alone = {}
    for index, node in enumerate(nodes):
        work.progress(index, len(nodes), f"{precision} in one layer alone")
        alone[node] = judge(spell(model, ranges, spelling, precision, everything - {node}), _RANKED).error
    ranking = sorted(nodes, key=alone.__getitem__, reverse=True)
    best, kept = loss, 0
    for count in range(1, len(ranking) // 2 + 1):
        work.progress(count, len(ranking) // 2, "layers kept in fp32")
        found = judge(spell(model, ranges, spelling, precision, ranking[:count]))
        best, kept = min((best, kept), (found, count))
        if best.within(allowed):
            break
    return best, {node: alone[node] for node in ranking[:kept]}
