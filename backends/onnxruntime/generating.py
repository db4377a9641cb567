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

_SPARE = 256
"""Slots that a buffer gets beyond those that are asked for, so that it is not copied each step."""


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

    def _empty(self, rows: int, length: int) -> list[Any]:
        import numpy as np

        return [
            _value(np.zeros(cache.sized(rows, length), numpy_dtype(cache.dtype)))
            for cache in self.generator.caches
        ]

    def _call(self, feeds: Mapping[str, Array], buffers: list[Any]) -> tuple[Array, list[Any]]:
        if self.generator.form == "shared" and _several_after_others(self.generator, feeds):
            return self._one_by_one(feeds, buffers)
        return self._call_once(feeds, buffers)

    def _one_by_one(
        self, feeds: Mapping[str, Array], buffers: list[Any]
    ) -> tuple[Array, list[Any]]:
        """Several new tokens of several rows after others, which GroupQueryAttention lacks."""
        import numpy as np

        made = self.generator
        tokens, mask = feeds[made.tokens], feeds[made.mask or ""]
        wanted = {int(i) for i in feeds[made.chosen]} if made.chosen else None
        found = []
        for column in range(tokens.shape[1]):
            end = mask.shape[1] - tokens.shape[1] + column + 1
            one = dict(feeds)
            one[made.tokens] = tokens[:, column : column + 1]
            one[made.mask or ""] = mask[:, :end]
            if made.positions is not None:
                one[made.positions] = feeds[made.positions][:, column : column + 1]
            if made.chosen is not None:
                one[made.chosen] = np.array([0], np.int64)
            logits, buffers = self._call_once(one, buffers)
            if wanted is None or column in wanted:
                found.append(logits)
        kept = found if made.chosen or made.kept == "all" else found[-1:]
        return np.concatenate(kept, axis=1), buffers

    def _call_once(self, feeds: Mapping[str, Array], buffers: list[Any]) -> tuple[Array, list[Any]]:
        in_place = self.generator.form == "shared"
        if in_place:
            buffers = self._with_room(buffers, feeds[self.generator.mask or ""].shape[1])
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, _value(array.astype(self._dtypes[name], copy=False)))
        for cache, buffer in zip(self.generator.caches, buffers, strict=True):
            binding.bind_ortvalue_input(cache.past, buffer)
        binding.bind_output(self.generator.logits)
        for cache, buffer in zip(self.generator.caches, buffers, strict=True):
            if in_place:
                binding.bind_ortvalue_output(cache.present, buffer)
            else:
                binding.bind_output(cache.present)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises a dozen kinds without a common base
            raise BackendFailed(one_line(error), about="onnxruntime") from error
        logits, *after = binding.get_outputs()
        # Buffers stay those that were given: what comes back does not own their memory.
        return logits.numpy(), buffers if in_place else after

    def _with_room(self, buffers: list[Any], slots: int) -> list[Any]:
        """Buffers of at least so many slots: those that are given, or larger copies of them."""
        import numpy as np

        first = self.generator.caches[0]
        have = buffers[0].shape()[first.length_axis]
        if slots <= have:
            return buffers
        length = min(self.generator.context, max(slots + _SPARE, 2 * have))
        grown = []
        for cache, buffer in zip(self.generator.caches, buffers, strict=True):
            old = buffer.numpy()
            new = np.zeros(cache.sized(old.shape[cache.batch_axis], length), old.dtype)
            np.moveaxis(new, cache.length_axis, 0)[:have] = np.moveaxis(old, cache.length_axis, 0)
            grown.append(_value(new))
        return grown

    def _arrange(
        self, buffers: Sequence[Sequence[Any]], places: Sequence[tuple[int, int]], slots: Array
    ) -> list[Any]:
        import numpy as np

        arranged = []
        for index, cache in enumerate(self.generator.caches):
            held = [own[index].numpy() for own in buffers]
            fixed = self.generator.form != "growing"
            room = max(own.shape[cache.length_axis] for own in held)
            length = room if fixed else slots.shape[1]
            new = np.zeros(cache.sized(len(places), length), held[0].dtype)
            rows = np.moveaxis(new, (cache.batch_axis, cache.length_axis), (0, 1))
            for row, (source, place) in enumerate(places):
                old = np.moveaxis(held[source], (cache.batch_axis, cache.length_axis), (0, 1))
                wanted = slots[row] >= 0
                rows[row, : slots.shape[1]][wanted] = old[place, slots[row][wanted]]
            arranged.append(_value(new))
        return arranged


def _several_after_others(generator: Generator, feeds: Mapping[str, Array]) -> bool:
    rows, new = feeds[generator.tokens].shape[:2]
    return bool(rows > 1 and new > 1 and feeds[generator.mask or ""].shape[1] > new)


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
