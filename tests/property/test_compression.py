"""The lossy passes on random graphs: valid afterwards, at rest after one run, and not far off."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings

from tests.property import graphs
from trivium.compiler import recipe
from trivium.compiler.model import signature
from trivium.passes.adaround import AdaRound
from trivium.passes.prune_magnitude import PruneMagnitude
from trivium.passes.prune_n_m import PruneNM
from trivium.passes.prune_sparsegpt import PruneSparseGPT
from trivium.passes.prune_wanda import PruneWanda
from trivium.passes.quantization.placement import PLACEMENTS
from trivium.passes.quantize_dynamic import QuantizeDynamic
from trivium.passes.quantize_static import QuantizeStatic
from trivium.passes.quantize_weights import QuantizeWeights

QUICK = settings(
    max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)

PASSES: dict[str, Any] = {
    **{
        f"static {policy}": lambda feeds, policy=policy: QuantizeStatic(
            method="minmax", policy=policy, calibration=feeds
        )
        for policy in PLACEMENTS
    },
    "weights": lambda feeds: QuantizeWeights(bits=8, block_size=16, min_elements=1),
    **{
        f"weights {method}": lambda feeds, method=method: QuantizeWeights(
            method=method, bits=8, block_size=16, min_elements=1, calibration=feeds
        )
        for method in ("hqq", "gptq", "awq")
    },
    "dynamic": lambda feeds: QuantizeDynamic(min_elements=1),
    "adaround": lambda feeds: AdaRound(bits=8, steps=20, calibration=feeds),
    "prune nothing": lambda feeds: PruneMagnitude(sparsity=0.0),
    "wanda": lambda feeds: PruneWanda(sparsity=0.05, min_elements=1, calibration=feeds),
    "sparsegpt": lambda feeds: PruneSparseGPT(sparsity=0.05, min_elements=1, calibration=feeds),
    "prune 4:4": lambda feeds: PruneNM(n=4, m=4, min_elements=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@QUICK
@given(model=graphs.models())
def test_gentle_compression_changes_little(name: str, model: ir.Model) -> None:
    recipe.run(recipe.read(recipe.NORMALIZE), model)
    feed = graphs.feeds(model)
    expected = graphs.run(model, feed)
    declared = signature(model)
    one = PASSES[name]([feed, feed])
    before = graphs.serialized(model)

    modified = one(model).modified
    after = graphs.serialized(model)
    assert modified == (after != before)
    assert signature(model) == declared
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for want, have in zip(expected, graphs.run(model, feed), strict=True):
        if want.size == 0 or want.dtype.kind != "f":
            continue
        # Elementwise functions with poles and steps blow small errors up: the bulk has to agree.
        close = np.isclose(have, want, rtol=0.2, atol=0.2 * float(np.abs(want).max()) + 1e-3)
        assert np.mean(close) > 0.75

    assert not one(model).modified
    assert graphs.serialized(model) == after
