"""Fold a Pad with zeros into the Conv after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    constant,
    decline,
    dims,
    graph_of,
    is_op,
    producer,
    unread,
)
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class FoldPad(NodePass):
    """Rewrite ``Conv(Pad(x))`` to ``Conv(x)`` with larger pads.

    Left alone: other modes and values than zeros, pads of batch or channels, pads that crop, and
    convolutions with an ``auto_pad``.
    """

    name: ClassVar[str] = "fold-pad"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        pad = producer(node.inputs[0], "Pad") if is_op(node, "Conv") and node.inputs else None
        if pad is None or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
            return False
        if attribute(pad, "mode", "constant") != "constant":
            return decline(pad, f"it pads by {attribute(pad, 'mode')}, not with zeros")
        weight = dims(node.inputs[1])
        pads = _pads(pad, len(weight)) if weight is not None else None
        if weight is None or pads is None:
            return False
        rank = len(weight)
        if any(pads[axis] or pads[rank + axis] for axis in (0, 1)) or min(pads) < 0:
            return decline(pad, f"pads {pads} are not all around the image")
        own = list(attribute(node, "pads", [0] * (2 * rank - 4)))
        wide = [*pads[2:rank], *pads[rank + 2 :]]
        total = [a + b for a, b in zip(own, wide, strict=True)]
        node.attributes["pads"] = ir.AttrInt64s("pads", total)
        node.replace_input_with(0, pad.inputs[0])
        if all(unread(value) for value in pad.outputs):
            graph_of(pad).remove(pad, safe=True)
        return True


def _pads(pad: ir.Node, rank: int) -> list[int] | None:
    """The pads of every axis, or None if they are not known or not of zeros."""
    given = constant(pad.inputs[1]) if len(pad.inputs) > 1 else None
    if given is None:
        return None
    if len(pad.inputs) > 2 and pad.inputs[2] is not None:
        value = constant(pad.inputs[2])
        if value is None or value.any():
            return None
    sizes = [int(size) for size in given]
    if len(pad.inputs) < 4 or pad.inputs[3] is None:
        return sizes if len(sizes) == 2 * rank else None
    axes = constant(pad.inputs[3])
    if axes is None:
        return None
    full = [0] * (2 * rank)
    for index, axis in enumerate(int(axis) % rank for axis in axes):
        full[axis], full[rank + axis] = sizes[index], sizes[len(axes) + index]
    return full
