"""Decoders with static caches in TensorRT's form: TensorScatter, and 4-D Attention whose mask says
which slots of the buffers hold something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.generation.slots import SlotDecoder
from trivium.compiler.generator import Generator, program_sizes
from trivium.compiler.passing import (
    NodePass,
    attribute,
    decline,
    dims,
    graph_of,
    initializer,
    is_op,
    producer,
)
from trivium.compiler.samples import numpy_dtype
from trivium.compiler.types import Preserves, TensorInfo, Workload

if TYPE_CHECKING:
    import onnxruntime as ort

Array = np.ndarray[Any, Any]

_HELD = 6
"""The input of Attention that says how many slots hold something."""


@dataclass(frozen=True)
class MaskEmptySlots(NodePass):
    """Turn ``nonpad_kv_seqlen`` and ``is_causal`` of Attention over static buffers into its mask.

    The last query stands in the last slot that is held, the others in those before it.

    Left alone: buffers of a length that is not known, and masks that are not of four dimensions.
    """

    name: ClassVar[str] = "tensorrt-mask-empty-slots"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "Attention") or len(node.inputs) <= _HELD:
            return False
        query, keys, _, mask, _, _, held = node.inputs[: _HELD + 1]
        if held is None or query is None:
            return False
        scatter = producer(keys, "TensorScatter")
        shape = dims(scatter.inputs[0] if scatter is not None else keys)
        if shape is None or len(shape) != 4 or shape[2] is None:
            return decline(node, "the length of its buffers is not known")
        if mask is not None and len(dims(mask) or ()) != 4:
            return decline(node, "its mask has not 4 dimensions")
        build = _Build(node)
        slots = build.stored(np.arange(shape[2]), "slots")
        ends = build.op("Unsqueeze", [held, build.stored([1, 2, 3], "axes")])
        if attribute(node, "is_causal", 0):
            width = build.op("Shape", [query], start=2, end=3)
            width = build.op("Squeeze", [width])
            one = build.stored(1, "one")
            ahead = build.op("Range", [one, build.op("Add", [width, one]), one])
            ahead = build.op("Sub", [ahead, width])
            ahead = build.op("Unsqueeze", [ahead, build.stored([1], "axis")])
            ends = build.op("Add", [ends, ahead])
        counts = build.op("Less", [slots, ends], dtype=ir.DataType.BOOL)
        if mask is not None and mask.dtype == ir.DataType.BOOL:
            counts = build.op("And", [mask, counts], dtype=ir.DataType.BOOL)
        elif mask is not None:
            assert mask.dtype is not None
            low = build.stored(np.finfo(np.float32).min / 2, "low", mask.dtype)
            counts = build.op("Where", [counts, mask, low], dtype=mask.dtype)
        counts.shape = ir.Shape([None, None, None, shape[2]])
        graph_of(node).insert_before(node, build.made)
        node.replace_input_with(3, counts)
        node.resize_inputs(4)
        node.attributes.pop("is_causal", None)
        return True


class _Build:
    """Nodes and constants to be put before another node."""

    def __init__(self, node: ir.Node) -> None:
        self.made: list[ir.Node] = []
        self._graph, self._stem = graph_of(node), node.name or node.outputs[0].name

    def op(
        self,
        op_type: str,
        inputs: list[ir.Value],
        dtype: ir.DataType = ir.DataType.INT64,
        **attributes: int,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.outputs[0].name = f"{self._stem}.empty.{len(self.made)}"
        node.outputs[0].dtype = dtype
        self.made.append(node)
        return node.outputs[0]

    def stored(self, content: Any, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        kind = np.int64 if dtype is None else numpy_dtype(dtype.name.lower())
        array = np.asarray(content, kind)
        name = f"empty.{name}.{array.size}.{array.dtype}"
        return self._graph.initializers.get(name) or initializer(self._graph, array, name)


def workloads(
    generator: Generator, inputs: Sequence[TensorInfo], workload: Workload
) -> dict[str, Workload]:
    """The sizes of every dimension in each program of a generator."""
    return {
        program: with_fields(workload, dims={**workload.dims, **sizes}, buckets={})
        for program, sizes in program_sizes(generator, inputs).items()
    }


class CheckedDecoder(SlotDecoder):
    """The legalized graph on the CPU, to be held to the source."""

    where = "the legalized graph, on ONNX Runtime"

    def __init__(self, generator: Generator, session: ort.InferenceSession) -> None:
        super().__init__(generator)
        self._session = session
        self._dtypes = {value.name: _NUMPY.get(value.type) for value in session.get_inputs()}

    def _empty(self, rows: int, length: int) -> list[Array]:
        return [
            np.zeros(cache.sized(rows, length), numpy_dtype(cache.dtype))
            for cache in self.generator.caches
        ]

    def _call(self, feeds: Mapping[str, Array], buffers: list[Array]) -> tuple[Array, list[Array]]:
        caches = self.generator.caches
        given = {name: array.astype(self._dtypes[name]) for name, array in feeds.items()}
        given |= {cache.past: held for cache, held in zip(caches, buffers, strict=True)}
        wanted = [self.generator.logits, *(cache.present for cache in caches)]
        logits, *after = self._session.run(wanted, given)
        return logits, after

    def _arrange(
        self, buffers: Sequence[Sequence[Array]], places: Sequence[tuple[int, int]], slots: Array
    ) -> list[Array]:
        raise NotImplementedError  # sequences are checked one by one, each from its beginning


_NUMPY = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
