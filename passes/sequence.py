"""Which values of a decoder hold one entry for each token, and which are about the whole sequence.

A KV cache is sound where every operator but Attention treats each position by itself. This finds
out, by what operators do and not by what anything is called:

- *token* values come from the ids; they have one sequence axis, and position t of them depends on
  position t (and, through causal Attention, on earlier ones) alone;
- *total* values come from the attention mask or from lengths (positions, masks, windows): cheap,
  and to be computed for the whole sequence even when only its last tokens are new;
- *length* values are shapes and what is computed from them; *static* ones do not depend on either.

An input is taken to be a token input until something mixes its positions (CumSum of a mask, the
mask of an Attention); then it is a total one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import attribute, constant, is_op
from trivium.passes.masks import mask_problem

ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "And", "Cast", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Gelu", "Greater",
        "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul",
        "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sin", "Sqrt", "Sub", "Swish",
        "Tanh", "Where",
    }
)  # fmt: skip

ALONG_AN_AXIS = {"Concat": 0, "LogSoftmax": -1, "ScatterElements": 0, "Softmax": -1, "Split": 0,
                 "TopK": -1}  # fmt: skip
"""Operators that work along one axis, and that axis by default."""

NORMALIZATIONS = frozenset({"LayerNormalization", "RMSNormalization"})
REDUCTIONS = frozenset({"ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum"})
SHAPING = frozenset({"Expand", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


class Kind(Enum):
    """What a value is about; see the module's docstring."""

    STATIC = "static"
    LENGTH = "length"
    TOTAL = "total"
    TOKEN = "token"


class NotUnderstood(Exception):
    """Nothing certain can be said about a node.

    Args:
        node: The node.
        reason: What it does or may do, as a clause.
    """

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


@dataclass
class Sequence:
    """The result of the analysis.

    Attributes:
        symbol: The symbolic dimension that is the sequence.
        kinds: Of every value that is not static.
        attentions: The nodes that need a cache, in order.
        total_inputs: Graph inputs that span the whole sequence (attention masks).
    """

    symbol: str
    kinds: dict[ir.Value, Kind] = field(default_factory=dict)
    attentions: list[ir.Node] = field(default_factory=list)
    total_inputs: set[ir.Value] = field(default_factory=set)
    _sources: dict[ir.Value, frozenset[ir.Value]] = field(default_factory=dict)
    _whole: set[ir.Value] = field(default_factory=set)

    def kind(self, value: ir.Value | None) -> Kind:
        return self.kinds.get(value, Kind.STATIC) if value is not None else Kind.STATIC

    def axes(self, value: ir.Value | None) -> list[int]:
        """The axes of a value that are the sequence; of those whose shape is unknown, none."""
        if value is None or value.shape is None:
            return []
        return [
            i
            for i, d in enumerate(value.shape)
            if not isinstance(d, int) and d.value == self.symbol
        ]

    def dtype(self, value: ir.Value | None) -> ir.DataType:
        """The dtype of a value; of one that inference left open, float32."""
        return value.dtype if value is not None and value.dtype is not None else ir.DataType.FLOAT

    def axis(self, value: ir.Value | None) -> int | None:
        """The one sequence axis of a value, or None if there is none or more."""
        found = self.axes(value)
        return found[0] if len(found) == 1 else None


def analyse(graph: ir.Graph) -> Sequence | None:
    """Analyse a graph with causal attention; None if it has no Attention to cache.

    Raises:
        NotUnderstood: A node that mixes positions, or may.
    """
    attentions = [node for node in graph if is_op(node, "Attention") and not is_cached(node)]
    if not attentions:
        return None
    query = attentions[0].inputs[0]
    dim = query.shape[-2] if query is not None and query.shape is not None else None
    if query is None or dim is None or isinstance(dim, int) or dim.value is None:
        raise NotUnderstood(attentions[0], "the length of its queries is not a symbolic dimension")
    sequence = Sequence(dim.value, attentions=attentions)
    problems: dict[ir.Value, NotUnderstood] = {}
    while (found := _flow(graph, sequence)) is not None:
        inputs, problem = found
        if not inputs:
            raise _culprit(problems) or problem
        for value in inputs:
            problems.setdefault(value, problem)
        sequence.total_inputs |= inputs
    _prove_masks(graph, sequence)
    return sequence


