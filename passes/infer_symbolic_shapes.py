"""Name the dimensions that onnx's own inference leaves without a name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import onnx_ir as ir

from trivium.compiler.model import OPSET
from trivium.compiler.onnx_api import one_line
from trivium.compiler.passing import Pass, decline
from trivium.compiler.types import Preserves

_ANONYMOUS = ("unk__", "_d")
"""How the names begin that onnx and the library invent for a dimension."""


@dataclass(frozen=True)
class InferSymbolicShapes(Pass):
    """Follow sizes through arithmetic on shapes: ``reshape(x, [-1, shape(x)[1]])`` keeps its names.

    Exporters that trace (TorchScript) compute every Reshape's shape in the graph, and onnx's
    inference gives up there; patterns that need to know that two axes are the same then find
    nothing. Left alone: graphs in which nothing is anonymous.
    """

    name: ClassVar[str] = "infer-symbolic-shapes"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        guilty = {v.name: v for node in model.graph for v in node.outputs if _is_anonymous(v)}
        if not guilty:
            return False
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
        named = [_adopt(value, found[name]) for name, value in guilty.items() if name in found]
        return any(named)


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


def _is_anonymous(value: ir.Value) -> bool:
    return value.shape is None or any(_nameless(dim) for dim in value.shape)


def _nameless(dim: int | ir.SymbolicDim) -> bool:
    if isinstance(dim, int):
        return False
    return dim.value is None or any(part in str(dim.value) for part in _ANONYMOUS)


def _plain(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """A dimension; an expression that came out as a number is that number."""
    text = "" if isinstance(dim, int) else str(dim.value)
    return int(text) if text.isdigit() else dim


def _adopt(value: ir.Value, found: ir.Value) -> bool:
    """Take over what was found where it says more than what is known."""
    if found.shape is None:
        return False
    sizes = [_plain(dim) for dim in found.shape]
    if value.shape is None:
        value.shape = ir.Shape(None if _nameless(size) else size for size in sizes)
        return True
    if len(value.shape) != len(sizes):
        return False
    pairs = list(zip(value.shape, sizes, strict=True))
    dims = [new if _nameless(old) and not _nameless(new) else old for old, new in pairs]
    if dims == [old for old, _ in pairs]:
        return False
    value.shape = ir.Shape(dims)
    return True
