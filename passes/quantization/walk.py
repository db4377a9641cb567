"""Running a graph on representative inputs segment by segment, in bounded memory.

ONNX Runtime runs a segment over all batches before the next begins. So the engine maps the weights
of one segment at a time, and a pass that changes the weights of a segment shows what follows the
activations that it will really see. Between segments only what is still needed is kept, on disk,
one file for each batch and value; a model whose weights fit one segment keeps nothing.

Cuts are made where the fewest bytes cross. Two more things bound memory: feeds are cut into batches
whose tensors fit a budget, and where one sample exceeds it, a segment's tensors are taken in groups
(one run of the segment for each).
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BackendFailed, BadInput
from trivium.compiler.onnx_api import one_line

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

Array = np.ndarray[Any, np.dtype[Any]]

BATCH = 32
"""Most samples run at a time, where the model's batch is free."""

BUDGET = 4 << 20
"""Bytes of tensors that one run may return."""

WEIGHTS = 16 << 20
"""Bytes of weights in one segment, unless a single node reads more."""


@dataclass(eq=False)
class Segment:
    """A stretch of a graph, in the order of a walk.

    Attributes:
        nodes: Its nodes.
        inputs: What it reads of earlier segments and of the graph's inputs.
        outputs: What later segments read of it.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    done: bool = False


class Walk:
    """A graph cut into segments; iterating runs up to each of them in turn.

    The nodes of the current segment may be changed, as long as what other segments read keeps its
    name: later segments see what the changed nodes give.

    Args:
        model: In normal form.
        feeds: Iterated once if there is nothing to group, and never again if they can be only once.
        observed: The values that will be asked for, to know how large a batch may be.
        cuts: Nodes before which a segment begins; by default wherever ``weights`` asks for it.
        weights: Bytes of weights in one segment.
        budget: Bytes of tensors that one run may return.
        folder: Where to keep what crosses segments; by default a temporary folder.

    Attributes:
        segments: In graph order.
        batch: Most samples that run at a time.
        samples, count: How many samples and batches there are; known after the first segment.

    Raises:
        BadInput: No feeds.
    """

    def __init__(
        self,
        model: ir.Model,
        feeds: Iterable[Tensors],
        observed: Iterable[ir.Value] = (),
        *,
        cuts: Collection[ir.Node] | None = None,
        weights: int = WEIGHTS,
        budget: int = BUDGET,
        folder: Path | None = None,
    ) -> None:
        self.model, self.budget = model, budget
        self.samples = self.count = 0
        self._once = iter(feeds) is feeds
        first, self._feeds = _peek(feeds)
        self._free = free_batch(model)
        self._named = _named_dims(model, next(batches([first], self._free, 1))[0])
        self._temporary = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="trivium-walk-")
            folder = Path(self._temporary.name)
        self._folder = folder
        self.segments = self._cut(cuts, weights)
        self._workers = max(1, min(4, os.cpu_count() or 1))
        self.batch = self._batch_size(set(observed))

    def __iter__(self) -> Iterator[Segment]:
        return self.walk_from(0)

    def walk_from(self, position: int) -> Iterator[Segment]:
        """Iterate from a segment on whose inputs the folder has kept from an earlier walk."""
        try:
            for index in range(position, len(self.segments)):
                segment = self.segments[index]
                yield segment
                if segment.outputs and not segment.done:
                    for _ in self.run(segment, ()):
                        pass
                self._forget(index)
        finally:
            if self._temporary is not None:
                self._temporary.cleanup()

    # --- cutting ---------------------------------------------------------------------------------

    def _cut(self, cuts: Collection[ir.Node] | None, limit: int) -> list[Segment]:
        nodes = list(self.model.graph)
        place = {inner: i for i, node in enumerate(nodes) for inner in _within(node)}
        made = {v: -1 for v in self.model.graph.inputs if not v.is_initializer()}
        made |= {value: i for i, node in enumerate(nodes) for value in node.outputs}
        reach = {v: max((place[n] for n, _ in v.uses() if n in place), default=-1) for v in made}
        crossing = [0.0] * (len(nodes) + 1)
        for value, i in made.items():
            # What is no tensor cannot be kept.
            size = self.size(value) if isinstance(value.type, ir.TensorType) else math.inf
            for at in range(i + 1, reach[value] + 1):
                crossing[at] += size
        if cuts is None:
            inner = _bounds([*_costs(nodes)], crossing, limit)
        else:
            inner = [i for i, n in enumerate(nodes) if i and n in cuts and crossing[i] < math.inf]
        segments = []
        for begin, end in itertools.pairwise([0, *inner, len(nodes)]):
            read = {v: None for node in nodes[begin:end] for n in _within(node) for v in n.inputs}
            inputs = [v for v in read if v is not None and made.get(v, begin) < begin]
            outputs = [v for v, i in made.items() if begin <= i < end <= reach[v]]
            segments.append(Segment(tuple(nodes[begin:end]), tuple(inputs), tuple(outputs)))
        return segments

    def size(self, value: ir.Value) -> int:
        """Bytes of a tensor for one sample; a dimension that nothing names counts as one."""
        shape = value.shape if value.shape is not None else ()
        known = [d if isinstance(d, int) else self._named.get(str(d.value), 1) for d in shape]
        return 4 * math.prod(known)

    def _batch_size(self, observed: Collection[ir.Value]) -> int:
        largest = 1
        for segment in self.segments:
            returned = {v for n in segment.nodes for v in n.outputs if v in observed}
            returned |= set(segment.outputs)
            largest = max(largest, sum(map(self.size, returned)))
        return min(BATCH, max(1, self.budget // largest))

    # --- running ---------------------------------------------------------------------------------

    def run(
        self,
        segment: Segment,
        wanted: Sequence[ir.Value],
        *,
        start: int = 0,
        keep: bool = True,
    ) -> Iterator[list[Array]]:
        """Give some tensors of the current segment, batch by batch.

        Args:
            segment: The one that iteration stands at.
            wanted: Values that the segment makes or reads.
            start: The first batch to run.
            keep: Whether to keep what later segments read, so that this need not be run again.
        """
        given = set(segment.inputs)
        kept = list(segment.outputs) if keep and not segment.done else []
        returned = dict.fromkeys([*(value for value in wanted if value not in given), *kept])
        feeds = enumerate(self._inputs(segment, start), start)
        if not returned:
            for _, feed in feeds:
                yield [np.asarray(feed[value.name or ""]) for value in wanted]
            return
        with tempfile.TemporaryDirectory(prefix="trivium-run-") as name:
            run = self._runner(segment, list(returned), Path(name))
            for index, feed, arrays in self._overlapped(run, feeds):
                found = dict(zip(returned, arrays, strict=True))
                for value in kept:
                    self._keep(index, value.name or "", found[value])
                yield [np.asarray(feed[v.name or ""]) if v in given else found[v] for v in wanted]
            del run
        trim()
        segment.done = segment.done or keep

    def _overlapped(
        self, run: Callable[[Tensors], list[Array]], feeds: Iterable[tuple[int, Tensors]]
    ) -> Iterator[tuple[int, Tensors, list[Array]]]:
        """Run several batches at a time; give their results in order."""
        with ThreadPoolExecutor(self._workers) as pool:
            waiting: deque[tuple[int, Tensors, Future[list[Array]]]] = deque()
            for index, feed in feeds:
                waiting.append((index, feed, pool.submit(run, feed)))
                if len(waiting) >= self._workers:
                    index, feed, future = waiting.popleft()
                    yield index, feed, future.result()
            while waiting:
                index, feed, future = waiting.popleft()
                yield index, feed, future.result()

    def _inputs(self, segment: Segment, start: int) -> Iterator[Tensors]:
        """What a segment reads, batch by batch."""
        names = [value.name or "" for value in segment.inputs]
        fed = {value.name for value in self.model.graph.inputs}
        if segment is not self.segments[0] or (self._once and self.count):
            for index in range(start, self.count):
                yield {name: np.load(self._file(index, name)) for name in names}
            return
        later = {v.name or "" for s in self.segments[1:] for v in s.inputs} & fed
        if self._once:
            later |= set(names)
        samples = count = 0
        for index, (batch, size) in enumerate(batches(self._feeds, self._free, self.batch)):
            samples, count = samples + size, index + 1
            for name in later:
                self._keep(index, name, np.asarray(batch[name]))
            if index >= start:
                yield {name: batch[name] for name in names}
        self.samples, self.count = samples, count

    def _runner(
        self, segment: Segment, values: Sequence[ir.Value], folder: Path
    ) -> Callable[[Tensors], list[Array]]:
        import onnxruntime as ort

        from trivium.compiler.model import save

        path = folder / "segment.onnx"
        # External data is mapped by ONNX Runtime: weights are neither parsed nor copied.
        save(self._extracted(segment, values), path, external=True)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = max(1, (os.cpu_count() or 1) // self._workers)
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        names = [value.name or "" for value in values]
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen kinds without a common base
            raise _cannot_run(error) from error

        def run(feed: Tensors) -> list[Array]:
            try:
                return list(session.run(names, dict(feed)))
            except Exception as error:  # as above
                raise _cannot_run(error) from error

        return run

    def _extracted(self, segment: Segment, values: Sequence[ir.Value]) -> ir.Model:
        """The segment as a model (weights shared) that gives ``values``, as the engine takes it."""
        from trivium.passes.widen_attention_mask import WidenAttentionMask

        inputs = [value.name or "" for value in segment.inputs]
        outputs = [value.name or "" for value in values]
        graph = ir.convenience.extract(self.model.graph, inputs, outputs)
        made = ir.Model(graph, ir_version=self.model.ir_version)
        WidenAttentionMask()(made)
        return made

    # --- what crosses segments -------------------------------------------------------------------

    def _file(self, batch: int, name: str) -> Path:
        # The name of a value may be no name of a file.
        key = hashlib.sha256(name.encode()).hexdigest()[:16]
        return self._folder / f"{key}.{batch}.npy"

    def _keep(self, batch: int, name: str, array: Array) -> None:
        path = self._file(batch, name)
        part = path.with_suffix(".part")
        with part.open("wb") as stream:
            np.save(stream, array)
        part.replace(path)

    def _forget(self, index: int) -> None:
        """Remove what no segment after this one reads."""
        later = {v.name for segment in self.segments[index + 1 :] for v in segment.inputs}
        for value in (*self.segments[index].inputs, *self.model.graph.inputs):
            if value.name not in later:
                for batch in range(self.count):
                    self._file(batch, value.name or "").unlink(missing_ok=True)


def trim() -> None:
    """Give back what the engine has freed: glibc keeps it, in an arena for each thread."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _within(node: ir.Node) -> Iterator[ir.Node]:
    """A node and those of its bodies."""
    yield node
    for attr in node.attributes.values():
        if isinstance(attr, ir.Attr) and attr.type == ir.AttributeType.GRAPH:
            yield from attr.as_graph().all_nodes()
        elif isinstance(attr, ir.Attr) and attr.type == ir.AttributeType.GRAPHS:
            for graph in attr.as_graphs():
                yield from graph.all_nodes()


