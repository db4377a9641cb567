"""Showing the tensors of a graph to observers while a walk runs it on representative inputs."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trivium.compiler.errors import BadInput
from trivium.passes.quantization import walk
from trivium.passes.quantization.observers import Observer

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.backend import Tensors

SAVE_EVERY = 10.0
"""Seconds between two writings of the state."""


@dataclass(frozen=True)
class Calibrated:
    """What a calibration saw.

    Attributes:
        observers: By value; those whose ``seen`` is 0 were never computed.
        samples: How many samples there were.
        spoiled: Values that held NaN or infinity on some sample.
    """

    observers: Mapping[ir.Value, Observer]
    samples: int
    spoiled: frozenset[ir.Value]


def calibrate(
    model: ir.Model,
    values: Sequence[ir.Value],
    feeds: Iterable[Tensors],
    make: Callable[[ir.Value], Observer],
    *,
    budget: int = walk.BUDGET,
    weights: int = walk.WEIGHTS,
    state: Path | None = None,
) -> Calibrated:
    """Show every batch of ``values`` to an observer of its own.

    Args:
        model: In normal form; unchanged afterwards.
        values: Float tensors of the main graph.
        feeds: What `walk.Walk` takes.
        make: Makes the observer of a value.
        budget: Bytes of observed tensors that one run may return.
        weights: Bytes of weights that the engine may hold at a time.
        state: A file that keeps what was learnt; a calibration that was killed goes on from it.
            It is removed when the calibration is complete.

    Raises:
        BadInput: No feeds, or a state of another calibration.
        BackendFailed: ONNX Runtime cannot run the model.
    """
    kept = _State(state, model, values, make) if state is not None else None
    folder = kept.folder if kept is not None else None
    walked = walk.Walk(model, feeds, values, budget=budget, weights=weights, folder=folder)
    observers = {value: make(value) for value in values}
    spoiled: set[ir.Value] = set()
    position, group_at, batch_at = kept.restore(walked, observers, spoiled) if kept else (0, 0, 0)
    left = dict.fromkeys(values)
    for segment in walked.segments[:position]:
        _take(left, segment)
    for index, segment in enumerate(walked.walk_from(position), position):
        groups = list(_groups(walked, _take(left, segment), budget))
        for number, group in enumerate(groups):
            if number < group_at:
                continue
            for batch, arrays in enumerate(walked.run(segment, group, start=batch_at), batch_at):
                for value, array in zip(group, arrays, strict=True):
                    _show(observers[value], array, value, spoiled)
                if kept is not None:
                    kept.save(walked, observers, spoiled, (index, number, batch + 1))
            batch_at = 0
        group_at = 0
        if kept is not None:
            kept.save(walked, observers, spoiled, (index, len(groups), 0), now=True)
    if kept is not None:
        kept.remove()
    return Calibrated(observers, walked.samples, frozenset(spoiled))


def _take(left: dict[ir.Value, None], segment: walk.Segment) -> list[ir.Value]:
    """Remove from ``left`` the values that a segment can give, and return them in graph order."""
    given = [*segment.inputs, *(value for node in segment.nodes for value in node.outputs)]
    found = [value for value in given if value in left]
    for value in found:
        del left[value]
    return found


def _groups(walked: walk.Walk, values: Sequence[ir.Value], budget: int) -> Iterator[list[ir.Value]]:
    """Values in groups that fit the budget."""
    group: list[ir.Value] = []
    total = 0
    for value in values:
        nbytes = walked.size(value)
        if group and total + nbytes > budget:
            yield group
            group, total = [], 0
        group.append(value)
        total += nbytes
    if group:
        yield group


def _show(
    observer: Observer, array: np.ndarray[Any, Any], value: ir.Value, spoiled: set[ir.Value]
) -> None:
    if array.size == 0:
        return
    array = array.astype(np.float32, copy=False)
    # The sum of finite values is finite unless it overflows; only then look at each of them.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(array.sum()) or np.isfinite(array).all()
    if finite:
        observer.update(array)
    else:
        spoiled.add(value)


Position = tuple[int, int, int]
"""Segment, group and batch that come next."""


class _State:
    """What a calibration has learnt so far, in a file that is whole whenever the process dies.

    What crosses segments is kept in a folder beside it.
    """

    def __init__(
        self,
        path: Path,
        model: ir.Model,
        values: Sequence[ir.Value],
        make: Callable[[ir.Value], Observer],
    ) -> None:
        self.path, self.values = path, values
        self.folder = path.with_name(path.name + ".tensors")
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = [f"{v.name} {type(make(v)).__name__} {v.shape}" for v in values]
        facts += [f"{node.op_type} {node.name}" for node in model.graph]
        self._key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._saved = time.monotonic()

    def restore(
        self, walked: walk.Walk, observers: Mapping[ir.Value, Observer], spoiled: set[ir.Value]
    ) -> Position:
        if not self.path.is_file():
            return 0, 0, 0
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                arrays = dict(archive)
            facts = json.loads(str(arrays["facts"]))
        except Exception as error:  # numpy and zipfile raise their own kinds for damaged archives
            raise BadInput(
                "not a calibration's state", about=str(self.path), remedy="remove the file"
            ) from error
        if facts["key"] != self._key or facts["batch"] != walked.batch:
            raise BadInput(
                "the state of a calibration of another model, or with other options",
                about=str(self.path),
                remedy="remove the file",
            )
        for i, value in enumerate(self.values):
            prefix = f"{i}."
            kept = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
            observers[value].restore(kept)
            if i in facts["spoiled"]:
                spoiled.add(value)
        walked.samples, walked.count = facts["samples"], facts["count"]
        segment, group, batch = facts["position"]
        return segment, group, batch

    def save(
        self,
        walked: walk.Walk,
        observers: Mapping[ir.Value, Observer],
        spoiled: set[ir.Value],
        position: Position,
        *,
        now: bool = False,
    ) -> None:
        if not now and time.monotonic() - self._saved < SAVE_EVERY:
            return
        facts = {
            "key": self._key,
            "batch": walked.batch,
            "samples": walked.samples,
            "count": walked.count,
            "position": position,
            "spoiled": [i for i, value in enumerate(self.values) if value in spoiled],
        }
        arrays = {
            f"{i}.{name}": array
            for i, value in enumerate(self.values)
            for name, array in observers[value].state().items()
        }
        part = self.path.with_name(self.path.name + ".part")
        with part.open("wb") as stream:
            np.savez(stream, facts=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]  # its stubs take no arrays by name
        part.replace(self.path)
        self._saved = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()
