"""The safetensors format, read without its package: where each tensor of a checkpoint lies.

A file is an 8-byte little-endian length, a JSON header of that length, and the data; a large
checkpoint is several such files and an index that says which tensor is in which. Only headers are
read here, and nothing that they claim is believed before it is checked against the file. Format:
https://huggingface.co/docs/safetensors (checked with safetensors 0.8).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import onnx_ir as ir

from trivium.compiler import files
from trivium.compiler.errors import BadInput

if TYPE_CHECKING:
    import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: Mapping[str, ir.DataType] = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
}
"""What a header calls a dtype; others may be in a file but cannot be used from it."""

MAX_HEADER = 100 << 20
"""The format's own limit on the header, in bytes."""

_BLOCK = 8 << 20


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``length`` bytes at ``offset`` of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read_folder(folder: Path) -> dict[str, Entry]:
    """Return every tensor of a checkpoint folder, one file or sharded, by name.

    Raises:
        BadInput: No safetensors, a missing shard, or a damaged file.
    """
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    raise BadInput(
        f"neither {SINGLE} nor {INDEX} is there",
        about=str(folder),
        remedy="save the checkpoint with safe_serialization=True",
    )


def _read_shards(folder: Path) -> dict[str, Entry]:
    index = folder / INDEX
    files.require_file(index)
    weight_map = _json(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput("holds no weight_map", about=str(index), remedy="download it again")
    shards: dict[str, dict[str, Entry]] = {}
    entries = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise BadInput(
                f"the shard {file!r} of {name!r} is not a file of this folder", about=str(index)
            )
        if file not in shards:
            if not (folder / file).is_file():
                raise BadInput(
                    f"the shard {file!r} is missing", about=str(folder), remedy="download it again"
                )
            shards[file] = read_header(folder / file)
        if name not in shards[file]:
            raise BadInput(
                f"the index puts {name!r} into it, but it is not there", about=str(folder / file)
            )
        entries[name] = shards[file][name]
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of one file by name, every range checked against the file's size.

    Raises:
        BadInput: Truncated, not safetensors, or a header that contradicts itself.
    """
    files.require_file(path)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise BadInput(
                    f"not a safetensors file, or a truncated one: a header of {length} bytes "
                    f"in a file of {size}",
                    about=str(path),
                    remedy="download it again",
                )
            header = _json(stream.read(length), path)
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})", about=str(path)) from error
    start = 8 + length
    return {
        name: _entry(path, name, fields, start, size)
        for name, fields in header.items()
        if name != "__metadata__"
    }


def _json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"its JSON is damaged ({error})", about=str(path)) from error
    if not isinstance(document, dict):
        raise BadInput("its JSON is not an object", about=str(path))
    return document


def _entry(path: Path, name: str, fields: Any, start: int, size: int) -> Entry:
    about = f"{path}: tensor {name!r}"
    try:
        dtype, shape = fields["dtype"], fields["shape"]
        begin, end = fields["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise BadInput("lacks dtype, shape or data_offsets", about=about) from error
    if (
        not isinstance(dtype, str)
        or any(type(n) is not int or n < 0 for n in numbers)
        or begin > end
    ):
        raise BadInput(f"dtype {dtype!r}, shape {shape}, data at {begin}:{end}", about=about)
    if start + end > size:
        raise BadInput(
            f"its data ends at byte {start + end} of a file of {size}",
            about=about,
            remedy="the file is truncated; download it again",
        )
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise BadInput(f"{end - begin} bytes of data for {dtype} {list(shape)}", about=about)
    return Entry(path, dtype, tuple(shape), start + begin, end - begin)


def as_float32(entry: Entry, name: str, *, transpose: bool = False) -> ir.TensorProtocol:
    """Map a stored float tensor as float32, optionally with its two axes swapped.

    What is float32 already stays an ``ir.ExternalTensor`` into the checkpoint; the rest is a
    `ConvertedTensor`. Either way nothing is read before its content is asked for.
    """
    # onnx_ir reads an empty ExternalTensor only once.
    if entry.dtype == "F32" and not transpose and entry.length:
        return ir.ExternalTensor(
            entry.file.name,
            entry.offset,
            entry.length,
            ir.DataType.FLOAT,
            shape=ir.Shape(entry.shape),
            name=name,
            base_dir=entry.file.parent,
        )
    return ConvertedTensor(entry, name, transpose=transpose)


class ConvertedTensor(ir.LazyTensor):
    """A stored tensor as float32 (and transposed), converted each time that it is read.

    Engines compute in float32 on the CPU whatever the checkpoint's dtype, and a linear layer is
    stored as [out, in] where MatMul takes [in, out]. Converting on reading keeps the weights
    constants of the graph without holding a second copy of them; `tofile` holds one block.
    """

    __slots__ = ("_entry", "_transpose")

    def __init__(self, entry: Entry, name: str, *, transpose: bool = False) -> None:
        shape = ir.Shape(entry.shape[::-1] if transpose else entry.shape)
        super().__init__(self._read, ir.DataType.FLOAT, shape, name=name)
        self._entry = entry
        self._transpose = transpose

    def _read(self) -> ir.TensorProtocol:
        import numpy as np

        return ir.Tensor(np.array(self._mapped(), dtype=np.float32, order="C"), name=self.name)

    def tofile(self, file: BinaryIO) -> None:
        for piece in self.pieces(_BLOCK):
            file.write(piece)

    def pieces(self, size: int) -> Iterator[bytes]:
        """Convert and return whole rows, about ``size`` bytes at a time."""
        import numpy as np

        if not self._transpose and len(self._entry.shape) > 1:
            stripes, count = self.stripes(), self._entry.shape[0]
            step = max(1, size // max(4 * math.prod(self._entry.shape[1:]), 1))
            for first in range(0, count, step):
                yield stripes.stripe(first, min(first + step, count)).tobytes()
            return
        mapped = self._mapped()
        rows = mapped.reshape(1) if mapped.ndim == 0 else mapped
        step = max(1, size // max(4 * math.prod(rows.shape[1:]), 1))
        for first in range(0, rows.shape[0], step):
            if self._transpose:
                yield self._turned(mapped, first, first + step).tobytes()
            else:
                yield np.array(rows[first : first + step], dtype=np.float32, order="C").tobytes()

    def _turned(self, mapped: np.ndarray[Any, Any], first: int, last: int) -> np.ndarray[Any, Any]:
        """Some rows of the transposed matrix, gathered band by band of the file's rows.

        Pages that were read are given back at once: they would count towards this process.
        """
        import mmap

        import numpy as np

        part = mapped[first:last]
        turned = np.empty(part.shape, np.float32)
        band = max(1, _BLOCK // max(self._entry.length // max(part.shape[1], 1), 1))
        pages = getattr(mapped, "_mmap", None)
        for start in range(0, part.shape[1], band):
            turned[:, start : start + band] = np.ascontiguousarray(
                part[:, start : start + band].T
            ).T
            if pages is not None:
                pages.madvise(mmap.MADV_DONTNEED)
        return turned

    def stripes(self) -> Stripes:
        """The matrix in stripes along the axis in which it lies in the file."""
        return Stripes(self._entry, 1 if self._transpose else 0)

    def _mapped(self) -> np.ndarray[Any, Any]:
        """The stored form, mapped from the file, in the shape of this tensor."""
        import numpy as np

        entry = self._entry
        if entry.length == 0:
            return np.zeros(tuple(self.shape.numpy()), np.float32)
        try:
            stored = np.memmap(
                entry.file, DTYPES[entry.dtype].numpy(), "r", entry.offset, entry.shape
            )
        except (OSError, ValueError) as error:
            raise BadInput(
                f"its weights can no longer be read ({error})", about=str(entry.file)
            ) from error
        return stored.T if self._transpose else stored


class Stripes:
    """A stored matrix that is read some rows of the file at a time, as float32.

    Read, not mapped: the pages of a map count towards this process until it is unmapped.
    """

    def __init__(self, entry: Entry, lies_along: int) -> None:
        self._entry = entry
        self.lies_along = lies_along

    def stripe(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        import numpy as np

        entry = self._entry
        kind, columns = DTYPES[entry.dtype].numpy(), math.prod(entry.shape[1:])
        # bfloat16 is the upper half of a float32, which is quicker to make than to convert.
        half = entry.dtype == "BF16"
        stored = np.fromfile(
            entry.file,
            np.uint16 if half else kind,
            count=(stop - start) * columns,
            offset=entry.offset + start * columns * kind.itemsize,
        )
        if stored.size != (stop - start) * columns:
            raise BadInput("its weights end early", about=str(entry.file))
        if half:
            wide = stored.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32).reshape(stop - start, columns)
        return stored.astype(np.float32).reshape(stop - start, columns)
