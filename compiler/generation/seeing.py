"""Prompts with images in them: a decoder that takes embeddings, and the parts that make them.

An image becomes tokens of its own, beyond the vocabulary, one for each embedding that it gives. To
the loop that generates they are tokens like any others: they are batched, cached and reused alike,
and the same image has the same tokens.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trivium.compiler.errors import BadInput
from trivium.compiler.generator import Decoder, Generator, Sight
from trivium.compiler.parts import Chain
from trivium.compiler.samples import conform_feeds
from trivium.compiler.types import TensorInfo

if TYPE_CHECKING:
    from trivium.compiler.backend import Executable, Tensors

    Array = np.ndarray[Any, Any]

MOST_IMAGES = 64
"""Images whose embeddings are kept; those that were shown longest ago leave first."""


class Embeddings:
    """Turns tokens into embeddings by the parts before a decoder.

    Args:
        parts: Those parts, in order.
        outputs: What each of them gives.
    """

    def __init__(
        self,
        generator: Generator,
        sight: Sight,
        parts: Mapping[str, Executable],
        outputs: Mapping[str, Sequence[TensorInfo]],
    ) -> None:
        self.sight = sight
        self._result, self._first = generator.tokens, generator.vocabulary
        self._parts, self._outputs = parts, outputs
        self._next = self._first
        self._shown: OrderedDict[str, range] = OrderedDict()
        self._rows: dict[int, Array] = {}

    def __call__(self, tokens: Array) -> Array:
        """Return the embeddings [rows, new, width] of tokens [rows, new]."""
        plain = np.where(tokens < self._first, tokens, 0)
        made = self._made({self.sight.ids: plain.astype(np.int64)})[self._result]
        for row, column in np.argwhere(tokens >= self._first):
            made[row, column] = self._rows[int(tokens[row, column])]
        return made

    def knows(self, token: int) -> bool:
        """Whether a token is of an image that is still kept."""
        return token in self._rows

    def look(self, pixels: Array) -> list[int]:
        """Return the tokens of an image, float [channels, height, width]."""
        ids = np.full((1, self.sight.count), self.sight.token, np.int64)
        return self.add(
            self._made({self.sight.pixels: pixels[None], self.sight.ids: ids})[self._result][0]
        )

    def add(self, rows: Array) -> list[int]:
        """Return tokens for embeddings [tokens, width]; the same ones for the same."""
        key = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
        if key not in self._shown:
            while len(self._shown) >= MOST_IMAGES:
                _, gone = self._shown.popitem(last=False)
                for token in gone:
                    del self._rows[token]
            self._shown[key] = range(self._next, self._next + len(rows))
            self._rows |= zip(self._shown[key], np.array(rows), strict=True)
            self._next += len(rows)
        self._shown.move_to_end(key)
        return list(self._shown[key])

    def _made(self, known: dict[str, Array]) -> dict[str, Array]:
        """What the parts give; those that look at images, nothing where none is shown."""
        for name, part in self._parts.items():
            if all(info.name in known for info in part.inputs):
                known |= part.run(known)
                continue
            for info in self._outputs[name]:
                shape = [size if isinstance(size, int) else 0 for size in info.shape]
                known[info.name] = np.zeros(shape, np.float32)
        return known


class SeeingChain(Chain):
    """The parts of a decoder that sees; `generator` hands out the decoder of its last one."""

    def __init__(
        self,
        inputs: Sequence[TensorInfo],
        parts: Mapping[str, Executable],
        generator: Generator,
        outputs: Mapping[str, Sequence[TensorInfo]],
    ) -> None:
        super().__init__(inputs, parts)
        sight = generator.sight
        if sight is None:
            raise ValueError("its generator does not say how it sees")
        *before, last = parts
        self._generator = generator
        self._decoder: Decoder[Any] = parts[last].generator()  # type: ignore[attr-defined]
        self._before = {name: parts[name] for name in before}
        self.embeddings = Embeddings(generator, sight, self._before, outputs)
        self._decoder.embeddings = self.embeddings

    def generator(self) -> Decoder[Any]:
        """The decoder; tokens of images are those that its ``embeddings`` give."""
        return self._decoder

    def run(self, feeds: Tensors) -> dict[str, Array]:
        """Return what all parts give; logits are zeros at padding."""
        found, rows, kept = self._looked(feeds)
        logits = np.zeros((*kept.shape, self._generator.vocabulary), np.float32)
        for row, (tokens, keep) in enumerate(zip(rows, kept, strict=True)):
            if tokens:
                cache = self._decoder.start(capacity=len(tokens))
                logits[row, keep] = self._decoder.feed(cache, [tokens], keep=len(tokens))[0]
        return {**found, self._generator.logits: logits}

    def driven(self, feeds: Tensors) -> dict[str, Array]:
        """What the parts before the decoder give, and its logits at every token that is no
        padding, by prefill and token by token."""
        from trivium.compiler.generation.compiling import driven_logits

        found, rows, _ = self._looked(feeds)
        return {**found, **driven_logits(self._decoder, rows)}

    def _looked(self, feeds: Tensors) -> tuple[dict[str, Array], list[list[int]], Array]:
        """What the parts before the decoder give, tokens for each row, and where they are."""
        known = dict(conform_feeds(feeds, self.inputs))
        found: dict[str, Array] = {}
        for part in self._before.values():
            outputs = part.run(known)
            known |= outputs
            found |= outputs
        embedded = found[self._generator.tokens]
        mask = known.get(self._generator.mask or "")
        kept = np.ones(embedded.shape[:2], bool) if mask is None else np.asarray(mask) != 0
        rows = [self.embeddings.add(own[keep]) for own, keep in zip(embedded, kept, strict=True)]
        return found, rows, kept


def with_images(
    tokens: Sequence[int], images: Sequence[Array], embeddings: Embeddings
) -> list[int]:
    """Put the tokens of images, float [channels, height, width], into a prompt.

    The prompt holds the token that stands for an image once for each, or as often as an image has
    embeddings.

    Raises:
        BadInput: There are more or fewer places than images.
    """
    sight = embeddings.sight
    places = sum(token == sight.token for token in tokens)
    if places not in (len(images), len(images) * sight.count):
        raise BadInput(
            f"has {places} places for {len(images)} images",
            about="the prompt",
            remedy=f"give the token {sight.token} (<image>, as a rule) once for each",
        )
    repeated = sight.count if places != len(images) else 1
    shown = iter([embeddings.look(image) for image in images])
    filled: list[int] = []
    seen = 0
    for token in tokens:
        if token != sight.token:
            filled.append(token)
            continue
        if seen % repeated == 0:
            filled += next(shown)
        seen += 1
    return filled
