"""Figures for people."""

from __future__ import annotations

import pytest

from trivium.compiler.report import units


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, units.UNKNOWN),
        (512, "512 B"),
        (1536, "1.50 KiB"),
        (80e9, "74.5 GiB"),
        (2**20, "1.00 MiB"),
    ],
)
def test_bytes(value: float | None, shown: str) -> None:
    assert units.bytes_(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.0, "1.23 k"), (0.999e6, "999 k"), (989e12, "989 T"), (0.25, "250 m")],
)
def test_prefixes(value: float, shown: str) -> None:
    assert units.scaled(value, "") == shown


def test_an_interval_is_in_the_unit_of_its_figure() -> None:
    assert units.interval([0.9e-3, 1.4e-3], units.seconds(1.1e-3)) == "0.900 to 1.40"
    assert units.interval([0.5, 2.0], units.seconds(1.0)) == "0.500 to 2.00"
    assert units.interval(None, units.seconds(1.0)) == ""
    assert units.interval([1.0, 2.0], units.UNKNOWN) == ""
