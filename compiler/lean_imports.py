"""onnx_ir without sympy, until a dimension is computed with.

onnx_ir imports sympy for arithmetic on symbolic dimensions, which few runs do: half of the time
that reading a small model takes, and 30 MiB. While onnx_ir is imported, stand-ins take the place of
sympy and of the one module of onnx_ir that uses it as it loads; each imports the real module when
something of it is first asked for. Nobody else ever sees a stand-in.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_DEFERRED = ("sympy", "onnx_ir._symbolic_shapes")


class _StandIn(ModuleType):
    """Imports the module of its name when an attribute of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        _dismiss(self)
        return getattr(importlib.import_module(self.__name__), name)


def _dismiss(one: _StandIn) -> None:
    if sys.modules.get(one.__name__) is one:
        del sys.modules[one.__name__]


@contextmanager
def _standing_in() -> Iterator[None]:
    made = [_StandIn(name) for name in _DEFERRED if name not in sys.modules]
    sys.modules.update({one.__name__: one for one in made})
    try:
        yield
    finally:
        for one in made:
            _dismiss(one)


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        with _standing_in():
            super().exec_module(module)


class _Finder:
    """Finds onnx_ir where it would be found anyway, and leaves all other modules alone."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "onnx_ir":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Let later imports of onnx_ir do without sympy."""
    if not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
