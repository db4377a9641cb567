"""Blame and budgets: what is said of a layer is what a run of it shows, and recipes keep limits."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivium.compiler import cli, recipe
from trivium.compiler.errors import BadInput
from trivium.compiler.evaluate import evaluate
from trivium.compiler.explain import instrument
from trivium.compiler.explain.blame import blame
from trivium.compiler.explain.budget import fit_budget, knapsack, parse_budget, to_toml
from trivium.compiler.explain.mix import mixed
from trivium.compiler.explain.run import explain
from trivium.compiler.explain.study import Study, decibels, open_study
from trivium.compiler.recipe import Recipe, Step
from trivium.models import digits

HARSH = Recipe("harsh", (Step("prune-magnitude", {"sparsity": 0.97}),))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    *_, images, labels = digits.split()
    path = tmp_path_factory.mktemp("data") / "test.npz"
    np.savez(path, image=images, y=labels)
    return path


@pytest.fixture(scope="module")
def study(data: Path) -> Study:
    return open_study(digits.cnn(), ["int8", "fp16", HARSH], data)


def feed(study: Study) -> dict[str, Any]:
    return next(iter(study._batches(study.part)))[0]


@pytest.mark.parametrize("number", [1, 3])
def test_all_layers_switched_are_the_recipe_exactly(study: Study, number: int) -> None:
    assert study._run is not None
    after = instrument.session(study.changed[number - 1].after.clone())(feed(study))[0]
    switches = study.choice(study.all_of(number))
    switched = study._run({**feed(study), instrument.SWITCHES: switches})[0]
    assert (after == switched).all()
    source = instrument.session(study.before.clone())(feed(study))[0]
    nothing = study._run({**feed(study), instrument.SWITCHES: study.choice({})})[0]
    assert (source == nothing).all()
    assert (source != after).any()


@given(seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_mix_as_a_graph_is_what_its_switches_say(study: Study, seed: int) -> None:
    rng = np.random.default_rng(seed)
    chosen = {name: int(rng.choice([0, *numbers])) for name, numbers in study.layers}
    found = [changed.found for changed in study.changed]
    mix = instrument.session(mixed(study.before, found, chosen))(feed(study))[0]
    assert study._run is not None
    switched = study._run({**feed(study), instrument.SWITCHES: study.choice(chosen)})[0]
    # Half precision on a CPU is float32 between casts, which an engine may leave out in pairs.
    np.testing.assert_allclose(mix, switched, atol=0.05 if 2 in chosen.values() else 0)


def test_noise_is_what_numpy_says_of_the_outputs(study: Study) -> None:
    found = blame(study).recipes[0]
    source = instrument.session(study.before.clone())
    after = instrument.session(study.changed[0].after.clone())
    signal = noise = 0.0
    for batch, _, count in study._batches(study.part):
        a, b = source(batch)[0][:count].astype(float), after(batch)[0][:count].astype(float)
        signal, noise = signal + (a**2).sum(), noise + ((a - b) ** 2).sum()
    assert found.output == pytest.approx(noise / signal, rel=1e-6)
    assert found.layers[-1].cumulative == pytest.approx(found.output, rel=0.02)
    assert found.path[-1][1] == pytest.approx(found.output, rel=0.02)


def test_a_weights_noise_is_that_of_its_codes(study: Study) -> None:
    blamed = {layer.name: layer for layer in blame(study).recipes[0].layers}
    tensor = next(t for t in blamed["logits"].tensors if t.weight and t.stored == "int8")
    before = {n.name: n for n in study.before.graph}["logits"].inputs[1]
    after = {n.name: n for n in study.changed[0].after.graph}["logits"].inputs[1]
    assert before is not None
    assert before.const_value is not None
    assert after is not None
    node = after.producer()
    assert node is not None
    codes, scale = (v.const_value.numpy() for v in node.inputs[:2])  # type: ignore[union-attr]
    axis = [1, -1] if node.attributes["axis"].as_int() == 1 else [-1, 1]
    weight = before.const_value.numpy().astype(float)
    error = weight - codes.astype(float) * scale.reshape(axis)
    assert tensor.noise == pytest.approx((error**2).sum() / (weight**2).sum(), rel=1e-3)


def test_the_layer_that_hurts_is_blamed(data: Path) -> None:
    only = Recipe("one", (Step("prune-magnitude", {"sparsity": 0.9, "exclude": ["logits"]}),))
    found = explain(digits.cnn(), [only], data).recipes[0]
    assert {layer.name for layer in found.layers} == {"conv1"}
    assert found.worst[0].drop > 0.02
    assert found.worst[0].op_type == "Conv"


def test_a_layer_is_not_blamed_for_a_factor_that_its_neighbour_takes_back(data: Path) -> None:
    """What gets a graph ready for rounding moves factors between layers; no output changes."""
    static = Step("quantize-static", {"method": "minmax"})
    made = open_study(digits.cnn(), [Recipe("ready", (Step("equalize"), static)), "fp16"], data)
    assert [name for name, _ in made.changed[0].stages] == ["equalize", "quantize-static"]
    layers = blame(made).recipes[0].layers
    assert layers
    for layer in layers:
        noises = [layer.local, *(tensor.noise for tensor in layer.tensors)]
        assert all(noise is None or noise < 0.01 for noise in noises)


def test_passes_are_judged_one_after_another(data: Path) -> None:
    chain = Recipe("chain", (Step("prune-magnitude"), Step("quantize-static")))
    found = explain(digits.cnn(), [chain], data, samples=64).recipes[0]
    assert [one.name for one in found.passes] == ["prune-magnitude", "quantize-static"]
    assert found.passes[0].output != found.passes[1].output
    assert found.output == found.passes[1].output


def test_without_labels_the_source_is_the_judge(data: Path, tmp_path: Path) -> None:
    with np.load(data) as arrays:
        np.savez(tmp_path / "bare.npz", image=arrays["image"][:50])
    result = explain(digits.cnn(), [HARSH], tmp_path / "bare.npz", metric="cosine")
    assert result.baseline.value == pytest.approx(1.0)
    assert result.recipes[0].value < 0.999
    assert any("no labels" in note for note in result.notes)
    json.dumps(result.to_json(), allow_nan=False)


def test_a_recipe_that_changes_nothing_says_why(data: Path) -> None:
    with pytest.raises(BadInput, match="changes no layer"):
        explain(digits.cnn(), ["int4"], data)


def test_no_noise_is_no_decibels() -> None:
    assert decibels(0.0) is None
    assert decibels(None) is None
    assert decibels(0.001) == pytest.approx(30.0)


# --- budgets -------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.001, 1)), min_size=1, max_size=7),
    st.floats(0.01, 3),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_knapsack_is_exact(items: list[tuple[float, float]], limit: float) -> None:
    """Two recipes for each layer: the second gains half as much for a third of the noise."""
    gains = {(f"l{i}", n): g / n for i, (g, _) in enumerate(items) for n in (1, 2)}
    noise = {(f"l{i}", n): e / (2 * n - 1) for i, (_, e) in enumerate(items) for n in (1, 2)}
    chosen = knapsack(gains, noise, limit)
    assert sum(noise[item] for item in chosen.items()) <= limit * (1 + 1e-6)
    best = 0.0
    for numbers in itertools.product((0, 1, 2), repeat=len(items)):
        keys = [(f"l{i}", n) for i, n in enumerate(numbers) if n]
        if sum(noise[key] for key in keys) <= limit * (1 - 1e-6):
            best = max(best, sum(gains[key] for key in keys))
    assert sum(gains[item] for item in chosen.items()) >= best - 1e-6


def test_a_budget_becomes_a_recipe_that_a_compile_takes_and_that_holds(
    data: Path, tmp_path: Path
) -> None:
    study = open_study(digits.cnn(), ["int8"], data)
    fitted = fit_budget(study, blame(study).recipes, 0.01, objective="memory")
    assert fitted.recipe is not None
    assert fitted.best is not None
    assert fitted.drop is not None
    assert fitted.drop <= 0.01
    assert fitted.best.weights_bytes < fitted.plain.weights_bytes
    file = tmp_path / "mixed.toml"
    file.write_text(to_toml(fitted.recipe))
    assert recipe.read(str(file)).steps == recipe.parse(to_toml(fitted.recipe)).steps
    out = tmp_path / "out"
    line = ["compile", digits.cnn(), "--target", "cpu", "--recipe", file, "--calib", data]
    assert cli.main([*map(str, line), "-o", str(out), "--json"]) == 0
    drop = evaluate(digits.cnn(), data).value - evaluate(out, data).value
    assert drop <= 0.01


def test_a_budget_leaves_out_what_costs_too_much(study: Study) -> None:
    fitted = fit_budget(study, blame(study).recipes, 0.01, objective="memory")
    assert fitted.best is not None
    assert 3 not in fitted.best.chosen.values()  # pruning gains no bytes here, only noise
    assert fitted.front[0].weights_bytes == min(p.weights_bytes for p in fitted.front)
    document = fitted.to_json()
    assert any(point["pareto"] for point in document["front"])
    assert document["verified"]["holds"]


@pytest.mark.parametrize(("text", "limit"), [("max-drop=1%", 0.01), ("max-drop=0.02", 0.02)])
def test_budgets_are_read(text: str, limit: float) -> None:
    assert parse_budget(text) == pytest.approx(limit)


@pytest.mark.parametrize("text", ["1%", "max-drop=", "max-drop=-1%", "drop=1%", "max-drop=nan"])
def test_what_is_no_budget_names_the_flag(text: str) -> None:
    with pytest.raises(BadInput, match="--budget"):
        parse_budget(text)


# --- the command line ----------------------------------------------------------------------------


def test_the_command_line_explains_and_writes_the_recipe(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["explain", digits.cnn(), "--recipe", "int8", "--data", data, "--samples", "64"]
    words = [*map(str, line), "--budget", "max-drop=2%", "--objective", "memory"]
    code = cli.main([*words, "-o", str(tmp_path / "m.toml"), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (tmp_path / "m.toml").read_text() == document["budget"]["recipe"]
    assert document["recipes"][0]["layers"][0]["tensors"]


def test_a_budget_that_nothing_meets_is_exit_code_1(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "harsh.toml").write_text(to_toml(HARSH))
    line = ["explain", digits.cnn(), "--recipe", tmp_path / "harsh.toml", "--data", data]
    code = cli.main([*map(str, line), "--budget", "max-drop=0.1%", "--samples", "32"])
    assert code == 1
    assert "no mix of" in capsys.readouterr().err


def test_a_recipe_to_write_needs_a_budget(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["explain", digits.cnn(), "--recipe", "int8", "--data", data, "-o", "x.toml"]
    assert cli.main(list(map(str, line))) == 2
    assert "--budget" in capsys.readouterr().err


@pytest.mark.slow
def test_a_generator_is_explained_by_perplexity(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    model = shared_data("llm-shakespeare")
    ids = np.load(model / "val_ids.npy")[:2050]
    np.save(tmp_path / "ids.npy", ids)
    result = explain(
        model, ["int4"], tmp_path / "ids.npy", metric="perplexity", samples=2, window=128
    )
    found = result.recipes[0]
    assert result.baseline.value < found.value < 1.1 * result.baseline.value
    assert len(found.layers) > 10
    assert all(layer.op_type in ("MatMul", "Gemm") for layer in found.layers)
