"""Runs a graph node by node on values that are known (numpy) or traced (jax).

This is the whole of the interpreter: look the operator up, fold it if all is known, otherwise
call its handler, otherwise run its ONNX function body. Control flow handlers come back here
through `Op.subgraph`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.backends.xla.lowering import dimensions, registry
from trivium.backends.xla.lowering.dtypes import numpy_dtype
from trivium.backends.xla.lowering.fold import fold, is_known
from trivium.backends.xla.lowering.functions import FunctionKey, body_of
from trivium.backends.xla.lowering.lazy import jax
from trivium.backends.xla.lowering.quantized import Mode, integer_product, straight_through
from trivium.backends.xla.platforms import Platform
from trivium.compiler.errors import TriviumError, Unsupported
from trivium.compiler.onnx_api import one_line

Env = dict[ir.Value, Any]


@dataclass
class Frame:
    """What is in scope while a graph or a function body runs.

    Attributes:
        env: Values by the name they have in the graph.
        opsets: The operator sets that the enclosing model or function imports.
        attributes: Attributes of the enclosing function call, for those that refer to them.
        functions: The functions of the model.
        promised: Shapes that the caller declared for outputs of a function body.
        mode: How quantized products are lowered.
        shardings: jax's sharding of the values that have to be spread in a given way.
        platform: What the program is for, where that is one platform and handlers may suit it.
        symbols: What the model's names of dimensions stand for, where those stay symbolic.
    """

    env: Env
    opsets: Mapping[str, int]
    functions: Mapping[FunctionKey, ir.Function]
    attributes: Mapping[str, ir.Attr] = field(default_factory=dict)
    promised: Mapping[ir.Value, tuple[int, ...]] = field(default_factory=dict)
    mode: Mode = "integer"
    shardings: Mapping[ir.Value, Any] = field(default_factory=dict)
    platform: Platform | None = None
    symbols: Mapping[str, Any] = field(default_factory=dict)

    def opset(self, domain: str) -> int:
        """The version of a domain that is in force; its first if the model forgot to say."""
        if domain in ("", "ai.onnx"):
            return self.opsets.get("", self.opsets.get("ai.onnx", 1))
        return self.opsets.get(domain, 1)


class NeedsValue(Unsupported):
    """An operand has to be known while tracing, and is not.

    Attributes:
        value: The operand, for those who can make it known.
    """

    def __init__(
        self, cause: str, *, about: str, value: ir.Value | None, symbols: Iterable[str] = ()
    ) -> None:
        self.value = value
        fixed = " and ".join(symbols)
        sizes = " ".join(f"{name}=SIZE" for name in symbols)
        otherwise = f"fix {fixed} with --shape {sizes}, " if fixed else ""
        super().__init__(
            cause,
            about=about,
            remedy=f"{otherwise}store it in the model as an initializer, or give the output a "
            "static shape",
        )


@dataclass(frozen=True)
class Op:
    """A node as its handler sees it."""

    node: ir.Node
    version: int
    frame: Frame

    def attr(self, name: str, default: Any = None) -> Any:
        """The value of an attribute, or ``default``; a reference to the function's is followed."""
        found = self.node.attributes.get(name)
        if found is not None and found.is_ref():
            found = self.frame.attributes.get(found.ref_attr_name or "")
        if found is None:
            return default
        return list(found.value) if isinstance(found.value, tuple) else found.value

    @property
    def outputs(self) -> int:
        """How many outputs the node declares."""
        return len(self.node.outputs)

    def wants(self, index: int) -> bool:
        """Whether an optional output is asked for."""
        return index < len(self.node.outputs) and bool(self.node.outputs[index].name)

    def shape(self, index: int = 0) -> tuple[int, ...] | None:
        """The shape that the model promises for an output, if it is static."""
        return promised_shape(self.node.outputs[index], self.frame)

    def dtype(self, index: int = 0) -> np.dtype[Any] | None:
        """The dtype that the model declares for an output."""
        declared = self.node.outputs[index].dtype
        return numpy_dtype(declared) if declared is not None else None

    def known(self, value: Any) -> bool:
        """Whether a value is known while tracing."""
        return is_known(value)

    def static(self, index: int, value: Any) -> np.ndarray[Any, Any]:
        """Return an operand that must be known while tracing; raise ``NeedsValue`` if not."""
        if isinstance(value, (np.ndarray, np.generic)):
            return np.asarray(value)
        raise self.needs(index)

    def ints(self, index: int, value: Any) -> list[int]:
        """A known operand as a list of Python integers."""
        sizes = self.sizes(index, value)
        symbolic = next((size for size in sizes if dimensions.is_symbolic(size)), None)
        if symbolic is not None:
            raise self.needs_number(str(symbolic))
        return sizes

    def sizes(self, index: int, value: Any) -> list[int]:
        """A known operand as a list of sizes, which may be symbolic."""
        flat = self.static(index, value).reshape(-1)
        return [item if dimensions.is_symbolic(item) else int(item) for item in flat]

    def needs_number(self, names: str, cause: str = "") -> Unsupported:
        """The error for sizes that are symbolic where the handler cannot go on with that."""
        return self.refuse(
            f"is not lowered with {names} symbolic{': ' if cause else ''}{cause}",
            remedy="fix the dimension with --shape DIM=SIZE",
        )

    def needs(self, index: int) -> NeedsValue:
        """The error for an operand that is not known."""
        operand = self.node.inputs[index]
        name = operand.name if operand is not None else f"#{index}"
        return NeedsValue(
            f"{self.node.op_type} takes a shape from the value of {name!r}, "
            "which is not known before the program runs",
            about=self.label,
            value=operand,
            symbols=tuple(self.frame.symbols),
        )

    def refuse(self, cause: str, *, remedy: str = "") -> Unsupported:
        """The error for what the handler cannot lower."""
        return Unsupported(f"{self.node.op_type} {cause}", about=self.label, remedy=remedy)

    @property
    def label(self) -> str:
        """How to call the node in a message."""
        return self.node.name or f"{self.node.op_type} -> {self.node.outputs[0].name}"

    def subgraph(self, name: str) -> Callable[..., tuple[Any, ...]]:
        """Return the graph of an attribute as a function of its inputs; it sees outer values."""
        graph: ir.Graph = self.attr(name)

        def call(*inputs: Any) -> tuple[Any, ...]:
            env = dict(self.frame.env)
            env.update(zip(graph.inputs, inputs, strict=True))
            frame = replace(self.frame, env=env, promised={})
            return run_graph(graph, frame)

        return call


