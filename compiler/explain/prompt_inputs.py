"""What a prompt is to a language model's graph: its tokens, and all that goes in beside them.

A generator's manifest names every input. Of another graph they are told by what is done with them:
tokens are looked up in a table of embeddings, and the rest by its type and rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler import model as models
from trivium.compiler.errors import BadInput
from trivium.compiler.generator import Generator
from trivium.compiler.passing import is_constant, is_op
from trivium.compiler.samples import numpy_dtype

Array = np.ndarray[Any, np.dtype[Any]]


def prompt_feeds(
    model: ir.Model, ids: Sequence[int], generator: Generator | None = None
) -> dict[str, Array]:
    """The prompt, a mask of ones, positions from zero, caches that hold nothing yet.

    Args:
        model: A graph whose first output is logits ``[batch, sequence, vocabulary]``.
        generator: How the graph is driven, where its artifact says so.

    Raises:
        BadInput: A token is not in the vocabulary, or an input is none that a prompt has.
    """
    tokens = tokens_input(model)
    table = embeddings(tokens)[0].inputs[0]
    words = table.shape[0] if table is not None and table.shape is not None else None
    wrong = [token for token in ids if token < 0 or (isinstance(words, int) and token >= words)]
    if wrong:
        raise BadInput(f"no token {wrong[0]} among {words}", about="--prompt-ids")
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if name in model.graph.initializers or value.dtype is None:
            continue
        if value is tokens:
            found: Array | None = np.asarray([ids])
        elif generator is not None:
            found = _named(name, len(ids), generator)
        else:
            found = _guessed(value, len(ids))
        if found is None:
            raise BadInput(
                f"the input {name!r} is neither tokens, mask, positions nor a growing cache",
                about="--prompt",
                remedy="explain the source model instead of the artifact",
            )
        feeds[name] = found.astype(numpy_dtype(models.tensor_info(value).dtype))
    return feeds


def _named(name: str, length: int, generator: Generator) -> Array | None:
    """An input of a generator: the whole prompt at once, in the first row of new caches."""
    cache = next((cache for cache in generator.caches if cache.past == name), None)
    if cache is not None:
        fixed = cache.shape[cache.length_axis]
        room = fixed if isinstance(fixed, int) else length
        return np.zeros(cache.sized(1, 0 if generator.grows else room))
    given = {
        generator.mask: np.ones((1, length)),
        generator.positions: np.arange(length)[None],
        generator.start: np.zeros(1),
        generator.counts: np.array([length]),
        generator.chosen: np.array([length - 1]),
    }
    return given.get(name)


def _guessed(value: ir.Value, length: int) -> Array | None:
    shape = value.shape
    rank = len(shape) if shape is not None else 0
    if rank == 2:
        return np.arange(length)[None] if "position" in (value.name or "") else np.ones((1, length))
    if rank == 1 and value.dtype is not None and value.dtype.is_integer():
        return np.array([length - 1])
    if rank == 4 and shape is not None and not isinstance(shape[2], int):
        return np.zeros([1, *(dim if isinstance(dim, int) else 0 for dim in shape[1:])])
    return None


def tokens_input(model: ir.Model) -> ir.Value:
    for value in model.graph.inputs:
        if value.dtype in (ir.DataType.INT64, ir.DataType.INT32) and embeddings(value):
            return value
    raise BadInput(
        "no input is looked up in a table of embeddings, so it is no language model",
        about="--prompt",
    )


def embeddings(value: ir.Value) -> list[ir.Node]:
    """The Gathers that look an input up in a constant table of floats."""
    found = []
    for node, index in value.uses():
        if is_op(node, "Gather") and index == 1 and is_constant(node.inputs[0]):
            table = node.inputs[0]
            if table is not None and table.shape is not None and len(table.shape) == 2:
                found.append(node)
    return found
