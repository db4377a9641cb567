"""The comparison with the reference: it notices every way to be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import trivium
from trivium.compiler import verify
from trivium.compiler.artifact import Artifact

GOOD = {"y": np.array([1.0, -2.0, 4.0], np.float32)}


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({}, "missing"),
        ({"y": np.zeros(2, np.float32)}, "shape"),
        ({"y": np.array([1.0, np.nan, 4.0], np.float32)}, "NaN"),
    ],
)
def test_problems_that_no_number_expresses(other: dict[str, np.ndarray], problem: str) -> None:
    comparison = verify.compare([GOOD], [other])
    assert problem in comparison.problem
    assert not comparison.within(1e9)


def test_errors_are_relative_to_the_magnitude_of_the_output() -> None:
    comparison = verify.compare([GOOD], [{"y": GOOD["y"] + np.float32(0.4)}])
    assert comparison.max_abs_error == pytest.approx(0.4)
    assert comparison.max_rel_error == pytest.approx(0.1)
    assert comparison.within(0.11)
    assert not comparison.within(0.09)


def test_the_same_nan_and_infinity_are_no_difference() -> None:
    odd = {"y": np.array([np.nan, np.inf, -np.inf, 0.0])}
    assert verify.compare([odd], [odd]) == verify.SAME


def judge(actual: float, optimized: float, **how: object) -> verify.Verification:
    settings = {"tolerance": verify.FINE, "lossy": False, "max_error": None, "compared": {}, **how}
    outputs = [[{"y": np.array([x])}] for x in (1.0, optimized, actual)]
    return verify.judge(*outputs, **settings)  # type: ignore[arg-type]


def test_fidelity_and_accuracy_are_kept_apart() -> None:
    # A lossy recipe may move the graph away from the source; the engine may not move further.
    assert judge(1.2, 1.2, lossy=True).status == "passed"
    assert judge(1.2, 1.2, lossy=False).status == "failed"
    assert "engine" in judge(1.3, 1.2, lossy=True).reason
    assert "--max-error" in judge(1.2, 1.2, lossy=True, max_error=0.1).reason


def test_what_is_nowhere_finite_is_said_to_be_compared_with_nothing() -> None:
    passed = judge(1.0, 1.0)
    assert passed.compared is not None
    assert verify.caveat(passed.compared) == ""
    blind = [{"y": np.full(3, np.nan), "z": np.array([np.inf, 1.0]), "n": np.array([1])}]
    given = {"tolerance": verify.FINE, "lossy": False, "max_error": None, "compared": {}}
    result = verify.judge(blind, blind, blind, **given)  # type: ignore[arg-type]
    assert result.compared is not None
    assert result.compared["not_finite"] == ["y"]
    assert "nothing to compare in y" in verify.caveat(result.compared)


def test_a_step_of_a_coarse_grid_is_forgiven_and_a_wrong_engine_is_not() -> None:
    want = np.random.default_rng(0).standard_normal(1000)
    step, wrong = want.copy(), np.roll(want, 1)
    step[3] += 0.5
    one = verify.compare([{"y": want}], [{"y": step}])
    assert not one.within(verify.FINE)
    assert one.within(verify.COARSE)
    assert not verify.compare([{"y": want}], [{"y": wrong}]).within(verify.COARSE)


def test_two_engines_may_differ_by_as_much_as_the_grid_is_coarse() -> None:
    coarse = {"tolerance": verify.COARSE, "lossy": True}
    assert judge(1.25, 1.4, **coarse).status == "passed"  # nearer to the source than the graph
    assert judge(1.6, 1.4, **coarse).status == "failed"  # as far from the graph, on the far side
    assert judge(1.25, 1.4, **{**coarse, "lossy": False}).status == "failed"
    assert judge(1.25, 1.01, **coarse).status == "failed"  # further from it than the grid is coarse


def test_verify_repeats_the_comparison(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    source = shared_data("models/mnist_mlp_onnxmlir.onnx")
    artifact = trivium.compile(source, "cpu", out=tmp_path / "out")
    again = verify.verify(artifact)
    assert again.status == "passed"
    assert again.accuracy is not None
    assert again.accuracy.max_rel_error == artifact.manifest["verification"]["max_rel_error"]

    # Change what is expected, checksum and all: the artifact is sound, and wrong.
    samples = verify.read_samples(artifact.path / verify.SOURCE)
    for sample in samples:
        for array in sample.values():
            array += 1
    verify.write_samples(artifact.path, verify.SOURCE, samples)
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    from trivium.compiler.artifact import write_manifest

    write_manifest(artifact.path, manifest)
    assert verify.verify(Artifact.open(artifact.path)).status == "failed"
