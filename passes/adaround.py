"""AdaRound: learn for each weight whether to round it up or down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.compiler.passing import (
    Pass,
    attribute,
    decline,
    from_context,
    initializer,
    is_constant,
    is_op,
    option,
    weight,
)
from trivium.compiler.types import Preserves
from trivium.passes.quantization import layers, linear
from trivium.passes.quantization.moments import Moment
from trivium.passes.quantization.placement import weight_axis
from trivium.passes.quantization.walk import Walk

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

Array = np.ndarray[Any, np.dtype[Any]]

_ON_GRID = 1e-3
"""Of a step: weights nearer to the grid than this need no rounding."""

_STRETCH = 0.1
"""How far the sigmoid reaches past 0 and 1, so that it gets there (the paper's zeta and gamma)."""


@dataclass(frozen=True)
class AdaRound(Pass):
    """Move each weight to the grid point above or below it, whichever keeps the layer's outputs.

    Nagel et al., 2020: the squared error of the outputs on calibration data, of which the second
    moment of the inputs is all that is needed, is lowered by gradient descent over how far each
    weight is rounded up, while a penalty drives that to 0 or 1. A layer that gains nothing is
    rounded to the nearest.

    The weights stay float, on a grid with one scale for each output channel: put it before
    quantize-static with as many ``weight_bits``, which then stores them as they are.

    Left alone: weights with NaN, shared by several layers, or on such a grid already.
    """

    name: ClassVar[str] = "adaround"
    preserves: ClassVar[Preserves] = "lossy"

    bits: int = option(4, "Bits of a weight", choices=(2, 3, 4, 5, 6, 7, 8))
    steps: int = option(400, "Steps of gradient descent for each layer")
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)

    calibration: Iterable[Tensors] | None = from_context("calibration")

    def run(self, model: ir.Model) -> bool:
        layers.note_unmatched(model, self.exclude)
        found = [node for node in model.graph if self._fits(node)]
        if not found:
            return False
        if self.calibration is None:
            raise BadInput(
                "learnt rounding needs representative inputs",
                about=self.name,
                remedy="give them with --calib",
            )
        modified = False
        walk = Walk(model, self.calibration, [_input(node) for node in found], cuts=set(found))
        for segment in walk:
            for node in (one for one in segment.nodes if one in set(found)):
                moment = Moment()
                for (array,) in walk.run(segment, [_input(node)], keep=False):
                    moment.update(node, array)
                if moment.total is None or moment.spoiled:
                    decline(node, "its input is unknown or NaN on the calibration data")
                    continue
                modified |= self._round(model.graph, node, moment.total)
        return modified

    def _fits(self, node: ir.Node) -> bool:
        if not is_op(node, "Conv", "Gemm", "MatMul") or not is_constant(node.inputs[1]):
            return False
        value = node.inputs[1]
        if value is None or value.dtype != ir.DataType.FLOAT or _input(node) is None:
            return False
        if layers.excluded(node, self.exclude) or (
            node.op_type == "MatMul" and len(value.shape or ()) != 2
        ):
            return False
        if len(value.uses()) > 1 or value.is_graph_output():
            return decline(value, "several layers share it")
        return True

    def _round(self, graph: ir.Graph, node: ir.Node, moment: Array) -> bool:
        value = node.inputs[1]
        array = weight(value)
        assert array is not None
        assert value is not None
        if not np.isfinite(array).all():
            return decline(value, "holds NaN or infinity")
        grid = linear.grid("int8", self.bits)
        axis = weight_axis(node, array.ndim)
        scale, _ = linear.fit(*linear.extremes(array, axis), grid, symmetric=True)
        steps = array / linear.along(scale, axis, array.ndim)
        if np.abs(steps - np.rint(steps)).max(initial=0.0) < _ON_GRID:
            return False
        turned = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not attribute(node, "transB", 0)
        )
        rows = steps.T if turned else steps.reshape(len(steps), -1)
        groups = len(moment)
        split = rows.reshape(groups, len(rows) // groups, -1)
        wide = scale.reshape(groups, -1, 1)
        rounded = np.clip(learnt(split, wide, moment, self.steps), grid.low, grid.high)
        flat = (rounded * wide).reshape(rows.shape)
        made = (flat.T if turned else flat.reshape(array.shape)).astype(np.float32)
        stored = initializer(graph, np.ascontiguousarray(made), f"{value.name}_rounded")
        node.replace_input_with(1, stored)
        graph.initializers.pop(value.name or "")
        return True


def learnt(steps: Array, scale: Array, moment: Array, count: int) -> Array:
    """Return integers next to ``steps`` that keep the outputs best.

    Args:
        steps: [groups, channels, K], the weights in steps of their grid.
        scale: [groups, channels, 1].
        moment: [groups, K, K], of the inputs.
        count: Steps of Adam.
    """
    moment = moment / max(float(np.einsum("gii->gi", moment).mean()), 1e-30)
    whole = np.square(scale).mean()
    weights = (np.square(scale) / max(float(whole), 1e-30)).astype(np.float32)

    def error(off: Array) -> float:
        return float((weights * off * np.matmul(off, moment)).sum())

    floor = np.floor(steps)
    share = np.clip(steps - floor, 1e-3, 1 - 1e-3)
    # The inverse of the stretched sigmoid: the descent begins at the weights themselves.
    inner = (share + _STRETCH) / (1 + 2 * _STRETCH)
    position = np.log(inner / (1 - inner)).astype(np.float32)
    first, second = np.zeros_like(position), np.zeros_like(position)
    for step in range(1, count + 1):
        soft = 1 / (1 + np.exp(-position))
        up = np.clip(soft * (1 + 2 * _STRETCH) - _STRETCH, 0, 1)
        slope = np.where((up > 0) & (up < 1), soft * (1 - soft) * (1 + 2 * _STRETCH), 0)
        gradient = 2 * weights * np.matmul(floor + up - steps, moment)
        # The penalty sets in after a fifth, and sharpens from 20 to 2.
        done = step / count
        if done > 0.2:
            power = 2 + 18 * (1 - (done - 0.2) / 0.8)
            middle = 2 * up - 1
            gradient -= 0.05 * 2 * power * np.sign(middle) * np.abs(middle) ** (power - 1)
        gradient *= slope
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * np.square(gradient)
        rate = 0.05 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        position -= (rate * first / (np.sqrt(second) + 1e-8)).astype(np.float32)
    learned = floor + (position > 0)
    nearest = np.rint(steps)
    better = error(learned - steps) < error(nearest - steps)
    return np.asarray(learned if better else nearest)


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
