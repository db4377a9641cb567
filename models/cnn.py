"""A small convolutional classifier: Conv, Relu, MaxPool by turns, one Gemm at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trivium.models.graph import Network

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

Layer = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]


def build(
    convolutions: Sequence[Layer],
    classifier: Layer,
    input_shape: Sequence[int],
    *,
    name: str = "cnn",
) -> ir.Model:
    """Build the network.

    Args:
        convolutions: ``(weight [out, in, k, k], bias [out])``, float32, k odd; each is padded to
            keep its size and followed by Relu and a 2x2 MaxPool.
        classifier: ``(weight [classes, features], bias [classes])``.
        input_shape: ``[channels, height, width]`` of one sample; the batch is symbolic.
    """
    network = Network(name, "image", ["batch", *input_shape])
    x = network.input
    for index, (weight, bias) in enumerate(convolutions):
        half = weight.shape[-1] // 2
        x = network.op(
            "Conv",
            f"conv{index}",
            x,
            network.weight(f"conv{index}.weight", weight),
            network.weight(f"conv{index}.bias", bias),
            pads=[half] * 4,
        )
        x = network.op("Relu", f"relu{index}", x)
        x = network.op("MaxPool", f"pool{index}", x, kernel_shape=[2, 2], strides=[2, 2])
    x = network.op("Flatten", "flatten", x, axis=1)
    weight, bias = classifier
    x = network.op(
        "Gemm",
        "logits",
        x,
        network.weight("dense.weight", weight),
        network.weight("dense.bias", bias),
        transB=1,
    )
    return network.model(x, ["batch", weight.shape[0]])
