"""Operators that work element by element, with NumPy's broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.dtypes import is_float, is_integer
from trivium.backends.xla.lowering.lazy import jax, jnp, lax
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


def _unary(name: str, function: Callable[[Any], Any]) -> None:
    handles(name)(lambda op, x: function(x))


def _as(value: float, like: Any) -> Any:
    """A constant in the dtype of its operand, so that it promotes nothing."""
    return jnp.asarray(value, like.dtype)


_unary("Abs", lambda x: jnp.abs(x))
_unary("Acos", lambda x: jnp.arccos(x))
_unary("Acosh", lambda x: jnp.arccosh(x))
_unary("Asin", lambda x: jnp.arcsin(x))
_unary("Asinh", lambda x: jnp.arcsinh(x))
_unary("Atan", lambda x: jnp.arctan(x))
_unary("Atanh", lambda x: jnp.arctanh(x))
_unary("Ceil", lambda x: jnp.ceil(x))
_unary("Cos", lambda x: jnp.cos(x))
_unary("Cosh", lambda x: jnp.cosh(x))
_unary("Erf", lambda x: lax.erf(x) if is_float(x.dtype) else lax.erf(x.astype("float32")))
_unary("Exp", lambda x: jnp.exp(x))
_unary("Floor", lambda x: jnp.floor(x))
_unary("Identity", lambda x: x)
_unary("IsNaN", lambda x: jnp.isnan(x))
_unary("Log", lambda x: jnp.log(x))
_unary("Neg", lambda x: jnp.negative(x))
_unary("Not", lambda x: jnp.logical_not(x))
_unary("BitwiseNot", lambda x: jnp.bitwise_not(x))
_unary("Reciprocal", lambda x: _as(1, x) / x)
_unary("Relu", lambda x: jnp.maximum(x, _as(0, x)))
_unary("Round", lambda x: jnp.round(x))
_unary("Sigmoid", lambda x: jax.nn.sigmoid(x))
_unary("Sign", lambda x: jnp.sign(x))
_unary("Sin", lambda x: jnp.sin(x))
_unary("Sinh", lambda x: jnp.sinh(x))
_unary("Softplus", lambda x: jnp.logaddexp(x, _as(0, x)))
_unary("Softsign", lambda x: x / (_as(1, x) + jnp.abs(x)))
_unary("Sqrt", lambda x: jnp.sqrt(x))
_unary("Tan", lambda x: jnp.tan(x))
_unary("Tanh", lambda x: jnp.tanh(x))
_unary("HardSwish", lambda x: x * jnp.clip(x / _as(6, x) + _as(0.5, x), _as(0, x), _as(1, x)))
_unary("Mish", lambda x: x * jnp.tanh(jnp.logaddexp(x, _as(0, x))))


def _binary(name: str, function: Callable[[Any, Any], Any]) -> None:
    handles(name, since=7)(lambda op, a, b: function(a, b))

    # Before opset 7 broadcasting had to be asked for, aligned at `axis`.
    @handles(name)
    def aligned(op: Op, a: Any, b: Any) -> Any:
        if op.attr("broadcast", 0):
            axis = op.attr("axis")
            if axis is not None:
                axis = axis % a.ndim
                b = jnp.reshape(b, (*b.shape, *(1,) * (a.ndim - axis - b.ndim)))
        return function(a, b)


def _divide(a: Any, b: Any) -> Any:
    """ONNX divides integers towards zero, as C does; a divisor of zero is undefined there."""
    return lax.div(*jnp.broadcast_arrays(a, b)) if is_integer(a.dtype) else a / b


_binary("Add", lambda a, b: jnp.add(a, b))
_binary("Sub", lambda a, b: jnp.subtract(a, b))
_binary("Mul", lambda a, b: jnp.multiply(a, b))
_binary("Div", _divide)
_binary("And", lambda a, b: jnp.logical_and(a, b))
_binary("Or", lambda a, b: jnp.logical_or(a, b))
_binary("Xor", lambda a, b: jnp.logical_xor(a, b))
_binary("Equal", lambda a, b: jnp.equal(a, b))
_binary("Greater", lambda a, b: jnp.greater(a, b))
_binary("Less", lambda a, b: jnp.less(a, b))
_binary("GreaterOrEqual", lambda a, b: jnp.greater_equal(a, b))
_binary("LessOrEqual", lambda a, b: jnp.less_equal(a, b))
_binary("BitwiseAnd", lambda a, b: jnp.bitwise_and(a, b))
_binary("BitwiseOr", lambda a, b: jnp.bitwise_or(a, b))
_binary("BitwiseXor", lambda a, b: jnp.bitwise_xor(a, b))


def _power(a: Any, b: Any) -> Any:
    """The result has the dtype of the base, whatever the exponent's."""
    if isinstance(b, np.ndarray) and b.size == 1 and is_float(a.dtype):
        exponent = float(b.reshape(()))
        if exponent == int(exponent) and 0 <= exponent <= 4:
            return jnp.broadcast_to(
                lax.integer_pow(a, int(exponent)), jnp.broadcast_shapes(a.shape, b.shape)
            )
    if is_integer(a.dtype) and is_float(b.dtype):
        wide = jnp.promote_types(b.dtype, "float32")
        return jnp.power(jnp.asarray(a, wide), jnp.asarray(b, wide)).astype(a.dtype)
    if is_integer(b.dtype) and is_integer(a.dtype):
        return jnp.power(a, b).astype(a.dtype)
    return jnp.power(a, jnp.asarray(b, a.dtype))


