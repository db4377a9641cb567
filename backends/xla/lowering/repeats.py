"""Layers that are the same but for their weights: found in the graph, and run as one `lax.scan`.

Nodes are put into the order in which a walk from the outputs finishes them, which keeps the nodes
of a layer together whatever order the file has. Node p *matches* node p + P if both do the same and
each pair of their inputs is one value, two weights of one shape, or made P nodes apart. As long a
run of matches as possible, cut every P nodes, gives the blocks; where the cut lies is chosen so
that the fewest values cross it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.backends.xla.lowering.lazy import jax, jnp

LEAST = 4
"""How many blocks there have to be: fewer are compiled as quickly one by one."""

Place = tuple[int, int]
"""Of a value in its block: which node makes it, as which output."""


@dataclass(frozen=True)
class Repeats:
    """A graph as a prologue, blocks that are the same, and an epilogue.

    Attributes:
        stacked: What the first block reads as a weight -> what each block reads there.
        carried: What the first block reads -> the place from which the next block reads it.
    """

    before: tuple[ir.Node, ...]
    blocks: tuple[tuple[ir.Node, ...], ...]
    after: tuple[ir.Node, ...]
    stacked: Mapping[ir.Value, tuple[ir.Value, ...]]
    carried: Mapping[ir.Value, Place]

    def escaping(self) -> list[Place]:
        """Places of values that something behind the blocks reads, the carried ones left out."""
        inside = {node for block in self.blocks for node in block}
        found: dict[Place, None] = {}
        for block in self.blocks:
            for index, node in enumerate(block):
                for output, value in enumerate(node.outputs):
                    read = any(user not in inside for user, _ in value.uses())
                    if read or value.is_graph_output():
                        found[index, output] = None
        last = {self.at(-1, place) for place in self.carried.values()}
        return [place for place in found
                if any(self._escapes(block, place, inside) and self.at(number, place) not in last
                       for number, block in enumerate(self.blocks))]  # fmt: skip

    def _escapes(self, block: Sequence[ir.Node], place: Place, inside: Collection[ir.Node]) -> bool:
        value = block[place[0]].outputs[place[1]]
        return value.is_graph_output() or any(user not in inside for user, _ in value.uses())

    def at(self, block: int, place: Place) -> ir.Value:
        """The value at a place of a block."""
        return self.blocks[block][place[0]].outputs[place[1]]


def find(graph: ir.Graph, weights: Collection[ir.Value]) -> Repeats | None:
    """Return the blocks of a graph that repeat, if `LEAST` do; ``weights`` are its arguments."""
    nodes = _order(graph)
    if nodes is None:
        return None
    position = {node: index for index, node in enumerate(nodes)}
    static = [_signature(node) for node in nodes]
    best: Repeats | None = None
    for period in _periods(static):
        same = [
            static[p] == static[p + period]
            and _inputs_match(nodes[p], nodes[p + period], period, position, weights)
            for p in range(len(nodes) - period)
        ]
        start, length = _longest(same)
        count = length // period + 1
        if count < LEAST or (best is not None and count * period <= _covered(best)):
            continue
        found = [
            one
            for first in range(start, start + length - (count - 1) * period + 1)
            if (one := _cut(nodes, first, period, count, position, weights)) is not None
        ]
        best = min(found, key=lambda one: len(one.carried), default=best)
    return best


def _covered(one: Repeats) -> int:
    return len(one.blocks) * len(one.blocks[0])


def _order(graph: ir.Graph) -> list[ir.Node] | None:
    """The nodes in the order in which a walk from the outputs finishes them; None where bodies of
    control flow read what they are not given."""
    order: list[ir.Node] = []
    done: set[ir.Node] = set()
    roots = [value.producer() for value in graph.outputs]
    stack = [(node, False) for node in reversed(roots) if node is not None]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
            continue
        if node in done:
            continue
        done.add(node)
        if any(isinstance(a, ir.Attr) and a.type.name.startswith("GRAPH")
               for a in node.attributes.values()):  # fmt: skip
            return None
        stack.append((node, True))
        makers = [value.producer() for value in node.inputs if value is not None]
        stack += [(one, False) for one in reversed(makers) if one is not None and one not in done]
    return order


def _signature(node: ir.Node) -> tuple[Any, ...]:
    """What a node does, its inputs left out."""
    attributes = []
    for name, attr in sorted(node.attributes.items()):
        plain = isinstance(attr, ir.Attr) and attr.type.name not in ("TENSOR", "TENSORS")
        attributes.append((name, repr(attr.value) if plain else id(attr)))
    outputs = [(str(value.shape), value.dtype) for value in node.outputs]
    return node.domain, node.op_type, node.overload, tuple(attributes), tuple(outputs)


def _periods(static: Sequence[tuple[Any, ...]]) -> list[int]:
    """How far apart nodes lie that do the same, the most frequent distances first."""
    last: dict[tuple[Any, ...], list[int]] = {}
    counts: dict[int, int] = {}
    for index, one in enumerate(static):
        seen = last.setdefault(one, [])
        # A layer may do the same several times: look back over a few occurrences.
        for before in seen[-8:]:
            counts[index - before] = counts.get(index - before, 0) + 1
        seen.append(index)
    often = [period for period in counts if counts[period] >= period * (LEAST - 1) // 2]
    return sorted(often, key=lambda period: (-counts[period], period))[:16]


def _inputs_match(
    one: ir.Node,
    other: ir.Node,
    period: int,
    position: Mapping[ir.Node, int],
    weights: Collection[ir.Value],
) -> bool:
    if len(one.inputs) != len(other.inputs):
        return False
    for a, b in zip(one.inputs, other.inputs, strict=True):
        if a is b:
            continue
        if a is None or b is None:
            return False
        if a in weights and b in weights:
            if a.shape != b.shape or a.dtype != b.dtype:
                return False
            continue
        maker, later = a.producer(), b.producer()
        if maker is None or later is None or a.index() != b.index():
            return False
        if position.get(later, -1) - position.get(maker, 0) != period:
            return False
    return True


def _longest(flags: Sequence[bool]) -> tuple[int, int]:
    """Start and length of the longest run of True."""
    best, start = (0, 0), 0
    for index, flag in enumerate([*flags, False]):
        if not flag:
            best = max(best, (index - start, -start))
            start = index + 1
    return -best[1], best[0]


def _cut(
    nodes: Sequence[ir.Node],
    first: int,
    period: int,
    count: int,
    position: Mapping[ir.Node, int],
    weights: Collection[ir.Value],
) -> Repeats | None:
    """The blocks from a node on, or None if something is read in a way that a scan cannot."""
    stop = first + count * period
    blocks = tuple(tuple(nodes[start : start + period]) for start in range(first, stop, period))
    stacked: dict[ir.Value, tuple[ir.Value, ...]] = {}
    carried: dict[ir.Value, Place] = {}
    shared: set[ir.Value] = set()
    for row in zip(*blocks, strict=True):
        for values in zip(*(node.inputs for node in row), strict=True):
            head = values[0]
            if head is None:
                continue
            maker = head.producer()
            if maker is not None and first <= position[maker] < first + period:
                continue
            if all(value is head for value in values):
                shared.add(head)
            elif all(value in weights for value in values):
                if stacked.setdefault(head, values) != values:
                    return None
            else:
                made = values[1].producer() if values[1] is not None else None
                place = (position[made] - first, values[1].index()) if made is not None else None
                if place is None or not 0 <= place[0] < period:
                    return None
                if carried.setdefault(head, place) != place:
                    return None
    names = set(stacked) | set(carried)
    distinct = len(set(carried.values())) == len(carried)
    if names & shared or set(stacked) & set(carried) or not distinct:
        return None
    members = [value for values in stacked.values() for value in values]
    inside = {node for block in blocks for node in block}
    if len(set(members)) < len(members) or any(_is_read_by_others(v, inside) for v in members):
        return None
    before, after = tuple(nodes[:first]), tuple(nodes[stop:])
    return Repeats(before, blocks, after, stacked, carried)


def _is_read_by_others(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Whether something else than these nodes reads a value, so that it cannot be in a stack."""
    return value.is_graph_output() or any(user not in nodes for user, _ in value.uses())


