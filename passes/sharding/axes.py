"""Which axes of which values have to be split together.

An axis is a value and a number. What an operator does not mix it ties: the rows of a product are
the rows of its left factor, the columns of a weight are those of the product. Axes that are tied,
directly or through others, make a *class*; a class is split as a whole or not at all. A class is
*blocked* where an operator needs all of an axis at once, as a softmax does.

This is the view of Shardy's factors and of einsum: the classes are the letters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

Axis = tuple[ir.Value, int]


@dataclass(frozen=True)
class Blocked:
    """Who needs an axis whole, and why."""

    value: ir.Value
    reason: str


class Axes:
    """The classes of a graph: disjoint sets of axes, and what is known of each.

    Attributes:
        tensor: How many devices the weights are to be split over; whether the key/value heads of
            an Attention split along with its query heads depends on it.
        whole: Values that every device has to compute for itself: left open, the compiler may
            have some devices compute each part of them and then gather it.
    """

    def __init__(self, tensor: int) -> None:
        self.tensor = tensor
        self.whole: list[ir.Value] = []
        self._parent: dict[Axis, Axis] = {}
        self._members: dict[Axis, list[Axis]] = {}
        self._blocked: dict[Axis, Blocked] = {}
        self._counts: dict[Axis, dict[tuple[str, int], None]] = {}
        self._reduced: dict[Axis, list[ir.Value]] = {}

    def root(self, axis: Axis) -> Axis:
        """The axis that stands for a class."""
        if axis not in self._parent:
            self._parent[axis] = axis
            self._members[axis] = [axis]
        while self._parent[axis] != axis:
            self._parent[axis] = self._parent[self._parent[axis]]
            axis = self._parent[axis]
        return axis

    def tie(self, *axes: Axis) -> None:
        """Say that axes are split together or not at all."""
        first = self.root(axes[0])
        for axis in axes[1:]:
            other = self.root(axis)
            if other == first:
                continue
            self._parent[other] = first
            self._members[first] += self._members.pop(other)
            if other in self._blocked:
                self._blocked.setdefault(first, self._blocked.pop(other))
            self._counts.setdefault(first, {}).update(self._counts.pop(other, {}))
            self._reduced.setdefault(first, []).extend(self._reduced.pop(other, []))

    def block(self, axis: Axis, reason: str) -> None:
        """Say that an axis is needed whole."""
        if size(axis) != 1:
            self._blocked.setdefault(self.root(axis), Blocked(axis[0], reason))

    def reduce(self, axis: Axis, result: ir.Value) -> None:
        """Say that ``result`` is a sum over an axis: split, it becomes an all-reduce."""
        self._reduced.setdefault(self.root(axis), []).append(result)

    def count(self, axis: Axis, label: str, number: int) -> None:
        """Say that an axis is made of so many things that must not be cut in two."""
        self._counts.setdefault(self.root(axis), {})[label, number] = None

    def members(self, axis: Axis) -> list[Axis]:
        """All axes of a class."""
        return self._members[self.root(axis)]

    def blocked(self, axis: Axis) -> Blocked | None:
        """Who needs a class whole, or None."""
        return self._blocked.get(self.root(axis))

    def results(self, axis: Axis) -> list[ir.Value]:
        """The sums over a class."""
        return self._reduced.get(self.root(axis), [])

    def counts(self, axis: Axis) -> Iterator[tuple[str, int]]:
        """What has to divide for a class to be split: (what it is, how many)."""
        yield from self._counts.get(self.root(axis), {})
        for value, number in self.members(axis):
            length = size((value, number))
            if length is not None:
                yield f"entries along axis {number} of {value.name}", length


def rank(value: ir.Value) -> int:
    """The number of axes of a value whose shape is known."""
    assert value.shape is not None
    return len(value.shape)


def size(axis: Axis) -> int | None:
    """The length of an axis, or None while it is symbolic."""
    value, number = axis
    assert value.shape is not None
    length = value.shape[number]
    return length if isinstance(length, int) else None


def values_of(node: ir.Node) -> Iterable[ir.Value]:
    """What a node reads and makes, absent operands left out."""
    return [value for value in (*node.inputs, *node.outputs) if value is not None]
