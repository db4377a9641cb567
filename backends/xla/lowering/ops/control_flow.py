"""If, Loop and Scan as XLA's conditional, while and scan, or unrolled where their course is known
while tracing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jnp, lax
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op

UNROLLED = 32
"""Loops of more iterations than this stay loops, unless they carry a sequence."""


@handles("If")
def if_(op: Op, condition: Any) -> Any:
    if op.known(condition):
        return op.subgraph("then_branch" if bool(np.asarray(condition).all()) else "else_branch")()
    branches = [op.subgraph(name) for name in ("then_branch", "else_branch")]

    def arrays(branch: Any) -> tuple[Any, ...]:
        results = branch()
        if any(value is None or isinstance(value, list) for value in results):
            raise op.needs(0)
        return tuple(jnp.asarray(value) for value in results)

    return lax.cond(jnp.reshape(condition, ()), *(partial(arrays, branch) for branch in branches))


@handles("Loop")
def loop(op: Op, trips: Any, condition: Any, *carried: Any) -> Any:
    body = op.subgraph("body")
    scanned = op.outputs - len(carried)
    if trips is not None and op.known(trips) and op.known(condition):
        count = int(np.asarray(trips).reshape(()))
        if count <= UNROLLED or any(v is None or isinstance(v, list) for v in carried):
            return _unrolled_loop(op, body, count, condition, carried, scanned)
        if scanned:
            return _collecting_loop(op, body, count, carried)
    if scanned:
        return _collecting_loop(op, body, None, carried)
    limit = jnp.asarray(np.iinfo(np.int64).max) if trips is None else jnp.reshape(trips, ())
    go = jnp.asarray(True) if condition is None else jnp.reshape(condition, ())

    def step(state: Any) -> Any:
        index, _, values = state
        results = body(index, jnp.asarray(True), *values)
        kept = [_like(v, old) for v, old in zip(results[1:], values, strict=True)]
        return index + 1, jnp.reshape(jnp.asarray(results[0]), ()), tuple(kept)

    start = (jnp.zeros((), "int64"), go, tuple(jnp.asarray(value) for value in carried))
    return lax.while_loop(lambda s: (s[0] < limit) & s[1], step, start)[2]


def _like(value: Any, old: Any) -> Any:
    value = jnp.asarray(value)
    return value.astype(old.dtype) if value.dtype != old.dtype else value


def _unrolled_loop(
    op: Op, body: Any, trips: int, condition: Any, carried: Sequence[Any], scanned: int
) -> Any:
    """A loop whose count is known, iteration by iteration, so that shape arithmetic in it folds."""
    values: list[Any] = list(carried)
    rows: list[list[Any]] = [[] for _ in range(scanned)]
    go = condition is None or bool(np.asarray(condition).all())
    for index in range(trips):
        if not go:
            break
        results = body(np.asarray(index, np.int64), np.asarray(True), *values)
        if not op.known(results[0]):
            if scanned:
                return _collecting_loop(op, body, None, carried)
            raise op.refuse("ends at a time that only the program knows, after a known count")
        go = bool(np.asarray(results[0]).all())
        values = list(results[1 : 1 + len(values)])
        for row, value in zip(rows, results[1 + len(values) :], strict=True):
            row.append(value)
    return (*values, *(_stacked(op, index, row) for index, row in enumerate(rows, len(values))))


def _stacked(op: Op, index: int, rows: list[Any]) -> Any:
    if rows:
        return jnp.stack(rows)
    shape, dtype = op.shape(index), op.dtype(index)
    return jnp.zeros((0,) if shape is None else (0, *shape[1:]), dtype)


def _collecting_loop(op: Op, body: Any, trips: int | None, carried: Sequence[Any]) -> Any:
    """A loop that collects a row for each iteration: as many as are known, or as the model
    promises, which says at the same time when the loop ends.
    """
    promised = op.shape(len(carried))
    count = promised[0] if promised is not None else trips
    if count is None:
        raise op.needs(0)

    def step(state: Any, index: Any) -> Any:
        results = body(index, np.asarray(True), *state)
        goes_on = op.known(results[0]) and bool(np.asarray(results[0]).all())
        if promised is None and not goes_on:
            raise op.needs(0)
        kept = [_like(v, old) for v, old in zip(results[1:], state, strict=False)]
        return tuple(kept), tuple(jnp.asarray(v) for v in results[1 + len(state) :])

    start = tuple(jnp.asarray(value) for value in carried)
    final, rows = lax.scan(step, start, jnp.arange(count, dtype="int64"))
    return (*final, *rows)


@handles("Scan")
def scan_batched(op: Op, lengths: Any, *inputs: Any) -> Any:
    """Opset 8: a leading batch axis, and lengths that no exporter ever gave."""
    if lengths is not None:
        raise op.refuse("of opset 8 with sequence lengths is not lowered")
    body, count = op.subgraph("body"), op.attr("num_scan_inputs")
    states = len(inputs) - count
    batch = [
        _scan(body, [v[index] for v in inputs[:states]], [v[index] for v in inputs[states:]])
        for index in range(inputs[-1].shape[0])
    ]
    return tuple(jnp.stack(parts) for parts in zip(*batch, strict=True))


@handles("Scan", since=9)
def scan(op: Op, *inputs: Any) -> Any:
    body, count = op.subgraph("body"), op.attr("num_scan_inputs")
    states = len(inputs) - count
    axes = op.attr("scan_input_axes", [0] * count)
    backward = op.attr("scan_input_directions", [0] * count)
    rows = []
    for value, axis, reverse in zip(inputs[states:], axes, backward, strict=True):
        row = jnp.moveaxis(jnp.asarray(value), axis, 0)
        rows.append(jnp.flip(row, 0) if reverse else row)
    results = list(_scan(body, list(inputs[:states]), rows))
    collected = len(results) - states
    axes = op.attr("scan_output_axes", [0] * collected)
    backward = op.attr("scan_output_directions", [0] * collected)
    for index, (axis, reverse) in enumerate(zip(axes, backward, strict=True), states):
        row = jnp.flip(results[index], 0) if reverse else results[index]
        results[index] = jnp.moveaxis(row, 0, axis)
    return tuple(results)


def _scan(body: Any, states: list[Any], rows: list[Any]) -> tuple[Any, ...]:
    def step(state: Any, row: Any) -> Any:
        results = [jnp.asarray(value) for value in body(*state, *row)]
        kept = [_like(v, old) for v, old in zip(results, state, strict=False)]
        return tuple(kept), tuple(results[len(state) :])

    final, collected = lax.scan(step, tuple(jnp.asarray(v) for v in states), tuple(rows))
    return (*final, *collected)
