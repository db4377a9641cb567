"""Sampling of images at computed places: grids, regions of interest, deformable convolution."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.backends.xla.lowering.ops.convolution import per_channel
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op

_MODES = {"bilinear": "linear", "bicubic": "cubic"}


def _reflected(x: Any, low: float, high: float) -> Any:
    """A coordinate folded back at both borders until it is inside."""
    span = high - low
    if span == 0:
        return jnp.zeros_like(x)
    folded = jnp.mod(x - low, 2 * span)
    return low + jnp.where(folded > span, 2 * span - folded, folded)


def _cubic_weights(t: Any) -> list[Any]:
    """Keys's weights of the elements at -1, 0, 1 and 2, for a fraction ``t``."""
    a = -0.75

    def far(d: Any) -> Any:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    def near(d: Any) -> Any:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


def sample(x: Any, places: list[Any], mode: str, at: Callable[[Any, list[Any]], Any]) -> Any:
    """Interpolate at ``places``, one array of coordinates for each spatial axis.

    Args:
        at: Reads ``x`` at integer places, whatever lies outside; returns (..., channels).
    """
    if mode == "nearest":
        return at(x, [jnp.round(place) for place in places])
    taps = []
    for place in places:
        base = jnp.floor(place)
        t = place - base
        if mode == "linear":
            taps.append([(base, 1 - t), (base + 1, t)])
        else:
            taps.append(
                [(base + d, w) for d, w in zip(range(-1, 3), _cubic_weights(t), strict=True)]
            )
    y: Any = 0
    for corner in product(*taps):
        weight: Any = 1.0
        for _, factor in corner:
            weight = weight * factor
        y = y + at(x, [index for index, _ in corner]) * weight[..., None].astype(x.dtype)
    return y


def _reader(sizes: tuple[int, ...], padding: str, borders: list[tuple[float, float]]) -> Any:
    """Read (batch, channels, spatial) at (batch, ...) places, with what lies outside made up."""

    def at(x: Any, places: list[Any]) -> Any:
        inside = jnp.ones((), bool)
        indices = []
        for place, size, (low, high) in zip(places, sizes, borders, strict=True):
            if padding == "zeros":
                inside = inside & (place >= 0) & (place < size)
            elif padding == "reflection":
                place = jnp.trunc(_reflected(place, low, high))
            indices.append(jnp.clip(place, 0, size - 1).astype("int64"))
        rows = jnp.arange(x.shape[0]).reshape((-1, *(1,) * (places[0].ndim - 1)))
        values = x[(rows, slice(None), *indices)]
        return (
            jnp.where(inside[..., None], values, jnp.zeros((), x.dtype))
            if (padding == "zeros")
            else values
        )

    return at


@handles("GridSample", since=16)
def grid_sample(op: Op, x: Any, grid: Any) -> Any:
    x, grid = jnp.asarray(x), jnp.asarray(grid)
    sizes = x.shape[2:]
    corners = bool(op.attr("align_corners", 0))
    padding = op.attr("padding_mode", "zeros")
    default = "linear" if op.version >= 20 else "bilinear"
    mode = op.attr("mode", default)
    mode = _MODES.get(mode, mode)
    borders = [(0.0, n - 1.0) if corners else (-0.5, n - 0.5) for n in sizes]
    places = []
    for axis, (size, (low, high)) in enumerate(zip(sizes, borders, strict=True)):
        place = grid[..., len(sizes) - 1 - axis]
        place = (place + 1) / 2 * (size - 1) if corners else ((place + 1) * size - 1) / 2
        place = jnp.round(place) if mode == "nearest" else place
        outside = (place < low) | (place > high)
        if padding == "border":
            place = jnp.where(outside, jnp.clip(place, 0, size - 1), place)
        elif padding == "reflection":
            place = jnp.where(outside, _reflected(place, low, high), place)
        # "nearest" truncates what reflection left between two elements
        places.append(jnp.trunc(place) if mode == "nearest" else place)
    y = sample(x, places, mode, _reader(sizes, padding, borders))
    return jnp.moveaxis(y, -1, 1)


