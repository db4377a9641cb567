"""Resize and Upsample: along each axis a weighted sum of neighbours, so one axis at a time.

Scales may come at run time; the sizes are then those that the model promises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.dtypes import is_integer
from trivium.backends.xla.lowering.lazy import jnp
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


@dataclass(frozen=True)
class _Axis:
    """How one axis is resized; the numbers are Python's where known, jax's where not."""

    axis: int
    before: int
    after: int
    scale: Any
    start: Any = 0.0
    end: Any = 1.0

    def source(self, mode: str) -> Any:
        """The coordinate in the input of each element of the output, float64."""
        xp = np if isinstance(self.scale, (int, float)) else jnp
        y = xp.arange(self.after).astype("float64")
        width = self.scale * self.before
        if mode == "asymmetric":
            return y / self.scale
        if mode == "align_corners":
            return y * (self.before - 1) / xp.where(width == 1, 1, width - 1) * (width != 1)
        if mode == "tf_crop_and_resize":
            span = (self.end - self.start) * (self.before - 1)
            inner = y * span / (self.after - 1) if self.after > 1 else y + span / 2
            return inner + self.start * (self.before - 1)
        x = (y + 0.5) / self.scale - 0.5
        if mode == "pytorch_half_pixel" and self.after == 1:
            return xp.full_like(y, -0.5)
        if mode == "half_pixel_symmetric":
            return x + self.before / 2 * (1 - self.after / width)
        return x


_ROUND: dict[str, Callable[[Any, Any], Any]] = {
    "round_prefer_floor": lambda xp, x: xp.ceil(x - 0.5),
    "round_prefer_ceil": lambda xp, x: xp.floor(x + 0.5),
    "floor": lambda xp, x: xp.floor(x),
    "ceil": lambda xp, x: xp.ceil(x),
}


@dataclass(frozen=True)
class _Filter:
    """The options that all axes share."""

    mode: str
    coordinates: str
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    antialias: bool = False
    exclude_outside: bool = False

    @property
    def reach(self) -> int:
        """How far the filter reaches to each side, in input elements at scale one."""
        return 1 if self.mode == "linear" else 2

    def weight(self, xp: Any, distance: Any) -> Any:
        """The weight of an element at a distance; Keys's cubic, or a triangle."""
        d = xp.abs(distance)
        if self.mode == "linear":
            return xp.clip(1 - d, 0, None)
        a = self.cubic
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return xp.where(d <= 1, near, xp.where(d < 2, far, 0.0))

    def apply(self, x: Any, part: _Axis) -> Any:
        """Resize one axis."""
        source = part.source(self.coordinates)
        xp = np if isinstance(source, np.ndarray) else jnp
        last = part.before - 1
        if self.mode == "nearest":
            index = xp.clip(_ROUND[self.nearest](xp, source), 0, last).astype("int64")
            return jnp.take(x, index, axis=part.axis)
        shrink: Any = 1.0
        reach = self.reach
        if self.antialias:
            shrink = xp.minimum(part.scale, 1.0)
            known = isinstance(part.scale, (int, float))
            smallest = min(part.scale, 1.0) if known else part.after / part.before / 2
            reach = math.ceil(self.reach / smallest) + 1
        base = xp.floor(source)
        taps, weights = [], []
        for offset in range(1 - reach, reach + 1):
            index = base + offset
            weight = self.weight(xp, (index - source) * shrink)
            if self.exclude_outside:
                weight = xp.where((index >= 0) & (index <= last), weight, 0.0)
            taps.append(xp.clip(index, 0, last).astype("int64"))
            weights.append(weight)
        if self.antialias or self.exclude_outside:
            total = sum(weights)
            weights = [weight / total for weight in weights]
        spread = [-1 if axis == part.axis else 1 for axis in range(x.ndim)]
        y: Any = 0
        for index, weight in zip(taps, weights, strict=True):
            factor = jnp.reshape(jnp.asarray(weight, x.dtype), spread)
            y = y + jnp.take(x, index, axis=part.axis) * factor
        return y


