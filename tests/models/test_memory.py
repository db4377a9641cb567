"""Building from a checkpoint of many gigabytes reads none of its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SIZES = {"vocab": 128_000, "hidden": 4096, "wide": 14336, "kv": 1024, "layers": 4}

SCRIPT = """
import resource, sys, time
import numpy, onnx_ir, onnxscript, trivium.passes.infer_shapes, trivium.models.llama
import onnx, onnx.shape_inference, onnx.defs
onnx.defs.get_all_schemas()
from pathlib import Path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from trivium.compiler import model
built = model.load(Path(sys.argv[1]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights = sum(v.const_value.nbytes for v in built.graph.initializers.values())
print(weights, (after - before) * 1024)
"""


def sparse_llama(folder: Path) -> int:
    """Write an 8B-like Llama in bfloat16 as a sparse file and return its size in bytes."""
    s = SIZES
    shapes = {
        "model.embed_tokens": [s["vocab"], s["hidden"]], "lm_head": [s["vocab"], s["hidden"]],
        "model.norm": [s["hidden"]],
    }  # fmt: skip
    for index in range(s["layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm": [s["hidden"]],
            f"{layer}.post_attention_layernorm": [s["hidden"]],
            f"{layer}.self_attn.q_proj": [s["hidden"], s["hidden"]],
            f"{layer}.self_attn.k_proj": [s["kv"], s["hidden"]],
            f"{layer}.self_attn.v_proj": [s["kv"], s["hidden"]],
            f"{layer}.self_attn.o_proj": [s["hidden"], s["hidden"]],
            f"{layer}.mlp.gate_proj": [s["wide"], s["hidden"]],
            f"{layer}.mlp.up_proj": [s["wide"], s["hidden"]],
            f"{layer}.mlp.down_proj": [s["hidden"], s["wide"]],
        }
    header, end = {}, 0
    for name, shape in shapes.items():
        length = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[f"{name}.weight"] = {
            "dtype": "BF16", "shape": shape, "data_offsets": [end, end + length]
        }  # fmt: skip
        end += length
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {
        "model_type": "llama", "vocab_size": s["vocab"], "hidden_size": s["hidden"],
        "intermediate_size": s["wide"], "num_hidden_layers": s["layers"],
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return end


def test_weights_of_a_large_checkpoint_stay_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    stored = sparse_llama(tmp_path)
    assert stored > 3 << 30
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    weights, grown = map(int, result.stdout.split())
    assert weights > 2 * stored  # as float32, and the tables of the rotary embedding
    assert grown < 32 << 20
