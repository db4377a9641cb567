"""Packed projections, taken apart so that they can be sharded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.models.conftest import random_model
from tests.passes.helpers import check, declined, model, ops
from trivium.passes.shard import plan
from trivium.passes.sharding.mesh import Mesh
from trivium.passes.split_projections import SplitProjections

RNG = np.random.default_rng(0)
W, B = (RNG.standard_normal(shape).astype(np.float32) for shape in ((4, 9), (9,)))


@pytest.mark.parametrize("sum_", ["Add(p, b)", "Add(b, p)", "Identity(p)"])
@pytest.mark.parametrize("sizes", ["", "{2, 4, 3}", "{3, 3, 3}"])
def test_each_part_is_a_product_of_its_own(sum_: str, sizes: str) -> None:
    operand, count = (", s", "") if sizes else ("", ", num_outputs = 3")
    constant = f"s = Constant <value = int64[3] {sizes}> ()" if sizes else ""
    source = "p" if "Identity" in sum_ else "q"
    summed = "" if "Identity" in sum_ else f"q = {sum_}"
    made = model(
        f"(float[N, 2, 4] x, float[4, 9] w, float[9] b) => (float[N, 2, d] u, float[N, 2, e] v,"
        f" float[N, 2, f] t) {{ {constant} p = MatMul(x, w) {summed}"
        f" u, v, t = Split <axis = -1{count}> ({source}{operand}) }}",
        w=W, b=B,
    )  # fmt: skip
    left = check(SplitProjections(), made)
    assert left["MatMul"] == 3
    assert left["Split"] == 0


def test_what_is_read_elsewhere_or_cut_along_the_batch_stays() -> None:
    text = (
        "(float[6, 4] x, float[4, 9] w) => (float[a, b] u, float[c, d] v{more})"
        " {{ p = MatMul(x, w) u, v = Split <axis = {axis}, num_outputs = 2> (p) {also} }}"
    )
    read = text.format(more=", float[6, 9] r", axis=1, also="r = Relu(p)")
    assert declined(SplitProjections(), model(read, w=W)) == []
    rows = text.format(more="", axis=0, also="")
    assert declined(SplitProjections(), model(rows, w=W)) == []


def test_a_packed_decoder_can_be_sharded_then(tmp_path: Path) -> None:
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 96,
        "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 32,
    }  # fmt: skip
    made = random_model(config, tmp_path)
    whole, _ = plan(made.graph, Mesh(1, 4))
    assert ops(made)["Split"] == 2
    assert SplitProjections()(made).modified
    assert ops(made)["Split"] == 0
    split, _ = plan(made.graph, Mesh(1, 4))

    def bytes_each(how: dict[ir.Value, dict[int, str]]) -> int:
        return sum(
            value.const_value.nbytes // (4 if value in how else 1)
            for value in made.graph.initializers.values()
            if value.const_value is not None and value.uses()
        )

    packed = [v for v in made.graph.initializers.values() if "c_attn" in (v.name or "")]
    assert not any(value in whole for value in packed)
    assert all(value in split for value in packed if value.uses())
    assert bytes_each(split) < bytes_each(whole)
