"""The safetensors reader: faithful to the format, suspicious of every claim, never reading weights
that nobody asked for."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from trivium.compiler.errors import BadInput
from trivium.models.checkpoint import Checkpoint
from trivium.models.safetensors import as_float32, read_folder, read_header

from .conftest import write_safetensors


@given(
    array=npst.arrays(
        st.sampled_from([np.float32, np.float16]),
        npst.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=6),
        elements=st.floats(-100, 100, width=16),
    ),
    transpose=st.booleans(),
)
def test_reads_what_was_written(
    array: np.ndarray[Any, Any], transpose: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    write_safetensors(path, {"pad": np.ones(3, np.int8), "w": array})
    transpose = transpose and array.ndim == 2
    tensor = as_float32(read_header(path)["w"], "w", transpose=transpose)
    wanted = (array.T if transpose else array).astype(np.float32)
    assert tuple(tensor.shape.numpy()) == wanted.shape
    assert tensor.dtype == ir.DataType.FLOAT
    np.testing.assert_array_equal(tensor.numpy(), wanted)
    assert tensor.tobytes() == wanted.tobytes()
    stream = io.BytesIO()
    tensor.tofile(stream)  # type: ignore[attr-defined]  # optional in the protocol
    assert stream.getvalue() == wanted.tobytes()


def test_bfloat16_becomes_float32_exactly(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((3000, 1000)).astype(ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "model.safetensors", {"w": array})
    tensor = as_float32(read_header(tmp_path / "model.safetensors")["w"], "w", transpose=True)
    np.testing.assert_array_equal(tensor.numpy(), array.T.astype(np.float32))
    stream = io.BytesIO()  # more than one block
    tensor.tofile(stream)  # type: ignore[attr-defined]  # optional in the protocol
    assert stream.getvalue() == tensor.tobytes()


def test_agrees_with_the_package(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.standard_normal((i, 3)).astype(np.float32) for i in range(4)}
    package.save_file(arrays, tmp_path / "model.safetensors")
    for name, entry in read_header(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(as_float32(entry, name).numpy(), arrays[name])


def header(path: Path, fields: object, data: bytes = b"\0" * 16) -> Path:
    text = json.dumps(fields).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"w": GOOD | {"data_offsets": [0, 20], "shape": [5]}}, "truncated"),
        ({"w": GOOD | {"data_offsets": [4, 16]}}, "12 bytes of data for F32"),
        ({"w": GOOD | {"data_offsets": [16, 0]}}, "data at 16:0"),
        ({"w": GOOD | {"data_offsets": [0]}}, "lacks dtype, shape or data_offsets"),
        ({"w": GOOD | {"data_offsets": [0, 1 << 80]}}, "truncated"),
        ({"w": GOOD | {"shape": [-2, -2]}}, "shape"),
        ({"w": GOOD | {"shape": [2.0, 2]}}, "shape"),
        ({"w": GOOD | {"shape": 4}}, "lacks"),
        ({"w": GOOD | {"dtype": 1}}, "dtype 1"),
        ({"w": 3}, "lacks"),
        ([1], "not an object"),
    ],
)
def test_header_that_lies_is_one_line_of_bad_input(
    fields: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        read_header(header(tmp_path / "model.safetensors", fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\1\0", (1 << 62).to_bytes(8, "little"), b"\x10\0\0\0\0\0\0\0{", b"\2\0\0\0\0\0\0\0{]"],
)
def test_damaged_file_is_bad_input(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="safetensors"):
        read_header(path)


@given(cut=st.integers(0, 400), flip=st.integers(0, 400), byte=st.integers(0, 255))
def test_any_damage_is_bad_input_or_harmless(
    cut: int, flip: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    write_safetensors(path, {"a": np.ones((4, 4), np.float32), "b": np.ones(8, np.float16)})
    data = bytearray(path.read_bytes())
    data[flip % len(data)] = byte
    path.write_bytes(data[: len(data) - cut % len(data)])
    try:
        entries = read_header(path)
    except BadInput:
        return
    for entry in entries.values():
        assert entry.offset + entry.length <= path.stat().st_size


def shards(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {name: np.full((2, 3), i, np.float32) for i, name in enumerate("abc")}
    write_safetensors(folder / "one.safetensors", {"a": arrays["a"]})
    write_safetensors(folder / "two.safetensors", {"b": arrays["b"], "c": arrays["c"]})
    index(folder, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return arrays


def index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    arrays = shards(tmp_path)
    entries = read_folder(tmp_path)
    assert set(entries) == set(arrays)
    for name, entry in entries.items():
        np.testing.assert_array_equal(as_float32(entry, name).numpy(), arrays[name])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "three.safetensors"}, "shard 'three.safetensors' is missing"),
        ({"b": "one.safetensors"}, "but it is not there"),
        ({"a": "../one.safetensors"}, "not a file of this folder"),
        ({"a": "/etc/passwd"}, "not a file of this folder"),
        ({"a": 3}, "not a file of this folder"),
        ({}, "no weight_map"),
        ("a", "no weight_map"),
    ],
)
def test_index_that_lies_is_bad_input(weight_map: object, message: str, tmp_path: Path) -> None:
    shards(tmp_path)
    index(tmp_path, weight_map)
    with pytest.raises(BadInput, match=message):
        read_folder(tmp_path)


def test_folder_without_safetensors_says_how_to_get_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(BadInput, match="safe_serialization"):
        read_folder(tmp_path)


def test_wrong_dtype_shape_or_name_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_safetensors(
        tmp_path / "model.safetensors",
        {"q": np.ones((2, 2), np.int8), "w": np.ones((2, 3), np.float32)},
    )
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(BadInput, match="'q': is I8"):
        checkpoint.tensor("q", (2, 2))
    with pytest.raises(BadInput, match=r"\[2, 3\] where config.json implies \[3, 2\]"):
        checkpoint.tensor("w", (3, 2))
    with pytest.raises(BadInput, match="'v': is not in the checkpoint"):
        checkpoint.tensor("v", (3, 2))
    assert checkpoint.tensor("w", (3, 2), transpose=True).numpy().shape == (3, 2)


@pytest.mark.parametrize("transpose", [False, True])
def test_equal_halves_are_shared_and_others_are_not(tmp_path: Path, transpose: bool) -> None:
    """Sharing asks a converted tensor for a piece first, and for all of it only if that agrees."""
    from trivium.passes.share_duplicates import ShareDuplicates

    one = np.random.default_rng(0).standard_normal((300, 200)).astype(np.float16)
    late = one.copy()
    late[-1, -1] += 1
    write_safetensors(tmp_path / "model.safetensors", {"a": one, "b": one, "c": late})
    graph = ir.Graph([], [], nodes=[], name="g", opset_imports={"": 24})
    nodes = []
    for name, entry in read_header(tmp_path / "model.safetensors").items():
        value = ir.Value(name=name, const_value=as_float32(entry, name, transpose=transpose))
        graph.register_initializer(value)
        nodes.append(ir.node("Neg", [value], name=name))
        graph.append(nodes[-1])
        graph.outputs.append(nodes[-1].outputs[0])
    assert ShareDuplicates()(ir.Model(graph, ir_version=11)).modified
    assert nodes[0].inputs[0] is nodes[1].inputs[0]
    assert nodes[2].inputs[0] is not nodes[0].inputs[0]
