"""How long chips take to exchange what they computed: NVLink, PCI Express, a TPU's torus.

GPUs choose between two protocols, one that starts quickly and one that moves quickly, each

    base + hop x steps + bytes over the busiest link / (link rate x efficiency)

along a ring. Cards on PCI Express share their root complexes, so the rate left to each falls with
their number. A torus moves along all of its axes, both ways round each, at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trivium.compiler.calibration import Calibration, interval
from trivium.compiler.errors import BadInput
from trivium.compiler.types import Target

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
Fabric = Literal["nvlink", "pcie", "torus"]

NVLINK_AT_LEAST = 1.4e11
"""Bytes a second: NVLink has had 150 GB/s one way since its second generation; PCI Express with 16
lanes has 128 in its sixth."""


@dataclass(frozen=True)
class Exchange:
    """A predicted collective: seconds with their 80% interval, and what they rest on."""

    seconds: float
    lo: float
    hi: float
    basis: str


def fabric(target: Target) -> Fabric:
    """What connects the chips of a target."""
    if target.family == "tpu":
        return "torus"
    return "nvlink" if (target.link_bytes_per_s or 0.0) >= NVLINK_AT_LEAST else "pcie"


def table(target: Target) -> str:
    """The name of the calibration's table for a target's fabric."""
    return f"collective_{fabric(target)}"


def predict(
    operation: Collective, size: float, chips: int, target: Target, calibration: Calibration
) -> Exchange | None:
    """Predict a collective over ``chips`` neighbours; ``None`` where the link rate is unknown.

    Args:
        size: Bytes of the whole tensor: what every chip holds before an all-reduce or a
            reduce-scatter, and after an all-gather.
        calibration: `table` says which.
    """
    if chips <= 1 or size <= 0:
        return Exchange(0.0, 0.0, 0.0, calibration.basis)
    if target.link_bytes_per_s is None:
        return None
    if fabric(target) == "torus":
        seconds = _torus(operation, size, chips, target, calibration)
    else:
        seconds = _ring(operation, size, chips, target.link_bytes_per_s, calibration)
    lo, hi = interval(seconds, calibration.spread)
    return Exchange(seconds, lo, hi, calibration.basis)


def _rounds(operation: Collective) -> int:
    """An all-reduce is a reduce-scatter and an all-gather."""
    if operation not in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        raise BadInput(f"no collective named {operation!r}", about="collectives")
    return 2 if operation == "all_reduce" else 1


def _ring(
    operation: Collective, size: float, chips: int, link: float, calibration: Calibration
) -> float:
    c = calibration.coefficients
    steps = _rounds(operation) * (chips - 1)
    through = steps / chips * size
    rate = link * float((2.0 / chips) ** c.get("sharing", 0.0))
    quick = c["quick_base_s"] + c["quick_hop_s"] * steps + through / (rate * c["quick_efficiency"])
    bulk = c["bulk_base_s"] + c["quick_hop_s"] * steps + through / (rate * c["bulk_efficiency"])
    return min(quick, bulk)


def _torus(
    operation: Collective, size: float, chips: int, target: Target, calibration: Calibration
) -> float:
    c = calibration.coefficients
    assert target.link_bytes_per_s is not None
    axes = [int(length) for length in (target.topology or str(chips)).split("x")]
    used = _axes_used(axes, chips)
    links = len(used) / len(axes)
    steps = _rounds(operation) * sum(max(length // 2, 1) for length in used)
    through = _rounds(operation) * (chips - 1) / chips * size
    if operation == "all_to_all":
        # Half of everything crosses the middle of the longest axis.
        through *= max(used) / 8.0 if max(used) > 8 else 1.0
    rate = target.link_bytes_per_s * links * c["bulk_efficiency"]
    return c["quick_base_s"] + c["quick_hop_s"] * steps + through / rate


def _axes_used(axes: list[int], chips: int) -> list[int]:
    """The axes of a torus that a group of chips spans: all, the last ones, or one of its length."""
    longer = [length for length in axes if length > 1] or [1]
    for count in range(1, len(longer) + 1):
        if math.prod(longer[-count:]) == chips:
            return longer[-count:]
    return [chips]
