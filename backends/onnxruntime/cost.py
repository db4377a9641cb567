"""What a call costs on ONNX Runtime's CPU provider.

Kernels are timed by `trivium.compiler.machines.cpu`. ``trivium calibrate cpu`` fits this machine;
what ships was fitted on one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivium.compiler.cost import Profile, roofline
from trivium.compiler.machines.cpu import Habits
from trivium.compiler.passing import is_op, producer
from trivium.compiler.types import Estimate, Target, Workload
from trivium.compiler.work import is_weight
from trivium.targets import calibrations
from trivium.targets.host import with_bandwidth

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.kernels import Kernel
    from trivium.compiler.work import Product

ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish")

KEEPING = (*ACTIVATIONS, "MaxPool", "AveragePool", "GlobalAveragePool", "Concat")
"""What leaves the blocked layout of a convolution's result as it is."""


PRODUCTS = ("Conv", "Gemm", "MatMul")

INTEGERS = (
    *PRODUCTS,
    *("Add", "Mul", "Sigmoid", "LeakyRelu", "Softmax", "Concat", "AveragePool"),
    *("GlobalAveragePool", "MaxPool", "Transpose", "Slice", "Gather", "Split"),
)
"""What has a kernel of integers, where the operands are dequantized and the result quantized."""


def melts(node: ir.Node) -> bool:
    """What ONNX Runtime fuses: activations and sums into convolutions and Gemm, a bias into a
    product, a sum into the normalization that reads it; quantization into what has a kernel of
    integers, scales into a product of integers. Everything else is a kernel."""
    if is_op(node, "BatchNormalization"):
        return True
    if is_op(node, "QuantizeLinear"):
        return _is_integer(_before_activation(node))
    if _scales_integers(node):
        return True
    if is_op(node, "LayerNormalization"):
        return _adds_two(_maker(node, 0))
    if is_op(node, "Add"):
        return _fuses_bias(node) or (_adds_two(node) and all(map(_is_blocked, node.inputs)))
    maker = _maker(node, 0)
    if is_op(node, "Gelu"):
        return maker is not None and _adds_bias(maker) and not melts(maker)
    if maker is None or not is_op(node, *ACTIVATIONS):
        return False
    if is_op(maker, "Conv", "Gemm"):
        return True
    if not is_op(maker, "Add") or _scales_integers(maker):
        return False
    return melts(maker) or _is_integer(maker)


def _maker(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index]
    return value.producer() if value is not None else None


def _adds_two(node: ir.Node | None) -> bool:
    """Whether a node adds two values that are both computed."""
    if node is None or not is_op(node, "Add"):
        return False
    return not any(value is None or is_weight(value) for value in node.inputs)


def _adds_bias(node: ir.Node) -> bool:
    makers = (_maker(node, 0), _maker(node, 1))
    return not _adds_two(node) and any(one is not None and is_op(one, "MatMul") for one in makers)


def _fuses_bias(node: ir.Node) -> bool:
    """Whether a bias becomes part of the product before it: products of integers take none."""
    makers = (_maker(node, 0), _maker(node, 1))
    return _adds_bias(node) and not any(map(_is_integer, makers))


def _is_integer(node: ir.Node | None) -> bool:
    """Whether all that is computed on is dequantized, and there is a kernel that leaves it so."""
    if node is None or not is_op(node, *INTEGERS):
        return False
    operands = node.inputs[:2] if is_op(node, *PRODUCTS) else node.inputs
    return all(producer(value, "DequantizeLinear") for value in operands)


def _before_activation(node: ir.Node) -> ir.Node | None:
    """What makes the input of a node, an activation left out that integers are cut to range for."""
    maker = _maker(node, 0)
    return _maker(maker, 0) if maker is not None and is_op(maker, "Relu", "Clip") else maker


def _scales_integers(node: ir.Node) -> bool:
    """Whether a node is of those that turn a product of integers into floats: all one kernel."""
    before = {"Cast": "MatMulInteger", "Mul": "Cast", "Add": "Mul"}.get(node.op_type)
    for maker in (_maker(node, 0), _maker(node, 1) if len(node.inputs) > 1 else None):
        if before is not None and maker is not None and is_op(maker, before):
            return before == "MatMulInteger" or _scales_integers(maker)
    return False


def _is_blocked(value: ir.Value | None) -> bool:
    """Whether a value lies in blocks of channels, as the quick convolutions leave it."""
    node = value.producer() if value is not None else None
    if node is None:
        return False
    if is_op(node, "Conv"):
        return True
    if is_op(node, "Add"):
        return _adds_two(node) and all(map(_is_blocked, node.inputs))
    return is_op(node, *KEEPING) and _is_blocked(node.inputs[0])


def _is_biased(kernel: Kernel) -> bool:
    return kernel.op_types[:2] == ("MatMul", "Add")


def _nodes(kernel: Kernel) -> float:
    """A product with a bias is a Gemm between two reshapes."""
    return 3.0 if _is_biased(kernel) else 1.0


def _stall(kernel: Kernel, product: Product) -> float:
    """A Gemm writes the bias to the result first, and reads it again."""
    return 1.2 if _is_biased(kernel) else 1.0


def _slow(kernel: Kernel) -> float:
    """The sum with a normalization behind it has a kernel that uses neither registers nor cores;
    transcendentals are vectors of polynomials."""
    if kernel.op_types[:2] == ("Add", "LayerNormalization"):
        return 12.0
    return 0.6 if TRANSCENDENTAL & set(kernel.op_types) else 1.0


TRANSCENDENTAL = frozenset(("Exp", "Erf", "Tanh", "Sigmoid", "Gelu", "Softmax", "Attention"))

HABITS = Habits(
    narrow=12.0,
    shallow=20.0,
    depthwise=5.0,
    bytes_per_operation=2.4,
    grain=1.5e5,
    kernel_wake_s=2.2e-6,
    weight_bytes_per_s=150e9,
    reach={"int8": 3.2},
    nodes=_nodes,
    slow=_slow,
    stall=_stall,
)


def profile_for(target: Target) -> Profile:
    """How the engine runs kernels on a CPU."""
    arithmetic = {"float16": ("float32",), "bfloat16": ("float32",)}
    return calibrations.cpu_profile(
        target, "onnxruntime", habits=HABITS, fused=melts, arithmetic=arithmetic
    )


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    return roofline(model, with_bandwidth(target), workload, profile_for(target))
