"""The table of handlers, what it refuses, and that both are known without jax."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from trivium.backends.xla.lowering import refusal, registry

ROOT = Path(__file__).parents[3]


def test_newest_handler_of_the_opset_is_chosen() -> None:
    assert registry.find("", "Softmax", 12) is not registry.find("", "Softmax", 13)
    assert registry.find("", "Softmax", 24) is registry.find("", "Softmax", 13)
    assert registry.find("ai.onnx", "Relu", 24) is registry.find("", "Relu", 24)
    assert registry.find("", "Gelu", 19) is None


def test_second_handler_for_the_same_operator_is_refused() -> None:
    with pytest.raises(ValueError, match="two handlers for"):
        registry.handles("Relu")(lambda op, x: x)


@pytest.mark.parametrize(
    ("op_type", "domain", "opset", "reason"),
    [
        ("Relu", "", 24, None),
        ("AffineGrid", "", 24, None),
        ("MatMulNBits", "com.microsoft", 1, None),
        ("Quant", "onnx.brevitas", 1, "no lowering for onnx.brevitas.Quant"),
        ("ImageDecoder", "", 24, "no function body"),
        ("NonZero", "", 24, "shape depends on the data"),
    ],
)
def test_refusal_says_why(op_type: str, domain: str, opset: int, reason: str | None) -> None:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 3]))
    found = refusal(ir.node(op_type, [value], domain=domain), opset)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert reason in found


def test_strings_are_refused() -> None:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.STRING))
    assert "strings" in (refusal(ir.node("Identity", [value]), 24) or "")


def test_refusals_and_lowering_do_not_import_jax() -> None:
    program = (
        "import sys, onnx_ir as ir\n"
        "from trivium.backends.xla.lowering import lower, refusal\n"
        "assert refusal(ir.node('Conv', []), 24) is None\n"
        "lower(ir.Model(ir.Graph([], [], nodes=[], opset_imports={'': 24}), ir_version=10))\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_operator_page_is_up_to_date() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("operators", ROOT / "benchmarks/operators.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.PAGE.read_text(encoding="utf-8")
    if f"At onnx {onnx.__version__}," not in written:
        pytest.skip(f"docs/operators.md is of another onnx than {onnx.__version__}")
    assert written == module.page(), "run benchmarks/operators.py"
