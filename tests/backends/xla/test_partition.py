"""How programs without annotations are spread over a slice."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.backends.xla.partition import Partition, choose, noting_annotations
from trivium.compiler.errors import BadInput
from trivium.compiler.types import TensorInfo


def tensors(*shapes: tuple[int, ...]) -> list[TensorInfo]:
    return [TensorInfo(f"t{i}", "float32", shape) for i, shape in enumerate(shapes)]


@given(batch=st.integers(1, 64), devices=st.integers(1, 16))
def test_the_batch_is_spread_exactly_when_it_divides(batch: int, devices: int) -> None:
    split = choose(tensors((batch, 3), (), (2, batch)), tensors((batch,), (7,)), devices)
    if devices == 1:
        assert split.kind == "single"
    elif batch % devices:
        assert split.kind == "replicated"
        assert not split.inputs
        assert f"a batch of {batch} does not divide by {devices}" in split.note
    else:
        assert split.kind == "batch"
        assert split.inputs["t0"] == [["batch"]]
        assert "t1" not in split.inputs
        assert split.outputs["t0"] == [["batch"]]
        assert f"{batch // devices} of the batch of {batch}" in split.note
    assert Partition.from_json(split.to_json()) == split


def test_wishes_are_honoured_or_refused() -> None:
    given_, made = tensors((8, 3)), tensors((8, 2))
    assert choose(given_, made, 4, "replicated").kind == "replicated"
    with pytest.raises(BadInput, match="a batch of 8 does not divide over 3 devices"):
        choose(given_, made, 3, "batch")
    with pytest.raises(BadInput, match="no partition is called 'tensor'"):
        choose(given_, made, 4, "tensor")


def test_annotations_that_are_not_used_are_noted() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[]), ir_version=11)
    alone, spread = choose(tensors((8, 3)), [], 1), choose(tensors((8, 3)), [], 4)
    assert noting_annotations(spread, model) == spread
    model.add_device_configuration("tp=8", num_devices=8)
    expected = "the model's annotations for tp=8 are not used (one device computes all of it)"
    assert noting_annotations(alone, model).note == expected
    assert noting_annotations(spread, model).note.endswith("for tp=8 are not used (as asked)")
