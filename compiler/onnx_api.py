"""The C++ side of the onnx package (checker, inference, version converter), made safe for large
models: weights are taken out before the model is serialized for it and put back afterwards.
"""

from __future__ import annotations

import re
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
    small: dict[ir.Value, ir.TensorProtocol] = {}
    order = list(graph.initializers.values())
    given = len(graph.inputs)
    known = set(graph.inputs)
    try:
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if tensor is None:
                continue
            if tensor.nbytes <= _SMALL:
                if isinstance(tensor, ir.ExternalTensor):
                    # onnx would look for its file in the working directory.
                    small[value] = tensor
                    value.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name)
                continue
            taken[value] = tensor
            value.shape = value.shape or ir.Shape(tensor.shape.numpy())
            value.dtype = value.dtype or tensor.dtype
            value.const_value = None
            del graph.initializers[value.name or ""]
            if value not in known:
                graph.inputs.append(value)
        yield ir.serde.serialize_model(model)
    finally:
        # One by one: deleting a slice would leave the values marked as inputs.
        while len(graph.inputs) > given:
            graph.inputs.pop()
        for value, tensor in small.items():
            value.const_value = tensor
        for value, tensor in taken.items():
            value.const_value = tensor
        if taken:
            graph.initializers.clear()
            for value in order:
                graph.register_initializer(value)


def check_model(model: ir.Model) -> tuple[str | None, list[str]]:
    """Hold a model to onnx's checker and strict shape inference.

    What the model declares of the shapes of computed values is left out of it: where inference
    contradicts a declaration, the declaration is dropped from the model and a note says so.

    Returns:
        What is wrong, in one line, or None; and the notes.
    """
    import onnx.checker
    import onnx.shape_inference

    try:
        with light_proto(model) as proto:
            pass
    except Exception as error:  # onnx_ir's own error wraps whatever it meets
        return f"malformed: {one_line(_root(error))}", []
    declared = _strip_shapes(proto.graph)
    custom = {op.domain for op in proto.opset_import} - {"", "ai.onnx"}
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=not custom, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        return _tidy(one_line(error)), []
    for value in (*inferred.graph.input, *inferred.graph.output):
        # The checker wants a shape where the standard allows an unknown rank; inference is over.
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(inferred)
    except onnx.checker.ValidationError as error:
        return one_line(error), []
    return None, _drop_contradicted(model, inferred, declared)


_Declared = dict[str, "onnx.TensorShapeProto"]


def _strip_shapes(graph: onnx.GraphProto) -> _Declared:
    """Take declared shapes of computed values out of a graph and its bodies; return the top's."""
    from trivium.compiler.repair import subgraphs

    given = {value.name for value in graph.input} | {t.name for t in graph.initializer}
    declared: _Declared = {}
    for value in (*graph.value_info, *graph.output):
        if value.name in given or not value.type.tensor_type.HasField("shape"):
            continue
        shape = declared[value.name] = type(value.type.tensor_type.shape)()
        shape.CopyFrom(value.type.tensor_type.shape)
        value.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for body in subgraphs(node):
            _strip_shapes(body)
    return declared


def _drop_contradicted(
    model: ir.Model, inferred: onnx.ModelProto, declared: _Declared
) -> list[str]:
    import onnx_ir as ir

    found = {
        value.name: value.type.tensor_type.shape
        for value in (*inferred.graph.value_info, *inferred.graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    wrong = {
        name: found[name]
        for name, shape in declared.items()
        if name in found and found[name].dim and _contradict(shape, found[name])
    }
    notes = []
    values = ir.convenience.create_value_mapping(model.graph)
    for name, shape in wrong.items():
        value = values[name]
        notes.append(
            f"the declared shape {_show(declared[name])} of {name!r} is wrong: {_show(shape)}"
        )
        value.shape = ir.Shape([_size(dim) for dim in shape.dim])
    return notes


def _contradict(one: onnx.TensorShapeProto, other: onnx.TensorShapeProto) -> bool:
    if len(one.dim) != len(other.dim):
        return True
    return any(
        a.HasField("dim_value") and b.HasField("dim_value") and a.dim_value != b.dim_value
        for a, b in zip(one.dim, other.dim, strict=True)
    )


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None


def _show(shape: onnx.TensorShapeProto) -> str:
    return str([size if (size := _size(dim)) is not None else "?" for dim in shape.dim])


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _tidy(message: str) -> str:
    """``(op_type:MatMul, node name: m): [TypeInferenceError] x`` -> ``node m (MatMul): x``."""
    plain = re.sub(r"\[\w*Error\]\s*|Inference error\(s\):\s*", "", message).strip()
    found = re.match(r"\(op_type:(\w+)(?:, node name: (.*?))?\):\s*(.*)", plain)
    if found is None:
        return plain
    op_type, name, reason = found.groups()
    return f"node {name} ({op_type}): {reason}" if name else f"a node {op_type}: {reason}"


def one_line(error: BaseException) -> str:
    """The first telling line of an error message of onnx."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    telling = [line for line in lines if "Context" not in line and "==>" not in line]
    return (telling or lines)[0]
