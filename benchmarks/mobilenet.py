"""MobileNetV2 in float32, made of the quantized copy that the test data has, and pictures for it.

The weights are the numbers that the copy's codes stand for, so they lie on a grid of 8 bits already
and quantizing them costs little; what it computes between the layers is rounded no more. On the
sample that comes with the copy both give the same class. Images are those of CIFAR-10, enlarged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks import workloads

Array = np.ndarray[Any, Any]

SIDE = 244
"""Pixels of its pictures, odd as the number is."""


def float_copy(folder: Path) -> Path | None:
    """Write the model without its QuantizeLinear and DequantizeLinear; None without the data."""
    import onnx_ir.passes.common as common

    from trivium.compiler import model as models
    from trivium.compiler import prepare

    source = workloads.shared("models/mobilenetv2_imagenet_int8.onnx")
    if source is None:
        return None
    # Normal form has no Identity or Cast between the two.
    model, _ = prepare.optimize(source)
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear":
            continue
        codes, restored = node.inputs[0], node.outputs[0]
        assert codes is not None
        quantize = codes.producer()
        if quantize is not None and quantize.op_type == "QuantizeLinear":
            plain = quantize.inputs[0]
        else:
            plain = _stored(model, restored, _numbers(node))
        assert plain is not None
        _replace(model, restored, plain)
    common.RemoveUnusedNodesPass()(model)
    path = folder / "mobilenetv2.onnx"
    models.save(model, path)
    return path


def _numbers(node: ir.Node) -> Array:
    """What a DequantizeLinear of stored codes gives."""
    codes, scale, zero = (_constant(value) for value in node.inputs)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    shape = [-1 if at == axis else 1 for at in range(codes.ndim)] if scale.size > 1 else []
    shifted = codes.astype(np.int32) - zero.astype(np.int32).reshape(shape)
    return (shifted * scale.reshape(shape)).astype(np.float32)


def _constant(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _stored(model: ir.Model, like: ir.Value, numbers: Array) -> ir.Value:
    value = ir.Value(name=f"{like.name}.float", const_value=ir.tensor(numbers))
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(numbers.shape)
    model.graph.register_initializer(value)
    return value


def _replace(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Let all that reads a value read another; the graph's output keeps its name."""
    if old in model.graph.outputs:
        model.graph.outputs[model.graph.outputs.index(old)] = new
        name, old.name = old.name, f"{old.name}.rounded"
        new.name = name
    old.replace_all_uses_with(new)


def pictures(count: int) -> Array | None:
    """``[count, 3, 244, 244]``, normalized as ImageNet's are; None without the data."""
    data = workloads.shared("samples/cifar10_test500.npz")
    if data is None:
        return None
    with np.load(data) as archive:
        small = archive["x"][:count].astype(np.float32) / 255
    at = np.linspace(0, small.shape[1] - 1, SIDE)
    left = np.minimum(at.astype(int), small.shape[1] - 2)
    share = (at - left).astype(np.float32)
    tall = small[:, left] * (1 - share)[:, None, None] + small[:, left + 1] * share[:, None, None]
    wide = tall[:, :, left] * (1 - share)[:, None] + tall[:, :, left + 1] * share[:, None]
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    deviation = np.array([0.229, 0.224, 0.225], np.float32)
    pixels: Array = ((wide - mean) / deviation).transpose(0, 3, 1, 2)
    return pixels.astype(np.float32)
