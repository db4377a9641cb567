"""Where each family of engines wants Q/DQ: one `Placement` for each, as data.

- ``onnxruntime``: uint8 activations, int32 bias; outputs of Conv and of what follows it are
  quantized too, for only then QLinearConv, QLinearAdd and QLinearConcat form. MatMul and Gemm give
  floats unless something quantized reads them (MatMulIntegerToFloat, QGemm). ReLU vanishes because
  an unsigned range that begins at zero has zero point 0. Found by looking at the optimized graph
  of ONNX Runtime 1.32; a test does so again.
- ``fpga``: everything between the first Q and the last DQ is an integer: outputs of every
  operator are quantized, values that only move keep their parameters. uint8 with zero point 128
  for signed tensors (int8 in hardware, after subtracting a constant that is a bit flip) and 0 for
  nonnegative ones, so that no datapath adds a zero point.
- ``tensorrt``: symmetric int8, zero point 0, float bias, Q/DQ on the inputs of the layers that
  have int8 kernels; of a residual sum only the branch that no convolution makes; what is too
  small to gain is left alone.
- ``xla``: like tensorrt without the size limits: int8 dots and convolutions with float results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from trivium.compiler.passing import attribute, dims

When = Literal["always", "joins"]


@dataclass(frozen=True)
class Rule:
    """How one operator is quantized.

    Attributes:
        inputs: Positions of its activations; None = all inputs.
        weight: Position of the input that, if constant, is quantized per channel.
        bias: Position of the bias.
        when: ``always``: wherever it stands. ``joins``: only where its activations are quantized
            already, so that it does not interrupt a chain of integers.
        output: Whether its output is quantized too.
    """

    inputs: tuple[int, ...] | None = (0,)
    weight: int | None = None
    bias: int | None = None
    when: When = "always"
    output: bool = True


@dataclass(frozen=True)
class Limits:
    """What is too small to gain from integers.

    Attributes:
        matrix: Least K and N of a product with a constant.
        vectors: Whether products of a single row or column count as too small.
        channels: Convolutions with fewer channels need a multiple of ``multiple``.
    """

    matrix: int = 16
    vectors: bool = True
    channels: int = 16
    multiple: int = 8


@dataclass(frozen=True)
class Placement:
    """Where an engine wants Q/DQ.

    Attributes:
        activation: Stored dtype of activations; weights are int8.
        symmetric: Whether activations are symmetric about zero.
        integer_bias: Whether the bias is int32 with the scale of the product; else it is float.
        rules: By operator.
        moves: Operators that only move values: a quantized input makes the output quantized,
            with the same parameters.
        tied: Operators whose inputs and output share one scale.
        fused: Activation functions that fold into what they follow.
        fixed: Operators whose output range is known without data.
        all_readers: Whether whatever reads an activation that a rule names reads the quantized
            tensor; else only the operators with rules do. (Quantized outputs are read so by all.)
        residual: Operators of which only the branch that no convolution makes is quantized.
        limits: What is too small.
    """

    activation: str
    symmetric: bool
    integer_bias: bool
    rules: Mapping[str, Rule]
    moves: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    fused: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    all_readers: bool = False
    residual: frozenset[str] = frozenset()
    limits: Limits | None = None


_CONV = Rule(weight=1, bias=2)
_GEMM = Rule(inputs=(0, 1), weight=1, bias=2)
_MATMUL = Rule(inputs=(0, 1), weight=1)
_JOIN = Rule(when="joins")
_JOIN_ALL = Rule(inputs=None, when="joins")

_MOVES = frozenset(
    {"Flatten", "MaxPool", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze",
     "DepthToSpace", "SpaceToDepth"}
)  # fmt: skip


def _float_result(rule: Rule) -> Rule:
    return Rule(rule.inputs, rule.weight, rule.bias, rule.when, output=False)


_INPUTS_ONLY = {
    "Conv": _float_result(_CONV),
    "ConvTranspose": _float_result(_CONV),
    "Gemm": _float_result(_GEMM),
    "MatMul": _float_result(_MATMUL),
}

PLACEMENTS: dict[str, Placement] = {
    "onnxruntime": Placement(
        activation="uint8",
        symmetric=False,
        integer_bias=True,
        rules={
            "Conv": _CONV,
            "Gemm": _float_result(_GEMM),
            "MatMul": _float_result(_MATMUL),
            "Add": _JOIN_ALL,
            "Mul": _JOIN_ALL,
            "Concat": _JOIN_ALL,
            "AveragePool": _JOIN,
            "GlobalAveragePool": _JOIN,
            "LeakyRelu": _JOIN,
            "Sigmoid": _JOIN,
            "Relu": _JOIN,
            "Clip": _JOIN,
        },
        moves=_MOVES,
        fused=frozenset({"Relu", "Clip"}),
    ),
    "fpga": Placement(
        activation="uint8",
        symmetric=True,
        integer_bias=True,
        rules={
            "Conv": _CONV,
            "ConvTranspose": _CONV,
            "Gemm": _GEMM,
            "MatMul": _MATMUL,
            "Add": _JOIN_ALL,
            "Mul": _JOIN_ALL,
            "Concat": _JOIN_ALL,
            "AveragePool": _JOIN,
            "GlobalAveragePool": _JOIN,
            "ReduceMean": _JOIN,
            "LeakyRelu": _JOIN,
            "Sigmoid": _JOIN,
            "Tanh": _JOIN,
            "Relu": _JOIN,
            "Clip": _JOIN,
        },
        moves=_MOVES,
        tied=frozenset({"Concat"}),
        fused=frozenset({"Relu", "Clip"}),
        fixed={"Sigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)},
        all_readers=True,
    ),
    "tensorrt": Placement(
        activation="int8",
        symmetric=True,
        integer_bias=False,
        rules=_INPUTS_ONLY,
        fixed={"Softmax": (0.0, 1.0)},
        residual=frozenset({"Add"}),
        limits=Limits(),
    ),
    "xla": Placement(
        activation="int8",
        symmetric=True,
        integer_bias=False,
        rules=_INPUTS_ONLY,
        fixed={"Softmax": (0.0, 1.0)},
    ),
}

DEFAULT = "onnxruntime"
"""The placement for backends that have none of their own."""


def weight_axis(node: ir.Node, rank: int) -> int | None:
    """The axis of a weight that indexes output channels; None where there is no such axis."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        # With groups, one entry of axis 1 stands for one output channel of every group.
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return rank - 1 if rank >= 2 else None


def too_small(node: ir.Node, weight: ir.Value | None, limits: Limits) -> str | None:
    """Why a layer is too small for an engine to gain from integers, or None."""
    shape = dims(weight)
    if shape is None or None in shape:
        return None
    sizes = [size for size in shape if size is not None]
    if node.op_type in ("Conv", "ConvTranspose"):
        group = attribute(node, "group", 1)
        for what, channels in (("input", sizes[1] * group), ("output", sizes[0])):
            if channels < limits.channels and channels % limits.multiple:
                return f"{channels} {what} channels, fewer than {limits.channels}"
        return None
    if len(sizes) < 2:
        return "a product with a vector" if limits.vectors else None
    for size in sizes[-2:]:
        if size < limits.matrix:
            return f"a dimension of {size}, below {limits.matrix}"
    rows = dims(node.inputs[0])
    if limits.vectors and rows is not None and len(rows) == 2 and rows[0] == 1:
        return "a product of a single row"
    return None
