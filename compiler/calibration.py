"""Coefficients of a cost model, how well they are known, and what they rest on.

A file holds one table for each thing that is calibrated (``product``, ``attention``, ``memory``,
``collective``, ``engine.onnxruntime``, ...):

    [product]
    basis = "600 GEMMs in bfloat16, aiconfigurator 095f58a"
    date = "2026-11-23"
    points = 600
    spread = 0.09
    [product.coefficients]
    sustained = 0.97

``spread`` is the standard deviation of log(measured / predicted) over points that the fit did not
see. `trivium.targets.calibrations` has those that ship, `folder` those of the user.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trivium.compiler.errors import BadInput

Scope = Literal["device", "family"]

Z80 = 1.2815515655446004
"""Standard deviations from the median to either end of an 80% interval."""

FITTED_AT_MOST = 6
"""Coefficients that a calibration of one device may change; the others are its family's."""

POINTS_AT_MOST = 30
"""Measurements that a calibration of a device asks for."""

KEYS = {"basis", "date", "points", "spread", "coefficients"}


@dataclass(frozen=True)
class Calibration:
    """The coefficients of one formula.

    Attributes:
        coefficients: By the names that the formula gives them.
        spread: Standard deviation of log(measured / predicted) on points it was not fitted on.
        basis: What it was fitted on, in words; shown with every prediction.
        date: Of the fit, ISO 8601.
        points: How many measurements it was fitted on.
        scope: Whether they were taken on the device itself or on others of its family.
    """

    coefficients: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.0
    basis: str = ""
    date: str = ""
    points: int = 0
    scope: Scope = "device"

    def __getitem__(self, name: str) -> float:
        return self.coefficients[name]

    def to_toml(self) -> dict[str, Any]:
        """The table of a file; figures to four digits."""
        rounded = {name: float(f"{value:.4g}") for name, value in self.coefficients.items()}
        return {
            "basis": self.basis,
            "date": self.date,
            "points": self.points,
            "spread": float(f"{self.spread:.3g}"),
            "coefficients": rounded,
        }


def from_toml(table: Mapping[str, Any], about: str, scope: Scope = "device") -> Calibration:
    """Read one table.

    Raises:
        BadInput: A key is missing or unknown, or a coefficient is no finite number.
    """
    if set(table) != KEYS:
        odd = ", ".join(sorted(set(table) ^ KEYS))
        raise BadInput(f"missing or unknown: {odd}", about=about, remedy="calibrate anew")
    coefficients = table["coefficients"]
    for name, value in coefficients.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BadInput(f"{name} = {value!r} is no finite number", about=about)
    return Calibration(
        {name: float(value) for name, value in coefficients.items()},
        float(table["spread"]),
        str(table["basis"]),
        str(table["date"]),
        int(table["points"]),
        scope,
    )


def folder() -> Path:
    """The user's calibrations: ``$TRIVIUM_CALIBRATIONS``, or ``trivium/calibrations`` under
    ``$XDG_CONFIG_HOME`` (by default ``~/.config``)."""
    given = os.environ.get("TRIVIUM_CALIBRATIONS")
    if given:
        return Path(given)
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "trivium" / "calibrations"


def interval(seconds: float, spread: float) -> tuple[float, float]:
    """The 80% interval around a prediction whose log-residuals have the given deviation."""
    factor = math.exp(Z80 * spread)
    return seconds / factor, seconds * factor


def spread_of(residuals: Sequence[float]) -> float:
    """The deviation whose 80% interval holds 80% of some log-residuals.

    Few residuals show less than there is: their quantile is read a little further out, as
    conformal prediction does.
    """
    ordered = sorted(abs(value) for value in residuals)
    rank = min(math.ceil(0.8 * (len(ordered) + 1)), len(ordered))
    return ordered[rank - 1] / Z80
