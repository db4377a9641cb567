"""Fold an activation into the Conv before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    decline,
    is_op,
    producer,
    read_once,
    scalar,
    splice,
)
from trivium.compiler.types import Preserves

DOMAIN = "com.microsoft"

_DEFAULTS: dict[str, dict[str, float]] = {
    "Relu": {},
    "Sigmoid": {},
    "Tanh": {},
    "LeakyRelu": {"alpha": 0.01},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "Clip": {},
}
"""Activations that FusedConv takes, and the attributes that become its ``activation_params``."""


@dataclass(frozen=True)
class FuseActivation(NodePass):
    """Rewrite an activation of a float32 Conv to ``com.microsoft::FusedConv``.

    In no recipe: ONNX Runtime does the same to every Conv when it loads a model, XLA and TensorRT
    fuse by themselves, and normal form keeps the two apart. It is for graphs that leave Trivium
    for an engine that reads FusedConv and does not fuse.

    Left alone: a Conv that something else reads, a Clip whose bounds are not constant, and types
    other than float32, for which there is no such operator.
    """

    name: ClassVar[str] = "fuse-activation"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, *_DEFAULTS):
            return False
        conv = producer(node.inputs[0], "Conv")
        if conv is None or conv.graph is not node.graph:
            return False
        if conv.outputs[0].dtype != ir.DataType.FLOAT:
            return decline(conv.outputs[0], "FusedConv computes in float32 only")
        if not read_once(conv.outputs[0]):
            return decline(conv.outputs[0], "something else reads the convolution")
        params = _parameters(node)
        if params is None:
            return decline(node, "its bounds are not constant")
        fused = ir.Node(
            DOMAIN,
            "FusedConv",
            conv.inputs,
            [*conv.attributes.values(), *_activation(node.op_type, params)],
            name=node.name,
        )
        splice([node, conv], fused)
        return True

    def run(self, model: ir.Model) -> bool:
        modified = super().run(model)
        if modified:
            model.graph.opset_imports.setdefault(DOMAIN, 1)
        return modified


def _activation(name: str, params: list[float]) -> list[ir.Attr]:
    found = [ir.AttrString("activation", name)]
    return [*found, ir.AttrFloat32s("activation_params", params)] if params else found


def _parameters(node: ir.Node) -> list[float] | None:
    """``activation_params`` of an activation, or None if they are not constant."""
    if node.op_type != "Clip":
        defaults = _DEFAULTS[node.op_type]
        return [float(attribute(node, key, default)) for key, default in defaults.items()]
    bounds = []
    for index, unbounded in ((1, -3.4028234663852886e38), (2, 3.4028234663852886e38)):
        value = node.inputs[index] if index < len(node.inputs) else None
        bound = unbounded if value is None else scalar(value)
        if bound is None:
            return None
        bounds.append(bound)
    return bounds
