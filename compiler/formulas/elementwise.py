"""Operators that do the same few operations for each element of their output."""

from __future__ import annotations

from trivium.compiler.work import TRANSCENDENTAL, Demand, Site, formula

_T = TRANSCENDENTAL

PER_ELEMENT: dict[str, int] = {
    # Arithmetic, comparison, logic and rounding: one instruction each.
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Sign", "Reciprocal"), 1),
    **dict.fromkeys(("And", "Or", "Xor", "Not", "Where", "Cast", "CastLike"), 1),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), 1),
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift"), 1),
    **dict.fromkeys(("Ceil", "Floor", "Round", "IsNaN", "IsInf", "Sqrt"), 1),
    # Activations without a transcendental.
    **dict.fromkeys(("Relu", "ThresholdedRelu"), 1),
    **dict.fromkeys(("Clip", "LeakyRelu", "PRelu", "Shrink"), 2),
    "Softsign": 3,
    "HardSigmoid": 4,
    "HardSwish": 5,
    # One transcendental.
    **dict.fromkeys(("Exp", "Log", "Erf", "Sin", "Cos", "Tan", "Sinh", "Cosh", "Tanh"), _T),
    **dict.fromkeys(("Asin", "Acos", "Atan", "Asinh", "Acosh", "Atanh"), _T),
    "Sigmoid": _T + 2,
    "Elu": _T + 2,
    "Celu": _T + 3,
    "Selu": _T + 3,
    "Swish": _T + 3,
    "SwiGLU": _T + 4,
    "Gelu": _T + 4,
    # More than one.
    "Pow": 2 * _T,
    "Softplus": 2 * _T + 1,
    "Mish": 3 * _T + 2,
    # Quantization: scale, shift, round, saturate.
    "QuantizeLinear": 4,
    "DequantizeLinear": 2,
    # Random numbers: a counter-based generator, about as dear as a transcendental.
    **dict.fromkeys(("RandomNormal", "RandomNormalLike", "RandomUniform"), _T),
    **dict.fromkeys(("RandomUniformLike", "Bernoulli"), _T),
    **dict.fromkeys(("HannWindow", "HammingWindow", "BlackmanWindow"), _T),
}
"""Operations for each element of the output."""


@formula(*PER_ELEMENT)
def elementwise(site: Site) -> Demand:
    return Demand(vector=site.out_count() * PER_ELEMENT[site.node.op_type])


@formula("Min", "Max", "Sum")
def fold(site: Site) -> Demand:
    """Of n inputs, n - 1 operations for each element."""
    return Demand(vector=site.out_count() * max(len(site.node.inputs) - 1, 1))


@formula("Mean")
def mean(site: Site) -> Demand:
    return Demand(vector=site.out_count() * len(site.node.inputs))


@formula("DynamicQuantizeLinear")
def dynamic_quantize(site: Site) -> Demand:
    """Minimum and maximum, then as QuantizeLinear."""
    return Demand(vector=site.count() * 6)


@formula("RotaryEmbedding")
def rotary_embedding(site: Site) -> Demand:
    """Each rotated element is two products and a sum."""
    x = site.shape()
    head = x[-1] // (site.attr("num_heads", 0) or 1) if len(x) == 3 else x[-1]
    rotated = (site.attr("rotary_embedding_dim", 0) or head) / head
    return Demand(vector=site.count() * rotated * 3)
