"""Trivium: one ONNX model, compiled for CPU, GPU, TPU or FPGA.

>>> import trivium
>>> artifact = trivium.compile("model.onnx", "cpu")          # doctest: +SKIP
>>> artifact.load().run({"input": x})                        # doctest: +SKIP

Everything here is imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from trivium.compiler import lean_imports

lean_imports.install()

# ONNX Runtime otherwise reports to its maker, and leaves an identifier in the user's cache folder
# and a file in the temporary one. It looks at this once, when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trivium.backends.xla.gradients import differentiable
    from trivium.backends.xla.training.tuning import tune
    from trivium.compiler.artifact import Artifact
    from trivium.compiler.build import compile
    from trivium.compiler.compare import compare
    from trivium.compiler.errors import TriviumError
    from trivium.compiler.generation.text import TextGenerator, generate
    from trivium.compiler.plan import plan
    from trivium.compiler.prepare import optimize
    from trivium.compiler.verify import verify

_PUBLIC = {
    "Artifact": "trivium.compiler.artifact",
    "TextGenerator": "trivium.compiler.generation.text",
    "TriviumError": "trivium.compiler.errors",
    "compare": "trivium.compiler.compare",
    "compile": "trivium.compiler.build",
    "differentiable": "trivium.backends.xla.gradients",
    "generate": "trivium.compiler.generation.text",
    "optimize": "trivium.compiler.prepare",
    "plan": "trivium.compiler.plan",
    "tune": "trivium.backends.xla.training.tuning",
    "verify": "trivium.compiler.verify",
}

__all__ = [
    "Artifact",
    "TextGenerator",
    "TriviumError",
    "__version__",
    "compare",
    "compile",
    "differentiable",
    "generate",
    "load",
    "optimize",
    "plan",
    "tune",
    "verify",
]


def load(path: str) -> Any:
    """Load an artifact, ready to run; see `trivium.compiler.backend.Executable`."""
    from trivium.compiler.artifact import Artifact

    return Artifact.open(path).load()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'trivium' has no attribute {name!r}")
