"""How long a GPU takes for a product of matrices.

The library's choice among tile shapes and ways to split the sum is imitated: of all of them, the
one that the formula makes fastest. For each,

    launch + ramp + smooth max(compute, on-chip traffic, memory traffic)

- compute: whole waves of tiles over the multiprocessors, at the clock that the power cap sustains
  (a card whose base clock is far below its boost clock runs between the two, and lower the longer
  the product lasts); a step along the sum takes no less than a 64 x 64 tile's, however small the
  tile;
- on-chip traffic: what all tiles read through the L2, and partial sums;
- a matrix times a vector is bound by its traffic alone;
- memory traffic: operands that the L2 does not hold from the last call, and results that do not
  fit in it. An L2 in two parts holds everything twice.

All functions take arrays, one element a product, or plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trivium.compiler.types import Target

Array = np.ndarray[Any, Any]

TILES = (
    *((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (64, 256), (256, 64)),
    *((32, 64), (64, 32), (32, 128), (16, 64), (16, 128), (16, 32)),
)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
_M, _N, _S = (
    np.array(column, float)
    for column in zip(*((*tile, split) for tile in TILES for split in SPLITS), strict=True)
)

PRODUCT_START: Mapping[str, float] = {
    "sustained": 1.0,
    "tile_edge": 5.0,
    "ramp_cycles": 1500.0,
    "least_tile": 5000.0,
    "memory": 0.78,
    "on_chip": 0.013,
    "launch_s": 2.2e-6,
    "split_s": 2.5e-6,
    "sharpness": 3.3,
    "resident": 0.8,
    "droop": 0.03,
    "write": 2.0,
}
"""Where a fit begins. sustained: share of the peak at the sustained clock; tile_edge: what a tile
loses for each of 1/rows and 1/columns; ramp_cycles: filling and draining the pipeline; least_tile:
rows x columns below which a step takes no less; memory: share of the peak bandwidth; on_chip: bytes
through the L2 for each operation at the peak of bfloat16; launch_s: one kernel after another;
sharpness: exponent of the smooth maximum; resident: share of the L2 that keeps its content; droop:
loss of clock with the logarithm of the duration; write: weight of results in on-chip traffic."""

PRODUCT_BOUNDS: Mapping[str, tuple[float, float]] = {
    "sustained": (0.3, 1.5),
    "tile_edge": (0.01, 60.0),
    "ramp_cycles": (10.0, 20000.0),
    "least_tile": (300.0, 40000.0),
    "memory": (0.4, 1.0),
    "on_chip": (0.001, 0.3),
    "launch_s": (5e-7, 4e-5),
    "split_s": (1e-8, 8e-6),
    "sharpness": (1.5, 12.0),
    "resident": (0.2, 1.5),
    "droop": (0.001, 0.15),
    "write": (0.3, 4.0),
}

PRODUCT_DEVICE = ("sustained", "memory", "on_chip", "least_tile", "droop", "launch_s")
"""What a calibration of one device may change. Of launch_s and ramp_cycles, which add up, one."""

TYPICAL_UNITS = 100.0
TYPICAL_CLOCK_HZ = 1.7e9
TYPICAL_CACHE_BYTES = 4.0e7
"""For devices that do not state them; the interval of a device without data is wide enough."""


@dataclass(frozen=True)
class Chip:
    """What the formulas read of a target, for one dtype.

    Attributes:
        peak: Dense operations a second in the dtype.
        reference: The same in half precision, which the L2 is built to feed.
        cache, whole_cache: Bytes of one part of the L2, and of all.
        throttle: Share of the clock behind ``peak`` that a power-limited card keeps.
    """

    peak: float
    reference: float
    units: float
    clock: float
    cache: float
    whole_cache: float
    bandwidth: float
    throttle: float

    @classmethod
    def of(cls, target: Target, peak: float) -> Chip:
        """Read a target. Its bandwidth has to be known."""
        assert target.memory_bytes_per_s is not None
        clock = target.clock_hz or TYPICAL_CLOCK_HZ
        halves = (target.peak_ops.get(name) for name in ("bfloat16", "float16"))
        reference = next((rate for rate in halves if rate), peak)
        base = target.base_clock_hz
        return cls(
            peak,
            reference,
            float(target.units or TYPICAL_UNITS),
            clock,
            (target.on_chip_bytes or TYPICAL_CACHE_BYTES) / target.on_chip_parts,
            target.on_chip_bytes or TYPICAL_CACHE_BYTES,
            target.memory_bytes_per_s,
            # Between what is guaranteed and what is advertised, in the middle on a log scale.
            (base / clock) ** 0.5 if base else 1.0,
        )


@dataclass(frozen=True)
class Parts:
    """Seconds of each product, by what they are spent on; the parts overlap within ``body``."""

    launch: Array
    compute: Array
    on_chip: Array
    memory: Array
    body: Array

    @property
    def seconds(self) -> Array:
        return self.launch + self.body


def product(
    m: Any,
    n: Any,
    k: Any,
    chip: Chip,
    c: Mapping[str, float],
    *,
    batch: Any = 1.0,
    width: Any = 2.0,
    weight_width: Any = None,
    out_width: Any = 2.0,
    left_bytes: Any = np.inf,
    left_span: Any = np.inf,
    right_span: Any = np.inf,
    lasting: float = 0.0,
) -> Parts:
    """Time ``batch`` products of [m, k] and [k, n].

    Args:
        width, weight_width, out_width: Bytes of an element of the left and right operand, and of
            the result.
        left_bytes: What the left operand takes at most; a convolution's is smaller than the matrix
            that it stands for.
        left_span, right_span: Bytes that pass through the L2 between two uses of the left and of
            the right operand; by default both come from memory. A small result stays in the L2.
        lasting: Seconds at the peak that the products around these take together, where those keep
            the chip as busy: the clock falls with all of them, not with each.
    """
    m, n, k, batch = (np.asarray(value, float).reshape(-1, 1) for value in (m, n, k, batch))
    width = np.asarray(width, float).reshape(-1, 1)
    right_width = width if weight_width is None else np.asarray(weight_width, float).reshape(-1, 1)
    out = np.asarray(out_width, float).reshape(-1, 1) * m * n * batch
    rows, columns = np.ceil(m / _M), np.ceil(n / _N)
    tiles = rows * columns * _S * batch / chip.units

    ideal = 2.0 * m * n * k * batch / (chip.peak * chip.throttle * c["sustained"])
    clock = np.clip(np.maximum(ideal, lasting) / 1e-3, 1e-2, 30.0) ** -c["droop"]
    rate = chip.peak * chip.throttle * c["sustained"] * clock / chip.units
    depth = np.ceil(k / _S / 64.0) * 64.0
    step = 2.0 * _M * _N * (1.0 + c["tile_edge"] * (1.0 / _M + 1.0 / _N)) / rate
    together = np.clip(2.0 * 128 * 128 / (_M * _N), 1.0, 8.0)
    compute = depth * np.maximum(
        np.maximum(1.0, np.ceil(tiles)) * step,
        np.ceil(tiles / together) * 2.0 * c["least_tile"] / rate,
    )

    kept = chip.cache * c["resident"]

    def cold(span: Any) -> Array:
        found = np.asarray(span, float).reshape(-1, 1) + out
        return np.asarray(np.clip(found / kept - 1.0, 0.0, 0.5) / 0.5)

    left = np.minimum(width * m * k * batch, np.asarray(left_bytes, float).reshape(-1, 1))
    reads = left * cold(left_span) + right_width * n * k * batch * cold(right_span)
    memory = (reads + out * cold(out)) / (chip.bandwidth * c["memory"])

    through = batch * rows * right_width * n * k + columns * left + c["write"] * out
    through = through + np.where(_S > 1, 8.0 * m * n * batch * _S, 0.0)
    on_chip = through / (chip.reference * c["on_chip"] * np.minimum(tiles, 1.0))

    p = c["sharpness"]
    body = (compute**p + on_chip**p + memory**p) ** (1.0 / p)
    launch = c["launch_s"] + c["ramp_cycles"] / chip.clock
    body = body + np.where(_S > 1, c["split_s"], 0.0)
    best = body.argmin(axis=1)
    pick = np.arange(len(best)), best
    memory = np.broadcast_to(memory, body.shape)[pick]
    body, compute, on_chip = body[pick], compute[pick], on_chip[pick]

    # A matrix and a vector need no tiles: rows are summed as they are read.
    fed = (left + right_width * n * k * batch)[:, 0] / (chip.reference * c["on_chip"])
    summed = (fed**p + memory**p) ** (1.0 / p)
    vector = (np.minimum(m, n)[:, 0] <= 1.0) & (summed < body)
    body, on_chip = np.where(vector, summed, body), np.where(vector, fed, on_chip)
    compute = np.where(vector, 0.0, compute)
    return Parts(np.full(len(best), launch), compute, on_chip, memory, body)


# --- what only moves data ------------------------------------------------------------------------

STREAM_START: Mapping[str, float] = {
    "memory": 0.85,
    "base_s": 4e-6,
    "half_bytes_s": 1.5e-6,
    "resident": 0.5,
    "on_chip": 3.0,
    "reduce": 1.0,
}
"""memory: share of the peak bandwidth; base_s: what the smallest kernel takes; half_bytes_s: how
long a kernel has to last until half of the bandwidth is reached; resident: share of the L2 that
keeps its content between calls; on_chip: how much faster than memory it is; reduce: how much
slower than elementwise a kernel is that reduces along rows."""

STREAM_BOUNDS: Mapping[str, tuple[float, float]] = {
    "memory": (0.2, 1.1),
    "base_s": (1e-6, 4e-5),
    "half_bytes_s": (1e-8, 4e-5),
    "resident": (0.02, 2.0),
    "on_chip": (1.0, 10.0),
    "reduce": (0.5, 4.0),
}

STREAM_DEVICE = tuple(STREAM_START)


def stream(
    moved: Any,
    chip: Chip,
    c: Mapping[str, float],
    *,
    reduces: Any = False,
    vector_s: Any = 0.0,
    warm: bool = False,
) -> Array:
    """Seconds of a kernel that reads and writes ``moved`` bytes and computes little.

    Args:
        reduces: Whether it needs a whole row before it writes (softmax, normalization).
        vector_s: Seconds of its arithmetic at the peak of the ordinary cores.
        warm: Whether the last call left the same data in the L2.
    """
    moved = np.asarray(moved, float)
    cold = np.ones_like(moved)
    if warm:
        cold = np.clip((moved / (chip.whole_cache * c["resident"]) - 1.0) / 2.0, 0.0, 1.0)
    full = moved * (cold + (1.0 - cold) / c["on_chip"]) / (chip.bandwidth * c["memory"])
    full = full * np.where(reduces, c["reduce"], 1.0)
    # The ramp matters to kernels that are neither so short that the base hides it nor long.
    ramp = np.minimum(full, c["half_bytes_s"])
    return np.asarray(c["base_s"] + np.maximum(full + ramp, vector_s))
