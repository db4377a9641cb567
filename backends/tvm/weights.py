"""The weights of an artifact: one file of raw tensors, mapped when it is loaded.

The index (name, dtype, shape, offset) is in the manifest. Tensors lie at multiples of 64 bytes,
which is what TVM asks of memory that it did not allocate itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trivium.compiler.samples import numpy_dtype

FILE = "weights.bin"
ALIGNMENT = 64


def write(model: ir.Model, names: Iterable[str], folder: Path) -> list[dict[str, Any]]:
    """Write initializers one at a time; return the index in the given order."""
    index = []
    with (folder / FILE).open("wb") as stream:
        for name in names:
            tensor = model.graph.initializers[name].const_value
            assert tensor is not None
            stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
            dtype = {"float": "float32", "double": "float64"}.get(
                tensor.dtype.name.lower(), tensor.dtype.name.lower()
            )
            index.append(
                {
                    "name": name,
                    "dtype": dtype,
                    "shape": list(tensor.shape.numpy()),
                    "offset": stream.tell(),
                }
            )
            stream.write(tensor.tobytes())
    return index


def read(folder: Path, index: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Map the weights into TVM tensors, in the order of the index."""
    import numpy as np
    import tvm

    if not index:
        return []
    # Copy-on-write only because DLPack lets no read-only memory through; nothing writes.
    raw = np.memmap(folder / FILE, dtype=np.uint8, mode="c")
    tensors = []
    for entry in index:
        dtype, shape = numpy_dtype(entry["dtype"]), tuple(entry["shape"])
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        array = raw[entry["offset"] : entry["offset"] + size].view(dtype).reshape(shape)
        if dtype.kind in "fiub" and size and array.ndim:
            tensors.append(tvm.runtime.from_dlpack(np.asarray(array)))
        else:
            # numpy cannot lend out the types of ml_dtypes.
            tensors.append(tvm.runtime.tensor(np.asarray(array)))
    return tensors