def run(
    repeats: Repeats,
    stacks: Mapping[ir.Value, Any],
    env: dict[ir.Value, Any],
    run_nodes: Callable[[Sequence[ir.Node], dict[ir.Value, Any]], None],
) -> None:
    """Run all of a graph, the blocks as one scan, and leave every value that is read in ``env``.

    Args:
        stacks: For each stacked weight, by the first block's, those of all blocks in one array.
        run_nodes: Runs nodes in order on values, in place.
    """
    run_nodes(repeats.before, env)
    escaping = repeats.escaping()
    places = list(repeats.carried.values())

    def body(carry: tuple[Any, ...], own: tuple[Any, ...]) -> tuple[Any, Any]:
        inner = {**env, **dict(zip(repeats.carried, carry, strict=True))}
        inner.update(zip(stacks, own, strict=True))
        run_nodes(repeats.blocks[0], inner)
        made = tuple(jnp.asarray(inner[repeats.at(0, place)]) for place in places)
        return made, tuple(inner[repeats.at(0, place)] for place in escaping)

    # A scan gives back what it was given to the letter: no array may be of a weak type.
    start = tuple(_strong(env[value]) for value in repeats.carried)
    carry, escaped = jax.lax.scan(body, start, tuple(stacks.values()))
    for place, value in zip(places, carry, strict=True):
        env[repeats.at(-1, place)] = value
    for place, values in zip(escaping, escaped, strict=True):
        for number in range(len(repeats.blocks)):
            env.setdefault(repeats.at(number, place), values[number])
    run_nodes(repeats.after, env)


def _strong(value: Any) -> Any:
    return jax.lax.convert_element_type(value, np.dtype(value.dtype))


def stack_names(repeats: Repeats) -> dict[str, list[str]]:
    """What each stack is called, by its first weight -> the weights in it."""
    return {
        f"{head.name} and {len(values) - 1} alike": [value.name or "" for value in values]
        for head, values in repeats.stacked.items()
    }
