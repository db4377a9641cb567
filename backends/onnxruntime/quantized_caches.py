"""Keys and values held in int8, which GroupQueryAttention reads as they are: a quarter of the bytes.

Every channel of every head has a scale that does not change, from what the samples of the compile
put into the caches; the largest value that was seen is `HEADROOM` below what a code can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.compiler.generator import Generator
from trivium.compiler.passing import initializer

if TYPE_CHECKING:
    from trivium.backends.onnxruntime.ragged import RaggedDecoder

Array = np.ndarray[Any, Any]

OPTION, PRECISIONS = "kv_cache", ("f32", "int8")
HEADROOM = 6.0
_LARGEST = 127
_SCALES = (12, 13)
"""The inputs of GroupQueryAttention for the scales of keys and of values."""


def precision(options: dict[str, str]) -> str:
    """What caches are to be held in, by the option of the backend.

    Raises:
        BadInput: There is no such option, or precision.
    """
    unknown = next((name for name in options if name != OPTION), None)
    if unknown is not None:
        raise BadInput(
            f"the ONNX Runtime backend has no option {unknown!r}",
            about="--option",
            remedy=f"it has {OPTION}",
        )
    held = options.get(OPTION, PRECISIONS[0])
    if held not in PRECISIONS:
        raise BadInput(f"{held!r} is no precision", about=OPTION, remedy=", ".join(PRECISIONS))
    return held


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
    scales = dict(zip(generator.caches, _scales(generator, decoder, rows), strict=True))
    model = ir.load(file)
    graph = model.graph
    names = {cache.past: f"{cache.past}.scale" for cache in generator.caches}
    for cache, scale in scales.items():
        initializer(graph, scale, names[cache.past])
    held = {value.name for value in (*graph.inputs, *graph.outputs)}
    held &= {name for cache in generator.caches for name in (cache.past, cache.present)}
    for value in (*graph.inputs, *graph.outputs):
        if value.name in held:
            value.dtype = ir.DataType.INT8
    for node in graph:
        if node.op_type != "GroupQueryAttention":
            continue
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
    generator: Generator, decoder: RaggedDecoder, rows: Sequence[Sequence[int]]
) -> list[Array]:
    """The scale of each cache, float [1, heads, 1, width]."""
    tops: list[Array] = []
    for row in rows:
        text = list(row[: generator.context])
        cache = decoder.start(1, len(text))
        decoder.feed(cache, [text])
        found = [np.abs(buffer[:, :, : len(text)]).max(axis=(0, 2)) for buffer in cache.buffers]
        tops = [np.maximum(a, b) for a, b in zip(tops or found, found, strict=True)]
    # A channel that was always 0 would divide by it.
    floors = [max(float(top.max()), 1.0e-6) * 1e-3 for top in tops]
    return [
        (np.maximum(top, floor) * (HEADROOM / _LARGEST)).astype(np.float32)[None, :, None, :]
        for top, floor in zip(tops, floors, strict=True)
    ]
