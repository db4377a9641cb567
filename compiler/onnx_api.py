"""The C++ side of the onnx package (checker, inference, version converter), made safe for large
models: weights are taken out before the model is serialized for it and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_SMALL = 1000
"""Bytes up to which an initializer stays in, because inference reads it (shapes, axes)."""


@contextmanager
def light_proto(model: ir.Model) -> Iterator[onnx.ModelProto]:
    """Yield the model as a protobuf with its large initializers turned into inputs.

    Names are kept, so what comes back can be merged by name.
    """
    import onnx_ir as ir

    graph = model.graph
    taken: dict[ir.Value, ir.TensorProtocol] = {}
    given = len(graph.inputs)
    known = set(graph.inputs)
    try:
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= _SMALL:
                continue
            taken[value] = tensor
            value.shape = value.shape or ir.Shape(tensor.shape.numpy())
            value.dtype = value.dtype or tensor.dtype
            value.const_value = None
            del graph.initializers[value.name or ""]
            if value not in known:
                graph.inputs.append(value)
        yield ir.to_proto(model)
    finally:
        del graph.inputs[given:]
        for value, tensor in taken.items():
            value.const_value = tensor
            graph.register_initializer(value)


def check_model(model: ir.Model) -> str | None:
    """Return what onnx's checker and strict shape inference find wrong, in one line, or None."""
    import onnx.checker
    import onnx.shape_inference

    with light_proto(model) as proto:
        try:
            onnx.checker.check_model(proto)
        except onnx.checker.ValidationError as error:
            return one_line(error)
        custom = {op.domain for op in proto.opset_import} - {"", "ai.onnx"}
        try:
            onnx.shape_inference.infer_shapes(proto, strict_mode=not custom, data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            return one_line(error)
    return None


def one_line(error: BaseException) -> str:
    """The first telling line of an error message of onnx."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    telling = [line for line in lines if "Context" not in line and "==>" not in line]
    return (telling or lines)[0]
