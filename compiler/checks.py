"""Whether a model is sound enough to hand to an engine: sizes, files, operators, types, shapes and
the constants that an operator cannot work with.

Engines differ in what they accept and some crash instead of refusing, so everything that a model
says about itself is checked here before anything trusts it. Weights larger than a MiB are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import files, passing
from trivium.compiler.errors import BadInput, Unsupported

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_BYTES = 1 << 46
"""No tensor is believed that claims more than this (64 TiB)."""


def check(model: ir.Model, path: Path) -> list[str]:
    """Raise unless the model is sound; return what a reader of its results should know.

    Raises:
        BadInput: Something in the model contradicts itself or the standard.
        Unsupported: Operators that no opset and no function of the model defines; all of them.
    """
    _check_opsets(model, path)
    _check_tensors(model, path)
    _check_operators(model, path)
    notes = _check_protobuf(model, path)
    _check_constants(model, path)
    return notes + _not_finite(model)


def _check_opsets(model: ir.Model, path: Path) -> None:
    import onnx.defs

    version = model.opset_imports.get("")
    newest = onnx.defs.onnx_opset_version()
    if version is None:
        if any(node.domain == "" for node in model.graph.all_nodes()):
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
    for tensor in tensors(model):
        about = f"{path}: tensor {tensor.name!r}"
        try:
            dtype = tensor.dtype
        except ValueError as error:
            raise BadInput(str(error), about=about, remedy="export it again") from error
        count = 1
        for dim in tensor.shape:
            if not isinstance(dim, int) or dim < 0:
                raise BadInput(f"dimension {dim} of a stored tensor", about=about)
            count *= dim
        if count > MAX_BYTES or (
            dtype != ir.DataType.STRING and count * dtype.itemsize > MAX_BYTES
        ):
            raise BadInput(f"claims {count} elements, which no file can hold", about=about)
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(tensor, base, about)
        elif isinstance(tensor, ir.TensorProtoTensor):
            _check_inline(tensor, about)


def _check_external(tensor: ir.ExternalTensor, base: Path, about: str) -> None:
    location = str(tensor.location)
    resolved = files.inside(base, location)
    if resolved is None:
        raise BadInput(
            f"external data {location[:200]!r} lies outside of the model's folder", about=about
        )
    offset, length = tensor.offset or 0, tensor.length
    size = files.require_file(
        resolved,
        absent=f"external data file {location!r} is absent",
        remedy=f"put it beside {base.name}",
    )
    if offset < 0 or (length is not None and length < 0):
        raise BadInput(f"external data at offset {offset}, length {length}", about=about)
    if length is not None and length < tensor.nbytes:
        raise BadInput(f"{length} bytes of external data for {tensor.nbytes}", about=about)
    end = offset + (tensor.nbytes if length is None else length)
    if end > size:
        raise BadInput(
            f"external data ends at byte {end} of a file of {size}",
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
    if proto.HasField("raw_data"):
        return
    # Otherwise the elements lie in the field of their kind, those below a byte packed.
    name = _FIELDS.get(tensor.dtype.name, "int32_data")
    have = len(getattr(proto, name))
    need = tensor.size
    if tensor.dtype.name in ("COMPLEX64", "COMPLEX128"):
        need *= 2
    elif name == "int32_data" and tensor.dtype.bitwidth < 8:
        need = -(-need * tensor.dtype.bitwidth // 8)
    if have != need:
        raise BadInput(f"{have} entries of {name} where its shape needs {need}", about=about)


_FIELDS = {
    "FLOAT": "float_data",
    "COMPLEX64": "float_data",
    "DOUBLE": "double_data",
    "COMPLEX128": "double_data",
    "INT64": "int64_data",
    "UINT32": "uint64_data",
    "UINT64": "uint64_data",
}
"""Where a tensor's elements lie if they are not raw bytes; ``int32_data`` for all others."""


def tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
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


