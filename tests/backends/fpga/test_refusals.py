"""What cannot become integers on a stream is refused, node by node, with the reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

import trivium
from tests.backends.fpga import qdq
from trivium.backends.fpga import lower
from trivium.backends.fpga.backend import BACKEND
from trivium.compiler import targets
from trivium.compiler.errors import BadInput, ToolchainMissing, Unsupported
from trivium.models import digits


def refusals(model: onnx.ModelProto) -> list[str]:
    found = lower.lower(qdq.loaded(model).graph)
    assert (found.flow is None) == bool(found.refusals)
    return [f"{node.op_type}: {reason}" for node, reason in found.refusals.items()]


def graph(*shape: int) -> qdq.Graph:
    return qdq.Graph(np.random.default_rng(0), shape or (4, 6, 6))


def test_a_float_model_is_refused_where_it_is_float(tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as caught:
        trivium.compile(digits.cnn(), qdq.ZCU104, out=tmp_path / "out", use_cache=False)
    assert caught.value.exit_code == 3
    assert any("conv0" in one for one in caught.value.refusals)
    assert not (tmp_path / "out").exists()


def test_the_weight_must_be_quantized() -> None:
    g = graph()
    x = g.quantized("x")
    y = g.op("Conv", x, g.store(np.ones((2, 4, 1, 1), np.float32)))
    assert refusals(g.model(g.quantized(y))) == [
        "Conv: its weight is float; quantize the model (recipe int8)"
    ]


def test_groups_between_one_and_all() -> None:
    g = graph()
    y = qdq.convolution(g, g.quantized("x"), 4, 4, group=2)
    assert refusals(g.model(y)) == ["Conv: 2 groups of 4 channels (only 1 or all of them)"]


def test_a_batch_that_is_mixed_with_the_rest() -> None:
    g = graph()
    x = g.quantized("x")
    y = g.op("Reshape", x, g.store(np.array([4, -1], np.int64)))
    assert refusals(g.model(y)) == [
        "Reshape: it reshapes to [4, -1], which mixes the batch with the rest"
    ]
    g = graph()
    y = g.op("Transpose", g.quantized("x"), perm=[1, 0, 2, 3])
    assert refusals(g.model(y)) == ["Transpose: it moves the batch axis"]


def test_an_order_that_would_need_a_frame_buffer() -> None:
    g = graph()
    y = qdq.convolution(g, g.quantized("x"), 4, 6)
    y = g.op("Transpose", y, perm=[0, 1, 3, 2])
    (reason,) = refusals(g.model(qdq.convolution(g, y, 6, 2)))
    assert "buffer for the whole image" in reason


def test_unknown_operators_and_floats_between() -> None:
    g = graph()
    y = g.op("Exp", g.quantized("x"))
    assert refusals(g.model(y)) == ["Exp: no integer form of this operator is known"]
    g = graph()
    x = g.quantized("x")
    weight, _ = g.weight((2, 4, 1, 1))
    y = g.op("Sigmoid", g.op("Conv", x, weight))
    assert refusals(g.model(y)) == [
        "Sigmoid: it needs a quantized operand, so that it becomes a table"
    ]


def test_a_bias_after_the_rounding() -> None:
    g = graph()
    y = g.op("Add", g.quantized("x"), g.store(np.ones((4, 1, 1), np.float32)))
    (reason,) = refusals(g.model(g.quantized(y)))
    assert "fuse the bias before quantizing" in reason


def test_what_follows_a_refused_node_is_not_refused_again() -> None:
    g = graph()
    y = g.quantized(g.op("Exp", g.quantized("x")))
    y = qdq.convolution(g, y, 4, 4)
    assert len(refusals(g.model(y))) == 1


@pytest.mark.parametrize("name", ["lattice-ecp5-85f"])
def test_lattice_waits_for_the_rtl_emitter(name: str) -> None:
    target = targets.find(name)
    model = qdq.loaded(qdq.network(1))
    reasons = {BACKEND.refuses(node, target) for node in model.graph}
    assert reasons == {f"{name} needs the RTL emitter, which is not written yet"}
    with pytest.raises(Unsupported, match="RTL emitter"):
        BACKEND.estimate(model, target, trivium.compiler.types.Workload())


def test_a_target_without_a_part_number() -> None:
    nameless = dataclasses.replace(qdq.ZCU104, options={"flow": "vitis"})
    model = qdq.loaded(qdq.network(1))
    assert BACKEND.refuses(next(iter(model.graph)), nameless) == "amd-zcu104 states no part number"


def test_unknown_options_and_missing_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.onnx"
    onnx.save(qdq.network(1), path)
    with pytest.raises(BadInput, match="interval_us"):
        trivium.compile(path, qdq.ZCU104, out=tmp_path / "a", options={"unroll": "3"})
    monkeypatch.setenv("CXX", "no-such-compiler")
    artifact = trivium.compile(path, qdq.ZCU104, out=tmp_path / "b", use_cache=False)
    verification = artifact.manifest["verification"]
    assert verification["status"] == "not-run"
    assert "g++" in verification["reason"]
    with pytest.raises(ToolchainMissing, match=r"g\+\+"):
        artifact.load()
