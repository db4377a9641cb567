"""Compute in half precision: float32 weights and operators become float16 or bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.model import OPSET
from trivium.compiler.passing import (
    Pass,
    attribute,
    changed,
    decline,
    graph_of,
    initializer,
    is_constant,
    option,
    sketching,
    unread,
    weight,
)
from trivium.compiler.types import Preserves

FLOAT = ir.DataType.FLOAT
HALF = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}

KEPT = frozenset(
    {
        # Sums and powers that leave the range or lose what they add.
        "CumSum", "Exp", "Log", "LogSoftmax", "Pow", "Reciprocal", "ReduceL1", "ReduceL2",
        "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Sqrt",
        # Statistics of a whole channel.
        "BatchNormalization", "InstanceNormalization", "MeanVarianceNormalization",
        # Coordinates, scores and spectra.
        "AffineGrid", "DFT", "GridSample", "MaxRoiPool", "MelWeightMatrix", "NonMaxSuppression",
        "Range", "Resize", "RoiAlign", "STFT",
        # Made in the type that an attribute names.
        "BlackmanWindow", "ConstantOfShape", "EyeLike", "HammingWindow", "HannWindow",
        "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
        "RandomUniformLike",
    }
)  # fmt: skip
"""Operators that stay float32."""

MOVES = frozenset(
    {
        "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad",
        "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that compute nothing: between float32 neighbours they stay float32."""


@dataclass(frozen=True)
class ConvertFloat(Pass):
    """Convert weights and operators to half precision, with Casts only at the borders.

    Each operator is float32 or half as a whole; a value is cast once for all its readers on the
    other side. What an operator takes in half precision is what ONNX's own schema says.

    Left float32: the operators of `KEPT`; those of other domains and with bodies; and those that
    read a constant beyond the range of the type (named in the notes).
    """

    name: ClassVar[str] = "convert-float"
    preserves: ClassVar[Preserves] = "lossy"

    dtype: str = option("float16", "The type to compute in", choices=tuple(HALF))
    keep_io: bool = option(True, "Whether the model's inputs and outputs stay float32")
    keep: tuple[str, ...] = option((), "More operators that stay float32")
    exclude: tuple[str, ...] = option((), "Names of nodes to leave alone; * and ? as in a shell")

    def run(self, model: ir.Model) -> bool:
        graph = model.graph
        halved: dict[ir.Node, _Types] = {}
        fits: dict[ir.Value, bool] = {}
        for node in graph:
            types = self._convertible(node)
            if types is None or not types.any_float(node):
                continue
            if node.op_type in MOVES and self._stays_float(node, halved):
                continue
            if all(self._fits(node, value, fits) for value in types.constants(node)):
                halved[node] = types
        if not halved:
            return False
        _Converter(graph, HALF[self.dtype], self.keep_io, halved).convert()
        return True

    def _convertible(self, node: ir.Node) -> _Types | None:
        if node.domain != "" or node.op_type in KEPT or node.op_type in self.keep:
            return None
        if any(fnmatchcase(node.name or "", pattern) for pattern in self.exclude):
            return None
        if any(isinstance(a, ir.Attr) and a.type in _BODIES for a in node.attributes.values()):
            return None
        if node.op_type == "Cast":
            source = node.inputs[0]
            floating = source is None or source.dtype is None or source.dtype.is_floating_point()
            return None if floating or attribute(node, "to") != FLOAT else _Types((), (0,))
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not self._scale_fits(node):
            return None
        return _types(node, HALF[self.dtype])

    def _scale_fits(self, node: ir.Node) -> bool:
        """Whether a scale keeps its precision: a normal number of 11 bits."""
        if sketching():
            return self.dtype == "float16"
        scale = weight(node.inputs[1])
        return self.dtype == "float16" and scale is not None and bool((scale >= 2.0**-14).all())

    def _stays_float(self, node: ir.Node, halved: dict[ir.Node, _Types]) -> bool:
        """Whether an operator that computes nothing follows one that stays float32."""
        source = node.inputs[0]
        maker = source.producer() if source is not None else None
        return maker is not None and maker not in halved and source.dtype == FLOAT  # type: ignore[union-attr]  # made, so not None

    def _fits(self, node: ir.Node, value: ir.Value, known: dict[ir.Value, bool]) -> bool:
        """Whether every finite value of a constant is finite in the half type."""
        if sketching():
            return True
        if value not in known:
            array = weight(value)
            assert array is not None
            largest = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
            limit = 65504.0 if self.dtype == "float16" else 3.38e38
            known[value] = largest <= limit
            if not known[value]:
                decline(value, f"holds {largest:g}, beyond {self.dtype}; its readers stay float32")
        return known[value]


