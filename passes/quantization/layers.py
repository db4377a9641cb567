"""Choices for single layers: shell patterns of names, as the quantizing passes take them.

A layer answers to the name of its node and to those of the constants that it reads: exporters name
the one well, checkpoints the other. ``exclude`` lists patterns; ``precision`` lists
``PATTERN=WORD``, of which the last that matches counts, so that exceptions follow the rule::

    precision = ["model.layers.*=int4", "*.down_proj.*=int8/64", "lm_head.*=float"]
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from trivium.compiler.model import note
from trivium.compiler.passing import is_constant

FLOAT = "float"

EXCLUDE = "Layers to leave alone, by the name of a node or of its weight; * and ? as in a shell"


@dataclass(frozen=True)
class Choice:
    """What one entry of ``precision`` asks for.

    Attributes:
        pattern: Of names, as in a shell.
        bits: Of the layer's weight; None = it stays float.
        block_size: Values that share a scale, where the entry says so.
    """

    pattern: str
    bits: int | None
    block_size: int | None = None


def parse(
    entries: Collection[str], *, bits: Collection[int], blocks: Collection[int] = ()
) -> tuple[Choice, ...]:
    """Read ``PATTERN=float``, ``PATTERN=int4`` and, where there are blocks, ``PATTERN=int4/64``.

    Raises:
        ValueError: An entry is none of these; the message says what it may be.
    """
    words = {f"int{count}": count for count in sorted(bits)}
    choices = []
    for entry in entries:
        pattern, separator, word = entry.rpartition("=")
        kind, _, block = word.partition("/")
        known = kind in words or word == FLOAT
        fits = not block or (block.isdigit() and int(block) in blocks)
        if not separator or not pattern or not known or not fits:
            wanted = ", ".join([FLOAT, *words])
            suffix = f", then /BLOCK of {', '.join(map(str, sorted(blocks)))}" if blocks else ""
            raise ValueError(
                f"precision {entry!r} is not PATTERN=WORD, where WORD is one of {wanted}{suffix}"
            )
        choices.append(Choice(pattern, words.get(kind), int(block) if block else None))
    return tuple(choices)


def names(node: ir.Node) -> Iterator[str]:
    """What a layer answers to."""
    yield node.name or ""
    for value in node.inputs:
        if value is not None and is_constant(value):
            yield value.name or ""


def excluded(node: ir.Node, patterns: Collection[str]) -> bool:
    """Whether one of the patterns names a layer."""
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names(node))


def chosen(node: ir.Node, choices: Collection[Choice]) -> Choice | None:
    """The last choice that names a layer, if any does."""
    found = None
    for choice in choices:
        if any(fnmatchcase(name, choice.pattern) for name in names(node)):
            found = choice
    return found


def note_unmatched(
    model: ir.Model, patterns: Collection[str], choices: Collection[Choice] = ()
) -> None:
    """Note in the manifest which patterns name no layer: most likely they are misspelt."""
    wanted = dict.fromkeys([*patterns, *(choice.pattern for choice in choices)])
    if not wanted:
        return
    known = {name for node in model.graph.all_nodes() for name in names(node)}
    lost = [p for p in wanted if not any(fnmatchcase(name, p) for name in known)]
    note(model, [f"the pattern {pattern!r} names no layer" for pattern in lost])