def _prove_masks(graph: ir.Graph, sequence: Sequence) -> None:
    """Evaluate the masks that have to hide the future, or that the rules do not understand."""
    problems: dict[tuple[ir.Value, bool], str | None] = {}
    for node in sequence.attentions:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        causal = not attribute(node, "is_causal", 0)
        if mask is None or not (causal or mask in sequence._whole):
            continue
        if (mask, causal) not in problems:
            problems[mask, causal] = mask_problem(graph, mask, sequence.symbol, causal=causal)
        problem = problems[mask, causal]
        if problem is not None:
            raise NotUnderstood(node, problem)


def _culprit(problems: dict[ir.Value, NotUnderstood]) -> NotUnderstood | None:
    """Of the nodes that mix the positions of inputs, one that mixes those of looked-up tokens."""
    for value, problem in problems.items():
        if any(is_op(node, "Gather") and index == 1 for node, index in value.uses()):
            return problem
    return None


def is_cached(node: ir.Node) -> bool:
    """Whether an Attention has a cache: its own (past_key), or one given by its length."""
    return any(value is not None for value in node.inputs[4:])


def _flow(graph: ir.Graph, sequence: Sequence) -> tuple[frozenset[ir.Value], NotUnderstood] | None:
    """Give every value its kind; stop at the first node that mixes positions.

    Returns:
        The token inputs whose positions it mixes, and the problem; None at the end of the graph.
    """
    sequence.kinds.clear()
    sequence._sources.clear()
    sequence._whole.clear()
    for value in graph.inputs:
        if sequence.axes(value):
            total = value in sequence.total_inputs
            sequence.kinds[value] = Kind.TOTAL if total else Kind.TOKEN
            sequence._sources[value] = frozenset() if total else frozenset({value})
    for node in graph:
        kinds = {sequence.kind(value) for value in node.inputs}
        if is_op(node, "Attention") and sequence.kind(node.inputs[0]) is not Kind.TOKEN:
            return frozenset(), NotUnderstood(node, "no token reaches its queries")
        if any(attr.type in _GRAPHS for attr in node.attributes.values()):
            return frozenset(), NotUnderstood(node, "its body may read any value")
        if is_op(node, "Shape"):
            about_length = bool(kinds & {Kind.TOKEN, Kind.TOTAL})
            _set(sequence, node, Kind.LENGTH if about_length else Kind.STATIC)
        elif Kind.TOKEN in kinds:
            mixed, reason = _mixed_inputs(sequence, node)
            if mixed:
                sources = (sequence._sources.get(v, frozenset()) for v in mixed)
                return frozenset[ir.Value]().union(*sources), NotUnderstood(node, reason)
            _set(sequence, node, Kind.TOKEN)
        elif Kind.TOTAL in kinds:
            _set(sequence, node, Kind.TOTAL)
            if not _prefix_stable(sequence, node):
                sequence._whole.update(node.outputs)
        elif Kind.LENGTH in kinds:
            spans = any(sequence.axes(value) for value in node.outputs)
            _set(sequence, node, Kind.TOTAL if spans else Kind.LENGTH)
            if spans and not _prefix_stable(sequence, node):
                sequence._whole.update(node.outputs)
    return None


def _set(sequence: Sequence, node: ir.Node, kind: Kind) -> None:
    if kind is Kind.STATIC:
        return
    sources = frozenset[ir.Value]().union(
        *(sequence._sources.get(v, frozenset()) for v in node.inputs if v is not None)
    )
    whole = any(value in sequence._whole for value in node.inputs)
    for value in node.outputs:
        sequence.kinds[value] = kind
        sequence._sources[value] = sources
        if whole and kind is Kind.TOTAL:
            sequence._whole.add(value)


