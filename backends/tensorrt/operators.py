"""What TensorRT 11's ONNX parser takes, node by node, known without TensorRT.

``operators.toml`` says which operators in which types; the checks below say what else single
operators must keep. Both from onnx-tensorrt's own table of operators.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import cache
from importlib.resources import files

import onnx_ir as ir

from trivium.compiler.passing import attribute, constant, dims, entering, is_constant, scalar

_Check = Callable[[ir.Node], str | None]
_CHECKS: dict[str, _Check] = {}


_check = entering(_CHECKS)
"""Register what the parser asks of some operators beyond their types."""


@cache
def types_by_operator() -> dict[str, frozenset[ir.DataType]]:
    """Return the types that each operator is taken in; none for one that is refused."""
    text = (files("trivium.backends.tensorrt") / "operators.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    known: dict[str, frozenset[ir.DataType]] = dict.fromkeys(table["unsupported"], frozenset())
    for group in table["group"]:
        types = frozenset(ir.DataType[name] for name in group["types"])
        for op_type in group["operators"]:
            if op_type in known:
                raise ValueError(f"{op_type} is twice in operators.toml")
            known[op_type] = types
    return known


def refusal(node: ir.Node) -> str | None:
    """Return why TensorRT's parser cannot take a node, or None."""
    if node.domain not in ("", "ai.onnx"):
        return f"its parser takes the standard domain only, not {node.domain!r}"
    types = types_by_operator().get(node.op_type)
    if not types:
        return f"its parser has no importer for {node.op_type}"
    value = _typed_value(node)
    if value is not None and value.dtype is not None and value.dtype not in types:
        taken = ", ".join(sorted(one.name for one in types))
        return f"{value.name} is {value.dtype.name}, and {node.op_type} is taken in {taken} only"
    check = _CHECKS.get(node.op_type)
    return check(node) if check is not None else None


def _typed_value(node: ir.Node) -> ir.Value | None:
    """The value whose type the table speaks of: the first input, or what is selected."""
    if node.op_type == "Where":
        return node.outputs[0]
    return node.inputs[0] if node.inputs else None


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _used(node: ir.Node, index: int) -> bool:
    if index >= len(node.outputs):
        return False
    value = node.outputs[index]
    return bool(value.uses()) or value.is_graph_output()


@_check("Attention")
def attention(node: ir.Node) -> str | None:
    """Why an Attention cannot stay whole: the parser takes 4-D Q, K, V and a 4-D mask only."""
    for index, name in enumerate("QKV"):
        shape = dims(_given(node, index))
        if shape is None or len(shape) != 4:
            rank = "unknown rank" if shape is None else f"{len(shape)} dimensions"
            return f"{name} has {rank}, and it takes 4"
    mask = _given(node, 3)
    mask_shape = dims(mask)
    if mask is not None and (mask_shape is None or len(mask_shape) != 4):
        return "attn_mask does not have 4 dimensions"
    for index, name in ((4, "past_key"), (5, "past_value"), (6, "nonpad_kv_seqlen")):
        if _given(node, index) is not None:
            return f"the input {name} (keep the cache with TensorScatter)"
    for index, name in ((1, "present_key"), (2, "present_value"), (3, "qk_matmul_output")):
        if _used(node, index):
            return f"the output {name}"
    if attribute(node, "softcap", 0.0):
        return f"softcap={attribute(node, 'softcap')}"
    return None


@_check("AveragePool", "MaxPool", "LpPool")
def _pool(node: ir.Node) -> str | None:
    shape = dims(node.inputs[0])
    if shape is not None and len(shape) not in (4, 5) and node.op_type != "LpPool":
        return f"{len(shape) - 2}-D pooling (2-D and 3-D are taken)"
    if any(step != 1 for step in attribute(node, "dilations", ())):
        return f"dilations={list(attribute(node, 'dilations'))}"
    return "the output Indices" if node.op_type == "MaxPool" and _used(node, 1) else None


@_check("QuantizeLinear", "DequantizeLinear")
def _zero_point(node: ir.Node) -> str | None:
    scale = _given(node, 1)
    if node.op_type == "DequantizeLinear" and not is_constant(scale):
        return "the scale is computed at run time"
    zero_point = _given(node, 2)
    if zero_point is None:
        return "its codes are uint8, and it makes int8" if _makes_uint8(node) else None
    if not is_constant(zero_point):
        return "the zero point is computed at run time"
    array = constant(zero_point)
    if array is not None and (array.astype("float32") != 0).any():
        shown = array.reshape(-1)[0]
        return f"zero point {shown}: quantization has to be symmetric"
    return "its codes are uint8, and it makes int8" if _makes_uint8(node) else None


