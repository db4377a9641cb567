"""Pruning: how many zeros, which ones, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.compiler import model, recipe
from trivium.compiler.errors import BadInput
from trivium.compiler.passing import declining, weight
from trivium.passes.prune_magnitude import PruneMagnitude, global_threshold
from trivium.passes.prune_n_m import PruneNM

Array = np.ndarray[Any, Any]


def draw(*shape: int, seed: int = 0, spread: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


def network(**weights: Array) -> ir.Model:
    """A convolution, a product of each kind, and an embedding."""
    proto = onnx.parser.parse_model(
        """<ir_version: 11, opset_import: ["" : 24]>
        g (float[N,8,6,6] x, int64[N] token) => (float[N,10] y, float[N,16] e) {
          c = Conv (x, conv)
          f = Flatten (c)
          h = Gemm <transB = 1> (f, gemm, bias)
          y = MatMul (h, product)
          e = Gather (table, token)
        }"""
    )
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def arrays(**changes: Array) -> dict[str, Array]:
    return {
        "conv": draw(12, 8, 3, 3),
        "gemm": draw(32, 192, seed=1, spread=0.1),
        "bias": draw(32, seed=2),
        "product": draw(32, 10, seed=3, spread=0.01),
        "table": draw(100, 16, seed=4),
    } | changes


def content(made: ir.Model, name: str) -> Array:
    array = weight(made.graph.initializers[name])
    assert array is not None
    return array


@settings(max_examples=25, deadline=None)
@given(sparsity=st.floats(0, 1), seed=st.integers(0, 50))
def test_each_layer_loses_its_smallest(sparsity: float, seed: int) -> None:
    before = arrays(gemm=draw(32, 192, seed=seed))
    made = network(**before)
    one = PruneMagnitude(sparsity=sparsity)
    one(made)
    for name in ("conv", "gemm", "product"):
        old, new = before[name], content(made, name)
        count = int(sparsity * old.size)
        assert np.count_nonzero(new == 0) == count
        kept = new != 0
        assert (new[kept] == old[kept]).all()
        if 0 < count < old.size:
            assert np.abs(old[~kept]).max() <= np.abs(old[kept]).min()
    for name in ("bias", "table"):
        assert (content(made, name) == before[name]).all()
    assert not one(made).modified


@settings(max_examples=25, deadline=None)
@given(sparsity=st.floats(0.01, 0.99))
def test_one_threshold_over_all(sparsity: float) -> None:
    before = arrays()
    made = network(**before)
    one = PruneMagnitude(sparsity=sparsity, scope="global")
    one(made)
    names = ("conv", "gemm", "product")
    pooled = np.sort(np.abs(np.concatenate([before[name].ravel() for name in names])))
    threshold = pooled[int(sparsity * pooled.size)]
    zeros = sum(np.count_nonzero(content(made, name) == 0) for name in names)
    assert zeros == int(sparsity * pooled.size)
    for name in names:
        expected = np.where(np.abs(before[name]) < threshold, 0, before[name])
        assert (content(made, name) == expected).all()
    assert not one(made).modified


def test_the_threshold_is_exact() -> None:
    made = network(**arrays())
    value = made.graph.initializers["gemm"]
    ordered = np.sort(np.abs(content(made, "gemm")).ravel())
    for share in (0.0, 0.1, 0.5, 0.999):
        rank = int(share * ordered.size)
        assert global_threshold([value], share) == (ordered[rank] if rank else 0.0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_n_of_m_along_the_summed_axis(n: int, m: int) -> None:
    before = arrays()
    made = network(**before)
    one = PruneNM(n=n, m=m)
    assert one(made).modified
    for name, axis in (("conv", 1), ("gemm", 1), ("product", 0)):
        old = np.moveaxis(before[name], axis, -1).reshape(-1, m)
        new = np.moveaxis(content(made, name), axis, -1).reshape(-1, m)
        assert (np.count_nonzero(new, axis=1) == n).all()
        kept = new != 0
        assert (new[kept] == old[kept]).all()
        assert (np.abs(new).sum(axis=1) >= np.sort(np.abs(old))[:, -n:].sum(axis=1) - 1e-6).all()
    assert not one(made).modified


def test_incomplete_groups_and_nan_are_named() -> None:
    bad = draw(32, 10)
    bad[1, 1] = np.nan
    made = network(**arrays(conv=draw(12, 3, 3, 3), product=bad))
    with declining() as declined:
        PruneNM()(made)
    reasons = {note.where: note.reason for note in declined}
    assert reasons["conv"] == "3 values along the summed axis make no group of 4"
    assert reasons["product"] == "1 of 320 values are NaN or infinite"
    odd = network(**arrays(gemm=draw(32, 190)))
    with declining() as declined:
        PruneNM()(odd)
    assert "last 2 of 190" in next(note.reason for note in declined)
    assert (content(odd, "gemm")[:, 188:] == draw(32, 190)[:, 188:]).all()


def test_weights_in_a_file_are_pruned_as_they_are_written(tmp_path: Path) -> None:
    model.save(network(**arrays()), tmp_path / "m.onnx", external=True, threshold=0)
    made = model.load(tmp_path / "m.onnx")
    assert PruneMagnitude(sparsity=0.75)(made).modified
    assert isinstance(made.graph.initializers["gemm"].const_value, ir.LazyTensor)
    for external in (True, False):
        out = tmp_path / f"{external}.onnx"
        model.save(made, out, external=external)
        again = model.load(out)
        assert np.count_nonzero(content(again, "gemm") == 0) == 32 * 192 * 3 // 4


def test_bad_options_are_refused() -> None:
    with pytest.raises(BadInput, match="sparsity is 2"):
        recipe.parse('[[pass]]\nname = "prune-magnitude"\nsparsity = 2')
    with pytest.raises(BadInput, match="5:4"):
        recipe.parse('[[pass]]\nname = "prune-n-m"\nn = 5')
    assert recipe.read("prune-2:4").name == "prune-2:4"
    with pytest.raises(BadInput, match="distill trains, which no pass does; use trivium tune"):
        recipe.read("prune-2:4+distill")
