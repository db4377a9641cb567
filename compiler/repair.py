"""What exporters get wrong and engines put up with, set right before the IR sees it.

Each repair is noted, so that whoever reads the artifact knows that the file was not taken at its
word. What cannot be set right without guessing is refused here, with the node it is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from trivium.compiler.errors import BadInput

if TYPE_CHECKING:
    import onnx
    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message

_SHOWN = 4


def repair(proto: onnx.ModelProto, about: str) -> list[str]:
    """Repair a model in place and return one note for each kind of repair.

    Raises:
        BadInput: A cycle, a value that nothing defines, one that two computations define, or an
            attribute without a value.
    """
    _require_text(proto, about)
    notes: list[str] = []
    if not proto.graph.name:
        proto.graph.name = "main"
    _repair_graph(proto.graph, set(), about, notes)
    for function in proto.functions:
        _require_attributes(function.node, f"{about}: function {function.name!r}")
        _sort(function, set(function.input), f"{about}: function {function.name!r}", notes)
    return list(dict.fromkeys(notes))


def _repair_graph(graph: onnx.GraphProto, outer: set[str], about: str, notes: list[str]) -> None:
    graph.name = graph.name or "body"
    _require_attributes(graph.node, about)
    _require_external(graph, about)
    _open_negative_dims(graph, notes)
    _keep_last_constants(graph, about, notes)
    given = outer | {value.name for value in graph.input}
    given |= {tensor.name for tensor in graph.initializer}
    given |= {tensor.values.name for tensor in graph.sparse_initializer}
    _sort(graph, given, about, notes)
    inside = given | {name for node in graph.node for name in node.output if name}
    for value in graph.output:
        if value.name not in inside:
            raise BadInput(f"nothing computes the output {value.name!r}", about=about)
    for node in graph.node:
        for body in subgraphs(node):
            _repair_graph(body, inside, about, notes)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _require_text(message: Message, about: str) -> None:
    """Names have to be text: protobuf hands out as bytes what is not UTF-8."""
    from google.protobuf.message import Message

    for field, value in _fields(message):
        values = (value,) if isinstance(value, (str, bytes, Message)) else value
        if field.type == field.TYPE_MESSAGE:
            for inner in values:
                _require_text(inner, about)
        elif field.type == field.TYPE_STRING:
            guilty = next((one for one in values if isinstance(one, bytes)), None)
            if guilty is not None:
                raise BadInput(
                    f"the {field.name} {guilty[:40]!r} is not UTF-8",
                    about=about,
                    remedy="the file is damaged; export it again",
                )


def _fields(message: Message) -> Iterator[tuple[FieldDescriptor, Any]]:
    """The fields of a message that are set, a tensor's data left out: it would be copied."""
    if message.DESCRIPTOR.name != "TensorProto":
        yield from message.ListFields()
        return
    for name in ("name", "doc_string", "external_data"):
        field = message.DESCRIPTOR.fields_by_name[name]
        yield field, getattr(message, name)


def _require_attributes(nodes: Iterable[onnx.NodeProto], about: str) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if not attribute.type and not attribute.ref_attr_name and _empty(attribute):
                raise BadInput(
                    f"the attribute {attribute.name!r} has neither type nor value",
                    about=f"{about}: node {label(node)}",
                    remedy="export the model again",
                )


def _require_external(graph: onnx.GraphProto, about: str) -> None:
    """Offsets and lengths of external data have to be numbers before anything seeks to them."""
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key in ("offset", "length") and not entry.value.isdecimal():
                raise BadInput(
                    f"external data with {entry.key} {entry.value!r}",
                    about=f"{about}: tensor {tensor.name!r}",
                    remedy="export the model again",
                )


def _open_negative_dims(graph: onnx.GraphProto, notes: list[str]) -> None:
    """A dimension of -1 means an unknown one to those who write it; ONNX has no such number."""
    changed = []
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value < 0:
                dim.Clear()
                changed.append(value.name)
    if changed:
        notes.append(f"negative dimensions are taken for unknown ones ({_some(changed)})")


