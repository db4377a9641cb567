"""jax, imported on first use: the operator table can be read (to list refusals, to write the docs)
on a machine that has no jax.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class _Lazy:
    """A module that is imported when one of its names is first asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


jax: Any = _Lazy("jax")
jax_export: Any = _Lazy("jax.export")
jnp: Any = _Lazy("jax.numpy")
lax: Any = _Lazy("jax.lax")