def _prefix_stable(sequence: Sequence, node: ir.Node) -> bool:
    """Whether position t of a total node's outputs stays as it is when the sequence grows.

    Lengths may say how far an output reaches, not enter its values.
    """
    kinds = [sequence.kind(value) for value in node.inputs]
    if node.domain != "":
        return False
    if node.op_type in ELEMENTWISE:
        return Kind.LENGTH not in kinds
    if node.op_type == "CumSum":
        return not attribute(node, "reverse", 0) and kinds[1] is Kind.STATIC
    if node.op_type == "Range":
        return kinds[0] is Kind.STATIC and kinds[2] is Kind.STATIC
    if node.op_type == "Gather":
        return kinds[0] is Kind.STATIC
    if node.op_type == "Trilu":
        return all(kind is Kind.STATIC for kind in kinds[1:])
    if node.op_type == "Slice":
        return _keeps_a_prefix(sequence, node)
    return node.op_type in {"ConstantOfShape", *SHAPING}


def _keeps_a_prefix(sequence: Sequence, node: ir.Node) -> bool:
    """Whether a Slice counts from the front: not ``[-n:]``, not ``[:-n]``, not backwards."""
    starts, ends, *rest = node.inputs[1:]
    steps = constant(rest[1]) if len(rest) > 1 else np.array([1])
    first, last = constant(starts), constant(ends)
    if first is None or steps is None or first.min() < 0 or steps.min() < 1:
        return False
    by_length = sequence.kind(ends) is Kind.LENGTH
    return by_length or (last is not None and last.min() >= 0)


def _mixed_inputs(sequence: Sequence, node: ir.Node) -> tuple[list[ir.Value], str]:
    """The token inputs that a node does not take position by position, and why.

    Raises:
        NotUnderstood: An Attention that no cache would leave as it is.
    """
    tokens = [v for v in node.inputs if v is not None and sequence.kind(v) is Kind.TOKEN]
    reason = "mixes positions in a way that is not understood"
    if is_op(node, "Attention"):
        return _mixed_by_attention(sequence, node), reason
    for value in node.inputs:
        if value in sequence._whole:
            return tokens, f"reads {value.name!r}, which depends on the whole sequence"
        if sequence.kind(value) is Kind.LENGTH and node.op_type not in SHAPING:
            return tokens, "computes with the length of the sequence"
    rule = _rule(node)
    if rule is None or not rule(sequence, node):
        return tokens, reason
    if any(sequence.axis(value) is None for value in (*tokens, *_read(node.outputs))):
        return tokens, "its sequence axis is not known"
    return [], ""


def _read(values: Iterable[ir.Value]) -> list[ir.Value]:
    return [value for value in values if value.uses() or value.is_graph_output()]


def _mixed_by_attention(sequence: Sequence, node: ir.Node) -> list[ir.Value]:
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is not None and sequence.kind(mask) is Kind.TOKEN:
        return [mask]
    if is_cached(node):
        raise NotUnderstood(node, "it has a cache already, and others have not")
    if mask is None and not attribute(node, "is_causal", 0):
        raise NotUnderstood(node, "it may look at tokens that are yet to come")
    if len(_read(node.outputs)) > 1:
        raise NotUnderstood(node, "more than its first output is read")
    for value in node.inputs[:3]:
        if sequence.kind(value) is not Kind.TOKEN or sequence.axes(value) != [rank(value) - 2]:
            raise NotUnderstood(node, "its queries, keys and values are not one for each token")
    if mask is not None and (
        rank(mask) - 1 not in sequence.axes(mask) or sequence.kind(mask) is not Kind.TOTAL
    ):
        raise NotUnderstood(node, "its mask does not span the sequence")
    return []


Rule = Callable[[Sequence, ir.Node], bool]


def _rule(node: ir.Node) -> Rule | None:
    """How to tell whether an operator works position by position."""
    if node.domain != "":
        return None
    for op_types, rule in RULES:
        if node.op_type in op_types:
            return rule
    return None


def _elementwise(sequence: Sequence, node: ir.Node) -> bool:
    output = _from_right(sequence, node.outputs[0])
    return all(
        _from_right(sequence, value) in (output, None) and len(sequence.axes(value)) <= 1
        for value in node.inputs
        if value is not None and sequence.kind(value) in (Kind.TOKEN, Kind.TOTAL)
    )


