"""Axes as rows of elements, ties between them, and what is pinned in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import dims

Array = np.ndarray[Any, np.dtype[Any]]

Kept = Callable[[ir.Value, int], Array]
"""Which places along an axis of a value stay: booleans as many as there were."""

Fix = Callable[[Kept], None]
"""Makes a node agree with axes that became shorter: a group count, a target shape, a split."""


@dataclass
class Elements:
    """The elements of a graph, filled by the rules.

    Attributes:
        fixes: What nodes need changed once units are gone.
        products: Where a unit is summed away: a node, the operand and the axis of it.
        makers: Weights, and the axis along which a product makes its results of them.
        heads: Values and axes along which attention has its heads.
    """

    fixes: list[Fix] = field(default_factory=list)
    products: list[tuple[ir.Node, int, int]] = field(default_factory=list)
    makers: list[tuple[ir.Value, int]] = field(default_factory=list)
    heads: list[tuple[ir.Value, int]] = field(default_factory=list)
    size: int = 0
    _first: dict[tuple[ir.Value, int], tuple[int, int]] = field(default_factory=dict)
    _ties: list[tuple[Array, Array]] = field(default_factory=list)
    _pins: list[tuple[Array, str]] = field(default_factory=list)

    def of(self, value: ir.Value | None, axis: int) -> Array | None:
        """The elements along an axis; None where its length is not known (nothing is removed)."""
        shape = dims(value)
        if value is None or shape is None or not -len(shape) <= axis < len(shape):
            return None
        axis %= len(shape)
        length = shape[axis]
        if length is None:
            return None
        key = value, axis
        if key not in self._first:
            self._first[key] = self.size, length
            self.size += length
        first, length = self._first[key]
        return np.arange(first, first + length)

    def tie(self, a: Array | None, b: Array | None) -> None:
        """Elements that go together, pair by pair."""
        if a is None and b is None:
            return
        if a is None or b is None or len(a) != len(b):
            known = a if a is not None else b
            assert known is not None
            self.pin_elements(known, "it meets an axis of another or unknown length")
            return
        self._ties.append((a, b))

    def same(self, x: ir.Value | None, i: int, y: ir.Value | None, j: int) -> None:
        """Tie one axis to another, place by place."""
        self.tie(self.of(x, i), self.of(y, j))

    def pin_elements(self, elements: Array | None, reason: str) -> None:
        if elements is not None and len(elements):
            self._pins.append((elements, reason))

    def pin(self, value: ir.Value | None, reason: str, axes: Any = None) -> None:
        """Keep axes of a value (all by default) as they are."""
        shape = dims(value)
        for axis in range(len(shape or ())) if axes is None else axes:
            self.pin_elements(self.of(value, axis), reason)

    def axes(self) -> list[tuple[ir.Value, int]]:
        """Every axis that a rule has looked at."""
        return list(self._first)

    def labels(self) -> Array:
        """For each element the least element that it is tied to, through others too."""
        labels = np.arange(self.size)
        if not self._ties:
            return labels
        a = np.concatenate([pair[0] for pair in self._ties])
        b = np.concatenate([pair[1] for pair in self._ties])
        while True:
            least = np.minimum(labels[a], labels[b])
            before = labels.copy()
            np.minimum.at(labels, labels[a], least)
            np.minimum.at(labels, labels[b], least)
            while True:
                shorter = labels[labels]
                if (shorter == labels).all():
                    break
                labels = shorter
            if (labels == before).all():
                return labels

    def reasons(self, labels: Array) -> dict[int, str]:
        """Why the units that are pinned are, by label."""
        found: dict[int, str] = {}
        for elements, reason in self._pins:
            for label in np.unique(labels[elements]):
                found.setdefault(int(label), reason)
        return found
