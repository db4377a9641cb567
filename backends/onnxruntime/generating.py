"""Driving a decoder with growing caches in ONNX Runtime: caches stay with the engine, bound as
inputs and outputs, and only tokens and logits are copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trivium.compiler.errors import BackendFailed
from trivium.compiler.generation.slots import SlotDecoder
from trivium.compiler.generator import Generator
from trivium.compiler.onnx_api import one_line
from trivium.compiler.samples import numpy_dtype

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]


def default_to_last(model: ir.Model, generator: Generator) -> None:
    """Let the logits be those of the last position unless others are asked for.

    Engines on top of ONNX Runtime then need not know of that input.
    """
    import numpy as np
    import onnx_ir as ir

    value = next((v for v in model.graph.inputs if v.name == generator.chosen), None)
    if value is not None:
        value.const_value = ir.tensor(np.array([-1], np.int64), name=value.name)
        model.graph.initializers[value.name or ""] = value


class OnnxRuntimeDecoder(SlotDecoder):
    """A session whose caches are inputs and outputs; see `SlotDecoder`."""

    def __init__(self, generator: Generator, session: Any, where: str) -> None:
        super().__init__(generator)
        self.where = where
        self._session = session
        self._dtypes = {
            value.name: numpy_dtype(_NUMPY[value.type])
            for value in (*session.get_inputs(), *session.get_overridable_initializers())
            if value.type in _NUMPY
        }

    def _empty(self, rows: int, capacity: int) -> list[Any]:
        import numpy as np

        length = capacity if self.generator.form == "static" else 0
        return [
            _value(np.zeros(cache.sized(rows, length), numpy_dtype(cache.dtype)))
            for cache in self.generator.caches
        ]

    def _call(self, feeds: Mapping[str, Array], buffers: list[Any]) -> tuple[Array, list[Any]]:
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, _value(array.astype(self._dtypes[name], copy=False)))
        for cache, buffer in zip(self.generator.caches, buffers, strict=True):
            binding.bind_ortvalue_input(cache.past, buffer)
        for name in (self.generator.logits, *(c.present for c in self.generator.caches)):
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises a dozen kinds without a common base
            raise BackendFailed(one_line(error), about="onnxruntime") from error
        logits, *after = binding.get_outputs()
        return logits.numpy(), after

    def _arrange(
        self, buffers: Sequence[Sequence[Any]], places: Sequence[tuple[int, int]], slots: Array
    ) -> list[Any]:
        import numpy as np

        arranged = []
        for index, cache in enumerate(self.generator.caches):
            held = [own[index].numpy() for own in buffers]
            static = self.generator.form == "static"
            length = held[0].shape[cache.length_axis] if static else slots.shape[1]
            new = np.zeros(cache.sized(len(places), length), held[0].dtype)
            rows = np.moveaxis(new, (cache.batch_axis, cache.length_axis), (0, 1))
            for row, (source, place) in enumerate(places):
                old = np.moveaxis(held[source], (cache.batch_axis, cache.length_axis), (0, 1))
                wanted = slots[row] >= 0
                rows[row, : slots.shape[1]][wanted] = old[place, slots[row][wanted]]
            arranged.append(_value(new))
        return arranged


_NUMPY = {
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
    "tensor(float)": "float32",
}


def _value(array: Array) -> Any:
    import numpy as np
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
