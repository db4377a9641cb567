"""Sizes that stay symbolic, so that one exported program serves any of them.

A size is an ``int`` or one of jax's symbolic dimensions (`jax.export.symbolic_shape`). An integer
tensor that is known but for such sizes is a numpy array of objects. What graphs do to shapes is
done here on those objects; everything else is given the sizes as values that the program computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from trivium.backends.xla.lowering import ratios
from trivium.backends.xla.lowering.lazy import jax, jax_export, jnp

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]


def is_symbolic(size: Any) -> bool:
    """Whether a size is a symbolic dimension, or a part of one."""
    if isinstance(size, ratios.Ratio):
        return True
    return not isinstance(size, (int, np.integer)) and bool(jax_export.is_symbolic_dim(size))


def has_symbols(value: Any) -> bool:
    """Whether a value is an integer tensor of which some elements are symbolic."""
    if not isinstance(value, np.ndarray) or value.dtype != object:
        return False
    return any(is_symbolic(item) for item in value.flat)


def as_tensor(sizes: Any) -> Array:
    """Sizes as a known tensor: of numbers where all are, else of objects."""
    array = np.asarray(sizes, object)
    if has_symbols(array):
        return array
    parts = any(isinstance(item, Fraction) for item in array.flat)
    return array.astype(np.float64 if parts else np.int64)


def traced(value: Any, dtype: Any = "int64") -> Any:
    """A tensor with symbolic elements as what the program computes; others as they are."""
    if not has_symbols(value):
        return value
    flat = [_computed(item, dtype) for item in value.flat]
    return jnp.reshape(jnp.stack(flat), value.shape)


def _computed(item: Any, dtype: Any) -> Any:
    if isinstance(item, ratios.Ratio):
        factor = item.factor
        return jnp.asarray(item.size * factor.numerator, dtype) / factor.denominator
    return jnp.asarray(float(item) if isinstance(item, Fraction) else item, dtype)


def named(inputs: Sequence[Any]) -> str:
    """The symbolic sizes in the shapes and elements of values, for a message."""
    found: dict[str, None] = {}
    for value in inputs:
        elements = value.flat if has_symbols(value) else getattr(value, "shape", ())
        found.update((str(size), None) for size in elements if is_symbolic(size))
    return " and ".join(found)


def bindings(declared: Any, actual: Sequence[Any]) -> dict[str, Any]:
    """What the names in a declared shape stand for in a traced one that is symbolic there."""
    pairs = zip(declared or (), actual, strict=False)
    return {str(dim.value): size for dim, size in pairs if is_symbolic(size) and _is_named(dim)}


def _is_named(dim: Any) -> bool:
    return getattr(dim, "value", None) is not None


def fold(
    node: ir.Node, inputs: Sequence[Any], attributes: Mapping[str, ir.Attr]
) -> tuple[Any, ...] | None:
    """Evaluate shape arithmetic on symbolic sizes; None for what is not that, or not decidable."""
    function = _ARITHMETIC.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    known = all(value is None or isinstance(value, (np.ndarray, np.generic)) for value in inputs)
    if function is None or not known:
        return None
    try:
        results = function(_Attributes(node, attributes), *inputs)
    except (ratios.Undecided, jax.errors.InconclusiveDimensionOperation):
        return None
    made = results if isinstance(results, tuple) else (results,)
    return tuple(map(_as_declared, node.outputs, made))


def _as_declared(value: ir.Value, made: Array) -> Array:
    """What turned out to be numbers, in the dtype that the model gives it."""
    if value.dtype is None or has_symbols(made):
        return made
    return made.astype(value.dtype.numpy())


class _Attributes:
    """Attributes of a node, those of the enclosing function's call followed."""

    def __init__(self, node: ir.Node, outer: Mapping[str, ir.Attr]) -> None:
        self._node, self._outer = node, outer

    def get(self, name: str, default: Any = None) -> Any:
        found = self._node.attributes.get(name)
        if found is not None and found.is_ref():
            found = self._outer.get(found.ref_attr_name or "")
        return default if found is None else found.value

    @property
    def outputs(self) -> int:
        return len(self._node.outputs)

    @property
    def dtype(self) -> ir.DataType | None:
        """What the model declares of the first output."""
        return self._node.outputs[0].dtype

    @property
    def floats(self) -> bool:
        """Whether the model declares that it computes on floats."""
        values = [value for value in (*self._node.inputs, *self._node.outputs) if value is not None]
        return any(v.dtype is not None and v.dtype.is_floating_point() for v in values)


