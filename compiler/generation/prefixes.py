"""Caches of what was read before, so that texts that begin alike are read once.

A conversation that goes on, or many questions after one instruction: the tokens at the begin of a
new prompt are often those of an earlier one, and so are their keys and values.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from trivium.compiler.generator import Decoder

LEAST = 16
"""Tokens that must agree before a copy is worth it."""


class PrefixCache:
    """Keeps caches of single rows by their tokens, the least recently used leave first.

    Args:
        most_bytes: How much they may hold together; 0 keeps none.
    """

    def __init__(self, decoder: Decoder[Any], most_bytes: int) -> None:
        self._decoder, self._most = decoder, most_bytes
        self._held: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def take(self, prompt: Sequence[int]) -> tuple[Any, int]:
        """Return a cache of the longest known begin of a prompt and its length; None and 0 if none
        is worth it. The prompt's last token is never in it: its logits are wanted."""
        best, length = None, LEAST - 1
        for tokens in self._held:
            common = _common(tokens, prompt[:-1])
            if common > length:
                best, length = tokens, common
        if best is None:
            return None, 0
        self._held.move_to_end(best)
        return self._decoder.copy(self._held[best], 0, length), length

    def keep(self, tokens: Sequence[int], cache: Any, row: int) -> None:
        """Keep a copy of a row that holds these tokens."""
        key = tuple(tokens)
        if len(key) < LEAST or self._bytes(key) > self._most:
            return
        for known in list(self._held):
            common = _common(known, key)
            if common == len(key):  # what is kept says as much
                self._held.move_to_end(known)
                return
            if common == len(known):
                del self._held[known]
        while self._held and sum(map(self._bytes, self._held)) + self._bytes(key) > self._most:
            self._held.popitem(last=False)
        self._held[key] = self._decoder.copy(cache, row, len(key))

    def clear(self) -> None:
        self._held.clear()

    def _bytes(self, tokens: tuple[int, ...]) -> int:
        generator = self._decoder.generator
        if generator.grows:
            return len(tokens) * generator.bytes_per_token
        return (generator.rows or 1) * generator.context * generator.bytes_per_token


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin alike with."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
