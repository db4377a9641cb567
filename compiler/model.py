"""Reading and writing models: ONNX files (and checkpoint folders, through the builders in
``models``) to ``onnx_ir.Model`` and back, with the weights left where they are.

A loaded model maps its weights from the file; nothing here reads them all. What an ONNX file may
say about itself (external data, sizes, dimensions) is checked before anything trusts it, because
engines differ in what they accept and some crash instead of refusing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import plugins
from trivium.compiler.errors import BackendFailed, BadInput, Unsupported
from trivium.compiler.types import TensorInfo

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 24
"""The opset of normal form."""

MAX_BYTES = 1 << 46
"""No tensor is believed that claims more than this (64 TiB)."""

_CHUNK = 8 << 20
_ALIGN = 4096


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Load an ``.onnx`` file or a checkpoint folder, weights unread.

    Raises:
        BadInput: The file is absent, unreadable, damaged, or claims what it does not hold.
        Unsupported: The architecture of a checkpoint, or an operator, is unknown.
    """
    path = Path(path)
    if path.is_dir():
        return _load_checkpoint(path)
    _require_readable(path)
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    try:
        model = ir.load(path)
    except (DecodeError, UnicodeDecodeError) as error:
        raise BadInput(
            "not an ONNX file, or a damaged one", about=str(path), remedy="export it again"
        ) from error
    except RecursionError as error:
        raise BadInput("its graphs are nested too deeply", about=str(path)) from error
    except Exception as error:  # onnx_ir raises many kinds for what protobuf lets through
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise BadInput(f"malformed ONNX: {reason}", about=str(path)) from error
    check(model, path)
    if not model.graph.name:
        model.graph.name = path.stem
    return model


def _require_readable(path: Path) -> None:
    if not path.exists():
        raise BadInput(
            "no such model", about=str(path), remedy="give an .onnx file or a checkpoint folder"
        )
    if not os.access(path, os.R_OK):
        raise BadInput("cannot be read (permission denied)", about=str(path))
    if path.stat().st_size == 0:
        raise BadInput("the file is empty", about=str(path), remedy="export it again")


def _load_checkpoint(folder: Path) -> ir.Model:
    import json

    config_path = folder / "config.json"
    if not config_path.is_file():
        raise BadInput(
            "a folder without config.json is not a checkpoint",
            about=str(folder),
            remedy="give an .onnx file, or a folder with config.json and *.safetensors",
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        model_type = str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"config.json is unreadable or names no model_type ({error})", about=str(folder)
        ) from error
    builders = plugins.names("trivium.models")
    if model_type not in builders:
        raise Unsupported(
            f"no builder for the architecture {model_type!r}",
            about=str(config_path),
            remedy=f"known: {', '.join(builders)}; or export the model to ONNX",
        )
    build: Callable[[Path], ir.Model] = plugins.get("trivium.models", model_type)
    return build(folder)


def check(model: ir.Model, path: Path) -> None:
    """Raise ``BadInput`` unless the model is sound enough to hand to an engine.

    Raises:
        Unsupported: Operators of the standard domain that no opset has; all of them at once.
    """
    _check_opsets(model, path)
    _check_tensors(model, path)
    _check_structure(model, path)
    _check_protobuf(model, path)


def _check_opsets(model: ir.Model, path: Path) -> None:
    import onnx.defs

    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    newest = onnx.defs.onnx_opset_version()
    if version is None:
        if any(node.domain in ("", "ai.onnx") for node in model.graph):
            raise BadInput(
                "the model imports no opset of the standard domain",
                about=str(path),
                remedy="export it again with opset_import set",
            )
        return
    if not 1 <= version <= newest:
        raise BadInput(
            f"opset {version} is not known to the installed onnx (newest {newest})",
            about=str(path),
            remedy="export it with an older opset or update onnx",
        )


def _check_tensors(model: ir.Model, path: Path) -> None:
    import onnx_ir as ir

    base = path.parent.resolve()
    for tensor in _tensors(model):
        about = f"{path}: tensor {tensor.name!r}"
        count = 1
        for dim in tensor.shape:
            if not isinstance(dim, int) or dim < 0:
                raise BadInput(f"dimension {dim} of a stored tensor", about=about)
            count *= dim
        if count * tensor.dtype.itemsize > MAX_BYTES:
            raise BadInput(f"claims {count} elements, which no file can hold", about=about)
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(tensor, base, about)
        elif isinstance(tensor, ir.TensorProtoTensor):
            _check_inline(tensor, about)


