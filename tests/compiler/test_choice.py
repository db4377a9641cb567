"""What a choice is made of: prices, batches, slices, quality, the front, what would change it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivium.compiler import cli, prices, quality, recipe, targets, whatif
from trivium.compiler.compare import compare
from trivium.compiler.errors import BadInput
from trivium.compiler.plan import Constraints, choose, parse_drop, plan
from trivium.compiler.rows import name_of, row
from trivium.compiler.types import Candidate, Estimate, Target
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
        "its call were 4.00 times faster: 1.00 ms instead of 4.00 ms, most of which is its memory"
    )
    late = choose([candidate("b", 4e-3)], Constraints(max_latency_s=1e-3), "cost").candidates[0]
    assert late.wins_if.startswith("its call were 4.00 times faster")


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