_KEEPS_SHAPE = frozenset(
    {"Abs", "Neg", "Exp", "Log", "Sqrt", "Identity", "Cast", "CastLike", "Reciprocal", "Relu",
     "Sigmoid", "Tanh", "Floor", "Ceil", "Not", "Sign", "Softmax", "LogSoftmax"}
)  # fmt: skip


def promised_shape(value: ir.Value, frame: Frame) -> tuple[int, ...] | None:
    """The static shape that the model declares for a value, or for what is computed from it
    element by element; None if there is none.
    """
    for _ in range(8):
        if value in frame.promised:
            return frame.promised[value]
        if value.shape is not None:
            sizes = [_size(dim, frame) for dim in value.shape]
            if all(size is not None for size in sizes):
                return tuple(sizes)
        readers = [node for node, index in value.uses() if index == 0]
        same = [node for node in readers if node.op_type in _KEEPS_SHAPE and node.domain == ""]
        same += [node for node, index in value.uses() if _scales(node, index, frame)]
        if not same:
            return None
        value = same[0].outputs[0]
    return None


def _size(dim: int | ir.SymbolicDim, frame: Frame) -> Any:
    return dim if isinstance(dim, int) else frame.symbols.get(str(dim.value))


def _scales(node: ir.Node, index: int, frame: Frame) -> bool:
    """Whether a node combines its operand with nothing but a scalar."""
    if node.op_type not in ("Add", "Sub", "Mul", "Div", "Pow") or node.domain != "":
        return False
    operand = node.inputs[1 - index]
    other = None if operand is None else frame.env.get(operand)
    return other is not None and getattr(other, "ndim", 1) == 0


def run_graph(graph: ir.Graph | ir.Function, frame: Frame) -> tuple[Any, ...]:
    """Run all nodes of a graph in order; return its outputs."""
    for value in getattr(graph, "initializers", {}).values():
        if value not in frame.env and value.const_value is not None:
            frame.env[value] = value.const_value.numpy()
    run_nodes(graph, frame)
    return tuple(frame.env[value] for value in graph.outputs)


