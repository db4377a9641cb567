"""Every pass is held to its word on random graphs: same outputs to what it promises, the same
signature, still valid, at rest after one run, and honest about whether it changed anything.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings

from tests.property import graphs
from trivium.compiler import plugins, recipe
from trivium.compiler.model import signature
from trivium.compiler.types import TensorInfo
from trivium.passes import PASSES

TOLERANCE = {"exact": 1e-6, "numeric": 1e-4}

HONEST = [name for name in PASSES if plugins.get("trivium.passes", name).preserves in TOLERANCE]
QUICK = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    print_blob=False,
)


@pytest.mark.parametrize("name", HONEST)
@QUICK
@given(model=graphs.models())
def test_pass_keeps_its_word(name: str, model: ir.Model) -> None:
    feed = graphs.feeds(model)
    expected = graphs.run(model, feed)
    before, declared = graphs.serialized(model), signature(model)
    made = recipe.instantiate(recipe.Step(name), recipe.Context(calibration=[feed, feed]))

    modified = made(model).modified
    after = graphs.serialized(model)
    assert modified == (after != before)
    assert _names_and_ranks(signature(model)) == _names_and_ranks(declared)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    tolerance = TOLERANCE[made.preserves]  # type: ignore[attr-defined]  # a Pass, by HONEST
    for want, have in zip(expected, graphs.run(model, feed), strict=True):
        np.testing.assert_allclose(have, want, rtol=tolerance, atol=tolerance)

    assert not made(model).modified
    assert graphs.serialized(model) == after


@pytest.mark.slow
@QUICK
@given(model=graphs.models(max_steps=14))
def test_normal_form_keeps_its_word(model: ir.Model) -> None:
    feed = graphs.feeds(model)
    expected = graphs.run(model, feed)
    declared = signature(model)
    recipe.run(recipe.read(recipe.NORMALIZE), model)
    after = graphs.serialized(model)
    assert _names_and_ranks(signature(model)) == _names_and_ranks(declared)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for want, have in zip(expected, graphs.run(model, feed), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)
    again = recipe.run(recipe.read(recipe.NORMALIZE), model)
    assert [row.name for row in again if row.modified] == []
    assert graphs.serialized(model) == after


def _names_and_ranks(sides: tuple[tuple[TensorInfo, ...], ...]) -> list[list[tuple[str, str, int]]]:
    return [[(info.name, info.dtype, len(info.shape)) for info in side] for side in sides]
