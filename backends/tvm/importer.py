"""Normal form -> Relax, through TVM's own ONNX importer, with the weights left out.

Weights become parameters of the program instead of constants in it: the library stays small, the
weights are stored once whatever is built from them, and none is read to import the graph.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from trivium.compiler.errors import Unsupported
from trivium.compiler.onnx_api import light_proto, one_line

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Imported:
    """A Relax module and the order of what its ``main`` takes after the model's own inputs."""

    module: Any
    weights: tuple[str, ...]


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Give every value a name that is an identifier in C: TVM writes names into CUDA sources.

    Inputs and outputs go by position, so their names may change as well.

    Args:
        names: Old to new; a body shares those of the graph around it.
    """

    def renamed(name: str) -> str:
        return names.setdefault(name, f"v{len(names)}")

    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = renamed(value.name)
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)


def to_relax(model: ir.Model) -> Imported:
    """Import a legalized model.

    Raises:
        Unsupported: The importer declined; the message names the operator that it was at.
    """
    from tvm.relax.frontend.onnx import from_onnx

    own = len(model.graph.inputs)
    said = io.StringIO()
    with light_proto(model) as proto:
        weights = tuple(value.name for value in proto.graph.input[own:])
        _rename(proto.graph, {"": ""})
        try:
            # The importer prints the operator that it fails on and raises without naming it.
            with contextlib.redirect_stdout(said), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = from_onnx(proto)
        except Exception as error:
            where = said.getvalue().partition(", with inputs")[0].strip()
            raise Unsupported(
                f"declines: {one_line(error)} ({where or type(error).__name__})",
                about="TVM's ONNX importer",
                remedy="try --backend onnxruntime, or --backend xla",
            ) from error
    return Imported(module, weights)
