"""What a choice is made of: prices, batches, slices, quality, the front, what would change it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivium.compiler import cli, prices, quality, recipe, targets, whatif
from trivium.compiler.compare import compare
from trivium.compiler.errors import BadInput
from trivium.compiler.plan import Constraints, choose, parse_drop, plan, to_json
from trivium.compiler.rows import name_of, row
from trivium.compiler.types import Candidate, Estimate, OpCost, Target, Work
from trivium.models import digits

PRICE = """
[[price]]
target = "nvidia-t4"
usd_per_hour = 0.5
date = 2026-11-01
source = "our contract"
"""
SHAPE = ["batch=1"]


def candidate(name: str, seconds: float, *, hourly: float | None = 1.0) -> Candidate:
    dollars = None if hourly is None else hourly * seconds / 3600
    estimate = Estimate(
        seconds, seconds / 2, seconds * 2, bytes_peak=1e6, joules=seconds, dollars=dollars,
        bound="memory",
    )  # fmt: skip
    target = Target(name, "gpu", ("xla",), watts=100.0, usd_per_hour=hourly)
    return Candidate(target, "xla", "none", estimate)


# --- sketches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "fp16", "int8", "int4", "int8-weights", "prune-2:4"])
def test_a_sketch_predicts_what_the_recipe_would(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same estimates and refusals as with every weight quantized."""
    on = ["cpu", "nvidia-t4", "tpu-v5e", "amd-zcu104"]

    def known() -> dict[str, tuple[object, ...]]:
        found = compare(digits.mlp(), on, recipes=[name], shape=SHAPE, backends="all").candidates
        return {
            name_of(c): (c.refusals, c.estimate and (c.estimate.seconds, c.estimate.bytes_peak))
            for c in found
        }

    sketched = known()
    monkeypatch.setattr(recipe, "sketch", recipe.run)
    assert sketched == known()
    assert any(not refusals for refusals, _ in sketched.values())