def _from_right(sequence: Sequence, value: ir.Value | None) -> int | None:
    axis = sequence.axis(value)
    return axis - rank(value) if axis is not None else None


def _matmul(sequence: Sequence, node: ir.Node) -> bool:
    left, right = node.inputs[0], node.inputs[1]
    return sequence.kind(right) is Kind.STATIC and sequence.axis(left) != rank(left) - 1


def _normalization(sequence: Sequence, node: ir.Node) -> bool:
    x, axis = node.inputs[0], attribute(node, "axis", -1)
    token_axis = sequence.axis(x)
    first = axis % rank(x)
    others = all(sequence.kind(value) is Kind.STATIC for value in node.inputs[1:])
    return token_axis is not None and token_axis < first and others


def _along_an_axis(sequence: Sequence, node: ir.Node) -> bool:
    axis = attribute(node, "axis", ALONG_AN_AXIS[node.op_type])
    places = {
        sequence.axis(v)
        for v in node.inputs
        if v is not None and sequence.kind(v) in (Kind.TOKEN, Kind.TOTAL)
    }
    return len(places) == 1 and None not in places and axis % rank(node.inputs[0]) not in places


def _reduction(sequence: Sequence, node: ir.Node) -> bool:
    x = node.inputs[0]
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.size == 0:
        return False
    return sequence.axis(x) not in {int(axis) % rank(x) for axis in axes.ravel()}


def _gather(sequence: Sequence, node: ir.Node) -> bool:
    data, indices = node.inputs[0], node.inputs[1]
    if sequence.kind(data) is Kind.STATIC:
        return True
    axis = attribute(node, "axis", 0) % rank(data)
    return sequence.kind(indices) is Kind.STATIC and sequence.axis(data) != axis


def _rotary(sequence: Sequence, node: ir.Node) -> bool:
    x, cos, sin = node.inputs[0], node.inputs[1], node.inputs[2]
    places = node.inputs[3] if len(node.inputs) > 3 else None
    if sequence.axis(x) != rank(x) - 2:
        return False
    if places is None:
        return sequence.axes(cos) == [1] and sequence.axes(sin) == [1]
    tables = sequence.kind(cos) is Kind.STATIC and sequence.kind(sin) is Kind.STATIC
    return tables and sequence.axes(places) == [1]


def _shaping(sequence: Sequence, node: ir.Node) -> bool:
    """The sequence axis stays whole: others are split and merged on either side of it."""
    x, y = node.inputs[0], node.outputs[0]
    how = node.inputs[1] if len(node.inputs) > 1 else None
    if sequence.kind(how) not in (Kind.STATIC, Kind.LENGTH):
        return False
    if node.op_type == "Expand":
        return _from_right(sequence, x) == _from_right(sequence, y)
    if node.op_type != "Reshape":
        return True
    before, after = sequence.axis(x), sequence.axis(y)
    if before is None or after is None or x is None or x.shape is None or y.shape is None:
        return False
    return _size(x.shape[:before]) == _size(y.shape[:after]) is not None


def _size(dims: Iterable[int | ir.SymbolicDim]) -> tuple[int, list[str]] | None:
    """The product of dimensions: of the known ones, and the names of the others."""
    known, names = 1, []
    for dim in dims:
        if isinstance(dim, int):
            known *= dim
        elif dim.value is None:
            return None
        else:
            names.append(dim.value)
    return known, sorted(names)


RULES: tuple[tuple[frozenset[str], Rule], ...] = (
    (ELEMENTWISE, _elementwise),
    (frozenset({"MatMul"}), _matmul),
    (NORMALIZATIONS, _normalization),
    (frozenset(ALONG_AN_AXIS), _along_an_axis),
    (REDUCTIONS, _reduction),
    (frozenset({"Gather"}), _gather),
    (frozenset({"RotaryEmbedding"}), _rotary),
    (SHAPING, _shaping),
)
"""Operators -> whether a node of them works position by position."""


def rank(value: ir.Value | None) -> int:
    """The number of axes of a value; 0 if that is not known."""
    return len(value.shape) if value is not None and value.shape is not None else 0
