"""How long a GPU takes for attention: whole sequences at once, or one token against a cache.

Flash kernels: a block of queries walks over its keys without writing scores. Whole sequences are
bound by the matrix units, at a share of what a plain product reaches (softmax runs between the two
products); a single token by reading its cache, which is split among the multiprocessors.

All functions take arrays, one element an attention, or plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trivium.compiler.machines.gpu import Array, Chip

QUERIES_A_BLOCK = 128.0
KEYS_A_BLOCK = 128.0

PREFILL_START: Mapping[str, float] = {
    "sustained": 0.7,
    "memory": 0.75,
    "base_cycles": 1.6e4,
    "store": 0.75,
    "least_keys": 64.0,
    "sharpness": 3.0,
    "droop": 0.03,
    "resident": 1.3,
}
"""sustained: share of the peak; memory, store: shares of the peak bandwidth
of attention and of writing the cache; base_cycles: launches; least_keys: below which a block takes
no less; droop: loss of clock with the logarithm of the duration; resident: share of the L2 that
keeps its content between calls."""

PREFILL_BOUNDS: Mapping[str, tuple[float, float]] = {
    "sustained": (0.1, 1.5),
    "memory": (0.1, 1.0),
    "base_cycles": (1e3, 2e5),
    "store": (0.1, 1.0),
    "least_keys": (1.0, 1000.0),
    "sharpness": (1.2, 12.0),
    "droop": (0.001, 0.15),
    "resident": (0.3, 3.0),
}

PREFILL_DEVICE = ("sustained", "memory", "base_cycles", "store", "least_keys", "resident")

DECODE_START: Mapping[str, float] = {
    "memory": 0.75,
    "base_cycles": 1.6e4,
    "split_cycles": 1e4,
    "least_keys": 80.0,
    "resident": 0.8,
    "on_chip": 0.0035,
}
"""memory: share of the peak bandwidth; base_cycles: launches; split_cycles: combining eight or more
parts of a split cache; least_keys: below which a group takes no less; resident: share of the L2
that keeps its content between calls; on_chip: its bytes for each operation at the peak of half
precision."""

DECODE_BOUNDS: Mapping[str, tuple[float, float]] = {
    "memory": (0.2, 1.0),
    "base_cycles": (1e3, 2e5),
    "split_cycles": (1e2, 6e4),
    "least_keys": (4.0, 600.0),
    "resident": (0.3, 3.0),
    "on_chip": (0.0005, 0.05),
}

DECODE_DEVICE = ("memory", "base_cycles", "split_cycles", "least_keys", "resident", "on_chip")

SPLIT_BELOW = 0.8
"""Share of the multiprocessors that groups must fill before a cache is no longer split: the rule of
the published flash kernels."""


def _arrays(*values: Any) -> list[Array]:
    return [np.asarray(value, float) for value in values]


def _cold(moved: Array, cache: float, warm: bool) -> Array:
    """The share of traffic that comes from memory, where the last call left the same data."""
    if not warm:
        return np.ones_like(moved)
    return np.clip((moved / cache - 1.0) / 0.3, 0.0, 1.0)


def prefill(
    batch: Any,
    heads: Any,
    kv_heads: Any,
    queries: Any,
    keys: Any,
    head: Any,
    chip: Chip,
    c: Mapping[str, float],
    *,
    causal: bool = True,
    stores: bool = True,
    warm: bool = False,
    width: float = 2.0,
) -> Array:
    """Seconds of attention over whole sequences.

    Args:
        causal: Whether a query sees only the keys before it.
        stores: Whether keys and values are written to a cache as well.
        warm: Whether the last call left the same operands in the L2.
    """
    batch, heads, kv_heads, queries, keys, head = _arrays(
        batch, heads, kv_heads, queries, keys, head
    )
    work = batch * kv_heads
    blocks = np.ceil(queries * heads / kv_heads / QUERIES_A_BLOCK)
    seen = keys - (queries - np.minimum(queries, QUERIES_A_BLOCK)) / 2.0 if causal else keys
    seen = (seen**4 + c["least_keys"] ** 4) ** 0.25
    each = 4.0 * QUERIES_A_BLOCK * seen * head
    # Softmax leaves the matrix units idle often enough that the power cap does not slow them.
    peak = chip.peak * c["sustained"]
    tiles = work * blocks / chip.units
    clock = np.clip(tiles * each * chip.units / peak / 1e-3, 1e-2, 30.0) ** -c["droop"]
    # Blocks of many lengths, the longest first, leave about half a block of idleness at the end.
    waves = np.where(tiles <= 1.0, np.minimum(keys / seen, 2.0), tiles + 0.5)
    compute = np.maximum(waves, 1.0) * each / (peak * clock / chip.units)
    moved = width * batch * head * (2.0 * heads * queries + 2.0 * kv_heads * keys)
    written = width * batch * head * 4.0 * kv_heads * queries if stores else np.zeros_like(moved)
    cold = 0.3 + 0.7 * _cold(moved + written, chip.cache * c["resident"], warm)
    memory = moved * cold / (chip.bandwidth * c["memory"])
    p = c["sharpness"]
    attend = (compute**p + memory**p) ** (1.0 / p)
    return np.asarray(
        c["base_cycles"] / chip.clock + written * cold / (chip.bandwidth * c["store"]) + attend
    )


def decode(
    batch: Any,
    heads: Any,
    kv_heads: Any,
    queries: Any,
    keys: Any,
    head: Any,
    chip: Chip,
    c: Mapping[str, float],
    *,
    warm: bool = False,
    width: float = 2.0,
) -> Array:
    """Seconds of attention of a few new tokens against a cache."""
    batch, heads, kv_heads, queries, keys, head = _arrays(
        batch, heads, kv_heads, queries, keys, head
    )
    work = batch * kv_heads * np.ceil(queries * heads / kv_heads / 64.0)
    blocks = np.ceil(keys / KEYS_A_BLOCK)
    splits = np.where(
        work >= SPLIT_BELOW * chip.units,
        1.0,
        np.clip(np.floor(chip.units / work), 1.0, np.minimum(blocks, 128.0)),
    )
    parts = work * splits / chip.units
    # Where little is split there is less than a part for each multiprocessor, but a few of them
    # already draw what the memory gives.
    busy = np.minimum(parts / np.ceil(parts) * np.where(parts < 1.0, 1.5, 1.0), 1.0)
    long = (keys**4 + (c["least_keys"] * splits) ** 4) ** 0.25
    cache = 2.0 * width * work * long * head
    cold = _cold(2.0 * width * work * keys * head, chip.whole_cache * c["resident"], warm)
    slow = chip.bandwidth * c["memory"]
    full = cache * (cold / slow + (1.0 - cold) / np.maximum(chip.reference * c["on_chip"], slow))
    # Two parts are combined in half the time that many take.
    share = 0.5 + 0.5 * np.clip((np.log2(splits) - 1.0) / 2.0, 0.0, 1.0)
    combining = np.where(splits > 1.0, c["split_cycles"] / chip.clock * share, 0.0)
    return np.asarray(c["base_cycles"] / chip.clock + combining + full / busy)
