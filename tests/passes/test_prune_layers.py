"""Whole layers and weights by their inputs: which ones go, and that the rest computes as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.passes.helpers import model
from tests.property.graphs import run
from trivium.compiler import model as models
from trivium.compiler import prepare, recipe
from trivium.compiler.errors import BadInput
from trivium.compiler.passing import declining, weight
from trivium.passes.prune_layers import PruneLayers, residual_layers
from trivium.passes.prune_n_m import PruneNM
from trivium.passes.prune_sparsegpt import PruneSparseGPT
from trivium.passes.prune_wanda import PruneWanda

Array = np.ndarray[Any, np.dtype[Any]]


def draw(*shape: int, seed: int = 0, spread: float = 1.0) -> Array:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * spread, np.float32)


def stack(*spreads: float) -> ir.Model:
    """Residual blocks ``x + Relu(x w) v`` of the spreads given."""
    lines: list[str] = []
    weights: dict[str, Array] = {}
    stream = "x"
    for i, spread in enumerate(spreads):
        lines += [f"h{i} = MatMul({stream}, w{i})", f"r{i} = Relu(h{i})"]
        lines += [f"b{i} = MatMul(r{i}, v{i})", f"s{i} = Add(b{i}, {stream})"]
        weights |= {f"w{i}": draw(8, 12, seed=i), f"v{i}": draw(12, 8, seed=9 + i, spread=spread)}
        stream = f"s{i}"
    shapes = ", ".join(f"float[{','.join(map(str, a.shape))}] {n}" for n, a in weights.items())
    body = "\n".join([*lines, f"y = MatMul({stream}, last)"])
    text = f"(float[N,5,8] x, {shapes}, float[8,3] last) => (float[N,5,3] y) {{ {body} }}"
    return model(text, last=draw(8, 3, seed=99), **weights)


@pytest.mark.parametrize("rank", ["activation", "magnitude"])
def test_the_layer_that_does_least_goes(rank: str) -> None:
    made, rest = stack(1.0, 0.01, 1.0), stack(1.0, 0.0, 1.0)
    feeds = {"x": draw(2, 5, 8)}
    if rank == "magnitude":
        value = made.graph.initializers["w1"]
        value.const_value = ir.tensor(draw(8, 12, seed=1, spread=0.01))
    one = PruneLayers(count=1, rank=rank, calibration=[feeds])
    assert one(made).modified
    assert len(residual_layers(made.graph)) == 2
    assert {"w1", "v1"}.isdisjoint(made.graph.initializers)
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    np.testing.assert_allclose(run(made, feeds)[0], run(rest, feeds)[0], rtol=1e-5, atol=1e-5)
    assert not one(made).modified


def test_what_is_read_from_inside_stays() -> None:
    made = stack(0.0)
    inside = next(node for node in made.graph if node.op_type == "Relu").outputs[0]
    inside.name = "peek"
    made.graph.outputs.append(inside)
    assert not PruneLayers(count=1, calibration=[{"x": draw(1, 5, 8)}])(made).modified


def test_a_decoder_has_two_for_each_block(shared_data: Callable[[str], Path]) -> None:
    made, _ = prepare.optimize(models.load(shared_data("llm-shakespeare")))
    assert len(residual_layers(made.graph)) == 8
    ids = np.load(shared_data("llm-shakespeare/val_ids.npy"))[:64].reshape(2, 32)
    feeds = [{"input_ids": ids.astype(np.int64), "attention_mask": np.ones((2, 32), np.int64)}]
    assert PruneLayers(ratio=0.25, calibration=feeds)(made).modified
    assert len(residual_layers(made.graph)) == 6


def linear(weights: Array) -> ir.Model:
    rows, columns = weights.shape
    text = f"(float[N,{rows}] x, float[{rows},{columns}] w) => (float[N,{columns}] y) {{"
    return model(text + " y = MatMul(x, w) }", w=weights)


def test_wanda_counts_what_flows_in() -> None:
    x = draw(64, 16) * np.linspace(0.1, 3, 16).astype(np.float32)
    w = draw(16, 20, seed=1)
    made = linear(w)
    one = PruneWanda(sparsity=0.5, min_elements=1, calibration=[{"x": x[:32]}, {"x": x[32:]}])
    assert one(made).modified
    have = weight(made.graph.initializers["w"])
    assert have is not None
    score = np.abs(w) * np.sqrt((x.astype(np.float64) ** 2).mean(axis=0))[:, None]
    for column in range(20):
        smallest = set(np.argsort(score[:, column])[:8].tolist())
        assert set(np.flatnonzero(have[:, column] == 0).tolist()) == smallest
    assert (have[have != 0] == w[have != 0]).all()
    assert not one(made).modified


def test_wanda_in_groups_and_in_convolutions() -> None:
    text = """(float[N,8,5,5] x, float[6,8,3,3] w) => (float[N,6,3,3] y) { y = Conv(x, w) }"""
    w = draw(6, 8, 3, 3)
    made = model(text, w=w)
    x = draw(4, 8, 5, 5, seed=2) * np.arange(1, 9, dtype=np.float32)[:, None, None]
    PruneWanda(n=2, m=4, min_elements=1, calibration=[{"x": x}])(made)
    have = weight(made.graph.initializers["w"])
    assert have is not None
    groups = np.moveaxis(have, 1, -1).reshape(-1, 4)
    assert (np.count_nonzero(groups, axis=1) == 2).all()
    # Channels grow louder along each group of four, so later ones survive more often.
    assert (groups != 0)[:, 3].mean() > (groups != 0)[:, 0].mean()
    made = model(text, w=w)
    PruneWanda(sparsity=0.75, min_elements=1, calibration=[{"x": x}])(made)
    have = weight(made.graph.initializers["w"])
    assert have is not None
    assert (np.count_nonzero(have.reshape(6, -1), axis=1) == 18).all()


@pytest.mark.parametrize("m", [0, 4])
def test_sparsegpt_lets_the_rest_make_up_for_it(m: int) -> None:
    x = draw(256, 6) @ draw(6, 16, seed=5)  # inputs that see much of each other
    x += 0.1 * draw(256, 16, seed=6)
    w = draw(16, 20, seed=1)
    made, plain = linear(w), linear(w)
    one = PruneSparseGPT(m=m, min_elements=1, calibration=[{"x": x[:128]}, {"x": x[128:]}])
    assert one(made).modified
    PruneWanda(m=m, min_elements=1, calibration=[{"x": x}])(plain)
    have = weight(made.graph.initializers["w"])
    assert have is not None
    if m:
        assert (np.count_nonzero(have.T.reshape(-1, m), axis=1) <= 2).all()
    else:
        assert np.count_nonzero(have == 0) == w.size // 2
    goal = x @ w
    errors = [float(np.square(run(one_of, {"x": x})[0] - goal).sum()) for one_of in (made, plain)]
    assert errors[0] < 0.6 * errors[1]
    assert not one(made).modified


def test_sparsegpt_in_a_convolution_and_a_turned_product() -> None:
    text = """(float[N,8,6,6] x, float[8,8,3,3] c, float[5,72] g) => (float[N,5] y) {
      a = Conv<pads = [1,1,1,1], strides = [2,2]>(x, c)
      p = MaxPool<kernel_shape = [2,2], pads = [0,0,1,1], strides = [1,1]>(a)
      r = Relu(p)
      f = Flatten(r)
      y = Gemm<transB = 1>(f, g)
    }"""
    made = model(text, c=draw(8, 8, 3, 3, spread=0.2), g=draw(5, 72, spread=0.2))
    x = draw(64, 8, 6, 6, seed=3)
    goal = run(made, {"x": x})[0]
    other = made.clone()
    PruneSparseGPT(m=4, min_elements=1, calibration=[{"x": x}])(made)
    PruneNM(min_elements=1)(other)
    conv, product = (weight(made.graph.initializers[name]) for name in "cg")
    assert conv is not None
    assert product is not None
    assert (np.count_nonzero(np.moveaxis(conv, 1, -1).reshape(-1, 4), axis=1) <= 2).all()
    assert (np.count_nonzero(product.reshape(-1, 4), axis=1) <= 2).all()
    errors = [float(np.square(run(one, {"x": x})[0] - goal).mean()) for one in (made, other)]
    assert errors[0] < 0.7 * errors[1]


def test_bad_options_and_missing_data_are_named() -> None:
    for text, message in (
        ('name = "prune-wanda"\nn = 5\nm = 4', "5:4"),
        ('name = "prune-wanda"\nsparsity = 1.5', "sparsity is 1.5"),
        ('name = "prune-layers"\nratio = 1.5', "ratio is 1.5"),
        ('name = "prune-layers"\ncount = -1', "count is -1"),
    ):
        with pytest.raises(BadInput, match=message):
            recipe.parse(f"[[pass]]\n{text}")
    for one in (PruneWanda(min_elements=1), PruneSparseGPT(min_elements=1), PruneLayers(count=1)):
        with pytest.raises(BadInput, match="representative inputs"):
            one(stack(1.0))
    with declining() as notes:
        PruneWanda(m=4, min_elements=1, calibration=[{"x": draw(2, 3)}])(linear(draw(3, 8)))
    assert [note.reason for note in notes] == ["3 summed values make no group of 4"]
