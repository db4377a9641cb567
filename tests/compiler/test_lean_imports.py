"""onnx_ir is read without sympy, and computes with dimensions all the same."""

from __future__ import annotations

import subprocess
import sys


def answers(code: str) -> list[str]:
    """What a fresh interpreter prints, a line each."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_sympy_is_imported_when_a_dimension_is_computed_with() -> None:
    found = answers(
        "import sys, trivium.compiler.passing\n"
        "import onnx_ir as ir\n"
        "print('sympy' in sys.modules)\n"
        "print(ir.SymbolicDim('N') == 'N', 'sympy' in sys.modules)\n"
        "print(ir.SymbolicDim('N') * 2 + 1, ir.SymbolicDim('max(N, 3)').evaluate({'N': 5}))\n"
        "import sympy\n"
        "print(isinstance((ir.SymbolicDim('N') + 1)._expr, sympy.Expr), sympy.__name__)\n"
    )
    assert found == ["False", "True False", "2*N + 1 5", "True sympy"]


def test_no_stand_in_is_left_for_others() -> None:
    found = answers(
        "import trivium, onnx_ir, sys\n"
        "import sympy.core, onnx_ir._symbolic_shapes as parsing\n"
        "print(type(sympy).__name__, type(parsing).__name__, sympy.Integer(2) + 1)\n"
    )
    assert found == ["module module 3"]


def test_sympy_that_is_there_already_is_used() -> None:
    found = answers(
        "import sympy, trivium, onnx_ir as ir\n"
        "print(ir._core.sympy is sympy, ir.SymbolicDim(sympy.Symbol('N')) + 1)\n"
    )
    assert found == ["True N + 1"]


def test_a_type_that_is_no_dimension_is_refused_as_ever() -> None:
    found = answers(
        "import trivium, onnx_ir as ir\n"
        "try:\n    ir.SymbolicDim(1.5)\n"
        "except TypeError as error:\n    print(error)\n"
    )
    assert found == ["Expected str, None, or sympy.Expr, got float"]
