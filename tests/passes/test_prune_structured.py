"""Structured pruning: the smaller graph runs, and equals the whole one with its units masked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.passes.helpers import feed, infer, model
from tests.property import graphs
from tests.property.graphs import run
from trivium.compiler import model as models
from trivium.compiler import prepare, recipe
from trivium.compiler.errors import BadInput
from trivium.compiler.passing import declining, dims, sketched
from trivium.passes.coupling.reconstruct import least_squares
from trivium.passes.coupling.shrink import shrink
from trivium.passes.coupling.units import Units, find
from trivium.passes.prune_structured import PruneStructured

Array = np.ndarray[Any, np.dtype[Any]]


def draw(*shape: int, seed: int = 0) -> Array:
    rng = np.random.default_rng([seed, *shape])
    fan = max(1, int(np.prod(shape[1:])))
    return np.asarray(rng.standard_normal(shape) / np.sqrt(fan), np.float32)


def some(units: Units, seed: int, share: float = 0.5) -> set[int]:
    """Units chosen at random; of every group at least one stays."""
    rng = np.random.default_rng(seed)
    removed: set[int] = set()
    for group in units.groups:
        count = min(
            len(group.labels) - 1, int(rng.integers(0, int(len(group.labels) * share * 2) + 1))
        )
        removed.update(rng.permutation(group.labels)[:count].tolist())
    return removed


def masked(made: ir.Model, removed: set[int]) -> ir.Model:
    """A copy in which every product finds zeros where it reads a removed unit."""
    copy = made.clone()
    units = find(copy.graph)
    for index, (node, operand, axis) in enumerate(units.elements.products):
        value = node.inputs[operand]
        assert value is not None
        if units.elements.of(value, axis) is None:
            continue
        keep = ~np.isin(units.places(value, axis), sorted(removed))
        shape = [-1 if i == axis else 1 for i in range(len(dims(value) or ()))]
        mask = ir.Value(
            name=f"mask{index}", const_value=ir.tensor(keep.astype(np.float32).reshape(shape))
        )
        copy.graph.register_initializer(mask)
        product = ir.node("Mul", [value, mask])
        copy.graph.insert_before(node, [product])
        node.replace_input_with(operand, product.outputs[0])
    return copy


def check(made: ir.Model, inputs: dict[str, Any] | None = None, seeds: int = 3) -> int:
    """Compare shrunken and masked on random choices; return how many units could go."""
    inputs = feed(made) if inputs is None else inputs
    for seed in range(seeds):
        small = made.clone()
        units = find(small.graph)
        removed = some(units, seed)
        expected = run(masked(made, removed), inputs)
        shrink(units, removed)
        onnx.checker.check_model(ir.to_proto(small), full_check=True)
        for want, have in zip(expected, run(small, inputs), strict=True):
            scale = float(np.abs(want).max(initial=1e-3))
            np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4 * scale)
    return sum(len(group.labels) for group in find(made.graph).groups)


def parameters(made: ir.Model) -> int:
    values = made.graph.initializers.values()
    return sum(value.const_value.size for value in values if value.const_value is not None)


GRAPHS: dict[str, tuple[str, dict[str, tuple[int, ...]], int]] = {
    "residual": (
        """(float[N,3,6,6] x, float[8,3,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[4,8,1,1] w3)
        => (float[N,4,6,6] y) {
          a = Conv<pads = [1,1,1,1]>(x, w1, b1)
          r = Relu(a)
          c = Conv<pads = [1,1,1,1]>(r, w2)
          s = Add(c, r)
          y = Conv(s, w3)
        }""",
        {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "w3": (4, 8, 1, 1)},
        8,
    ),
    "batch normalization and depthwise": (
        """(float[N,3,6,6] x, float[6,3,1,1] w1, float[6] g, float[6] b, float[6] m, float[6] v,
            float[12,1,3,3] d, float[4,12,1,1] w3) => (float[N,4,4,4] y) {
          a = Conv(x, w1)
          n = BatchNormalization(a, g, b, m, v)
          c = Conv<group = 6>(n, d)
          y = Conv(c, w3)
        }""",
        {"w1": (6, 3, 1, 1), "g": (6,), "b": (6,), "m": (6,), "v": (6,), "d": (12, 1, 3, 3),
         "w3": (4, 12, 1, 1)},
        6,
    ),
    "groups": (
        """(float[N,3,6,6] x, float[12,3,1,1] w1, float[8,3,3,3] w2, float[4,8,1,1] w3)
        => (float[N,4,4,4] y) {
          a = Conv(x, w1)
          c = Conv<group = 4>(a, w2)
          y = Conv(c, w3)
        }""",
        {"w1": (12, 3, 1, 1), "w2": (8, 3, 3, 3), "w3": (4, 8, 1, 1)},
        4,
    ),
    "concat, flatten, product": (
        """(float[N,3,4,4] x, float[4,3,1,1] w1, float[6,3,1,1] w2, float[5,160] w3, float[5] b3)
        => (float[N,5] y) {
          a = Conv(x, w1)
          b = Conv(x, w2)
          s = Sigmoid(b)
          c = Concat<axis = 1>(a, s)
          f = Flatten(c)
          y = Gemm<transB = 1>(f, w3, b3)
        }""",
        {"w1": (4, 3, 1, 1), "w2": (6, 3, 1, 1), "w3": (5, 160), "b3": (5,)},
        10,
    ),
    "split and gate": (
        """(float[N,7,16] x, float[16,24] w1, float[24] b, float[12,16] w2)
        => (float[N,7,16] y) {
          h = MatMul(x, w1)
          hb = Add(h, b)
          u, g = Split<axis = -1, num_outputs = 2>(hb)
          a = Swish(g)
          p = Mul(u, a)
          y = MatMul(p, w2)
        }""",
        {"w1": (16, 24), "b": (24,), "w2": (12, 16)},
        12,
    ),
    "split in two readers": (
        """(float[N,16] x, float[16,10] w1, float[4,3] w2, float[6,3] w3) => (float[N,3] y) {
          h = MatMul(x, w1)
          sizes = Constant<value_ints = [4, 6]>()
          u, g = Split<axis = 1>(h, sizes)
          a = MatMul(u, w2)
          b = MatMul(g, w3)
          y = Add(a, b)
        }""",
        {"w1": (16, 10), "w2": (4, 3), "w3": (6, 3)},
        10,
    ),
    "padded shortcut": (
        """(float[N,3,6,6] x, float[4,3,3,3] w1, float[8,4,3,3] w2, float[5,8,1,1] w3)
        => (float[N,5,6,6] y) {
          a = Conv<pads = [1,1,1,1]>(x, w1)
          pads = Constant<value_ints = [0,2,0,0,0,2,0,0]>()
          s = Pad(a, pads)
          c = Conv<pads = [1,1,1,1]>(a, w2)
          t = Add(c, s)
          y = Conv(t, w3)
        }""",
        {"w1": (4, 3, 3, 3), "w2": (8, 4, 3, 3), "w3": (5, 8, 1, 1)},
        8,
    ),
    "heads by hand": (
        """(float[N,5,16] x, float[16,16] wq, float[16,16] wk, float[16,16] wv, float[16,16] wo)
        => (float[N,5,16] y) {
          four = Constant<value_ints = [0, 5, 4, 4]>()
          three = Constant<value_ints = [0, 5, 16]>()
          q0 = MatMul(x, wq)
          k0 = MatMul(x, wk)
          v0 = MatMul(x, wv)
          q1 = Reshape(q0, four)
          k1 = Reshape(k0, four)
          v1 = Reshape(v0, four)
          q = Transpose<perm = [0,2,1,3]>(q1)
          k = Transpose<perm = [0,2,3,1]>(k1)
          v = Transpose<perm = [0,2,1,3]>(v1)
          s = MatMul(q, k)
          p = Softmax(s)
          c = MatMul(p, v)
          t = Transpose<perm = [0,2,1,3]>(c)
          o = Reshape(t, three)
          y = MatMul(o, wo)
        }""",
        {"wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "wo": (16, 16)},
        4,
    ),
    "shared heads of Attention": (
        """(float[N,5,16] x, float[16,16] wq, float[16,8] wk, float[16,8] wv, float[16,16] wo)
        => (float[N,5,16] y) {
          q = MatMul(x, wq)
          k = MatMul(x, wk)
          v = MatMul(x, wv)
          a = Attention<q_num_heads = 4, kv_num_heads = 2, is_causal = 1>(q, k, v)
          y = MatMul(a, wo)
        }""",
        {"wq": (16, 16), "wk": (16, 8), "wv": (16, 8), "wo": (16, 16)},
        2,
    ),
    "transposed convolution and pooling": (
        """(float[N,3,8,8] x, float[6,3,3,3] w1, float[6,4,2,2] w2, float[2,4,1,1] w3)
        => (float[N,2,1,1] y) {
          a = Conv<pads = [1,1,1,1]>(x, w1)
          p = MaxPool<kernel_shape = [2,2], strides = [2,2]>(a)
          u = ConvTranspose<strides = [2,2]>(p, w2)
          g = GlobalAveragePool(u)
          y = Conv(g, w3)
        }""",
        {"w1": (6, 3, 3, 3), "w2": (6, 4, 2, 2), "w3": (2, 4, 1, 1)},
        10,
    ),
}  # fmt: skip


def build(name: str) -> ir.Model:
    text, shapes, _ = GRAPHS[name]
    weights = {key: draw(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    if "v" in weights and len(shapes["v"]) == 1:
        weights["v"] = np.abs(weights["v"]) + np.float32(0.5)
    return model(text, **weights)


@pytest.mark.parametrize("name", GRAPHS)
def test_shrunken_equals_masked(name: str) -> None:
    made = build(name)
    assert check(made) == GRAPHS[name][2]


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(made=graphs.models(), seed=st.integers(0, 5))
def test_random_graphs_shrink_to_their_masked_selves(made: ir.Model, seed: int) -> None:
    infer(made)
    recipe.run(recipe.read(recipe.NORMALIZE), made)
    inputs = graphs.feeds(made)
    small = made.clone()
    units = find(small.graph)
    removed = some(units, seed)
    expected = run(masked(made, removed), inputs)
    shrink(units, removed)
    for want, have in zip(expected, run(small, inputs), strict=True):
        assert have.shape == want.shape
        if want.dtype.kind == "f":
            close = np.isclose(have, want, rtol=1e-3, atol=1e-3, equal_nan=True)
            assert np.mean(close) > 0.9


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("models/cifar_resnet32.onnx", (2, 3, 32, 32)),
        ("models/mlperf_kws_dscnn_fp32.onnx", None),
        ("models/ultraface_rfb320.onnx", (1, 3, 240, 320)),
    ],
)
def test_real_networks(
    name: str, shape: tuple[int, ...] | None, shared_data: Callable[[str], Path]
) -> None:
    made, _ = prepare.optimize(models.load(shared_data(name)))
    value = made.graph.inputs[0]
    sizes = shape or tuple(d if isinstance(d, int) else 2 for d in value.shape or ())
    rng = np.random.default_rng(0)
    inputs = {value.name or "": rng.standard_normal(sizes).astype(np.float32)}
    assert check(made, inputs, seeds=1) > 200


def test_a_decoder_loses_heads_and_neurons(shared_data: Callable[[str], Path]) -> None:
    made, _ = prepare.optimize(models.load(shared_data("llm-shakespeare")))
    for value in made.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy())
    ids = np.random.default_rng(0).integers(0, 1024, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    assert check(made, inputs, seeds=1) == 4 * (4 + 688)


def test_half_of_each_layer_goes() -> None:
    made = build("residual")
    before, inputs = parameters(made), feed(made)
    one = PruneStructured(ratio=0.5)
    assert one(made).modified
    assert made.graph.initializers["w2"].shape == [4, 4, 3, 3]
    assert parameters(made) < 0.5 * before
    assert run(made, inputs)[0].shape == (3, 4, 6, 6)
    assert not one(made).modified, "half of a half would be a quarter"
    assert PruneStructured(ratio=0.25)(made).modified


def test_the_smallest_channels_go_first() -> None:
    made = build("concat, flatten, product")
    big = draw(4, 3, 1, 1)
    big[1] *= 100
    made.graph.initializers["w1"].const_value = ir.tensor(big)
    PruneStructured(ratio=0.75)(made)
    kept = made.graph.initializers["w1"].const_value
    assert kept is not None
    np.testing.assert_array_equal(kept.numpy(), big[1:2])


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_share_of_operations_is_left(scope: str, shared_data: Callable[[str], Path]) -> None:
    made, _ = prepare.optimize(models.load(shared_data("models/cifar_resnet20.onnx")))

    def work() -> int:
        total = 0
        for node in made.graph:
            if node.op_type == "Conv":
                out, weight = dims(node.outputs[0]), dims(node.inputs[1])
                assert out is not None
                assert weight is not None
                total += int(np.prod(out[2:])) * int(np.prod(weight))  # type: ignore[arg-type]
        return total

    before = work()
    PruneStructured(operations=0.5, scope=scope)(made)
    assert 0.4 * before < work() <= 0.501 * before


def test_counts_stay_multiples() -> None:
    made = build("split and gate")
    PruneStructured(ratio=0.5, multiple=4)(made)
    assert made.graph.initializers["w2"].shape == [8, 16]


def test_activations_decide() -> None:
    made = model(
        """(float[N,4] x, float[4,4] w1, float[4,2] w2) => (float[N,2] y) {
          h = MatMul(x, w1)
          y = MatMul(h, w2)
        }""",
        w1=np.eye(4, dtype=np.float32),
        w2=np.ones((4, 2), np.float32),
    )
    x = np.tile(np.array([[1, 9, 2, 8]], np.float32), (3, 1))
    one = PruneStructured(rank="activation", ratio=0.5, reconstruct=False, calibration=[{"x": x}])
    assert one(made).modified
    np.testing.assert_allclose(run(made, {"x": x})[0], [[17, 17]] * 3)


def test_what_cannot_be_followed_is_named() -> None:
    made = model(
        """(float[N,6] x, float[6,8] w1, float[8] g, float[8,3] w2) => (float[N,3] y) {
          h = MatMul(x, w1)
          n = LayerNormalization(h, g)
          y = MatMul(n, w2)
        }""",
        w1=draw(6, 8),
        g=np.ones(8, np.float32),
        w2=draw(8, 3),
    )
    with declining() as notes:
        assert not PruneStructured()(made).modified
    assert any("(LayerNormalization) takes its statistics over it" in n.reason for n in notes)


def test_bad_options_are_refused() -> None:
    with pytest.raises(BadInput, match="ratio is 1"):
        recipe.parse('[[pass]]\nname = "prune-structured"\nratio = 1')
    with pytest.raises(BadInput, match="kinds holds layers"):
        recipe.parse('[[pass]]\nname = "prune-structured"\nkinds = ["layers"]')
    with pytest.raises(BadInput, match="needs gradients"):
        PruneStructured(rank="taylor")(build("residual"))
    with pytest.raises(BadInput, match="representative inputs"):
        PruneStructured(rank="activation")(build("residual"))


# --- what stays makes up for what goes -----------------------------------------------------------


def test_least_squares_is_numpys() -> None:
    x = draw(400, 24, seed=1) @ draw(24, 24, seed=2)
    matrix, gone = draw(24, 5), np.arange(24) % 3 == 0
    made = least_squares(matrix, gone, x.T @ x)
    assert (made[gone] == 0).all()
    best, *_ = np.linalg.lstsq(x[:, ~gone], x @ matrix, rcond=None)
    own = np.linalg.norm(x @ made - x @ matrix)
    assert own <= 1.02 * np.linalg.norm(x[:, ~gone] @ best - x @ matrix)
    assert own < 0.8 * np.linalg.norm(x @ np.where(gone[:, None], 0, matrix) - x @ matrix)


@pytest.mark.parametrize("kind", ["Conv", "Gemm"])
def test_units_that_stay_make_up_for_those_that_go(kind: str) -> None:
    if kind == "Conv":
        text = (
            "(float[n,6,9,9] x, float[16,6,3,3] a, float[8,16,3,3] b) => (y) "
            "{ h = Conv (x, a) r = Relu (h) y = Conv <pads = [1,1,1,1]> (r, b) }"
        )
        weights = {"a": draw(16, 6, 3, 3), "b": draw(8, 16, 3, 3, seed=1)}
        feeds = [{"x": draw(1, 6, 9, 9, seed=seed)} for seed in range(2, 42)]
    else:
        text = (
            "(float[n,12] x, float[12,32] a, float[9,32] b) => (y) "
            "{ h = MatMul (x, a) r = Relu (h) y = Gemm <transB = 1> (r, b) }"
        )
        weights = {"a": draw(12, 32), "b": draw(9, 32, seed=1)}
        feeds = [{"x": draw(1, 12, seed=seed)} for seed in range(2, 302)]
    unseen = {"x": np.concatenate([f["x"] for f in feeds[-20:]])}
    errors = []
    for reconstruct in (True, False):
        made = model(text, **weights)
        (want,) = run(made, unseen)
        one = PruneStructured(ratio=0.25, reconstruct=reconstruct, calibration=feeds[:-20])
        assert one(made).modified
        assert not one(made).modified
        errors.append(float(np.linalg.norm(run(made, unseen)[0] - want)))
    assert errors[0] < 0.8 * errors[1]


def test_a_sketch_has_the_shapes_and_reads_nothing() -> None:
    text = (
        "(float[n,12] x, float[12,32] a, float[32,9] b) => (y) "
        "{ h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }"
    )
    made, whole = (model(text, a=draw(12, 32), b=draw(32, 9)) for _ in range(2))

    def unread() -> ir.TensorProtocol:
        raise AssertionError("a sketch read a weight")

    for value in made.graph.initializers.values():
        value.const_value = ir.LazyTensor(unread, ir.DataType.FLOAT, value.shape)  # type: ignore[arg-type]  # it has a shape
    feeds = [{"x": draw(4, 12)}]
    with sketched():
        assert PruneStructured(rank="activation", calibration=iter([]))(made).modified
    assert PruneStructured(rank="activation", calibration=feeds)(whole).modified
    for name, value in whole.graph.initializers.items():
        assert made.graph.initializers[name].const_value.shape == value.const_value.shape  # type: ignore[union-attr]  # stored
