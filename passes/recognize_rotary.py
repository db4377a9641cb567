"""Put RotaryEmbedding back together that exporters took apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    constant,
    decline,
    dims,
    graph_of,
    initializer,
    is_op,
    producer,
    splice,
)
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class RecognizeRotary(NodePass):
    """Rewrite ``x * cos + rotate_half(x) * sin`` over heads to RotaryEmbedding.

    The angles must be seen to repeat in both halves of a head: the cosine and the sine of a
    concatenation of one thing with itself, (batch, 1, length, size) after an Unsqueeze at axis 1.

    Left alone: angles that cannot be seen to repeat, x of other than four axes, and angles whose
    batch is not known to be that of x, since RotaryEmbedding does not broadcast.
    """

    name: ClassVar[str] = "recognize-rotary"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "Add"):
            return False
        for index in (0, 1):
            straight = producer(node.inputs[index], "Mul")
            turned = producer(node.inputs[1 - index], "Mul")
            if straight is None or turned is None:
                continue
            for side in (0, 1):
                half = _rotated(turned.inputs[side])
                if half is None or half not in straight.inputs:
                    continue
                sine = turned.inputs[1 - side]
                cosine = straight.inputs[1 - list(straight.inputs).index(half)]
                return _fuse(node, half, cosine, sine)
        return False


def _rotated(value: ir.Value | None) -> ir.Value | None:
    """``x`` of ``concat(-x[..., half:], x[..., :half])``."""
    concat = producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2:
        return None
    negative = producer(concat.inputs[0], "Neg")
    upper = _half(negative.inputs[0], True) if negative is not None else None
    lower = _half(concat.inputs[1], False)
    known = dims(lower)
    if lower is None or lower is not upper or known is None:
        return None
    return lower if int(attribute(concat, "axis", -1)) in (-1, len(known) - 1) else None


def _half(value: ir.Value | None, upper: bool) -> ir.Value | None:
    """The source of a Slice that takes the upper or the lower half of the last axis."""
    cut = producer(value, "Slice")
    source = cut.inputs[0] if cut is not None else None
    known = dims(source)
    if cut is None or known is None or len(cut.inputs) < 4 or known[-1] is None or known[-1] % 2:
        return None
    start, end, axes = (constant(part) for part in cut.inputs[1:4])
    steps = constant(cut.inputs[4]) if len(cut.inputs) > 4 else np.ones(1)
    if start is None or end is None or axes is None or steps is None or axes.size != 1:
        return None
    size, middle = known[-1], known[-1] // 2
    if int(axes[0]) % len(known) != len(known) - 1 or int(steps[0]) != 1:
        return None
    taken = (int(start[0]), min(int(end[0]), size))
    return source if taken == ((middle, size) if upper else (0, middle)) else None


def _fuse(node: ir.Node, x: ir.Value, cosine: ir.Value | None, sine: ir.Value | None) -> bool:
    if len(dims(x) or ()) != 4 or x.shape is None:
        return decline(x, "not known to have four axes")
    caches: list[ir.Value] = []
    made: list[ir.Node] = []
    for value, op_type in ((cosine, "Cos"), (sine, "Sin")):
        angles = _angles(value, op_type)
        if value is None or angles is None:
            return decline(value or x, f"not seen to be the {op_type} of angles that repeat")
        batch, length = (angles.shape[0], angles.shape[1]) if angles.shape is not None else (0, 0)
        if batch != x.shape[0] or length != x.shape[2]:
            return decline(angles, f"angles of batch {batch}, length {length} for x of {x.shape}")
        cache = ir.node(op_type, [angles])
        made.append(cache)
        caches.append(cache.outputs[0])
        scale = _scale(value)
        if scale is not None:
            stored = initializer(graph_of(node), scale, f"{value.name}_scale")
            scaled = ir.node("Mul", [cache.outputs[0], stored])
            made.append(scaled)
            caches[-1] = scaled.outputs[0]
    rotary = ir.node("RotaryEmbedding", [x, *caches], {"interleaved": 0}, name=node.name)
    splice([node], [*made, rotary])
    return True


def _angles(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """``f`` of ``unsqueeze(cos(concat(f, f)), 1)``, a constant factor in between or not."""
    unsqueeze = producer(value, "Unsqueeze")
    axes = constant(unsqueeze.inputs[1]) if unsqueeze is not None else None
    if unsqueeze is None or axes is None or list(axes) not in ([1], [-3]):
        return None
    wave = _wave(unsqueeze.inputs[0])
    function = producer(wave, op_type)
    concat = producer(function.inputs[0], "Concat") if function is not None else None
    if concat is None or len(concat.inputs) != 2 or concat.inputs[0] is not concat.inputs[1]:
        return None
    known = dims(concat.inputs[0])
    if known is None or len(known) != 3 or int(attribute(concat, "axis", 0)) not in (-1, 2):
        return None
    return concat.inputs[0]


def _wave(value: ir.Value | None) -> ir.Value | None:
    """The Cos or Sin under a constant factor."""
    product = producer(value, "Mul")
    if product is None:
        return value
    number = next((i for i in (0, 1) if _number(product.inputs[i]) is not None), None)
    return product.inputs[1 - number] if number is not None else value


def _scale(value: ir.Value) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None:
    unsqueeze = producer(value, "Unsqueeze")
    product = producer(unsqueeze.inputs[0], "Mul") if unsqueeze is not None else None
    if product is None:
        return None
    return next((n for n in map(_number, product.inputs) if n is not None), None)


def _number(
    value: ir.Value | None,
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None:
    array = constant(value)
    return array if array is not None and array.size == 1 and array.ndim <= 1 else None
