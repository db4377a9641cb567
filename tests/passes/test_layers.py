"""Options for single layers: what a pattern names, which entry counts, what is no entry."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.passes.helpers import model
from trivium.compiler import recipe
from trivium.compiler.errors import BadInput
from trivium.compiler.model import notes_of
from trivium.passes.quantize_static import QuantizeStatic
from trivium.passes.quantize_weights import QuantizeWeights


def chain() -> ir.Model:
    """Three products, named by node (a, b, c) and by weight (wa, wb, wc)."""
    rng = np.random.default_rng(0)
    weights = {f"w{n}": rng.standard_normal((64, 64)).astype(np.float32) for n in "abc"}
    made = model(
        """(float[4,64] x, float[64,64] wa, float[64,64] wb, float[64,64] wc) => (float[4,64] y)
        { h = MatMul(x, wa) g = MatMul(h, wb) y = MatMul(g, wc) }""",
        **weights,
    )
    for node, name in zip(made.graph, "abc", strict=True):
        node.name = f"layer.{name}"
    return made


def stored(made: ir.Model) -> dict[str, tuple[str, int]]:
    """Weight -> the type that it is stored in and its block size (0 = whole columns)."""
    found = {}
    for node in made.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer():  # type: ignore[union-attr]  # has inputs
            value: Any = node.inputs[0]
            block = node.attributes.get("block_size")
            found[value.name[:2]] = (value.dtype.name, block.as_int() if block else 0)
    return found


def test_the_last_entry_that_matches_counts() -> None:
    made = chain()
    QuantizeWeights(block_size=32, precision=("layer.*=int8", "wb=int4/16", "layer.c=float"))(made)
    assert stored(made) == {"wa": ("INT8", 32), "wb": ("INT4", 16)}


def test_a_layer_is_excluded_by_its_weight_s_name_too() -> None:
    made = chain()
    QuantizeWeights(exclude=("wa", "layer.b"))(made)
    assert set(stored(made)) == {"wc"}


def test_static_weights_take_the_bits_of_their_layer() -> None:
    made = chain()
    feeds = [{"x": np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)}] * 2
    QuantizeStatic(precision=("layer.b=int4", "wc=float"), calibration=feeds)(made)
    codes = {
        name: np.abs(value.const_value.numpy().astype(int)).max()  # type: ignore[union-attr]  # stored
        for name, value in made.graph.initializers.items()
        if name.endswith("_quantized")
    }
    assert codes == {"wa_quantized": 127, "wb_quantized": 7}


@pytest.mark.parametrize("entry", ["layer.a", "=int4", "layer.a=int5", "a=int4/7", "a=float/16"])
def test_what_is_no_entry_is_refused(entry: str) -> None:
    step = recipe.Step("quantize-weights", {"precision": [entry]})
    with pytest.raises(BadInput, match="PATTERN=WORD"):
        recipe.instantiate(step, recipe.Context())


def test_a_pattern_that_names_nothing_is_noted() -> None:
    made = chain()
    QuantizeWeights(exclude=("layer.a", "layer.z*"))(made)
    assert notes_of(made) == ("the pattern 'layer.z*' names no layer",)
