"""Parts of symbolic sizes: what shape arithmetic in floats makes of a size before it rounds.

Exporters compute sizes as `Cast` to float, `Mul`, `Div`, `Floor` or `Ceil`, and `Cast` back. A part
is kept exact until it is rounded. The model computes in float32, which rounds to the same as long
as a size is below 2**24 and only the last step is no sum of powers of two; anything else is
undecided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

_FINEST = 1 << 12
"""The largest denominator of a constant."""


class Undecided(Exception):
    """What is asked has no answer that holds for all sizes."""


@dataclass(frozen=True)
class Ratio:
    """A symbolic size times a fraction that is not whole."""

    size: Any
    factor: Fraction

    def __str__(self) -> str:
        return f"{self.size}*{self.factor}"


def part(item: Any) -> Any:
    """An element of a tensor of floats: an integer, a `Fraction`, a size or a `Ratio`."""
    if not isinstance(item, float):
        return item
    if not math.isfinite(item):
        raise Undecided
    exact = Fraction(item)
    if exact.denominator > _FINEST:
        raise Undecided
    return _whole(exact)


def times(a: Any, b: Any) -> Any:
    """A product of which one factor at least is a number."""
    number, other = (a, b) if isinstance(a, (int, Fraction)) else (b, a)
    return _scaled(other, number)


def over(a: Any, b: Any) -> Any:
    """A size or a number, divided by a number."""
    if not isinstance(b, (int, Fraction)) or b == 0:
        raise Undecided
    return _scaled(a, 1 / Fraction(b), last=True)


def floor(item: Any) -> Any:
    """The largest integer that is no larger."""
    if isinstance(item, Ratio):
        return item.size * item.factor.numerator // item.factor.denominator
    return math.floor(item) if isinstance(item, Fraction) else item


def ceil(item: Any) -> Any:
    """The smallest integer that is no smaller."""
    if isinstance(item, Ratio):
        return -(-item.size * item.factor.numerator // item.factor.denominator)
    return math.ceil(item) if isinstance(item, Fraction) else item


def truncated(item: Any) -> Any:
    """What a cast to an integer makes of it."""
    if isinstance(item, Ratio):
        if not item.size * item.factor.numerator >= 0:
            raise Undecided
        return floor(item)
    return math.trunc(item) if isinstance(item, Fraction) else item


def _scaled(item: Any, factor: Any, *, last: bool = False) -> Any:
    """``last`` is for a factor that need not be exact, since the item is."""
    if not isinstance(factor, (int, Fraction)):
        if isinstance(item, Ratio) or isinstance(factor, Ratio):
            raise Undecided
        return item * factor
    size, old = (item.size, item.factor) if isinstance(item, Ratio) else (item, Fraction(1))
    before = item if isinstance(item, Fraction) else old
    if not _is_exact(before) or not (last or _is_exact(Fraction(factor))):
        raise Undecided
    if isinstance(item, (int, Fraction)):
        return _whole(item * Fraction(factor))
    new = old * factor
    return size * int(new) if new.denominator == 1 else Ratio(size, new)


def _is_exact(factor: Fraction) -> bool:
    return factor.denominator & (factor.denominator - 1) == 0


def _whole(number: Fraction) -> Any:
    return int(number) if number.denominator == 1 else number
