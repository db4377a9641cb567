"""A multi-layer perceptron: Flatten, then Gemm and Relu by turns, logits at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trivium.models.graph import Network

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

Layer = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]


def build(layers: Sequence[Layer], input_shape: Sequence[int], *, name: str = "mlp") -> ir.Model:
    """Build the network.

    Args:
        layers: ``(weight [out, in], bias [out])``, float32, in order.
        input_shape: Of one sample; the batch dimension is symbolic.
    """
    network = Network(name, "image", ["batch", *input_shape])
    x = network.op("Flatten", "flatten", network.input, axis=1)
    for index, (weight, bias) in enumerate(layers):
        x = network.op(
            "Gemm",
            f"dense{index}" if index + 1 < len(layers) else "logits",
            x,
            network.weight(f"dense{index}.weight", weight),
            network.weight(f"dense{index}.bias", bias),
            transB=1,
        )
        if index + 1 < len(layers):
            x = network.op("Relu", f"relu{index}", x)
    return network.model(x, ["batch", layers[-1][0].shape[0]])
