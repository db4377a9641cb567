"""What each value of a decoder is about: single tokens, or the sequence as a whole.

`trivium.passes.analyse_sequence` finds it out; passes that change how a decoder is fed rest on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import onnx_ir as ir


class Kind(Enum):
    """What a value is about; see the module's docstring."""

    STATIC = "static"
    LENGTH = "length"
    TOTAL = "total"
    TOKEN = "token"


class NotUnderstood(Exception):
    """Nothing certain can be said about a node.

    Args:
        node: The node.
        reason: What it does or may do, as a clause.
    """

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


@dataclass
class Sequence:
    """The result of the analysis.

    Attributes:
        symbol: The symbolic dimension that is the sequence.
        kinds: Of every value that is not static.
        attentions: The nodes that need a cache, in order.
        total_inputs: Graph inputs that span the whole sequence (attention masks).
        sources: The token inputs that a value is made of.
        whole: Total values whose entries for earlier tokens may change when later ones come.
    """

    symbol: str
    kinds: dict[ir.Value, Kind] = field(default_factory=dict)
    attentions: list[ir.Node] = field(default_factory=list)
    total_inputs: set[ir.Value] = field(default_factory=set)
    sources: dict[ir.Value, frozenset[ir.Value]] = field(default_factory=dict)
    whole: set[ir.Value] = field(default_factory=set)

    def kind(self, value: ir.Value | None) -> Kind:
        return self.kinds.get(value, Kind.STATIC) if value is not None else Kind.STATIC

    def axes(self, value: ir.Value | None) -> list[int]:
        """The axes of a value that are the sequence; of those whose shape is unknown, none."""
        if value is None or value.shape is None:
            return []
        return [
            i
            for i, d in enumerate(value.shape)
            if not isinstance(d, int) and d.value == self.symbol
        ]

    def dtype(self, value: ir.Value | None) -> ir.DataType:
        """The dtype of a value; of one that inference left open, float32."""
        return value.dtype if value is not None and value.dtype is not None else ir.DataType.FLOAT

    def axis(self, value: ir.Value | None) -> int | None:
        """The one axis of a value that holds the sequence, or None if there is none or more.

        It may be flattened: of batch * seq entries.
        """
        if value is None or value.shape is None:
            return None
        found = [
            i
            for i, d in enumerate(value.shape)
            if not isinstance(d, int) and d.value is not None and self.symbol in d.value.split("*")
        ]
        return found[0] if len(found) == 1 else None


def rank(value: ir.Value | None) -> int:
    """The number of axes of a value; 0 if that is not known."""
    return len(value.shape) if value is not None and value.shape is not None else 0
