"""Operators that matrix units do: products, convolutions, attention, recurrent layers."""

from __future__ import annotations

import math
from dataclasses import replace

from trivium.compiler.errors import Unsupported
from trivium.compiler.work import TRANSCENDENTAL, AttentionSize, Demand, Product, Site, formula

_T = TRANSCENDENTAL


def product_of(site: Site, depth: int, right: int = 1, out: int = 0) -> Product:
    """The product behind a MatMul of any rank; one matrix for the whole batch makes one product."""
    shape = site.out_shape(out)
    width = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    if len(site.shape(right)) <= 2:
        return Product(rows, width, depth, row=width)
    batch = math.prod(site.shape(right)[:-2])
    return Product(rows / max(batch, 1), width, depth, batch, width)


def matmul_demand(site: Site, dtype: str, depth: int, right: int = 1) -> Demand:
    """2 x (elements of the output) x (length of the sum)."""
    product = product_of(site, depth, right)
    return Demand(2.0 * site.out_count() * depth, dtype=dtype, product=product)


@formula("MatMul")
def matmul(site: Site) -> Demand:
    return matmul_demand(site, site.operand_dtype(0, 1), site.shape()[-1])


@formula("MatMulInteger")
def integer_matmul(site: Site) -> Demand:
    return matmul_demand(site, "int8", site.shape()[-1])


@formula("QLinearMatMul")
def qlinear_matmul(site: Site) -> Demand:
    return matmul_demand(site, "int8", site.shape()[-1], right=3)


@formula("Gemm")
def gemm(site: Site) -> Demand:
    depth = site.shape()[0 if site.attr("transA", 0) else 1]
    base = matmul_demand(site, site.operand_dtype(0, 1), depth)
    return replace(base, vector=float(site.out_count()) if site.has(2) else 0.0)


