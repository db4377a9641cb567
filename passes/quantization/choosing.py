"""Which of several ways to choose ranges keeps a model's outputs best, on the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import declining
from trivium.compiler.reference import run_model
from trivium.passes.quantization.walk import batches, free_batch, trim

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

Array = np.ndarray[Any, np.dtype[Any]]
Span = tuple[float, float]

SAMPLES, BATCH = 32, 2
"""How many the outputs are compared on, and how many run at a time."""


def least_error(
    model: ir.Model,
    feeds: Iterable[Tensors],
    ways: Sequence[Callable[[ir.Model], None]],
) -> int:
    """Which way's outputs are nearest to the model's own; the first where none can be told.

    Args:
        model: Left as it is.
        feeds: Representative inputs; the first are taken.
        ways: Each changes a copy of the model in place.
    """
    free = free_batch(model)
    size = BATCH if free else 1
    some = [batch for batch, _ in islice(batches(feeds, free, size), SAMPLES // size)]
    if not some:
        return 0
    wanted = _outputs(model, some)
    errors = []
    for change in ways:
        copy = model.clone()
        with declining():
            change(copy)
        errors.append(_error(wanted, _outputs(copy, some)))
    return int(np.argmin(np.nan_to_num(errors, nan=np.inf)))


def _outputs(model: ir.Model, feeds: list[Tensors]) -> tuple[Mapping[str, Any], ...]:
    found = run_model(model, feeds, frugal=True, fused=True).outputs
    trim()
    return found


def _error(wanted: Iterable[Mapping[str, Any]], found: Iterable[Mapping[str, Any]]) -> float:
    """Squared error of the float outputs, each in units of its power."""
    powers: dict[str, float] = {}
    errors: dict[str, float] = {}
    for want, have in zip(wanted, found, strict=True):
        for name, array in want.items():
            if array.dtype.kind != "f":
                continue
            exact = array.astype(np.float64)
            powers[name] = powers.get(name, 0.0) + float(np.square(exact).sum())
            off = np.square(exact - have[name].astype(np.float64)).sum()
            errors[name] = errors.get(name, 0.0) + float(off)
    return sum(errors[name] / max(powers[name], 1e-30) for name in errors)
