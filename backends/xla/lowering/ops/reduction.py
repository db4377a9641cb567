"""Reductions over axes, arg-reductions, and what runs along one axis."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import prod
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jax, jnp, lax
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


def _reduction(
    name: str, function: Callable[[Any, tuple[int, ...], bool], Any], since: int
) -> None:
    """Register a reduction: axes as an attribute at first, as an input from ``since`` on."""

    @handles(name)
    def by_attribute(op: Op, x: Any) -> Any:
        axes = op.attr("axes")
        axes = range(x.ndim) if axes is None else [axis % x.ndim for axis in axes]
        return function(x, tuple(axes), bool(op.attr("keepdims", 1)))

    @handles(name, since=since, constants=(1,))
    def by_input(op: Op, x: Any, axes: Any = None) -> Any:
        if axes is None or axes.size == 0:
            if op.attr("noop_with_empty_axes", 0):
                return function(x, (), True)
            reduced: tuple[int, ...] = tuple(range(x.ndim))
        elif not op.known(axes):
            return _at_run_time(op, x, axes, function)
        else:
            reduced = tuple(axis % x.ndim for axis in op.ints(1, axes))
        return function(x, reduced, bool(op.attr("keepdims", 1)))


def _at_run_time(op: Op, x: Any, axes: Any, function: Any) -> Any:
    """Reduce over axes that the program computes, to a shape that the model promises.

    Only axes that lead to that shape are possible; where several do, all are computed and the
    right one is selected.
    """
    promised, keep = op.shape(), bool(op.attr("keepdims", 1))
    if promised is None:
        raise op.needs(1)
    possible = [
        choice
        for choice in combinations(range(x.ndim), axes.shape[0])
        if _reduced_shape(x.shape, choice, keep) == promised
    ]
    if not possible:
        raise op.refuse(f"cannot reduce {x.shape} over {axes.shape[0]} axes to {promised}")
    results = [function(x, choice, keep) for choice in possible]
    given = jnp.sort(axes % x.ndim)
    y = results[0]
    for choice, result in zip(possible[1:], results[1:], strict=True):
        y = jnp.where((given == np.asarray(choice)).all(), result, y)
    return y


def _reduced_shape(shape: tuple[int, ...], axes: tuple[int, ...], keep: bool) -> tuple[int, ...]:
    if keep:
        return tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _log_sum_exp(x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    return jax.nn.logsumexp(x, axis=axes, keepdims=keepdims)


_reduction("ReduceSum", lambda x, a, k: jnp.sum(x, axis=a, keepdims=k, dtype=x.dtype), 13)
_reduction("ReduceMean", lambda x, a, k: jnp.mean(x, axis=a, keepdims=k).astype(x.dtype), 18)
_reduction("ReduceMax", lambda x, a, k: jnp.max(x, axis=a, keepdims=k, initial=_least(x)), 18)
_reduction("ReduceMin", lambda x, a, k: jnp.min(x, axis=a, keepdims=k, initial=_greatest(x)), 18)
_reduction("ReduceProd", lambda x, a, k: jnp.prod(x, axis=a, keepdims=k, dtype=x.dtype), 18)
_reduction("ReduceL1", lambda x, a, k: jnp.sum(jnp.abs(x), a, keepdims=k, dtype=x.dtype), 18)
_reduction(
    "ReduceL2",
    lambda x, a, k: jnp.sqrt(jnp.sum(x * x, a, keepdims=k, dtype=x.dtype)).astype(x.dtype),
    18,
)
_reduction("ReduceSumSquare", lambda x, a, k: jnp.sum(x * x, a, keepdims=k, dtype=x.dtype), 18)
_reduction("ReduceLogSum", lambda x, a, k: jnp.log(jnp.sum(x, a, keepdims=k, dtype=x.dtype)), 18)
_reduction("ReduceLogSumExp", _log_sum_exp, 18)


def _least(x: Any) -> Any:
    if x.dtype == bool:
        return False
    return -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min


def _greatest(x: Any) -> Any:
    if x.dtype == bool:
        return True
    return jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max


def _arg(op: Op, x: Any, find: Callable[..., Any]) -> Any:
    axis = op.attr("axis", 0) % x.ndim
    if op.attr("select_last_index", 0):
        found = x.shape[axis] - 1 - find(jnp.flip(x, axis), axis=axis, keepdims=True)
    else:
        found = find(x, axis=axis, keepdims=True)
    found = found.astype("int64")
    return found if op.attr("keepdims", 1) else jnp.squeeze(found, axis)


@handles("ArgMax")
def arg_max(op: Op, x: Any) -> Any:
    return _arg(op, x, jnp.argmax)


@handles("ArgMin")
def arg_min(op: Op, x: Any) -> Any:
    return _arg(op, x, jnp.argmin)


def _from_axis(x: Any, axis: int, function: Callable[[Any, int], Any]) -> Any:
    """What Softmax and its kin were before opset 13: one axis made of all from ``axis`` on."""
    axis = axis % x.ndim if x.ndim else 0
    return function(jnp.reshape(x, (prod(x.shape[:axis]), -1)), -1).reshape(x.shape)


def _hardmax(x: Any, axis: int) -> Any:
    return jax.nn.one_hot(jnp.argmax(x, axis), x.shape[axis], dtype=x.dtype, axis=axis)


def _softmax(x: Any, axis: int) -> Any:
    return jax.nn.softmax(x, axis=axis)


def _log_softmax(x: Any, axis: int) -> Any:
    return jax.nn.log_softmax(x, axis=axis)


for _name, _function in (
    ("Softmax", _softmax),
    ("LogSoftmax", _log_softmax),
    ("Hardmax", _hardmax),
):

    @handles(_name)
    def _flattened(op: Op, x: Any, function: Any = _function) -> Any:
        return _from_axis(x, op.attr("axis", 1), function)

    @handles(_name, since=13)
    def _along(op: Op, x: Any, function: Any = _function) -> Any:
        return function(x, op.attr("axis", -1))


@handles("CumSum", since=11, constants=(1,))
def cumulative_sum(op: Op, x: Any, axis: Any) -> Any:
    return _cumulative(op, x, axis, lax.cumsum)


@handles("CumProd", since=26, constants=(1,))
def cumulative_product(op: Op, x: Any, axis: Any) -> Any:
    return _cumulative(op, x, axis, lax.cumprod, 1)


def _cumulative(op: Op, x: Any, axis: Any, scan: Callable[..., Any], neutral: int = 0) -> Any:
    if op.known(axis):
        return _cumulative_along(op, x, op.ints(1, axis)[0] % x.ndim, scan, neutral)
    # Every axis gives the same shape: compute along each, and select.
    wanted = jnp.reshape(axis, ()) % x.ndim
    y = _cumulative_along(op, x, 0, scan, neutral)
    for other in range(1, x.ndim):
        y = jnp.where(wanted == other, _cumulative_along(op, x, other, scan, neutral), y)
    return y


def _cumulative_along(op: Op, x: Any, axis: int, scan: Callable[..., Any], neutral: int) -> Any:
    reverse = bool(op.attr("reverse", 0))
    total = scan(jnp.asarray(x), axis=axis, reverse=reverse)
    if not op.attr("exclusive", 0):
        return total
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, 1) if reverse else (1, 0)
    size = x.shape[axis]
    shifted = jnp.pad(total, pad, constant_values=neutral)
    return (
        lax.slice_in_dim(shifted, 1, size + 1, axis=axis)
        if reverse
        else (lax.slice_in_dim(shifted, 0, size, axis=axis))
    )


@handles("TopK", constants=(1,))
def top_k(op: Op, x: Any, k: Any = None) -> Any:
    if k is None:
        count = op.attr("k")
    elif op.known(k):
        (count,) = op.ints(1, k)
    else:
        promised = op.shape(0) or op.shape(1)
        if promised is None:
            raise op.needs(1)
        count = promised[op.attr("axis", -1)]
    axis = op.attr("axis", -1) % x.ndim
    rows = jnp.moveaxis(x, axis, -1)
    order = jnp.argsort(rows, axis=-1, stable=True, descending=bool(op.attr("largest", 1)))
    indices = order[..., :count]
    values = jnp.take_along_axis(rows, indices, -1)
    return jnp.moveaxis(values, -1, axis), jnp.moveaxis(indices, -1, axis).astype("int64")
