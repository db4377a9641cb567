"""Each of the ten rules finds what breaks it and leaves alone what keeps it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.backends.tensorrt import qdq_lint
from trivium.backends.tensorrt.qdq_lint import lint

F, H, I8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8
E4M3 = ir.DataType.FLOAT8E4M3FN
TYPES = {
    I8: np.int8,
    E4M3: ml_dtypes.float8_e4m3fn,
    ir.DataType.FLOAT8E5M2: ml_dtypes.float8_e5m2,
    ir.DataType.INT4: ml_dtypes.int4,
}


class Net:
    """Builds small quantized graphs in float16, in which only the rule at hand is broken."""

    def __init__(self) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="g")
        self._count = 0

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def input(self, shape: list[int], dtype: ir.DataType = H) -> ir.Value:
        value = ir.val(self._name("x"), dtype, shape)
        self.graph.inputs.append(value)
        return value

    def stored(self, array: Any) -> ir.Value:
        name = self._name("c")
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.val(name, tensor.dtype, tensor.shape.numpy())
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value

    def add(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        shape: list[int],
        dtype: ir.DataType = H,
        **attributes: Any,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=self._name(op_type))
        out = node.outputs[0]
        out.name, out.dtype, out.shape = f"{node.name}_y", dtype, ir.Shape(shape)
        self.graph.append(node)
        return out

    def pair(
        self,
        value: ir.Value,
        *,
        scale: Any = 0.1,
        zero: Any = 0,
        codes: ir.DataType = I8,
        **attributes: Any,
    ) -> ir.Value:
        """Q then DQ."""
        assert value.shape is not None
        shape = [int(size) for size in value.shape.numpy()]
        scales = self.stored(np.asarray(scale, np.float16))
        zeros = self.stored(np.full(np.shape(scale), zero, TYPES[codes]))
        coded = self.add("QuantizeLinear", [value, scales, zeros], shape, codes, **attributes)
        return self.add("DequantizeLinear", [coded, scales, zeros], shape, **attributes)

    def weight(
        self,
        shape: list[int],
        *,
        codes: ir.DataType = I8,
        scale: Any = 0.01,
        fill: float | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """A stored weight in codes that reach the top of their range, then DQ."""
        top = {I8: 127, ir.DataType.INT4: 7}.get(codes, 448) if fill is None else fill
        array = np.full(shape, top, np.float32).astype(TYPES[codes])
        scales = self.stored(np.asarray(scale, np.float16))
        return self.add("DequantizeLinear", [self.stored(array), scales], shape, **attributes)

    def conv(
        self, data: ir.Value, weight: ir.Value, shape: list[int], bias: ir.Value | None = None
    ) -> ir.Value:
        return self.add("Conv", [data, weight, bias], shape)

    def broken(self, *outputs: ir.Value) -> set[int]:
        self.graph.outputs.extend(outputs)
        return {finding.rule for finding in lint(ir.Model(self.graph, ir_version=10))}


IMAGE, KERNEL = [1, 32, 8, 8], [32, 32, 3, 3]


def good_conv(net: Net, **pair: Any) -> ir.Value:
    return net.conv(net.pair(net.input(IMAGE), **pair), net.weight(KERNEL), IMAGE)


def test_well_quantized_conv_breaks_nothing() -> None:
    net = Net()
    assert net.broken(good_conv(net)) == set()


def test_float_graph_is_no_business_of_the_linter() -> None:
    net = Net()
    x = net.input([1, 4], F)
    assert net.broken(net.add("MatMul", [x, net.stored(np.ones((4, 2), np.float32))], [1, 2])) == (
        set()
    )


@pytest.mark.parametrize("pair", [{"zero": 3}, {"scale": 0.0}, {"scale": -0.1}])
def test_rule_1_symmetric(pair: dict[str, Any]) -> None:
    net = Net()
    assert net.broken(good_conv(net, **pair)) == {1}


def test_rule_1_scale_computed_at_run_time() -> None:
    net = Net()
    scale = net.input([])
    coded = net.add("QuantizeLinear", [net.input(IMAGE), scale], IMAGE, I8)
    data = net.add("DequantizeLinear", [coded, scale], IMAGE)
    assert net.broken(net.conv(data, net.weight(KERNEL), IMAGE)) == {1}


def test_rule_2_activations_have_one_scale() -> None:
    net = Net()
    assert net.broken(good_conv(net, scale=np.full(32, 0.1), axis=1)) == {2}


@pytest.mark.parametrize(("axis", "broken"), [(0, set()), (1, {2})])
def test_rule_2_weights_along_output_channels(axis: int, broken: set[int]) -> None:
    net = Net()
    weight = net.weight(KERNEL, scale=np.full(32, 0.01), axis=axis)
    assert net.broken(net.conv(net.pair(net.input(IMAGE)), weight, IMAGE)) == broken


def test_rule_2_bias_stays_in_float() -> None:
    net = Net()
    data = net.pair(net.input(IMAGE))
    assert net.broken(net.conv(data, net.weight(KERNEL), IMAGE, net.weight([32]))) == {2}


def test_rule_3_both_operands() -> None:
    net = Net()
    half = net.conv(net.input(IMAGE), net.weight(KERNEL), IMAGE)
    assert net.broken(half) == {3}


@pytest.mark.parametrize("shared", [True, False])
def test_rule_3_one_pair_for_all_readers(shared: bool) -> None:
    net = Net()
    x = net.input(IMAGE)
    first = net.pair(x)
    second = first if shared else net.pair(x)
    one = net.conv(first, net.weight(KERNEL), IMAGE)
    two = net.conv(second, net.weight(KERNEL), IMAGE)
    assert net.broken(one, two) == (set() if shared else {3})


def test_rule_3_no_quantized_output_for_its_own_sake() -> None:
    net = Net()
    assert net.broken(net.add("Sigmoid", [net.pair(good_conv(net))], IMAGE)) == {3}


@pytest.mark.parametrize(
    ("own", "branch", "broken"),
    [(False, True, set()), (True, True, {4}), (False, False, {4})],
)
def test_rule_4_residual_branch(own: bool, branch: bool, broken: set[int]) -> None:
    net = Net()
    x = net.input(IMAGE)
    quantized = net.pair(x)
    out = net.conv(quantized, net.weight(KERNEL), IMAGE)
    left = net.pair(out) if own else out
    right = quantized if branch else net.add("Relu", [net.input(IMAGE)], IMAGE)
    assert net.broken(net.add("Add", [left, right], IMAGE)) == broken


@pytest.mark.parametrize(
    ("m", "k", "n", "broken"),
    [(32, 64, 64, set()), (1, 64, 64, {5}), (32, 64, 1, {5}), (32, 8, 64, {5}), (32, 64, 8, {5})],
)
def test_rule_5_thin_products(m: int, k: int, n: int, broken: set[int]) -> None:
    net = Net()
    data, weight = net.pair(net.input([m, k])), net.weight([k, n])
    assert net.broken(net.add("MatMul", [data, weight], [m, n])) == broken


@pytest.mark.parametrize(
    ("kernel", "codes", "broken"),
    [
        ([8, 8, 3, 3], I8, set()),
        ([12, 32, 3, 3], I8, {5}),
        ([32, 3, 3, 3], I8, {5}),
        ([32, 32, 3, 3], E4M3, set()),
        ([16, 32, 3, 3], E4M3, {5}),
        ([32, 32, 32, 32], E4M3, {5}),
    ],
)
def test_rule_5_thin_convolutions(kernel: list[int], codes: ir.DataType, broken: set[int]) -> None:
    net = Net()
    data = net.pair(net.input([1, kernel[1], 40, 40]), codes=codes)
    out = net.conv(data, net.weight(kernel, codes=codes), [1, kernel[0], 40, 40])
    assert net.broken(out) == broken


def test_rule_5_weights_are_constants() -> None:
    net = Net()
    data, weight = net.pair(net.input(IMAGE)), net.pair(net.input(KERNEL))
    assert net.broken(net.conv(data, weight, IMAGE)) == {5}


@pytest.mark.parametrize(
    ("codes", "length", "head", "second", "broken"),
    [
        (I8, 512, 64, True, set()),
        (I8, 513, 64, True, {6}),
        (E4M3, 1024, 64, True, set()),
        (E4M3, 64, 264, True, {6}),
        (E4M3, 64, 64, False, {6}),
    ],
)
def test_rule_6_attention(
    codes: ir.DataType, length: int, head: int, second: bool, broken: set[int]
) -> None:
    net = Net()
    rows, columns = [1, 2, length, head], [1, 2, head, length]
    square = [1, 2, length, length]
    query, key = net.pair(net.input(rows), codes=codes), net.pair(net.input(columns), codes=codes)
    scores = net.add("MatMul", [query, key], square)
    scaled = net.add("Mul", [scores, net.stored(np.float16(0.125))], square)
    weights = net.add("Softmax", [scaled], square)
    value = net.input(rows)
    if second:
        weights, value = net.pair(weights, codes=codes), net.pair(value, codes=codes)
    assert net.broken(net.add("MatMul", [weights, value], rows)) == broken


@pytest.mark.parametrize(
    ("codes", "fill", "broken"),
    [(E4M3, 448.0, set()), (E4M3, 36.0, {7}), (ir.DataType.FLOAT8E5M2, 448.0, {7})],
)
def test_rule_7_fp8(codes: ir.DataType, fill: float, broken: set[int]) -> None:
    net = Net()
    data = net.pair(net.input(IMAGE), codes=E4M3)
    weight = net.weight(KERNEL, codes=codes, fill=fill)
    assert net.broken(net.conv(data, weight, IMAGE)) == broken


@pytest.mark.parametrize(
    ("axis", "block", "rows", "broken"),
    [(0, 16, 4, set()), (1, 16, 4, {8}), (0, 0, 1, {8}), (0, 16, 2, {8})],
)
def test_rule_8_int4(axis: int, block: int, rows: int, broken: set[int]) -> None:
    net = Net()
    scales = np.full((rows, 64), 0.1)
    attributes = {"axis": axis, **({"block_size": block} if block else {})}
    weight = net.weight([64, 64], codes=ir.DataType.INT4, scale=scales, **attributes)
    assert net.broken(net.add("MatMul", [net.input([32, 64]), weight], [32, 64])) == broken


@pytest.mark.parametrize(("second", "broken"), [(0.1, set()), (0.2, {9})])
def test_rule_9_concat_shares_a_scale(second: float, broken: set[int]) -> None:
    net = Net()
    pairs = [net.pair(net.input(IMAGE), scale=scale) for scale in (0.1, second)]
    joined = net.add("Concat", [*pairs], [1, 64, 8, 8], axis=1)
    assert net.broken(joined) == broken


@pytest.mark.parametrize(("dtype", "broken"), [(H, set()), (F, {10})])
def test_rule_10_the_rest_is_explicit(dtype: ir.DataType, broken: set[int]) -> None:
    net = Net()
    weight = net.stored(np.ones((64, 64), np.float32).astype(np.float16))
    rest = net.add("MatMul", [net.input([32, 64], dtype), weight], [32, 64], dtype)
    assert net.broken(good_conv(net), rest) == broken


def test_findings_name_the_node() -> None:
    net = Net()
    net.graph.outputs.append(good_conv(net, zero=3))
    found = [str(finding) for finding in lint(ir.Model(net.graph, ir_version=10))]
    assert found == [
        "QuantizeLinear4: its zero point 3 is not 0 (Q/DQ rule 1)",
        "DequantizeLinear5: its zero point 3 is not 0 (Q/DQ rule 1)",
    ]


def test_there_are_ten_rules() -> None:
    assert sorted(qdq_lint.RULES) == list(range(1, 11))


@given(st.floats(1e-3, 1e3))
def test_fp8_scale_covers_the_range_of_the_int8_one(amax: float) -> None:
    """Derived, not quoted: both scales put ``amax`` on the top code, so fp8's is 127/448 of it."""
    scale = qdq_lint.fp8_scale_from_int8(qdq_lint.int8_scale(amax))
    top = np.float32(amax / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert top == 448.0
    assert scale == pytest.approx(qdq_lint.fp8_scale(amax))
    assert scale == pytest.approx(qdq_lint.int8_scale(amax) * 127 / 448)
