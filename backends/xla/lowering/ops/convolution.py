"""Convolutions of any rank, in ONNX's layout (N, C, spatial) and (O, I / group, spatial)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trivium.backends.xla.lowering.cpu import grouped_convolution, narrow_convolution
from trivium.backends.xla.lowering.lazy import jnp, lax
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


def window_padding(
    op: Op, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:  # fmt: skip
    """The padding of a window operator at each side of each spatial axis.

    ``auto_pad`` keeps ``ceil(size / stride)`` positions and puts the odd element at the end
    (SAME_UPPER) or the beginning (SAME_LOWER).
    """
    rank = len(sizes)
    auto = op.attr("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = op.attr("pads") or [0] * (2 * rank)
        return [(pads[axis], pads[axis + rank]) for axis in range(rank)]
    if auto == "VALID":
        return [(0, 0)] * rank
    padding = []
    for size, window, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        reach = (window - 1) * dilation + 1
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        small, large = total // 2, total - total // 2
        padding.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return padding


def convolve(op: Op, x: Any, w: Any, **options: Any) -> Any:
    """Convolution with the attributes of ``op``; ``options`` go to XLA."""
    rank = x.ndim - 2
    strides = op.attr("strides") or [1] * rank
    dilations = op.attr("dilations") or [1] * rank
    groups = op.attr("group", 1)
    padding = window_padding(op, x.shape[2:], w.shape[2:], strides, dilations)
    x, w = jnp.asarray(x), jnp.asarray(w)
    if op.frame.platform == "cpu" and groups > 1 and not options:
        y = grouped_convolution(x, w, strides, padding, dilations, groups)
        if y is not None:
            return y
    if op.frame.platform == "cpu" and groups == 1 and not options:
        y = narrow_convolution(x, w, strides, padding, dilations)
        if y is not None:
            return y
    return lax.conv_general_dilated(
        x,
        w,
        strides,
        padding,
        rhs_dilation=dilations,
        dimension_numbers=spatial_letters(rank),
        feature_group_count=groups,
        **options,
    )


def spatial_letters(rank: int) -> tuple[str, str, str]:
    """ONNX's layouts of data, filters and results, in XLA's notation."""
    spatial = "DHWXYZ"[:rank]
    return f"NC{spatial}", f"OI{spatial}", f"NC{spatial}"


def per_channel(values: Any, rank: int) -> Any:
    """A vector of one value for each channel, shaped to broadcast over (N, C, spatial)."""
    return jnp.reshape(values, (1, -1, *(1,) * (rank - 2)))


@handles("Conv")
def conv(op: Op, x: Any, w: Any, bias: Any = None) -> Any:
    y = convolve(op, x, w)
    return y if bias is None else y + per_channel(bias, y.ndim)


@handles("ConvTranspose")
def conv_transpose(op: Op, x: Any, w: Any, bias: Any = None) -> Any:
    rank = x.ndim - 2
    kernel = w.shape[2:]
    strides = op.attr("strides") or [1] * rank
    dilations = op.attr("dilations") or [1] * rank
    extra = op.attr("output_padding") or [0] * rank
    groups = op.attr("group", 1)
    padding = _transposed_padding(op, x.shape[2:], kernel, strides, dilations, extra)
    # The gradient of a convolution: dilate the input, flip the kernel, swap its channels.
    inputs, outputs = w.shape[0], w.shape[1]
    w = jnp.flip(w, tuple(range(2, w.ndim)))
    w = jnp.reshape(w, (groups, inputs // groups, outputs, *kernel))
    w = jnp.swapaxes(w, 1, 2).reshape(groups * outputs, inputs // groups, *kernel)
    y = lax.conv_general_dilated(
        jnp.asarray(x),
        w,
        [1] * rank,
        [
            ((k - 1) * d - begin, (k - 1) * d - end + more)
            for k, d, (begin, end), more in zip(kernel, dilations, padding, extra, strict=True)
        ],
        lhs_dilation=strides,
        rhs_dilation=dilations,
        dimension_numbers=spatial_letters(rank),
        feature_group_count=groups,
    )
    return y if bias is None else y + per_channel(bias, y.ndim)


def _transposed_padding(
    op: Op, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int],
    dilations: Sequence[int], extra: Sequence[int],
) -> list[tuple[int, int]]:  # fmt: skip
    rank = len(sizes)
    auto = op.attr("auto_pad", "NOTSET")
    wanted = op.attr("output_shape")
    if wanted is not None:
        wanted = wanted[-rank:]
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    if wanted is None:
        pads = op.attr("pads") or [0] * (2 * rank)
        return [(pads[axis], pads[axis + rank]) for axis in range(rank)]
    padding = []
    for axis in range(rank):
        full = strides[axis] * (sizes[axis] - 1) + extra[axis]
        full += (kernel[axis] - 1) * dilations[axis] + 1
        total = full - wanted[axis]
        small, large = max(total, 0) // 2, -(-max(total, 0) // 2)
        begin, end = (small, large) if auto == "SAME_UPPER" else (large, small)
        # A wanted size beyond the full one is filled up at the end.
        padding.append((begin, end + min(total, 0)))
    return padding
