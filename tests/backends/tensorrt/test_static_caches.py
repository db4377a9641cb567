"""A decoder becomes a build folder with a profile for prefill and one for decode."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest

import trivium
from benchmarks import checkpoints
from trivium.backends.tensorrt import operators
from trivium.compiler.errors import ToolchainMissing

PREFILL = 16


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> trivium.Artifact:
    folder = tmp_path_factory.mktemp("tensorrt")
    source = checkpoints.write(folder, "1M")
    return trivium.compile(
        source, "nvidia-h100-sxm", backend="tensorrt", out=folder / "out", use_cache=False,
        context=64, prefill=[PREFILL],
    )  # fmt: skip


def test_caches_are_written_in_place(artifact: trivium.Artifact) -> None:
    model = ir.load(artifact.path / "model.onnx")
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("TensorScatter") == 2 * kinds.count("Attention") == 4
    assert not [reason for node in model.graph if (reason := operators.refusal(node))]
    for node in model.graph:
        if node.op_type == "Attention":
            assert len(node.inputs) == 4
            assert all(len(value.shape or ()) == 4 for value in node.inputs[:3] if value)
    assert artifact.generator is not None
    assert artifact.generator.form == "static"


def test_each_program_is_a_profile(artifact: trivium.Artifact) -> None:
    names = [program.name for program in artifact.programs]
    assert names == ["decode", f"prefill{PREFILL}"]
    profiles = json.loads((artifact.path / "engine.json").read_text())["profiles"]
    tokens = [profile["input_ids"] for profile in profiles]
    assert tokens == [{kind: [1, n] for kind in ("min", "opt", "max")} for n in (1, PREFILL)]
    readme = (artifact.path / "README.md").read_text()
    assert "profile 1: `prefill16`" in readme


def test_the_graph_is_held_to_the_source_and_the_engine_is_not(
    artifact: trivium.Artifact,
) -> None:
    details = artifact.manifest["details"]
    assert details["legalized_graph_max_rel_error"] < 1e-4
    assert artifact.manifest["verification"]["status"] == "not-run"
    with pytest.raises(ToolchainMissing, match="stay on the GPU"):
        artifact.load()
