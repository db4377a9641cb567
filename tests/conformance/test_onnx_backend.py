"""A sample of the ONNX backend suite through the XLA backend's own door.

The whole runs in ``python benchmarks/conformance.py`` (docs/conformance.md holds its table); here
every N-th test does, N from TRIVIUM_CONFORMANCE_EVERY. A failure must be on the allow-list, and
a test on the allow-list that passes fails the run, so that the list can only shrink.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("jax", reason="the xla backend needs the extra trivium[tpu]")

ROOT = Path(__file__).parents[2]
EVERY = int(os.environ.get("TRIVIUM_CONFORMANCE_EVERY", "40"))


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "conformance", ROOT / "benchmarks" / "conformance.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


conformance = _script()
ALLOWED = conformance.allowed_failures()
CASES = {
    f"{case.kind}/{case.name}": case
    for kind in conformance.KINDS
    for case in conformance.cases(kind)
}


def _chosen() -> list[str]:
    """The sample, and everything on the allow-list: those are few, and most are refused at once."""
    return sorted({*list(CASES)[::EVERY], *(name for name in ALLOWED if name in CASES)})


@pytest.mark.slow
@pytest.mark.parametrize("name", _chosen())
def test_suite(name: str) -> None:
    result = conformance.outcome(CASES[name])
    if name in ALLOWED:
        assert result["status"] == "fail", f"{name} passes now: take it off {conformance.ALLOWED}"
    else:
        assert result["status"] != "fail", result["reason"]


def test_allow_list_names_only_tests_of_the_suite() -> None:
    assert set(CASES) >= ALLOWED


def _reshape(shape: list[int] | None) -> onnx.ModelProto:
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    target = helper.make_tensor_value_info("shape", TensorProto.INT64, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph([node], "reshape", [x, target], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_shape_from_outside_is_baked_unless_the_model_promises_it() -> None:
    from trivium.backends.xla import onnx_backend
    from trivium.compiler.errors import Unsupported

    feed: list[Any] = [np.arange(6, dtype=np.float32).reshape(2, 3), np.asarray([3, 2])]
    promised = onnx_backend.prepare(_reshape([3, 2]))
    assert promised.run(feed)[0].shape == (3, 2)
    assert promised.baked == ()

    baked = onnx_backend.prepare(_reshape(["a", "b"]))  # type: ignore[list-item]  # symbolic
    assert baked.run(feed)[0].shape == (3, 2)
    assert baked.baked == ("shape",)
    assert baked.run([feed[0], np.asarray([1, 6])])[0].shape == (1, 6)

    strict = onnx_backend.prepare(_reshape(["a", "b"]), bake=False)  # type: ignore[list-item]  # symbolic
    with pytest.raises(Unsupported, match="takes a shape from the value of 'shape'"):
        strict.run(feed)


def test_devices() -> None:
    from trivium.backends.xla import onnx_backend

    assert onnx_backend.supports_device("CPU")
    assert not onnx_backend.supports_device("ABACUS:0")
