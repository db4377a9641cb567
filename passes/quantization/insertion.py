"""The graph edits that turn a plan and the ranges found into Q/DQ nodes and stored integers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    attribute,
    decline,
    graph_of,
    initializer,
    is_constant,
    read_once,
    unread,
    weight,
)
from trivium.passes.quantization import linear
from trivium.passes.quantization.linear import Grid
from trivium.passes.quantization.placement import weight_axis
from trivium.passes.quantization.planning import Plan, Use

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Inserter:
    """Carries out a plan on a graph.

    Attributes:
        graph: The main graph.
        activations: Grid of the activations.
        symmetric: Whether they are symmetric.
        weights: Grid of the weight of a layer.
        per_channel: Whether each output channel of a weight has a scale of its own.
        means: Of each channel of a layer's input: its bias makes up for what they lose.
    """

    graph: ir.Graph
    activations: Grid
    symmetric: bool
    weights: Callable[[ir.Node], Grid]
    per_channel: bool
    means: Mapping[ir.Node, Array] = field(default_factory=dict)
    _scales: dict[ir.Value, Array] = field(default_factory=dict)
    _stored: dict[tuple[ir.Value, int | None, Grid], tuple[ir.Value, Array]] = field(
        default_factory=dict
    )
    _taken: set[str] = field(default_factory=set)

    def insert(self, plan: Plan, ranges: Mapping[ir.Value, tuple[float, float]]) -> None:
        """Quantize what a plan names.

        Args:
            plan: What to quantize.
            ranges: Range of every root of ``plan.tensors``.
        """
        self._taken = {v.name or "" for node in self.graph for v in node.outputs}
        self._taken |= {value.name or "" for value in self.graph.inputs}
        parameters: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        sources: dict[Use, Array] = {}
        replaced = [value for use in (*plan.weights, *plan.constants, *plan.biases)
                    if (value := _input(use)) is not None]  # fmt: skip
        for value, readers in plan.tensors.items():
            root = plan.root(value)
            if root not in ranges:
                continue
            if root not in parameters:
                parameters[root] = self._parameters(root, ranges[root])
            for use in value.uses() if readers is None else readers:
                sources[use] = self._scales[root]
            self._quantize_activation(value, readers, *parameters[root])
        for use in plan.constants:
            sources[use] = self._quantize_constant(use)
        biases = dict(plan.biases)
        for node, position in plan.weights:
            bias_at = biases.get(node)
            self._quantize_weight(node, position, sources.get((node, 0)), bias_at)
        for value in dict.fromkeys(replaced):
            if unread(value) and value.is_initializer():
                self.graph.initializers.pop(value.name or "")

    def _parameters(self, root: ir.Value, span: tuple[float, float]) -> tuple[ir.Value, ir.Value]:
        low, high = np.asarray(span[0]), np.asarray(span[1])
        scale, zero = linear.fit(low, high, self.activations, symmetric=self.symmetric)
        self._scales[root] = scale
        return self._store_parameters(root.name or "", scale, zero, self.activations)

    def _store_parameters(
        self, name: str, scale: Array, zero: Array, grid: Grid
    ) -> tuple[ir.Value, ir.Value]:
        codes = zero.astype(grid.stored)
        return (
            initializer(self.graph, scale, f"{name}_scale"),
            initializer(self.graph, codes, f"{name}_zero_point"),
        )

    def _quantize_activation(
        self, value: ir.Value, readers: Iterable[Use] | None, scale: ir.Value, zero: ir.Value
    ) -> None:
        uses = list(value.uses()) if readers is None else list(readers)
        name = value.name or "value"
        quantize = ir.node("QuantizeLinear", [value, scale, zero], name=self._name(f"{name}_q"))
        codes = quantize.outputs[0]
        codes.name = self._name(f"{name}_quantized")
        codes.shape, codes.type = value.shape, ir.TensorType(zero.dtype)  # type: ignore[arg-type]  # an initializer has a dtype
        restore = ir.node("DequantizeLinear", [codes, scale, zero], name=self._name(f"{name}_dq"))
        result = restore.outputs[0]
        result.shape, result.type = value.shape, value.type
        maker = value.producer()
        if maker is not None:
            graph_of(maker).insert_after(maker, [quantize, restore])
        else:
            self.graph.insert_before(self.graph[0], [quantize, restore])
        for node, index in uses:
            node.replace_input_with(index, result)
        if readers is None and value.is_graph_output():
            for index, output in enumerate(self.graph.outputs):
                if output is value:
                    self.graph.outputs[index] = result
            value.name = self._name(f"{name}_float")
            result.name = name
        else:
            result.name = self._name(f"{name}_dequantized")

    def _quantize_constant(self, use: Use) -> Array:
        """Store a constant operand on the activations' grid; return its scale."""
        value = _input(use)
        key = (value, -1, self.activations)
        if key not in self._stored:
            array = _array(value)
            scale, zero = linear.fit(
                *linear.extremes(array, None), self.activations, symmetric=self.symmetric
            )
            codes = linear.quantize(array, scale, zero, self.activations)
            result = self._dequantized(value, codes, scale, zero, self.activations, None, use[0])
            self._stored[key] = result, scale
        result, scale = self._stored[key]
        use[0].replace_input_with(use[1], result)
        return scale

    def _quantize_weight(
        self, node: ir.Node, position: int, source: Array | None, bias_at: int | None
    ) -> None:
        """Store a weight, and the node's bias if the scale of its activation is known."""
        value = _input((node, position))
        array = _array(value)
        axis = weight_axis(node, array.ndim) if self.per_channel else None
        bias = None
        if bias_at is not None and source is not None:
            bias = _array(_input((node, bias_at))).reshape(-1)
        grid = self.weights(node)
        key = (value, axis, grid)
        if key not in self._stored:
            scale = self._weight_scale(array, axis, grid, source, bias)
            zero = np.zeros(scale.shape, np.int64)
            codes = linear.quantize(array, linear.along(scale, axis, array.ndim), 0, grid)
            self._stored[key] = (
                self._dequantized(value, codes, scale, zero, grid, axis, node),
                scale,
            )
        result, scale = self._stored[key]
        node.replace_input_with(position, result)
        if node in self.means:
            factor = linear.along(scale, axis, array.ndim)
            off = linear.dequantize(linear.quantize(array, factor, 0, grid), factor, 0) - array
            bias = self._corrected(node, bias, off)
        if bias is not None and source is not None and bias_at is not None:
            self._quantize_bias(node, bias_at, bias, source * scale)

    def _corrected(self, node: ir.Node, bias: Array | None, off: Array) -> Array | None:
        """Take the mean of what a weight's error adds to the outputs off the bias."""
        mean = self.means[node].astype(np.float32)
        if node.op_type == "Conv":
            groups = int(attribute(node, "group", 1))
            each = off.reshape(groups, len(off) // groups, off.shape[1], -1).sum(axis=-1)
            shift = np.einsum("goc,gc->go", each, mean.reshape(groups, -1)).reshape(-1)
        else:
            shift = off @ mean if attribute(node, "transB", 0) else mean @ off
        if bias is not None:
            return np.asarray(bias - shift)
        use = bias_use(node)
        stored = _input(use) if use is not None else None
        if stored is None or (array := weight(stored)) is None or array.shape != shift.shape:
            return None
        made = initializer(self.graph, array - shift, f"{stored.name}_corrected")
        assert use is not None
        use[0].replace_input_with(use[1], made)
        if unread(stored) and stored.is_initializer():
            self.graph.initializers.pop(stored.name or "")
        return None

    def _weight_scale(
        self,
        array: Array,
        axis: int | None,
        grid: Grid,
        source: Array | None,
        bias: Array | None,
    ) -> Array:
        low, high = linear.extremes(array, axis)
        scale, _ = linear.fit(low, high, grid, symmetric=True)
        empty = (low == 0) & (high == 0)
        # A channel of zeros takes the scale of the largest: its bias still needs a fine grid.
        scale = np.where(empty, scale[~empty].max(initial=0.0) or np.float32(1.0), scale)
        if bias is not None and source is not None and scale.size and bias.size % scale.size == 0:
            # The bias has to fit int32 at the product's scale; a nearly dead channel yields.
            reach = np.abs(bias).reshape(-1, scale.size).max(axis=0).reshape(scale.shape)
            scale = np.maximum(scale, reach / (source * np.float32(2**30)))
        return scale.astype(np.float32)

    def _quantize_bias(self, node: ir.Node, position: int, bias: Array, scale: Array) -> None:
        if scale.size > 1 and bias.size % scale.size == 0:
            scale = np.tile(scale, bias.size // scale.size)  # grouped ConvTranspose
        codes = np.rint(bias.astype(np.float64) / scale)
        if np.abs(codes).max(initial=0) > 2**31 - 1:
            decline(node, f"its bias of {np.abs(bias).max():g} exceeds int32 at its scale")
            return
        value = _input((node, position))
        name = value.name or "bias"
        # Named by the node: the same bias behind another scale has other codes.
        stored = initializer(self.graph, codes.astype(np.int32), f"{name}_quantized")
        factor = initializer(self.graph, scale.astype(np.float32), f"{name}_scale")
        zero = initializer(self.graph, np.zeros(scale.shape, np.int32), f"{name}_zero_point")
        restore = ir.node(
            "DequantizeLinear",
            [stored, factor, zero],
            {"axis": 0} if scale.ndim else None,
            name=self._name(f"{name}_dq"),
        )
        result = restore.outputs[0]
        result.name = self._name(f"{name}_dequantized")
        result.shape, result.type = ir.Shape(bias.shape), ir.TensorType(ir.DataType.FLOAT)
        graph_of(node).insert_before(node, [restore])
        node.replace_input_with(position, result)

    def _dequantized(
        self,
        value: ir.Value,
        codes: Array | ir.TensorProtocol,
        scale: Array,
        zero: Array,
        grid: Grid,
        axis: int | None,
        before: ir.Node,
    ) -> ir.Value:
        name = value.name or "constant"
        stored = initializer(self.graph, codes, f"{name}_quantized")
        factor, offset = self._store_parameters(name, scale, zero, grid)
        restore = ir.node(
            "DequantizeLinear",
            [stored, factor, offset],
            {"axis": axis} if axis is not None else None,
            name=self._name(f"{name}_dq"),
        )
        result = restore.outputs[0]
        result.name = self._name(f"{name}_dequantized")
        result.shape, result.type = stored.shape, ir.TensorType(ir.DataType.FLOAT)
        graph_of(before).insert_before(before, [restore])
        return result

    def _name(self, wanted: str) -> str:
        name, index = wanted, 1
        while name in self._taken:
            name, index = f"{wanted}_{index}", index + 1
        self._taken.add(name)
        return name


def bias_use(node: ir.Node) -> Use | None:
    """The input that holds the bias of a product: its own, or that of the sum behind a MatMul."""
    if node.op_type != "MatMul":
        return (node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if not read_once(node.outputs[0]):
        return None
    reader, index = next(iter(node.outputs[0].uses()))
    if reader.op_type != "Add" or reader.domain or not is_constant(reader.inputs[1 - index]):
        return None
    return reader, 1 - index


def _input(use: Use) -> ir.Value:
    value = use[0].inputs[use[1]]
    assert value is not None
    return value


def _array(value: ir.Value) -> Array:
    array = weight(value)
    assert array is not None
    return array
