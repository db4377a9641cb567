"""Sequences and optionals, as Python lists and None while tracing: the program never sees one.

Where one has to be chosen at run time (the branches of an If that differ), it is refused there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jnp
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


@handles("SequenceConstruct", since=11)
def sequence_construct(op: Op, *values: Any) -> Any:
    return list(values)


@handles("SequenceEmpty", since=11)
def sequence_empty(op: Op) -> Any:
    return []


@handles("SequenceLength", since=11)
def sequence_length(op: Op, sequence: Any) -> Any:
    return np.asarray(len(sequence), np.int64)


@handles("SequenceAt", since=11, constants=(1,))
def sequence_at(op: Op, sequence: Any, position: Any) -> Any:
    if op.known(position):
        return sequence[op.ints(1, position)[0]]
    if len({(value.shape, value.dtype) for value in sequence}) != 1:
        raise op.needs(1)
    index = jnp.reshape(position, ())
    return jnp.stack(sequence)[jnp.where(index < 0, index + len(sequence), index)]


@handles("SequenceInsert", since=11, constants=(2,))
def sequence_insert(op: Op, sequence: Any, value: Any, position: Any = None) -> Any:
    index = len(sequence) if position is None else op.ints(2, position)[0]
    return [*sequence[:index], value, *sequence[index:]]


@handles("SequenceErase", since=11, constants=(1,))
def sequence_erase(op: Op, sequence: Any, position: Any = None) -> Any:
    index = -1 if position is None else op.ints(1, position)[0]
    index = index % len(sequence)
    return [*sequence[:index], *sequence[index + 1 :]]


@handles("SplitToSequence", since=11, constants=(1,))
def split_to_sequence(op: Op, x: Any, split: Any = None) -> Any:
    axis = op.attr("axis", 0) % x.ndim
    size = x.shape[axis]
    if split is None:
        parts = jnp.split(x, size, axis=axis)
        return parts if op.attr("keepdims", 1) else [jnp.squeeze(part, axis) for part in parts]
    sizes = op.static(1, split)
    every = int(sizes.reshape(-1)[0])
    cuts = range(every, size, every) if sizes.ndim == 0 else np.cumsum(sizes)[:-1].tolist()
    return list(jnp.split(x, list(cuts), axis=axis))


@handles("ConcatFromSequence", since=11)
def concat_from_sequence(op: Op, sequence: Any) -> Any:
    if op.attr("new_axis", 0):
        return jnp.stack(sequence, axis=op.attr("axis"))
    return jnp.concatenate(sequence, axis=op.attr("axis"))


@handles("SequenceMap", since=17)
def sequence_map(op: Op, sequence: Any, *others: Any) -> Any:
    body = op.subgraph("body")
    rows = [
        body(value, *(other[index] if isinstance(other, list) else other for other in others))
        for index, value in enumerate(sequence)
    ]
    return tuple([row[index] for row in rows] for index in range(op.outputs))


@handles("Optional", since=15)
def optional(op: Op, value: Any = None) -> Any:
    return value


@handles("OptionalHasElement", since=15)
def optional_has_element(op: Op, value: Any = None) -> Any:
    return np.asarray(value is not None)


@handles("OptionalGetElement", since=15)
def optional_get_element(op: Op, value: Any) -> Any:
    if value is None:
        raise op.refuse("reads an optional that is empty")
    return value