def _costs(nodes: Iterable[ir.Node]) -> Iterator[int]:
    """Bytes of the weights that each node is the first to read."""
    seen = set[ir.Value]()
    for node in nodes:
        fresh = {v for n in _within(node) for v in n.inputs if v is not None} - seen
        seen |= fresh
        yield sum(v.const_value.nbytes for v in fresh if v.const_value is not None)


def _bounds(costs: Sequence[int], crossing: Sequence[float], limit: int) -> list[int]:
    """Positions before which a segment begins, so that none holds more than ``limit``."""
    total = [0, *itertools.accumulate(costs)]
    bounds: list[int] = []
    begin = 0
    while total[-1] - total[begin] > limit:
        fits = [i for i in range(begin + 1, len(costs)) if crossing[i] < math.inf]
        within = [i for i in fits if total[i] - total[begin] <= limit]
        # A segment is not cut short by more than half for the sake of a narrow place.
        full = [i for i in within if total[i] - total[begin] > limit // 2]
        if not fits:
            break
        begin = min(full or within[-1:] or fits[:1], key=lambda i: (crossing[i], -i))
        bounds.append(begin)
    return bounds


def _peek(feeds: Iterable[Tensors]) -> tuple[Tensors, Iterable[Tensors]]:
    iterator = iter(feeds)
    first = next(iterator, None)
    if first is None:
        raise BadInput(
            "the calibration data is empty", about="quantize", remedy="give at least one sample"
        )
    return first, itertools.chain([first], iterator) if iterator is feeds else feeds


def free_batch(model: ir.Model) -> str | None:
    """The name of the leading dimension that all inputs share and a feed may choose, if any."""
    names = set()
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        shape = value.shape
        if shape is None or not len(shape) or isinstance(shape[0], int):
            return None
        names.add(shape[0].value)
    return names.pop() if len(names) == 1 else None


def batches(
    feeds: Iterable[Tensors], free: str | None, limit: int
) -> Iterator[tuple[Tensors, int]]:
    """Feeds cut and joined along a free batch dimension, each with its number of samples."""
    waiting: list[Tensors] = []
    for feed in feeds:
        sizes = {np.shape(array)[0] for array in feed.values() if np.ndim(array)}
        if free is None or len(sizes) != 1 or any(not np.ndim(a) for a in feed.values()):
            yield from _joined(waiting)
            waiting = []
            yield feed, 1
            continue
        size = sizes.pop()
        if waiting and (_rest(waiting[0]) != _rest(feed) or _length(waiting) + size > limit):
            yield from _joined(waiting)
            waiting = []
        if size < limit:
            waiting.append(feed)
            continue
        for start in range(0, size, limit):
            end = min(start + limit, size)
            yield {name: array[start:end] for name, array in feed.items()}, end - start
    yield from _joined(waiting)


def _rest(feed: Tensors) -> dict[str, tuple[int, ...]]:
    """What the arrays of two feeds have to have in common to be joined."""
    return {name: np.shape(array)[1:] for name, array in feed.items()}


def _length(feeds: Sequence[Tensors]) -> int:
    return sum(len(next(iter(feed.values()))) for feed in feeds)


def _joined(feeds: Sequence[Tensors]) -> Iterator[tuple[Tensors, int]]:
    if len(feeds) == 1:
        yield feeds[0], _length(feeds)
    elif feeds:
        names = feeds[0].keys()
        yield {name: np.concatenate([f[name] for f in feeds]) for name in names}, _length(feeds)


def _named_dims(model: ir.Model, sample: Tensors) -> dict[str, int]:
    """Sizes of the symbolic dimensions of the inputs in one sample."""
    named: dict[str, int] = {}
    for value in model.graph.inputs:
        array = sample.get(value.name or "")
        if array is not None and value.shape is not None:
            for dim, size in zip(value.shape, np.shape(array), strict=False):
                if not isinstance(dim, int):
                    named[str(dim.value)] = size
    return named


def _cannot_run(error: Exception) -> BackendFailed:
    return BackendFailed(
        f"ONNX Runtime cannot run the model to calibrate it: {one_line(error)}",
        about="quantize",
        remedy="use a recipe without calibration, e.g. int8-weights",
    )
