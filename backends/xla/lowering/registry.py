"""The one table from (domain, operator, since_version) to the function that lowers it.

A handler takes an `Op` (attributes, promised shapes, subgraphs) and the node's inputs, ``None`` for
an absent one, and returns one value, or a tuple or list of them for several outputs. It serves
every opset from its ``since`` on, until a newer handler of the same operator takes over.

A value is a ``numpy.ndarray`` when it is known while tracing, a jax array when it is not, a
Python list when it is a sequence, and ``None`` when it is an absent optional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

Value = Any
Handler = Callable[..., Any]

GROUPS = (
    "attention", "casting", "control_flow", "convolution", "elementwise", "image", "indexing",
    "linear", "microsoft", "microsoft_attention", "microsoft_fused", "microsoft_quantized",
    "normalization", "pooling", "quantization", "random", "recurrent", "reduction", "resize",
    "selection", "sequence", "shape", "signal", "traditional", "training", "trees",
)  # fmt: skip
"""The modules of `trivium.backends.xla.lowering.ops`, one for each group of operators."""


@dataclass(frozen=True)
class Entry:
    """One handler and what is known of it without running it.

    Attributes:
        constants: Input slots whose values the handler wants known while tracing.
        group: The module that holds it.
    """

    domain: str
    op_type: str
    since: int
    lower: Handler
    constants: tuple[int, ...]
    group: str


_table: dict[tuple[str, str, int], Entry] = {}


def handles(
    *op_types: str, since: int = 1, domain: str = "", constants: Iterable[int] = ()
) -> Callable[[Handler], Handler]:
    """Register a handler for operators from opset ``since`` on.

    Args:
        constants: Input slots that must be, or are better, known while tracing: shapes, axes.
    """

    def register(function: Handler) -> Handler:
        for op_type in op_types:
            key = (domain, op_type, since)
            if key in _table:
                raise ValueError(f"two handlers for {key}: {_table[key].lower} and {function}")
            group = function.__module__.rpartition(".")[2]
            _table[key] = Entry(domain, op_type, since, function, tuple(constants), group)
        return function

    return register


@cache
def table() -> dict[tuple[str, str], tuple[Entry, ...]]:
    """All handlers by (domain, operator), oldest first."""
    for group in GROUPS:
        import_module(f"trivium.backends.xla.lowering.ops.{group}")
    found: dict[tuple[str, str], tuple[Entry, ...]] = {}
    for key in sorted(_table):
        found[key[:2]] = (*found.get(key[:2], ()), _table[key])
    return found


def find(domain: str, op_type: str, opset: int) -> Entry | None:
    """Return the newest handler that the opset has, or None."""
    entries = table().get(("" if domain == "ai.onnx" else domain, op_type), ())
    return next((entry for entry in reversed(entries) if entry.since <= opset), None)
