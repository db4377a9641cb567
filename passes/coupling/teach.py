"""Least squares toward a teacher, layer by layer: what a recipe cost, made up for in closed form.

A product's output reaches some value of the graph through nothing but sums. With X its inputs and
R what that value lacks of the teacher's, ``(X'X)^-1 X'R`` added to its weight and bias leaves the
least squared error. Products are taken in order, so that each sees, and corrects, what those before
it give by then: the last product of a residual layer makes up for layers before it that are gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import attribute, dims, is_constant, is_op, is_plain_product, weight
from trivium.passes.quantization.moments import patches
from trivium.passes.quantization.walk import Walk

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

Array = np.ndarray[Any, np.dtype[Any]]

DAMPING = 1e-2
"""Of the mean of the moment's diagonal, added to it: how much the weights are held back."""

LARGEST = 4096
"""Products that sum more inputs are left alone: the moment is its square."""

_MANY = 0.1
"""Share of zeros from which on a weight's zeros are meant, and stay."""


@dataclass(frozen=True)
class Lesson:
    """A product that can be taught.

    Attributes:
        node: The product.
        bias: A vector added to its output, if any.
        goals: The values, named as some of the teacher, that its output is a summand of; the
            furthest comes last.
    """

    node: ir.Node
    bias: ir.Value | None
    goals: tuple[ir.Value, ...]


@dataclass(frozen=True)
class Taught:
    """A product that was taught, and the squared error before, in units of the teacher's power."""

    node: str
    goal: str
    error: float


def teach(
    model: ir.Model,
    teacher: ir.Model,
    feeds: Iterable[Tensors],
    *,
    exclude: tuple[str, ...] = (),
    largest: int = LARGEST,
    damping: float = DAMPING,
) -> list[Taught]:
    """Fit the weights of a model, product by product, to a teacher whose values have its names.

    Args:
        model: In normal form; its weights are replaced.
        teacher: In normal form.
        feeds: Representative inputs, iterated twice.
        exclude: Names of weights to leave as they are; ``*`` and ``?`` as in a shell.
    """
    values = ir.convenience.create_value_mapping(teacher.graph, include_subgraphs=False)
    found = {lesson.node: lesson for lesson in _lessons(model.graph, values, exclude, largest)}
    if not found:
        return []
    goals = {goal: values[goal.name or ""] for one in found.values() for goal in one.goals}
    mine = Walk(model, feeds, [*goals, *map(_input, found)], cuts=set(found))
    makers = {value.producer() for value in goals.values()}
    theirs = Walk(teacher, feeds, list(goals.values()), cuts={n for n in makers if n is not None})
    mine.batch = theirs.batch = min(mine.batch, theirs.batch)
    ahead = iter(theirs)
    right = next(ahead)
    place = {n: at for at, segment in enumerate(theirs.segments) for n in segment.nodes}
    done = []
    for segment in mine:
        for node in [one for one in segment.nodes if one in found]:
            # Further goals may lie behind a product that comes after this one.
            goal = next((v for v in found[node].goals[::-1] if v.producer() in segment.nodes), None)
            maker = goals[goal].producer() if goal is not None else None
            if goal is None or maker is None or place[maker] < theirs.segments.index(right):
                continue
            while right is not theirs.segments[place[maker]]:
                right = next(ahead)
            sums = _sums(node, mine.run(segment, [_input(node), goal], keep=False),
                         theirs.run(right, [goals[goal]], keep=False))  # fmt: skip
            if sums.usable:
                _change(found[node], sums, damping)
                done.append(Taught(node.name or "", goal.name or "", sums.error))
    return done


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _sums(node: ir.Node, mine: Iterator[list[Array]], theirs: Iterator[list[Array]]) -> _Sums:
    """Over the batches of a product's inputs and what is there of its goal, and of the goal."""
    sums = _Sums()
    for (inputs, have), (goal,) in zip(mine, theirs, strict=True):
        sums.update(node, inputs, goal.astype(np.float32) - have, goal)
    return sums


class _Sums:
    """``X'X`` and ``X'R`` over the samples, X with a column of ones for the bias."""

    def __init__(self) -> None:
        self.inner: Any = 0.0
        self.cross: Any = 0.0
        self.missing = self.power = 0.0
        self.usable = True

    def update(self, node: ir.Node, inputs: Array, lacks: Array, goal: Array) -> None:
        if not (np.isfinite(inputs).all() and np.isfinite(lacks).all()):
            self.usable = False
            return
        if node.op_type == "Conv":
            lacks = np.moveaxis(lacks, 1, -1)
        rows = lacks.reshape(-1, lacks.shape[-1])
        self.missing += float(np.square(rows, dtype=np.float64).sum())
        self.power += float(np.square(goal, dtype=np.float64).sum())
        at = 0
        for (part,) in patches(node, inputs):
            wide = np.concatenate([part, np.ones((len(part), 1), np.float32)], axis=1)
            self.inner = self.inner + wide.T @ wide
            self.cross = self.cross + wide.T @ rows[at : at + len(part)]
            at += len(part)

    @property
    def error(self) -> float:
        return self.missing / max(self.power, 1e-30)