_binary("Pow", _power)


@handles("PRelu", since=7)
def prelu(op: Op, x: Any, slope: Any) -> Any:
    return jnp.where(x < _as(0, x), slope * x, x)


@handles("PRelu")
def prelu_by_channel(op: Op, x: Any, slope: Any) -> Any:
    """Until opset 6 a slope was one for all, or one for each channel."""
    if slope.ndim == 1 and slope.size > 1:
        slope = jnp.reshape(slope, (-1, *(1,) * (x.ndim - 2)))
    return prelu(op, x, slope)


@handles("Mod", since=10)
def mod(op: Op, a: Any, b: Any) -> Any:
    return jnp.fmod(a, b) if op.attr("fmod", 0) else jnp.mod(a, b)


@handles("BitShift", since=11)
def bit_shift(op: Op, a: Any, b: Any) -> Any:
    if op.attr("direction") == "LEFT":
        return jnp.left_shift(a, b)
    return jnp.right_shift(a, b)


@handles("Max")
def maximum(op: Op, *values: Any) -> Any:
    return reduce(jnp.maximum, values)


@handles("Min")
def minimum(op: Op, *values: Any) -> Any:
    return reduce(jnp.minimum, values)


@handles("Sum")
def add_all(op: Op, *values: Any) -> Any:
    return reduce(jnp.add, values)


@handles("Mean")
def mean_of_all(op: Op, *values: Any) -> Any:
    total = reduce(jnp.add, values)
    return total / _as(len(values), total)


@handles("Where", since=9)
def where(op: Op, condition: Any, a: Any, b: Any) -> Any:
    return jnp.where(condition, a, b)


@handles("IsInf", since=10)
def is_infinite(op: Op, x: Any) -> Any:
    found = jnp.zeros(x.shape, bool)
    if op.attr("detect_positive", 1):
        found |= jnp.isposinf(x)
    if op.attr("detect_negative", 1):
        found |= jnp.isneginf(x)
    return found


@handles("Clip")
def clip_by_attributes(op: Op, x: Any) -> Any:
    low, high = op.attr("min"), op.attr("max")
    x = x if low is None else jnp.maximum(x, _as(low, x))
    return x if high is None else jnp.minimum(x, _as(high, x))


@handles("Clip", since=11)
def clip(op: Op, x: Any, low: Any = None, high: Any = None) -> Any:
    x = x if low is None else jnp.maximum(x, low)
    return x if high is None else jnp.minimum(x, high)


@handles("LeakyRelu")
def leaky_relu(op: Op, x: Any) -> Any:
    return jnp.where(x < _as(0, x), _as(op.attr("alpha", 0.01), x) * x, x)


@handles("Elu")
def elu(op: Op, x: Any) -> Any:
    return jnp.where(x < _as(0, x), _as(op.attr("alpha", 1.0), x) * jnp.expm1(x), x)


@handles("Celu", since=12)
def celu(op: Op, x: Any) -> Any:
    alpha = _as(op.attr("alpha", 1.0), x)
    zero = _as(0, x)
    return jnp.maximum(x, zero) + jnp.minimum(alpha * jnp.expm1(x / alpha), zero)


@handles("Selu")
def selu(op: Op, x: Any) -> Any:
    alpha = _as(op.attr("alpha", 1.67326319217681884765625), x)
    gamma = _as(op.attr("gamma", 1.05070102214813232421875), x)
    return gamma * jnp.where(x <= _as(0, x), alpha * jnp.expm1(x), x)


@handles("HardSigmoid")
def hard_sigmoid(op: Op, x: Any) -> Any:
    y = _as(op.attr("alpha", 0.2), x) * x + _as(op.attr("beta", 0.5), x)
    return jnp.clip(y, _as(0, x), _as(1, x))


@handles("ThresholdedRelu", since=10)
def thresholded_relu(op: Op, x: Any) -> Any:
    return jnp.where(x > _as(op.attr("alpha", 1.0), x), x, _as(0, x))


@handles("Shrink", since=9)
def shrink(op: Op, x: Any) -> Any:
    bias, threshold = _as(op.attr("bias", 0.0), x), _as(op.attr("lambd", 0.5), x)
    return jnp.where(x < -threshold, x + bias, jnp.where(x > threshold, x - bias, _as(0, x)))


@handles("Gelu", since=20)
def gelu(op: Op, x: Any) -> Any:
    return jax.nn.gelu(x, approximate=op.attr("approximate", "none") == "tanh")


@handles("Swish", since=24)
def swish(op: Op, x: Any) -> Any:
    return x * jax.nn.sigmoid(_as(op.attr("alpha", 1.0), x) * x)
