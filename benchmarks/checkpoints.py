"""Checkpoints of a given shape with random bfloat16 weights, written in shards and in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 32000
    context: int = 2048

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for _, shape in tensors(self))


SHAPES = {
    "1M": Shape(64, 2, 4, 2, 192, 512, 256),
    "110M": Shape(768, 12, 12, 12, 2048),
    "1.1B": Shape(2048, 22, 32, 4, 5632),
    "7B": Shape(4096, 32, 32, 32, 11008),
}
"""110M is that of the 15M-to-110M "stories" Llamas, 1.1B TinyLlama's, 7B Llama 2's."""

_SHARD = 4 << 30
_PIECE = 1 << 22


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama checkpoint."""
    head = shape.hidden // shape.heads
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        stem = f"model.layers.{layer}."
        yield stem + "input_layernorm.weight", (shape.hidden,)
        yield stem + "post_attention_layernorm.weight", (shape.hidden,)
        yield stem + "self_attn.q_proj.weight", (shape.hidden, shape.hidden)
        yield stem + "self_attn.k_proj.weight", (shape.kv_heads * head, shape.hidden)
        yield stem + "self_attn.v_proj.weight", (shape.kv_heads * head, shape.hidden)
        yield stem + "self_attn.o_proj.weight", (shape.hidden, shape.hidden)
        yield stem + "mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
        yield stem + "mlp.up_proj.weight", (shape.intermediate, shape.hidden)
        yield stem + "mlp.down_proj.weight", (shape.hidden, shape.intermediate)
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def write(folder: Path, name: str) -> Path:
    """Write the checkpoint of a shape into ``folder/name`` unless it is there."""
    shape, out = SHAPES[name], folder / name
    if (out / "config.json").is_file():
        return out
    out.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for entry in tensors(shape):
        nbytes = 2 * int(np.prod(entry[1]))
        if size + nbytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
    rng = np.random.default_rng(0)
    normal = (rng.standard_normal(_PIECE, np.float32) * 0.02).view(np.uint32)
    block = (normal >> 16).astype(np.uint16)
    weight_map: dict[str, str] = {}
    for index, entries in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(out / file, entries, block, rng)
        weight_map |= {entry: file for entry, _ in entries}
    if len(shards) > 1:
        index_file = out / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out / "config.json").write_text(json.dumps(config(shape), indent=1))
    return out


def config(shape: Shape) -> dict[str, object]:
    """The config.json of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip


def _write_shard(
    path: Path,
    entries: list[tuple[str, tuple[int, ...]]],
    block: np.ndarray[tuple[int], np.dtype[np.uint16]],
    rng: np.random.Generator,
) -> None:
    header, offset = {}, 0
    for name, shape in entries:
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, shape in entries:
            left = int(np.prod(shape))
            if len(shape) == 1:
                stream.write(np.full(left, 0x3F80, np.uint16).tobytes())  # ones
                continue
            while left:
                start = int(rng.integers(0, len(block)))
                piece = block[start : start + left]
                stream.write(piece.tobytes())
                left -= len(piece)