def _check_external(tensor: ir.ExternalTensor, base: Path, about: str) -> None:
    location = Path(tensor.location)
    resolved = (base / location).resolve()
    if location.is_absolute() or not resolved.is_relative_to(base):
        raise BadInput(
            f"external data {str(location)!r} lies outside of the model's folder", about=about
        )
    if not resolved.is_file():
        raise BadInput(
            f"external data file {str(location)!r} is absent",
            about=about,
            remedy="put it beside the model",
        )
    offset, length = tensor.offset or 0, tensor.length
    size = resolved.stat().st_size
    if offset < 0 or (length is not None and length < 0):
        raise BadInput(f"external data at offset {offset}, length {length}", about=about)
    if length is not None and length < tensor.nbytes:
        raise BadInput(f"{length} bytes of external data for {tensor.nbytes}", about=about)
    if offset + tensor.nbytes > size:
        raise BadInput(
            f"external data ends at byte {offset + tensor.nbytes} of a file of {size}",
            about=about,
            remedy="the file is truncated; copy it again",
        )


def _check_inline(tensor: ir.TensorProtoTensor, about: str) -> None:
    proto = tensor.raw
    if proto.HasField("raw_data") and len(proto.raw_data) != tensor.nbytes:
        raise BadInput(
            f"{len(proto.raw_data)} bytes of data where its shape needs {tensor.nbytes}",
            about=about,
        )


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every stored tensor: initializers of all graphs, and tensor attributes."""
    import onnx_ir as ir

    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for node in model.graph.all_nodes():
        for attr in node.attributes.values():
            if isinstance(attr, ir.Attr) and attr.type == ir.AttributeType.TENSOR:
                yield attr.as_tensor()


def _check_structure(model: ir.Model, path: Path) -> None:
    """Values defined before use, named once; operators of the standard domain that exist."""
    unknown = []
    import onnx.defs

    opset = model.opset_imports.get("", 1)
    functions = {key[:2] for key in model.functions}
    for graph in model.graphs():
        seen: set[str] = set()
        for node in graph:
            for output in node.outputs:
                if output.name and output.name in seen:
                    raise BadInput(
                        f"the value {output.name!r} is defined twice",
                        about=f"{path}: node {node.name or node.op_type!r}",
                    )
                seen.add(output.name or "")
            if node.domain not in ("", "ai.onnx") or (node.domain, node.op_type) in functions:
                continue
            try:
                onnx.defs.get_schema(node.op_type, opset, "")
            except onnx.defs.SchemaError:
                unknown.append(f"{node.name or '(unnamed)'}: no operator {node.op_type!r}")
    if unknown:
        raise Unsupported(
            f"{len(unknown)} operators that opset {opset} does not have: {'; '.join(unknown[:5])}",
            about=str(path),
            remedy="export with standard operators",
            refusals=unknown,
        )


def _check_protobuf(model: ir.Model, path: Path) -> None:
    """onnx's own checker and strict inference, for what only they know (types, shapes, cycles)."""
    from trivium.compiler.onnx_api import check_model

    problem = check_model(model)
    if problem is not None:
        raise BadInput(problem, about=str(path))


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


def content_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a model: its file (or every file of its folder) and external data."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
    else:
        files = [path, *_external_files(path)]
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _external_files(path: Path) -> list[Path]:
    import onnx_ir as ir

    found = {
        (path.parent / tensor.location)
        for tensor in _tensors(ir.load(path))
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
    kept = {value: value.const_value for value in large}
    try:
        with data.open("wb") as stream:
            for value in large:
                tensor = value.const_value
                assert tensor is not None
                stream.write(b"\0" * (-stream.tell() % _ALIGN))
                offset = stream.tell()
                _copy_tensor(tensor, stream)
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

    if not any(isinstance(tensor, ir.ExternalTensor) for tensor in _tensors(model)):
        return model
    copy = model.clone()
    ir.external_data.load_to_model(copy)
    return copy


def _copy_tensor(tensor: ir.TensorProtocol, stream: object) -> None:
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
    """
    staging = path.with_name(f".{path.name}.partial")
    try:
        staging.mkdir()
        written = save(model, staging / path.name)
        for file in reversed(written):
            os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise BackendFailed(
            f"cannot be written ({error.strerror})", about=str(path), remedy="nothing was left"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
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
