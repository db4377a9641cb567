"""What ONNX Runtime can run, asked of ONNX Runtime itself: its registry of CPU kernels with their
versions and types, so that every refusal is known, with its reason, before anything is built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from trivium.compiler.onnx_api import one_line
from trivium.compiler.passing import opset_of
from trivium.compiler.probe import one_node_model

if TYPE_CHECKING:
    import onnx.defs
    import onnx_ir as ir

_CASTS = {"tensor(float16)": "tensor(float)"}
"""Where a kernel lacks the first type, ONNX Runtime inserts casts to the second (but none for
bfloat16, which its CPU kernels lack)."""


@dataclass(frozen=True)
class Kernel:
    """One registered kernel: the operator versions it serves and the types it takes."""

    first: int
    last: int
    types: Mapping[str, tuple[str, ...]]


@cache
def _kernels() -> Mapping[tuple[str, str], tuple[Kernel, ...]] | None:
    """Kernels by (domain, operator), or None where this build does not tell."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if not hasattr(state, "get_all_opkernel_def"):
        return None
    found: dict[tuple[str, str], list[Kernel]] = {}
    for one in state.get_all_opkernel_def():
        if one.provider != "CPUExecutionProvider":
            continue
        first, last = one.version_range
        types = {name: tuple(allowed) for name, allowed in one.type_constraints.items()}
        domain = "" if one.domain == "ai.onnx" else one.domain
        found.setdefault((domain, one.op_name), []).append(Kernel(first, last, types))
    return {key: tuple(rows) for key, rows in found.items()}


def refusal(node: ir.Node) -> str | None:
    """Return why no kernel runs a node, or None if one does (or its function body does)."""
    import onnx.defs
    import onnxruntime as ort

    kernels = _kernels()
    if kernels is None:
        return None
    engine = f"ONNX Runtime {ort.__version__}"
    rows = kernels.get((node.domain, node.op_type), ())
    if node.domain != "":
        return None if rows else f"{engine} has no operator {node.domain}::{node.op_type}"
    opset = opset_of(node)
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return f"opset {opset} has no operator {node.op_type}"
    serving = [k for k in rows if k.first <= schema.since_version <= k.last]
    reasons = [_mismatch(node, schema, kernel) for kernel in serving]
    if None in reasons or node.op_type == "Constant":  # which becomes an initializer
        return None
    if not _has_body(schema):
        what = f"{node.op_type}-{schema.since_version}"
        return f"{engine} has no CPU kernel for {what}" + (f", {reasons[0]}" if reasons else "")
    problem = _probe(node)
    return (
        f"{engine} cannot run {node.op_type} by its function body: {problem}" if problem else None
    )


def _has_body(schema: onnx.defs.OpSchema) -> bool:
    # The stubs of onnx leave these two out.
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]


def _probe(node: ir.Node) -> str | None:
    """Ask the engine itself, with a model of this one node: its body may need what it lacks."""
    import onnx_ir as ir

    try:
        proto = ir.serde.serialize_model(one_node_model(node))
    except Exception as error:  # onnx_ir's own error wraps whatever it meets
        return one_line(error)
    question = proto.SerializeToString(deterministic=True)
    key = hashlib.sha256(question).digest()
    if key not in _answers:
        _answers[key] = _ask(question)
    return _answers[key]


_answers: dict[bytes, str | None] = {}
"""By the digest of the model of one node: its constants are not worth keeping."""


def _ask(question: bytes) -> str | None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(question, options)
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        return one_line(error)
    return None


def _mismatch(node: ir.Node, schema: onnx.defs.OpSchema, kernel: Kernel) -> str | None:
    for index, value in enumerate(node.inputs):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)] if schema.inputs else None
        if value is None or value.type is None or formal is None:
            continue
        allowed = kernel.types.get(formal.type_str)
        have = _type_name(value)
        if allowed and have not in allowed and _CASTS.get(have) not in allowed:
            return f"{formal.name} of type {have}"
    return None


def _type_name(value: ir.Value) -> str:
    """A value's type as ONNX writes it: ``tensor(float)``, ``seq(tensor(int64))``."""
    import onnx_ir as ir

    inner = f"tensor({value.dtype.name.lower()})" if value.dtype is not None else "?"
    if isinstance(value.type, ir.SequenceType):
        return f"seq({inner})"
    if isinstance(value.type, ir.OptionalType):
        return f"optional({inner})"
    return inner