def _resize(op: Op, x: Any, parts: list[_Axis], options: _Filter) -> Any:
    dtype = x.dtype
    exact = options.mode == "nearest"
    y = x if exact or not is_integer(dtype) else jnp.asarray(x, "float32")
    outside: Any = None
    for part in parts:
        if options.coordinates == "tf_crop_and_resize":
            source = jnp.asarray(part.source(options.coordinates))
            wrong = (source < 0) | (source > part.before - 1)
            spread = [-1 if axis == part.axis else 1 for axis in range(x.ndim)]
            wrong = jnp.reshape(wrong, spread)
            outside = wrong if outside is None else outside | wrong
        elif part.before == part.after and isinstance(part.scale, float) and part.scale == 1.0:
            continue
        y = options.apply(y, part)
    if outside is not None:
        y = jnp.where(outside, jnp.asarray(op.attr("extrapolation_value", 0.0), y.dtype), y)
    if not exact and is_integer(dtype):
        limits = jnp.iinfo(dtype)
        y = jnp.clip(jnp.round(y), limits.min, limits.max)
    return y.astype(dtype)


@handles("Upsample", since=7)
def upsample_by_attribute(op: Op, x: Any) -> Any:
    return _scaled(op, x, np.asarray(op.attr("scales"), np.float32), 0)


@handles("Upsample", since=9, constants=(1,))
@handles("Resize", since=10, constants=(1,))
def resize_by_scales(op: Op, x: Any, scales: Any) -> Any:
    return _scaled(op, x, scales, 1)


def _scaled(op: Op, x: Any, scales: Any, slot: int) -> Any:
    """Resize as it was until opset 10: from the corner, rounding down."""
    axes = list(range(x.ndim))
    parts = _parts_by_scale(op, x, axes, scales, slot, [0.0] * x.ndim, [1.0] * x.ndim)
    return _resize(op, x, parts, _Filter(op.attr("mode", "nearest"), "asymmetric", "floor"))


@handles("Resize", since=11, constants=(1, 2, 3))
def resize(op: Op, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
    axes = [axis % x.ndim for axis in op.attr("axes") or range(x.ndim)]
    coordinates = op.attr("coordinate_transformation_mode", "half_pixel")
    starts: list[Any] = [0.0] * len(axes)
    ends: list[Any] = [1.0] * len(axes)
    if coordinates == "tf_crop_and_resize" and roi is not None:
        corners = [_number(op, roi, index) for index in range(2 * len(axes))]
        starts, ends = corners[: len(axes)], corners[len(axes) :]
    if scales is not None and scales.size:
        parts = _parts_by_scale(op, x, axes, scales, 2, starts, ends)
    else:
        parts = _parts_by_size(op, x, axes, sizes, starts, ends)
    options = _Filter(
        op.attr("mode", "nearest"),
        coordinates,
        op.attr("nearest_mode", "round_prefer_floor"),
        op.attr("cubic_coeff_a", -0.75),
        bool(op.attr("antialias", 0)),
        bool(op.attr("exclude_outside", 0)),
    )
    return _resize(op, x, parts, options)


def _number(op: Op, values: Any, index: int) -> Any:
    """One element of an operand: a float where it is known, a float64 scalar of jax otherwise."""
    return float(values[index]) if op.known(values) else values[index].astype("float64")


def _parts_by_scale(
    op: Op, x: Any, axes: list[int], scales: Any, slot: int, starts: list[Any], ends: list[Any]
) -> list[_Axis]:
    promised = op.shape()
    if not op.known(scales) and promised is None:
        raise op.needs(slot)
    parts = []
    for index, axis in enumerate(axes):
        scale = _number(op, scales, index)
        before = x.shape[axis]
        if op.known(scales):
            after = math.floor(before * scale * (ends[index] - starts[index]))
        else:
            assert promised is not None
            after = promised[axis]
        parts.append(_Axis(axis, before, after, scale, starts[index], ends[index]))
    return parts


def _parts_by_size(
    op: Op, x: Any, axes: list[int], sizes: Any, starts: list[Any], ends: list[Any]
) -> list[_Axis]:
    policy = op.attr("keep_aspect_ratio_policy", "stretch")
    before = [x.shape[axis] for axis in axes]
    promised = op.shape()
    if op.known(sizes):
        wanted: list[Any] = op.ints(3, sizes)
        scales: list[Any] = [size / old for size, old in zip(wanted, before, strict=True)]
        if policy != "stretch":
            scale = (min if policy == "not_larger" else max)(scales)
            scales = [scale] * len(axes)
            wanted = [math.floor(scale * old + 0.5) for old in before]
    elif promised is not None:
        wanted = [promised[axis] for axis in axes]
        scales = [size / old for size, old in zip(wanted, before, strict=True)]
        if policy != "stretch":
            ratios = sizes.astype("float64") / np.asarray(before, np.float64)
            scales = [(jnp.min if policy == "not_larger" else jnp.max)(ratios)] * len(axes)
    else:
        raise op.needs(3)
    rows = zip(axes, before, wanted, scales, starts, ends, strict=True)
    return [_Axis(*row) for row in rows]
