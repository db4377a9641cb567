"""Least squares toward a teacher: lost weights are found again, and zeros stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.passes.helpers import model
from tests.passes.test_prune_layers import draw, stack
from tests.property.graphs import run
from trivium.compiler.passing import weight
from trivium.passes.coupling.teach import solved, teach
from trivium.passes.prune_layers import PruneLayers
from trivium.passes.prune_n_m import PruneNM

Array = np.ndarray[Any, np.dtype[Any]]

FEEDS = [{"x": draw(16, 5, 8, seed=50 + i)} for i in range(4)]
OTHERS = {"x": draw(16, 5, 8, seed=70)}


def spoil(made: ir.Model, *names: str) -> ir.Model:
    """Other weights in the place of some."""
    for seed, name in enumerate(names):
        array = weight(made.graph.initializers[name])
        assert array is not None
        changed = array + draw(*array.shape, seed=seed, spread=0.3)
        made.graph.initializers[name].const_value = ir.tensor(changed, name=name)
    return made


def error(made: ir.Model, teacher: ir.Model, feeds: dict[str, Array] = OTHERS) -> float:
    have, want = (run(one, feeds)[0] for one in (made, teacher))
    return float(np.square(have - want).mean() / np.square(want).mean())


def content(made: ir.Model, name: str) -> Array:
    array = weight(made.graph.initializers[name])
    assert array is not None
    return array


def convolutions() -> ir.Model:
    """Strides, paddings and biases of convolutions, and a Gemm with its weight turned."""
    return model(
        """(float[N,3,9,9] x, float[6,3,3,3] w1, float[6] b1, float[6,6,3,3] w2, float[6] b2,
            float[4,6] w3, float[4] b3) => (float[N,4] y) {
            c1 = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w1, b1)
            r1 = Relu (c1)
            c2 = Conv <pads = [1,0,1,0], kernel_shape = [3,3]> (r1, w2, b2)
            p = GlobalAveragePool (c2)
            f = Flatten (p)
            y = Gemm <transB = 1> (f, w3, b3)
        }""",
        w1=draw(6, 3, 3, 3, spread=0.4), b1=draw(6, seed=1),
        w2=draw(6, 6, 3, 3, seed=2, spread=0.2), b2=draw(6, seed=3),
        w3=draw(4, 6, seed=4), b3=draw(4, seed=5),
    )  # fmt: skip


def test_weights_that_were_lost_are_found_again() -> None:
    teacher, names = convolutions(), ("w1", "b1", "w2", "b2", "w3", "b3")
    made = spoil(convolutions(), *names)
    feeds = [{"x": draw(16, 3, 9, 9, seed=20 + i)} for i in range(4)]
    assert error(made, teacher, feeds[0]) > 0.1
    taught = teach(made, teacher, feeds, damping=1e-7)
    assert [one.goal for one in taught] == ["c1", "c2", "y"]
    for name in names:
        np.testing.assert_allclose(content(made, name), content(teacher, name), atol=2e-2)
    assert error(made, teacher, {"x": draw(8, 3, 9, 9, seed=90)}) < 1e-4


def test_the_layers_that_stay_make_up_for_one_that_is_gone() -> None:
    teacher, made = stack(0.5, 0.5, 0.5), stack(0.5, 0.5, 0.5)
    PruneLayers(count=1, calibration=FEEDS)(made)
    before = error(made, teacher)
    taught = teach(made, teacher, FEEDS)
    # The second product of a layer is fitted to the stream, the first to what it gave itself.
    assert {one.goal for one in taught} >= {"s2", "h2", "y"}
    assert error(made, teacher) < 0.7 * before


def test_a_shortcut_that_is_a_product_itself_comes_second() -> None:
    def made() -> ir.Model:
        return model(
            """(float[N,8] x, float[8,12] w, float[12,6] v, float[6] c, float[8,6] s)
               => (float[N,6] y) {
                h = MatMul (x, w)
                r = Relu (h)
                b = MatMul (r, v)
                a = Add (b, c)
                p = MatMul (x, s)
                y = Add (a, p)
            }""",
            w=draw(8, 12), v=draw(12, 6, seed=1), c=draw(6, seed=2), s=draw(8, 6, seed=3),
        )  # fmt: skip

    student, teacher = spoil(made(), "w", "v", "c", "s"), made()
    feeds = {"x": draw(200, 8, seed=5)}
    taught = teach(student, teacher, [feeds], damping=1e-7)
    assert [one.goal for one in taught] == ["h", "a", "y"]
    assert error(student, teacher, {"x": draw(9, 8, seed=6)}) < 1e-4


def test_zeros_stay_and_the_others_make_up_for_them() -> None:
    teacher, made = stack(1.0, 1.0), stack(1.0, 1.0)
    PruneNM(n=2, m=4, min_elements=1)(made)
    before, zeros = error(made, teacher), content(made, "v0") == 0
    assert zeros.mean() == 0.5
    teach(made, teacher, FEEDS)
    assert (content(made, "v0") == 0)[zeros].all()
    assert error(made, teacher) < 0.7 * before


def test_nothing_is_changed_without_a_counterpart_or_by_what_is_excluded() -> None:
    teacher = stack(1.0)
    made = spoil(stack(1.0), "w0", "v0")
    kept = content(made, "w0").copy()
    assert [one.goal for one in teach(made, teacher, FEEDS, exclude=("w*",))] == ["s0", "y"]
    np.testing.assert_array_equal(content(made, "w0"), kept)
    other = spoil(stack(1.0), "w0")
    for value in [v for node in teacher.graph for v in node.outputs]:
        value.name = f"other.{value.name}"
    assert teach(other, teacher, FEEDS) == []


def test_samples_that_are_not_finite_leave_a_product_alone() -> None:
    made, teacher = spoil(stack(1.0), "v0"), stack(1.0)
    kept = content(made, "v0").copy()
    assert teach(made, teacher, [{"x": np.full((2, 5, 8), np.nan, np.float32)}]) == []
    np.testing.assert_array_equal(content(made, "v0"), kept)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_least_squares_that_numpy_finds(sparse: bool, bias: bool) -> None:
    x, lacks = draw(200, 6).astype(np.float64), draw(200, 3, seed=1).astype(np.float64)
    matrix = draw(6, 3, seed=2)
    if sparse:
        matrix[::2, 0] = matrix[1::2, 1] = matrix[:3, 2] = 0
    wide = np.concatenate([x, np.ones((200, 1))], axis=1)
    made = solved(matrix, wide.T @ wide, wide.T @ lacks, 0.0, bias=bias)
    for column in range(3):
        free = np.append(matrix[:, column] != 0, bias)
        want: Array = np.linalg.lstsq(wide[:, free], lacks[:, column])[0]
        np.testing.assert_allclose(made[free, column], want, atol=1e-9)
        assert not made[~free, column].any()