_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclass(frozen=True)
class _Types:
    """Positions of an operator's inputs and outputs that take half precision together."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def floats(self, node: ir.Node) -> list[tuple[int, ir.Value]]:
        pairs = [(i, node.inputs[i]) for i in self.inputs]
        return [(i, value) for i, value in pairs if value is not None and value.dtype == FLOAT]

    def any_float(self, node: ir.Node) -> bool:
        made = any(node.outputs[i].dtype == FLOAT for i in self.outputs)
        return bool(self.floats(node)) or (made and not self.inputs)

    def constants(self, node: ir.Node) -> list[ir.Value]:
        return [value for _, value in self.floats(node) if is_constant(value)]


def _types(node: ir.Node, half: ir.DataType) -> _Types | None:
    """Which inputs and outputs may be half, by the operator's schema; None if none may."""
    import onnx.defs

    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    except onnx.defs.SchemaError:
        return None
    wanted = f"tensor({half.name.lower()})"
    open_to = {c.type_param_str for c in schema.type_constraints if wanted in c.allowed_type_strs}
    inputs = [i for i in range(len(node.inputs)) if _formal(schema.inputs, i) in open_to]
    outputs = [i for i in range(len(node.outputs)) if _formal(schema.outputs, i) in open_to]
    for i, value in enumerate(node.inputs):
        if value is not None and not isinstance(value.type, ir.TensorType):
            return None
        # A float32 input whose type is bound elsewhere to a type without half would disagree.
        if value is not None and value.dtype is None and i in inputs:
            return None
    if not inputs and not outputs:
        return None
    return _Types(tuple(inputs), tuple(outputs))


def _formal(parameters: Any, index: int) -> str:
    """The type variable of a parameter; the last one may be variadic."""
    return str(parameters[min(index, len(parameters) - 1)].type_str) if len(parameters) else ""


@dataclass
class _Converter:
    """Carries out the conversion of the chosen nodes."""

    graph: ir.Graph
    half: ir.DataType
    keep_io: bool
    halved: dict[ir.Node, _Types]

    def convert(self) -> None:
        constants: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
        values: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
        for node, types in self.halved.items():
            for index, value in types.floats(node):
                (constants if is_constant(value) else values).setdefault(value, []).append(
                    (node, index)
                )
        made = {
            node.outputs[i]: node
            for node, types in self.halved.items()
            for i in types.outputs
            if node.outputs[i].dtype == FLOAT
        }
        for value, uses in constants.items():
            self._convert_constant(value, uses)
        for value, uses in values.items():
            if value not in made and not self._retype_input(value, uses):
                self._cast(value, uses, self.half)
        for value in made:
            inside = set(values.get(value, ()))
            uses = [(node, index) for node, index in value.uses()]
            outside = [use for use in uses if use not in inside]
            value.type = ir.TensorType(self.half)
            if outside or (value.is_graph_output() and self.keep_io):
                self._cast(value, outside, FLOAT)
        for node in self.halved:
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", int(self.half))

    def _convert_constant(self, value: ir.Value, uses: list[tuple[ir.Node, int]]) -> None:
        tensor = ir.convenience.get_const_tensor(value)
        assert tensor is not None
        dtype = self.half.numpy()
        halved = changed(tensor, lambda array: array.astype(dtype), self.half)
        new = initializer(self.graph, halved, f"{value.name}_{self.half.name.lower()}")
        for node, index in uses:
            node.replace_input_with(index, new)
        if unread(value) and value.is_initializer():
            self.graph.initializers.pop(value.name or "")

    def _retype_input(self, value: ir.Value, uses: list[tuple[ir.Node, int]]) -> bool:
        """Make an input of the model half itself, if that is wanted and nothing else reads it."""
        if self.keep_io or not value.is_graph_input() or len(value.uses()) != len(uses):
            return False
        value.type = ir.TensorType(self.half)
        return True

    def _cast(self, value: ir.Value, uses: list[tuple[ir.Node, int]], to: ir.DataType) -> None:
        name = value.name or "value"
        cast = ir.node("Cast", [value], {"to": int(to)}, name=f"{name}_to_{to.name.lower()}")
        result = cast.outputs[0]
        result.shape, result.type = value.shape, ir.TensorType(to)
        maker = value.producer()
        if maker is not None:
            graph_of(maker).insert_after(maker, [cast])
        else:
            self.graph.insert_before(self.graph[0], [cast])
        for node, index in uses:
            node.replace_input_with(index, result)
        if to == FLOAT and value.is_graph_output() and self.keep_io:
            for index, output in enumerate(self.graph.outputs):
                if output is value:
                    self.graph.outputs[index] = result
            value.name = f"{name}_{self.half.name.lower()}"
            result.name = name
        else:
            result.name = f"{name}_{to.name.lower()}"
