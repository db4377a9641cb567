"""What onnxruntime-genai needs to run a generator's artifact: its configuration and, where logits
are those of chosen positions, the same graph with the last one chosen.

The second graph refers to the weights of the first; both are in one folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trivium.compiler.generator import Generator
from trivium.compiler.passing import attribute

CONFIG, MODEL = "genai_config.json", "genai.onnx"


def write(folder: Path, file: str, generator: Generator) -> str | None:
    """Write the configuration for the graph in ``folder/file``; return why not, or None."""
    named = _names(generator)
    if generator.form == "static" or named is None or generator.mask is None:
        return "onnxruntime-genai takes caches of its own, with numbered names, and a mask"
    if generator.sight is not None:
        return "onnxruntime-genai takes tokens, and this decoder embeddings"
    if not generator.eos:
        return "onnxruntime-genai needs a token that ends a text"
    model = ir.load(folder / file)
    heads = [
        attribute(node, name, 0)
        for node in model.graph
        for name in ("q_num_heads", "num_heads")
        if node.op_type in ("Attention", "GroupQueryAttention")
    ]
    key = generator.caches[0].shape
    if generator.chosen is not None or generator.counts is not None:
        if generator.chosen is not None:
            _choose_last(model, generator)
        if generator.counts is not None:
            _count_all(model, generator)
        ir.save(model, folder / MODEL)
        file = MODEL
    (past_key, past_value), (present_key, present_value) = named
    inputs = {
        "input_ids": generator.tokens,
        "attention_mask": generator.mask,
        "past_key_names": past_key,
        "past_value_names": past_value,
    }
    if generator.positions is not None:
        inputs["position_ids"] = generator.positions
    outputs = {
        "logits": generator.logits,
        "present_key_names": present_key,
        "present_value_names": present_value,
    }
    kv_heads, head_size = key[1], key[3]
    if not (isinstance(kv_heads, int) and isinstance(head_size, int)):
        return "onnxruntime-genai needs to know the sizes of a cache"
    attention_heads = max([*heads, kv_heads])
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": file,
        "head_size": head_size,
        "hidden_size": attention_heads * head_size,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": attention_heads,
        "num_hidden_layers": len(generator.caches) // 2,
        "num_key_value_heads": kv_heads,
    }
    first = generator.eos[0]
    table: dict[str, Any] = {
        "model": {
            # Its name for any decoder whose caches are inputs and outputs.
            "type": "llama",
            "bos_token_id": first if generator.bos is None else generator.bos,
            "eos_token_id": list(generator.eos),
            "pad_token_id": first,
            "context_length": generator.context,
            "vocab_size": generator.vocabulary,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": generator.context,
            "past_present_share_buffer": generator.form in ("shared", "ragged"),
        },
    }
    (folder / CONFIG).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return None


def _choose_last(model: ir.Model, generator: Generator) -> None:
    """Make the choice of positions a constant, so that the logits' shape says there is one."""
    chosen = model.graph.initializers.get(generator.chosen or "")
    assert chosen is not None
    model.graph.inputs.remove(chosen)
    chosen.shape = ir.Shape([1])
    for output in model.graph.outputs:
        if output.name == generator.logits and output.shape is not None:
            output.shape = ir.Shape([output.shape[0], 1, *output.shape[2:]])


def _count_all(model: ir.Model, generator: Generator) -> None:
    """Let all new tokens count, as they do there."""
    counts = next(value for value in model.graph.inputs if value.name == generator.counts)
    tokens = next(value for value in model.graph.inputs if value.name == generator.tokens)
    for node, index in list(counts.uses()):
        if node.op_type == "GroupQueryAttention":
            node.resize_inputs(index)
    shape = ir.node("Shape", [tokens], {"start": 1, "end": 2})
    size = ir.node("Cast", shape.outputs, {"to": ir.DataType.INT32.value})
    model.graph.insert_before(model.graph[0], [shape, size])
    counts.replace_all_uses_with(size.outputs[0])
    model.graph.inputs.remove(counts)


def _names(generator: Generator) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """Patterns with ``%d`` for the layer: (past key, value), (present key, value)."""
    caches = generator.caches
    if len(caches) < 2 or len(caches) % 2 or any(len(c.shape) != 4 for c in caches):
        return None
    first = [(re.sub(r"\d+", "%d", c.past), re.sub(r"\d+", "%d", c.present)) for c in caches[:2]]
    for index, cache in enumerate(caches):
        past, present = first[index % 2]
        if past.count("%d") != 1 or present.count("%d") != 1:
            return None
        if (past % (index // 2), present % (index // 2)) != (cache.past, cache.present):
            return None
    (past_key, present_key), (past_value, present_value) = first
    return (past_key, past_value), (present_key, present_value)
