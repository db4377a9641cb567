"""Integer arithmetic with ONNX's rounding, exactly.

ONNX Runtime's integer kernels compute ``rint(float32(acc) * scale)``: the product is rounded twice,
to float32 and to an integer. A multiplication by a rounded fixed-point scale gets some values
wrong; here the multiplier *is* the float32 scale (24 significant bits times a power of two), the
product is exact, and the first rounding only matters next to a tie, where it is redone in
integers. Both agree for every accumulator below 2**24, where float32 still holds every integer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trivium.backends.fpga.ir import Range, Requantize

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

FLOAT32_INTEGERS = 1 << 24
"""float32 holds every integer up to here."""

MULTIPLIER_BITS = 48
"""Of the widest multiplier; scales 2**24 apart still share a shift."""

MAX_SHIFT = 50
"""Of a requantization; a scale below 2**-26 has no use on integers of 24 bits."""

PRODUCT_BITS = 62
"""Products are computed in 64-bit integers, by the interpreter and by the kernel's simulation."""


def fixed_point(scales: Array) -> tuple[Array, int]:
    """Write float32 scales as ``multiplier / 2**shift`` with one shift, exactly.

    Returns:
        int64 multipliers of the scales' shape, and a shift of at least 1.

    Raises:
        ValueError: A scale is not positive and finite, or their magnitudes are too far apart.
    """
    import numpy as np

    scales = np.asarray(scales, np.float32).astype(np.float64)
    if not (np.isfinite(scales) & (scales > 0)).all():
        raise ValueError(f"the scale {scales.min():g} is not positive and finite")
    mantissa, exponent = np.frexp(scales)
    significand = np.ldexp(mantissa, 24).astype(np.int64)
    # scale = significand * 2**(exponent - 24); trailing zeros would only widen the multiplier.
    zeros = np.array([(int(s) & -int(s)).bit_length() - 1 for s in significand.flat])
    zeros = zeros.reshape(significand.shape)
    significand >>= zeros
    shifts = 24 - exponent - zeros
    shift = max(int(shifts.max()), 1)
    left = shift - shifts
    if int((left + np.frexp(significand)[1]).max()) > MULTIPLIER_BITS:
        raise ValueError(f"the scales {scales.min():g} and {scales.max():g} are too far apart")
    return significand << left, shift


def requantizer(scales: Array, zero_point: int, lo: int, hi: int, accumulator: Range) -> Requantize:
    """Make the requantization of an accumulator by float32 ``scales``, one for each channel.

    Raises:
        ValueError: The product with the accumulator does not fit 64 bits; see also `fixed_point`.
    """
    import numpy as np

    scales = np.asarray(scales, np.float32)
    # A channel that always rounds to zero (pruned, say) must not widen the others' multipliers.
    live = scales * np.float32(max(-accumulator.lo, accumulator.hi)) > 0.5
    multiplier, shift = np.zeros(scales.shape, np.int64), 1
    if live.any():
        multiplier[live], shift = fixed_point(scales[live])
    largest = int(multiplier.max())
    product = Range(min(accumulator.lo, 0) * largest, max(accumulator.hi, 0) * largest)
    if product.bits > PRODUCT_BITS or shift > MAX_SHIFT:
        raise ValueError(
            f"a {accumulator.bits}-bit accumulator times a {largest.bit_length()}-bit multiplier "
            f"(shift {shift}) exceeds {PRODUCT_BITS} bits"
        )
    return Requantize(multiplier, shift, zero_point, lo, hi, product)


def requantize(accumulator: Array, how: Requantize) -> Array:
    """Requantize int64 accumulators, channels last. See `ir.Requantize` for the meaning."""
    import numpy as np

    rounded = round_like_float32(accumulator * how.multiplier, how.shift)
    clipped: Array = np.clip(rounded + how.zero_point, how.lo, how.hi)
    return clipped


def round_like_float32(product: Array, shift: int) -> Array:
    """``rint(float32(product / 2**shift))`` in integers.

    The float32 nearest to a value next to ``k + 1/2`` is ``k + 1/2`` itself if they are at most
    half a float32 step apart, and then the tie goes to even. The step depends on the magnitude of
    ``k + 1/2`` alone: half of it is ``2**(bit_length(k) - 25)``.
    """
    import numpy as np

    floor = product >> shift
    from_half = product - (floor << shift) - (np.int64(1) << (shift - 1))
    magnitude = np.where(floor >= 0, floor, ~floor)
    # frexp's exponent of an integer is its bit length (of 0 it is 0).
    exponent = np.frexp(magnitude.astype(np.float64))[1] + shift - 25
    half_step = np.where(exponent >= 0, np.int64(1) << np.clip(exponent, 0, 62), 0)
    up = np.where(np.abs(from_half) <= half_step, floor & 1, from_half > 0)
    return floor + up


def round_half_even(numerator: Array, shift: int) -> Array:
    """``numerator / 2**shift`` to the nearest integer, ties to even."""
    import numpy as np

    floor = numerator >> shift
    from_half = numerator - (floor << shift) - (np.int64(1) << (shift - 1))
    return floor + np.where(from_half == 0, floor & 1, from_half > 0)


def fixed_point_add(
    ranges: tuple[Range, Range],
    scales: tuple[float, float],
    zero_points: tuple[int, int],
    scale: float,
    zero_point: int,
    lo: int,
    hi: int,
) -> tuple[tuple[int, int], int, int, Range, int]:
    """Find multipliers, offset and shift of an addition that agree with float32 on *every* pair.

    Both inputs have at most 8 bits, so all pairs are tried: the smallest shift without a
    difference wins, or else the one with the fewest.

    Returns:
        ``(multipliers, offset, shift, accumulator, mismatches)``, see `ir.Add`.
    """
    import numpy as np

    a = np.arange(ranges[0].lo, ranges[0].hi + 1, dtype=np.int64)[:, None]
    b = np.arange(ranges[1].lo, ranges[1].hi + 1, dtype=np.int64)[None, :]
    real_a = (a - zero_points[0]).astype(np.float32) * np.float32(scales[0])
    real_b = (b - zero_points[1]).astype(np.float32) * np.float32(scales[1])
    steps = np.rint((real_a + real_b) / np.float32(scale)).astype(np.int64)
    want = np.clip(steps + zero_point, lo, hi)
    best: tuple[int, tuple[int, int], int, int] | None = None
    for shift in range(8, 33):
        pair = tuple(
            round(float(np.float32(s)) / float(np.float32(scale)) * 2**shift) for s in scales
        )
        offset = (zero_point << shift) - sum(m * z for m, z in zip(pair, zero_points, strict=True))
        have = np.clip(round_half_even(a * pair[0] + b * pair[1] + offset, shift), lo, hi)
        different = int((have != want).sum())
        if best is None or different < best[0]:
            best = (different, (pair[0], pair[1]), offset, shift)
        if different == 0:
            break
    assert best is not None
    mismatches, multipliers, offset, shift = best
    corners = [
        x * multipliers[0] + y * multipliers[1] + offset
        for x in (ranges[0].lo, ranges[0].hi)
        for y in (ranges[1].lo, ranges[1].hi)
    ]
    return multipliers, offset, shift, Range(min(corners), max(corners)), mismatches
