"""Reading and writing models: ONNX files (and checkpoint folders, through the builders in
``models``) to ``onnx_ir.Model`` and back, with the weights left where they are.

A loaded model maps its weights from the file; nothing here reads them all. What a file gets wrong
is repaired (`repair`) or refused (`checks`) before anything trusts it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import files, plugins
from trivium.compiler.checks import check, tensors
from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.repair import repair
from trivium.compiler.types import TensorInfo

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

OPSET = 24
"""The opset of normal form."""

_CHUNK = 8 << 20
_ALIGN = 4096
_PROTOBUF_LIMIT = 2 << 30
"""Bytes that no protobuf message reaches; reading a larger file would only fill the memory."""


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Load an ``.onnx`` file or a checkpoint folder, weights unread.

    Raises:
        BadInput: The file is absent, unreadable, damaged, or claims what it does not hold.
        Unsupported: The architecture of a checkpoint, or an operator, is unknown.
    """
    path = Path(path)
    if files.is_folder(path):
        return _load_checkpoint(path)
    _require_readable(path)
    proto = _read_proto(path)
    notes = repair(proto, str(path))
    model = _deserialize(proto, path)
    notes += check(model, path)
    if model.graph.name in (None, "", "main"):
        model.graph.name = path.stem
    note(model, notes)
    return model


def _read_proto(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, UnicodeDecodeError) as error:
        raise BadInput(
            "not an ONNX file, or a damaged one", about=str(path), remedy="export it again"
        ) from error
    if not proto.HasField("graph"):
        raise BadInput("it holds no graph", about=str(path), remedy="export it again")
    return proto


def _deserialize(proto: onnx.ModelProto, path: Path) -> ir.Model:
    import onnx_ir as ir

    try:
        model = ir.from_proto(proto)
    except RecursionError as error:
        raise BadInput("its graphs are nested too deeply", about=str(path)) from error
    except Exception as error:  # onnx_ir raises many kinds for what protobuf lets through
        root = error
        while root.__cause__ is not None:
            root = root.__cause__  # type: ignore[assignment]  # only Exceptions are chained here
        reason = str(root).strip().split("\n")[0] or type(root).__name__
        raise BadInput(f"malformed ONNX: {reason}", about=str(path)) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


_NOTES = "trivium.notes"


def note(model: ir.Model, notes: Iterable[str]) -> None:
    """Remember what a reader of this model's results should know; it goes into the manifest."""
    kept = dict.fromkeys([*model.meta.get(_NOTES, ()), *notes])
    if kept:
        model.meta[_NOTES] = tuple(kept)


def notes_of(model: ir.Model) -> tuple[str, ...]:
    """What was repaired or found doubtful while the model was loaded."""
    return tuple(model.meta.get(_NOTES, ()))


def _require_readable(path: Path) -> None:
    size = files.require_file(
        path, absent="no such model", remedy="give an .onnx file or a checkpoint folder"
    )
    if size == 0:
        raise BadInput("the file is empty", about=str(path), remedy="export it again")
    if size >= _PROTOBUF_LIMIT:
        raise BadInput(
            f"{size} bytes, where an .onnx file holds less than {_PROTOBUF_LIMIT}",
            about=str(path),
            remedy="export it with its weights as external data",
        )


