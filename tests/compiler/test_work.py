"""Work per operator: the whole standard is covered, and the usual layers agree with counts made
by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper as oh

import trivium.compiler.formulas  # noqa: F401  (fills the table)
from trivium.compiler import prepare
from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.types import Work
from trivium.compiler.work import (
    FORMULAS,
    MICROSOFT,
    TRANSCENDENTAL,
    formula,
    work_of,
    work_of_model,
)

FLOAT = onnx.TensorProto.FLOAT
Shape = tuple[int | str, ...]


def model_of(
    op_type: str,
    inputs: Mapping[str, Shape | np.ndarray[Any, Any]],
    outputs: Mapping[str, Shape],
    domain: str = "",
    dtype: int = FLOAT,
    **attributes: Any,
) -> ir.Model:
    """A model of one node; an array among the inputs is an initializer."""
    arrays = {n: v for n, v in inputs.items() if isinstance(v, np.ndarray)}
    shapes = {n: v for n, v in inputs.items() if isinstance(v, tuple)}
    graph = oh.make_graph(
        [
            oh.make_node(
                op_type,
                [n.strip("_") for n in inputs],
                list(outputs),
                "n",
                domain=domain,
                **attributes,
            )
        ],
        "g",
        [oh.make_tensor_value_info(n, dtype, s) for n, s in shapes.items() if n.strip("_")],
        [oh.make_tensor_value_info(n, dtype, s) for n, s in outputs.items()],
        [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    opsets = [oh.make_opsetid("", 24), oh.make_opsetid(MICROSOFT, 1)]
    return ir.serde.deserialize_model(oh.make_model(graph, opset_imports=opsets))


def work(op_type: str, inputs: Any, outputs: Any, **more: Any) -> Work:
    return work_of(model_of(op_type, inputs, outputs, **more).graph[0])


def standard_operators() -> list[str]:
    schemas = onnx.defs.get_all_schemas_with_history()
    return sorted({s.name for s in schemas if s.domain == "" and s.since_version <= 24})


@pytest.mark.parametrize("op_type", standard_operators())
def test_every_operator_of_opset_24_has_a_formula(op_type: str) -> None:
    assert ("", op_type) in FORMULAS


def test_a_second_formula_for_an_operator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two work formulas for ai\.onnx::Conv"):
        formula("Conv")(lambda site: FORMULAS["", "Conv"](site))


# --- counts made by hand -------------------------------------------------------------------------


def test_matmul() -> None:
    found = work("MatMul", {"a": (2, 3, 4), "b": (4, 5)}, {"y": (2, 3, 5)})
    assert found.operations == {"float32": 2 * 2 * 3 * 5 * 4}
    assert found.bytes_read == 4 * (2 * 3 * 4 + 4 * 5)
    assert found.bytes_written == 4 * 2 * 3 * 5
    assert found.bytes_resident == 0


def test_gemm_with_bias_and_transposed_weights() -> None:
    weights = np.zeros((10, 64), np.float32)
    bias = np.zeros(10, np.float32)
    found = work("Gemm", {"x": (8, 64), "w": weights, "b": bias}, {"y": (8, 10)}, transB=1)
    assert found.operations == {"float32": 2 * 8 * 10 * 64 + 8 * 10}
    assert found.bytes_resident == 4 * (640 + 10)


@pytest.mark.parametrize(
    ("kernel", "out", "attributes", "products"),
    [
        # The first convolution of ResNet-50: 118 013 952 multiply-adds (He et al. 2015).
        ((64, 3, 7, 7), (1, 64, 112, 112), {"strides": [2, 2]}, 118_013_952),
        ((32, 1, 3, 3), (1, 32, 112, 112), {"group": 32}, 32 * 112 * 112 * 9),
        ((8, 4, 3, 3), (1, 8, 10, 10), {"group": 2, "dilations": [2, 2]}, 8 * 100 * 4 * 9),
    ],
)
def test_convolution(
    kernel: tuple[int, ...], out: tuple[int, ...], attributes: dict[str, Any], products: int
) -> None:
    x = (1, kernel[1] * attributes.get("group", 1), 224, 224)
    found = work("Conv", {"x": x, "w": kernel}, {"y": out}, **attributes)
    assert found.operations == {"float32": 2 * products}


def test_transposed_convolution_spreads_each_input() -> None:
    found = work("ConvTranspose", {"x": (1, 16, 8, 8), "w": (16, 4, 2, 2)}, {"y": (1, 4, 16, 16)})
    assert found.operations == {"float32": 2 * (16 * 8 * 8) * (4 * 2 * 2)}


def test_layer_normalization_is_seven_operations_an_element() -> None:
    shapes = {"x": (2, 5, 384), "scale": (384,), "bias": (384,)}
    assert work("LayerNormalization", shapes, {"y": (2, 5, 384)}).operations == {
        "float32": 7 * 2 * 5 * 384
    }


@pytest.mark.parametrize("packed", [False, True])
def test_attention_with_a_past(packed: bool) -> None:
    batch, heads, kv_heads, tokens, past, head = 2, 8, 4, 3, 5, 16
    keys = tokens + past
    if packed:
        shapes: dict[str, Shape] = {
            "q": (batch, tokens, heads * head),
            "k": (batch, tokens, kv_heads * head),
            "v": (batch, tokens, kv_heads * head),
        }
        out: Shape = (batch, tokens, heads * head)
    else:
        shapes = {
            "q": (batch, heads, tokens, head),
            "k": (batch, kv_heads, tokens, head),
            "v": (batch, kv_heads, tokens, head),
        }
        out = (batch, heads, tokens, head)
    cache: Shape = (batch, kv_heads, past, head)
    shapes |= {"_": (), "pk": cache, "pv": cache}
    present: Shape = (batch, kv_heads, keys, head)
    attributes = {"q_num_heads": heads, "kv_num_heads": kv_heads} if packed else {}
    found = work("Attention", shapes, {"y": out, "nk": present, "nv": present}, **attributes)
    pairs = batch * heads * tokens * keys
    assert found.operations == {"float32": 2 * pairs * 2 * head + pairs * (TRANSCENDENTAL + 6)}


def test_lstm() -> None:
    length, batch, inputs, hidden = 7, 2, 10, 20
    found = work(
        "LSTM",
        {
            "x": (length, batch, inputs),
            "w": (1, 4 * hidden, inputs),
            "r": (1, 4 * hidden, hidden),
        },
        {"y": (length, 1, batch, hidden)},
        hidden_size=hidden,
    )
    products = length * batch * 4 * hidden * (inputs + hidden)
    assert found.operations["float32"] - 2 * products == length * batch * hidden * (
        5 * TRANSCENDENTAL + 18
    )


def test_a_bidirectional_gru_does_twice_the_work() -> None:
    def gru(directions: int) -> Work:
        shapes = {"x": (7, 2, 10), "w": (directions, 60, 10), "r": (directions, 60, 20)}
        return work("GRU", shapes, {"y": (7, directions, 2, 20)}, hidden_size=20)

    assert gru(2).total_operations == 2 * gru(1).total_operations


def test_einsum_with_an_ellipsis() -> None:
    shapes = {"a": (2, 3, 4, 5), "b": (2, 3, 5, 6)}
    found = work("Einsum", shapes, {"y": (2, 3, 4, 6)}, equation="...ij,...jk->...ik")
    assert found.operations == {"float32": 2 * 2 * 3 * 4 * 5 * 6}


def test_max_pool_compares_each_element_under_the_window() -> None:
    found = work("MaxPool", {"x": (1, 8, 16, 16)}, {"y": (1, 8, 8, 8)}, kernel_shape=[3, 3])
    assert found.operations == {"float32": 8 * 8 * 8 * 9}


def test_a_view_moves_nothing() -> None:
    shape = np.array([4, 6], np.int64)
    found = work("Reshape", {"x": (2, 3, 4), "shape": shape}, {"y": (4, 6)})
    assert (found.total_operations, found.bytes_moved) == (0, 0)


def test_gather_reads_the_rows_that_it_picks() -> None:
    table = np.zeros((30_000, 384), np.float32)
    indices = np.zeros((1, 128), np.int64)
    found = work("Gather", {"table": table, "ids": indices}, {"y": (1, 128, 384)})
    assert found.bytes_read == 4 * 128 * 384 + 8 * 128
    assert found.bytes_resident == table.nbytes + indices.nbytes


def test_matmul_nbits_holds_half_a_byte_a_weight() -> None:
    weights = np.zeros((256, 4, 16), np.uint8)
    scales = np.zeros((256 * 4,), np.float32)
    found = work(
        "MatMulNBits",
        {"x": (1, 128), "w": weights, "s": scales},
        {"y": (1, 256)},
        domain=MICROSOFT,
        K=128,
        N=256,
        bits=4,
        block_size=32,
    )
    assert found.bytes_resident == 128 * 256 / 2 + scales.nbytes
    assert found.operations == {"float32": 2 * 128 * 256 + 2 * 128 * 256}


def test_group_query_attention_reads_the_whole_cache_and_writes_one_token() -> None:
    batch, heads, kv_heads, head, keys = 1, 8, 2, 64, 100
    cache: Shape = (batch, kv_heads, keys, head)
    found = work(
        "GroupQueryAttention",
        {
            "q": (batch, 1, heads * head),
            "k": (batch, 1, kv_heads * head),
            "v": (batch, 1, kv_heads * head),
            "pk": cache,
            "pv": cache,
        },
        {"y": (batch, 1, heads * head), "nk": cache, "nv": cache},
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=kv_heads,
    )
    assert found.operations["float32"] == heads * keys * (4 * head + TRANSCENDENTAL + 6)
    assert found.bytes_written == 4 * (heads * head + 2 * kv_heads * head)


# --- quantization --------------------------------------------------------------------------------


def quantized(weight_type: int, *, activations: bool) -> ir.Model:
    """``y = x @ dequantize(w)``, with ``x`` quantized too or not."""
    through = (
        "xq = QuantizeLinear(x, s, zx)  xd = DequantizeLinear(xq, s, zx)"
        if activations
        else "xd = Identity(x)"
    )
    proto = onnx.parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    agraph (float[1, 64] x) => (float[1, 32] y) <float s = {{0.1}}, int8 zx = {{0}}>
    {{
      {through}
      wd = DequantizeLinear<axis = 1>(w, sw)
      y = MatMul(xd, wd)
    }}
    """)
    size = 64 * 32 // (2 if weight_type == onnx.TensorProto.INT4 else 1)
    scales = onnx.numpy_helper.from_array(np.ones(32, np.float32), "sw")
    weights = oh.make_tensor("w", weight_type, [64, 32], bytes(size), raw=True)
    proto.graph.initializer.extend([weights, scales])
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def test_a_product_of_two_quantized_tensors_is_integer_work() -> None:
    matmul = quantized(onnx.TensorProto.INT8, activations=True).graph[-1]
    assert work_of(matmul).operations == {"int8": 2 * 64 * 32}