def _makes_uint8(node: ir.Node) -> bool:
    return node.op_type == "QuantizeLinear" and node.outputs[0].dtype == ir.DataType.UINT8


@_check("CumSum", "Squeeze", "Unsqueeze", "OneHot")
def _constant_second(node: ir.Node) -> str | None:
    name = {"CumSum": "axis", "OneHot": "depth"}.get(node.op_type, "axes")
    value = _given(node, 1)
    return None if value is None or is_constant(value) else f"{name} is computed at run time"


@_check(
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
def _reduction(node: ir.Node) -> str | None:
    axes = _given(node, 1)
    return None if axes is None or is_constant(axes) else "axes is not an initializer"


@_check("Dropout")
def _dropout(node: ir.Node) -> str | None:
    training = _given(node, 2)
    if training is None:
        return None
    return None if scalar(training) == 0 else "training_mode is not a constant false"


@_check("GridSample")
def _grid_sample(node: ir.Node) -> str | None:
    shape = dims(node.inputs[0])
    return None if shape is None or len(shape) == 4 else f"{len(shape)} dimensions, not 4"


@_check("LayerNormalization")
def _layer_normalization(node: ir.Node) -> str | None:
    return "the outputs Mean and InvStdDev" if _used(node, 1) or _used(node, 2) else None


@_check("LSTM", "GRU", "RNN")
def _recurrent(node: ir.Node) -> str | None:
    if node.op_type == "LSTM" and attribute(node, "input_forget", 0):
        return "input_forget=1"
    if attribute(node, "layout", 0):
        return "layout=1"
    activations = list(attribute(node, "activations", ()))
    half = len(activations) // 2
    if attribute(node, "direction", "forward") == "bidirectional" and (
        activations[:half] != activations[half:]
    ):
        return "the two directions have different activations"
    return None


@_check("Resize")
def _resize(node: ir.Node) -> str | None:
    taken = {
        "mode": ("nearest", ("nearest", "linear")),
        "coordinate_transformation_mode": (
            "half_pixel",
            ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric",
             "align_corners"),
        ),
        "nearest_mode": ("round_prefer_floor",
                         ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
        "keep_aspect_ratio_policy": ("stretch", ("stretch",)),
        "antialias": (0, (0,)),
    }  # fmt: skip
    for name, (default, choices) in taken.items():
        value = attribute(node, name, default)
        if value not in choices:
            return f"{name}={value}"
    return None


@_check("ScatterND")
def _scatter_nd(node: ir.Node) -> str | None:
    reduction = attribute(node, "reduction", "none")
    return None if reduction == "none" else f"reduction={reduction}"


@_check("TensorScatter")
def _tensor_scatter(node: ir.Node) -> str | None:
    for index, name in ((0, "past_cache"), (1, "update")):
        shape = dims(node.inputs[index])
        if shape is not None and len(shape) != 4:
            return f"{name} has {len(shape)} dimensions, not 4"
    axis = attribute(node, "axis", -2)
    return None if axis in (-2, 2) else f"axis={axis} (it takes -2)"


@_check("RotaryEmbedding")
def _rotary_embedding(node: ir.Node) -> str | None:
    positions = _given(node, 3)
    if positions is not None and positions.dtype not in (None, ir.DataType.INT64):
        return f"position_ids is {positions.dtype.name if positions.dtype else '?'}, not INT64"
    return None


@_check("TopK")
def _top_k(node: ir.Node) -> str | None:
    if not attribute(node, "sorted", 1):
        return "sorted=0"
    count = scalar(_given(node, 1))
    return f"K={count:g} (it takes less than 3840)" if count is not None and count >= 3840 else None


@_check("EyeLike")
def _eye_like(node: ir.Node) -> str | None:
    shape = dims(node.inputs[0])
    return "its shape is not static" if shape is None or None in shape else None


@_check("STFT")
def _stft(node: ir.Node) -> str | None:
    for index, name in ((1, "frame_step"), (2, "window")):
        value = _given(node, index)
        if value is not None and not is_constant(value):
            return f"{name} is not an initializer"
    return None


@_check("DeformConv")
def _deform_conv(node: ir.Node) -> str | None:
    pads = list(attribute(node, "pads", ()))
    half = len(pads) // 2
    return None if pads[:half] == pads[half:] else f"pads={pads} are not symmetric"