def run_nodes(nodes: Iterable[ir.Node], frame: Frame) -> None:
    """Run nodes in order; what they make is then in the frame."""
    for node in nodes:
        if node.op_type == "Constant" and node.outputs[0] in frame.env:
            continue
        results = run_node(node, frame)
        for value, result in zip(node.outputs, results, strict=False):
            frame.env[value] = _spread(result, frame.shardings.get(value))


def _spread(result: Any, sharding: Any) -> Any:
    """Hold a result to how it is to be spread; what is known is whole everywhere."""
    if sharding is None or result is None or is_known(result):
        return result
    return jax.lax.with_sharding_constraint(result, sharding)


def run_node(node: ir.Node, frame: Frame) -> tuple[Any, ...]:
    """Run one node; return a value for each output that it produced."""
    inputs = [None if value is None else frame.env[value] for value in node.inputs]
    opset = frame.opset(node.domain)
    op = Op(node, opset, frame)
    if any(dimensions.has_symbols(value) for value in inputs):
        sizes = dimensions.fold(node, inputs, frame.attributes)
        if sizes is not None:
            return sizes
    elif inputs and all(is_known(value) for value in inputs):
        folded = fold(node, inputs, opset, frame.attributes)
        if folded is not None:
            return folded
    key = (node.domain, node.op_type, node.overload)
    try:
        if key not in frame.functions:
            entry = registry.find(node.domain, node.op_type, opset)
            if entry is not None:
                return _lower(op, entry, _readable(node, entry, inputs))
        return _run_function(op, inputs)
    except TriviumError:
        raise
    except Exception as error:  # jax raises many kinds for what it cannot do with a symbolic size
        symbols = dimensions.named(inputs)
        if symbols:
            raise op.needs_number(symbols, one_line(error)) from error
        if isinstance(error, (TypeError, ValueError, IndexError, KeyError, AttributeError)):
            error.add_note(f"while lowering {op.label} ({node.op_type})")
        raise


def _readable(node: ir.Node, entry: registry.Entry, inputs: Sequence[Any]) -> list[Any]:
    """Inputs as the handler reads them: symbolic sizes are values except where it takes sizes."""
    return [
        value
        if slot in entry.constants or not dimensions.has_symbols(value)
        else dimensions.traced(value, _declared(node.inputs[slot]))
        for slot, value in enumerate(inputs)
    ]


def _declared(value: ir.Value | None) -> Any:
    """The dtype that the model gives an integer tensor of sizes."""
    return np.int64 if value is None or value.dtype is None else value.dtype.numpy()


def _lower(op: Op, entry: registry.Entry, inputs: Sequence[Any]) -> tuple[Any, ...]:
    if op.frame.mode == "integer":
        product = integer_product(op)
        if product is not None:
            return (product,)
    results = as_tuple(entry.lower(op, *inputs))
    return straight_through(op, results) if op.frame.mode == "straight-through" else results


def as_tuple(results: Any) -> tuple[Any, ...]:
    """A handler's result as a tuple: a list is one value, a sequence."""
    return results if isinstance(results, tuple) else (results,)


def _run_function(op: Op, inputs: Sequence[Any]) -> tuple[Any, ...]:
    node, frame = op.node, op.frame
    body = body_of(node, op.version, frame.opset(""), inputs, frame.functions, frame.attributes)
    if body is None:
        raise op.refuse("has neither a handler nor a function body")
    attributes = {
        name: attribute
        for name, attribute in body.function.attributes.items()
        if attribute.type != ir.AttributeType.UNDEFINED and attribute.value is not None
    }
    attributes.update(body.defaults)
    for name in node.attributes:
        value = op.node.attributes[name]
        if value.is_ref():
            outer = frame.attributes.get(value.ref_attr_name or "")
            if outer is not None:
                attributes[name] = outer
        else:
            attributes[name] = value
    parameters = body.function.inputs
    env: Env = dict.fromkeys(parameters)
    env.update(zip(parameters, inputs, strict=False))
    promised = {}
    declared = dict(zip(body.outputs, node.outputs, strict=False))
    for inner in body.function.outputs:
        outer_value = declared.get(inner.name or "")
        shape = None if outer_value is None else promised_shape(outer_value, frame)
        if shape is not None:
            promised[inner] = shape
    inside = replace(
        frame,
        env=env,
        opsets=body.opsets,
        attributes=attributes,
        promised=promised,
        shardings={},
    )
    names = [value.name for value in body.function.outputs]
    made = dict(zip(names, run_graph(body.function, inside), strict=True))
    return tuple(made.get(name) for name in body.outputs)
