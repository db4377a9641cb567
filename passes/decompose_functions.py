"""Replace operators by the function bodies that ONNX itself defines for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from trivium.compiler.model import OPSET
from trivium.compiler.passing import Pass, decline, option
from trivium.compiler.types import Preserves
from trivium.passes.infer_shapes import InferShapes

if TYPE_CHECKING:
    import onnx

_DOMAIN = "trivium.decomposed"


@dataclass(frozen=True)
class DecomposeFunctions(Pass):
    """Inline the standard's own definition of the named operators.

    For a backend whose engine lacks an operator but has what it is made of. A body that uses one
    of the named operators in turn is opened as well.

    Left alone: operators for which ONNX defines no body, and those whose body depends on types
    that inference did not find.
    """

    name: ClassVar[str] = "decompose-functions"
    preserves: ClassVar[Preserves] = "numeric"

    operators: tuple[str, ...] = option((), "Operators of the standard domain to open")

    def run(self, model: ir.Model) -> bool:
        modified = False
        names = _Names(model)
        # Bodies nest a few levels at most (Attention -> Softmax -> ReduceMax); a body that holds
        # its own operator would never end.
        for _ in range(8):
            opened = [
                node
                for node in model.graph.all_nodes()
                if node.domain == "" and self.wants(node) and _open(model, node, names)
            ]
            if not opened:
                return modified
            common.InlinePass()(model)
            model.opset_imports.pop(_DOMAIN, None)
            InferShapes().run(model)
            modified = True
        return modified

    def wants(self, node: ir.Node) -> bool:
        """Whether to open a node of the standard domain; a backend may ask about more."""
        return node.op_type in self.operators


class _Names:
    """Names that the model does not use yet.

    The inliner would make them too, but counts from one for each of thousands of nodes.
    """

    def __init__(self, model: ir.Model) -> None:
        self._nodes: dict[str, int] = {}
        self._values: dict[str, int] = {}
        for graph in model.graphs():
            self._values.update(dict.fromkeys(graph.initializers, 1))
            self._values.update((value.name, 1) for value in graph.inputs if value.name)
            for node in graph:
                self._nodes[node.name or ""] = 1
                self._values.update((value.name, 1) for value in node.outputs if value.name)

    def give(self, function: ir.Function) -> None:
        """Rename the nodes of a function and the values that they make."""
        for node in function:
            node.name = _unique(node.name or "node", self._nodes)
            for value in node.outputs:
                value.name = _unique(value.name or "val", self._values)


def _unique(name: str, taken: dict[str, int]) -> str:
    """The name with the first number that is free; ``taken`` says from which on to look."""
    made, count = name, taken.get(name, 1)
    while made in taken:
        count += 1
        made = f"{name}_{count}"
    taken[name] = count
    taken.setdefault(made, 1)
    return made


def _open(model: ir.Model, node: ir.Node, names: _Names) -> bool:
    """Make a node call its body, as a function of the model that the inliner then dissolves."""
    body = function_body(node)
    if body is None:
        return decline(node, f"ONNX defines no function body for this {node.op_type}")
    body.domain = _DOMAIN
    body.name = f"{node.op_type}_{len(model.functions)}"
    function = ir.serde.deserialize_function(body)
    names.give(function)
    model.functions[function.identifier()] = function
    model.opset_imports[_DOMAIN] = 1
    node.domain, node.op_type = function.domain, function.name
    return True


def function_body(node: ir.Node) -> onnx.FunctionProto | None:
    """Return the body that ONNX defines for a node at the opset of normal form, if any.

    Bodies that depend on the node's types and attributes are made for exactly this node.
    """
    import onnx
    import onnx.defs

    try:
        # Typed as Any: the stubs of onnx leave out what a schema knows of functions.
        schema: Any = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
    except onnx.defs.SchemaError:
        return None
    if not schema.has_function and not schema.has_context_dependent_function:
        return None
    proto = _with_defaults(node, schema)
    # Names are the node's own: without them the nodes of all layers ask the same.
    proto.name = ""
    for names in (proto.input, proto.output):
        for index, name in enumerate(names):
            names[index] = f"{index}" if name else ""
    types = tuple(_type_proto(value) for value in node.inputs)
    serialized = _body(proto.SerializeToString(deterministic=True), types)
    if serialized is None:
        return None
    body = onnx.FunctionProto()
    body.ParseFromString(serialized)
    return body


@lru_cache(maxsize=4096)
def _body(question: bytes, types: tuple[bytes, ...]) -> bytes | None:
    """The body of a node whose inputs are of some types, at the opset of normal form."""
    import onnx
    import onnx.defs

    node = onnx.NodeProto.FromString(question)
    schema: Any = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
    if schema.has_function:
        version = _newest(schema.function_opset_versions)
        serialized = schema.get_function_with_opset_version(version)
    else:
        version = _newest(schema.context_dependent_function_opset_versions)
        try:
            serialized = schema.get_context_dependent_function_with_opset_version(
                version, question, list(types)
            )
        except (RuntimeError, onnx.defs.SchemaError):
            return None
    if not serialized:
        return None
    body = onnx.FunctionProto()
    body.ParseFromString(serialized)
    if not body.node or not _says_the_same_today(body):
        return None
    # Bodies made for one node leave out what the node does not ask for.
    del body.output[len(node.output) :]
    made = {name for step in body.node for name in step.output}
    if not made.issuperset(body.output):
        return None
    for imported in body.opset_import:
        if imported.domain == "":
            imported.version = OPSET
    return bytes(body.SerializeToString())


def _says_the_same_today(body: onnx.FunctionProto) -> bool:
    """Whether a body written for an older opset reads the same at that of normal form: its
    operators have since gained types, inputs or attributes, but lost none."""
    import onnx.defs

    version = next((i.version for i in body.opset_import if i.domain == ""), OPSET)
    for node in body.node:
        then, now = (onnx.defs.get_schema(node.op_type, v) for v in (version, OPSET))
        inputs = [one.name for one in then.inputs]
        used = {attribute.name for attribute in node.attribute}
        if [one.name for one in now.inputs[: len(inputs)]] != inputs:
            return False
        if not used <= set(now.attributes):
            return False
    return True


def _newest(versions: Any) -> int:
    """The newest body that is not newer than normal form."""
    return max((v for v in versions if v <= OPSET), default=-1)


def _with_defaults(node: ir.Node, schema: onnx.defs.OpSchema) -> onnx.NodeProto:
    """Write the schema's defaults into a node, because bodies refer to attributes by name."""
    import onnx

    for name, attribute in schema.attributes.items():
        default = attribute.default_value
        if name not in node.attributes and default.type != onnx.AttributeProto.UNDEFINED:
            node.attributes[name] = ir.serde.deserialize_attribute(default)
    return ir.serde.serialize_node(node)


def _type_proto(value: ir.Value | None) -> bytes:
    import onnx

    proto = onnx.TypeProto()
    if value is not None and value.type is not None:
        ir.serde.serialize_type_into(proto, value.type)
        if value.shape is not None:
            ir.serde.serialize_shape_into(proto, value.shape)
    return bytes(proto.SerializeToString())