@formula("Einsum")
def einsum(site: Site) -> Demand:
    """2 x the product of all index sizes, for each operand after the first."""
    equation = site.attr("equation").replace(" ", "")
    operands = equation.split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for index, labels in enumerate(operands):
        shape = site.shape(index)
        named = labels.replace("...", "")
        spare = len(shape) - len(named)
        at = labels.index("...") if "..." in labels else len(named)
        labelled = [*named[:at], *(f"...{spare - i}" for i in range(spare)), *named[at:]]
        for label, size in zip(labelled, shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    total = float(math.prod(sizes.values()))
    if len(operands) == 1:
        return Demand(vector=total)
    return Demand(2.0 * total * (len(operands) - 1), dtype=site.operand_dtype(0, 1))


def convolution(site: Site, weight: int, bias: int, dtype: str) -> Demand:
    """2 x outputs x (input channels of a group x window), whatever the strides and dilations."""
    kernel = site.shape(weight)
    depth = math.prod(kernel[1:])
    shape = site.out_shape()
    groups = site.attr("group", 1)
    pixels = float(shape[0] * math.prod(shape[2:]))
    strides = site.attr("strides") or (1,)
    row = shape[-1] if strides[-1] == 1 else 1
    return Demand(
        2.0 * site.out_count() * depth,
        float(site.out_count()) if site.has(bias) else 0.0,
        dtype=dtype,
        product=Product(pixels, shape[1] / groups, depth, groups, row, math.prod(kernel[2:])),
    )


@formula("Conv")
def conv(site: Site) -> Demand:
    return convolution(site, 1, 2, site.operand_dtype(0, 1))


@formula("ConvInteger")
def conv_integer(site: Site) -> Demand:
    return convolution(site, 1, len(site.node.inputs), "int8")


@formula("QLinearConv")
def qlinear_conv(site: Site) -> Demand:
    return convolution(site, 3, 8, "int8")


@formula("ConvTranspose")
def conv_transpose(site: Site) -> Demand:
    """Each input element is spread over (output channels of a group x window)."""
    product = 2.0 * site.count() * math.prod(site.shape(1)[1:])
    bias = float(site.out_count()) if site.has(2) else 0.0
    return Demand(product, bias, dtype=site.operand_dtype(0, 1))


@formula("DeformConv")
def deform_conv(site: Site) -> Demand:
    """A convolution over samples that are interpolated (8 operations each)."""
    base = convolution(site, 1, 3, site.dtype)
    window = math.prod(site.shape(1)[2:])
    pixels = math.prod(site.out_shape()[2:]) * site.out_shape()[0]
    return replace(base, vector=base.vector + 8.0 * site.shape()[1] * pixels * window)


@formula("CausalConvWithState")
def causal_conv(site: Site) -> Demand:
    """A depthwise convolution along the sequence."""
    taps = site.shape(1)[-1]
    extra = (_T + 3 if site.attr("activation", "none") not in ("none", "") else 0) + site.has(2)
    return Demand(2.0 * site.out_count() * taps, float(site.out_count() * extra))


# --- recurrent layers ----------------------------------------------------------------------------

# Gates, and vector operations for each hidden element: activations, products, sums.
GATES = {"RNN": (1, _T + 2), "GRU": (3, 3 * _T + 14), "LSTM": (4, 5 * _T + 18)}


@formula(*GATES)
def recurrent(site: Site) -> Demand:
    """Each step multiplies the input and the state by the matrices of all gates."""
    gates, activation = GATES[site.node.op_type]
    length, batch, inputs = site.shape()
    if site.attr("layout", 0):
        length, batch = batch, length
    directions, _, hidden = site.shape(2)
    steps = float(length * batch * directions)
    product = 2.0 * steps * gates * hidden * (inputs + hidden)
    return Demand(product, steps * hidden * activation)


# --- attention -----------------------------------------------------------------------------------


def attention_demand(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head: int,
    value_head: int,
    kv_heads: int | None = None,
    *,
    causal: bool = False,
) -> Demand:
    """Scores and their application, softmax between; masked scores are counted like the others."""
    pairs = float(batch * heads * queries * keys)
    size = AttentionSize(
        batch, heads, kv_heads or heads, queries, keys, (head + value_head) / 2, causal
    )
    return Demand(2.0 * pairs * (head + value_head), pairs * (_T + 6), attention=size)


def _heads(site: Site, index: int, count: int) -> tuple[int, int, int, int]:
    """(batch, heads, length, width) of a 4-D or packed 3-D input."""
    shape = site.shape(index)
    if len(shape) == 4:
        batch, heads, length, width = shape
        return batch, heads, length, width
    batch, length, width = shape
    return batch, count, length, width // max(count, 1)


@formula("Attention")
def attention(site: Site) -> Demand:
    batch, heads, queries, head = _heads(site, 0, site.attr("q_num_heads", 0))
    _, kv_heads, keys, _ = _heads(site, 1, site.attr("kv_num_heads", 0))
    _, _, _, value_head = _heads(site, 2, kv_heads)
    past = site.shape(4)[2] if site.has(4) else 0
    causal = bool(site.attr("is_causal", 0))
    demand = attention_demand(
        batch, heads, queries, keys + past, head, value_head, kv_heads, causal=causal
    )
    if not site.has(4):
        return demand
    # A cache grows by what is new.
    grown = {i: site.bytes(i) for i in (1, 2) if i < len(site.node.outputs)}
    return replace(demand, writes=grown)


@formula("LinearAttention")
def linear_attention(site: Site) -> Demand:
    """Each token updates and reads a state of (head x head) elements."""
    shape = site.shape()
    heads = site.attr("q_num_heads", 1) or 1
    if len(shape) == 3:
        batch, tokens, head = shape[0], shape[1], shape[2] // heads
    else:
        batch, heads, tokens, head = shape
    state = float(batch * heads * tokens * head * head)
    return Demand(4.0 * state, state)


# --- transforms ----------------------------------------------------------------------------------


def fourier(length: int, transforms: float) -> Demand:
    """5 n log2 n operations each, as fast Fourier transforms are usually counted."""
    return Demand(vector=5.0 * length * math.log2(max(length, 2)) * transforms)


@formula("DFT")
def dft(site: Site) -> Demand:
    axis = site.constant(2)
    shape = site.shape()
    at = int(axis.reshape(())) if axis is not None else -2
    transforms = math.prod(shape) / max(shape[at] * shape[-1], 1)
    given = site.constant(1)
    return fourier(int(given.reshape(())) if given is not None else shape[at], transforms)


@formula("STFT")
def stft(site: Site) -> Demand:
    batch, frames = site.out_shape()[:2]
    given = site.constant(3)
    length = int(given.reshape(())) if given is not None else site.count(2)
    if length == 0:
        raise Unsupported("the frame length of STFT is not a constant", about=site.node.name or "")
    base = fourier(length, float(batch * frames))
    return replace(base, vector=base.vector + float(batch * frames * length))


@formula("Det")
def determinant(site: Site) -> Demand:
    """Elimination: 2/3 n^3 for each matrix."""
    *batch, size, _ = site.shape()
    return Demand(vector=math.prod(batch) * 2 / 3 * size**3)
