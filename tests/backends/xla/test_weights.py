"""The weights file: every dtype there and back, readable by others, damage noticed."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivium.backends.xla import weights
from trivium.compiler.errors import BadInput, Unsupported

DTYPES = [
    name
    for name in ir.DataType.__members__
    if name not in ("UNDEFINED", "STRING") and not name.startswith("FLOAT6")
]


@given(
    kinds=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=6),
    shape=st.lists(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 99),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_dtype_comes_back(
    kinds: list[str], shape: list[int], seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    tensors = {}
    for index, kind in enumerate(kinds):
        values = rng.integers(0, 2, shape).astype(ir.DataType[kind].numpy())
        tensors[f"w{index}"] = ir.Tensor(values, dtype=ir.DataType[kind], name=f"w{index}")
    total = weights.write(tensors, tmp_path / "w.safetensors")
    assert total == sum(tensor.nbytes for tensor in tensors.values())
    stored = weights.read(tmp_path / "w.safetensors")
    mapped = weights.arrays(tmp_path / "w.safetensors")
    assert stored.keys() == mapped.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype
        # Bytes, because float8_e8m0 has no zero: what is drawn as one is not a number.
        assert stored[name].numpy().shape == tensor.numpy().shape
        assert stored[name].numpy().tobytes() == tensor.numpy().tobytes()
        assert mapped[name].dtype == tensor.numpy().dtype
        assert mapped[name].shape == tensor.numpy().shape
        assert mapped[name].tobytes() == tensor.numpy().tobytes()


def test_whole_lines_start_on_one(tmp_path: Path) -> None:
    """XLA uses a mapped array as it lies if it is aligned: the large ones are, others come last."""
    tensors = {
        "odd": ir.tensor(np.zeros(3, np.int8)),
        "large": ir.tensor(np.zeros((64, 3), np.float32)),
        "wide": ir.tensor(np.zeros(5, np.float64)),
        "half": ir.tensor(np.zeros(64, np.float16)),
    }
    weights.write(tensors, tmp_path / "w.safetensors")
    places = {n: t.offset or 0 for n, t in weights.read(tmp_path / "w.safetensors").items()}
    assert places["large"] % 64 == places["half"] % 64 == 0
    assert places["wide"] % 8 == 0
    assert max(places, key=lambda name: places[name]) == "odd"


def test_thousands_of_tensors_hold_one_file_open(tmp_path: Path) -> None:
    tensors = {f"w{i}": ir.tensor(np.full(16, i, np.int32)) for i in range(3000)}
    weights.write(tensors, tmp_path / "w.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    found = weights.arrays(tmp_path / "w.safetensors")
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert found["w2999"][0] == 2999


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    safe = pytest.importorskip("safetensors.numpy")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    int4 = np.array([-8, 7, 3], ml_dtypes.int4)
    tensors = {
        "a": ir.tensor(array),
        "b": ir.tensor(np.array([1.5], np.float16)),
        "q": ir.tensor(int4),
    }
    weights.write(tensors, tmp_path / "w.safetensors")
    found = safe.load_file(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(found["a"], array)
    assert found["b"].dtype == np.float16
    assert found["q"].tobytes() == tensors["q"].tobytes()


def test_external_data_is_copied(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.int16)
    (tmp_path / "data").write_bytes(b"head" + array.tobytes())
    tensor = ir.ExternalTensor(
        "data", 4, array.nbytes, ir.DataType.INT16, shape=ir.Shape([1000]), name="w",
        base_dir=tmp_path,
    )  # fmt: skip
    weights.write({"w": tensor}, tmp_path / "w.safetensors")
    (tmp_path / "data").unlink()
    np.testing.assert_array_equal(weights.read(tmp_path / "w.safetensors")["w"].numpy(), array)


def test_strings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="names: a weight made of strings"):
        weights.write(
            {"names": ir.StringTensor([b"x"], shape=ir.Shape([1]), name="names")}, tmp_path / "w"
        )


@pytest.mark.parametrize("kind", ["truncated", "header", "length", "empty", "outside"])
def test_damage_is_noticed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weights.write({"w": ir.tensor(np.zeros(100, np.float32))}, path)
    whole = path.read_bytes()
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [1 << 40, 4]}})
    path.write_bytes(
        {
            "truncated": whole[:-1],
            "header": whole[:8] + b"{" * 20 + whole[28:],
            "length": struct.pack("<Q", 1 << 60) + whole[8:],
            "empty": b"",
            "outside": struct.pack("<Q", len(header)) + header.encode(),
        }[kind]
    )
    with pytest.raises(BadInput, match="not a sound safetensors file"):
        weights.read(path)
