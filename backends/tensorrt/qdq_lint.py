"""Ten rules that a quantized graph must keep so that TensorRT fuses it.

A graph that breaks one may still build; it runs the layer in high precision, or with conversions
around it, and is slower than the float model with no word said. So each break is reported with its
node.
The rules are those of NVIDIA's guides to quantized networks (TensorRT 11) and of what its model
optimizer leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import attribute, constant, dims, is_constant, producer

E4M3_MAX = 448.0
INT8_MAX = 127.0

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FP8 = frozenset({ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2,
                  ir.DataType.FLOAT8E5M2FNUZ})  # fmt: skip
_TRANSPARENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Relu")


@dataclass(frozen=True)
class Finding:
    """A rule (1 to 10) that a node breaks."""

    rule: int
    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message} (Q/DQ rule {self.rule})"


_Rule = Callable[[ir.Model], Iterator[Finding]]
RULES: dict[int, _Rule] = {}


def _rule(number: int) -> Callable[[_Rule], _Rule]:
    def register(check: _Rule) -> _Rule:
        if number in RULES:
            raise ValueError(f"two rules {number}")
        RULES[number] = check
        return check

    return register


def lint(model: ir.Model) -> list[Finding]:
    """Return every break of a rule, by rule; nothing for a graph without Q/DQ."""
    if not any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in _nodes(model)):
        return []
    return [finding for number in sorted(RULES) for finding in RULES[number](model)]


def int8_scale(amax: float) -> float:
    """The scale that maps ``amax`` to the largest int8 code."""
    return amax / INT8_MAX


def fp8_scale(amax: float) -> float:
    """The scale that maps ``amax`` to the largest E4M3 code."""
    return amax / E4M3_MAX


def fp8_scale_from_int8(scale: float) -> float:
    """The E4M3 scale for the range that an int8 scale covers: 127/448 of it."""
    return fp8_scale(scale * INT8_MAX)


# --- reading the graph ---------------------------------------------------------------------------


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for node in model.graph.all_nodes():
        if node.domain == "":
            yield node


def _label(node: ir.Node) -> str:
    return node.name or f"{node.op_type} of {node.outputs[0].name}"


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from, through what only moves it."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _TRANSPARENT and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _weight_of(dequantize: ir.Node) -> ir.Value | None:
    """The constant that a DequantizeLinear reads, stored as codes or behind a QuantizeLinear."""
    value = dequantize.inputs[0]
    quantize = producer(value, "QuantizeLinear")
    if quantize is not None:
        value = quantize.inputs[0]
    return value if is_constant(value) else None


def _code_dtype(node: ir.Node) -> ir.DataType | None:
    value = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
    return value.dtype if value is not None else None


def _size(value: ir.Value | None) -> int | None:
    shape = dims(value)
    return math.prod(d for d in shape if d is not None) if shape and None not in shape else None


def _quantized_products(
    model: ir.Model,
) -> Iterator[tuple[ir.Node, ir.Node | None, ir.Node | None]]:
    """Products with at least one quantized operand: (node, DQ of data, DQ of weight)."""
    for node in _nodes(model):
        if node.op_type in _PRODUCTS:
            data, weight = _dequantized(_input(node, 0)), _dequantized(_input(node, 1))
            if data is not None or weight is not None:
                yield node, data, weight


# --- the rules -----------------------------------------------------------------------------------


@_rule(1)
def symmetric(model: ir.Model) -> Iterator[Finding]:
    """Zero points are a constant 0, scales a constant above 0."""
    for node in _nodes(model):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero_point = _input(node, 1), _input(node, 2)
        scales = constant(scale, limit=None)
        if scales is None:
            yield Finding(1, _label(node), "its scale is not a constant")
        elif not (scales.astype(np.float32) > 0).all():
            yield Finding(1, _label(node), f"its scale {scales.min()} is not above 0")
        if zero_point is None:
            continue
        zeros = constant(zero_point, limit=None)
        if zeros is None:
            yield Finding(1, _label(node), "its zero point is not a constant")
        elif (zeros.astype(np.float32) != 0).any():
            yield Finding(1, _label(node), f"its zero point {zeros.reshape(-1)[0]} is not 0")


@_rule(2)
def granularity(model: ir.Model) -> Iterator[Finding]:
    """Activations per tensor; weights per channel along the output channels; biases in float."""
    for node in _nodes(model):
        if node.op_type != "DequantizeLinear" or attribute(node, "block_size", 0):
            continue
        count = _size(_input(node, 1)) or 1
        if count > 1 and _weight_of(node) is None:
            yield Finding(2, _label(node), f"an activation with {count} scales: it takes one")
    for node, _, weight in _quantized_products(model):
        axis = {"Conv": 0, "ConvTranspose": 1}.get(node.op_type)
        if weight is not None and axis is not None and (_size(_input(weight, 1)) or 1) > 1:
            rank = len(dims(weight.inputs[0]) or ()) or 1
            given = attribute(weight, "axis", 1) % rank
            if given != axis:
                yield Finding(
                    2, _label(weight), f"scales along axis {given}: {node.op_type} takes {axis}"
                )
        if _dequantized(_input(node, 2)) is not None:
            yield Finding(2, _label(node), "its bias is quantized: it stays in float")


@_rule(3)
def placement(model: ir.Model) -> Iterator[Finding]:
    """Pairs on the inputs of products, one pair for all readers, none on outputs for their own
    sake."""
    for node, data, weight in _quantized_products(model):
        if data is None and _code_dtype(weight or node) not in (ir.DataType.INT4,):
            yield Finding(3, _label(node), "only its weight is quantized, not its data")
        if weight is None:
            yield Finding(3, _label(node), "only its data is quantized, not its second operand")
    pairs: dict[ir.Value, list[ir.Node]] = {}
    for node in _nodes(model):
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None:
            pairs.setdefault(node.inputs[0], []).append(node)
    for value, several in pairs.items():
        if len(several) > 1:
            message = f"{value.name} is quantized {len(several)} times: share one pair"
            yield Finding(3, _label(several[1]), message)
    for node in _nodes(model):
        if node.op_type != "QuantizeLinear" or producer(node.inputs[0], *_PRODUCTS) is None:
            continue
        readers = _readers_after(node)
        if readers and not any(r.op_type in (*_PRODUCTS, "Add", "Concat") for r in readers):
            yield Finding(3, _label(node), "quantizes an output that no quantized layer reads")


def _readers_after(quantize: ir.Node) -> list[ir.Node]:
    """What reads a quantized value after its DequantizeLinear, past what only moves it."""
    found, front = [], [quantize.outputs[0]]
    while front:
        for user, _ in front.pop().uses():
            if user.op_type == "DequantizeLinear" or user.op_type in (*_TRANSPARENT, "MaxPool"):
                front.append(user.outputs[0])
            else:
                found.append(user)
    return found


@_rule(4)
def residual(model: ir.Model) -> Iterator[Finding]:
    """An Add after a Conv: the branch that passes by is quantized, the Conv's own is not."""
    for node in _nodes(model):
        if node.op_type != "Add":
            continue
        fed = [_conv_before(value) for value in node.inputs]
        for index, conv in enumerate(fed):
            other = _input(node, 1 - index)
            if conv is None or is_constant(other) or fed[1 - index] is not None:
                continue
            direct = _dequantized(node.inputs[index]) is None
            if not direct:
                yield Finding(4, _label(node), f"the output of {_label(conv)} is quantized first")
            elif _is_quantized(conv) and _dequantized(other) is None:
                yield Finding(4, _label(node), "the residual branch is not quantized")


