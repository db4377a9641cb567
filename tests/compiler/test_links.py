"""Collectives on the links of a slice: which links carry them, and what they cost."""

from __future__ import annotations

import pytest

from trivium.compiler import links
from trivium.compiler.links import Route
from trivium.compiler.targets import find


@pytest.mark.parametrize(
    ("target", "devices", "expected"),
    [
        # Eight chips of a line of eight, or a box of 4 x 2: two links against one.
        ("tpu-v5e:4x8", 8, Route(2.0, 4)),
        ("tpu-v5e:4x8", 32, Route(2.0, 10)),
        # Only an axis of 16 closes into a ring.
        ("tpu-v5e:16x16", 256, Route(4.0, 16)),
        ("tpu-v5e:8x16", 128, Route(3.0, 15)),
        # A whole cube has rings along all axes, a part of one has none.
        ("tpu-v5p:4x4x4", 64, Route(6.0, 6)),
        ("tpu-v5p:2x4x4", 32, Route(3.0, 7)),
        # Both devices of a chip share its links.
        ("tpu-7x:2x2x1", 8, Route(2.0, 2)),
    ],
)
def test_a_collective_takes_the_best_connected_box(
    target: str, devices: int, expected: Route
) -> None:
    assert links.route(find(target), devices) == expected


def test_the_cost_is_that_of_the_book_it_is_taken_from() -> None:
    """An all-gather of 34 MB over four v5e chips in a line: 680 us measured."""
    line = find("tpu-v5e:4x8")
    seconds = links.seconds(line, "all-gather", 34e6, 32)
    assert seconds is not None
    four = links.seconds(find("tpu-v5e:2x2"), "all-gather", 34e6, 2)
    assert four is not None
    # Half of it over one link of 50 GB/s, at the efficiency that was measured.
    assert four == pytest.approx(5e-6 + 17e6 / (5e10 * 0.82))
    small = links.seconds(line, "all-reduce", 1024, 8)
    assert small == pytest.approx(5e-6 + 2 * 4e-6)


def test_what_is_unknown_has_no_cost() -> None:
    assert links.seconds(find("nvidia-l4"), "all-reduce", 1e6, 2) is None
    assert links.seconds(find("nvidia-l4"), "all-reduce", 1e6, 1) == 0.0


def test_a_device_is_its_part_of_a_chip() -> None:
    whole = find("tpu-7x:2x2x1")
    assert links.devices_of(whole) == 8
    one = links.per_device(whole)
    assert one.chips == 1
    assert one.memory_bytes is not None
    assert whole.memory_bytes == 2 * one.memory_bytes
    assert links.per_device(find("tpu-v5e:2x2")).peak_ops == find("tpu-v5e:2x2").peak_ops