def test_a_sketch_reads_no_weight(
    shared_data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trivium.compiler import prepare

    model = prepare.optimize(shared_data("llm-shakespeare"), "none", shape=["batch=1", "seq=8"])[0]

    def never(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("trivium.passes.quantization.storing.matrix", never)
    monkeypatch.setattr("trivium.passes.quantization.insertion.weight", never)
    monkeypatch.setattr("trivium.passes.convert_float.weight", never)
    for name in ("int4", "int8", "fp16", "prune-50"):
        recipe.sketch(recipe.read(name), model.clone(), recipe.Context(backend="onnxruntime"))


def test_a_plan_reads_no_weight_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one matrix, and of each no more than tells it from the others of its shape."""
    from benchmarks.planning import llama
    from trivium.models.safetensors import ConvertedTensor, Stripes

    small = {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 4096}
    checkpoint = llama(tmp_path / "llama", num_hidden_layers=2, num_key_value_heads=16, **small)
    read: list[int] = []

    def whole(self: ConvertedTensor) -> ir.TensorProtocol:
        read.append(self.nbytes)
        return convert(self)

    def part(self: Stripes, start: int, stop: int) -> np.ndarray[Any, Any]:
        found = stripe(self, start, stop)
        read.append(found.nbytes)
        return found

    convert, stripe = ConvertedTensor._read, Stripes.stripe
    monkeypatch.setattr(ConvertedTensor, "_read", whole)
    monkeypatch.setattr(Stripes, "stripe", part)
    found = compare(
        checkpoint,
        ["cpu", "nvidia-t4", "tpu-v5e", "amd-zcu104"],
        recipes=["none", "bf16", "int8-weights", "int4", "int8"],
        shape=["batch=1", "seq=64"],
        backends="all",
    )
    assert {c.recipe for c in found.candidates if c.feasible} >= {"none", "bf16", "int4", "int8"}
    assert read
    assert max(read) <= 4 * 4096


def test_targets_that_share_a_graph_are_told_what_each_is_told_alone() -> None:
    model = digits.cnn()
    on = ["nvidia-t4", "nvidia-h100-sxm", "nvidia-l4", "tpu-v5e", "tpu-v6e"]
    together = compare(model, on, recipes=["none", "int8"], shape=SHAPE, backends="all")
    alone = [
        c
        for name in on
        for c in compare(
            model, [name], recipes=["none", "int8"], shape=SHAPE, backends="all"
        ).candidates
    ]
    known = {name_of(c): (c.estimate, c.refusals) for c in together.candidates}
    assert known == {name_of(c): (c.estimate, c.refusals) for c in alone}


# --- prices --------------------------------------------------------------------------------------


def test_every_price_that_we_carry_says_when_and_where() -> None:
    priced = [targets.find(name) for name in targets.names()]
    priced = [target for target in priced if target.usd_per_hour is not None]
    assert len(priced) >= 5
    assert all("read 20" in target.sources["usd_per_hour"] for target in priced)


def test_a_users_price_goes_first(tmp_path: Path) -> None:
    table = prices.parse(PRICE, about="test")
    found = compare(digits.mlp(), ["nvidia-t4"], shape=SHAPE, prices=table).rows[0]
    assert found["usd_per_hour"] == 0.5
    assert found["price_source"] == "our contract (read 2026-11-01)"
    assert found["usd_per_million"] == pytest.approx(found["latency_s"] * 0.5 / 3600 * 1e6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[price]]\ntarget = 'x'", "needs exactly"),
        (PRICE.replace("0.5", "-1"), "no price"),
        (PRICE.replace("2026-11-01", '"today"'), "date"),
        (PRICE + PRICE, "second price"),
        ("x = [", "not TOML"),
        ("", r"no \[\[price\]\]"),
    ],
)
def test_a_wrong_table_says_where(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        prices.parse(text, about="prices.toml")


# --- batches and slices --------------------------------------------------------------------------


def test_batches_count_samples() -> None:
    rows = compare(digits.mlp(), ["nvidia-h100-sxm"], batches=[1, 32]).rows
    by_batch = {r["batch"]: r for r in rows}
    assert by_batch[32]["throughput_per_s"] == pytest.approx(32 / by_batch[32]["latency_s"])
    assert by_batch[32]["usd_per_million"] < by_batch[1]["usd_per_million"]


def test_slices_up_to_a_number_of_chips() -> None:
    names = targets.expand("tpu-v5e:*")
    assert "tpu-v5e:2x2" in names
    assert [targets.find(n).chips for n in targets.expand("tpu-v5e", 4)] == [1, 4]
    assert targets.expand("nvidia-t4", 8) != []
    assert targets.expand("tpu-v5e") == ["tpu-v5e"]


# --- quality -------------------------------------------------------------------------------------


def test_a_limit_on_the_drop_excludes_recipes(tmp_path: Path) -> None:
    *_, images, labels = digits.split()
    np.savez(tmp_path / "test.npz", image=images, y=labels)
    judged = quality.judge(digits.mlp(), tmp_path / "test.npz")
    limits = Constraints(max_drop=0.02)
    made = plan(
        digits.mlp(), limits, targets=["nvidia-t4"], recipes=["none", "prune-50"], shape=SHAPE,
        quality=judged,
    )  # fmt: skip
    by_recipe = {c.recipe: c for c in made.candidates}
    lost = by_recipe["prune-50"].quality
    assert lost is not None
    assert made.best is not None
    assert made.best.recipe == ("none" if lost["drop"] > 0.02 else made.best.recipe)
    assert lost["drop"] > 0
    assert by_recipe["none"].quality == {
        "metric": "accuracy",
        "value": pytest.approx(lost["value"] + lost["drop"]),
        "drop": 0.0,
        "samples": len(labels),
    }


def test_the_drop_is_that_of_the_backends_own_placement(tmp_path: Path) -> None:
    *_, images, labels = digits.split()
    np.savez(tmp_path / "test.npz", image=images, y=labels)
    evaluated: list[str] = []
    judged = quality.judge(digits.cnn(), tmp_path / "test.npz", progress=evaluated.append)
    made = plan(
        digits.cnn(), targets=["cpu", "nvidia-t4"], recipes=["int8"], shape=SHAPE, quality=judged
    )
    engines = {c.backend for c in made.candidates if c.quality is not None}
    assert {"onnxruntime", "tensorrt", "openvino"} <= engines
    # OpenVINO takes what ONNX Runtime does: one evaluation serves both.
    again = [line for line in evaluated if line.startswith("evaluating: int8")]
    assert len(again) == len(set(again)) < len(engines)
    assert any("tensorrt" in line for line in again)


def test_a_limit_on_the_drop_needs_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(digits.mlp()), "--max-drop", "1%"]) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.02", 0.02), ("0", 0.0)])
def test_drops_are_read(text: str, share: float) -> None:
    assert parse_drop(text) == pytest.approx(share)


# --- the front, and what would have to change ----------------------------------------------------


def test_the_front_holds_what_nothing_beats() -> None:
    fast, cheap = candidate("fast", 1e-3, hourly=9.0), candidate("cheap", 2e-3, hourly=1.0)
    both, unknown = candidate("worse", 3e-3, hourly=9.0), candidate("unpriced", 4e-3, hourly=None)
    marked = {c.target.name: c.pareto for c in whatif.pareto([fast, cheap, both, unknown])}
    assert marked == {"fast": True, "cheap": True, "worse": False, "unpriced": False}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.floats(1e-4, 1), st.floats(0.1, 9)), min_size=1, max_size=6))
def test_the_front_is_never_empty_and_holds_the_fastest(pairs: list[tuple[float, float]]) -> None:
    made = [candidate(f"c{i}", s, hourly=h) for i, (s, h) in enumerate(pairs)]
    front = [c for c in whatif.pareto(made) if c.pareto]
    fastest = min(s for s, _ in pairs)
    assert any(c.estimate is not None and c.estimate.seconds == fastest for c in front)


def test_the_price_at_which_a_loser_wins_is_the_price_at_which_it_does() -> None:
    first, second = candidate("first", 1e-3, hourly=1.0), candidate("second", 2e-3, hourly=1.0)
    lost = next(c for c in choose([first, second], Constraints(), "cost").candidates if c.wins_if)
    assert lost.wins_if == "an hour cost $0.500 or less instead of $1.00"
    again = candidate("second", 2e-3, hourly=0.499)
    best = choose([first, again], Constraints(), "cost").best
    assert best is not None
    assert best.target.name == "second"


def test_an_unknown_price_is_answered_with_the_one_that_would_do() -> None:
    chosen = choose(
        [candidate("a", 1e-3), candidate("b", 1e-3, hourly=None)], Constraints(), "cost"
    )
    lost = next(c for c in chosen.candidates if c.target.name == "b")
    assert lost.wins_if == "an hour cost $1.00 or less (its price is unknown: --prices)"


def test_a_slow_one_is_told_its_bottleneck() -> None:
    chosen = choose([candidate("a", 1e-3), candidate("b", 4e-3)], Constraints(), "latency")
    lost = chosen.candidates[1].wins_if
    assert lost == (
        "its call were 4.00 times faster: 1.00 ms instead of 4.00 ms; its memory takes 4.00 ms of "
        "that, which would have to be 1.00 ms"
    )
    late = choose([candidate("b", 4e-3)], Constraints(max_latency_s=1e-3), "cost").candidates[0]
    assert late.wins_if.startswith("its call were 4.00 times faster")


def test_a_bottleneck_that_is_not_enough_is_told() -> None:
    ops = (
        OpCost("a", "MatMul", 2e-3, Work(), "memory"),
        OpCost("b", "Softmax", 2e-3, Work(), "compute"),
    )
    slow = candidate("b", 4e-3)
    assert slow.estimate is not None
    slow = replace(slow, estimate=replace(slow.estimate, by_op=ops))
    lost = choose([candidate("a", 1e-3), slow], Constraints(), "latency").candidates[1].wins_if
    assert lost.endswith("; its memory takes 2.00 ms of that, and without it 2.00 ms are left")


def test_intervals_are_those_of_what_is_ranked() -> None:
    def one(name: str, hourly: float, joules: float) -> Candidate:
        made = candidate(name, 1e-3, hourly=hourly)
        assert made.estimate is not None
        around = {"dollars": (hourly, hourly * 1.01), "joules": (joules, joules)}
        estimate = replace(made.estimate, joules=joules, lo=5e-4, hi=2e-3, intervals=around)
        return replace(made, estimate=estimate)

    both = [one("a", 1.0, 1.0), one("b", 9.0, 2.0)]
    for objective, overlapping in (("latency", True), ("cost", False), ("energy", False)):
        lost = choose(both, Constraints(), cast("Any", objective)).candidates[1]
        assert ("intervals overlap" in lost.verdict) == overlapping, lost.verdict
    assert lost.wins_if.startswith("it drew 1000 W instead of 2000 while it works, or were 2.00")


def test_all_limits_that_are_missed_are_told_and_no_half_answer_given() -> None:
    dear = candidate("dear", 4e-3, hourly=9.0)
    limits = Constraints(max_latency_s=3.9e-3, max_usd_per_million=1.0)
    lost = choose([dear], limits, "latency").candidates[0]
    assert "latency 4.00 ms is above the limit of 3.90 ms (by 2.6%)" in lost.verdict
    assert "; cost 10 USD per million calls is above the limit of 1 USD" in lost.verdict
    assert "times faster" in lost.wins_if
    assert ", and an hour cost $0.900 or less instead of $9.00" in lost.wins_if
    # What fails a limit is not told what would make it the cheapest.
    unpriced = candidate("unpriced", 4e-3, hourly=None)
    chosen = choose([candidate("a", 1e-3), unpriced], Constraints(max_latency_s=2e-3), "cost")
    assert chosen.candidates[1].wins_if.startswith("its call were 2.00 times faster")
    limits = Constraints(max_latency_s=2e-3, max_usd_per_million=1.0, max_drop=0.01)
    assert not choose([unpriced], limits, "latency").candidates[0].wins_if


def test_a_drop_names_the_recipes_that_keep_the_limit() -> None:
    lossy = replace(candidate("a", 1e-3), recipe="int8", quality={"drop": 0.1})
    good = replace(candidate("a", 2e-3), quality={"drop": 0.0})
    lost = choose([lossy, good], Constraints(max_drop=0.05), "latency").candidates[1]
    assert lost.recipe == "int8"
    assert lost.wins_if == "its recipe were none, which keeps the limit"


def test_a_better_way_on_the_same_target_is_named() -> None:
    there = [candidate("b", 2e-3), replace(candidate("b", 4e-3), backend="tvm")]
    lost = choose([candidate("a", 1e-3), *there], Constraints(), "latency").candidates[2]
    assert lost.verdict.endswith("; xla/none there: 2.00 ms")


def test_a_recipe_that_does_nothing_is_no_choice_of_its_own(
    shared_data: Callable[[str], Path],
) -> None:
    # Nothing of it is a product of matrices but the head, which is not large enough.
    chosen = plan(
        shared_data("models/mlperf_ic_resnet8_fp32.onnx"),
        targets=["nvidia-l4", "tpu-v5e"],
        recipes=["int4", "none"],
        shape=["N=1"],
    )
    assert chosen.best is not None
    assert chosen.best.recipe == "none"
    for one in chosen.candidates:
        if one.recipe == "int4":
            twin = f"{one.target.name}/{one.backend}/none"
            assert one.verdict == f"the same as {twin}: its recipe changes nothing of this model"


def test_the_answer_says_what_was_chosen_what_comes_next_and_what_it_rests_on() -> None:
    near, far = candidate("b", 1.5e-3), candidate("c", 9e-3)
    limits = Constraints(max_latency_s=5e-3)
    said = to_json(choose([candidate("a", 1e-3), near, far], limits, "cost"))["answer"]
    assert said.startswith("a/xla/none: cost ")
    assert "; latency 1.00 ms of at most 5.00 ms" in said
    assert "Next on another target: b/xla/none" in said
    assert to_json(choose([far], limits, "cost"))["answer"] is None


def test_rows_carry_it_all() -> None:
    one = replace(candidate("a", 1e-3), batch=4, quality={"drop": 0.1}, pareto=True)
    shown = row(one)
    json.dumps(shown, allow_nan=False)
    assert shown["batch"] == 4
    assert shown["energy_per_sample_j"] == pytest.approx(1e-3 / 4)
    assert shown["quality"] == {"drop": 0.1}


def test_an_fpga_takes_a_batch_frame_by_frame() -> None:
    rows = compare(digits.mlp(), ["amd-zcu104"], recipes=["int8"], batches=[1, 64]).rows
    one, many = sorted(rows, key=lambda r: r["batch"])
    assert many["latency_s"] > 4 * one["latency_s"]
    assert many["throughput_per_s"] == pytest.approx(one["throughput_per_s"])
