"""A Llama checkpoint of `checkpoints` as a GGUF file without a tokenizer, for llama.cpp.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_UINT32, _FLOAT32, _STRING = 4, 6, 8
_TYPE_F32, _TYPE_BF16 = 0, 30
_ALIGN = 32

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(folder: Path, out: Path) -> Path:
    """Write the checkpoint as bfloat16 GGUF; matrices in float32 stay so."""
    from trivium.models import safetensors

    config = json.loads((folder / "config.json").read_text())
    entries = safetensors.read_folder(folder)
    header, infos, offset = _metadata(config), [], 0
    for name, entry in entries.items():
        flat = len(entry.shape) == 1
        wide = flat or entry.dtype == "F32"
        size = int(np.prod(entry.shape)) * (4 if wide else 2)
        infos.append((name, entry, wide, offset))
        offset += size + -size % _ALIGN
    with out.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(header)))
        for key, (kind, value) in header.items():
            _string(stream, key)
            stream.write(struct.pack("<I", kind))
            if kind == _STRING:
                _string(stream, value)
            else:
                stream.write(struct.pack("<I" if kind == _UINT32 else "<f", value))
        for name, entry, wide, where in infos:
            _string(stream, _renamed(name))
            dims = entry.shape[::-1]
            stream.write(struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
            stream.write(struct.pack("<IQ", _TYPE_F32 if wide else _TYPE_BF16, where))
        stream.write(b"\0" * (-stream.tell() % _ALIGN))
        for name, entry, wide, _ in infos:
            stored = np.uint16 if entry.dtype == "BF16" else np.uint32
            count = entry.length // np.dtype(stored).itemsize
            data = np.fromfile(entry.file, stored, count, offset=entry.offset)
            data = _turned(data.reshape(entry.shape), name, config)
            payload = data.astype(np.uint32) << 16 if wide and stored is np.uint16 else data
            stream.write(payload.tobytes())
            stream.write(b"\0" * (-payload.nbytes % _ALIGN))
    return out


def _turned(data: Array, name: str, config: dict[str, Any]) -> Array:
    """Queries and keys with the two halves of each head interleaved, as llama.cpp turns them."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    which = next((key for part, key in heads.items() if f".{part}." in name), None)
    if which is None:
        return data
    rows, columns = data.shape
    halves = data.reshape(config[which], 2, rows // config[which] // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def _metadata(config: dict[str, Any]) -> dict[str, tuple[int, Any]]:
    head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "general.architecture": (_STRING, "llama"),
        "llama.context_length": (_UINT32, config["max_position_embeddings"]),
        "llama.embedding_length": (_UINT32, config["hidden_size"]),
        "llama.block_count": (_UINT32, config["num_hidden_layers"]),
        "llama.feed_forward_length": (_UINT32, config["intermediate_size"]),
        "llama.attention.head_count": (_UINT32, config["num_attention_heads"]),
        "llama.attention.head_count_kv": (_UINT32, config["num_key_value_heads"]),
        "llama.attention.layer_norm_rms_epsilon": (_FLOAT32, config["rms_norm_eps"]),
        "llama.rope.dimension_count": (_UINT32, head),
        "llama.rope.freq_base": (_FLOAT32, _theta(config)),
        "llama.vocab_size": (_UINT32, config["vocab_size"]),
        "tokenizer.ggml.model": (_STRING, "no_vocab"),
    }


def _theta(config: dict[str, Any]) -> float:
    scaling = config.get("rope_parameters") or config
    return float(scaling["rope_theta"])


def _string(stream: BinaryIO, text: str) -> None:
    data = text.encode()
    stream.write(struct.pack("<Q", len(data)) + data)


def _renamed(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"
