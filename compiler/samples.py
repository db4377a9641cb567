"""Feeds for a model: the user's own (.npz), or seeded ones that respect what the graph says.

Random integers are useless to most models: a token must be below the size of the table that it
indexes, a mask is ones, a sampling rate is one of the constants that it is compared with. The
graph says all of this, and `seeded` reads it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import files
from trivium.compiler.errors import BadInput
from trivium.compiler.types import TensorInfo, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

Array = "np.ndarray[Any, Any]"

DEFAULT_DIM = 8
"""What a symbolic dimension other than the first becomes when nobody bound it."""

OTHER_DIMS = (4, 1, 64, 512)
"""What to try next where a model cannot digest that: a table of positions may be shorter, a window
longer."""


def read_npz(path: str | os.PathLike[str], inputs: Sequence[TensorInfo]) -> list[dict[str, Any]]:
    """Read feeds from an ``.npz``: one array for each input, the samples along the first axis.

    A batch longer than the model's own is cut into feeds; a model with one input also takes an
    array called ``x``.

    Raises:
        BadInput: Wrong names, dtypes or shapes, NaN, an empty file, or no .npz at all.
    """
    import numpy as np

    path = Path(path)
    files.require_file(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise BadInput("not a readable .npz file", about=str(path)) from error
    except Exception as error:  # zipfile and zlib raise their own kinds for damaged archives
        raise BadInput(f"not a readable .npz file ({error})", about=str(path)) from error
    if len(inputs) == 1 and inputs[0].name not in arrays and "x" in arrays:
        arrays = {inputs[0].name: arrays["x"]}
    missing = [info.name for info in inputs if info.name not in arrays]
    if missing:
        raise BadInput(
            f"has no array for the input {missing[0]!r}",
            about=str(path),
            remedy=f"it holds: {', '.join(arrays) or 'nothing'}",
        )
    return _feeds({info.name: arrays[info.name] for info in inputs}, inputs, str(path))


def _feeds(
    arrays: Mapping[str, Any], inputs: Sequence[TensorInfo], about: str
) -> list[dict[str, Any]]:
    import numpy as np

    counts = []
    checked = {}
    for info in inputs:
        array = conform(arrays[info.name], info, about=about, batched=True)
        if array.size == 0:
            raise BadInput(f"the array {info.name!r} is empty", about=about)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadInput(f"the array {info.name!r} holds NaN or infinity", about=about)
        checked[info.name] = array
        if array.ndim == len(info.shape) and info.shape:
            first = info.shape[0]
            counts.append(array.shape[0] // first if isinstance(first, int) and first else 1)
    count = min(counts, default=1)
    feeds = []
    for index in range(max(count, 1)):
        feed = {}
        for info in inputs:
            array = checked[info.name]
            step = info.shape[0] if info.shape else None
            if isinstance(step, int) and array.shape[0] > step:
                array = array[index * step : (index + 1) * step]
            feed[info.name] = array
        feeds.append(feed)
    return feeds


def conform_feeds(
    feeds: Mapping[str, Any], inputs: Sequence[TensorInfo], *, about: str = "run"
) -> dict[str, Any]:
    """Return what every executable runs on: an array for each input, in its dtype and shape.

    Arrays that no input is called after are left out.

    Raises:
        BadInput: One is missing or does not fit; the message names it.
    """
    if not isinstance(feeds, Mapping):
        raise BadInput(
            f"a {type(feeds).__name__} of feeds",
            about=about,
            remedy="give a dict of arrays by name",
        )
    for info in inputs:
        if info.name not in feeds:
            raise BadInput(
                f"the input {info.name!r} is missing",
                about=about,
                remedy=f"given: {', '.join(map(str, feeds)) or 'nothing'}",
            )
    return {info.name: conform(feeds[info.name], info, about=about) for info in inputs}


def conform(array: Any, info: TensorInfo, *, about: str, batched: bool = False) -> Any:
    """Return ``array`` in the dtype of an input, or raise ``BadInput`` naming what differs.

    Args:
        batched: Whether the first axis may hold several of the model's own batches.
    """
    import numpy as np

    try:
        array = np.asarray(array)
    except ValueError as error:
        raise BadInput(f"{info.name!r} is no array ({error})", about=about) from error
    wanted = numpy_dtype(info.dtype)
    if array.dtype != wanted:
        if not (_castable(array, wanted)):
            raise BadInput(
                f"{info.name!r} is {array.dtype}, the model takes {info.dtype}", about=about
            )
        array = array.astype(wanted)
    if array.ndim != len(info.shape):
        raise BadInput(
            f"{info.name!r} has shape {list(array.shape)}, the model takes {list(info.shape)}",
            about=about,
        )
    for axis, (have, want) in enumerate(zip(array.shape, info.shape, strict=True)):
        if not isinstance(want, int) or have == want:
            continue
        if axis == 0 and batched and want and have % want == 0:
            continue
        raise BadInput(
            f"{info.name!r} has shape {list(array.shape)}, the model takes {list(info.shape)}",
            about=about,
        )
    return array


def _castable(array: Any, wanted: Any) -> bool:
    """Whether values survive: integers may widen, integers may become floats, floats may narrow."""
    import numpy as np

    if array.dtype.kind in "iub" and wanted.kind in "iu":
        info = np.iinfo(wanted)
        return array.size == 0 or bool(array.min() >= info.min and array.max() <= info.max)
    return bool(array.dtype.kind in "iubf" and wanted.kind not in "iubSUO")


def numpy_dtype(name: str) -> Any:
    """The numpy dtype of an ONNX dtype name (bfloat16, float8 and int4 through ml_dtypes)."""
    import numpy as np

    if name == "string":
        return np.dtype(object)
    if hasattr(np, name):
        return np.dtype(getattr(np, name))
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


def bound_shape(
    info: TensorInfo, workload: Workload, defaults: Mapping[str, int] | None = None
) -> tuple[int, ...]:
    """The shape of an input, symbolic dimensions from the workload or by default.

    Args:
        defaults: What `default_dims` chose for all inputs together; without it the input is
            taken for the model's only one.
    """
    if info.name in workload.shapes:
        return workload.shapes[info.name]
    known = default_dims([info], workload) if defaults is None else defaults
    shape = []
    for axis, dim in enumerate(info.shape):
        if isinstance(dim, int):
            shape.append(dim)
        else:
            shape.append(known.get(dim, workload.batch if axis == 0 else DEFAULT_DIM))
    return tuple(shape)


def default_dims(
    inputs: Sequence[TensorInfo], workload: Workload, size: int = DEFAULT_DIM
) -> dict[str, int]:
    """Choose a size for every symbolic dimension, the same wherever it occurs.

    What leads any input is the batch; a total is the sum of what it is the total of
    (``past_len + len``, or ``total_len`` beside ``past_len`` and ``len``); the rest is ``size``.
    """
    symbols = {dim: None for info in inputs for dim in info.shape if isinstance(dim, str)}
    leading = {info.shape[0] for info in inputs if info.shape}
    dims = dict(workload.dims)
    for symbol in symbols:
        if symbol != "?" and not _parts(symbol, symbols):
            dims.setdefault(symbol, workload.batch if symbol in leading else size)
    for symbol in symbols:
        if parts := _parts(symbol, symbols):
            total = sum(int(part) if part.isdigit() else dims.get(part, size) for part in parts)
            dims.setdefault(symbol, total)
    return dims


def _parts(symbol: str, symbols: Mapping[str, None]) -> list[str]:
    """The dimensions that one is the sum of, by its name; none if it stands for itself."""
    if "+" in symbol:
        return [part.strip() for part in symbol.split("+")]
    for prefix in ("total_", "all_", "kv_"):
        rest = symbol.removeprefix(prefix)
        if rest != symbol and rest in symbols and f"past_{rest}" in symbols:
            return [rest, f"past_{rest}"]
    return []


def seeded(
    model: ir.Model,
    workload: Workload,
    *,
    count: int = 1,
    seed: int = 0,
    size: int = DEFAULT_DIM,
) -> list[dict[str, Any]]:
    """Make feeds that a model can digest, the same for the same seed.

    Floats are standard normal; integers follow what the graph does with them. ``size`` is what
    unbound dimensions other than the batch become.
    """
    import numpy as np

    from trivium.compiler.model import signature

    values = {value.name: value for value in model.graph.inputs}
    inputs = signature(model)[0]
    defaults = default_dims(inputs, workload, size)
    feeds = []
    for index in range(count):
        feed = {}
        for info in inputs:
            # A generator for each input: adding one does not change the others.
            key = hashlib.sha256(f"{seed}/{index}/{info.name}".encode()).digest()
            rng = np.random.default_rng(int.from_bytes(key[:8], "little"))
            shape = bound_shape(info, workload, defaults)
            feed[info.name] = _draw(rng, info, shape, values[info.name])
        feeds.append(feed)
    return feeds


def _draw(rng: Any, info: TensorInfo, shape: tuple[int, ...], value: ir.Value) -> Any:
    import numpy as np

    dtype = numpy_dtype(info.dtype)
    if dtype.kind == "b":
        return np.ones(shape, dtype)
    if dtype.kind in "iu":
        constants, limit = _integer_range(value)
        if constants:
            return np.full(shape, constants[0], dtype)
        if limit is not None:
            return rng.integers(0, limit, shape).astype(dtype)
        if dtype.itemsize == 1 and info.dtype in ("int8", "uint8"):
            bounds = np.iinfo(dtype)
            return rng.integers(bounds.min, bounds.max + 1, shape).astype(dtype)
        return np.ones(shape, dtype)
    if dtype == np.dtype(object):
        return np.full(shape, "", dtype)
    return rng.standard_normal(shape).astype(dtype)


def _integer_range(value: ir.Value) -> tuple[list[int], int | None]:
    """What the readers of an integer say of it: constants it is compared with, or table size."""
    from trivium.compiler import passing

    constants: list[int] = []
    limit: int | None = None
    front, seen = [value], set()
    while front:
        current = front.pop()
        if current in seen:
            continue
        seen.add(current)
        for node, index in current.uses():
            if node.op_type == "Gather" and index == 1:
                table = node.inputs[0]
                shape = passing.dims(table)
                axis = passing.attribute(node, "axis", 0)
                if shape and passing.is_constant(table) and shape[axis] is not None:
                    limit = min(limit or shape[axis], shape[axis])
            elif node.op_type == "Equal":
                other = passing.constant(node.inputs[1 - index])
                if other is not None and other.size and int(other.flat[0]) > 1:
                    constants.append(int(other.flat[0]))
            elif node.op_type == "OneHot" and index == 0:
                depth = passing.constant(node.inputs[1])
                if depth is not None:
                    limit = int(depth.flat[0])
            elif node.op_type in ("Cast", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Slice"):
                front.append(node.outputs[0])
    return constants, limit


def digest(feeds: Sequence[Mapping[str, Any]]) -> str:
    """The SHA-256 of feeds, to say in a manifest which data was used."""
    import numpy as np

    total = hashlib.sha256()
    for feed in feeds:
        for name in sorted(feed):
            total.update(name.encode() + b"\0" + np.ascontiguousarray(feed[name]).tobytes())
    return total.hexdigest()
