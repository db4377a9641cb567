"""Give every value and node a name of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import Pass, unread
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class UniqueNames(Pass):
    """Name what is unnamed, rename what clashes, over all graphs; inputs and outputs keep theirs.

    Names that were unique stay, so that a message or a calibration table still finds its value. An
    optional output without a name is an absent one and stays so.
    """

    name: ClassVar[str] = "unique-names"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        modified = False
        taken: set[str] = set()
        seen: set[ir.Value] = set()
        for value in _values(model):
            if value in seen:
                continue
            seen.add(value)
            if not value.name and unread(value):
                continue
            producer = value.producer()
            stem = value.name or (producer.op_type.lower() if producer else "value")
            modified |= _name(value, stem, taken)
        taken = set()
        for node in model.graph.all_nodes():
            made = next((value.name for value in node.outputs if value.name), "")
            modified |= _name(node, node.name or f"{node.op_type}_{made}", taken)
        return modified


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value, those whose names are the caller's first."""
    yield from model.graph.inputs
    yield from model.graph.outputs
    for graph in model.graphs():
        yield from graph.inputs
        yield from list(graph.initializers.values())
        for node in graph:
            yield from node.outputs


def _name(item: ir.Value | ir.Node, stem: str, taken: set[str]) -> bool:
    unique, index = stem, 1
    while unique in taken:
        unique, index = f"{stem}_{index}", index + 1
    taken.add(unique)
    if item.name == unique:
        return False
    item.name = unique
    return True
