"""Figures for people: three digits, a unit, and a dash for what is unknown."""

from __future__ import annotations

UNKNOWN = "-"
"""Shown for what is unknown."""


def scaled(value: float | None, unit: str, steps: str = "kMGTP") -> str:
    """A figure with a decimal prefix: ``scaled(1.2e12, "op/s")`` is ``1.20 Top/s``."""
    if value is None:
        return UNKNOWN
    small = ("", 1.0), ("m", 1e-3), ("µ", 1e-6), ("n", 1e-9), ("p", 1e-12)
    large = tuple((prefix, 1e3 ** (i + 1)) for i, prefix in enumerate(steps))
    fitting = [pair for pair in (*small, *large) if abs(value) >= pair[1]]
    prefix, factor = max(fitting, key=lambda pair: pair[1], default=("", 1.0))
    return f"{digits(value / factor)} {prefix}{unit}".strip()


def seconds(value: float | None) -> str:
    """``1.23 ms``."""
    return scaled(value, "s", steps="")


def bytes_(value: float | None) -> str:
    """``1.50 GiB``."""
    if value is None:
        return UNKNOWN
    for prefix, factor in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if value >= factor:
            return f"{digits(value / factor)} {prefix}"
    return f"{value:.0f} B"


def digits(value: float) -> str:
    """Three significant digits without an exponent where that is readable."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        places = max(0, 2 - _exponent(value))
        return f"{value:.{places}f}"
    return f"{value:.2e}"


def _exponent(value: float) -> int:
    return int(f"{abs(value):e}".partition("e")[2])


def interval(pair: list[float] | None, shown: str) -> str:
    """``0.9 to 1.4`` in the unit of ``shown``, which is the figure that the interval is around."""
    if pair is None or shown == UNKNOWN:
        return ""
    factor = {"m": 1e-3, "µ": 1e-6, "n": 1e-9, "p": 1e-12}.get(shown.split(" ")[1][0], 1.0)
    if shown.split(" ")[1] in ("s", "J"):
        factor = 1.0
    return f"{digits(pair[0] / factor)} to {digits(pair[1] / factor)}"
