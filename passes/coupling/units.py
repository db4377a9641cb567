"""From a graph to its units: what can be removed, in groups of its like, and what cannot."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import dims, is_constant, is_op
from trivium.passes.coupling import layout as layout  # fills the table of rules
from trivium.passes.coupling.elements import Elements
from trivium.passes.coupling.rules import RULES, pin_all

Array = np.ndarray[Any, np.dtype[Any]]
Axis = tuple[ir.Value, int]

KINDS = ("channels", "heads", "neurons", "streams")


@dataclass(frozen=True)
class Group:
    """Units that are alike: each has a part of the same axes.

    Attributes:
        kind: ``heads``; ``streams``, to which a residual layer is added; ``channels``, which a
            convolution makes or reads; ``neurons``.
        labels: Of the units, in order of place.
        axes: All axes that they are on, and for each the label of every place.
        weights: Those of the axes that belong to stored weights.
    """

    kind: str
    labels: Array
    axes: tuple[Axis, ...]
    weights: tuple[Axis, ...]

    @property
    def name(self) -> str:
        """What to call it: the first weight."""
        return self.weights[0][0].name or "?"


@dataclass(frozen=True)
class Units:
    """The units of a graph.

    Attributes:
        elements: What the rules found.
        labels: The unit of each element.
        groups: What can be removed.
        pinned: The first stored weights of what cannot, with the reason.
    """

    elements: Elements
    labels: Array
    groups: tuple[Group, ...]
    pinned: dict[ir.Value, str]

    def places(self, value: ir.Value, axis: int) -> Array:
        """The unit of each place along an axis."""
        elements = self.elements.of(value, axis)
        assert elements is not None
        return np.asarray(self.labels[elements])


def find(graph: ir.Graph) -> Units:
    """Analyse a graph; nothing is changed."""
    e = Elements()
    for node in graph:
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None or any(attr.type.name == "GRAPH" for attr in node.attributes.values()):
            pin_all(node, e)
        else:
            rule(node, e)
    for value in graph.inputs:
        if not value.is_initializer():
            e.pin(value, f"{value.name} is an input of the model")
    for value in graph.outputs:
        e.pin(value, f"{value.name} is an output of the model")
    for value, axis in e.axes():
        elements = e.of(value, axis)
        assert elements is not None
        if len(elements) == 1:
            e.pin_elements(elements, "it is the only one")
        if value.is_initializer() and (value.is_graph_input() or not is_constant(value)):
            e.pin_elements(elements, f"{value.name} may be replaced by the caller")
        if any(node.graph is not graph for node, _ in value.uses()):
            e.pin_elements(elements, f"{value.name} is read inside a body")
    labels = e.labels()
    reasons = e.reasons(labels)
    return Units(e, labels, *_groups(e, labels, reasons))


def _groups(
    e: Elements, labels: Array, reasons: dict[int, str]
) -> tuple[tuple[Group, ...], dict[ir.Value, str]]:
    members: dict[int, dict[Axis, None]] = defaultdict(dict)
    for axis in e.axes():
        elements = e.of(*axis)
        assert elements is not None
        for unit in np.unique(labels[elements]).tolist():
            members[unit][axis] = None
    makers = {axis for axis in e.makers if is_constant(axis[0])}
    alike: dict[tuple[Axis, ...], list[int]] = defaultdict(list)
    pinned: dict[ir.Value, str] = {}
    for unit, axes in members.items():
        stored = [value for value, _ in axes if is_constant(value)]
        if unit in reasons:
            for value in stored:
                shape = dims(value) or ()
                if len(shape) > 1 and value not in pinned:
                    pinned[value] = reasons[unit]
        elif makers & set(axes):
            alike[tuple(axes)].append(unit)
    heads = set(e.heads)
    sums = {
        node
        for value, _ in e.axes()
        for node, _ in value.uses()
        if is_op(node, "Add", "Sum") and not any(is_constant(v) for v in node.inputs)
    }
    made = []
    for axes_of, units in alike.items():
        weights = tuple(axis for axis in axes_of if is_constant(axis[0]))
        convolved = any(
            node.op_type in ("Conv", "ConvTranspose")
            for value, _ in weights
            for node, _ in value.uses()
        )
        added = {node for value, _ in axes_of for node, _ in value.uses() if node in sums}
        kind = (
            "heads"
            if heads & set(axes_of)
            else "streams"
            if added
            else "channels"
            if convolved
            else "neurons"
        )
        made.append(Group(kind, np.array(sorted(units)), axes_of, weights))
    free = {value for group in made for value, _ in group.weights}
    return tuple(made), {value: why for value, why in pinned.items() if value not in free}
