"""Evaluates a node whose inputs are all known, with onnx's own reference implementation.

This is what folds shape arithmetic while a model is traced. It is numpy all the way: compiling
each of the hundreds of tiny operators for XLA would take longer than compiling the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trivium.backends.xla.lowering.functions import resolved_proto

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_BYTES = 1 << 20
"""Results larger than this are left to the program, which makes them from less."""

_NEVER = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
     "Bernoulli", "Dropout", "If", "Loop", "Scan", "SequenceMap"}
)  # fmt: skip


def is_known(value: Any) -> bool:
    """Whether a value (or everything in a sequence) is known while tracing."""
    if isinstance(value, list):
        return all(is_known(item) for item in value)
    return value is None or isinstance(value, (np.ndarray, np.generic))


def fold(
    node: ir.Node, inputs: Sequence[Any], opset: int, attributes: Mapping[str, ir.Attr]
) -> tuple[Any, ...] | None:
    """Evaluate a standard operator with numpy; None if that is not possible or not wise."""
    if node.domain not in ("", "ai.onnx") or node.op_type in _NEVER:
        return None
    if not all(is_known(value) for value in inputs):
        return None
    if sum(value.nbytes for value in inputs if isinstance(value, np.ndarray)) > MAX_BYTES:
        return None
    results = _evaluate(node, inputs, opset, attributes)
    if results is None:
        return None
    results = tuple(_array(value) for value in results)
    small = all(not isinstance(v, np.ndarray) or v.nbytes <= MAX_BYTES for v in results)
    return results if small and all(is_known(value) for value in results) else None


def _array(value: Any) -> Any:
    if isinstance(value, list):
        return [_array(item) for item in value]
    return value if value is None else np.asarray(value)


def _evaluate(
    node: ir.Node, inputs: Sequence[Any], opset: int, attributes: Mapping[str, ir.Attr]
) -> tuple[Any, ...] | None:
    from onnx.reference.ops._op_list import load_op

    proto = resolved_proto(node, attributes)
    run = {"log": _silent, "opsets": {"": opset}, "new_ops": {}, "verbose": 0}
    try:
        implementation: Any = load_op("", node.op_type, opset)
        with np.errstate(all="ignore"):
            results = implementation(proto, run).run(*inputs)
    except Exception:  # the reference raises many kinds for what it does not implement
        return None
    return tuple(results)


def _silent(*_: Any) -> None:
    """A log that nobody reads."""
