"""What share of an activation's outliers its weights should take (SmoothQuant), by expected error.

A product ``x W`` whose two sides are rounded to 8 bits loses, for each row, the error of a uniform
grid on either side: ``t^2 / 12`` for each channel of x, seen through its weights, and ``u^2 / 12``
for each weight of a column, seen through the power of its channel. Both follow from a few numbers a
channel, so that every share is tried without running the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

SHARES, _FINER = tuple(tenth / 10 for tenth in range(11)), (-0.05, 0.05)
"""The shares that are tried, and what is tried around the best of them."""

_CODES, _WEIGHT_CODES = 255, 127

_COLUMNS = 256
"""How many columns of a weight stand for all of them."""


@dataclass(frozen=True)
class Inputs:
    """What an activation is like, for each channel.

    Attributes:
        low, high: Least and largest value.
        power: Mean square.
    """

    low: Array
    high: Array
    power: Array

    @property
    def largest(self) -> Array:
        return np.maximum(-self.low, self.high)


def factor(inputs: Array, weights: Array, share: float) -> Array:
    """``max|x| ** share / max|w| ** (1 - share)``, and 1 where a channel is zero on either side."""
    alive = (inputs > 0) & (weights > 0)
    x, w = np.where(alive, inputs, 1.0), np.where(alive, weights, 1.0)
    return np.where(alive, x**share / w ** (1 - share), 1.0)


class Expected:
    """The squared error of a row of products, summed, for any factor that divides their inputs.

    Args:
        inputs: What the products read.
        weights: [K, N] each.
    """

    def __init__(self, inputs: Inputs, weights: Sequence[Array]) -> None:
        self.inputs = inputs
        self.largest = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
        self._norms = sum(np.einsum("kn,kn->k", weight, weight) for weight in weights)
        columns = np.concatenate([weight.T for weight in weights])
        self._count = len(columns)
        self._some = np.abs(columns[:: -(-len(columns) // _COLUMNS)])

    def error(self, scale: Array | float) -> float:
        """The error for a factor: [K], or 1."""
        inputs = self.inputs
        scale = np.broadcast_to(np.asarray(scale, np.float64), inputs.low.shape)
        low, high = (inputs.low / scale).min(), (inputs.high / scale).max()
        step = float(max(high, 0.0) - min(low, 0.0)) / _CODES
        power = float((inputs.power / np.square(scale)).sum())
        steps = (self._some * scale.astype(np.float32)).max(axis=1) / _WEIGHT_CODES
        spread = float(np.square(steps, dtype=np.float64).mean()) * self._count
        seen = float(np.square(scale) @ self._norms)
        return float(step**2 * seen + power * spread) / 12

    def factor(self, share: float) -> Array:
        return factor(self.inputs.largest, self.largest, share)

    def best(self) -> float:
        """The share with the least error."""
        errors = {share: self.error(self.factor(share)) for share in SHARES}
        least = min(errors, key=errors.__getitem__)
        around = [share for share in (least + step for step in _FINER) if 0 <= share <= 1]
        errors |= {share: self.error(self.factor(share)) for share in around}
        return min(errors, key=errors.__getitem__)
