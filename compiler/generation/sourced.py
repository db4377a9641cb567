"""Decoders that go out from a source text: an encoder reads it once, and each step of the decoder
looks at the keys and values that come of it.

A source becomes one token beyond the vocabulary, which stands for the token that texts start with.
To the loop that generates it is a prompt like any other.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from trivium.compiler import parts
from trivium.compiler.errors import BadInput
from trivium.compiler.generator import Decoder, Generator, Source
from trivium.compiler.passing import is_constant, is_op
from trivium.compiler.samples import conform_feeds
from trivium.compiler.types import TensorInfo

if TYPE_CHECKING:
    from trivium.compiler.backend import Executable, Tensors

    Array = np.ndarray[Any, Any]

SOURCE = "trivium.source"
"""Key of the metadata of a model with an encoder and a decoder: JSON, a `Source`."""

ENCODER, DECODER = "encoder", "decoder"

MOST_SOURCES = 64
"""Sources of which the keys and values are kept until they are asked for."""


def declare(model: ir.Model, source: Source) -> None:
    """Say how the source of a model with an encoder and a decoder is given."""
    model.metadata_props[SOURCE] = json.dumps(asdict(source))


def source_of(model: ir.Model) -> Source | None:
    """What `declare` said.

    Raises:
        BadInput: It is not a `Source`.
    """
    text = model.metadata_props.get(SOURCE)
    if text is None:
        return None
    try:
        return Source.from_json(json.loads(text))
    except (ValueError, TypeError) as error:
        raise BadInput("does not say where a source goes", about=f"metadata {SOURCE}") from error


def cut(model: ir.Model, source: Source) -> Source:
    """Make what the decoder reads of the encoder outputs of the model, and declare both parts.

    Nodes that follow from the decoder's tokens are the decoder's; what they read of the others, as
    the keys and values of cross-attention, is computed once for a source.

    Returns:
        The source, with the names of what the decoder reads.
    """
    graph = model.graph
    outputs = [str(value.name) for value in graph.outputs]
    inputs = {str(value.name): value for value in graph.inputs}
    later, earlier = {inputs[source.target]}, {inputs[source.ids], inputs[source.mask]}
    read: dict[ir.Value, None] = {}
    for node in graph:
        given = [value for value in node.inputs if value is not None and not is_constant(value)]
        if any(value in later for value in given):
            later.update(node.outputs)
            read |= dict.fromkeys(value for value in given if value in earlier)
        elif any(value in earlier for value in given):
            earlier.update(node.outputs)
    taken = dict.fromkeys(_unless_a_size(value) for value in read)
    memory = [value for value in taken if value.producer() is not None]
    graph.outputs.extend(value for value in memory if not value.is_graph_output())
    names = [str(value.name) for value in memory]
    parts.declare(model, {ENCODER: names, DECODER: outputs})
    return replace(source, memory=tuple(str(value.name) for value in taken))


def _unless_a_size(value: ir.Value) -> ir.Value:
    """The value; what it is the size of, if it is one, which the decoder can ask for itself."""
    node = value.producer()
    sized = node.inputs[0] if node is not None and is_op(node, "Shape") else None
    return value if sized is None else sized


class Sources:
    """Reads source texts; each is then known by a token.

    Args:
        encoder: The part that reads.
        first: The first token beyond the vocabulary.
    """

    def __init__(self, source: Source, encoder: Executable, first: int) -> None:
        self.source, self._encoder, self._next = source, encoder, first
        self._held: OrderedDict[int, dict[str, Array]] = OrderedDict()

    def read(self, tokens: Sequence[int]) -> int:
        """Return the token that stands for a source."""
        token, self._next = self._next, self._next + 1
        while len(self._held) >= MOST_SOURCES:
            self._held.popitem(last=False)
        self._held[token] = self.memory(tokens)
        return token

    def memory(self, tokens: Sequence[int]) -> dict[str, Array]:
        """What the decoder looks at, of one source."""
        ids = np.array([tokens], np.int64)
        known = {self.source.ids: ids, self.source.mask: np.ones_like(ids)}
        known |= self._encoder.run(known)
        return {name: known[name] for name in self.source.memory}

    def knows(self, token: int) -> bool:
        return token in self._held

    def held(self, token: int) -> dict[str, Array]:
        return self._held[token]


class SourcedChain(parts.Chain):
    """An encoder and a decoder; `generator` hands out the decoder, which knows sources by the
    tokens that ``sources`` gives."""

    def __init__(
        self, inputs: Sequence[TensorInfo], loaded: Mapping[str, Executable], generator: Generator
    ) -> None:
        super().__init__(inputs, loaded)
        if generator.source is None:
            raise ValueError("its generator has no source")
        self._generator, self._source = generator, generator.source
        self._decoder: Decoder[Any] = loaded[DECODER].generator()  # type: ignore[attr-defined]
        self.sources = Sources(generator.source, loaded[ENCODER], generator.vocabulary)
        self._decoder.sources = self.sources

    def generator(self) -> Decoder[Any]:
        return self._decoder

    def run(self, feeds: Tensors) -> dict[str, Array]:
        """Return the logits at every token of the target, of each row by itself."""
        found = []
        for tokens, cache in self._rows(feeds):
            found.append(self._decoder.feed(cache, [tokens], keep=len(tokens))[0])
        return {self._generator.logits: np.stack(found)}

    def driven(self, feeds: Tensors) -> dict[str, Array]:
        """The same, by prefill and token by token; row after row."""
        found = []
        for tokens, cache in self._rows(feeds):
            half = max(1, len(tokens) // 2)
            pieces = (tokens[:half], *([token] for token in tokens[half:]))
            logits = [self._decoder.feed(cache, [p], keep=len(p))[0] for p in pieces]
            found.append(np.concatenate(logits))
        return {self._generator.logits: np.concatenate(found)}

    def _rows(self, feeds: Tensors) -> list[tuple[list[int], Any]]:
        """The tokens of each target, and a cache that knows its source."""
        ready = conform_feeds(feeds, self.inputs)
        ids, kept = ready[self._source.ids], np.asarray(ready[self._source.mask]) != 0
        rows = []
        for own, keep, target in zip(ids, kept, ready[self._source.target], strict=True):
            tokens = [int(token) for token in target]
            cache = self._decoder.start(capacity=len(tokens))
            cache.memory = self.sources.memory([int(token) for token in own[keep]])
            rows.append((tokens, cache))
        return rows
