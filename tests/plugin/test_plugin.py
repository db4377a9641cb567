"""A plugin outside of the project takes the same road as the built-ins: installed by pip, found
by entry points, used from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

PLUGIN = Path(__file__).parent / "evaluator"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    source = folder / "source"
    subprocess.run(["cp", "-r", PLUGIN, source], check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
               "--no-build-isolation", "--target", str(folder / "site"), str(source)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return folder / "site"


def trivium(site: Path, *arguments: object) -> Any:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "trivium.compiler.cli", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    x = ir.val("x", ir.DataType.FLOAT, [2, 3])
    inner = ir.node("Neg", [x])
    outer = ir.node("Neg", inner.outputs)
    result = ir.node("Exp", outer.outputs)
    y = result.outputs[0]
    y.name, y.shape, y.dtype = "y", ir.Shape([2, 3]), ir.DataType.FLOAT
    graph = ir.Graph([x], [y], nodes=[inner, outer, result], opset_imports={"": 24}, name="g")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_plugin_is_listed_beside_the_built_ins(site: Path) -> None:
    names = {row["name"] for row in trivium(site, "backends")}
    assert {"evaluator", "onnxruntime"} <= names
    assert "abacus" in {row["name"] for row in trivium(site, "targets")}
    assert trivium(site, "passes", "negate-twice")["preserves"] == "exact"


def test_a_plugin_compiles_and_runs(site: Path, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[pass]]\nname = "negate-twice"\n')
    out = tmp_path / "out"
    made = trivium(site, "compile", model, "--target", "abacus", "--recipe", recipe, "-o", out)
    assert made["verification"]["status"] == "passed"
    assert made["backend"] == "evaluator"

    rows = {r["name"]: r for r in trivium(site, "inspect", out)["recipe"]["applied"]}
    assert rows["negate-twice"]["modified"]
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 3), np.float32))
    trivium(site, "run", out, "--input", tmp_path / "x.npz", "--output", tmp_path / "y.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["y"], np.ones((2, 3)))


def test_two_plugins_of_one_name_are_an_error(site: Path, tmp_path: Path) -> None:
    info = tmp_path / "impostor-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: impostor\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trivium.targets]\nabacus = builtins:print\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), str(site), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "trivium.compiler.cli", "targets"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 2
    assert "two plugins offer 'abacus'" in done.stderr
