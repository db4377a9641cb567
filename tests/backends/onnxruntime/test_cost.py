"""Which nodes ONNX Runtime makes one kernel of, as the cost model sees it."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from trivium.backends.onnxruntime.cost import melts
from trivium.compiler.kernels import kernels_of

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'

IMAGE = "float[1,16,8,8]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The sum of two results of convolutions is part of the second one.
        (
            f"""f ({IMAGE} x, float[16,16,1,1] w) => ({IMAGE} y) {{
                a = Conv(x, w) b = Relu(a) c = Conv(b, w) d = Add(c, b) y = Relu(d) }}""",
            ["Conv+Relu", "Conv+Add+Relu"],
        ),
        # What was never in blocks of channels is added by a kernel of its own.
        (
            f"""f ({IMAGE} x, float[16,16,1,1] w) => ({IMAGE} y) {{
                c = Conv(x, w) d = Add(c, x) y = Relu(d) }}""",
            ["Conv", "Add", "Relu"],
        ),
        # A bias is part of its product; a sum of two results, of the normalization behind it.
        (
            """f (float[4,8] x, float[8,8] w, float[8] s) => (float[4,8] y)
                <float[8] bias = {0, 0, 0, 0, 0, 0, 0, 0}> {
                a = MatMul(x, w) b = Add(a, bias) c = Add(b, x) y = LayerNormalization(c, s) }""",
            ["MatMul+Add", "Add+LayerNormalization"],
        ),
        (
            "f (float[4,8] x) => (float[4,8] y) { a = Mul(x, x) y = Add(a, x) }",
            ["Mul", "Add"],
        ),
    ],
)
def test_kernels_are_those_of_the_engine(text: str, expected: list[str]) -> None:
    model = ir.from_onnx_text(HEADER + text)
    ShapeInferencePass()(model)
    found = ["+".join(kernel.op_types) for kernel in kernels_of(model.graph, melts)]
    assert found == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Convolutions and sums have kernels of integers, which cut to range what a ReLU would.
        (
            """f (int8[1,16,8,8] x, float s, int8 z, int8[16,16,1,1] w) => (int8[1,16,8,8] y) {
                a = DequantizeLinear(x, s, z) k = DequantizeLinear(w, s, z)
                c = Conv(a, k) r = Relu(c) q = QuantizeLinear(r, s, z)
                d = DequantizeLinear(q, s, z) e = Add(d, a) t = Relu(e)
                y = QuantizeLinear(t, s, z) }""",
            ["Conv+Relu+QuantizeLinear", "Add+Relu+QuantizeLinear"],
        ),
        # A product of integers gives floats, and takes no bias: a Gelu does.
        (
            """f (int8[4,8] x, float s, int8 z, int8[8,8] w) => (float[4,8] y)
                <float[8] b = {0, 0, 0, 0, 0, 0, 0, 0}> {
                a = DequantizeLinear(x, s, z) k = DequantizeLinear(w, s, z)
                c = MatMul(a, k) d = Add(c, b) y = Gelu(d) }""",
            ["MatMul", "Add+Gelu"],
        ),
        # What is scaled after a product of integers is part of it; what quantizes floats is not.
        (
            """f (float[4,8] x, float s, int8 z, int8[8,8] w) => (int8[4,8] y)
                <float[8] b = {0, 0, 0, 0, 0, 0, 0, 0}> {
                i = QuantizeLinear(x, s, z) m = MatMulInteger(i, w) f = Cast <to = 1> (m)
                c = Mul(f, s) d = Add(c, b) g = Tanh(d) y = QuantizeLinear(g, s, z) }""",
            ["QuantizeLinear", "MatMulInteger+Cast+Mul+Add", "Tanh", "QuantizeLinear"],
        ),
    ],
)
def test_kernels_of_integers_are_those_of_the_engine(text: str, expected: list[str]) -> None:
    model = ir.from_onnx_text(HEADER + text)
    ShapeInferencePass()(model)
    found = ["+".join(kernel.op_types) for kernel in kernels_of(model.graph, melts)]
    assert found == expected
