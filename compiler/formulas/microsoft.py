"""The operators of ONNX Runtime's domain ``com.microsoft`` that legalization produces or that
exported models carry.
"""

from __future__ import annotations

from dataclasses import replace

from trivium.compiler.formulas.dense import attention_demand, conv, gemm, matmul_demand
from trivium.compiler.formulas.movement import copy
from trivium.compiler.work import MICROSOFT, TRANSCENDENTAL, Demand, Product, Site, formula

_T = TRANSCENDENTAL

PER_ELEMENT = {
    **dict.fromkeys(("Gelu", "BiasGelu", "FastGelu", "QuickGelu"), _T + 5),
    "BiasAdd": 1,
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), 3),
    **dict.fromkeys(("QLinearAdd", "QLinearMul", "QLinearLeakyRelu"), 7),
    "QLinearSigmoid": 1,
    **dict.fromkeys(("BiasSoftmax", "QLinearSoftmax"), _T + 6),
    "RotaryEmbedding": 3,
}
"""Operations for each element of the output."""


@formula(*PER_ELEMENT, domain=MICROSOFT)
def elementwise(site: Site) -> Demand:
    return Demand(vector=float(site.out_count() * PER_ELEMENT[site.node.op_type]))


@formula("SkipLayerNormalization", "EmbedLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(site: Site) -> Demand:
    """The sum, then as LayerNormalization. Embedding tables are read by the row."""
    reads = {}
    if site.node.op_type == "EmbedLayerNormalization":
        reads = {index: site.out_bytes() for index in (2, 3, 4) if site.has(index)}
    return Demand(vector=float(site.out_count() * 9), reads=reads)


@formula("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
@formula("SimplifiedLayerNormalization")
def simplified_layer_normalization(site: Site) -> Demand:
    return Demand(vector=float(site.out_count() * 5))


@formula("QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearReduceMean", domain=MICROSOFT)
def qlinear_pool(site: Site) -> Demand:
    return Demand(vector=float(site.count()))


formula("QLinearConcat", domain=MICROSOFT)(copy)


@formula("FusedMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", domain=MICROSOFT)
def fused_matmul(site: Site) -> Demand:
    """As MatMul; where both operands are int8, in int8."""
    depth = site.shape()[-2 if site.attr("transA", 0) else -1]
    integer = site.node.op_type != "FusedMatMul"
    dtype = "int8" if integer else site.operand_dtype(0, 1)
    return matmul_demand(site, dtype, depth)


@formula("FusedGemm", domain=MICROSOFT)
def fused_gemm(site: Site) -> Demand:
    return gemm(site)


@formula("QGemm", domain=MICROSOFT)
def quantized_gemm(site: Site) -> Demand:
    depth = site.shape()[0 if site.attr("transA", 0) else 1]
    return matmul_demand(site, "int8", depth, right=3)


@formula("FusedConv", "NhwcFusedConv", domain=MICROSOFT)
def fused_conv(site: Site) -> Demand:
    base = conv(site)
    return replace(base, vector=base.vector + site.out_count())


@formula("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(site: Site) -> Demand:
    """A float product with weights that are unpacked on the way (2 operations each)."""
    depth, width = site.attr("K"), site.attr("N")
    base = matmul_demand(site, site.dtype, depth)
    return replace(base, vector=2.0 * depth * width)


@formula("GatherBlockQuantized", domain=MICROSOFT)
def gather_block_quantized(site: Site) -> Demand:
    """Reads the picked rows, and unpacks them."""
    bits = site.attr("bits", 4)
    picked = site.out_count() * bits / 8
    return Demand(vector=2.0 * site.out_count(), reads={0: picked, 2: 0.0, 3: 0.0})


@formula("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(site: Site) -> Demand:
    heads = site.attr("num_heads")
    batch, queries, width = site.shape()[0], site.shape()[1], site.out_shape()[-1]
    packed = len(site.shape()) == 5 or not site.has(1)
    key = site.shape() if packed else site.shape(1)
    keys = key[2] if len(key) == 4 else key[1]
    past = site.shape(6)[2] if site.has(6) else 0
    head = width // heads
    return attention_demand(batch, heads, queries, keys + past, head, head)


@formula("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(site: Site) -> Demand:
    """Keys are those of the cache when its length is known, else those of this call."""
    heads = site.attr("num_heads")
    batch, queries, width = site.out_shape()
    keys = site.out_shape(1)[2] if len(site.node.outputs) > 1 else queries
    head = width // heads
    kv_heads = site.attr("kv_num_heads", heads)
    base = attention_demand(batch, heads, queries, keys, head, head, kv_heads, causal=True)
    rotated = 3.0 * site.out_count() if site.attr("do_rotary", 0) else 0.0
    written = {i: site.out_bytes(i) * queries / max(keys, 1) for i in (1, 2)}
    kept = {i: w for i, w in written.items() if i < len(site.node.outputs)}
    return replace(base, vector=base.vector + rotated, writes=kept)


@formula("Attention", "QAttention", domain=MICROSOFT)
def attention(site: Site) -> Demand:
    """Projections to queries, keys and values in one product, then attention."""
    batch, queries, inputs = site.shape()
    projected = site.shape(1)[-1]
    width, heads = site.out_shape()[-1], site.attr("num_heads")
    past_index = 4 if site.node.op_type == "Attention" else 8
    past = site.shape(past_index)[3] if site.has(past_index) else 0
    head = width // heads
    scores = attention_demand(batch, heads, queries, queries + past, head, head)
    projection = Product(batch * queries, projected, inputs)
    return replace(scores, dense=scores.dense + projection.operations, product=projection)
