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
        if any(node.op_type in _WITH_BODIES for node in model.graph):
            found = ir.from_proto(inferred)
            for graph, twin in zip(model.graphs(), found.graphs(), strict=True):
                theirs = ir.convenience.create_value_mapping(twin, include_subgraphs=False)
                mine = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
                for name in mine.keys() & theirs.keys():
                    modified |= _merge(mine[name], theirs[name].type, theirs[name].shape)
            return modified
        # One graph: what was found is read without making its nodes anew.
        mine = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
        for info in (*inferred.graph.value_info, *inferred.graph.output):
            value = mine.get(info.name)
            if value is not None and info.HasField("type"):
                type_ = ir.serde.deserialize_type_proto_for_type(info.type)
                shape = ir.serde.deserialize_type_proto_for_shape(info.type)
                modified |= _merge(value, type_, shape)
        return modified


_WITH_BODIES = frozenset({"If", "Loop", "Scan", "SequenceMap"})


def _merge(value: ir.Value, type_: ir.TypeProtocol | None, shape: ir.Shape | None) -> bool:
    modified = False
    if value.type is None and type_ is not None:
        value.type = type_
        modified = True
    if shape is None:
        return modified
    if value.shape is None or len(value.shape) != len(shape):
        value.shape = ir.Shape(shape)
        return True
    dims = [_better(old, new) for old, new in zip(value.shape, shape, strict=True)]
    if dims != list(value.shape):
        value.shape = ir.Shape(dims)
        return True
    return modified


def _better(old: int | ir.SymbolicDim, new: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    if isinstance(new, int):
        return new
    return new if isinstance(old, ir.SymbolicDim) and old.value is None else old
