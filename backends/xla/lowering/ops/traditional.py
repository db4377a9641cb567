"""Operators of ``ai.onnx.ml``: what traditional models are made of, as far as it is arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jnp
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op

DOMAIN = "ai.onnx.ml"


@handles("Binarizer", domain=DOMAIN)
def binarizer(op: Op, x: Any) -> Any:
    return (x > op.attr("threshold", 0.0)).astype(x.dtype)


@handles("ArrayFeatureExtractor", domain=DOMAIN)
def array_feature_extractor(op: Op, x: Any, indices: Any) -> Any:
    picked = jnp.take(x, jnp.reshape(indices, -1), axis=-1)
    return picked.reshape(1, -1) if x.ndim == 1 else picked


_KINDS = ("tensor", "int64s", "floats", "strings")


def _side(op: Op, name: str) -> np.ndarray[Any, Any]:
    """The keys or values of a LabelEncoder, whichever attribute holds them."""
    for kind in _KINDS:
        found = op.attr(f"{name}_{kind}")
        if found is not None:
            if kind == "tensor":
                return np.asarray(found.numpy()).reshape(-1)
            return np.asarray(found, {"int64s": "int64", "floats": "float32"}.get(kind, object))
    raise op.refuse(f"has no {name}")


def _otherwise(op: Op, values: np.ndarray[Any, Any]) -> Any:
    """What stands for a key that is not there, by the type of the values."""
    given = op.attr("default_tensor")
    if given is not None:
        return np.asarray(given.numpy()).reshape(-1)[0]
    if values.dtype == object:
        return op.attr("default_string", "_Unused")
    if values.dtype == np.float32:
        return np.float32(op.attr("default_float", -0.0))
    return values.dtype.type(op.attr("default_int64", -1))


@handles("LabelEncoder", domain=DOMAIN, since=2)
def label_encoder(op: Op, x: Any) -> Any:
    keys, values = _side(op, "keys"), _side(op, "values")
    otherwise = _otherwise(op, values)
    if op.known(x):
        table = {_plain(key): value for key, value in zip(keys, values, strict=True)}
        flat = [table.get(_plain(item), otherwise) for item in x.reshape(-1)]
        return np.asarray(flat, values.dtype).reshape(x.shape)
    if object in (keys.dtype, values.dtype):
        raise op.refuse("maps strings, which XLA does not have")
    same = jnp.asarray(x)[..., None] == keys.astype(x.dtype)
    if keys.dtype.kind == "f":
        same |= jnp.isnan(x)[..., None] & np.isnan(keys)
    found = jnp.asarray(values)[jnp.argmax(same, axis=-1)]
    return jnp.where(jnp.any(same, axis=-1), found, jnp.asarray(otherwise, values.dtype))


def _plain(item: Any) -> Any:
    """A key as Python has it; all NaNs are one."""
    item = item.item() if isinstance(item, np.generic) else item
    item = item.decode() if isinstance(item, bytes) else item
    return "nan" if isinstance(item, float) and item != item else item
