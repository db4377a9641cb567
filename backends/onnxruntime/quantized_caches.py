"""Keys and values in int8, which GroupQueryAttention reads as they are: a quarter of the bytes.

Every channel of every head has a scale that does not change, from what the samples of the compile
put into the caches; codes reach `HEADROOM` times as far as the largest value that was seen. Two
channels of a key that turn into each other with its place get what both together can come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.generator import Generator
from trivium.compiler.passing import initializer

if TYPE_CHECKING:
    from trivium.backends.onnxruntime.ragged import RaggedDecoder

Array = np.ndarray[Any, Any]

HEADROOM = 6.0
"""Samples are short, and random where nothing better is given: by perplexity of the trained model
(32.49 with float caches) 1.0 gave 36.4, 2.5 32.63, 6 32.51, 10 32.54, each channel by itself."""

_LARGEST = 127
_SCALES = (12, 13)
"""The inputs of GroupQueryAttention for the scales of keys and of values."""


def quantize(
    file: Path, generator: Generator, decoder: RaggedDecoder, rows: Sequence[Sequence[int]]
) -> Generator:
    """Rewrite a graph that was saved, so that its caches are int8.

    Args:
        decoder: Of that graph, as it is.
        rows: Texts to measure by.

    Returns:
        How to drive the result.
    """
    model = ir.load(file)
    graph = model.graph
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    keys = {node.inputs[3].name or "" for node in attention if node.inputs[3] is not None}
    found = _scales(generator, decoder, rows, keys)
    scales = dict(zip(generator.caches, found, strict=True))
    names = {cache.past: f"{cache.past}.scale" for cache in generator.caches}
    for cache, scale in scales.items():
        initializer(graph, scale, names[cache.past])
    held = {value.name for value in (*graph.inputs, *graph.outputs)}
    held &= {name for cache in generator.caches for name in (cache.past, cache.present)}
    for value in (*graph.inputs, *graph.outputs):
        if value.name in held:
            value.dtype = ir.DataType.INT8
    for node in attention:
        node.resize_inputs(max(len(node.inputs), max(_SCALES) + 1))
        for place, past in zip(_SCALES, node.inputs[3:5], strict=True):
            assert past is not None
            node.replace_input_with(place, graph.initializers[names[past.name or ""]])
        for which in ("k", "v"):
            node.attributes[f"{which}_quant_type"] = ir.AttrString(
                f"{which}_quant_type", "PER_CHANNEL"
            )
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
    ir.save(model, file)
    return replace(
        generator, caches=tuple(replace(cache, dtype="int8") for cache in generator.caches)
    )


def _scales(
    generator: Generator, decoder: RaggedDecoder, rows: Sequence[Sequence[int]], keys: set[str]
) -> list[Array]:
    """The scale of each cache, float [1, heads, 1, width]."""
    tops: list[Array] = []
    for row in rows:
        text = list(row[: generator.context])
        cache = decoder.start(1, len(text))
        decoder.feed(cache, [text])
        found = [
            _largest(buffer[0, :, : len(text)], info.past in keys)
            for info, buffer in zip(generator.caches, cache.buffers, strict=True)
        ]
        tops = [np.maximum(a, b) for a, b in zip(tops or found, found, strict=True)]
    # A channel that was always 0 would divide by it.
    floors = [max(float(top.max()), 1.0e-6) * 1e-3 for top in tops]
    return [
        (np.maximum(top, floor) * (HEADROOM / _LARGEST)).astype(np.float32)[None, :, None, :]
        for top, floor in zip(tops, floors, strict=True)
    ]


def _largest(held: Array, turning: bool) -> Array:
    """The largest magnitude of each channel, [heads, width], of entries [heads, tokens, width].

    Rotary embedding turns the halves of a key into each other, slowly in some channels, so that a
    short text shows one of a pair only.
    """
    if turning and held.shape[-1] % 2 == 0:
        radius = np.hypot(*np.split(held, 2, axis=-1))
        held = np.concatenate([radius, radius], axis=-1)
    largest: Array = np.abs(held).max(axis=1)
    return largest
