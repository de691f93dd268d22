"""Static quantisation to int8 by ONNX Runtime, calibrated on training images.

Convolutions, the joins of branches and the classifier compute in int8, weights with one scale for each channel. ConAM
stays in float32: its logits are unbounded.
Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import Tensor

__all__ = ["quantize"]

QUANTISED = ("Conv", "Gemm", "Add")
BATCH = 50


def quantize(path: Path, images: Tensor) -> None:
    """Replace a float32 ONNX file by its int8 form.

    Args:
        path: The file; its metadata stays.
        images: Calibration images as the file takes them, (N, ...).
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(images.split(BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch.numpy()}

    metadata = list(onnx.load(str(path), load_external_data=False).metadata_props)
    with TemporaryDirectory() as scratch:
        fused = Path(scratch) / "fused.onnx"
        logging.disable(logging.WARNING)
        try:
            quant_pre_process(str(path), str(fused), skip_symbolic_shape=True)
            quantize_static(
                str(fused),
                str(path),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTISED),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_sums_with_constants(fused),
            )
        finally:
            logging.disable(logging.NOTSET)
    proto = onnx.load(str(path))
    del proto.metadata_props[:]
    proto.metadata_props.extend(metadata)
    onnx.save(proto, str(path))


def _sums_with_constants(path: Path) -> list[str]:
    """Names of the sums of a map and a constant; what is left are the joins of two branches.

    ConAM's perceptron adds its biases, and the scale of a patch is one plus its confidence: both stay in float32.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "Add" and constants.intersection(node.input)]
