"""The weights of an artifact in one safetensors file, written and read one tensor at a time.

The format is the public one (an 8-byte length, a JSON header, then the bytes of the tensors
without gaps), so any safetensors reader opens the file. Types that the format does not know
(int4, the rarer float8s) are stored as the packed bytes that ONNX gives them, as ``U8``, and the
header's metadata says what they are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.model import copy_tensor

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

_PACKED = "trivium.packed"
"""Key of the metadata: JSON of name -> [ONNX dtype, shape] for tensors stored as bytes."""

_LINE = 64
"""Bytes that XLA aligns its buffers to: it uses a mapped array that is aligned so as it lies."""

_HEADER_LIMIT = 100 << 20
"""The format's own limit on the header, so that a damaged length is not believed."""

_TAGS = {
    "BOOL": "BOOL",
    "INT8": "I8",
    "INT16": "I16",
    "INT32": "I32",
    "INT64": "I64",
    "UINT8": "U8",
    "UINT16": "U16",
    "UINT32": "U32",
    "UINT64": "U64",
    "FLOAT16": "F16",
    "BFLOAT16": "BF16",
    "FLOAT": "F32",
    "DOUBLE": "F64",
    "FLOAT8E4M3FN": "F8_E4M3",
    "FLOAT8E5M2": "F8_E5M2",
}
_NAMES = {tag: name for name, tag in _TAGS.items()}


def write(tensors: Mapping[str, ir.TensorProtocol], path: Path) -> int:
    """Write tensors to a new file; peak memory is that of the largest one.

    Returns:
        How many bytes the tensors take, without the header.

    Raises:
        Unsupported: A tensor of strings.
    """
    header: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    position = 0
    for name, tensor in tensors.items():
        if tensor.dtype.name == "STRING":
            raise Unsupported("a weight made of strings cannot be stored", about=name)
    # The format has no gaps: what fills whole lines comes first, so that it starts on one too,
    # then the rest, the widest elements first, so that all are aligned to themselves.
    order = sorted(
        tensors,
        key=lambda name: (tensors[name].nbytes % _LINE != 0, -tensors[name].dtype.bitwidth, name),
    )
    for name in order:
        tensor = tensors[name]
        kind, shape = tensor.dtype.name, [int(dim) for dim in tensor.shape.numpy()]
        if kind not in _TAGS:
            packed[name] = [kind, shape]
        header[name] = {
            "dtype": _TAGS.get(kind, "U8"),
            "shape": shape if kind in _TAGS else [tensor.nbytes],
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    if packed:
        header["__metadata__"] = {_PACKED: json.dumps(packed)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _LINE)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for name in order:
            copy_tensor(tensors[name], stream)
    return position


def read(path: Path) -> dict[str, ir.ExternalTensor]:
    """Return the tensors of a file, mapped: no byte is read before it is asked for.

    Raises:
        BadInput: Not a safetensors file, or one whose header promises what it does not hold.
    """
    import onnx_ir as ir

    try:
        header, start = _header(path)
        size = path.stat().st_size - start
        packed = json.loads(header.pop("__metadata__", {}).get(_PACKED, "{}"))
        found = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            kind, shape = packed.get(name) or [_NAMES[entry["dtype"]], entry["shape"]]
            tensor = ir.ExternalTensor(
                path.name,
                start + first,
                last - first,
                ir.DataType[kind],
                shape=ir.Shape(shape),
                name=name,
                base_dir=path.parent,
            )
            if not 0 <= first <= last <= size or tensor.nbytes != last - first:
                raise ValueError(f"the place of {name!r} lies outside of the file")
            found[name] = tensor
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BadInput(
            f"not a sound safetensors file ({error})",
            about=str(path),
            remedy="compile the model again",
        ) from error
    return found


def arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors of a file as arrays over one map of it; only packed ones are copied.

    Raises:
        BadInput: As `read`.
    """
    import numpy as np

    stored = read(path)
    # One map for all: each ExternalTensor would hold a file open, and there may be thousands.
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    found = {}
    for name, tensor in stored.items():
        if tensor.dtype.bitwidth % 8:
            found[name] = tensor.numpy()
            tensor.release()
            continue
        first = tensor.offset or 0
        flat = data[first : first + tensor.nbytes].view(tensor.dtype.numpy())
        found[name] = flat.reshape(tuple(tensor.shape.numpy()))
    return found


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and the position of the first tensor's bytes."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(_HEADER_LIMIT, path.stat().st_size):
            raise ValueError(f"a header of {length} bytes")
        return json.loads(stream.read(length)), 8 + length
