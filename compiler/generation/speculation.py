"""Guess the next tokens from what the text has said before (prompt look-up).

A text that copies from its prompt (code that is edited, an answer that quotes) repeats runs of
tokens. What followed the last few tokens where they stood earlier is a guess for what follows now;
the model then checks all guessed tokens in one call, and those that it would have chosen itself
are kept. Source: Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

LONGEST, SHORTEST = 4, 2
"""Tokens that must agree for a guess, tried from the longest on."""

MOST = 8
"""Tokens guessed at once, at most."""

_PAUSE = 16
"""Tokens generated without a guess after guesses have failed."""


class PromptLookup:
    """Guesses for one sequence; how many adapts to how many came true.

    A call that checks four tokens takes about twice the time of one that makes one token, so wrong
    guesses cost: their number halves when less than half of one came true, and after a guess of
    one token that failed there is a pause.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST)]
        self._length = SHORTEST
        self._pause = 0
        self.guessed = 0
        self.accepted = 0

    def extend(self, tokens: list[int]) -> None:
        """Take note of tokens that the sequence now has."""
        self._pause = max(0, self._pause - len(tokens))
        for token in tokens:
            # Only what is followed by something can tell what follows.
            for size, places in enumerate(self._places, 1):
                if len(self._tokens) >= size:
                    places[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Return up to ``most`` tokens that may come next; often none."""
        if self._pause or most < 1:
            return []
        for size in range(LONGEST, SHORTEST - 1, -1):
            place = self._places[size - 1].get(tuple(self._tokens[-size:]))
            if len(self._tokens) >= size and place is not None:
                return self._tokens[place : place + min(self._length, most)]
        return []

    def likely(self, guess: list[int]) -> int:
        """Return the best bet for a token after a guess, where checking one costs nothing."""
        known = [*self._tokens[-LONGEST:], *guess]
        for size in range(min(LONGEST, len(known)), 0, -1):
            place = self._places[size - 1].get(tuple(known[-size:]))
            if place is not None:
                return self._tokens[place]
        return known[-1]

    def learn(self, guessed: int, accepted: int) -> None:
        """Adapt to how many of the guessed tokens came true."""
        if not guessed:
            return
        self.guessed += guessed
        self.accepted += accepted
        if accepted == guessed:
            self._length = min(MOST, self._length * 2)
        elif accepted * 2 < guessed:
            if self._length == 1:
                self._pause = _PAUSE
            self._length = max(1, self._length // 2)
