"""A reference run piece by piece gives what one of the whole gives, in a bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.generation.conftest import CONFIGS, MORE
from tests.models.conftest import random_model, write_safetensors
from trivium.compiler import pieces, reference, samples
from trivium.compiler import recipe as recipes
from trivium.compiler.recipe import Context, Recipe, Step
from trivium.compiler.types import Workload

LARGE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 9, "num_attention_heads": 16, "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip

SCRIPT = """
import resource, sys
import numpy, onnx, onnx_ir, onnxruntime, onnxscript
import trivium
onnx.defs.get_all_schemas()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = trivium.compile(sys.argv[1], "cpu", recipe="int4", out=sys.argv[2], use_cache=False)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = made.manifest["verification"]
print((after - before) * 1024, found["status"], found["compared"]["reference"])
"""


def whole(path: Path, feeds: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return reference.run_file(path, feeds).outputs


@pytest.mark.parametrize("kind", [*CONFIGS, *MORE])
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int4"])
def test_pieces_give_what_the_whole_gives(kind: str, quantized: bool, tmp_path: Path) -> None:
    model = random_model({**CONFIGS, **MORE}[kind], tmp_path)
    if quantized:
        step = Step("quantize-weights", {"bits": 4, "block_size": 16, "min_elements": 0})
        recipes.run(Recipe("test", (step,)), model, Context())
    feeds = samples.seeded(model, Workload(), count=2)
    expected = reference.run_model(model, feeds)
    found, count = pieces.run(model, feeds, whole, most=8 << 10)
    assert count > 4
    for have, want in zip(found, expected.outputs, strict=True):
        assert list(have) == list(want)
        np.testing.assert_allclose(have["logits"], want["logits"], atol=1e-6)


def test_what_restores_a_weight_stays_with_its_reader(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"], tmp_path)
    step = Step("quantize-weights", {"bits": 4, "block_size": 16, "min_elements": 0})
    recipes.run(Recipe("test", (step,)), model, Context())
    for piece in pieces.cut(model, most=1):
        restored = {n.outputs[0] for n in piece.nodes if n.op_type == "DequantizeLinear"}
        read = {value for node in piece.nodes for value in node.inputs}
        assert restored <= read
    assert pieces.weights_bytes(model) > 2 * sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )


def checkpoint(folder: Path) -> int:
    """Write a Llama of random float32 weights; return its size in bytes."""
    hidden, wide, vocabulary = 1024, 2816, 4096
    shapes = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    for index in range(9):
        layer = f"model.layers.{index}"
        for name in ("q_proj", "o_proj"):
            shapes[f"{layer}.self_attn.{name}"] = (hidden, hidden)
        for name in ("k_proj", "v_proj"):
            shapes[f"{layer}.self_attn.{name}"] = (hidden // 4, hidden)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{layer}.mlp.{name}"] = (wide, hidden)
        shapes[f"{layer}.mlp.down_proj"] = (hidden, wide)
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": (rng.random(shape, np.float32) - np.float32(0.5)) / np.float32(16)
        for name, shape in shapes.items()
    }
    norms = [
        f"model.layers.{i}.{n}_layernorm" for i in range(9) for n in ("input", "post_attention")
    ]
    for name in ("model.norm", *norms):
        tensors[f"{name}.weight"] = np.ones(hidden, np.float32)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(LARGE))
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.slow
def test_a_checkpoint_is_compiled_in_less_memory_than_it_has(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    stored = checkpoint(folder)
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, status, *how = result.stdout.split()
    assert status == "passed"
    assert " ".join(how[2:]).endswith("pieces of up to 128 MiB of weights")
    assert stored > 400 << 20
    assert int(grown) < 300 << 20
