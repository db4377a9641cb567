"""What TVM's ONNX importer takes: known here, so that a refusal needs neither TVM nor a build.

The set is the importer's own table (apache-tvm 0.27) for the standard domain; a test holds it to
the installed importer. An operator outside of it is opened through the body that ONNX defines, or
refused.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from trivium.compiler.passing import attribute, entering, is_constant

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


_check = entering(_CHECKS)
"""Register what the importer asks of some operators beyond knowing them."""


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


_CONSTANTS: dict[str, tuple[tuple[int, str], ...]] = {
    "AffineGrid": ((1, "size"),),
    "ConstantOfShape": ((0, "the shape"),),
    "CumSum": ((1, "axis"),),
    "Expand": ((1, "shape"),),
    "MaxUnpool": ((2, "output_shape"),),
    "OneHot": ((1, "depth"),),
    "Pad": ((1, "pads"), (3, "axes")),
    "Range": ((0, "start"), (1, "limit"), (2, "delta")),
    "Reshape": ((1, "shape"),),
    "Resize": ((2, "scales"), (3, "sizes")),
    "Slice": ((1, "starts"), (2, "ends"), (3, "axes"), (4, "steps")),
    "Split": ((1, "split"),),
    "Squeeze": ((1, "axes"),),
    "Tile": ((1, "repeats"),),
    "TopK": ((1, "K"),),
    "Unsqueeze": ((1, "axes"),),
    **{
        f"Reduce{kind}": ((1, "axes"),)
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum",
                     "SumSquare")
    },
}  # fmt: skip
"""Inputs that decide a shape or a loop: the importer wants them at compile time, and with some it
goes on without them and is wrong."""


@_check(*_CONSTANTS)
def _known_at_compile_time(node: ir.Node) -> str | None:
    for index, name in _CONSTANTS[node.op_type]:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and not is_constant(value):
            return f"{name} is computed at run time"
    return None


@_check("NonZero", "Unique", "Compress", "NonMaxSuppression")
def _data_dependent(node: ir.Node) -> str | None:
    return "the shape of its result depends on the data"


@_check(
    "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement", "SequenceAt",
    "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
    "SplitToSequence",
)  # fmt: skip
def _sequence(node: ir.Node) -> str | None:
    return "sequences and optionals have no place among the inputs and outputs of a program"


@_check("Cosh", "Sinh")
def _hyperbolic(node: ir.Node) -> str | None:
    return f"TVM does not compile {node.op_type.lower()} for LLVM"


@_check("IsInf")
def _is_infinite(node: ir.Node) -> str | None:
    for name in ("detect_negative", "detect_positive"):
        if not attribute(node, name, 1):
            return f"{name}=0 is ignored by the importer"
    return None


@_check("RoiAlign")
def _roi_align(node: ir.Node) -> str | None:
    mode = attribute(node, "mode", "avg")
    return None if mode == "avg" else f"mode={mode} is computed differently from the standard"


@_check("EyeLike")
def _eye_like(node: ir.Node) -> str | None:
    given = node.inputs[0].dtype if node.inputs[0] is not None else None
    wanted = attribute(node, "dtype", None)
    if wanted is not None and given is not None and wanted != given.value:
        return f"it makes {ir.DataType(wanted).name} from {given.name}"
    return None


@_check("MaxPool")
def _max_pool(node: ir.Node) -> str | None:
    return "the output Indices is not imported" if _used(node, 1) else None


@_check("LayerNormalization")
def _layer_normalization(node: ir.Node) -> str | None:
    wrong = _used(node, 1) or _used(node, 2)
    return "the outputs Mean and InvStdDev come out in another shape" if wrong else None


def wants_opening(node: ir.Node) -> bool:
    """Whether to open a node that the importer knows, but not in this form."""
    if node.op_type == "RMSNormalization" and node.inputs[0] is not None:
        rank = len(node.inputs[0].shape or ())
        return rank > 0 and attribute(node, "axis", -1) % rank == 0
    return node.op_type in OPENED


def _used(node: ir.Node, index: int) -> bool:
    if index >= len(node.outputs):
        return False
    value = node.outputs[index]
    return bool(value.uses()) or value.is_graph_output()
