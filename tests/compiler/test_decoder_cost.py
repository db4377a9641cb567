"""Serving predictions on the trained Shakespeare model: what grows with what, and what fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from trivium.compiler import targets
from trivium.compiler.decoder_cost import Costs, Speculation, predict
from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.types import Workload

LOAD = Workload(prompt_tokens=64, new_tokens=64)


@pytest.fixture(scope="module")
def folder(shared_data: Callable[[str], Path]) -> Path:
    return shared_data("llm-shakespeare")


@pytest.fixture(scope="module")
def costs(folder: Path) -> Costs:
    return Costs(folder, "nvidia-h100-sxm", "xla")


def test_a_generation_is_its_prompt_and_its_steps(costs: Costs) -> None:
    found = predict(costs, LOAD)
    assert found.first_token_s is not None
    assert found.step_s is not None
    assert found.total_s == pytest.approx(found.first_token_s + 63 * found.step_s)
    assert found.total_s is not None
    assert found.tokens_per_s == pytest.approx(64 / found.total_s)
    for name, (low, high) in found.intervals.items():
        assert low < getattr(found, name) < high
    # Four layers, four heads of keys and values of 32 float32 each.
    assert found.cache_bytes == 128 * 4 * 2 * 4 * 32 * 4
    assert found.weights_bytes == pytest.approx(3.4e6 * 4, rel=0.1)
    assert found.calibration


def test_batches_share_the_weights_and_long_caches_take_longer(costs: Costs) -> None:
    one, many = predict(costs, LOAD), predict(costs, replace(LOAD, batch=64))
    assert one.tokens_per_s is not None
    assert many.tokens_per_s is not None
    assert 10 * one.tokens_per_s < many.tokens_per_s < 64 * one.tokens_per_s
    short, long = costs.call(512, 1, 64), costs.call(512, 1, 512)
    assert short.seconds is not None
    assert long.seconds is not None
    assert long.seconds > 1.5 * short.seconds
    twice = predict(costs, replace(LOAD, batch=8, concurrency=16))
    assert twice.rounds == 2


def test_the_largest_batch_fits_and_the_next_does_not(costs: Costs, folder: Path) -> None:
    small = replace(costs.target, memory_bytes=2e8)
    found = predict(Costs(folder, small, "xla"), replace(LOAD, batch=1000))
    assert found.largest_batch is not None
    assert 10 < found.largest_batch < 1000
    assert any("does not fit" in note for note in found.notes)
    more = predict(Costs(folder, replace(small, memory_bytes=4e8), "xla"), LOAD)
    assert more.largest_batch is not None
    assert more.largest_batch > 2 * found.largest_batch


def test_speculation_pays_by_what_is_accepted(costs: Costs) -> None:
    def step(acceptance: float) -> float:
        found = predict(costs, LOAD, Speculation(costs, 3, acceptance))
        assert found.step_s is not None
        return found.step_s

    assert Speculation(costs, 3, 0.5).accepted == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert step(0.9) < step(0.5) < step(0.1)
    plain = predict(costs, LOAD).step_s
    assert plain is not None
    # The draft is as large as the model: nothing can be won.
    assert step(1.0) > 0.8 * plain


def test_what_is_no_generation_is_told(costs: Costs, shared_data: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match="tokens of its prompt"):
        predict(costs, Workload())
    with pytest.raises(Unsupported, match="no cache can be given"):
        Costs(shared_data("models/mnist_cnn_cntk.onnx"), targets.find("nvidia-t4"), "xla")


# --- as candidates -------------------------------------------------------------------------------


def test_a_generation_is_compared_by_its_tokens(folder: Path) -> None:
    from trivium.compiler.compare import compare
    from trivium.compiler.rows import row

    on = ["nvidia-h100-sxm", "tpu-v5e", "amd-zcu104"]
    found = compare(folder, on, context=128, new_tokens=64, batches=[1, 8], backends="all")
    rows = [row(c) for c in found.candidates]
    priced = [r for r in rows if r["feasible"]]
    assert {r["target"] for r in priced} == {"nvidia-h100-sxm", "tpu-v5e"}
    for one in priced:
        serving = one["serving"]
        assert one["throughput_per_s"] == pytest.approx(serving["tokens_per_s"])
        assert one["latency_s"] == pytest.approx(serving["first_token_s"] + 63 * serving["step_s"])
        assert serving["cache_bytes"] == one["batch"] * 128 * 4 * 2 * 4 * 32 * 4
        lengths = [point["context"] for point in serving["by_context"]]
        assert lengths == sorted(set(lengths))
        assert 32 in lengths
        assert serving["by_context"][0]["tokens_per_s"] >= serving["by_context"][-1]["tokens_per_s"]
        assert {o["op_type"].partition(":")[0] for o in one["operators"]} == {"prefill", "decode"}
    on_gpu = [r for r in priced if r["target"] == "nvidia-h100-sxm" and r["batch"] == 8]
    assert {r["backend"] for r in on_gpu} == {"xla", "tensorrt"}
    gpu = next(r for r in on_gpu if r["backend"] == "xla")
    hourly = gpu["usd_per_hour"]
    assert gpu["usd_per_million"] == pytest.approx(
        hourly / 3600 / gpu["throughput_per_s"] * 1e6, rel=0.01
    )
    assert gpu["energy_per_sample_j"] == pytest.approx(gpu["energy_j"] / 512)
    alone = predict(Costs(folder, "nvidia-h100-sxm", "xla"), replace(LOAD, batch=8))
    assert gpu["serving"]["tokens_per_s"] == pytest.approx(alone.tokens_per_s)
    reasons = {r["backend"]: r["refusals"][0] for r in rows if not r["feasible"]}
    assert "tvm cannot drive a generator" in reasons["tvm"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"context": 64, "new_tokens": 64}, "leaves no prompt"),
        ({"new_tokens": 64}, "part of a context"),
        ({"context": 64, "shape": ["seq=4"]}, "follow from its context"),
    ],
)
def test_what_is_no_load_is_told(folder: Path, given: dict[str, object], says: str) -> None:
    from trivium.compiler.compare import compare

    with pytest.raises(BadInput, match=says):
        compare(folder, ["tpu-v5e"], **given)  # type: ignore[arg-type]  # some at a time


def test_a_limit_on_the_first_token(folder: Path) -> None:
    from trivium.compiler.plan import Constraints, plan

    chosen = plan(
        folder,
        Constraints(max_first_token_s=1e-9),
        "cost",
        targets=["nvidia-h100-sxm"],
        backends=["xla"],
        context=64,
    )
    assert chosen.best is None
    assert "time to the first token" in chosen.candidates[0].verdict


def test_a_small_model_on_a_gpu_waits_for_launches_and_says_that_they_are_a_prior(
    costs: Costs,
) -> None:
    """One token of 3.4M weights: nothing to compute, hardly anything to read."""
    step = costs.call(1, 1, 255)
    assert step.bound == "launch"
    assert any("XLA was not measured on a GPU" in note for note in step.notes)
    assert not any(op.bound == "compute" for op in step.by_op)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "xla"])
def test_caches_are_priced_as_a_compile_makes_them(
    folder: Path, backend: str, tmp_path: Path
) -> None:
    import trivium

    pytest.importorskip({"xla": "jax"}.get(backend, backend))
    for recipe in ("int4", "bf16") if backend == "openvino" else ("int4",):
        made = trivium.compile(
            folder, "cpu", backend=backend, recipe=recipe, context=64, out=tmp_path / recipe
        )
        assert made.generator is not None
        costs = Costs(folder, "cpu", backend, recipe)
        assert {one.dtype for one in made.generator.caches} == {costs.cache_dtype}
        each = sum(one.bytes_per_token for one in made.generator.caches)
        assert predict(costs, LOAD).cache_bytes == 128 * each


def test_every_engine_counts_a_cache_once_and_a_batch_that_is_said_to_fit_does(
    folder: Path,
) -> None:
    load = replace(LOAD, batch=512)
    for backend in ("xla", "tensorrt"):
        costs = Costs(folder, "nvidia-h100-sxm", backend)
        found = predict(costs, load)
        first = costs.call(512, 64, 64)
        assert found.bytes_peak is not None
        assert first.bytes_peak is not None
        # Room for the tokens to come, beside what the prompt's call takes.
        assert found.bytes_peak == first.bytes_peak + found.cache_bytes / 2
        assert found.bytes_peak < found.weights_bytes + 2 * found.cache_bytes
        small = replace(costs.target, memory_bytes=2e8)
        fits = predict(Costs(folder, small, backend), load).largest_batch
        assert fits is not None
        just = predict(Costs(folder, small, backend), replace(load, batch=fits))
        assert just.bytes_peak is not None
        assert just.bytes_peak <= 0.9 * 2e8
        over = predict(Costs(folder, small, backend), replace(load, batch=fits + fits // 20))
        assert over.bytes_peak is not None
        assert over.bytes_peak > 0.9 * 2e8
        assert not any("does not fit" in note for note in just.notes)
        assert any("does not fit" in note for note in over.notes)


def test_what_recipes_leave_of_a_weight_is_read_as_it_is_stored(folder: Path) -> None:
    alone, both = (Costs(folder, "nvidia-h100-sxm", "xla", r) for r in ("int4", "int4+bf16"))
    assert both.cache_dtype == "bfloat16"
    narrow, wide = both.call(1, 1, 64), alone.call(1, 1, 64)
    # The casts of dequantized weights are no kernels of their own.
    assert sum("Cast" in op.op_type for op in narrow.by_op) < 6
    assert narrow.seconds is not None
    assert wide.seconds is not None
    assert narrow.seconds < 1.05 * wide.seconds