def _conv_before(value: ir.Value | None) -> ir.Node | None:
    """The quantized Conv that a value comes from, past a Q/DQ pair."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node if node is not None and node.op_type == "Conv" and _is_quantized(node) else None


def _is_quantized(node: ir.Node) -> bool:
    return _dequantized(_input(node, 0)) is not None and _dequantized(_input(node, 1)) is not None


@_rule(5)
def too_small(model: ir.Model) -> Iterator[Finding]:
    """Products too thin for the tensor cores, where the conversions cost more than they save."""
    for node, data, weight in _quantized_products(model):
        if node.op_type in ("MatMul", "Gemm"):
            yield from _thin_matmul(node)
        else:
            yield from _thin_conv(node, data, weight)


def _thin_matmul(node: ir.Node) -> Iterator[Finding]:
    a, b = dims(_input(node, 0)), dims(_input(node, 1))
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return
    m, k = (a[-1], a[-2]) if attribute(node, "transA", 0) else (a[-2], a[-1])
    n = b[-2] if attribute(node, "transB", 0) else b[-1]
    if m == 1 or n == 1:
        yield Finding(5, _label(node), f"a product of a vector (M={m}, N={n})")
    elif (k is not None and k < 16) or (n is not None and n < 16):
        yield Finding(5, _label(node), f"K={k}, N={n}: under 16")


def _thin_conv(node: ir.Node, data: ir.Node | None, weight: ir.Node | None) -> Iterator[Finding]:
    if weight is not None and _weight_of(weight) is None:
        yield Finding(5, _label(node), "its weight is not a constant")
        return
    shape = dims(_input(node, 1))
    if shape is None or len(shape) < 3 or shape[0] is None or shape[1] is None:
        return
    ends = (shape[1] * attribute(node, "group", 1), shape[0])
    quantized = weight or data
    if quantized is not None and _code_dtype(quantized) in _FP8:
        filters = [size for size in shape[2:] if size is not None]
        if min(ends) <= 16:
            yield Finding(5, _label(node), f"{min(ends)} channels: fp8 takes more than 16")
        if filters and max(filters) >= 32:
            yield Finding(5, _label(node), f"a filter of {max(filters)}: fp8 takes less than 32")
    elif any(size < 16 and size % 8 for size in ends):
        yield Finding(5, _label(node), f"{ends[0]} to {ends[1]} channels: int8 takes 16, or 8s")


@_rule(6)
def attention(model: ir.Model) -> Iterator[Finding]:
    """Q/DQ around both products of an attention, in the sizes that the fused kernels have."""
    for softmax in _nodes(model):
        if softmax.op_type != "Softmax":
            continue
        scores = _scores_before(softmax)
        if scores is None or not _is_quantized(scores):
            continue
        operand = _dequantized(_input(scores, 0))
        dtype = _code_dtype(operand) if operand is not None else None
        query, result = dims(_input(scores, 0)), dims(scores.outputs[0])
        head = query[-1] if query else None
        length = max((d for d in (result or ())[-2:] if d is not None), default=None)
        if dtype == ir.DataType.INT8 and length is not None and length > 512:
            yield Finding(6, _label(scores), f"int8 attention over {length} positions (up to 512)")
        if dtype in _FP8 and head is not None and not 8 < head <= 256:
            yield Finding(6, _label(scores), f"fp8 attention with heads of {head} (8 to 256)")
        if not any(user.op_type == "QuantizeLinear" for user, _ in softmax.outputs[0].uses()):
            yield Finding(6, _label(softmax), "the first product is quantized, the second is not")


def _scores_before(softmax: ir.Node) -> ir.Node | None:
    """The product whose result reaches a Softmax through scale and mask only."""
    node = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
    while node is not None and node.op_type in ("Add", "Mul", "Div", "Where", "Cast"):
        index = 1 if node.op_type == "Where" else 0
        value = _input(node, index)
        node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "MatMul" else None


@_rule(7)
def fp8(model: ir.Model) -> Iterator[Finding]:
    """fp8 is E4M3 with ``scale = amax / 448``: codes of a weight reach the top of the range."""
    for node in _nodes(model):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        dtype = _code_dtype(node)
        if dtype not in _FP8:
            continue
        if dtype != ir.DataType.FLOAT8E4M3FN:
            yield Finding(7, _label(node), f"{dtype.name}: TensorRT's fp8 is FLOAT8E4M3FN")
        elif node.op_type == "DequantizeLinear" and is_constant(node.inputs[0]):
            codes = constant(node.inputs[0], limit=None)
            assert codes is not None
            largest = float(np.abs(codes.astype(np.float32)).max(initial=0.0))
            if 0 < largest < E4M3_MAX / 2:
                yield Finding(
                    7,
                    _label(node),
                    f"its largest code is {largest:g} of 448: the scale is too wide",
                )


@_rule(8)
def int4(model: ir.Model) -> Iterator[Finding]:
    """int4 is for constant weights only: blocks along axis 0, scales [K/B, N]."""
    for node in _nodes(model):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if _code_dtype(node) not in (ir.DataType.INT4, ir.DataType.UINT4):
            continue
        if node.op_type == "QuantizeLinear" or not is_constant(node.inputs[0]):
            yield Finding(8, _label(node), "int4 that is not a stored weight")
            continue
        shape, scales = dims(node.inputs[0]), dims(_input(node, 1))
        block, axis = attribute(node, "block_size", 0), attribute(node, "axis", 1)
        if not block or axis % max(len(shape or ()), 1) != 0:
            yield Finding(8, _label(node), f"axis={axis}, block_size={block}: int4 is in blocks "
                          "along axis 0")  # fmt: skip
        elif shape and shape[0] and scales and scales[0] != -(-shape[0] // block):
            yield Finding(8, _label(node), f"{scales[0]} rows of scales for {shape[0]} rows in "
                          f"blocks of {block}")  # fmt: skip


@_rule(9)
def concat(model: ir.Model) -> Iterator[Finding]:
    """The inputs of a Concat share a scale, or each of them is converted."""
    for node in _nodes(model):
        if node.op_type != "Concat":
            continue
        pairs = [producer(value, "DequantizeLinear") for value in node.inputs]
        scales = [constant(pair.inputs[1]) for pair in pairs if pair is not None]
        values = {float(scale.reshape(-1)[0]) for scale in scales if scale is not None}
        if len(values) > 1:
            shown = ", ".join(f"{value:g}" for value in sorted(values))
            yield Finding(9, _label(node), f"its inputs have the scales {shown}")


@_rule(10)
def explicit_rest(model: ir.Model) -> Iterator[Finding]:
    """What is not quantized says float16 or bfloat16: a strongly typed network adds no casts."""
    left = [
        node
        for node in _nodes(model)
        if node.op_type in (*_PRODUCTS, "Attention")
        and node.outputs[0].dtype == ir.DataType.FLOAT
        and not _is_quantized(node)
    ]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        yield Finding(10, _label(left[0]) + more, "computes in float32 beside quantized layers")