def _lessons(
    graph: ir.Graph, teacher: Mapping[str, ir.Value], exclude: tuple[str, ...], largest: int
) -> Iterator[Lesson]:
    for node in graph:
        if not is_op(node, "Conv", "Gemm", "MatMul") or attribute(node, "group", 1) != 1:
            continue
        value, x = node.inputs[1], node.inputs[0]
        if value is None or x is None or x.const_value is not None or len(value.uses()) > 1:
            continue
        if any(fnmatchcase(value.name or "", pattern) for pattern in exclude):
            continue
        shape = dims(value)
        if not is_constant(value) or value.const_value is None or shape is None or None in shape:
            continue
        if not is_plain_product(node) or len(shape) < 2:
            continue
        if node.op_type == "MatMul" and len(shape) != 2:
            continue
        array = weight(value)
        outputs = shape[0] if _turned(node) else shape[1]
        if array is None or array.dtype != np.float32 or array.size // (outputs or 1) > largest:
            continue
        lesson = _lesson(node, teacher, outputs or 0)
        if lesson.goals:
            yield lesson


def _lesson(node: ir.Node, teacher: Mapping[str, ir.Value], outputs: int) -> Lesson:
    """The sums that a product's output goes into and the teacher has, and its bias."""
    bias = _bias(node.inputs[2] if len(node.inputs) > 2 else None, outputs)
    goals, value = [], node.outputs[0]
    while True:
        other = teacher.get(value.name or "")
        if other is not None and dims(other) == dims(value) and other.producer() is not None:
            goals.append(value)
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output() or not is_op(uses[0][0], "Add"):
            break
        total, index = uses[0]
        added = total.inputs[1 - index]
        if dims(total.outputs[0]) != dims(value):
            break
        if bias is None and node.op_type == "MatMul":
            bias = _bias(added, outputs)
        value = total.outputs[0]
    return Lesson(node, bias, tuple(goals))


def _bias(value: ir.Value | None, outputs: int) -> ir.Value | None:
    if value is None or not is_constant(value) or len(value.uses()) > 1:
        return None
    array = weight(value)
    fits = array is not None and array.shape == (outputs,) and array.dtype == np.float32
    return value if fits else None


def _turned(node: ir.Node) -> bool:
    """Whether a product's weight is stored with its outputs first."""
    return node.op_type == "Conv" or bool(attribute(node, "transB", 0))


def _change(lesson: Lesson, sums: _Sums, damping: float) -> None:
    value = lesson.node.inputs[1]
    assert value is not None
    array = weight(value)
    assert array is not None
    turned = _turned(lesson.node)
    matrix = array.reshape(len(array), -1).T if turned else array
    step = solved(matrix, sums.inner, sums.cross, damping, bias=lesson.bias is not None)
    made = matrix + step[:-1]
    _store(value, (made.T.reshape(array.shape) if turned else made).astype(np.float32))
    if lesson.bias is not None:
        old = weight(lesson.bias)
        assert old is not None
        _store(lesson.bias, (old + step[-1]).astype(np.float32))


def solved(matrix: Array, inner: Array, cross: Array, damping: float, *, bias: bool) -> Array:
    """The [K + 1, N] change of a weight and its bias that leaves the least squared error.

    Zeros stay zeros where there are many of them: each output has a system of its own then.

    Args:
        matrix: [K, N], the weight.
        inner: [K + 1, K + 1], of the inputs and a one.
        cross: [K + 1, N], of those and what lacks.
        bias: Whether there is one to change.
    """
    second = inner.astype(np.float64)
    second[np.diag_indices_from(second)] += damping * max(float(np.diag(second)[:-1].mean()), 1e-30)
    made = np.zeros(cross.shape, np.float64)
    if np.count_nonzero(matrix == 0) < _MANY * matrix.size:
        count = len(cross) if bias else len(cross) - 1
        made[:count] = np.linalg.solve(second[:count, :count], cross[:count])
        return made
    for column in range(matrix.shape[1]):
        free = np.append(matrix[:, column] != 0, bias)
        if free.any():
            made[free, column] = np.linalg.solve(second[np.ix_(free, free)], cross[free, column])
    return made


def _store(value: ir.Value, array: Array) -> None:
    old = value.const_value
    assert old is not None
    stored = np.ascontiguousarray(array)
    value.const_value = ir.tensor(stored, dtype=old.dtype, name=old.name)
