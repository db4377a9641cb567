"""Running a graph on representative inputs and showing tensors to observers, in bounded memory.

ONNX Runtime runs the graph with the observed tensors as its outputs. Three things bound memory:
feeds are cut into batches whose observed tensors fit a budget; where one sample exceeds it, tensors
are taken in groups (one run of the graph for each group and batch); and observers keep statistics
only.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trivium.compiler.errors import BackendFailed, BadInput
from trivium.compiler.onnx_api import one_line
from trivium.passes.quantization.observers import Observer

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.backend import Tensors

BATCH = 32
"""Most samples run at a time, where the model's batch is free."""

BUDGET = 16 << 20
"""Bytes of observed tensors that one run may return."""


@dataclass(frozen=True)
class Calibrated:
    """What a calibration saw.

    Attributes:
        observers: By value; those whose ``seen`` is 0 were never computed.
        samples: How many samples there were.
        spoiled: Values that held NaN or infinity on some sample.
    """

    observers: Mapping[ir.Value, Observer]
    samples: int
    spoiled: frozenset[ir.Value]


def calibrate(
    model: ir.Model,
    values: Sequence[ir.Value],
    feeds: Iterable[Tensors],
    make: Callable[[ir.Value], Observer],
    *,
    budget: int = BUDGET,
) -> Calibrated:
    """Show every batch of ``values`` to an observer of its own.

    Args:
        model: In normal form; unchanged afterwards.
        values: Float tensors of the main graph.
        feeds: Iterated once for each group of values.
        make: Makes the observer of a value.
        budget: Bytes of observed tensors that one run may return.

    Raises:
        BadInput: No feeds.
        BackendFailed: ONNX Runtime cannot run the model.
    """
    observers = {value: make(value) for value in values}
    spoiled: set[ir.Value] = set()
    given = [value for value in values if _is_fed(value)]
    computed = [value for value in values if not _is_fed(value)]
    free = _free_batch(model)
    first = next(iter(_batches(feeds, free, 1)), None)
    if first is None:
        raise BadInput(
            "the calibration data is empty", about="quantize", remedy="give at least one sample"
        )
    sizes = _sizes(model, computed, first[0])
    size = min(BATCH, max(1, budget // max(1, sum(sizes.values()))))
    samples = 0
    for batch, count in _batches(feeds, free, size):
        samples += count
        for value in given:
            _show(observers[value], np.asarray(batch[value.name or ""]), value, spoiled)
    with tempfile.TemporaryDirectory(prefix="trivium-calibrate-") as folder:
        for group in _groups(sizes, budget):
            run = _runner(model, group, Path(folder))
            for batch, _ in _batches(feeds, free, size):
                for value, array in zip(group, run(batch), strict=True):
                    _show(observers[value], array, value, spoiled)
    return Calibrated(observers, samples, frozenset(spoiled))


def _is_fed(value: ir.Value) -> bool:
    return value.is_graph_input() and not value.is_initializer()


def _show(
    observer: Observer, array: np.ndarray[Any, Any], value: ir.Value, spoiled: set[ir.Value]
) -> None:
    if array.size == 0:
        return
    array = array.astype(np.float32, copy=False)
    # The sum of finite values is finite unless it overflows; only then look at each of them.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(array.sum()) or np.isfinite(array).all()
    if finite:
        observer.update(array)
    else:
        spoiled.add(value)


def _free_batch(model: ir.Model) -> str | None:
    """The name of the leading dimension that all inputs share and a feed may choose, if any."""
    names = set()
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        shape = value.shape
        if shape is None or not len(shape) or isinstance(shape[0], int):
            return None
        names.add(shape[0].value)
    return names.pop() if len(names) == 1 else None


def _batches(
    feeds: Iterable[Tensors], free: str | None, limit: int
) -> Iterator[tuple[Tensors, int]]:
    """Feeds cut along a free batch dimension, each with its number of samples."""
    for feed in feeds:
        sizes = {np.shape(array)[0] for array in feed.values() if np.ndim(array)}
        if free is None or len(sizes) != 1 or any(not np.ndim(a) for a in feed.values()):
            yield feed, 1
            continue
        size = sizes.pop()
        for start in range(0, size, limit):
            end = min(start + limit, size)
            yield {name: array[start:end] for name, array in feed.items()}, end - start


def _sizes(model: ir.Model, values: Sequence[ir.Value], sample: Tensors) -> dict[ir.Value, int]:
    """Bytes of float tensors for one sample; a dimension that nothing names counts as one."""
    named: dict[str, int] = {}
    for value in model.graph.inputs:
        array = sample.get(value.name or "")
        if array is not None and value.shape is not None:
            for dim, size in zip(value.shape, np.shape(array), strict=False):
                if not isinstance(dim, int):
                    named[str(dim.value)] = size
    sizes = {}
    for value in values:
        shape = value.shape if value.shape is not None else ()
        known = [dim if isinstance(dim, int) else named.get(str(dim.value), 1) for dim in shape]
        sizes[value] = 4 * math.prod(known)
    return sizes


def _groups(sizes: Mapping[ir.Value, int], budget: int) -> Iterator[list[ir.Value]]:
    """Values in graph order, in groups that fit the budget."""
    group: list[ir.Value] = []
    total = 0
    for value, nbytes in sizes.items():
        if group and total + nbytes > budget:
            yield group
            group, total = [], 0
        group.append(value)
        total += nbytes
    if group:
        yield group


def _runner(
    model: ir.Model, values: Sequence[ir.Value], folder: Path
) -> Callable[[Tensors], list[np.ndarray[Any, Any]]]:
    import onnxruntime as ort

    from trivium.compiler.model import save

    path = folder / "observed.onnx"
    observed = _observing(model, values)
    # External data is mapped by ONNX Runtime: weights are neither parsed nor copied.
    save(observed, path, external=True)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    names = [value.name or "" for value in values]
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        raise _cannot_run(error) from error

    def run(feed: Tensors) -> list[np.ndarray[Any, Any]]:
        try:
            return list(session.run(names, dict(feed)))
        except Exception as error:  # as above
            raise _cannot_run(error) from error

    return run


def _cannot_run(error: Exception) -> BackendFailed:
    return BackendFailed(
        f"ONNX Runtime cannot run the model to calibrate it: {one_line(error)}",
        about="quantize-static",
        remedy="use a recipe without calibration, e.g. int8-weights",
    )


def _observing(model: ir.Model, values: Sequence[ir.Value]) -> ir.Model:
    """A copy (weights shared) whose only outputs are ``values``, in a form that the engine runs."""
    import onnx_ir as ir

    from trivium.passes.widen_attention_mask import WidenAttentionMask

    copy = model.clone()
    found = ir.convenience.create_value_mapping(copy.graph)
    copy.graph.outputs[:] = [found[value.name or ""] for value in values]
    WidenAttentionMask()(copy)
    return copy
