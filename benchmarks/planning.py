"""Choosing among all targets, their backends and six recipes: the CPU time of the whole search.

Nothing is built or quantized; a Llama of 8B parameters is a checkpoint whose weights are a hole in
a file, so that reading them would show."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, mebibytes
from benchmarks.workloads import minilm, shared

TITLE = "Planning over every target and six recipes"

RECIPES = ("none", "fp16", "bf16", "int8-weights", "int4", "int8")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: list[tuple[str, Path | None, Sequence[str]]] = [
            ("ResNet-20", shared("models/cifar_resnet20.onnx"), ("N=1",)),
            ("MiniLM, 1x128", minilm(folder), ("batch=1", "seq=128")),
            ("Shakespeare, 1x256", shared("llm-shakespeare"), ("batch=1", "seq=256")),
            ("Llama 8B, 1x512", llama(folder / "llama"), ("batch=1", "seq=512")),
        ]
        for what, path, shape in found:
            if path is not None:
                yield _row(what, path, shape)


def _row(what: str, path: Path, shape: Sequence[str]) -> Row:
    from trivium.compiler.plan import plan

    started = time.process_time()
    made = plan(path, recipes=RECIPES, shape=shape, objective="cost")
    took = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    targets = len({c.target.name for c in made.candidates})
    best = made.best
    chosen = "none" if best is None else f"{best.target.name}, {best.backend}, {best.recipe}"
    return Row(
        f"{what}: {targets} targets, {len(made.candidates)} candidates",
        f"{took:.1f} s of CPU, {mebibytes(peak)} peak",
        f"cheapest: {chosen}",
        "",
        "under 30 s",
        took < 30.0,
    )


def llama(folder: Path, **changes: int) -> Path:
    """Write a checkpoint of Llama 8B's shape whose weights are a hole in the file.

    Args:
        changes: What its ``config.json`` says instead.
    """
    config: dict[str, Any] = {**LLAMA, **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    width, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, list[Any]] = {
        "model.embed_tokens.weight": [words, width],
        "model.norm.weight": [width],
        "lm_head.weight": [words, width],
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, shape in {
            "input_layernorm": [width],
            "post_attention_layernorm": [width],
            "self_attn.q_proj": [width, width],
            "self_attn.k_proj": [keys, width],
            "self_attn.v_proj": [keys, width],
            "self_attn.o_proj": [width, width],
            "mlp.gate_proj": [inner, width],
            "mlp.up_proj": [inner, width],
            "mlp.down_proj": [width, inner],
        }.items():
            shapes[f"{at}.{name}.weight"] = shape
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2
        for dim in shape:
            size *= dim
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        start = 8 + len(text)
        stream.truncate(start + offset)
        # A first number of its own for each: no two weights are the same.
        for index, row in enumerate(header.values()):
            stream.seek(start + row["data_offsets"][0])
            stream.write((0x3F80 + index).to_bytes(2, "little"))
    return folder


if __name__ == "__main__":
    for row in rows():
        print(row, file=sys.stderr, flush=True)
