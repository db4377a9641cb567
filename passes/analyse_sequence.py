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

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import attribute, constant, is_op
from trivium.passes.masks import mask_problem
from trivium.passes.positionwise import ELEMENTWISE, SHAPING, works_position_by_position
from trivium.passes.sequence import Kind, NotUnderstood, Sequence, rank


def analyse(graph: ir.Graph) -> Sequence | None:
    """Analyse a graph with causal attention; None if it has no Attention to cache.

    Raises:
        NotUnderstood: A node that mixes positions, or may.
    """
    attentions = [node for node in graph if is_op(node, "Attention") and not is_cached(node)]
    attentions = [node for node in attentions if not _looks_elsewhere(node)]
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


def _looks_elsewhere(node: ir.Node) -> bool:
    """Whether the keys of an Attention are of another sequence than its queries."""
    lengths = [
        str(value.shape[-2]) if value is not None and value.shape is not None else None
        for value in node.inputs[:2]
    ]
    return None not in lengths and lengths[0] != lengths[1] and not attribute(node, "is_causal", 0)


def _prove_masks(graph: ir.Graph, sequence: Sequence) -> None:
    """Evaluate the masks that have to hide the future, or that the rules do not understand."""
    problems: dict[tuple[ir.Value, bool], str | None] = {}
    for node in sequence.attentions:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        causal = not attribute(node, "is_causal", 0)
        if mask is None or not (causal or mask in sequence.whole):
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


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _flow(graph: ir.Graph, sequence: Sequence) -> tuple[frozenset[ir.Value], NotUnderstood] | None:
    """Give every value its kind; stop at the first node that mixes positions.

    Returns:
        The token inputs whose positions it mixes, and the problem; None at the end of the graph.
    """
    sequence.kinds.clear()
    sequence.sources.clear()
    sequence.whole.clear()
    for value in graph.inputs:
        if sequence.axes(value):
            total = value in sequence.total_inputs
            sequence.kinds[value] = Kind.TOTAL if total else Kind.TOKEN
            sequence.sources[value] = frozenset() if total else frozenset({value})
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
                sources = (sequence.sources.get(v, frozenset()) for v in mixed)
                return frozenset[ir.Value]().union(*sources), NotUnderstood(node, reason)
            _set(sequence, node, Kind.TOKEN)
        elif Kind.TOTAL in kinds:
            _set(sequence, node, Kind.TOTAL)
            if not _prefix_stable(sequence, node):
                sequence.whole.update(node.outputs)
        elif Kind.LENGTH in kinds:
            spans = any(sequence.axes(value) for value in node.outputs)
            _set(sequence, node, Kind.TOTAL if spans else Kind.LENGTH)
            if spans and not _prefix_stable(sequence, node):
                sequence.whole.update(node.outputs)
    return None


def _set(sequence: Sequence, node: ir.Node, kind: Kind) -> None:
    if kind is Kind.STATIC:
        return
    # A length is the same whatever the tokens are.
    sources = frozenset[ir.Value]().union(
        *(sequence.sources.get(v, frozenset()) for v in node.inputs if v is not None)
        if kind is not Kind.LENGTH
        else ()
    )
    whole = any(value in sequence.whole for value in node.inputs)
    for value in node.outputs:
        sequence.kinds[value] = kind
        sequence.sources[value] = sources
        if whole and kind is Kind.TOTAL:
            sequence.whole.add(value)


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
    if node.op_type == "Concat":
        outputs = node.outputs[0]
        return sequence.axis(outputs) not in (None, attribute(node, "axis", 0) % rank(outputs))
    if node.op_type == "MatMul":
        return _matmul_is_stable(sequence, node)
    if node.op_type == "Trilu":
        return all(kind is Kind.STATIC for kind in kinds[1:])
    if node.op_type == "Slice":
        return _keeps_a_prefix(sequence, node)
    return node.op_type in {"ConstantOfShape", *SHAPING}


def _matmul_is_stable(sequence: Sequence, node: ir.Node) -> bool:
    """Whether a product sums over something else than positions (angles: frequencies x places)."""
    left, right = node.inputs[0], node.inputs[1]
    kinds = sequence.kind(left), sequence.kind(right)
    if kinds == (Kind.STATIC, Kind.TOTAL):
        return rank(right) > 1 and sequence.axis(right) not in (None, rank(right) - 2)
    if kinds == (Kind.TOTAL, Kind.STATIC):
        return rank(left) > 1 and sequence.axis(left) not in (None, rank(left) - 1)
    return False


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
        if value in sequence.whole:
            return tokens, f"reads {value.name!r}, which depends on the whole sequence"
        if sequence.kind(value) is Kind.LENGTH and node.op_type not in SHAPING:
            return tokens, "computes with the length of the sequence"
    flattened = [v for v in node.inputs if sequence.kind(v) is Kind.TOTAL and not sequence.axes(v)]
    if any(sequence.axis(value) is not None for value in flattened):
        return tokens, reason
    if not works_position_by_position(sequence, node):
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
    if node not in sequence.attentions and not is_cached(node):
        return _mixed_by_looking_elsewhere(sequence, node)
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


def _mixed_by_looking_elsewhere(sequence: Sequence, node: ir.Node) -> list[ir.Value]:
    """Of cross-attention: each query looks at the same keys, whatever the other tokens are."""
    query, *others = node.inputs[:3]
    if any(sequence.kind(value) is not Kind.STATIC for value in others):
        raise NotUnderstood(node, "its keys and values depend on the tokens")
    if sequence.axes(query) != [rank(query) - 2]:
        raise NotUnderstood(node, "its queries are not one for each token")
    return []
