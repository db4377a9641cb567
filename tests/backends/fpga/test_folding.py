"""Foldings are legal, get faster as they get larger, meet their target, and fit."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.fpga import qdq
from trivium.backends.fpga import cost, folding, ir, lower
from trivium.compiler.errors import Unsupported

SETTINGS = settings(max_examples=20, deadline=None, derandomize=True)


def flow_of(seed: int) -> ir.Dataflow:
    flow = lower.lower(qdq.loaded(qdq.network(seed)).graph).flow
    assert flow is not None
    return flow


@SETTINGS
@given(seed=st.integers(0, 1000))
def test_every_choice_is_legal_and_does_all_the_work(seed: int) -> None:
    flow = flow_of(seed)
    start = folding.smallest(flow)
    for layer in flow.layers:
        for fold in folding.choices(layer, flow):
            assert flow.output_of(layer).channels % fold.pe == 0
            if isinstance(layer, ir.Convolution):
                assert flow.input_of(layer).channels % fold.simd == 0
                spent = folding.cycles(layer, flow, {**start, layer.name: fold})
                result = flow.output_of(layer)
                assert spent.products * result.shape[0] * fold.products == (
                    layer.weight.size * result.pixels
                )


def test_an_illegal_folding_is_refused() -> None:
    flow = flow_of(3)
    good = folding.smallest(flow)
    folding.check(flow, good)
    name = next(layer.name for layer in flow.layers if layer.kind == "convolution")
    with pytest.raises(Unsupported, match="do not divide"):
        folding.check(flow, {**good, name: folding.Fold(5, 1)})
    with pytest.raises(Unsupported, match="do not divide"):
        folding.check(flow, {key: value for key, value in good.items() if key != name})


@SETTINGS
@given(seed=st.integers(0, 1000), goal=st.integers(500, 20_000))
def test_search_meets_its_target_or_stops_at_the_device(seed: int, goal: int) -> None:
    flow = flow_of(seed)

    def fits(one: folding.Folding) -> bool:
        return cost.resources(flow, one).get("dsp", 0) <= 120

    found = folding.search(flow, fits, goal)
    folding.check(flow, found)
    assert fits(found) or found == folding.smallest(flow)
    slowest = folding.interval(flow, folding.smallest(flow))
    assert folding.interval(flow, found) <= slowest
    unlimited = folding.search(flow, lambda one: True, goal)
    assert folding.interval(flow, unlimited) <= max(goal, 1500)


@SETTINGS
@given(seed=st.integers(0, 1000))
def test_a_frame_takes_at_least_its_slowest_layer(seed: int) -> None:
    flow = flow_of(seed)
    folds = folding.smallest(flow)
    latency = cost.latency(flow, folds)
    slowest = max(folding.cycles(layer, flow, folds).compute_row for layer in flow.layers)
    everything = sum(folding.cycles(layer, flow, folds).frame for layer in flow.layers)
    ports = sum(flow.tensors[p.tensor].size for p in (*flow.inputs, *flow.outputs))
    assert slowest < latency <= everything + ports + 2 * cost.MEMORY_LATENCY


def test_a_dense_layer_by_hand() -> None:
    """16 x 12 products at 4 by 4: 12 steps; see also the table of block RAM shapes."""
    flow = flow_of(2)
    layer = next(one for one in flow.layers if one.name == "convolution3")
    assert isinstance(layer, ir.Convolution)
    assert layer.weight.shape == (5, 1, 1, 6)
    spent = folding.cycles(layer, flow, {**folding.smallest(flow), layer.name: folding.Fold(5, 3)})
    assert spent.products == (5 // 5) * (6 // 3)
    used = cost.layer_resources(
        layer, flow, {**folding.smallest(flow), layer.name: folding.Fold(5, 3)}
    )
    # 15 products of 8 by 8 bits take a slice each; 5 requantizations of an accumulator of at most
    # 17 bits by a multiplier of 25 to 26 bits take one each too.
    assert used["dsp"] in (20, 25)
    assert cost.block_rams(36, 512) == 1
    assert cost.block_rams(72, 1024) == 4
    assert cost.block_rams(8, 2048) == 1
    assert cost.multipliers(8, 8, 3) == {"dsp": 3}
    assert cost.multipliers(4, 4, 3) == {"lut": 48}
    assert cost.multipliers(20, 26, 1) == {"dsp": 2}


def test_a_model_that_does_not_fit_is_refused_with_figures() -> None:
    flow = flow_of(1)
    tiny = dataclasses.replace(qdq.ZCU104, resources={"lut": 800, "dsp": 3, "bram_18k": 2})
    with pytest.raises(Unsupported) as caught:
        cost.fold(flow, tiny)
    assert "dsp" in str(caught.value)
    assert "of 3" in str(caught.value)
    assert caught.value.exit_code == 3
    assert len(caught.value.refusals) >= 2


def test_an_interval_is_an_option() -> None:
    flow = flow_of(1)
    slow = cost.fold(flow, qdq.ZCU104, 1000)
    fast = cost.fold(flow, qdq.ZCU104)
    assert folding.interval(flow, slow) <= 1000e-6 * 200e6
    assert folding.interval(flow, fast) < folding.interval(flow, slow)
    assert cost.resources(flow, slow)["dsp"] < cost.resources(flow, fast)["dsp"]
