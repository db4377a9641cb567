"""What a damaged file makes of names and of typed data."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto, helper

from trivium.compiler import model as models
from trivium.compiler.errors import BadInput


def _model(weight: TensorProto) -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"], name="copy_it")],
        "g",
        [],
        [helper.make_tensor_value_info("y", weight.data_type, list(weight.dims))],
        [weight],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=11)
    return bytes(made.SerializeToString())


@pytest.mark.parametrize("name", ["copy_it", "Identity", "g"])
def test_a_name_has_to_be_text(name: str, tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1, 2])
    broken = name.encode()[:-1] + b"\xff"
    path = tmp_path / "model.onnx"
    path.write_bytes(_model(weight).replace(b"\x01g" if name == "g" else name.encode(),
                                            b"\x01\xff" if name == "g" else broken))  # fmt: skip
    with pytest.raises(BadInput, match=r"not UTF-8|damaged"):
        models.load(path)


@pytest.mark.parametrize(
    "kind",
    ["FLOAT", "DOUBLE", "INT64", "UINT64", "UINT32", "INT32", "INT8", "BOOL", "FLOAT16",
     "BFLOAT16", "INT4", "UINT4", "COMPLEX64", "COMPLEX128", "FLOAT8E4M3FN"],
)  # fmt: skip
def test_typed_data_has_as_many_entries_as_the_shape(kind: str, tmp_path: Path) -> None:
    weight = helper.make_tensor("w", getattr(TensorProto, kind), [3], [1, 0, 1])
    path = tmp_path / "model.onnx"
    path.write_bytes(_model(weight))
    models.load(path)
    for dims in ([5], [1]):
        del weight.dims[:]
        weight.dims.extend(dims)
        path.write_bytes(_model(weight))
        with pytest.raises(BadInput, match="its shape needs"):
            models.load(path)


def test_padding_of_an_unknown_kind(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], auto_pad="SAME_UPPEQ")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "model.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(BadInput, match="SAME_UPPEQ"):
        models.load(path)


def test_a_dtype_that_does_not_exist(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1, 2])
    model = _model(weight)
    weight.data_type = 99
    path = tmp_path / "model.onnx"
    path.write_bytes(_model(weight))
    with pytest.raises(BadInput, match="99"):
        models.load(path)
    path.write_bytes(model)
    models.load(path)
