"""Caches whose rows share their slots, and the decoder that keeps the books for them.

Engines whose graph appends to all rows at once (the growing form, and static buffers with one
place to write from) know only a mask for what differs between rows. So every row lies at the
right: row b of length n holds the last n of the slots that are filled, and what is left of them is
masked. The distance between two tokens is then the distance between their slots, which windows of
attention count. Where rows are fed different numbers of tokens they are moved back to the right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trivium.compiler.errors import BackendFailed, BadInput
from trivium.compiler.generator import Generator

if TYPE_CHECKING:
    import numpy as np

    from trivium.compiler.generation.seeing import Embeddings
    from trivium.compiler.generation.sourced import Sources

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Piece:
    """Columns of new tokens that go into one call.

    Attributes:
        size: How many the program takes; those beyond ``last`` are padding.
        checks: Whether it is the program that gives the logits of all of them.
    """

    first: int
    last: int
    size: int
    checks: bool = False


@dataclass
class SlotCache:
    """Rows that share slots.

    Attributes:
        lengths: Of each row; the longest fills all slots that are in use.
        buffers: One for each of the generator's caches, as the engine holds them.
        memory: What a decoder takes of an encoder at each call, by name.
    """

    lengths: list[int]
    buffers: list[Any]
    memory: Mapping[str, Array] = field(default_factory=dict)

    @property
    def filled(self) -> int:
        return max(self.lengths, default=0)


class SlotDecoder(ABC):
    """A decoder over `SlotCache`; an engine says how its graph is called and its buffers moved.

    Attributes:
        generator: What the graph is.
        embeddings: What turns tokens into what the graph takes, where those are no tokens.
        sources: What knows the texts that a decoder goes out from, where it has an encoder.
        sizes: How many new tokens its programs take, ascending; empty where any number will do.
    """

    where: str
    pairs: bool = False
    embeddings: Embeddings | None = None
    sources: Sources | None = None

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.sizes = sorted(
            {r.tokens for r in generator.programs if r.tokens is not None and r.logits == 1}
        )
        self.checked = generator.checker.logits if generator.checker is not None else 0

    # What an engine provides.

    @abstractmethod
    def _empty(self, rows: int, length: int) -> list[Any]:
        """Return fresh buffers with so many slots."""

    @abstractmethod
    def _call(self, feeds: Mapping[str, Array], buffers: list[Any]) -> tuple[Array, list[Any]]:
        """Run the graph on the small inputs and the buffers; return logits and new buffers."""

    @abstractmethod
    def _arrange(
        self, buffers: Sequence[Sequence[Any]], places: Sequence[tuple[int, int]], slots: Array
    ) -> list[Any]:
        """Return new buffers: row r is row ``places[r][1]`` of cache ``places[r][0]``, its slot j
        what was in slot ``slots[r, j]``; the content of slots that are -1 does not matter."""

    # The protocol of `trivium.compiler.generator.Decoder`.

    def start(self, rows: int = 1, capacity: int | None = None) -> SlotCache:
        context, static = self.generator.context, self.generator.form == "static"
        in_all = self._rows(rows)
        # Static buffers are as long as the programs say, however little is asked for.
        asked = context if capacity is None or static else min(capacity, context)
        require_memory(self.generator, in_all, asked)
        return SlotCache([0] * rows, self._empty(in_all, context if static else 0))

    def _rows(self, rows: int) -> int:
        """How many rows the buffers have for some: programs of a fixed batch have idle ones."""
        fixed = self.generator.rows
        if fixed is not None and rows > fixed:
            raise BadInput(
                f"{rows} sequences at once, and the programs take {fixed}",
                about="generate",
                remedy=f"compile it again with --shape batch={rows}",
            )
        return fixed or rows

    def feed(self, cache: SlotCache, tokens: Sequence[Sequence[int]], keep: int = 1) -> Array:
        import numpy as np

        counts = [len(row) for row in tokens]
        require_room(self.generator, cache.lengths, counts)
        # Rows end in one column where they can; but one that goes on from its cache must do so
        # without a gap, which windows of attention would count.
        tokens = self._with_source(cache, tokens)
        old, total = cache.lengths, max(counts, default=0)
        logits = np.zeros((len(counts), keep, self.generator.vocabulary or 1), np.float32)
        if not total:
            return logits
        right = all(new == total or have == 0 for have, new in zip(old, counts, strict=True))
        ends = [total if right else count for count in counts]
        ids = np.zeros((len(counts), total), np.int64)
        for row, (new, end) in enumerate(zip(tokens, ends, strict=True)):
            ids[row, end - len(new) : end] = new
        for piece in self._pieces(total, keep if right else total, cache):
            first, last = piece.first, piece.last
            rows = list(zip(counts, ends, strict=True))
            spans = [_within(end - new, end, first, last) for new, end in rows]
            wanted = [_within(end - min(keep, new), end, first, last) for new, end in rows]
            columns = range(min(lo for lo, _ in wanted), max(hi for _, hi in wanted))
            found = self._piece(cache, ids[:, first:last], spans, columns, piece)
            if found.shape[-1] != logits.shape[-1]:  # hidden states, not logits
                logits = np.zeros((*logits.shape[:2], found.shape[-1]), np.float32)
            for row, (lo, hi) in enumerate(wanted):
                place, skip = keep - (ends[row] - first) + lo, columns.start
                logits[row, place : place + hi - lo] = found[row, lo - skip : hi - skip]
        return logits

    def knows(self, token: int) -> bool:
        """Whether a token beyond the vocabulary stands for an image or a source."""
        return any(one is not None and one.knows(token) for one in (self.embeddings, self.sources))

    def _with_source(
        self, cache: SlotCache, tokens: Sequence[Sequence[int]]
    ) -> Sequence[Sequence[int]]:
        """The tokens with what stands for a source replaced; the cache then knows it."""
        if self.sources is None or cache.filled or not tokens or not tokens[0]:
            return tokens
        (first, *rest), *others = tokens
        if not self.sources.knows(first):
            return tokens
        cache.memory = self.sources.held(first)
        return [[self.sources.source.start, *rest], *others]

    def _pieces(self, total: int, keep: int, cache: SlotCache) -> list[_Piece]:
        """Cut the new tokens into what the programs can take at once.

        A program with fixed sizes, or one that gives the last position only, has the logits of one
        token; so the last ``keep`` tokens go to the program that checks some, or one by one.
        """
        if self.generator.checks_any:
            return [_Piece(0, total, total)]
        head, first = max(total - keep + 1, 1), 0
        pieces: list[_Piece] = []
        if self._checks(keep, cache.filled + total - keep):
            head = total - keep
        while first < total:
            # Padding goes to the right of the new tokens, and needs room in the buffers.
            left, filled = total - first, cache.filled + first
            checks = first >= head and self._checks(left, filled)
            if not checks:
                left = max(head - first, 1)
            room = self.generator.context - filled
            size = self.checked if checks else self._size(left, room)
            pieces.append(_Piece(first, first + min(left, size), size, checks))
            first = pieces[-1].last
        return pieces

    def _checks(self, tokens: int, filled: int) -> bool:
        """Whether the program that checks guesses has the logits of some tokens, and room."""
        return tokens > 1 and 1 < self.checked <= self.generator.context - filled

    def _size(self, tokens: int, room: int) -> int:
        """How many tokens the program takes that fits some best."""
        if not self.sizes:
            return tokens
        fitting = [size for size in self.sizes if size <= room] or self.sizes[:1]
        return next((size for size in fitting if size >= tokens), fitting[-1])

    def _piece(
        self,
        cache: SlotCache,
        ids: Array,
        spans: Sequence[tuple[int, int]],
        columns: range,
        piece: _Piece,
    ) -> Array:
        """Feed one piece, of whose columns each row has those in its span; return the logits of
        some columns."""
        import numpy as np

        generator, filled = self.generator, cache.filled
        (rows, size), padded = ids.shape, piece.size
        old = np.array(cache.lengths)
        first, last = (np.array(edges)[:, None] + filled for edges in zip(*spans, strict=True))
        slots = np.arange(filled + padded)
        kept = (slots >= filled - old[:, None]) & (slots < filled)
        kept |= (slots >= first) & (slots < last)
        if generator.mask is None and not kept[:, : filled + size].all():
            raise BadInput(
                "the rows differ in length, and the model has no mask to tell it",
                about="feed",
                remedy="generate one sequence at a time",
            )
        idle = self._rows(rows) - rows
        padding = ((0, idle), (0, padded - size))
        new = np.pad(ids, padding)
        feeds: dict[str, Array] = {
            generator.tokens: new if self.embeddings is None else self.embeddings(new)
        }
        if generator.mask is not None:
            whole = generator.context if generator.form == "static" else filled + padded
            mask = np.zeros((rows + idle, whole), np.int64)
            mask[:rows, : filled + padded] = kept
            feeds[generator.mask] = mask
        if generator.positions is not None:
            ahead = np.cumsum(kept[:, filled:], axis=1) - 1
            places = np.maximum(old[:, None] + ahead, 0)
            feeds[generator.positions] = np.pad(places, ((0, idle), (0, 0)))
        if generator.start is not None:
            feeds[generator.start] = np.array([filled])
        # What no row wants is asked for all the same where a program has a fixed place for it.
        wanted = columns or range(size - 1, size)
        if generator.chosen is not None:
            asked = range(padded) if piece.checks else wanted
            feeds[generator.chosen] = np.arange(asked.start, asked.stop)
        feeds |= cache.memory
        logits, cache.buffers = self._call(feeds, cache.buffers)
        logits = logits[:rows]
        self._settle(cache, spans, size)
        if piece.checks or (generator.chosen is None and generator.kept == "all"):
            logits = logits[:, wanted.start : wanted.stop]
        return logits.astype(np.float32, copy=False)

    def _settle(self, cache: SlotCache, spans: Sequence[tuple[int, int]], size: int) -> None:
        """Count what was fed, and move rows that do not end with the last column to the right."""
        import numpy as np

        filled, old = cache.filled, cache.lengths
        cache.lengths = [have + hi - lo for have, (lo, hi) in zip(old, spans, strict=True)]
        rows = zip(cache.lengths, spans, strict=True)
        if all(lo < hi == size for have, (lo, hi) in rows if have):
            return
        slots = np.full((len(old), cache.filled), -1)
        for row, (have, (lo, hi)) in enumerate(zip(old, spans, strict=True)):
            own = [*range(filled - have, filled), *range(filled + lo, filled + hi)]
            slots[row, cache.filled - len(own) :] = own
        cache.buffers = self._moved([cache.buffers], [(0, row) for row in range(len(old))], slots)

    def _moved(
        self, buffers: Sequence[Sequence[Any]], places: Sequence[tuple[int, int]], slots: Array
    ) -> list[Any]:
        """`_arrange`, with idle rows after the others where the programs have them."""
        import numpy as np

        idle = self._rows(len(places)) - len(places)
        slots = np.pad(slots, ((0, idle), (0, 0)), constant_values=-1)
        return self._arrange(buffers, [*places, *[(0, 0)] * idle], slots)

    def truncate(self, cache: SlotCache, lengths: Sequence[int]) -> None:
        if list(lengths) == cache.lengths:
            return
        cut = {have - length for have, length in zip(cache.lengths, lengths, strict=True)}
        if len(cut) == 1 and not self.generator.grows:
            # What is beyond the filled slots is written over.
            cache.lengths = list(lengths)
            return
        places = [(0, row, length) for row, length in enumerate(lengths)]
        kept = self._combine([cache], places)
        cache.lengths, cache.buffers = kept.lengths, kept.buffers

    def select(self, cache: SlotCache, rows: Sequence[int]) -> SlotCache:
        places = [(0, row, cache.lengths[row]) for row in rows]
        return self._combine([cache], places)

    def join(self, caches: Sequence[SlotCache]) -> SlotCache:
        places = [
            (index, row, length)
            for index, cache in enumerate(caches)
            for row, length in enumerate(cache.lengths)
        ]
        return self._combine(caches, places)

    def copy(self, cache: SlotCache, row: int, length: int) -> SlotCache:
        return self._combine([cache], [(0, row, length)])

    def _combine(
        self, caches: Sequence[SlotCache], places: Sequence[tuple[int, int, int]]
    ) -> SlotCache:
        """A cache of rows of others: (cache, row, how many of its tokens)."""
        import numpy as np

        lengths = [length for _, _, length in places]
        slots = np.full((len(places), max(lengths, default=0)), -1)
        for row, (index, source, length) in enumerate(places):
            first = caches[index].filled - caches[index].lengths[source]
            slots[row, slots.shape[1] - length :] = np.arange(first, first + length)
        rows = [(index, source) for index, source, _ in places]
        moved = self._moved([c.buffers for c in caches], rows, slots)
        # Programs that take the memory of a source have one row.
        return SlotCache(lengths, moved, caches[places[0][0]].memory if places else {})


def _within(lo: int, hi: int, first: int, last: int) -> tuple[int, int]:
    """The part of a range of columns in a piece, counted from where that begins; an empty one at
    its end."""
    lo, hi = max(lo, first), min(hi, last)
    return (lo - first, hi - first) if lo < hi else (last - first, last - first)


def require_room(generator: Generator, lengths: Sequence[int], counts: Sequence[int]) -> None:
    """Refuse tokens that are not for these rows, or more than the context has room for.

    Raises:
        BadInput: With the figures.
    """
    if len(counts) != len(lengths):
        raise BadInput(f"tokens for {len(counts)} rows of {len(lengths)}", about="feed")
    longest = max(have + new for have, new in zip(lengths, counts, strict=True))
    if longest > generator.context:
        raise BadInput(
            f"{longest} tokens, and there is room for {generator.context}",
            about="feed",
            remedy="give a shorter prompt, or compile with a larger --context",
        )


def require_memory(generator: Generator, rows: int, capacity: int) -> None:
    """Refuse a cache that the machine's free memory would not hold, before it is allocated.

    Raises:
        BackendFailed: With the figures.
    """
    needed = rows * capacity * generator.bytes_per_token
    free = free_memory()
    if free is None or needed <= free:
        return
    raise BackendFailed(
        f"a cache of {rows} x {capacity} tokens needs {needed / 2**30:.2f} GiB, and "
        f"{free / 2**30:.2f} GiB of memory is free",
        about="generate",
        remedy="ask for fewer sequences at once, or a smaller context",
    )


def free_memory() -> int | None:
    """Bytes that the machine can still give, or None where it does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            line = next(line for line in stream if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None
