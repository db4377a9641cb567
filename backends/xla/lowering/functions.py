"""The ONNX function body of an operator: the model's own function, or the one in its schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import onnx
import onnx_ir as ir

FunctionKey = tuple[str, str, str]


@dataclass(frozen=True)
class Body:
    """A function, the operator sets it imports, and defaults for attributes it refers to.

    Attributes:
        outputs: The names of all outputs that the operator has, made or not.
    """

    function: ir.Function
    opsets: Mapping[str, int]
    defaults: Mapping[str, ir.Attr] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()


def schema_of(domain: str, op_type: str, opset: int) -> Any | None:
    """The schema of an operator in an opset, or None if there is none."""
    try:
        return onnx.defs.get_schema(
            op_type, max_inclusive_version=opset, domain="" if domain == "ai.onnx" else domain
        )
    except onnx.defs.SchemaError:
        return None


def has_body(domain: str, op_type: str, opset: int) -> bool:
    """Whether the operator's schema carries a function body."""
    schema = schema_of(domain, op_type, opset)
    return schema is not None and (
        schema.has_function or bool(schema.has_context_dependent_function)
    )


def is_context_dependent(domain: str, op_type: str, opset: int) -> bool:
    """Whether the body depends on the types and attributes of the node."""
    schema = schema_of(domain, op_type, opset)
    return schema is not None and bool(schema.has_context_dependent_function)


def body_of(
    node: ir.Node,
    opset: int,
    standard: int,
    inputs: Sequence[Any],
    functions: Mapping[FunctionKey, ir.Function],
    attributes: Mapping[str, ir.Attr],
) -> Body | None:
    """Return the body that a node stands for, or None.

    Args:
        opset: The version of the node's domain.
        standard: The version of the standard domain where the node stands.
        inputs: Values, whose dtypes a context-dependent body is built for.
        attributes: Those of the enclosing function call, for attributes that refer to them.
    """
    own = functions.get((node.domain, node.op_type, node.overload))
    if own is not None:
        return Body(own, own.opset_imports, {}, tuple(v.name or "" for v in own.outputs))
    schema = schema_of(node.domain, node.op_type, opset)
    if schema is None:
        return None
    if schema.has_context_dependent_function:
        return _context_dependent(schema, node, opset, standard, inputs, attributes)
    if not schema.has_function:
        return None
    return fixed_body(node.domain, node.op_type, opset)


def _defaults(schema: Any) -> dict[str, ir.Attr]:
    return {
        name: ir.from_proto(attribute.default_value)
        for name, attribute in schema.attributes.items()
        if attribute.default_value.name
    }


@lru_cache(maxsize=512)
def fixed_body(domain: str, op_type: str, opset: int) -> Body | None:
    """The body in the schema of an operator, if it has one that is the same for every node."""
    schema = schema_of(domain, op_type, opset)
    assert schema is not None
    versions = [v for v in schema.function_opset_versions if v <= opset]
    wanted = max(versions, default=None)
    serialized = schema.get_function_with_opset_version(wanted) if wanted is not None else None
    proto = serialized if serialized is not None else schema.function_body
    if isinstance(proto, bytes):
        proto = onnx.FunctionProto.FromString(proto)
    return _parsed(schema, proto, opset if domain in ("", "ai.onnx") else latest())


def latest() -> int:
    """The newest standard opset of the onnx package."""
    return int(onnx.defs.onnx_opset_version())


def _parsed(schema: Any, proto: onnx.FunctionProto, standard: int) -> Body:
    """A function from its protobuf, without the optional outputs that it does not make.

    Args:
        standard: The opset of the standard domain, where the function does not say.
    """
    made = set(proto.input).union(*(node.output for node in proto.node))
    outputs = list(proto.output)
    del proto.output[:]
    proto.output.extend(name for name in outputs if name in made)
    function = ir.serde.deserialize_function(proto)
    opsets = {"": standard, **function.opset_imports}
    return Body(function, opsets, _defaults(schema), tuple(outputs))


def _context_dependent(
    schema: Any,
    node: ir.Node,
    opset: int,
    standard: int,
    inputs: Sequence[Any],
    attributes: Mapping[str, ir.Attr],
) -> Body | None:
    versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
    if not versions:
        return None
    types = [_type(value).SerializeToString() for value in inputs]
    proto = schema.get_context_dependent_function_with_opset_version(
        max(versions), resolved_proto(node, attributes).SerializeToString(), types
    )
    return _parsed(schema, onnx.FunctionProto.FromString(proto), standard)


def resolved_proto(node: ir.Node, attributes: Mapping[str, ir.Attr]) -> onnx.NodeProto:
    """A node as protobuf, with attributes that refer to the enclosing call's replaced by them."""
    proto = ir.to_proto(node)
    refers = [attribute for attribute in proto.attribute if attribute.ref_attr_name]
    for attribute in refers:
        outer = attributes.get(attribute.ref_attr_name)
        name = attribute.name
        proto.attribute.remove(attribute)
        if outer is not None:
            own = ir.to_proto(outer)
            own.name = name
            proto.attribute.append(own)
    return proto


def _type(value: Any) -> onnx.TypeProto:
    if value is None:
        return onnx.TypeProto()
    if isinstance(value, list):
        return onnx.helper.make_sequence_type_proto(_type(value[0]))
    return onnx.helper.make_tensor_type_proto(
        onnx.helper.np_dtype_to_tensor_dtype(value.dtype),
        [size if isinstance(size, int) else None for size in value.shape],
    )
