"""ONNX element types as numpy and jax know them.

64-bit integers and floats are what they say: lowered functions run with jax's 64-bit types
enabled (`precise`), so that a token id, a shape or a float64 model is not cut to 32 bits. A
float32 model is unchanged by that, since handlers create constants in the dtype of their operands.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jax


def precise() -> AbstractContextManager[None]:
    """A scope in which int64 and float64 are themselves; trace, compile and run inside it."""
    context: AbstractContextManager[None] = jax.enable_x64(True)
    return context


def numpy_dtype(onnx_type: int) -> np.dtype[Any]:
    """The numpy (or ml_dtypes) dtype of an ``onnx.TensorProto.DataType``."""
    import onnx_ir as ir

    return ir.DataType(onnx_type).numpy()


def is_float(dtype: Any) -> bool:
    """Whether a dtype is floating, the small ones of ml_dtypes included."""
    return _kind(dtype) == "float"


def is_integer(dtype: Any) -> bool:
    """Whether a dtype is an integer, int4 and its kin included (bool is not)."""
    return _kind(dtype) == "int"


def _kind(dtype: Any) -> str:
    """The name of a dtype without its width; ml_dtypes' have no ``kind`` of their own."""
    name: str = np.dtype(dtype).name
    return name.removeprefix("u").removeprefix("b").rstrip("0123456789_efmnuz")
