"""Driving a decoder whose rows are written each from its own end on: rows of any lengths are fed
any numbers of tokens in one call, and forgetting tokens costs nothing.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trivium.backends.onnxruntime import huge_pages
from trivium.compiler.errors import BackendFailed
from trivium.compiler.generation.slots import require_memory, require_room
from trivium.compiler.generator import Generator
from trivium.compiler.onnx_api import one_line
from trivium.compiler.samples import numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_SPARE = 256
"""Slots that a buffer that is too small gets beyond those that are needed."""

_WASTED = 64 << 20
"""Bytes of the largest caches that lie on huge pages, which take all of their memory at once."""


def _memory(size: int) -> mmap.mmap:
    """Memory of this process alone: what could be shared gets no huge pages, as systems are set."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@dataclass
class RaggedCache:
    """Rows with ends of their own.

    Attributes:
        lengths: Of each row, which holds that many of its first slots.
        buffers: One for each of the generator's caches; what is beyond a row's end means nothing.
            Memory that no token has come to yet is not taken from the system.
        binding: Of the buffers, as inputs and outputs.
    """

    lengths: list[int]
    buffers: list[Array]
    binding: Any


class RaggedDecoder:
    """A session whose caches are inputs and outputs of the same memory."""

    def __init__(self, generator: Generator, session: Any, where: str, pairs: bool = False) -> None:
        self.generator, self.where, self.pairs = generator, where, pairs
        self._session = session
        inputs = (*session.get_inputs(), *session.get_overridable_initializers())
        self._narrow = {value.name for value in inputs if value.type == "tensor(int32)"}
        logits = next(v for v in session.get_outputs() if v.name == generator.logits)
        width = logits.shape[-1] if logits.type == "tensor(float)" else None
        self._width = width if isinstance(width, int) else 0

    # The protocol of `trivium.compiler.generator.Decoder`.

    def start(self, rows: int = 1, capacity: int | None = None) -> RaggedCache:
        context = self.generator.context
        length = context if capacity is None else min(capacity, context)
        require_memory(self.generator, rows, length)
        return self._empty([0] * rows, length)

    def feed(self, cache: RaggedCache, tokens: Sequence[Sequence[int]], keep: int = 1) -> Array:
        import numpy as np

        generator, rows = self.generator, len(tokens)
        counts = [len(row) for row in tokens]
        require_room(generator, cache.lengths, counts)
        width = max(counts, default=0)
        if not width:
            return np.zeros((rows, keep, generator.vocabulary or 1), np.float32)
        ids = np.zeros((rows, width), np.int64)
        for row, new in enumerate(tokens):
            ids[row, : len(new)] = new
        # A row that gets nothing is given a token all the same, which its next one overwrites.
        given = np.maximum(counts, 1)
        before = np.array(cache.lengths)
        after = before + given
        self._make_room(cache, int(before.max()) + width)
        feeds: dict[str, Array] = {
            generator.tokens: ids,
            generator.mask or "": np.arange(after.max()) < after[:, None],
            generator.counts or "": given,
        }
        if generator.positions is not None:
            places = before[:, None] + np.arange(width)
            feeds[generator.positions] = np.minimum(places, generator.context - 1)
        alike = keep <= width == min(counts)
        wanted = [range(max(count - keep, 0), count) for count in counts]
        columns = np.arange(width - keep, width) if alike else np.unique(np.concatenate(wanted))
        if generator.chosen is not None:
            feeds[generator.chosen] = columns
        found = self._call(feeds, cache)
        cache.lengths = [have + new for have, new in zip(cache.lengths, counts, strict=True)]
        if alike:
            return found if found.shape[1] == keep else found[:, width - keep : width]
        logits = np.zeros((rows, keep, found.shape[-1]), np.float32)
        for row, own in enumerate(wanted):
            if own:
                chosen = np.searchsorted(columns, own) if generator.chosen is not None else own
                logits[row, keep - len(own) :] = found[row, chosen]
        return logits

    def knows(self, token: int) -> bool:
        return False

    def truncate(self, cache: RaggedCache, lengths: Sequence[int]) -> None:
        cache.lengths = list(lengths)

    def select(self, cache: RaggedCache, rows: Sequence[int]) -> RaggedCache:
        return self._gathered([(cache, row, cache.lengths[row]) for row in rows])

    def join(self, caches: Sequence[RaggedCache]) -> RaggedCache:
        return self._gathered(
            [(cache, row, length) for cache in caches for row, length in enumerate(cache.lengths)]
        )

    def copy(self, cache: RaggedCache, row: int, length: int) -> RaggedCache:
        return self._gathered([(cache, row, length)], room=length)

    # Buffers.

    def _empty(self, lengths: list[int], room: int) -> RaggedCache:
        import numpy as np
        import onnxruntime as ort

        caches = self.generator.caches
        shapes = [cache.sized(len(lengths), room) for cache in caches]
        dtypes = [numpy_dtype(cache.dtype) for cache in caches]
        sizes = [math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True)]
        # The system gives a page when it is first written; an allocator that has memory left over
        # would fill it with zeros.
        block = _memory(max(sum(sizes), 1))
        if sum(sizes) <= _WASTED:
            huge_pages.advise(np.frombuffer(block, np.uint8))
        binding, buffers, first = self._session.io_binding(), [], 0
        for cache, shape, dtype, size in zip(caches, shapes, dtypes, sizes, strict=True):
            buffers.append(np.frombuffer(block, dtype, math.prod(shape), first).reshape(shape))
            first += size
            value = ort.OrtValue.ortvalue_from_numpy(buffers[-1])
            binding.bind_ortvalue_input(cache.past, value)
            binding.bind_ortvalue_output(cache.present, value)
        return RaggedCache(lengths, buffers, binding)

    def _room(self, cache: RaggedCache) -> int:
        return int(cache.buffers[0].shape[self.generator.caches[0].length_axis])

    def _make_room(self, cache: RaggedCache, slots: int) -> None:
        if slots > self._room(cache):
            rows = [(cache, row, length) for row, length in enumerate(cache.lengths)]
            length = min(max(slots + _SPARE, 2 * self._room(cache)), self.generator.context)
            larger = self._gathered(rows, room=max(slots, length))
            cache.buffers, cache.binding = larger.buffers, larger.binding

    def _gathered(
        self, rows: Sequence[tuple[RaggedCache, int, int]], room: int | None = None
    ) -> RaggedCache:
        """A cache of rows of others: (cache, row, how many of its tokens)."""
        import numpy as np

        length = max(self._room(cache) for cache, _, _ in rows) if room is None else room
        made = self._empty([own for _, _, own in rows], length)
        for index, info in enumerate(self.generator.caches):
            axes = (info.batch_axis, info.length_axis)
            new = np.moveaxis(made.buffers[index], axes, (0, 1))
            for place, (cache, row, own) in enumerate(rows):
                new[place, :own] = np.moveaxis(cache.buffers[index], axes, (0, 1))[row, :own]
        return made

    def _call(self, feeds: Mapping[str, Array], cache: RaggedCache) -> Array:
        import numpy as np
        import onnxruntime as ort

        binding, generator = cache.binding, self.generator
        for name, array in feeds.items():
            dtype = np.int32 if name in self._narrow else np.int64
            small = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype))
            binding.bind_ortvalue_input(name, small)
        rows, new = feeds[generator.tokens].shape
        if self._width:
            # Written where they are read: binding a fresh output would copy them.
            places = new if generator.chosen is None else feeds[generator.chosen].size
            logits: Array = np.empty((rows, places, self._width), np.float32)
            binding.bind_ortvalue_output(generator.logits, ort.OrtValue.ortvalue_from_numpy(logits))
        else:
            binding.bind_output(generator.logits)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises a dozen kinds without a common base
            raise BackendFailed(one_line(error), about="onnxruntime") from error
        if not self._width:
            logits = binding.get_outputs()[len(cache.buffers)].numpy()
        return logits.astype(np.float32, copy=False)