def _load_checkpoint(folder: Path) -> ir.Model:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise BadInput(
            "a folder without config.json is not a checkpoint",
            about=str(folder),
            remedy="give an .onnx file, or a folder with config.json and *.safetensors",
        )
    config = files.read_json(config_path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadInput("names no model_type", about=str(config_path))
    model_type = config["model_type"]
    builders = plugins.names("trivium.models")
    if model_type not in builders:
        raise Unsupported(
            f"no builder for the architecture {model_type!r}",
            about=str(config_path),
            remedy=f"known: {', '.join(builders)}; or export the model to ONNX",
        )
    build: Callable[[Path], ir.Model] = plugins.get("trivium.models", model_type)
    return build(folder)


def signature(model: ir.Model) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Return the inputs (without initializers) and outputs of a model."""
    inputs = tuple(
        tensor_info(value)
        for value in model.graph.inputs
        if value.name not in model.graph.initializers
    )
    return inputs, tuple(tensor_info(value) for value in model.graph.outputs)


def tensor_info(value: ir.Value) -> TensorInfo:
    """Describe a value; a dimension without name or number is called ``?``."""
    dtype = value.dtype.name.lower() if value.dtype is not None else "unknown"
    dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)
    dims = (dim if isinstance(dim, int) else str(dim.value or "?") for dim in value.shape or ())
    return TensorInfo(value.name or "", dtype, tuple(dims))


def content_hash(path: str | os.PathLike[str], model: ir.Model | None = None) -> str:
    """Return the SHA-256 of a model: its file (or every file of its folder) and external data.

    Args:
        path: Where it was loaded from.
        model: As `load` returned it, before any pass; loaded again if it is not given.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".safetensors"))
    else:
        files = [path, *_external_files(path, model or load(path))]
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _external_files(path: Path, model: ir.Model) -> list[Path]:
    import onnx_ir as ir

    proto = _read_proto(path)
    repair(proto, str(path))
    model = _deserialize(proto, path)
    found = {
        path.parent / tensor.location
        for tensor in tensors(model)
        if isinstance(tensor, ir.ExternalTensor)
    }
    return sorted(found)


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external: bool | None = None,
    threshold: int = 1024,
) -> list[Path]:
    """Write a model, copying the weights one at a time; peak memory is that of the largest one.

    Args:
        model: Left as it is: its tensors still refer to where they came from.
        path: The ``.onnx`` file; external data goes beside it as ``<name>.data``.
        external: Whether weights go into a file of their own; by default if they exceed 64 MiB.
        threshold: Tensors below this many bytes stay inside the ``.onnx`` file.

    Returns:
        The files written.
    """
    import onnx_ir as ir

    path = Path(path)
    large = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and value.const_value.nbytes >= threshold
        and value.const_value.dtype != ir.DataType.STRING
    ]
    if external is None:
        external = sum(v.const_value.nbytes for v in large if v.const_value) > 64 << 20
    if not external:
        ir.save(_inlined(model), path)
        return [path]
    data = path.with_name(path.name + ".data")
    # Small ones that lie in a file would be looked for beside the new one.
    small = [
        value
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor) and value not in large
    ]
    kept = {value: value.const_value for value in (*large, *small)}
    try:
        for value in small:
            tensor = value.const_value
            assert tensor is not None
            value.const_value = ir.tensor(tensor.numpy().copy(), tensor.dtype, name=value.name)
        with data.open("wb") as stream:
            for value in large:
                tensor = value.const_value
                assert tensor is not None
                stream.write(b"\0" * (-stream.tell() % _ALIGN))
                offset = stream.tell()
                copy_tensor(tensor, stream)
                value.const_value = ir.ExternalTensor(
                    data.name,
                    offset,
                    stream.tell() - offset,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                    base_dir=path.parent,
                )
        ir.save(model, path)
    finally:
        for value, tensor in kept.items():
            value.const_value = tensor
    return [path, data]


def _inlined(model: ir.Model) -> ir.Model:
    """A model whose initializers are all in memory, for a file that stands alone."""
    import onnx_ir as ir

    if not any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors(model)):
        return model
    copy = model.clone()
    for graph in copy.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                # Copied, for the map cannot be closed while anything else looks at it.
                value.const_value = ir.tensor(tensor.numpy().copy(), tensor.dtype, name=value.name)
    return copy


def copy_tensor(tensor: ir.TensorProtocol, stream: object) -> None:
    """Write the bytes of a tensor to a binary file; one that lies in a file is copied in pieces."""
    import onnx_ir as ir

    if isinstance(tensor, ir.ExternalTensor):
        # Read, not mapped: the pages of a map count towards this process until it is unmapped.
        with open(tensor.path, "rb") as source:
            source.seek(tensor.offset or 0)
            left = tensor.nbytes
            while left:
                chunk = source.read(min(_CHUNK, left))
                if not chunk:
                    raise BadInput(
                        "the weights file ends early",
                        about=str(tensor.path),
                        remedy="copy it again",
                    )
                stream.write(chunk)  # type: ignore[attr-defined]
                left -= len(chunk)
        return
    tensor.tofile(stream)  # type: ignore[attr-defined]


def save_whole(model: ir.Model, path: Path) -> list[Path]:
    """Write a model under temporary names and move it into place: never half of it.

    Raises:
        BackendFailed: The disk is full.
        BadInput: It cannot be written there.
    """
    with files.replacing(path) as folder:
        written = save(model, folder / path.name)
    return [path.with_name(file.name) for file in written]


def describe(model: ir.Model) -> dict[str, Any]:
    """Count what a model holds: opsets, signature, parameters, operators (most frequent first)."""
    inputs, outputs = signature(model)
    operators = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in model.graph.all_nodes()
    )
    weights = [
        value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    ]
    return {
        "opsets": dict(model.opset_imports),
        "inputs": [asdict(info) for info in inputs],
        "outputs": [asdict(info) for info in outputs],
        "parameters": sum(tensor.size for tensor in weights),
        "weights_bytes": sum(tensor.nbytes for tensor in weights),
        "operators": dict(operators.most_common()),
    }
