"""From a graph and a placement to the list of what is to be quantized; nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    attribute,
    constant,
    decline,
    is_constant,
    is_op,
    producer,
    read_once,
    scalar,
    sketching,
    weight,
)
from trivium.passes.quantization.placement import Placement, Rule, too_small

Use = tuple[ir.Node, int]


@dataclass
class Plan:
    """What is to be quantized.

    Attributes:
        tensors: Activation -> the inputs that read it quantized; None = whatever reads it.
        weights: Inputs that hold constants to be quantized per channel.
        constants: Inputs that hold constants to be quantized like activations.
        biases: Inputs that hold biases.
        shared: Activation -> another one whose scale and zero point it has too.
        derived: Activations whose range follows from the one they share.
    """

    tensors: dict[ir.Value, set[Use] | None] = field(default_factory=dict)
    weights: list[Use] = field(default_factory=list)
    constants: list[Use] = field(default_factory=list)
    biases: list[Use] = field(default_factory=list)
    shared: dict[ir.Value, ir.Value] = field(default_factory=dict)
    derived: set[ir.Value] = field(default_factory=set)

    def root(self, value: ir.Value) -> ir.Value:
        """The activation that stands for all that share its parameters."""
        while value in self.shared:
            value = self.shared[value]
        return value

    def tie(self, one: ir.Value, other: ir.Value) -> None:
        """Let two activations share scale and zero point."""
        one, other = self.root(one), self.root(other)
        if one is not other:
            self.shared[other] = one

    def read_by(self, value: ir.Value, use: Use | None) -> None:
        """Let one input (or, with None, whatever reads it) read an activation quantized."""
        if use is None:
            self.tensors[value] = None
            return
        readers = self.tensors.setdefault(value, set())
        if readers is not None:
            readers.add(use)


def plan(graph: ir.Graph, placement: Placement, chosen: Callable[[ir.Node], bool]) -> Plan:
    """Decide what is quantized in a graph.

    Args:
        graph: The main graph of a model in normal form; subgraphs are left alone.
        placement: Where the engine wants Q/DQ.
        chosen: Whether the user wants a node quantized.
    """
    made = Plan()
    for node in graph:
        if node.domain != "" or not chosen(node):
            continue
        if node.op_type in placement.moves:
            _follow_move(made, node)
        elif (rule := placement.rules.get(node.op_type)) is not None:
            _apply_rule(made, node, rule, placement)
        elif node.op_type in placement.residual:
            _quantize_residual(made, node)
    if placement.all_readers:
        for node in reversed(graph):
            if node.domain == "" and node.op_type in placement.moves and chosen(node):
                _precede_move(made, node)
    return made


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _apply_rule(made: Plan, node: ir.Node, rule: Rule, placement: Placement) -> None:
    positions = range(len(node.inputs)) if rule.inputs is None else rule.inputs
    operands = [(i, node.inputs[i]) for i in positions if i < len(node.inputs)]
    if rule.weight is not None and rule.weight not in positions:
        operands.append((rule.weight, node.inputs[rule.weight]))
    if not all(_is_float(value) for _, value in operands):
        return
    if any(producer(value, "DequantizeLinear") is not None for _, value in operands):
        return
    weight_at = rule.weight
    if weight_at is not None and not is_constant(node.inputs[weight_at]):
        if weight_at not in positions:
            decline(node, "its weight is computed, not stored")
            return
        weight_at = None
    others = [(i, value) for i, value in operands if i != weight_at]
    constants = [i for i, value in others if is_constant(value)]
    activations = [i for i, value in others if not is_constant(value)]
    if not activations:
        return
    if rule.when == "joins" and not all(node.inputs[i] in made.tensors for i in activations):
        return
    kernel = node.inputs[weight_at] if weight_at is not None else None
    if placement.limits is not None and (reason := too_small(node, kernel, placement.limits)):
        decline(node, f"too small to gain from integers ({reason})")
        return
    if problem := _unfit(node, constants if weight_at is None else [*constants, weight_at]):
        decline(node, problem)
        return
    for i in activations:
        value = node.inputs[i]
        assert value is not None
        made.read_by(value, None if placement.all_readers else (node, i))
    made.constants += [(node, i) for i in constants]
    if weight_at is not None:
        made.weights.append((node, weight_at))
    if rule.bias is not None and placement.integer_bias and weight_at is not None:
        _plan_bias(made, node, rule.bias)
    if rule.output:
        output = fused_output(node, placement)
        made.read_by(output, None)
        if node.op_type in placement.tied:
            for i in activations:
                value = node.inputs[i]
                assert value is not None
                made.tie(output, value)


def _unfit(node: ir.Node, positions: list[int]) -> str | None:
    """Why the constants of a node cannot be quantized, naming the guilty value."""
    if node.op_type == "Gemm":
        for name in ("alpha", "beta"):
            factor = attribute(node, name, 1.0)
            if factor != 1.0:
                return f"{name} is {factor:g}, and integer products have no factor"
    for value in (node.inputs[i] for i in positions):
        # A sketch takes it that what is large holds numbers.
        array = constant(value) if sketching() else weight(value)
        if array is None:
            continue
        assert value is not None
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            return f"{bad} of {array.size} values of {value.name!r} are NaN or infinite"
        if array.size == 0:
            return f"{value.name!r} is empty"
    return None


def _plan_bias(made: Plan, node: ir.Node, position: int) -> None:
    bias = node.inputs[position] if position < len(node.inputs) else None
    if bias is None:
        return
    array = weight(bias)
    if array is None:
        decline(node, f"its bias {bias.name!r} is computed, so it stays float")
    elif array.ndim == 0 or array.shape[-1] != array.size or not np.isfinite(array).all():
        decline(node, f"its bias {bias.name!r} of shape {list(array.shape)} stays float")
    else:
        made.biases.append((node, position))


def fused_output(node: ir.Node, placement: Placement) -> ir.Value:
    """What a node gives after the activation function that folds into it, if one follows."""
    output = node.outputs[0]
    if node.op_type in placement.fused or not read_once(output):
        return output
    reader, index = next(iter(output.uses()))
    if index == 0 and is_op(reader, *placement.fused) and _constant_bounds(reader):
        return reader.outputs[0]
    return output


def _constant_bounds(node: ir.Node) -> bool:
    return all(bound is None or scalar(bound) is not None for bound in node.inputs[1:])


def _follow_move(made: Plan, node: ir.Node) -> None:
    """Behind an operator that moves values, the tensor is as quantized as before it."""
    source = node.inputs[0]
    if source is None or made.tensors.get(source, ()) is not None or not _pads_zero(node):
        return
    output = node.outputs[0]
    if not _is_float(output):
        return
    made.read_by(output, None)
    made.tie(source, output)
    made.derived.add(output)


def _precede_move(made: Plan, node: ir.Node) -> None:
    """Before one, if it alone reads its input: the first Q goes as far up as it can."""
    source, output = node.inputs[0], node.outputs[0]
    if source is None or is_constant(source) or not _is_float(source) or not _pads_zero(node):
        return
    if output not in made.tensors or source in made.tensors or len(source.uses()) != 1:
        return
    if producer(source, "DequantizeLinear") is not None:
        return
    made.read_by(source, None)
    made.tie(source, output)
    made.derived.add(output)


def _pads_zero(node: ir.Node) -> bool:
    """Whether a node brings in no value but zero, which every grid has."""
    if node.op_type != "Pad":
        return True
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return attribute(node, "mode", "constant") != "constant" or value is None or scalar(value) == 0


def _quantize_residual(made: Plan, node: ir.Node) -> None:
    """Of a sum, leave alone the first branch that a quantized convolution makes for it only."""
    convolved = {one for one, _ in made.weights if is_op(one, "Conv", "ConvTranspose")}
    for position, value in enumerate(node.inputs):
        if value is not None and read_once(value) and value.producer() in convolved:
            for i, other in enumerate(node.inputs):
                if i != position and _is_float(other) and not is_constant(other):
                    assert other is not None
                    made.read_by(other, (node, i))
            return
