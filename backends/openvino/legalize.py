"""Normal form -> what OpenVINO's ONNX frontend converts, and why not what it does not.

The engine itself is asked, with a model of the one node: its frontend converts nearly all of the
standard, and what it does convert changes with every release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.backends.openvino import engine
from trivium.compiler.probe import one_node_model
from trivium.passes.decompose_functions import DecomposeFunctions, function_body

_LARGEST = 256
"""Bytes of the largest constant that a probe carries: axes and shapes; larger ones are weights."""

_answers: dict[bytes, str | None] = {}


def passes() -> Sequence[ir.passes.PassBase]:
    """The passes of the backend, in order."""
    from trivium.backends.openvino.whole_blocks import FillLastBlock
    from trivium.passes.fold_constants import FoldConstants
    from trivium.passes.infer_shapes import InferShapes
    from trivium.passes.remove_dead_code import RemoveDeadCode

    cleanup = (FoldConstants(), InferShapes(), RemoveDeadCode())
    return (FillLastBlock(), OpenUnsupported(), *cleanup)


@dataclass(frozen=True)
class OpenUnsupported(DecomposeFunctions):
    """Open what the frontend does not convert and ONNX defines by other operators."""

    name: ClassVar[str] = "openvino-open-unsupported"

    def wants(self, node: ir.Node) -> bool:
        return refusal(node) is not None and function_body(node) is not None


def refusal(node: ir.Node) -> str | None:
    """Return why OpenVINO does not take a node, or None if it does."""
    if node.op_type == "Constant" or any(
        attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for attr in node.attributes.values()
        if isinstance(attr, ir.Attr)
    ):
        return None  # Bodies read what is around them; only the whole can be asked about.
    question = ir.serde.serialize_model(one_node_model(node, largest=_LARGEST)).SerializeToString()
    if question not in _answers:
        _answers[question] = _ask(question)
        if _answers[question] is not None and any(_is_large(value) for value in node.inputs):
            whole = ir.serde.serialize_model(one_node_model(node)).SerializeToString()
            _answers[question] = _ask(whole)
    problem = _answers[question]
    return f"{engine.name()}: {problem}" if problem else None


def _is_large(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None else None
    return tensor is not None and tensor.nbytes > _LARGEST


def _ask(question: bytes) -> str | None:
    import io

    try:
        engine.core().read_model(io.BytesIO(question))
    except Exception as error:  # openvino raises RuntimeError, and what pybind makes of others
        return engine.reason(error)
    return None