@handles("AffineGrid", since=20, constants=(1,))
def affine_grid(op: Op, theta: Any, size: Any) -> Any:
    promised = op.shape()
    if op.known(size):
        spatial = op.ints(1, size)[2:]
    elif promised is not None:
        spatial = list(promised[1:-1])
    else:
        raise op.needs(1)
    axes = []
    for count in spatial:
        step = np.arange(count, dtype=np.float64)
        if op.attr("align_corners", 0):
            axes.append(-1 + 2 * step / max(count - 1, 1))
        else:
            axes.append((2 * step + 1) / count - 1)
    grid = np.meshgrid(*axes, indexing="ij")
    homogeneous = np.stack([*reversed(grid), np.ones(spatial)], axis=-1)
    return jnp.einsum("nij,...j->n...i", theta, jnp.asarray(homogeneous, theta.dtype))


@handles("CenterCropPad", since=18, constants=(1,))
def center_crop_pad(op: Op, x: Any, target: Any) -> Any:
    axes = [axis % x.ndim for axis in op.attr("axes") or range(x.ndim)]
    promised = op.shape()
    if op.known(target):
        sizes = op.ints(1, target)
    elif promised is not None:
        sizes = [promised[axis] for axis in axes]
    else:
        raise op.needs(1)
    for axis, size in zip(axes, sizes, strict=True):
        old = x.shape[axis]
        if size < old:
            x = jnp.take(x, (old - size) // 2 + np.arange(size), axis=axis)
        elif size > old:
            before = (size - old) // 2
            widths = [(0, 0)] * x.ndim
            widths[axis] = (before, size - old - before)
            x = jnp.pad(x, widths)
    return x


@handles("Col2Im", since=18, constants=(1, 2))
def col2im(op: Op, x: Any, image: Any, block: Any) -> Any:
    """Add overlapping columns back into an image: each tap of the block is a strided window."""
    promised = op.shape()
    if op.known(image):
        sizes = op.ints(1, image)
    elif promised is not None:
        sizes = list(promised[2:])
    else:
        raise op.needs(1)
    rank = len(sizes)
    dilations = op.attr("dilations") or [1] * rank
    strides = op.attr("strides") or [1] * rank
    pads = op.attr("pads") or [0] * (2 * rank)
    kernel = op.ints(2, block)
    counts = [
        (sizes[a] + pads[a] + pads[a + rank] - dilations[a] * (kernel[a] - 1) - 1) // strides[a] + 1
        for a in range(rank)
    ]
    batch = x.shape[0]
    channels = x.shape[1] // int(np.prod(kernel))
    columns = jnp.reshape(x, (batch, channels, *kernel, *counts))
    full = [sizes[a] + pads[a] + pads[a + rank] for a in range(rank)]
    y = jnp.zeros((batch, channels, *full), x.dtype)
    for tap in product(*(range(size) for size in kernel)):
        window = tuple(
            slice(t * d, t * d + (c - 1) * s + 1, s)
            for t, d, c, s in zip(tap, dilations, counts, strides, strict=True)
        )
        y = y.at[(slice(None), slice(None), *window)].add(columns[(slice(None), slice(None), *tap)])
    inner = tuple(slice(pads[a], pads[a] + sizes[a]) for a in range(rank))
    return y[(slice(None), slice(None), *inner)]


@handles("DeformConv", since=19)
def deform_conv(op: Op, x: Any, w: Any, offset: Any, bias: Any = None, mask: Any = None) -> Any:
    """Convolution (2-D) that reads each tap at an offset of its own, between the pixels."""
    if x.ndim != 4:
        raise op.refuse(f"over {x.ndim - 2} spatial axes is not lowered, only over two")
    batch, channels, height, width = x.shape
    outputs, each, kh, kw = w.shape
    groups, offset_groups = op.attr("group", 1), op.attr("offset_group", 1)
    strides = op.attr("strides") or [1, 1]
    dilations = op.attr("dilations") or [1, 1]
    pads = op.attr("pads") or [0, 0, 0, 0]
    oh, ow = offset.shape[2:]
    offset = jnp.reshape(offset, (batch * offset_groups, kh, kw, 2, oh, ow))
    rows = (
        np.arange(kh)[:, None, None, None] * dilations[0]
        + np.arange(oh)[None, None, :, None] * strides[0]
        - pads[0]
    )
    columns = (
        np.arange(kw)[None, :, None, None] * dilations[1]
        + np.arange(ow)[None, None, None, :] * strides[1]
        - pads[1]
    )
    places = [rows + offset[:, :, :, 0], columns + offset[:, :, :, 1]]
    grouped = jnp.reshape(x, (batch * offset_groups, channels // offset_groups, height, width))
    reader = _reader((height, width), "zeros", [(0.0, height - 1.0), (0.0, width - 1.0)])
    taken = sample(grouped, places, "linear", reader)
    if mask is not None:
        taken = taken * jnp.reshape(mask, (batch * offset_groups, kh, kw, oh, ow, 1))
    taken = jnp.moveaxis(taken, -1, 1).reshape(batch, groups, each, kh, kw, oh, ow)
    filters = jnp.reshape(w, (groups, outputs // groups, each, kh, kw))
    y = jnp.einsum("bgcijhw,gocij->bgohw", taken, filters).reshape(batch, outputs, oh, ow)
    return y if bias is None else y + per_channel(bias, 4)


@handles("RoiAlign", since=10)
def roi_align(op: Op, x: Any, rois: Any, batch_indices: Any) -> Any:
    count = op.attr("sampling_ratio", 0)
    if count <= 0:
        raise op.refuse(
            "with sampling_ratio 0 takes as many samples as a region is large",
            remedy="export it with a fixed sampling_ratio",
        )
    half = op.attr("coordinate_transformation_mode", "half_pixel" if op.version >= 16 else "")
    shift = 0.5 if half == "half_pixel" else 0.0
    height, width = x.shape[2:]
    oh, ow = op.attr("output_height", 1), op.attr("output_width", 1)
    corners = rois * jnp.asarray(op.attr("spatial_scale", 1.0), rois.dtype) - shift
    x1, y1, x2, y2 = (corners[:, index] for index in range(4))
    spans = [y2 - y1, x2 - x1] if shift else [jnp.maximum(y2 - y1, 1), jnp.maximum(x2 - x1, 1)]

    def positions(start: Any, span: Any, bins: int) -> Any:
        inner = (np.arange(bins * count) + 0.5) / count
        return start[:, None] + inner * (span / bins)[:, None]

    py = positions(y1, spans[0], oh)[:, :, None]
    px = positions(x1, spans[1], ow)[:, None, :]
    outside = (py < -1) | (py > height) | (px < -1) | (px > width)
    images = jnp.asarray(x)[batch_indices]
    taps = []
    for place, size in ((py, height), (px, width)):
        inner = jnp.clip(place, 0, size - 1)
        low = jnp.floor(inner)
        taps.append([(low, 1 - (inner - low)), (jnp.minimum(low + 1, size - 1), inner - low)])
    region = jnp.arange(rois.shape[0])[:, None, None]
    parts = []
    for (row, wy), (column, wx) in product(*taps):
        values = images[region, :, row.astype("int64"), column.astype("int64")]
        weight = jnp.where(outside, 0.0, wy * wx)[..., None]
        parts.append(values * weight.astype(x.dtype))
    average = op.attr("mode", "avg") == "avg"
    # max takes the largest of the weighted corners, as the operator is defined
    value = sum(parts) if average else jnp.max(jnp.stack(parts), axis=0)
    value = value.reshape(rois.shape[0], oh, count, ow, count, x.shape[1])
    pooled = value.mean(axis=(2, 4)) if average else value.max(axis=(2, 4))
    return jnp.moveaxis(pooled, -1, 1).astype(x.dtype)


@handles("MaxRoiPool")
def max_roi_pool(op: Op, x: Any, rois: Any) -> Any:
    """Maximum over the whole pixels of each bin, as Fast R-CNN defined it."""
    height, width = x.shape[2:]
    oh, ow = op.attr("pooled_shape")
    scaled = jnp.round(rois[:, 1:] * op.attr("spatial_scale", 1.0))
    lowest = jnp.asarray(-jnp.inf, x.dtype)

    def bins(start: Any, end: Any, count: int, size: int) -> Any:
        step = jnp.maximum(end - start + 1, 1) / count
        first = jnp.clip(jnp.floor(np.arange(count) * step) + start, 0, size)
        last = jnp.clip(jnp.ceil((np.arange(count) + 1) * step) + start, 0, size)
        pixel = np.arange(size)
        return (pixel >= first[:, None]) & (pixel < last[:, None])

    def pool(roi: Any, box: Any) -> Any:
        image = jnp.asarray(x)[roi.astype("int64")]
        rows = bins(box[1], box[3], oh, height)
        columns = bins(box[0], box[2], ow, width)
        by_row = jnp.max(jnp.where(rows[None, :, :, None], image[:, None], lowest), axis=2)
        y = jnp.max(jnp.where(columns[None, None], by_row[:, :, None], lowest), axis=3)
        return jnp.where(jnp.isneginf(y), 0, y).astype(x.dtype)

    return jax.vmap(pool)(rois[:, 0], scaled)
