"""How long GPUs take to exchange what they computed, over NVLink or PCI Express.

They choose between two protocols, one that starts quickly and one that moves quickly, each

    base + hop x steps + bytes over the busiest link / (link rate x efficiency)

along a ring. Cards on PCI Express share their root complexes, so the rate left to each falls with
their number. What a TPU's torus costs is in `trivium.compiler.links`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trivium.compiler.calibration import Calibration, interval
from trivium.compiler.errors import BadInput
from trivium.compiler.types import Target

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
Fabric = Literal["nvlink", "pcie"]

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
