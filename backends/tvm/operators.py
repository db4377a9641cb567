"""What TVM's ONNX importer takes: known here, so that a refusal needs neither TVM nor a build.

The set is the importer's own table (apache-tvm 0.27) for the standard domain; a test holds it to
the installed importer. An operator outside of it is opened through the body that ONNX defines, or
refused.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from trivium.compiler.passing import attribute, is_constant

# fmt: off
IMPORTED = frozenset(
    {
        "Abs", "Acos", "Acosh", "Add", "AffineGrid", "And", "ArgMax", "ArgMin", "Asin", "Asinh",
        "Atan", "Atanh", "AveragePool", "BatchNormalization", "BitShift", "BitwiseAnd",
        "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil", "Clip", "Compress",
        "Concat", "ConcatFromSequence", "Constant", "ConstantOfShape", "Conv", "ConvTranspose",
        "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Dropout",
        "DynamicQuantizeLinear", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike",
        "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm",
        "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual",
        "GridSample", "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax", "Identity",
        "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LayerNormalization", "LeakyRelu",
        "Less", "LessOrEqual", "Log", "LogSoftmax", "LpPool", "MatMul", "MatMulInteger", "Max",
        "MaxPool", "MaxRoiPool", "MaxUnpool", "Mean", "MeanVarianceNormalization", "Min",
        "Mish", "Mod", "Mul", "Neg", "NonMaxSuppression", "NonZero", "Not", "OneHot",
        "Optional", "OptionalGetElement", "OptionalHasElement", "Or", "PRelu", "Pad", "Pow",
        "QuantizeLinear", "RMSNormalization", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
        "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
        "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "RoiAlign", "Round",
        "Scatter", "ScatterElements", "ScatterND", "Selu", "SequenceAt", "SequenceConstruct",
        "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "Shape", "Shrink",
        "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax", "Softplus", "Softsign",
        "SpaceToDepth", "Split", "SplitToSequence", "Sqrt", "Squeeze", "Sub", "Sum", "Tan",
        "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unique", "Unsqueeze",
        "Upsample", "Where", "Xor",
    }
)
# fmt: on

OPENED = (
    "Attention",
    "BlackmanWindow",
    "Celu",
    "CenterCropPad",
    "HammingWindow",
    "HannWindow",
    "NegativeLogLikelihoodLoss",
    "RotaryEmbedding",
    "SoftmaxCrossEntropyLoss",
    "Swish",
)
"""Operators that the importer lacks and ONNX defines by others. (``Attention`` in the importer's
table is the one of ``com.microsoft``.)"""

_NARROW = frozenset({ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2,
                     ir.DataType.FLOAT4E2M1})  # fmt: skip

_Check = Callable[[ir.Node], str | None]
_CHECKS: dict[str, _Check] = {}


def _check(*op_types: str) -> Callable[[_Check], _Check]:
    """Register what the importer asks of some operators beyond knowing them."""

    def register(check: _Check) -> _Check:
        for op_type in op_types:
            if op_type in _CHECKS:
                raise ValueError(f"two checks for {op_type}")
            _CHECKS[op_type] = check
        return check

    return register


def refusal(node: ir.Node) -> str | None:
    """Return why the importer cannot take a node, or None."""
    if node.domain not in ("", "ai.onnx"):
        return f"TVM's ONNX importer takes the standard domain only, not {node.domain!r}"
    if node.op_type == "If":
        return None
    if node.op_type not in IMPORTED:
        return f"TVM's ONNX importer has no converter for {node.op_type}"
    for value in (*node.inputs, *node.outputs):
        if value is None:
            continue
        if value.dtype in _NARROW:
            return f"{value.name} is {value.dtype.name}, and TVM's tensors are bytes at least"
        if value.dtype == ir.DataType.STRING:
            return f"{value.name} is a string, which TVM has no type for"
    check = _CHECKS.get(node.op_type)
    return check(node) if check is not None else None


@_check("QuantizeLinear", "DequantizeLinear")
def _quantization(node: ir.Node) -> str | None:
    block = attribute(node, "block_size", 0)
    return f"block_size={block}: blocked quantization is not imported" if block else None


@_check("Dropout")
def _dropout(node: ir.Node) -> str | None:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is not None and not is_constant(training):
        return "training_mode is computed at run time"
    return None


@_check("BatchNormalization")
def _batch_normalization(node: ir.Node) -> str | None:
    return "training_mode=1" if attribute(node, "training_mode", 0) else None


@_check("Reshape", "Expand", "Tile", "Pad", "ConstantOfShape", "OneHot", "TopK", "Resize")
def _static_result(node: ir.Node) -> str | None:
    """A result whose shape depends on values would need a dynamic shape through the whole graph."""
    shape = node.outputs[0].shape
    if shape is None:
        return "the shape of its result is not known at compile time"
    return None


@_check("NonZero", "Unique", "Compress")
def _data_dependent(node: ir.Node) -> str | None:
    return "the shape of its result depends on the data"