def test_weights_quantized_alone_are_multiplied_as_floats_and_held_packed() -> None:
    model = quantized(onnx.TensorProto.INT4, activations=False)
    assert work_of(model.graph[-1]).operations == {"float32": 2 * 64 * 32}
    held = work_of_model(model).bytes_resident
    assert held == 64 * 32 / 2 + 32 * 4 + 4 + 1


# --- models --------------------------------------------------------------------------------------


def test_weights_shared_by_two_nodes_are_held_once() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    agraph (float[4, 4] x) => (float[4, 4] z) <float[4, 4] w = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}>
    {
      y = MatMul(x, w)
      z = MatMul(y, w)
    }
    """
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.serde.deserialize_model(proto)
    assert work_of_model(model).bytes_resident == 64
    assert sum(work_of(node).bytes_resident for node in model.graph) == 128


def test_a_scan_runs_its_body_for_each_step(shared_data: Callable[[str], Path]) -> None:
    totals = []
    for steps in (5, 10):
        model, _ = prepare.optimize(shared_data("models/scan_1.onnx"), shape=[f"Sequence={steps}"])
        totals.append(work_of_model(model).total_operations)
    assert totals[1] == 2 * totals[0]


def test_resnet_20_has_41_million_multiply_adds(shared_data: Callable[[str], Path]) -> None:
    """40.8 million in convolutions and the classifier (https://arxiv.org/abs/1512.03385, 4.2)."""
    model, _ = prepare.optimize(shared_data("models/cifar_resnet20.onnx"), shape=["N=1"])
    products = sum(
        work_of(node).total_operations for node in model.graph if node.op_type in ("Conv", "Gemm")
    )
    assert products / 2 == pytest.approx(40.6e6, rel=0.02)


# --- what cannot be counted ----------------------------------------------------------------------


def test_a_symbolic_dimension_is_named() -> None:
    node = model_of("Relu", {"x": ("batch", 3)}, {"y": ("batch", 3)}).graph[0]
    with pytest.raises(BadInput, match=r"'batch'.*--shape"):
        work_of(node)


def test_an_unknown_operator_is_named() -> None:
    node = model_of("Frobnicate", {"x": (3,)}, {"y": (3,)}, domain="com.example").graph[0]
    with pytest.raises(Unsupported, match=r"com\.example::Frobnicate"):
        work_of(node)


def test_a_loop_of_unknown_length_is_named() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    agraph (int64 trips, bool keep, float[2] x) => (float[2] y)
    {
      y = Loop (trips, keep, x) <body = b (int64 i, bool c, float[2] a) => (bool c2, float[2] a2)
        { c2 = Identity(c)  a2 = Add(a, a) }>
    }
    """
    node = ir.serde.deserialize_model(onnx.parser.parse_model(text)).graph[0]
    with pytest.raises(BadInput, match="how often the loop runs"):
        work_of(node)


# --- properties ----------------------------------------------------------------------------------


SIZES = st.integers(1, 64)


@given(SIZES, SIZES, SIZES, st.integers(1, 5))
def test_work_grows_with_the_batch(rows: int, depth: int, columns: int, factor: int) -> None:
    def product(batch: int) -> Work:
        shapes = {"a": (batch, rows, depth), "b": (depth, columns)}
        return work("MatMul", shapes, {"y": (batch, rows, columns)})

    once, many = product(1), product(factor)
    assert many.total_operations == factor * once.total_operations
    assert many.bytes_written == factor * once.bytes_written
    assert many.bytes_moved <= factor * once.bytes_moved


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from(["Relu", "Exp", "Gelu"])
)
def test_elementwise_work_reads_and_writes_each_element_once(shape: list[int], op: str) -> None:
    found = work(op, {"x": tuple(shape)}, {"y": tuple(shape)})
    assert found.bytes_read == found.bytes_written == 4 * np.prod(shape)
    assert found.total_operations % np.prod(shape) == 0


def test_nested_branches_cost_no_more_than_their_number(
    shared_data: Callable[[str], Path],
) -> None:
    from trivium.compiler import model

    # 20 levels: summing a branch anew at every level would take 2^20 steps.
    nested = model.load(shared_data("bad/nested_if_20.onnx"))
    assert work_of_model(nested).total_operations < 1000
