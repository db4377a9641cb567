"""Fitting a formula's coefficients to measurements, and judging it on what the fit did not see.

A `Formula` predicts a table of measurements on one device; `own` fits it to one table, `family`
averages what several devices say (in logs, so that no device with many rows outweighs another),
`few` corrects a family's coefficients with at most thirty points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from trivium.compiler.calibration import FITTED_AT_MOST, POINTS_AT_MOST, spread_of
from trivium.compiler.types import Target

Array = np.ndarray[Any, Any]

ONE_DEVICE_SPREAD = 0.5
"""Of a family of which one device was measured: nothing says how far the next one is."""

Coefficients = Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """Measurements of one kind on one device.

    Attributes:
        kind: ``product``, ``attention``, ``memory``, ...
        family: The generation, which is left out as a whole in turn.
        columns: Whatever the formula reads, one array each.
        source: Which published table.
    """

    kind: str
    target: Target
    family: str
    columns: Mapping[str, Array]
    seconds: Array
    source: str

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, index: Array) -> Table:
        columns = {name: column[index] for name, column in self.columns.items()}
        source = self.source
        return Table(self.kind, self.target, self.family, columns, self.seconds[index], source)

    def halves(self, train: int, test: int, seed: int = 0) -> tuple[Table, Table]:
        """Rows to fit on and other rows to score on, drawn at random."""
        order = np.random.default_rng(seed).permutation(len(self))
        cut = min(train, len(self) // 2)
        return self.take(order[:cut]), self.take(order[cut : cut + test])


@dataclass(frozen=True)
class Formula:
    """A prediction with coefficients.

    Attributes:
        predict: Seconds of every row of a table.
        start: Where a fit begins; the shape of the formula, not its result.
        bounds: Least and most of each coefficient.
        device: The at most six that a calibration of one device may change.
    """

    predict: Callable[[Table, Coefficients], Array]
    start: Coefficients
    bounds: Mapping[str, tuple[float, float]]
    device: Sequence[str]

    def __post_init__(self) -> None:
        assert len(self.device) <= FITTED_AT_MOST


def residuals(formula: Formula, table: Table, coefficients: Coefficients) -> Array:
    """log(measured / predicted)."""
    return np.asarray(np.log(table.seconds / formula.predict(table, coefficients)))


def fit(
    formula: Formula,
    tables: Sequence[Table],
    prior: Coefficients,
    free: Sequence[str],
    pull: float,
) -> dict[str, float]:
    """Least robust squares of log errors; ``pull`` is how hard the prior holds each coefficient."""
    names = [name for name in free if name in prior]
    low = np.log([formula.bounds[name][0] for name in names])
    high = np.log([formula.bounds[name][1] for name in names])
    base = np.clip(np.log([prior[name] for name in names]), low + 1e-6, high - 1e-6)

    def made(logs: Array) -> dict[str, float]:
        return {**prior, **dict(zip(names, np.exp(logs).tolist(), strict=True))}

    def errors(logs: Array) -> Array:
        coefficients = made(logs)
        each = [residuals(formula, t, coefficients) / np.sqrt(len(t)) for t in tables]
        return np.concatenate([*each, pull * (logs - base)])

    found = least_squares(
        errors,
        base,
        bounds=(low, high),
        loss="soft_l1",
        f_scale=0.3 / np.sqrt(max(sum(map(len, tables)), 1)),
        diff_step=1e-2,
        max_nfev=40,
    )
    return made(found.x)


def own(formula: Formula, table: Table, prior: Coefficients | None = None) -> dict[str, float]:
    """All coefficients, from one device."""
    start = prior or formula.start
    return fit(formula, [table], start, list(start), pull=0.02)


def family(each: Sequence[Coefficients]) -> dict[str, float]:
    """The geometric mean of what several devices say."""
    return {
        name: float(np.exp(np.mean([np.log(one[name]) for one in each if name in one])))
        for name in {name: None for one in each for name in one}
    }


FEW_PULL = 0.05
"""Of the prior on thirty points."""


def points(formula: Formula, table: Table, prior: Coefficients, seed: int = 0) -> Table:
    """Thirty rows, from the shortest to the longest by the prior: one, drawn at random, of each
    thirtieth. A calibration chooses what it measures, and spreads it like this."""
    order = np.argsort(formula.predict(table, prior), kind="stable")
    parts = [part for part in np.array_split(order, POINTS_AT_MOST) if len(part)]
    random = np.random.default_rng(seed)
    return table.take(np.array([random.choice(part) for part in parts]))


def few(formula: Formula, table: Table, prior: Coefficients, seed: int = 0) -> dict[str, float]:
    """A family's coefficients, corrected by thirty points of the device."""
    chosen = points(formula, table, prior, seed)
    return fit(formula, [chosen], prior, formula.device, pull=FEW_PULL)


def spread_between(
    formula: Formula, tables: Sequence[Table], fits: Sequence[Coefficients]
) -> float:
    """How far one device's coefficients miss another's measurements."""
    if len(tables) < 2:
        return ONE_DEVICE_SPREAD
    errors: list[float] = []
    for index, table in enumerate(tables):
        others = [one for at, one in enumerate(fits) if at != index]
        errors += residuals(formula, table, family(others)).tolist()
    return spread_of(errors)


def spread_of_few(formula: Formula, table: Table, prior: Coefficients, seed: int = 0) -> float:
    """What thirty points say of themselves: each third by a fit to the other two."""
    chosen = points(formula, table, prior, seed)
    index = np.arange(len(chosen))
    errors: list[float] = []
    for third in range(3):
        out = index % 3 == third
        c = fit(formula, [chosen.take(index[~out])], prior, formula.device, pull=FEW_PULL)
        errors += residuals(formula, chosen.take(index[out]), c).tolist()
    return spread_of(errors)
