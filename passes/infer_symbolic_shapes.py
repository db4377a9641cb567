"""Name the dimensions that onnx's own inference leaves without a name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import onnx_ir as ir

from trivium.compiler.model import OPSET
from trivium.compiler.onnx_api import one_line
from trivium.compiler.passing import Pass, attribute, decline, is_op, weight
from trivium.compiler.types import Preserves
from trivium.passes.infer_shapes import InferShapes

_ANONYMOUS = ("unk__", "_d")
"""How the names begin that onnx and the library invent for a dimension."""

_ROUNDS = 8
"""Reshapes one behind another that are named without the library."""


@dataclass(frozen=True)
class InferSymbolicShapes(Pass):
    """Follow sizes through arithmetic on shapes: ``reshape(x, [-1, shape(x)[1]])`` keeps its names.

    Exporters that trace (TorchScript) compute every Reshape's shape in the graph, and onnx's
    inference gives up there; patterns that need to know that two axes are the same then find
    nothing. What a Reshape to a constant shape leaves over (its -1) is named first; the library,
    which costs more than all other inference, is asked for what remains. Left alone: graphs in
    which nothing is anonymous. A name that an input has is a name, whoever invented it.
    """

    name: ClassVar[str] = "infer-symbolic-shapes"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        given = _given(model)
        modified = _name_leftovers(model, given)
        values = [value for node in model.graph for value in node.outputs]
        guilty = {value.name: value for value in values if _is_anonymous(value, given)}
        if not guilty:
            return modified
        from onnx_shape_inference import infer_symbolic_shapes

        _with_open_slices()
        # On a copy: the library leaves notes on values, and believes the names that it finds.
        twin = model.clone()
        found = {v.name: v for node in twin.graph for v in node.outputs if v.name in guilty}
        for value in found.values():
            value.shape = None
        try:
            infer_symbolic_shapes(twin, warn_on_missing=False)
        except Exception as error:  # the library, or sympy below it
            return decline(next(iter(guilty.values())), one_line(error))
        named = [
            _adopt(value, found[name], given) for name, value in guilty.items() if name in found
        ]
        return any(named) or modified


def _given(model: ir.Model) -> frozenset[str]:
    """The names of the inputs' dimensions."""
    shapes = [value.shape for value in model.graph.inputs if value.shape is not None]
    return frozenset(str(dim.value) for s in shapes for dim in s if not isinstance(dim, int))


def _name_leftovers(model: ir.Model, given: Set[str]) -> bool:
    """Name the -1 of Reshapes, and let onnx carry the names on."""
    modified = False
    for _ in range(_ROUNDS):
        named = False
        for node in model.graph:
            if is_op(node, "Reshape") and _is_anonymous(node.outputs[0], given):
                shape = _reshaped(node, given)
                if shape is not None:
                    node.outputs[0].shape, named = shape, True
        if not named:
            break
        modified = True
        values = [value for node in model.graph for value in node.outputs]
        before = {v: v.shape for v in values if v.shape is not None and _is_anonymous(v, given)}
        for value, shape in before.items():
            # Names that onnx invented would stand in the way of better ones.
            value.shape = ir.Shape(None if _nameless(dim, given) else dim for dim in shape)
        InferShapes()(model)
        for value, shape in before.items():
            if value.shape is None or any(dim is None for dim in value.shape):
                value.shape = shape
    return modified


def _reshaped(node: ir.Node, given: Set[str]) -> ir.Shape | None:
    """The shape that a Reshape to constants makes, if a number or one name is left for its -1."""
    data, target = node.inputs[:2]
    if data is None or data.shape is None or any(_nameless(dim, given) for dim in data.shape):
        return None
    sizes = weight(target)
    if sizes is None or attribute(node, "allowzero", 0) or list(sizes).count(-1) != 1:
        return None
    if any(size == 0 and index >= len(data.shape) for index, size in enumerate(sizes)):
        return None
    made = [data.shape[i] if size == 0 else int(size) for i, size in enumerate(sizes)]
    left = Counter(str(dim.value) for dim in data.shape if not isinstance(dim, int))
    left.subtract(str(dim.value) for dim in made if not isinstance(dim, int))
    whole = math.prod(dim for dim in data.shape if isinstance(dim, int))
    rest = math.prod(dim for dim in made if isinstance(dim, int) and dim != -1)
    names = list(left.elements())
    if min(left.values(), default=0) < 0 or not rest:
        return None
    if not names and whole % rest == 0:
        return ir.Shape([whole // rest if dim == -1 else dim for dim in made])
    if len(names) != 1 or whole != rest:
        return None
    return ir.Shape([ir.SymbolicDim(names[0]) if dim == -1 else dim for dim in made])


@cache
def _with_open_slices() -> None:
    """Make the library's rule for Slice leave open what it takes for granted.

    It takes a constant end for the size of the result, however short the axis turns out to be.
    """
    from onnx_shape_inference import registry

    registry.collect()
    rule = registry.get("", "Slice", OPSET)
    assert rule is not None

    def infer(context: Any, node: ir.Node) -> None:
        rule(context, node)
        data, cut = node.inputs[0], node.outputs[0]
        if data is None or data.shape is None or cut.shape is None:
            return
        sizes = zip(data.shape, cut.shape, strict=True)
        cut.shape = ir.Shape(
            context.new_symbolic_dim()
            if isinstance(after, int) and not isinstance(before, int)
            else after
            for before, after in sizes
        )

    registry.register("", "Slice", since_version=13)(infer)


def _is_anonymous(value: ir.Value, given: Set[str]) -> bool:
    return value.shape is None or any(_nameless(dim, given) for dim in value.shape)


def _nameless(dim: int | ir.SymbolicDim, given: Set[str]) -> bool:
    if isinstance(dim, int) or dim.value in given:
        return False
    return dim.value is None or any(part in str(dim.value) for part in _ANONYMOUS)


def _plain(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """A dimension; an expression that came out as a number is that number."""
    text = "" if isinstance(dim, int) else str(dim.value)
    return int(text) if text.isdigit() else dim


def _adopt(value: ir.Value, found: ir.Value, given: Set[str]) -> bool:
    """Take over what was found where it says more than what is known."""
    if found.shape is None:
        return False
    sizes = [_plain(dim) for dim in found.shape]
    if value.shape is None:
        value.shape = ir.Shape(None if _nameless(size, given) else size for size in sizes)
        return True
    if len(value.shape) != len(sizes):
        return False
    pairs = list(zip(value.shape, sizes, strict=True))
    dims = [
        new if _nameless(old, given) and not _nameless(new, given) else old for old, new in pairs
    ]
    if dims == [old for old, _ in pairs]:
        return False
    value.shape = ir.Shape(dims)
    return True
