"""Operators that do a few operations for each element of their *input*: reductions, pooling,
softmax and the normalizations.
"""

from __future__ import annotations

import math

from trivium.compiler.work import TRANSCENDENTAL, Demand, Site, formula

_T = TRANSCENDENTAL

PER_INPUT: dict[str, int] = {
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"), 1),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceSumSquare"), 2),
    "ReduceLogSum": 1,
    "ReduceLogSumExp": _T + 2,
    **dict.fromkeys(("ArgMax", "ArgMin", "CumSum", "CumProd"), 1),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), 1),
    "GlobalLpPool": 2,
    # Maximum, subtraction, exponential, sum, division.
    **dict.fromkeys(("Softmax", "LogSoftmax"), _T + 4),
    "Hardmax": 2,
    "LpNormalization": 3,
    # Subtract the mean, scale, and the learned scale and bias.
    "BatchNormalization": 4,
    # The same after two passes for mean and variance.
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization"), 7),
    "MeanVarianceNormalization": 5,
    # Square, sum, scale, learned scale.
    "RMSNormalization": 4,
    **dict.fromkeys(("NegativeLogLikelihoodLoss",), 2),
    "SoftmaxCrossEntropyLoss": _T + 6,
}
"""Operations for each element of the first input."""


@formula(*PER_INPUT)
def per_input(site: Site) -> Demand:
    return Demand(vector=site.count() * PER_INPUT[site.node.op_type])


@formula("LayerNormalization")
def layer_normalization(site: Site) -> Demand:
    """Mean, deviation, square, variance, scale, learned scale; one more with a bias."""
    return Demand(vector=site.count() * (7 if site.has(2) else 6))


@formula("MaxPool", "AveragePool", "LpPool")
def pool(site: Site) -> Demand:
    """One operation for each element under the window (two for an Lp norm)."""
    window = math.prod(site.attr("kernel_shape"))
    factor = 2 if site.node.op_type == "LpPool" else 1
    return Demand(vector=site.out_count() * window * factor)


@formula("LRN")
def local_response_normalization(site: Site) -> Demand:
    """Square, sum over the window, a multiply-add, a power, a division."""
    return Demand(vector=site.count() * (1 + site.attr("size") + 2 + 2 * _T + 1))


@formula("TopK")
def top_k(site: Site) -> Demand:
    """A heap of k for each row."""
    axis = site.attr("axis", -1)
    k = site.out_shape()[axis]
    return Demand(vector=site.count() * max(math.log2(max(k, 2)), 1.0))
