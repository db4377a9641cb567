"""What collectives cost on the torus that links the chips of a TPU slice; for GPUs see
`trivium.compiler.machines.collectives`, which was fitted to measurements.

The slice's topology names the axes of the torus. A collective over n chips runs along the axes,
or parts of axes, that n chips make up: each adds a link in either direction, but an axis that does
not close into a ring has to carry what would go around in one direction back along itself, and
counts once. Then

    all-gather = start + max(hops x hop, bytes x (n - 1) / n / bandwidth),   all-reduce = twice

with bytes those of the whole. Source of the model: Austin et al., "How to Scale Your Model",
https://github.com/jax-ml/scaling-book/blob/04d8de58b9f64e2d6cc1df469b8a36f506a0138d/sharding.md
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from trivium.compiler.types import Target

Kind = Literal["all-reduce", "all-gather", "send"]


@dataclass(frozen=True)
class Route:
    """How the chips of a collective are connected.

    Attributes:
        links: Links of one chip that carry it, each one way.
        hops: Between the two chips that are farthest apart.
    """

    links: float
    hops: int


def devices_of(target: Target) -> int:
    """How many devices a program sees: a chip may be several."""
    return target.chips * int(target.options.get("devices_per_chip", "1"))


def seconds(target: Target, kind: Kind, size: float, devices: int) -> float | None:
    """Time of one collective; ``None`` where the target's links are not known.

    Args:
        size: Bytes of the result on one device.
        devices: How many take part.
    """
    if devices == 1 or not size:
        return 0.0
    figures = target.interconnect
    if target.link_bytes_per_s is None or not figures:
        return None
    found = route(target, devices)
    one_link = target.link_bytes_per_s / figures["links"] * figures["efficiency"]
    rate = one_link * found.links
    start, hop = figures["start_s"], figures["hop_s"]
    if kind == "send":
        return start + hop + size / one_link
    gather = max(found.hops * hop, size * (devices - 1) / devices / rate)
    return start + gather * (2.0 if kind == "all-reduce" else 1.0)


def route(target: Target, devices: int) -> Route:
    """The best connected set of so many devices: of most links, then of fewest hops."""
    figures = target.interconnect
    axes = tuple(int(size) for size in (target.topology or "1").split("x"))
    # Devices that share a chip need no link; what leaves the chip is over its links.
    chips = max(1, devices // int(target.options.get("devices_per_chip", "1")))
    return _route(axes, chips, int(figures["rings_of"]))


@cache
def _route(axes: tuple[int, ...], chips: int, rings_of: int) -> Route:
    # A 3-D torus closes only where whole cubes are joined, a 2-D one axis by axis.
    closed = [size % rings_of == 0 for size in axes]
    if len(axes) == 3:
        closed = [all(closed)] * 3
    routes = []
    for parts in _factors(axes, chips):
        ring = [c and part == size for part, size, c in zip(parts, axes, closed, strict=True)]
        used = [(part, r) for part, r in zip(parts, ring, strict=True) if part > 1]
        links = sum(2.0 if r else 1.0 for _, r in used)
        hops = sum(part // 2 if r else part - 1 for part, r in used)
        routes.append(Route(links or 1.0, max(hops, 1)))
    # A number that no box of chips has goes along one line through as many as it takes.
    return max(routes, key=lambda r: (r.links, -r.hops), default=Route(1.0, max(chips - 1, 1)))


def _factors(axes: tuple[int, ...], chips: int) -> Iterator[tuple[int, ...]]:
    """All boxes of so many chips whose sides divide the axes."""
    if not axes:
        if chips == 1:
            yield ()
        return
    for part in range(1, axes[0] + 1):
        if axes[0] % part == 0 and chips % part == 0:
            for rest in _factors(axes[1:], chips // part):
                yield (part, *rest)


def per_device(target: Target) -> Target:
    """The target as one of its devices: rates and memory of a chip, or of its part of a chip."""
    parts = int(target.options.get("devices_per_chip", "1"))

    def part(figure: float | None) -> float | None:
        return None if figure is None else figure / parts

    return dataclasses.replace(
        target,
        peak_ops={dtype: rate / parts for dtype, rate in target.peak_ops.items()},
        memory_bytes=part(target.memory_bytes),
        memory_bytes_per_s=part(target.memory_bytes_per_s),
        on_chip_bytes=part(target.on_chip_bytes),
        watts=part(target.watts),
        idle_watts=part(target.idle_watts),
        usd_per_hour=part(target.usd_per_hour),
        chips=1,
    )