def _numbers(value: Array) -> list[int]:
    if has_symbols(value):
        raise ratios.Undecided
    return [int(item) for item in np.asarray(value).reshape(-1)]


def _axes(attributes: _Attributes, given: Array | None) -> tuple[int, ...] | None:
    found = attributes.get("axes") if given is None else _numbers(given)
    return None if found is None else tuple(found)


def _cast(attributes: _Attributes, x: Array) -> Array:
    """Whole sizes are so in every type; the declared one says what to make of them later."""
    import onnx_ir as ir

    to = ir.DataType(attributes.get("to"))
    declared = to.is_integer() or (to.is_floating_point() and attributes.dtype == to)
    if not declared:
        raise ratios.Undecided
    return _each(ratios.truncated, ratios.part)(attributes, x) if to.is_integer() else x


def _multiply(attributes: _Attributes, a: Array, b: Array) -> Array:
    if attributes.floats:
        return _each(ratios.times, ratios.part)(attributes, a, b)
    return _each(lambda a, b: a * b)(attributes, a, b)


def _divide(attributes: _Attributes, a: Array, b: Array) -> Array:
    if attributes.floats:
        return _each(ratios.over, ratios.part)(attributes, a, b)
    # Towards zero as ONNX has it, and down as Python has it, are the same above zero.
    whole = all(np.asarray(value).dtype.kind in "iuO" for value in (a, b))
    if not whole or (attributes.dtype is not None and not attributes.dtype.is_integer()):
        raise ratios.Undecided
    return _each(lambda a, b: _at_least(a, 0) // _at_least(b, 1))(attributes, a, b)


def _gather(attributes: _Attributes, x: Array, indices: Array) -> Array:
    return as_tensor(np.take(x, np.asarray(indices, np.int64), axis=attributes.get("axis", 0)))


def _slice(
    attributes: _Attributes, x: Array, starts: Any = None, ends: Any = None, axes: Any = None,
    steps: Any = None,
) -> Array:  # fmt: skip
    first = attributes.get("starts") if starts is None else _numbers(starts)
    last = attributes.get("ends") if ends is None else _numbers(ends)
    along = _axes(attributes, axes) or range(len(first))
    by = [1] * len(first) if steps is None else _numbers(steps)
    where = [slice(None)] * x.ndim
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        if step < 0:
            raise ratios.Undecided
        where[axis] = slice(start, end, step)
    return as_tensor(x[tuple(where)])


def _split(attributes: _Attributes, x: Array, sizes: Array | None = None) -> tuple[Array, ...]:
    given = attributes.get("split") if sizes is None else _numbers(sizes)
    if given is None:
        count = attributes.get("num_outputs", attributes.outputs)
        whole = -(-x.shape[attributes.get("axis", 0)] // count)
        given = [whole] * count
    cuts = np.cumsum(given)[:-1]
    return tuple(as_tensor(part) for part in np.split(x, cuts, attributes.get("axis", 0)))


def _unsqueeze(attributes: _Attributes, x: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(x, _axes(attributes, axes) or ())


def _squeeze(attributes: _Attributes, x: Array, axes: Array | None = None) -> Array:
    return np.asarray(np.squeeze(x, _axes(attributes, axes)), x.dtype)


def _reshape(attributes: _Attributes, x: Array, target: Array) -> Array:
    sizes = _numbers(target)
    kept = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(kept)


def _at_least(x: Any, least: int) -> Any:
    if not x >= least:
        raise ratios.Undecided
    return x


def _plain(item: Any) -> Any:
    """An element that is whole."""
    if isinstance(item, float) and not item.is_integer():
        raise ratios.Undecided
    if isinstance(item, (Fraction, ratios.Ratio)):
        raise ratios.Undecided
    return int(item) if isinstance(item, float) else item


def _each(
    function: Callable[..., Any], read: Callable[[Any], Any] = _plain
) -> Callable[..., Array]:
    """A function of sizes, on all elements of tensors that broadcast."""

    def on_tensors(attributes: _Attributes, *values: Array) -> Array:
        wide = np.broadcast_arrays(*(np.asarray(value, object) for value in values))
        rows = zip(*(one.flat for one in wide), strict=True)
        results = [function(*(read(_python(item)) for item in row)) for row in rows]
        if all(isinstance(one, bool) for one in results):
            return np.asarray(results, bool).reshape(wide[0].shape)
        made = np.empty(len(results), object)
        made[:] = results
        return as_tensor(made.reshape(wide[0].shape))

    return on_tensors


def _python(item: Any) -> Any:
    return item.item() if isinstance(item, np.generic) else item


def _equal(a: Any, b: Any) -> bool:
    # jax's own == says False where it does not know.
    if not is_symbolic(a - b):
        return bool(a - b == 0)
    if a < b or a > b:
        return False
    raise ratios.Undecided


def _larger(a: Any, b: Any) -> Any:
    return jax.core.max_dim(a, b)


def _smaller(a: Any, b: Any) -> Any:
    return jax.core.min_dim(a, b)


def _reduction(function: Callable[[Any, Any], Any]) -> Callable[..., Array]:
    def over_all(attributes: _Attributes, x: Array, axes: Array | None = None) -> Array:
        along = _axes(attributes, axes)
        if x.ndim != 1 or along not in (None, (0,), (-1,)):
            raise ratios.Undecided
        made = as_tensor(reduce(function, map(_plain, x.flat)))
        return made.reshape(1) if attributes.get("keepdims", 1) else made.reshape(())

    return over_all


_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "Add": _each(lambda a, b: a + b),
    "Cast": _cast,
    "Concat": lambda attributes, *values: as_tensor(
        np.concatenate([np.asarray(v, object) for v in values], attributes.get("axis", 0))
    ),
    "Ceil": _each(ratios.ceil, ratios.part),
    "Div": _divide,
    "Equal": _each(_equal),
    "Expand": lambda attributes, x, target: np.broadcast_to(
        x, np.broadcast_shapes(x.shape, tuple(_numbers(target)))
    ),
    "Floor": _each(ratios.floor, ratios.part),
    "Gather": _gather,
    "Greater": _each(lambda a, b: bool(a > b)),
    "GreaterOrEqual": _each(lambda a, b: bool(a >= b)),
    "Identity": lambda attributes, x: x,
    "Less": _each(lambda a, b: bool(a < b)),
    "LessOrEqual": _each(lambda a, b: bool(a <= b)),
    "Max": _each(lambda *sizes: reduce(_larger, sizes)),
    "Min": _each(lambda *sizes: reduce(_smaller, sizes)),
    "Mod": _each(lambda a, b: _at_least(a, 0) % _at_least(b, 1)),
    "Mul": _multiply,
    "Neg": _each(lambda a: -a),
    "ReduceMax": _reduction(_larger),
    "ReduceMin": _reduction(_smaller),
    "ReduceProd": _reduction(lambda a, b: a * b),
    "ReduceSum": _reduction(lambda a, b: a + b),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _each(lambda a, b: a - b),
    "Unsqueeze": _unsqueeze,
    "Where": _each(lambda condition, a, b: a if condition else b),
}