def _check_operators(model: ir.Model, path: Path) -> None:
    """Every operator is one of the standard, of the model's functions, or of an imported domain."""
    import onnx.defs

    opset = model.opset_imports.get("", 1)
    functions = {key[:2] for key in model.functions}
    unknown = []
    for node in model.graph.all_nodes():
        if (node.domain, node.op_type) in functions:
            continue
        name = node.name or next((o.name for o in node.outputs if o.name), "(unnamed)")
        if node.domain:
            if node.domain not in model.opset_imports:
                unknown.append(
                    f"{name}: {node.op_type!r} of {node.domain!r}, a domain not imported"
                )
            continue
        try:
            onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError:
            unknown.append(f"{name}: opset {opset} has no operator {node.op_type!r}")
    if unknown:
        more = f"; and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise Unsupported(
            f"{len(unknown)} {'node' if len(unknown) == 1 else 'nodes'} of unknown operators: "
            f"{'; '.join(unknown[:5])}{more}",
            about=str(path),
            remedy="export with standard operators",
            refusals=unknown,
        )


def _check_protobuf(model: ir.Model, path: Path) -> list[str]:
    """onnx's own checker and strict inference, for what only they know (types, shapes)."""
    from trivium.compiler.onnx_api import check_model

    problem, notes = check_model(model)
    if problem is not None:
        raise BadInput(problem, about=str(path))
    return notes


# --- constants that an operator cannot work with --------------------------------------------------

Rule = Callable[["ir.Node"], "str | None"]
_RULES: dict[str, Rule] = {}


_rule = passing.entering(_RULES)


def _check_constants(model: ir.Model, path: Path) -> None:
    for node in model.graph.all_nodes():
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        problem = rule(node) if rule is not None else None
        if problem is not None:
            name = node.name or next((o.name for o in node.outputs if o.name), "")
            raise BadInput(problem, about=f"{path}: node {name!r} ({node.op_type})")


def _operand(node: ir.Node, index: int) -> Any:
    return passing.constant(node.inputs[index]) if index < len(node.inputs) else None


@_rule("QuantizeLinear", "DequantizeLinear")
def _scales(node: ir.Node) -> str | None:
    import numpy as np

    scale = _operand(node, 1)
    if scale is None:
        return None
    scale = scale.astype(np.float32)
    # ONNX Runtime's quantizer stores weights with negative scales, and so does quantize-weights.
    stored = node.op_type == "DequantizeLinear" and passing.is_constant(node.inputs[0])
    if stored and np.isfinite(scale).all() and (scale != 0).all():
        return None
    if not np.isfinite(scale).all() or (scale <= 0).any():
        worst = scale.reshape(-1)[np.argmin(np.where(np.isfinite(scale), scale, -1).reshape(-1))]
        return f"its scale {worst:g} is not a positive number"
    return None


@_rule("STFT")
def _frames(node: ir.Node) -> str | None:
    for index, what in ((1, "frame_step"), (3, "frame_length")):
        value = _operand(node, index)
        if value is not None and value.size == 1 and int(value.reshape(())) <= 0:
            return f"its {what} {int(value.reshape(()))} is not positive"
    return None


@_rule("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "ConvInteger", "QLinearConv")
def _windows(node: ir.Node) -> str | None:
    for name in ("strides", "dilations", "kernel_shape"):
        given = passing.attribute(node, name)
        if given is not None and any(size < 1 for size in given):
            return f"its {name} {list(given)} must all be at least 1"
    padding = passing.attribute(node, "auto_pad", "NOTSET")
    if padding not in _AUTO_PADS:
        return f"its auto_pad {padding!r} is none of {', '.join(_AUTO_PADS)}"
    return None


_AUTO_PADS = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")


@_rule("Reshape")
def _new_shape(node: ir.Node) -> str | None:
    shape = _operand(node, 1)
    if shape is None:
        return None
    sizes = [int(size) for size in shape.reshape(-1)]
    if sizes.count(-1) > 1 or any(size < -1 for size in sizes):
        return f"the shape {sizes} has more than one -1 or a negative size"
    return None


def _not_finite(model: ir.Model) -> list[str]:
    """Weights that hold NaN or infinity: legal, and nearly always a training gone wrong."""
    import numpy as np

    guilty = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point() or tensor.size < 2:
                continue
            array = passing.constant(value)
            # A mask may be all -inf; a weight with NaN is never meant.
            if array is not None and bool(np.isnan(array.astype(np.float32)).any()):
                guilty.append(value.name or "?")
    if not guilty:
        return []
    shown = ", ".join(guilty[:4]) + (", ..." if len(guilty) > 4 else "")
    return [f"weights that hold NaN: {shown}"]
