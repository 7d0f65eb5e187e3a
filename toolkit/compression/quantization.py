"""One calibration, one spelling a runtime family: fp16 by cast, int8 by Q/DQ nodes."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from toolkit.compression import data as datasets
from toolkit.config import Precision
from toolkit.errors import StageError
from toolkit.store import Artifact, Work

Spelling = Literal["onnxruntime", "tensorrt"]


def quantize(
    work: Work, data: Artifact, exported: Artifact, precision: Precision, spelling: Spelling, images: int
) -> dict[str, Any]:
    """Write ``model.onnx`` in the precision asked for.

    Args:
        work: Output.
        data: Its training images, or the half of the user's inputs, calibrate; no other split is opened.
        exported: The fp32 graph.
        precision: ``fp16`` casts the graph, ``int8`` adds Q/DQ nodes.
        spelling: Whose Q/DQ: ``onnxruntime`` wants uint8 activations and int32 biases on all operators,
            ``tensorrt`` takes symmetric int8 only, with float biases.
        images: How many images calibrate.

    Returns:
        ``precision``, ``spelling``, ``calibration_images``, ``bytes``; ``input`` and ``batch`` of the fp32 graph.
    """
    source, target = exported.file("model.onnx"), work.out / "model.onnx"
    used = 0
    if precision == "fp16":
        onnx.save(_to_fp16(onnx.load(source)), target)
    else:
        chosen = datasets.load_images(data, "train")[:images]
        used = len(chosen)
        try:
            _to_int8(source, target, chosen, 32 if exported.meta["batch"] == "dynamic" else 1, spelling, work)
        except Exception as error:
            raise StageError(
                f"the graph cannot be quantised to int8: {type(error).__name__}: {str(error).splitlines()[0]}",
                "use --precision fp32 or fp16 for this network",
            ) from error
        _copy_metadata(source, target)
    onnx.checker.check_model(str(target), full_check=True)
    return {
        "precision": precision,
        "spelling": spelling,
        "calibration_images": used,
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


class _Calibration:
    """Hands images to ONNX Runtime's calibrator, a batch at a time."""

    def __init__(self, images: NDArray[np.uint8], batch: int, name: str, work: Work) -> None:
        self._batches = self._iterate(images, batch, name, work)

    @staticmethod
    def _iterate(
        images: NDArray[np.uint8], batch: int, name: str, work: Work
    ) -> Iterator[dict[str, NDArray[np.uint8]]]:
        for start in range(0, len(images), batch):
            work.progress(start, len(images), "calibrating")
            yield {name: np.array(images[start : start + batch])}

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return next(self._batches, None)


def _to_int8(
    source: Path, target: Path, images: NDArray[np.uint8], batch: int, spelling: Spelling, work: Work
) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    CalibrationDataReader.register(_Calibration)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared))
        name = onnx.load(prepared, load_external_data=False).graph.input[0].name
        options: dict[str, Any] = {}
        if spelling == "tensorrt":
            options = {
                "activation_type": QuantType.QInt8,
                "op_types_to_quantize": ["Conv", "Gemm", "Add"],
                "extra_options": {
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    "AddQDQPairToWeight": True,
                },
            }
        else:
            options = {"activation_type": QuantType.QUInt8}
        level = logging.getLogger().level
        quantize_static(
            str(prepared),
            str(target),
            _Calibration(images, batch, name, work),
            quant_format=QuantFormat.QDQ,
            weight_type=QuantType.QInt8,
            per_channel=True,
            **options,
        )
        logging.getLogger().setLevel(level)


def _copy_metadata(source: Path, target: Path) -> None:
    properties = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    model = onnx.load(target)
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, target)