def _empty(attribute: onnx.AttributeProto) -> bool:
    return {field.name for field, _ in attribute.ListFields()} <= {"name", "doc_string"}


def label(node: onnx.NodeProto) -> str:
    """How to name a node to a person: its own name, or what it makes."""
    made = next((name for name in node.output if name), "")
    return f"{node.name or made!r} ({node.op_type})"


def _keep_last_constants(graph: onnx.GraphProto, about: str, notes: list[str]) -> None:
    """Of several Constants under one name keep the last: what ONNX Runtime does."""
    makers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name:
                makers.setdefault(name, []).append(index)
    clashing = {name: indices for name, indices in makers.items() if len(indices) > 1}
    stored = {tensor.name for tensor in graph.initializer} | {v.name for v in graph.input}
    for name in makers.keys() & stored:
        raise BadInput(
            f"the value {name!r} is both stored and computed",
            about=f"{about}: node {label(graph.node[makers[name][0]])}",
        )
    dropped: set[int] = set()
    for name, indices in clashing.items():
        nodes = [graph.node[index] for index in indices]
        guilty = next((node for node in nodes if node.op_type != "Constant"), None)
        if guilty is not None:
            raise BadInput(
                f"the value {name!r} is defined {len(nodes)} times",
                about=f"{about}: node {label(guilty)}",
            )
        dropped.update(indices[:-1])
    if dropped:
        kept = [node for index, node in enumerate(graph.node) if index not in dropped]
        _set_nodes(graph, kept)
        notes.append(
            f"{len(clashing)} constants are stored more than once, the last of each is used "
            f"({_some(clashing)})"
        )


def _sort(
    graph: onnx.GraphProto | onnx.FunctionProto, given: set[str], about: str, notes: list[str]
) -> None:
    """Put nodes behind those they read from, otherwise keeping their order."""
    nodes = list(graph.node)
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    needs: list[list[int]] = []
    for node in nodes:
        read = [name for name in _reads(node) if name not in given]
        unknown = next((name for name in read if name not in maker), None)
        if unknown is not None:
            raise BadInput(
                f"it reads {unknown!r}, which nothing defines",
                about=f"{about}: node {label(node)}",
            )
        needs.append([maker[name] for name in read])
    if all(need < index for index, wanted in enumerate(needs) for need in wanted):
        return
    order = _topological(needs)
    if len(order) < len(nodes):
        stuck = next(node for i, node in enumerate(nodes) if i not in set(order))
        raise BadInput(
            "the graph has a cycle",
            about=f"{about}: node {label(stuck)}",
            remedy="loops need Loop or Scan",
        )
    _set_nodes(graph, [nodes[index] for index in order])
    notes.append("its nodes are not in topological order; they were sorted")


def _reads(node: onnx.NodeProto) -> list[str]:
    """What a node reads, its bodies included, as far as it comes from outside of the node."""
    read = [name for name in node.input if name]
    for body in subgraphs(node):
        own = {value.name for value in body.input} | {t.name for t in body.initializer}
        own |= {tensor.values.name for tensor in body.sparse_initializer}
        own |= {name for inner in body.node for name in inner.output}
        read += [name for inner in body.node for name in _reads(inner) if name not in own]
        read += [value.name for value in body.output if value.name not in own]
    return read


def _topological(needs: list[list[int]]) -> list[int]:
    """Kahn's algorithm; of the nodes that are ready, the earliest in the file goes first."""
    import heapq

    readers: list[list[int]] = [[] for _ in needs]
    missing = [len(set(wanted)) for wanted in needs]
    for index, wanted in enumerate(needs):
        for need in set(wanted):
            readers[need].append(index)
    ready = [index for index, count in enumerate(missing) if not count]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers[index]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, reader)
    return order


def _set_nodes(
    graph: onnx.GraphProto | onnx.FunctionProto, nodes: Iterable[onnx.NodeProto]
) -> None:
    import onnx

    copies = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
