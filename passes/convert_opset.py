"""Bring a model to the opset of normal form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from trivium.compiler.errors import Unsupported
from trivium.compiler.model import OPSET
from trivium.compiler.onnx_api import light_proto, one_line
from trivium.compiler.passing import Pass, option
from trivium.compiler.types import Preserves

if TYPE_CHECKING:
    import onnx

_IN_PLACE_FROM = 18
"""From this opset on, onnxscript's converter rewrites the IR itself, which keeps what a trip
through onnx's C++ graph would lose (sharding annotations, metadata, 4-bit weights)."""


@dataclass(frozen=True)
class ConvertOpset(Pass):
    """Convert the standard domain to opset 24, up or down; other domains stay as they are.

    A model that has no equivalent there is refused, rather than kept at an opset that the passes
    after this one would misread.
    """

    name: ClassVar[str] = "convert-opset"
    preserves: ClassVar[Preserves] = "exact"

    version: int = option(OPSET, "The opset to convert to")

    def run(self, model: ir.Model) -> bool:
        import onnx.helper

        current = model.opset_imports.get("")
        needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", self.version)])
        if current is None or current == self.version:
            # Below version 4 an initializer has to be an input, and below 13 types are missing.
            if current is None or model.ir_version >= needed:
                return False
        elif _IN_PLACE_FROM <= current < self.version:
            self._convert_in_place(model)
        else:
            self._convert_by_protobuf(model)
        model.ir_version = max(model.ir_version, needed)
        return True

    def _convert_in_place(self, model: ir.Model) -> None:
        from onnxscript.version_converter import ConvertVersionPass

        before = model.opset_imports[""]
        try:
            ConvertVersionPass(self.version, fallback=False)(model)
        except Exception as error:  # the converter's own error type is private
            raise self._refusal(before, error) from error
        if model.opset_imports.get("") != self.version:
            raise self._refusal(before, RuntimeError("the converter does not reach that opset"))

    def _convert_by_protobuf(self, model: ir.Model) -> None:
        import onnx.version_converter

        before = model.opset_imports[""]
        given = [value.name for value in model.graph.inputs]
        weights = {
            name: value.const_value for name, value in model.graph.initializers.items() if name
        }
        with light_proto(model) as proto:
            large = [value.name for value in proto.graph.input if value.name in weights]
        _upgrade_nameless(proto)
        try:
            converted = onnx.version_converter.convert_version(proto, self.version)
        except Exception as error:  # RuntimeError, ConvertError and what the C++ side asserts
            raise self._refusal(before, error) from error
        graph = ir.from_proto(converted).graph
        inputs = {value.name: value for value in graph.inputs}
        for name in large:
            value = inputs[name]
            value.const_value = weights[name]
            graph.register_initializer(value)
        kept = [inputs[name] for name in given]
        graph.inputs.clear()
        graph.inputs.extend(kept)
        _restore_types(model.graph, graph)
        model.graph = graph

    def _refusal(self, before: int, error: BaseException) -> Unsupported:
        while error.__cause__ is not None:
            error = error.__cause__
        reason = re.sub(r"^.*?(Assertion|No Adapter|Unsupported)", r"\1", one_line(error))
        return Unsupported(
            f"no way from opset {before} to {self.version}: {reason}",
            about="convert-opset",
            remedy=f"export the model again with opset {min(self.version, 18)} or newer",
        )


def _upgrade_nameless(proto: onnx.ModelProto) -> None:
    """The C++ graph refuses unnamed bodies."""
    proto.graph.name = proto.graph.name or "main"


def _restore_types(before: ir.Graph, after: ir.Graph) -> None:
    """Sequences, optionals and dimensions that the C++ graph cannot say come from the old graph."""
    for old, new in zip(
        (*before.inputs, *before.outputs), (*after.inputs, *after.outputs), strict=True
    ):
        new.type = old.type if old.type is not None else new.type
        new.shape = old.shape if old.shape is not None else new.shape
