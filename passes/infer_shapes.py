"""Give every value the type and shape that inference can find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.onnx_api import light_proto, one_line
from trivium.compiler.passing import Pass, decline
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class InferShapes(Pass):
    """Run onnx's shape inference with data propagation, weights left aside.

    A dimension that is known stays; a name that the model gave to one is preferred to a new one.
    """

    name: ClassVar[str] = "infer-shapes"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        import onnx.shape_inference

        with light_proto(model) as proto:
            pass
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except Exception as error:  # InferenceError, or what the C++ side throws
            guilty = next(iter(model.graph), None)
            return decline(guilty, one_line(error)) if guilty is not None else False
        modified = False
        found = ir.from_proto(inferred)
        for graph, twin in zip(model.graphs(), found.graphs(), strict=True):
            theirs = ir.convenience.create_value_mapping(twin, include_subgraphs=False)
            for name, value in ir.convenience.create_value_mapping(
                graph, include_subgraphs=False
            ).items():
                if name in theirs:
                    modified |= _merge(value, theirs[name])
        return modified


def _merge(value: ir.Value, found: ir.Value) -> bool:
    modified = False
    if value.type is None and found.type is not None:
        value.type = found.type
        modified = True
    if found.shape is None:
        return modified
    if value.shape is None or len(value.shape) != len(found.shape):
        value.shape = ir.Shape(found.shape)
        return True
    dims = [_better(old, new) for old, new in zip(value.shape, found.shape, strict=True)]
    if dims != list(value.shape):
        value.shape = ir.Shape(dims)
        return True
    return modified


def _better(old: int | ir.SymbolicDim, new: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    if isinstance(new, int):
        return new
    return new if isinstance(old, ir.SymbolicDim) and old.value is None else old
