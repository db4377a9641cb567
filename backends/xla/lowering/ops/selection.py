"""Operators whose output is as long as the data say: they run where the model promises a length,
and the promise is kept by the model's author.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jax, jnp, lax
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


@handles("Unique", since=11)
def unique(op: Op, x: Any) -> Any:
    axis = op.attr("axis")
    promised = op.shape()
    if promised is None:
        raise op.needs(0)
    length = promised[0 if axis is None else axis]
    values, first, inverse, counts = jnp.unique(
        x, return_index=True, return_inverse=True, return_counts=True, axis=axis, size=length
    )
    if not op.attr("sorted", 1):
        order = jnp.argsort(first)
        rank = jnp.argsort(order)
        values = jnp.take(values, order, axis=0 if axis is None else axis)
        first, counts, inverse = first[order], counts[order], rank[inverse]
    whole = tuple(part.reshape(-1).astype("int64") for part in (first, inverse, counts))
    return (values, *whole)


@handles("NonMaxSuppression", since=10, constants=(2,))
def non_max_suppression(
    op: Op, boxes: Any, scores: Any, limit: Any = None, overlap: Any = None, least: Any = None
) -> Any:
    """Greedy selection by score, each class of each image for itself.

    Returns (image, class, box) rows in that order, the best box of a class first.
    """
    promised = op.shape()
    if promised is None:
        raise op.needs(0)
    count = boxes.shape[1]
    corners = _corners(jnp.asarray(boxes), bool(op.attr("center_point_box", 0)))
    most = jnp.zeros((), "int64") if limit is None else jnp.reshape(limit, ())
    threshold = jnp.zeros((), "float32") if overlap is None else jnp.reshape(overlap, ())

    def select(box: Any, score: Any) -> tuple[Any, Any]:
        order = jnp.argsort(-score, stable=True)
        overlaps = _overlaps(box[order])
        alive = jnp.ones((count,), bool) if least is None else score[order] > jnp.reshape(least, ())

        def step(index: Any, state: Any) -> Any:
            kept, taken = state
            hit = (kept & (overlaps[index] > threshold)).any()
            take = alive[index] & ~hit & (taken < most)
            return kept.at[index].set(take), taken + take

        kept, _ = lax.fori_loop(0, count, step, (jnp.zeros((count,), bool), jnp.zeros((), "int64")))
        return order, kept

    by_class = jax.vmap(select, in_axes=(None, 0))
    order, kept = jax.vmap(by_class)(corners, jnp.asarray(scores))
    image, label, rank = jnp.nonzero(kept, size=promised[0])
    return jnp.stack([image, label, order[image, label, rank]], axis=1).astype("int64")


def _corners(boxes: Any, centred: bool) -> Any:
    """Boxes as (low y, low x, high y, high x), whichever two corners were given."""
    if centred:
        x, y, w, h = (boxes[..., index] for index in range(4))
        return jnp.stack([y - h / 2, x - w / 2, y + h / 2, x + w / 2], axis=-1)
    first, second = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([jnp.minimum(first, second), jnp.maximum(first, second)], axis=-1)


def _overlaps(boxes: Any) -> Any:
    """Intersection over union of every pair."""
    low = jnp.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = jnp.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = jnp.prod(jnp.clip(high - low, 0, None), axis=-1)
    area = jnp.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
    union = area[:, None] + area[None, :] - shared
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1), 0)


@handles("TfIdfVectorizer", since=9)
def tfidf_vectorizer(op: Op, x: Any) -> Any:
    """Count the n-grams of a pool of integers in each row, optionally weighted."""
    pool = op.attr("pool_int64s")
    if pool is None:
        raise op.refuse("over strings is not lowered: XLA has no strings")
    rows = jnp.reshape(x, (1, -1)) if x.ndim == 1 else jnp.asarray(x)
    slots, weights = op.attr("ngram_indexes"), op.attr("weights")
    columns: list[Any] = [jnp.zeros((rows.shape[0],), "float32")] * (max(slots) + 1)
    for (gram, slot), weight in zip(
        _grams(op, pool, slots), weights or [1.0] * len(slots), strict=True
    ):
        if not op.attr("min_gram_length") <= len(gram) <= op.attr("max_gram_length"):
            continue
        total = columns[slot]
        skips = op.attr("max_skip_count") if len(gram) > 1 else 0
        for stride in range(1, skips + 2):
            total = total + _occurrences(rows, gram, stride)
        mode = op.attr("mode")
        if mode == "IDF":
            total = jnp.where(total > 0, weight, 0.0)
        elif mode == "TFIDF":
            total = total * weight
        columns[slot] = total.astype("float32")
    y = jnp.stack(columns, axis=1)
    return y[0] if x.ndim == 1 else y


def _grams(op: Op, pool: list[int], slots: list[int]) -> list[tuple[list[int], int]]:
    """The n-grams of the pool and the output column of each; ``ngram_counts`` says where the
    n-grams of each length begin.
    """
    starts = [*op.attr("ngram_counts"), len(pool)]
    grams: list[list[int]] = []
    for size, (begin, end) in enumerate(pairwise(starts), 1):
        grams += [pool[at : at + size] for at in range(begin, end, size)]
    return list(zip(grams, slots, strict=True))


def _occurrences(rows: Any, gram: list[int], stride: int) -> Any:
    room = rows.shape[1] - (len(gram) - 1) * stride
    if room <= 0:
        return jnp.zeros((rows.shape[0],), "float32")
    hit = np.ones((), bool)
    for index, item in enumerate(gram):
        hit = hit & (rows[:, index * stride : index * stride + room] == item)
    return hit.sum(axis=1).astype("float32")
