"""Comparing and planning: real models over all targets, and choices whose reasons hold."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import trivium
from trivium.compiler import plan as planning
from trivium.compiler import plugins, targets
from trivium.compiler.compare import Comparison, compare
from trivium.compiler.errors import BadInput, ConstraintUnmet
from trivium.compiler.passing import Pass
from trivium.compiler.plan import Constraints, choose, parse_bytes, parse_seconds, require_best
from trivium.compiler.recipe import Recipe, Step
from trivium.compiler.rows import row
from trivium.compiler.timing import median_ranks, summarize, time_calls
from trivium.compiler.types import Candidate, Estimate, Preserves, Target, Workload


def candidate(
    name: str, seconds: float | None, *, refusals: tuple[str, ...] = (), dollars: float = 1e-6
) -> Candidate:
    if seconds is None:
        estimate = Estimate(None, notes=("no published memory bandwidth of it",))
    else:
        estimate = Estimate(
            seconds, seconds / 2, seconds * 2, bytes_peak=1e6, joules=seconds, dollars=dollars
        )
    return Candidate(Target(name, "gpu", ("xla",), watts=100.0), "xla", "none", estimate, refusals)


FAST = candidate("fast", 1e-3, dollars=9e-6)
SLOW = candidate("slow", 4e-3, dollars=2e-6)
UNKNOWN = candidate("unknown", None)
REFUSED = candidate(
    "refused", 1e-4, refusals=("node a (Loop): no loops", "node b (Loop): no loops")
)
ALL = (SLOW, REFUSED, UNKNOWN, FAST)


# --- choosing ------------------------------------------------------------------------------------


def test_the_least_latency_wins_and_every_loser_says_why() -> None:
    chosen = choose(ALL, Constraints(), "latency")
    verdicts = {c.target.name: c.verdict for c in chosen.candidates}
    assert chosen.best is not None
    assert chosen.best.target.name == "fast"
    assert (
        verdicts["slow"]
        == "latency 4.00 ms: 4.00 times that of fast/xla/none; their intervals overlap"
    )
    assert verdicts["unknown"] == "latency unknown: no published memory bandwidth of it"
    assert verdicts["refused"] == "cannot run it: node a (Loop): no loops (and 1 more)"


@pytest.mark.parametrize(
    ("objective", "winner"),
    [("latency", "fast"), ("throughput", "fast"), ("cost", "slow"), ("energy", "fast")],
)
def test_each_objective(objective: planning.Objective, winner: str) -> None:
    chosen = choose(ALL, Constraints(), objective)
    assert chosen.best is not None
    assert chosen.best.target.name == winner


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (
            Constraints(max_latency_s=2e-3),
            "latency 4.00 ms is above the limit of 2.00 ms (2 times)",
        ),
        (
            Constraints(min_throughput_per_s=500),
            "throughput 250 calls/s is below the limit of 500 calls/s (2 times)",
        ),
    ],
)
def test_a_limit_excludes_with_the_figure(limits: Constraints, reason: str) -> None:
    chosen = choose(ALL, limits, "cost")
    assert chosen.best is not None
    assert chosen.best.target.name == "fast"
    assert next(c for c in chosen.candidates if c.target.name == "slow").verdict == reason


def test_an_unknown_figure_does_not_keep_a_limit() -> None:
    chosen = choose([UNKNOWN], Constraints(max_usd_per_million=5.0), "latency")
    assert chosen.best is None
    assert chosen.candidates[0].verdict.startswith("cost unknown, so the limit cannot be checked")


def test_nothing_qualifies_is_exit_code_1_and_names_the_nearest() -> None:
    chosen = choose(ALL, Constraints(max_latency_s=1e-6), "latency")
    with pytest.raises(ConstraintUnmet, match="slow/xla/none") as caught:
        require_best(chosen)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_nothing_runs_it() -> None:
    with pytest.raises(ConstraintUnmet, match="none of them can run"):
        require_best(choose([REFUSED], Constraints(), "latency"))


@given(st.permutations(ALL))
def test_the_choice_does_not_depend_on_the_order(order: list[Candidate]) -> None:
    chosen = choose(order, Constraints(), "latency")
    assert chosen.best is not None
    assert chosen.best.target.name == "fast"
    assert all(c.verdict for c in chosen.candidates)
    assert len(chosen.candidates) == len(ALL)


# --- reading limits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("5ms", 5e-3), ("0.2 s", 0.2), ("0.005", 5e-3), ("30us", 30e-6)]
)
def test_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "size"), [("16GiB", 2**34), ("1.5GB", 1.5e9), ("100", 100.0)])
def test_bytes(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "fast", "5 parsecs", "-1ms", "0s", "nan", "1e999ms5"])
def test_what_is_no_duration_names_the_flag(text: str) -> None:
    with pytest.raises(BadInput, match="--max-latency"):
        parse_seconds(text)


# --- comparing real models -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet(shared_data: Callable[[str], Path]) -> Comparison:
    return compare(shared_data("models/cifar_resnet20.onnx"), shape=["N=1"], backends="all")


def test_every_target_has_a_row(resnet: Comparison) -> None:
    assert {r["target"] for r in resnet.rows} == set(targets.names())


def test_rows_are_json_with_the_promised_keys(resnet: Comparison) -> None:
    document = json.loads(json.dumps(resnet.to_json(), allow_nan=False))
    assert set(document) >= {"model", "workload", "rows", "best"}
    promised = {
        *("target", "backend", "feasible", "refusals", "latency_s", "interval_s", "measured"),
        *("throughput_per_s", "memory_bytes", "energy_j", "usd_per_million", "bound"),
    }
    for r in document["rows"]:
        assert promised <= set(r)
        assert r["feasible"] == (not r["refusals"])
        if r["feasible"] and r["latency_s"] is None:
            assert r["notes"]


def test_the_best_has_the_least_latency(resnet: Comparison) -> None:
    known = [r for r in resnet.rows if r["feasible"] and r["latency_s"] is not None]
    best = resnet.best
    assert best is not None
    assert row(best)["latency_s"] == min(r["latency_s"] for r in known)
    assert resnet.to_json()["best"] == f"{best.target.name}/{best.backend}/{best.recipe}"


def test_a_symbolic_dimension_names_itself_and_the_flag(shared_data: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match=r"input\[N\].*--shape"):
        compare(shared_data("models/cifar_resnet20.onnx"), ["cpu"])


def test_an_unknown_backend_is_refused(shared_data: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match="no backend named 'magic'"):
        compare(shared_data("models/cifar_resnet20.onnx"), shape=["N=1"], backends=["magic"])


def test_a_recipe_that_cannot_run_is_a_refusal_beside_one_that_can(
    tmp_path: Path,
) -> None:
    model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 21]>
    agraph (float[2, 2] x) => (float[2, 2] y) { y = Relu(x) }
    """)
    onnx.save(model, tmp_path / "relu.onnx")
    failing = Recipe("failing", (Step("always-fails"),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "get", _with_a_failing_pass(plugins.get))
        result = compare(tmp_path / "relu.onnx", ["cpu"], recipes=("none", failing))
    rows = {r["recipe"]: r for r in result.rows}
    assert rows["none"]["feasible"]
    assert rows["failing"]["refusals"] == ["recipe failing: the pass cannot; try another"]


@dataclass(frozen=True)
class _AlwaysFails(Pass):
    """A pass that declines the whole model, as one does that lacks its calibration."""

    name: ClassVar[str] = "always-fails"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        raise BadInput("the pass cannot", remedy="try another")


def _with_a_failing_pass(get: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    def found(group: str, name: str) -> Any:
        return _AlwaysFails if name == "always-fails" else get(group, name)

    return found


def test_measuring_times_the_host(shared_data: Callable[[str], Path]) -> None:
    result = compare(
        shared_data("models/mlperf_kws_dscnn_fp32.onnx"),
        ["cpu", "nvidia-t4"],
        shape=["N=1"],
        backends=None,
        measure=True,
    )
    by_target = {r["target"]: r for r in result.rows}
    measured = by_target["cpu"]["measured"]
    assert measured["ci_s"][0] <= measured["latency_s"] <= measured["ci_s"][1]
    assert "this CPU" in measured["where"]
    assert by_target["nvidia-t4"]["measured"] is None


def test_plan_on_a_real_model(shared_data: Callable[[str], Path]) -> None:
    chosen = trivium.plan(
        shared_data("models/cifar_resnet20.onnx"),
        Constraints(max_latency_s=10.0),
        targets=["cpu", "lattice-ecp5-85f"],
        shape=["N=1"],
        backends=None,
    )
    assert chosen.best is not None
    assert chosen.best.target.name == "cpu"
    document = planning.to_json(chosen)
    assert document["best"]["target"] == "cpu"
    assert all(c["verdict"] for c in document["candidates"])


def test_plan_refuses_an_unknown_objective(shared_data: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match="latency, throughput, cost, energy"):
        trivium.plan(shared_data("models/cifar_resnet20.onnx"), objective="beauty")  # type: ignore[arg-type]  # the point


# --- timing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [11, 12, 101, 999, 1000, 5000])
def test_the_interval_of_the_median_covers_95_percent(count: int) -> None:
    low, high = median_ranks(count)
    assert low + high == count - 1
    # The chance that between low+1 and high of `count` fair coins show heads, from the normal law.
    covered = statistics.NormalDist(count / 2, count**0.5 / 2)
    chance = covered.cdf(high + 0.5) - covered.cdf(low + 0.5)
    assert 0.94 <= chance <= 0.995


def test_the_median_lies_in_its_interval() -> None:
    timing = summarize([5.0, 1.0, 3.0, 2.0, 4.0, 9.0, 8.0, 7.0, 6.0, 10.0, 11.0])
    assert timing.median_s == 6.0
    assert timing.ci_s[0] < 6.0 < timing.ci_s[1]


def test_timing_stops_at_its_budget() -> None:
    now = iter(range(10_000))
    timing = time_calls(lambda: None, budget_s=100.0, clock=lambda: float(next(now)))
    assert 11 <= timing.calls < 50
    assert timing.median_s == 1.0


def test_workload_is_told(resnet: Comparison) -> None:
    assert resnet.to_json()["workload"] == {"dims": {"N": 1}, "shapes": {}}
    assert isinstance(resnet.workload, Workload)
