"""ONNX to JAX: a model as one pure function of its weights and inputs.

>>> lowered = lower(model)                                          # doctest: +SKIP
>>> with precise():                                                 # doctest: +SKIP
...     outputs = jax.jit(lowered.function)(lowered.read(), {"x": x})

`program` is the way in; `trace` is the interpreter, `registry` the table of handlers, and `ops`
the handlers themselves. jax is imported when a function is first traced, not before.
"""

from __future__ import annotations

from trivium.backends.xla.lowering.dtypes import precise
from trivium.backends.xla.lowering.program import Lowered, lower
from trivium.backends.xla.lowering.refusals import refusal

__all__ = ["Lowered", "lower", "precise", "refusal"]
